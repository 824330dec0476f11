"""Train a model with or without Outlier-Safe Pre-Training (OSP), from a laptop to many GPUs.

    python train.py --osp                         OSP on Shakespeare: Muon + SSNorm + EmbProj
    python train.py                               the same model the usual way: Adam, RMSNorm
    python train.py --optimizer muon --norm ss    only some parts of OSP
    python train.py --resume runs/NAME            continue a stopped run (bit for bit on a CPU)
    python train.py --ablation                    the rows of the paper's Table 2, one by one
    torchrun --nproc-per-node 8 train.py --osp --preset 1.4b --data DIR --vocab-size 50304
    python train.py --osp --preset 1.4b --bench   measure how fast this machine trains

A run is a directory: config.json (options), log.jsonl (an object a line), ckpt.pt, summary.json.
An option that is left out takes its preset's value, from the table at the end of --help.

Read it top to bottom: presets, options, defaults, schedule, model, backward, one step, the loop.
The machinery is in nanoosp/: the run's directory and log, ranks, what makes it fast.
"""

import math
from contextlib import nullcontext
from dataclasses import dataclass

from nanoosp.methods import OPTIMIZERS
from nanoosp.options import answer_before_torch, begin, command, fill, option, parse
from nanoosp.run_options import RunOptions, check_before_torch, presets_table, resume, settle

# A row has the values of options that are left out. Learning rates of tiny and toy come from sweeps
# (results/depth/; muon-only's: results/ablation_narrow/), of small from their trend with width, of
# 1.4b from the paper (App. A.1). Where "muon-only" has no rate of its own, it has that of "muon".
PRESETS = {
    # two CPU cores, two to three minutes
    "tiny": dict(n_layer=6, n_head=3, n_embd=96, data="shakespeare", seq_len=128, batch_size=8,
                 steps=1800, lr=dict(adam=4e-3, muon=4e-3), eval_windows=256, cuda_graph=True),
    # one GPU, less than a minute
    "toy": dict(n_layer=12, n_head=4, n_embd=256, data="shakespeare", seq_len=256, batch_size=16,
                steps=2400, lr={"adam": 1.4e-3, "muon": 3e-3, "muon-only": 1.5e-3},
                eval_windows=256, cuda_graph=True),
    # GPT-2's size, for real text; both rates trained once
    "small": dict(n_layer=12, n_head=12, n_embd=768, seq_len=1024, batch_size=256, steps=4000,
                  lr=dict(adam=1e-3, muon=2e-3), eval_windows=256, eval_every=200, save_every=200,
                  micro_batch_size=16),
    # the paper's: 2^22 tokens a step, 100B in all; micro-batches for 80 GB
    "1.4b": dict(n_layer=24, n_head=16, n_embd=2048, vocab_size=49152, seq_len=2048,
                 batch_size=2048, steps=23842, lr=dict(adam=5e-3, muon=5e-4), eval_windows=256,
                 eval_every=250, save_every=250, micro_batch_size=8),
}


@dataclass
class Options(RunOptions):
    """What is trained. An option that is None gets its value in resolve()."""

    osp: bool = option(False, "all three: --optimizer muon --norm ss --embproj", launch=True,
                       group="the method: each part of OSP is a switch")
    optimizer: str = option("adam", "muon: AdamW for embedding and head; muon-only: Muon for all",
                            choices=OPTIMIZERS)
    norm: str = option("rms", "RMSNorm: a gain per channel. SSNorm: one", choices=["rms", "ss"])
    embproj: bool = option(None, "learned projections beside embedding and head, folded away later")

    preset: str = option(None, "shape and schedule (default: toy on CUDA, else tiny)",
                         choices=list(PRESETS), group="the model and its text")
    data: str = option(None, "a folder of data/prepare.py, llm.c or nanoGPT", may_change=True)
    n_layer: int = option(None, "blocks", high=1000)
    n_head: int = option(None, "attention heads")
    n_embd: int = option(None, "channels of the residual stream")
    vocab_size: int = option(None, "embedding rows (default: the ids, up to a multiple of 64)")
    seq_len: int = option(None, "tokens per sequence", low=2)

    steps: int = option(None, "optimizer steps in all", may_change=True, group="the optimization")
    batch_size: int = option(None, "sequences per optimizer step, over all ranks")
    lr: float = option(None, "peak learning rate, of Adam or of Muon")
    embed_lr: float = option(None, "AdamW's with --optimizer muon (default: twice --lr)")
    weight_decay: float = option(0.01, "a step shrinks weights by lr times this", low=0)
    warmup: int = option(None, "steps before the peak rate (default: 5 %% of --steps)", low=0)
    cooldown: int = option(None, "final steps, slower (default: 20 %%)", low=0, may_change=True)
    grad_clip: float = option(1.0, "clip the gradient to this norm; 0: never", low=0)
    seed: int = option(0, "for the initial weights and the data order", low=0)

    after_help = presets_table(PRESETS)


def defaults(opt):
    """Fill in the options that are None: with the preset's values, then with these."""
    fill(opt, preset="toy" if opt.device == "cuda" else "tiny", embproj=False)
    preset = PRESETS[opt.preset]
    rates = preset["lr"]
    fill(opt, **dict(preset, lr=rates.get(opt.optimizer, rates["muon"])))
    fill(opt, embed_lr=2 * opt.lr, warmup=opt.steps // 20, cooldown=opt.steps // 5)


answer_before_torch("train.py", Options, lambda opt: check_before_torch(opt, defaults))

import torch

from data.splits import open_datasets
from eval import at_four_bits, evaluate
from model import Config, Transformer
from muon import make_optimizers
from nanoosp.fast import speed_up
from nanoosp.machine import pick_device
from nanoosp.ranks import Ranks
from nanoosp.run import Run, check_finite, check_vocabulary


def trapezoid(step: int, steps: int, warmup: int, cooldown: int) -> float:
    """Learning rate factor in steps 1 ... `steps`: up, flat, down (App. A.1). The + 1 moves its
    zeros out of the run: to the step before the first and the step after the last."""
    return min(1.0, step / (warmup + 1), (steps - step + 1) / (cooldown + 1))


def model_config(opt, n_ids: int) -> Config:
    """The shape of the model for a tokenizer with `n_ids` ids. Raises ValueError if these are more
    than --vocab-size."""
    vocab_size = opt.vocab_size or math.ceil(n_ids / 64) * 64  # 64: fast matrix products
    check_vocabulary(vocab_size, n_ids)
    return Config(opt.n_layer, opt.n_head, opt.n_embd, vocab_size, opt.norm, opt.embproj)


def build(opt, n_ids: int, ranks):
    """(model, optimizers, forward). Training calls forward: the model, or DDP around it."""
    torch.manual_seed(opt.seed)
    with torch.device(ranks.device if opt.device == "cuda" else "cpu"):
        model = Transformer(model_config(opt, n_ids)).to(ranks.device)  # CUDA draws its own, fast
    optimizers = make_optimizers(model, opt.optimizer, opt.lr, opt.embed_lr, opt.weight_decay,
                                 ranks.muon())
    forward = ranks.average_gradients(speed_up(model, opt))
    return model, optimizers, forward


def backward(forward, batch, micro_batch_size: int, ranks):
    """Accumulate the gradient of the mean loss of `batch` [rows, T + 1]. Returns that mean."""
    total = 0.0
    parts = batch.split(micro_batch_size)  # of equal size: the mean of their means is the mean
    for i, rows in enumerate(parts):
        is_last = i == len(parts) - 1  # only then does DDP average the gradients over ranks
        with nullcontext() if is_last or ranks.world == 1 else forward.no_sync():
            loss = forward(rows[:, :-1], rows[:, 1:]) / len(parts)
            loss.backward()
        total = total + loss.detach()
    return total


def optimizer_step(step: int, opt, batch, built, ranks) -> tuple[float, float]:
    """Training step number `step`, on this rank's `batch` [rows, T + 1]. `built`: what build()
    returned. Returns loss and gradient norm. Raises ArithmeticError if they are not finite."""
    model, optimizers, forward = built
    factor = trapezoid(step, opt.steps, opt.warmup, opt.cooldown)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"] * factor
    loss = backward(forward, batch, opt.micro_batch_size, ranks)
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), opt.grad_clip or math.inf)
    loss, norm = ranks.mean(torch.stack([loss, norm]))  # the norm is everywhere the same
    check_finite(f"loss {loss}, gradient norm {norm} in step {step}", loss, norm)
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad(set_to_none=ranks.world == 1)  # DDP keeps them in its buffers
    return loss, norm


def train(opt, state, ranks):
    """Train from the checkpoint `state`, or from scratch, to opt.steps."""
    data, val = open_datasets(opt.data, opt.seq_len, opt.seed, ranks)
    built = build(opt, data.meta["vocab_size"], ranks)
    model, optimizers, _ = built
    run = Run(opt, ranks, model, optimizers, data, state)
    measured_on = (val, opt.eval_windows, opt.micro_batch_size, ranks)
    if run.start == 0:
        run.log_evaluation(0, evaluate(model, *measured_on))
    for step in run.steps():  # shows progress, saves once in a while, and stops at a signal
        batch = torch.from_numpy(data.batch(step - 1, opt.batch_size, ranks.rank, ranks.world))
        loss, norm = optimizer_step(step, opt, batch.to(ranks.device), built, ranks)
        run.log_step(step, loss, norm)
        if step % opt.eval_every == 0 or step == opt.steps:
            result = evaluate(model, *measured_on)  # loss and kurtosis
            run.log_evaluation(step, result)
    result["quantized"] = at_four_bits(model, *measured_on)
    run.finish(result)


def resolve(opt):
    """Give options that are None their values: first those of the run that is resumed, then those
    of defaults(). Returns the checkpoint to resume from, or None."""
    state = resume(opt)
    opt.device = pick_device(opt.device)
    defaults(opt)
    settle(opt, state)  # what the machine decides; ends the program if options do not fit
    return state


@command
def main(argv=None):
    opt = parse(Options, __doc__, argv)
    state = resolve(opt)
    with Ranks.start(opt.device) as ranks:
        train(opt, state, ranks)


if __name__ == "__main__":
    begin(main, "tools.ablation", "tools.dry_run", "tools.bench")
