"""What a run would need, without training: python train.py --osp --preset 1.4b --dry-run

Everything is built on the meta device, which has shapes but no memory.
"""

if __name__ == "__main__":
    raise SystemExit("error: run this as python train.py --dry-run")

import json

import torch

import train
from data.dataset import find_dataset, read_meta
from model import Transformer
from muon import make_optimizers
from nanoosp.options import command, is_first, parse
from nanoosp.summary import optimizer_table


@command
def main(argv=None):
    opt = parse(train.Options, train.__doc__, argv)
    train.resolve(opt)
    if not is_first():
        return
    directory = find_dataset(opt.data) if opt.data not in (None, "random") else None
    if directory and not directory.is_dir():
        if opt.data != "shakespeare":  # which a run would prepare
            raise FileNotFoundError(f"--data {opt.data}: no such dataset")
        directory = None
    n_ids = read_meta(directory)["vocab_size"] if directory else 256
    with torch.device("meta"):
        model = Transformer(train.model_config(opt, n_ids))
        optimizers = make_optimizers(model, opt.optimizer, opt.lr, opt.embed_lr, opt.weight_decay)
    n = state = sum(p.numel() for p in model.parameters())
    for optimizer in optimizers:
        if isinstance(optimizer, torch.optim.AdamW):  # two numbers a parameter, Muon has one
            state += sum(p.numel() for group in optimizer.param_groups for p in group["params"])
    tokens = opt.batch_size * opt.seq_len
    if opt.json:
        print(json.dumps(dict(parameters=n, optimizer_state=state, tokens_per_step=tokens,
                              tokens=tokens * opt.steps)))
        return
    if not directory and not opt.vocab_size:
        print("vocabulary 256 assumed, of bytes; --data says what it will be")
    mib = 4 / 2**20  # fp32
    print(f"""{model.config}
{optimizer_table(optimizers)}
parameters  {n:,}
memory      {n * mib:,.1f} MiB weights, {n * mib:,.1f} MiB gradients,
            {state * mib:,.1f} MiB optimizer state, and the activations on top
tokens      {tokens:,} a step, {tokens * opt.steps:,} in {opt.steps:,} steps""")
