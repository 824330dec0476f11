"""How a run is kept and computed: the options that train.py has besides those of its subject, their defaults where the
machine decides, and what does not go together.

Options that the run remembers, in config.json and its checkpoints, are all but those marked `launch=True` in their
field. Those marked `may_change=True` may differ when the run is resumed.
"""

import copy
import math
import os
from dataclasses import dataclass, fields
from pathlib import Path

from nanoosp.checkpoint import load_checkpoint
from nanoosp.methods import OSP
from nanoosp.options import as_if_given, check_ranges, fail, fill, flag, option
from nanoosp.summary import table


@dataclass
class RunOptions:
    """How a run is kept and computed. Those that train.py adds say what is trained."""

    out: str = option(None, "the run's directory; without it, a new one under runs/", launch=True, group="the run")
    resume: str = option(None, "go on with a run, with its options; with more --steps the rate climbs again",
                         launch=True, metavar="DIR")
    eval_every: int = option(None, "steps between evaluations (default, without a preset's: a tenth of --steps)",
                             may_change=True)
    save_every: int = option(None, "steps between checkpoints (default, without a preset's: a quarter of --steps)",
                             may_change=True)
    eval_windows: int = option(None, "sequences of validation text in an evaluation", may_change=True)
    micro_batch_size: int = option(None, "sequences per forward on a rank; fewer save memory (default, without a "
                                   "preset's: all of them)", may_change=True)
    device: str = option(None, "without it, the first of these that is there", may_change=True,
                         choices=["cuda", "mps", "cpu"])
    dtype: str = option(None, "of matrix products; weights stay float32 (default: bfloat16 on CUDA; float8: on Hopper "
                        "and newer)", choices=["float32", "bfloat16", "float8"])
    compile: bool = option(None, "torch.compile: slower start, faster steps (default: on CUDA, without --cuda-graph)",
                           may_change=True)
    cuda_graph: bool = option(None, "start all kernels of forward and backward with one call: for small models, on "
                              "one CUDA GPU only",
                              launch=True)
    recompute: bool = option(None, "for small GPUs: keep no activations of blocks, compute them again in backward (a "
                             "quarter slower)", may_change=True)
    json: bool = option(False, "the summary as one JSON line on stdout, everything else on stderr", launch=True)

    ablation: bool = option(False, "train the six rows of the paper's Table 2 and a hot Adam, tabulate and draw them",
                            launch=True, group="instead of one run")
    full: bool = option(False, "with --ablation: all 12 combinations, also those the paper lacks", launch=True)
    seeds: int = option(None, "with --ablation: as many runs of each row, --seed and the next ones (default: 1)",
                        launch=True, high=1000)
    gpus: int = option(None, "with --ablation: train as many rows side by side, one per GPU", launch=True)
    dry_run: bool = option(False, "say what would be trained (parameters, memory, tokens) and stop", launch=True)
    bench: bool = option(False, "only measure: --steps steps (default: 10) on random tokens (--data random), nothing "
                         "evaluated or saved", launch=True)


def presets_table(presets: dict[str, dict]) -> str:
    """For the end of --help: what each preset gives to options that are left out."""
    names = list(dict.fromkeys(name for preset in presets.values() for name in preset))
    rows = []
    for name in names:
        cells = [preset.get(name, "-") for preset in presets.values()]
        rows.append([flag(name), *("/".join(f"{x:g}" for x in c.values()) if isinstance(c, dict) else c for c in cells)])
    return "defaults by --preset (--lr: Adam's/Muon's, and Muon-only's if it has its own):\n" + table(["", *presets], rows)


def remembered(opt) -> dict:
    return {f.name: getattr(opt, f.name) for f in fields(opt) if not f.metadata.get("launch")}


def check_before_torch(opt, defaults):
    """End the program if options do not go together, whatever device there is. `defaults` fills in those of a preset.
    With --resume the others are in a checkpoint, which takes torch to read, so resolve() looks at them."""
    expand(opt)
    for device in [opt.device] if opt.device else ["cpu", "cuda"]:
        problems = []
        trial = copy.deepcopy(opt)
        trial.device = device
        defaults(trial)
        settle(trial, None, problems.append)
        if opt.resume or not problems:
            return
    fail(problems[0])


def expand(opt):
    """Put in what --osp and --bench stand for. Ends the program if something else decides what is asked for."""
    if opt.osp:
        as_if_given(opt, OSP)
    if opt.bench:
        fill(opt, steps=10, data="random")
    if opt.ablation and opt.given & {"osp", "optimizer", "norm", "embproj", "resume"}:
        fail("--ablation chooses the parts of OSP itself, and goes on by itself if started again")
    if opt.ablation and (opt.bench or opt.dry_run):
        fail(f"--{'bench' if opt.bench else 'dry-run'} is for one model; leave out --ablation")
    if opt.resume and opt.bench:
        fail("--bench measures a fresh model; leave out --resume")
    if opt.resume and opt.out:
        fail("--resume goes on in the run's own directory; leave out --out")


def resume(opt) -> dict | None:
    """The checkpoint of opt.resume, None without it. Its run's options go into `opt`. Ends the program if others are
    asked for that cannot change."""
    expand(opt)
    if not opt.resume:
        return None
    state = load_checkpoint(opt.resume)
    opt.out = str(Path(opt.resume).parent if Path(opt.resume).is_file() else opt.resume)
    may_change = {f.name for f in fields(opt) if f.metadata.get("may_change")}
    for field in fields(opt):
        saved, choices = state["options"].get(field.name), field.metadata["choices"]
        kinds = (int, float) if field.type is float else field.type
        if saved is not None and (not isinstance(saved, kinds) or choices and saved not in choices):
            raise ValueError(f"{opt.resume} is damaged: it was started with {flag(field.name)} {saved!r}")
    for name, given in remembered(opt).items():
        saved = state["options"].get(name)
        if name not in opt.given:
            setattr(opt, name, given if saved is None else saved)
        elif given != saved and name not in may_change:
            fail(f"{flag(name)} {getattr(opt, name)}: {opt.resume} was started with {saved} and keeps it")
    return state


def settle(opt, state, tell=fail):
    """Give the options that depend on the machine their values: how a step is divided and computed here. `tell` gets a
    line for each reason why options do not go together. `state`: the checkpoint of --resume, or None."""
    on_cuda = opt.device == "cuda"
    fill(opt, eval_every=max(1, opt.steps // 10), save_every=max(1, opt.steps // 4))
    fill(opt, micro_batch_size=opt.batch_size, dtype="bfloat16" if on_cuda else "float32", recompute=False)
    if "micro_batch_size" not in opt.given:  # the preset's, or that of the run's last machine, as far as it divides
        opt.micro_batch_size = math.gcd(opt.batch_size // n_ranks(), opt.micro_batch_size)
    # Recording takes a second, compiling as long as training a small model. But only a compiled head keeps the logits of a
    # large vocabulary out of memory.
    if "cuda_graph" not in opt.given:
        few_ids = opt.data in ("shakespeare", "random") and not opt.vocab_size
        opt.cuda_graph = bool(opt.cuda_graph and few_ids and can_record(opt) and not opt.compile)
    fill(opt, compile=on_cuda and not opt.cuda_graph)
    if opt.data is not None and Path(opt.data).exists():
        opt.data = str(Path(opt.data).resolve())  # so that --resume finds it from anywhere
    check_options(opt, state["step"] if state else 0, tell)


def n_ranks() -> int:
    """As many processes as torchrun started."""
    return int(os.environ.get("WORLD_SIZE", 1))


def can_record(opt) -> bool:
    """Whether --cuda-graph is possible."""
    alone = opt.device == "cuda" and "RANK" not in os.environ
    return alone and opt.micro_batch_size == opt.batch_size and not opt.recompute


def check_options(opt, step: int, tell):
    """See settle(). `step`: that of --resume."""
    check_ranges(opt)
    if opt.osp and not OSP.items() <= vars(opt).items():
        name = next(name for name in OSP if getattr(opt, name) != OSP[name])
        tell(f"--osp means {OSP}: leave it out to use {name} {getattr(opt, name)}")
    if "embed_lr" in opt.given and opt.optimizer != "muon" and not opt.ablation:
        tell(f"--embed-lr is for --optimizer muon, which leaves two matrices to AdamW: --optimizer {opt.optimizer} has "
             "one rate, --lr")
    if opt.n_embd % (2 * opt.n_head):
        tell(f"--n-embd {opt.n_embd} is not divisible by twice --n-head {opt.n_head}; RoPE rotates pairs of channels")
    if opt.warmup + opt.cooldown > opt.steps:
        tell(f"--warmup {opt.warmup} and --cooldown {opt.cooldown} do not fit into --steps {opt.steps}")
    if opt.batch_size % n_ranks():
        tell(f"--batch-size {opt.batch_size} is not divisible by {n_ranks()} ranks")
    rows = opt.batch_size // n_ranks()
    if rows % opt.micro_batch_size:
        tell(f"--batch-size {opt.batch_size} over {n_ranks()} rank(s) is {rows} sequences each, not divisible by "
             f"--micro-batch-size {opt.micro_batch_size}")
    if opt.dtype == "float8" and opt.micro_batch_size * opt.seq_len % 16:
        tell("--dtype float8 needs micro-batches of a multiple of 16 tokens, not "
             f"{opt.micro_batch_size} x {opt.seq_len}")
    if opt.dtype == "float8" and opt.n_embd % 16:  # n_ffn is a multiple of 128
        tell(f"--dtype float8 multiplies matrices of multiples of 16, not of --n-embd {opt.n_embd}")
    if opt.cuda_graph and not can_record(opt):
        tell("--cuda-graph is for one GPU without torchrun; leave out --recompute and --micro-batch-size")
    if opt.data == "random" and not opt.bench:
        tell("--data random teaches nothing: it is for --bench")
    if (opt.full or opt.gpus or opt.seeds is not None) and not opt.ablation:
        tell("--full, --gpus and --seeds are for --ablation")
    if opt.data is None and not opt.dry_run:
        tell(f"--preset {opt.preset} is for real text: name a dataset with --data (see data/prepare.py --help)")
    if opt.resume and step >= opt.steps:
        tell(f"{opt.resume} has done all its {step} steps; to train on, give a larger --steps")


def in_words(opt) -> str:
    """What will be trained, and how: one line."""
    how = "recorded" if opt.cuda_graph else "compiled" if opt.compile else "not compiled"
    return (f"preset {opt.preset} on {opt.device} in {opt.dtype}, {how}: optimizer {opt.optimizer}, norm {opt.norm}, "
            f"embproj {'on' if opt.embproj else 'off'}, {opt.steps} steps (--preset, --steps, ... change that)")
