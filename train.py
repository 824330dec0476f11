"""Train a model with or without Outlier-Safe Pre-Training (OSP), from a laptop to many GPUs.

    python train.py --osp                         OSP on Shakespeare: Muon + SSNorm + EmbProj
    python train.py                               the same model the usual way: Adam, RMSNorm
    python train.py --optimizer muon --norm ss    only some parts of OSP
    python train.py --resume runs/NAME            continue a stopped run (bit for bit on a CPU)
    python train.py --ablation                    the rows of the paper's Table 2, one by one
    torchrun --nproc-per-node 8 train.py --osp --preset 1.4b --data DIR --vocab-size 50304
    python train.py --osp --preset 1.4b --bench   measure how fast this machine trains

A run is a directory: config.json (options), log.jsonl (an object a line), ckpt.pt, summary.json.

Read it top to bottom: presets, options, schedule, model, backward, the loop, default options.
The machinery is in nanoosp/: the run's directory, ranks, signals.
"""

import importlib
import math
import sys
import time
from contextlib import nullcontext
from dataclasses import dataclass

from nanoosp.options import answer_before_torch, command, fail, fill, option, parse
from nanoosp.run import Run, RunOptions, check_options, micro_batch_size, restore, resume, usual

# Shape and schedule. Learning rates of tiny and toy come from sweeps (results/README.md), of small
# from their trend with width, of 1.4b from the paper (App. A.1). micro: micro-batch for 80 GB.
# every: steps between evaluations, and between checkpoints. cuda_graph: see --help.
PRESETS = {
    "tiny": dict(  # two CPU cores, two to four minutes
        n_layer=4, n_head=4, n_embd=128, seq_len=128, batch_size=16, steps=800,
        adam_lr=3e-3, muon_lr=6e-3, eval_windows=256, cuda_graph=True),
    "toy": dict(  # one GPU, half a minute
        n_layer=6, n_head=6, n_embd=384, seq_len=256, batch_size=64, steps=1000,
        adam_lr=1e-3, muon_lr=4e-3, eval_windows=512, cuda_graph=True),
    "small": dict(  # GPT-2's size, for real text; both rates trained once (results/README.md)
        n_layer=12, n_head=12, n_embd=768, seq_len=1024, batch_size=256, steps=4000,
        adam_lr=1e-3, muon_lr=2e-3, eval_windows=256, micro=16, every=200),
    "1.4b": dict(  # the paper's: 2^22 tokens per step, 100B in all
        n_layer=24, n_head=16, n_embd=2048, vocab_size=49152, seq_len=2048, batch_size=2048,
        steps=23842, adam_lr=5e-3, muon_lr=5e-4, eval_windows=256, micro=8, every=250),
}
SHAPE = ("n_layer", "n_head", "n_embd", "vocab_size")
OSP = {"optimizer": "muon", "norm": "ss", "embproj": True}  # what --osp stands for


@dataclass
class Options(RunOptions):
    """None means "not given": the preset decides or, with --resume, the run."""

    osp: bool = option(False, "all three: --optimizer muon --norm ss --embproj", launch=True,
                       group="the method: each part of OSP is a switch")
    optimizer: str = option(None, "adam: AdamW for all. muon: AdamW for embedding and head only. "
        "muon-only: Muon for all (default: adam)", choices=["adam", "muon", "muon-only"])
    norm: str = option(None, "RMSNorm, a gain per channel, or SSNorm, a single one (default: rms)",
                       choices=["rms", "ss"])
    embproj: bool = option(None, "learned projections beside embedding and head, folded away later")

    preset: str = option(None, "shape and schedule (default: toy on CUDA, else tiny)",
                         choices=list(PRESETS), group="the model and its text")
    data: str = option(None, "output of data/prepare.py or corpus.py, or a folder of llm.c or "
                       "nanoGPT .bin files (tiny, toy: shakespeare)", may_change=True)
    n_layer: int = option(None, "blocks, instead of the preset's", high=1000)
    n_head: int = option(None, "attention heads, instead of the preset's")
    n_embd: int = option(None, "channels of the residual stream, instead of the preset's")
    vocab_size: int = option(None, "embedding rows (default: ids, to multiples of 64; 1.4b: 49152)")
    seq_len: int = option(None, "tokens per sequence", low=2)

    steps: int = option(None, "optimizer steps in all", may_change=True, group="the optimization")
    batch_size: int = option(None, "sequences per optimizer step, over all ranks")
    micro_batch_size: int = option(None, "sequences per forward on a rank; fewer save memory",
                                   may_change=True)
    lr: float = option(None, "peak learning rate (default: the preset's for this optimizer)")
    embed_lr: float = option(None, "AdamW's peak rate with --optimizer muon (default: twice --lr)")
    weight_decay: float = option(None, "a step shrinks weights by lr times this (default: 0.01, "
                                 "the paper's)", low=0)
    warmup: int = option(None, "steps before the peak rate (default: 5 %% of --steps)", low=0)
    cooldown: int = option(None, "final steps with a falling rate (default: 20 %% of "
                           "--steps, the paper's)", low=0, may_change=True)
    grad_clip: float = option(None, "clip the gradient to this norm; 0: never (default: 1)", low=0)
    seed: int = option(None, "for the initial weights and the data order (default: 0)", low=0)


answer_before_torch("train.py", Options)  # answers --help and misspelt options before torch, which takes seconds

import torch
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from data.splits import open_datasets
from eval import at_four_bits, evaluate
from model import Config, Transformer
from muon import make_optimizers
from nanoosp.float8 import compute_in
from nanoosp.machine import Ranks, StopSignal, freeze_garbage, peak_memory_gib, pick_device, say
from nanoosp.recorded import record_training
from nanoosp.summary import optimizer_table


def trapezoid(step: int, steps: int, warmup: int, cooldown: int) -> float:
    """Learning rate factor in steps 1 ... `steps`: up, flat, down (App. A.1). The + 1 moves its
    zeros out of the run: to the step before the first and the step after the last."""
    return min(1.0, step / (warmup + 1), (steps - step + 1) / (cooldown + 1))


def model_config(opt, n_ids: int) -> Config:
    """The preset's shape, overridden by the options, for a tokenizer with `n_ids` ids."""
    vocab_size = -(-n_ids // 64) * 64  # multiples of 64 keep the head's matrix product fast
    shape = dict(vocab_size=vocab_size, norm=opt.norm, embproj=opt.embproj)
    for source in (PRESETS[opt.preset], vars(opt)):
        shape |= {name: source[name] for name in SHAPE if source.get(name)}
    if shape["vocab_size"] < n_ids:
        raise ValueError(f"the tokenizer has {n_ids:,} ids, more than the model's vocabulary of "
                         f"{shape['vocab_size']:,}: use --vocab-size {vocab_size}")
    return Config(**shape)


def build(opt, n_ids: int, ranks):
    """(model, optimizers, forward). Training calls forward: the model, or DDP around it."""
    torch.manual_seed(opt.seed)
    with torch.device(ranks.device if opt.device == "cuda" else "cpu"):  # fast init
        model = Transformer(model_config(opt, n_ids)).to(ranks.device)
    model.recompute = bool(opt.recompute)
    compute_in(model, opt.dtype)
    optimizers = make_optimizers(model, opt.optimizer, opt.lr, opt.embed_lr, opt.weight_decay)
    if opt.compile:
        for block in model.blocks:
            block.compile()  # blocks share one compiled program: seconds, not minutes
        model.output = torch.compile(model.output)
    if opt.cuda_graph:
        record_training(model, micro_batch_size(opt, PRESETS[opt.preset], 1), opt.seq_len)
    ddp = dict(gradient_as_bucket_view=True)
    return model, optimizers, model if ranks.world == 1 else DistributedDataParallel(model, **ddp)


def backward(forward, batch, micro_batch_size: int, ranks):
    """Accumulate the gradient of the mean loss of `batch` [rows, T + 1]. Returns that mean."""
    total, parts = 0.0, batch.split(micro_batch_size)  # of equal size
    for i, rows in enumerate(parts):
        is_last = i == len(parts) - 1  # only then does DDP average the gradients over ranks
        with nullcontext() if is_last or ranks.world == 1 else forward.no_sync():
            loss = forward(rows[:, :-1], rows[:, 1:]) / len(parts)
            loss.backward()
        total = total + loss.detach()
    return total


def train(opt, state, ranks) -> dict:
    """Train from the checkpoint `state`, or from scratch, to opt.steps. Returns the summary."""
    data, val = open_datasets(opt.data, opt.seq_len, opt.seed, ranks)
    model, optimizers, forward = build(opt, data.meta["vocab_size"], ranks)
    start, tokens_per_step = state["step"] if state else 0, opt.batch_size * opt.seq_len
    if state:
        restore(state, model, optimizers, data)
    run, stop, preset = Run(opt, ranks), StopSignal(), PRESETS[opt.preset]
    micro = micro_batch_size(opt, preset, ranks.world)
    say(f"{optimizer_table(optimizers)}\n{opt.batch_size} x {opt.seq_len} tokens a step, "
        f"{opt.steps * opt.batch_size / data.n_windows:.2g} epochs, directory {run.path}", opt.json)
    eval_args = val, preset["eval_windows"], micro, ranks

    def evaluate_and_log(step):
        result = evaluate(model, *eval_args)
        run.check_finite(f"validation loss after step {step}", result["val_loss"])
        run.log(step=step, tokens=step * tokens_per_step, **result)
        say(f"step {step:>6}   validation loss {result['val_loss']:.4f}   excess kurtosis "
            f"{result['kurtosis']:8.3f} (Gaussian: {result['kurtosis_floor']:.3f})", opt.json)
        return result

    if not state:
        run.save(0, model, optimizers, data)  # so that a full disk shows at once
    run.open_log(start)
    if start == 0:
        evaluate_and_log(0)
    seconds, steps = [], range(start + 1, opt.steps + 1)
    bar = tqdm(steps, initial=start, total=opt.steps, disable=None if ranks.first else True)
    for step in bar:
        # ------------------------------------------------------ one step of the optimizers
        began = time.perf_counter()
        factor = trapezoid(step, opt.steps, opt.warmup, opt.cooldown)
        for group in (group for optimizer in optimizers for group in optimizer.param_groups):
            group["lr"] = group["peak_lr"] * factor
        batch = data.batch(step - 1, opt.batch_size, ranks.rank, ranks.world)
        loss = backward(forward, torch.from_numpy(batch).to(ranks.device), micro, ranks)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), opt.grad_clip or math.inf)
        stopping = torch.tensor(float(stop.received > 0), device=ranks.device)
        loss, norm, stopping = ranks.mean(torch.stack([loss, norm, stopping]))
        run.check_finite(f"loss {loss}, gradient norm {norm} in step {step}", loss + norm)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=ranks.world == 1)  # DDP keeps them in its buffers
        seconds.append(time.perf_counter() - began)
        run.log(step=step, tokens=step * tokens_per_step, loss=loss, grad_norm=norm,
                lr=optimizers[0].param_groups[0]["lr"], tokens_per_s=tokens_per_step / seconds[-1])
        bar.set_postfix_str(f"loss {loss:.3f}", refresh=False)
        if step == start + 1 and opt.compile:
            freeze_garbage()
        # ------------------------------------------------------ once in a while: evaluate, save
        if step % opt.eval_every == 0 or step == opt.steps:
            result = evaluate_and_log(step)
        if step % opt.save_every == 0 or step == opt.steps or stopping:
            run.save(step, model, optimizers, data)
        if stopping and step < opt.steps:
            bar.close()
            say(f"stopped after step {step}; go on with {run.resume_command()}", opt.json)
            sys.exit(128 + (stop.received or 15))  # 15: the SIGTERM that another rank got
    stop.forget()
    timed = seconds[1:] or seconds  # the first step includes compiling
    result["quantized"] = at_four_bits(model, *eval_args)
    return dict(result, step=opt.steps, tokens=opt.steps * tokens_per_step, loss=loss,
                run=str(run.path), tokens_per_s=tokens_per_step * len(timed) / sum(timed),
                peak_memory_gib=peak_memory_gib(ranks.device))


def resolve(opt):
    """Fill in the options that are None. Returns the checkpoint to resume from, or None."""
    if opt.osp:
        fill(opt, **OSP)
        for name in (name for name, value in OSP.items() if getattr(opt, name) != value):
            fail(f"--osp means {OSP}: leave it out to use {name} {getattr(opt, name)}")
    state = resume(opt) if opt.resume else None
    opt.device = pick_device(opt.device)
    fill(opt, preset="toy" if opt.device == "cuda" else "tiny", optimizer="adam", norm="rms",
         embproj=False)
    preset = PRESETS[opt.preset]
    if opt.bench:
        fill(opt, steps=10, data="random")
    fill(opt, data="shakespeare" if opt.preset in ("tiny", "toy") else None)
    fill(opt, seq_len=preset["seq_len"], batch_size=preset["batch_size"], steps=preset["steps"])
    fill(opt, **usual(opt, preset))
    fill(opt, embed_lr=2 * opt.lr, weight_decay=0.01, grad_clip=1.0, seed=0)
    fill(opt, warmup=opt.steps // 20, cooldown=opt.steps // 5)
    check_options(opt, preset, state["step"] if state else 0)
    try:
        model_config(opt, n_ids=1)  # only checks the shape, before any data is opened
    except ValueError as error:
        fail(str(error))
    return state


@command
def main(argv=None):
    began = time.perf_counter()
    opt = parse(Options, __doc__, argv)
    for name in ("ablation", "dry_run", "bench"):  # options that run another program
        if getattr(opt, name):
            return importlib.import_module(f"tools.{name}").main(argv)
    state = resolve(opt)
    parts = f"optimizer {opt.optimizer}, norm {opt.norm}, embproj {'on' if opt.embproj else 'off'}"
    say(f"preset {opt.preset} on {opt.device} in {opt.dtype}: {parts}, {opt.steps} steps "
        "(--preset, --steps, ... change that)", opt.json)
    with Ranks.start(opt.device) as ranks:
        summary = train(opt, state, ranks)
        summary["wall_s"] = time.perf_counter() - began
        if ranks.first:  # print it, beside that of the run to compare it with
            importlib.import_module("tools.compare").finish(opt, summary)


if __name__ == "__main__":
    main()
