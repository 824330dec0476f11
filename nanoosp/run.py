"""A run and its directory: config.json (the options), log.jsonl (a JSON object a line), ckpt.pt. When it is done,
tools/compare.py adds summary.json.

Options that the run remembers are all but those marked `launch=True` in their field. Those marked
`may_change=True` may differ when the run is resumed.
"""

import itertools
import json
import math
import os
import shlex
import sys
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from nanoosp.files import read_archive, save_archive, write_text
from nanoosp.options import ROOT, check_ranges, fail, flag, option

try:
    import fcntl  # not on Windows
except ImportError:
    fcntl = None

LAST_GOOD = "the run's checkpoint is the last good state. Try a lower --lr"
AGAIN = "NANOOSP_AGAIN"  # environment variable: the command that goes on, where it is not the run's own --resume
NAMED = ("lr", "embed_lr", "weight_decay", "steps", "seed")  # options that a new run's directory names, if given
OPTIMIZERS = {"adam": "Adam", "muon": "Muon", "muon-only": "Muon-only"}


def label(options: dict) -> str:
    """The name of a configuration: "Adam", "Muon + SSNorm", "OSP"; "LLaMA" for a model from elsewhere."""
    if "imported" in options:
        return "LLaMA"
    parts = [OPTIMIZERS[options["optimizer"]]]
    parts += ["SSNorm"] * (options["norm"] == "ss") + ["EmbProj"] * bool(options["embproj"])
    return "OSP" if parts == ["Muon", "SSNorm", "EmbProj"] else " + ".join(parts)


def slug(options: dict) -> str:
    """The same for a directory's name: "adam", "muon-ssnorm", "osp"."""
    return label(options).lower().replace(" + ", "-")


# ---------------------------------------------------------------------------------------------------
# Options


@dataclass
class RunOptions:
    """How a run is kept and computed. train.py's own options say what is trained."""

    out: str = option(None, "the run's directory (default: a new one under runs/)", launch=True,
                      group="the run")
    resume: str = option(None, "go on with a run, with its options; with more --steps the rate climbs "
                         "again", launch=True, metavar="DIR")
    eval_every: int = option(None, "steps between evaluations (default: a tenth of --steps; small 200, "
                             "1.4b 250)", may_change=True)
    save_every: int = option(None, "steps between checkpoints (default: a quarter of --steps; small "
                             "200, 1.4b 250)", may_change=True)
    device: str = option(None, "default: the first of these that is there", may_change=True,
                         choices=["cuda", "mps", "cpu"])
    dtype: str = option(None, "of matrix products; weights stay float32 (default: bfloat16 on CUDA; "
                        "float8: on Hopper and newer)",
                        choices=["float32", "bfloat16", "float8"])
    compile: bool = option(None, "torch.compile: slower start, faster steps (default: on CUDA, without "
                           "--cuda-graph)", may_change=True)
    cuda_graph: bool = option(None, "start all kernels of forward and backward with one call: for small "
                              "models on one GPU (default: of tiny and toy on Shakespeare)", launch=True)
    recompute: bool = option(None, "for small GPUs: keep no activations of blocks, compute them again "
                             "in backward (a quarter slower)", may_change=True)
    json: bool = option(False, "the summary as one JSON line on stdout, everything else on stderr",
                        launch=True)

    ablation: bool = option(False, "train the six rows of the paper's Table 2 and a hot Adam, tabulate and draw them",
                            launch=True, group="instead of one run")
    full: bool = option(False, "with --ablation: all 12 combinations, also those the paper lacks",
                        launch=True)
    seeds: int = option(None, "with --ablation: as many runs of each row, --seed and the next ones "
                        "(default: 1)", launch=True, high=1000)
    gpus: int = option(None, "with --ablation: train as many rows side by side, one per GPU", launch=True)
    dry_run: bool = option(False, "say what would be trained (parameters, memory, tokens) and stop",
                           launch=True)
    bench: bool = option(False, "only measure: --steps steps (default: 10) on random tokens (--data "
                         "random), nothing evaluated or saved", launch=True)

    def __post_init__(self):  # now, while None still means "not given": for new_directory()
        given = {name: getattr(self, name, None) for name in NAMED}
        self.given_in_name = "".join(f"-{name}{value}" for name, value in given.items() if value is not None)


def remembered(opt) -> dict:
    return {f.name: getattr(opt, f.name) for f in fields(opt) if not f.metadata.get("launch")}


def resume(opt) -> dict:
    """The checkpoint of opt.resume. Its run's options go into `opt`. Ends the program if others
    are asked for that cannot change."""
    if opt.bench:
        fail("--bench measures a fresh model; leave out --resume")
    if opt.out:
        fail("--resume goes on in the run's own directory; leave out --out")
    state = load_checkpoint(opt.resume)
    opt.out = str(Path(opt.resume).parent if Path(opt.resume).is_file() else opt.resume)
    may_change = {f.name for f in fields(opt) if f.metadata.get("may_change")}
    for field in fields(opt):
        saved, choices = state["options"].get(field.name), field.metadata["choices"]
        kinds = (int, float) if field.type is float else field.type
        if saved is not None and (not isinstance(saved, kinds) or choices and saved not in choices):
            raise ValueError(f"{opt.resume} is damaged: it was started with {flag(field.name)} {saved!r}")
    for name, saved in state["options"].items():
        given = getattr(opt, name, None)
        if given not in (None, saved) and name not in may_change:
            fail(f"{flag(name)} {given}: {opt.resume} was started with {saved} and keeps it")
        setattr(opt, name, saved if given is None else given)
    return state


def usual_lr(preset: dict, optimizer: str) -> float:
    """The peak learning rate of a preset, where none is given."""
    return preset["adam_lr" if optimizer == "adam" else "muon_lr"]


def usual(opt, preset: dict) -> dict:
    """Defaults that depend on the preset, the optimizer and the device."""
    on_cuda, graph = opt.device == "cuda", opt.cuda_graph
    if graph is None:  # tiny and toy: compiling takes half as long as training. Not with a large
        # vocabulary, whose fp32 logits only a compiled head keeps out of memory
        as_preset = opt.data in ("shakespeare", "random") and not (opt.n_layer or opt.n_embd or opt.vocab_size)
        graph = preset.get("cuda_graph", False) and as_preset and not opt.compile and can_record(opt, preset)
    return dict(lr=usual_lr(preset, opt.optimizer), dtype="bfloat16" if on_cuda else "float32",
                cuda_graph=graph, compile=on_cuda and not graph,
                eval_every=preset.get("every", max(1, opt.steps // 10)),
                save_every=preset.get("every", max(1, opt.steps // 4)))


def micro_batch_size(opt, preset: dict, world: int) -> int:
    """Sequences that one rank computes at once: as asked, or the preset's, or all of its share."""
    share = opt.batch_size // world
    return opt.micro_batch_size or math.gcd(share, preset.get("micro", share))


def can_record(opt, preset: dict) -> bool:
    """Whether --cuda-graph is possible."""
    whole = micro_batch_size(opt, preset, 1) == opt.batch_size
    return opt.device == "cuda" and "RANK" not in os.environ and whole and not opt.recompute


def check_options(opt, preset: dict, step: int):
    """End the program at the first options that do not go together. `step`: that of --resume."""
    check_ranges(opt)
    world = int(os.environ.get("WORLD_SIZE", 1))
    if opt.warmup + opt.cooldown > opt.steps:
        fail(f"--warmup {opt.warmup} and --cooldown {opt.cooldown} do not fit into --steps {opt.steps}")
    if opt.batch_size % world:
        fail(f"--batch-size {opt.batch_size} is not divisible by {world} ranks")
    rows, micro = opt.batch_size // world, micro_batch_size(opt, preset, world)
    if rows % micro:
        fail(f"--batch-size {opt.batch_size} over {world} rank(s) is {rows} sequences each, not "
             f"divisible by --micro-batch-size {micro}")
    if opt.dtype == "float8" and micro * opt.seq_len % 16:
        fail(f"--dtype float8 needs micro-batches of a multiple of 16 tokens, not {micro} x {opt.seq_len}")
    if opt.cuda_graph and not can_record(opt, preset):
        fail("--cuda-graph is for one GPU without torchrun; leave out --recompute and --micro-batch-size")
    if opt.data == "random" and not opt.bench:
        fail("--data random teaches nothing: it is for --bench")
    if (opt.full or opt.gpus or opt.seeds is not None) and not opt.ablation:
        fail("--full, --gpus and --seeds are for --ablation")
    if opt.data is None and not opt.dry_run:
        fail(f"--preset {opt.preset} is for real text: name a dataset with --data (see "
             "data/prepare.py --help)")
    if opt.resume and step >= opt.steps:
        fail(f"{opt.resume} has done all its {step} steps; to train on, give a larger --steps")
    if opt.data is not None and Path(opt.data).exists():
        opt.data = str(Path(opt.data).resolve())  # so that --resume finds it from anywhere


# ---------------------------------------------------------------------------------------------------
# Checkpoints


def load_checkpoint(path) -> dict:
    """Read what Run.save wrote. `path` is the file or its run directory.

    Raises what read_archive does, and ValueError for a foreign file.
    """
    path = Path(path)
    path = path / "ckpt.pt" if path.is_dir() else path
    return check_checkpoint(read_archive(path), path)


def check_checkpoint(state, path) -> dict:
    """`state` as it is. Raises ValueError, naming `path`, unless it is what Run.save writes."""
    kinds = {"step": int, "config": dict, "model": dict, "optimizers": list, "options": dict, "data": dict}
    if not isinstance(state, dict) or not all(isinstance(state.get(name), kind) for name, kind in kinds.items()):
        if isinstance(state, dict) and "packing" in state:
            raise ValueError(f"{path} is a quantized model (quantize.py made it): only eval.py reads these")
        raise ValueError(f"{path} is a torch file, but not a checkpoint of train.py")
    return state


def model_from_checkpoint(state: dict, device="cpu"):
    """The model of a checkpoint, in the precision it was saved in."""
    from model import Config, Transformer  # only here: torch takes seconds to import

    unknown = set(state["config"]) - {field.name for field in fields(Config)}
    if unknown:
        raise ValueError(f"the checkpoint's config has unknown entries {sorted(unknown)}: made by a newer version?")
    try:
        return Transformer.from_weights(Config(**state["config"]), state["model"]).to(device)
    except (RuntimeError, ValueError, TypeError, AttributeError) as error:
        reason = str(error).splitlines()[-1].strip()
        raise ValueError(f"the checkpoint's weights do not fit its config: {reason}") from error


# ---------------------------------------------------------------------------------------------------
# The directory


class Run:
    """The run's directory. Only rank 0 writes."""

    def __init__(self, opt, ranks):
        self.ranks, self.options = ranks, remembered(opt)
        self.path = Path(opt.out or "")
        if not ranks.first:
            return
        self.path = Path(opt.out) if opt.out else new_directory(opt)
        self.path.mkdir(parents=True, exist_ok=True)
        found = [name for name in ("ckpt.pt", "log.jsonl", "config.json") if (self.path / name).exists()]
        if found and not opt.resume:
            raise FileExistsError(f"{self.path} holds {', '.join(found)}: to go on with a run, "
                                  f"--resume {self.path}; for a new one, another --out")

    def open_log(self, start: int):
        """Claim the log for this process. Cut off what it says of steps after `start`: they will be
        done again."""
        if not self.ranks.first:
            return
        self.log_file = open(self.path / "log.jsonl", "a+b")
        if fcntl:
            try:
                fcntl.flock(self.log_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise OSError(f"{self.path} is in use by another process") from error
        self.log_file.seek(0)
        end = valid_end = 0
        for line in self.log_file:
            end += len(line)
            try:
                if json.loads(line)["step"] <= start and start > 0:
                    valid_end = end
            except (ValueError, TypeError, KeyError):  # a line torn by a crash
                pass
        self.log_file.truncate(valid_end)
        write_text(self.path / "config.json", json.dumps(self.options, indent=2) + "\n")

    def log(self, **record):
        if self.ranks.first:
            self.log_file.write(json.dumps(record).encode() + b"\n")
            self.log_file.flush()

    def save(self, step: int, model, optimizers, data):
        """Write the checkpoint, whole or not at all. All ranks must call this, since each has a share
        of Muon's momentum. Raises ArithmeticError for weights that are not finite."""
        if not all(p.isfinite().all() for p in model.parameters()):
            raise ArithmeticError(f"step {step} made weights that are not finite; {LAST_GOOD}")
        state = dict(step=step, config=asdict(model.config), model=model.state_dict(),
                     optimizers=[optimizer.state_dict() for optimizer in optimizers],
                     options=self.options, data=data.meta)
        if self.ranks.first:
            save_archive(state, self.path / "ckpt.pt")

    def check_finite(self, description: str, value: float):
        """Raises ArithmeticError if `value` is not a finite number."""
        if not math.isfinite(value):
            raise ArithmeticError(f"{description}: stopped before anything was saved; {LAST_GOOD}")

    def resume_command(self) -> str:
        return os.environ.get(AGAIN) or shlex.join([*launcher(), sys.argv[0], "--resume", os.path.relpath(self.path)])


def launcher() -> list[str]:
    """What a command like the one that runs now begins with: python, or torchrun with as many ranks."""
    world = os.environ.get("WORLD_SIZE", "1")
    per_node = os.environ.get("LOCAL_WORLD_SIZE", world)
    return ["python"] if world == "1" else ["torchrun", "--nproc-per-node", per_node]


def numbered(path: Path):
    """`path`, then the same with -2, -3, ... after it."""
    return itertools.chain([path], (path.with_name(f"{path.name}-{i}") for i in itertools.count(2)))


def new_directory(opt) -> Path:
    """Makes runs/<data>-<preset>-<configuration>, with what was given of NAMED, as in tiny-adam-lr0.002, and with a
    number after it if that is taken."""
    name = "-".join([Path(opt.data).name, opt.preset, slug(vars(opt))]) + opt.given_in_name.replace("_", "-")
    for path in numbered(ROOT / "runs" / name):
        try:
            path.mkdir(parents=True)
            return path
        except FileExistsError:  # another run's, perhaps made a moment ago
            continue


def check_data(trained_on: dict, data):
    """Raise ValueError unless a run was trained on this Dataset. `trained_on`: what its checkpoint says of its data."""
    if trained_on != data.meta:
        raise ValueError(f"{data.directory} is other data than this run was trained on (tokenizer, size or source)")


def restore(state: dict, model, optimizers, data):
    """Put a checkpoint into a fresh model and its optimizers. Raises ValueError if they differ."""
    check_data(state["data"], data)
    try:
        model.load_state_dict(state["model"])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
    except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = str(error).splitlines()[-1].strip()
        raise ValueError(f"the checkpoint does not fit this model: {reason}") from error
