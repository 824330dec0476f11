"""A run and its directory: config.json (the options), log.jsonl (a JSON object a line), ckpt.pt, and when it is done
summary.json. Run also does what every training loop does besides: a progress bar, checkpoints, a stop at a signal."""

import contextlib
import itertools
import json
import math
import os
import shlex
import sys
import time
from dataclasses import asdict
from pathlib import Path

from tqdm import tqdm

from nanoosp.checkpoint import restore
from nanoosp.files import save_archive, write_text
from nanoosp.machine import peak_memory_gib
from nanoosp.methods import slug
from nanoosp.options import ROOT
from nanoosp.ranks import say
from nanoosp.run_options import in_words, remembered
from nanoosp.signals import StopSignal
from nanoosp.summary import optimizer_table, run_summary

try:
    import fcntl  # not on Windows
except ImportError:
    fcntl = None

LAST_GOOD = "the run's checkpoint is the last good state. Try a lower --lr"
NAMED = ("lr", "embed_lr", "weight_decay", "steps", "seed")  # options that a new run's directory names, if given


class Run:
    """One run while it trains, on every rank; only the first writes. `state`: the checkpoint to go on from, or None.

    Raises FileExistsError for a directory that holds another run, OSError for one that is in use.
    """

    def __init__(self, opt, ranks, model, optimizers, data, state):
        self.opt, self.ranks = opt, ranks
        self.model, self.optimizers, self.data = model, optimizers, data
        self.start = state["step"] if state else 0
        self.tokens_per_step = opt.batch_size * opt.seq_len
        self.seconds = []  # of every step
        if state:
            restore(state, model, optimizers, data)
        if ranks.first:
            self.path = Path(opt.out) if opt.out else new_directory(opt)
            self.path.mkdir(parents=True, exist_ok=True)
            found = [name for name in ("ckpt.pt", "log.jsonl", "config.json") if (self.path / name).exists()]
            if found and not state:
                raise FileExistsError(f"{self.path} holds {', '.join(found)}: to go on with a run, --resume {self.path}; "
                                      "for a new one, another --out")
            say(f"{in_words(opt)}\n{optimizer_table(optimizers)}\n{opt.batch_size} x {opt.seq_len} tokens a step, "
                f"{opt.steps * opt.batch_size / data.n_windows:.2g} epochs, directory {os.path.relpath(self.path)}", opt.json)
        self.stop = StopSignal()
        if not state:
            self.save(0)  # so that a full disk shows at once
        if ranks.first:
            self.open_log()

    def open_log(self):
        """Claim the log for this process. Cut off what it says of steps after self.start: they will be done again."""
        self.log_file = open(self.path / "log.jsonl", "a+b")
        if fcntl:
            try:
                fcntl.flock(self.log_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise OSError(f"{self.path} is in use by another process") from error
        self.log_file.seek(0)
        end = valid_end = 0
        last = b"\n"  # line that is kept
        for line in self.log_file:
            end += len(line)
            with contextlib.suppress(ValueError, TypeError, KeyError):  # a line torn by a crash
                if json.loads(line)["step"] <= self.start and self.start > 0:
                    valid_end = end
                    last = line
        self.log_file.truncate(valid_end)
        self.log_file.write(b"" if last.endswith(b"\n") else b"\n")  # torn there: the next needs a line of its own
        write_text(self.path / "config.json", json.dumps(remembered(self.opt), indent=2) + "\n")

    def steps(self):
        """The steps still to do, with a progress bar; the caller does each and calls log_step(). Then this saves, if it
        is time. If a signal came to any rank, it saves and ends the program."""
        opt = self.opt
        bar = tqdm(range(self.start + 1, opt.steps + 1), initial=self.start, total=opt.steps,
                   disable=None if self.ranks.first else True)
        for step in bar:
            self.began = time.perf_counter()
            yield step
            bar.set_postfix_str(f"loss {self.loss:.3f}", refresh=False)
            stopping = self.ranks.any(self.stop.received > 0)
            if step % opt.save_every == 0 or step == opt.steps or stopping:
                self.save(step)
            if stopping and step < opt.steps:
                bar.close()
                command = [*launcher(), sys.argv[0], "--resume", os.path.relpath(self.path)] if self.ranks.first else []
                say(f"stopped after step {step}; go on with {shlex.join(map(str, command))}", opt.json)
                sys.exit(128 + (self.stop.received or 15))  # 15: the SIGTERM that another rank got
        self.stop.forget()

    def log_step(self, step: int, loss: float, grad_norm: float):
        """Log a training step: since steps() gave its number."""
        self.loss = loss
        self.seconds.append(time.perf_counter() - self.began)
        self.write(step=step, tokens=step * self.tokens_per_step, loss=loss, grad_norm=grad_norm,
                   lr=self.optimizers[0].param_groups[0]["lr"], tokens_per_s=self.tokens_per_step / self.seconds[-1])

    def log_evaluation(self, step: int, result: dict):
        """Log and print what evaluate() found after a step. Raises ArithmeticError for a loss that is not finite."""
        check_finite(f"the validation loss after step {step} is {result['val_loss']}", result["val_loss"])
        self.write(step=step, tokens=step * self.tokens_per_step, **result)
        say(f"step {step:>6}   validation loss {result['val_loss']:.4f}   excess kurtosis {result['kurtosis']:8.3f} "
            f"(Gaussian: {result['kurtosis_floor']:.3f})", self.opt.json)

    def write(self, **record):
        if self.ranks.first:
            self.log_file.write(json.dumps(record).encode() + b"\n")
            self.log_file.flush()

    def save(self, step: int):
        """Write the checkpoint, whole or not at all. All ranks must call this, since each has a share of Muon's state.
        Raises ArithmeticError for weights that are not finite."""
        if not all(p.isfinite().all() for p in self.model.parameters()):
            raise ArithmeticError(f"step {step} made weights that are not finite; {LAST_GOOD}")
        state = dict(step=step, config=asdict(self.model.config), model=self.model.state_dict(),
                     optimizers=[optimizer.state_dict() for optimizer in self.optimizers],
                     options=remembered(self.opt), data=self.data.meta)
        if self.ranks.first:
            save_archive(state, self.path / "ckpt.pt")

    def finish(self, result: dict):
        """Write `result`, the last evaluation, and the run's speed to summary.json, and print them."""
        if not self.ranks.first:
            return
        opt = self.opt
        timed = self.seconds[1:] or self.seconds  # the first step includes compiling
        summary = dict(result, step=opt.steps, tokens=opt.steps * self.tokens_per_step, loss=self.loss,
                       run=str(self.path), data=self.data.fingerprint, tokens_per_s=self.tokens_per_step * len(timed) / sum(timed),
                       peak_memory_gib=peak_memory_gib(self.ranks.device), wall_s=time.perf_counter() - opt.began)
        write_text(self.path / "summary.json", json.dumps(summary) + "\n")
        print(json.dumps(summary) if opt.json else run_summary(summary, remembered(opt), self.path))


def check_vocabulary(vocab_size: int, n_ids: int):
    """Raises ValueError for a tokenizer with more ids than a model has embeddings."""
    if vocab_size < n_ids:
        raise ValueError(f"the tokenizer has {n_ids:,} ids, more than the model's vocabulary of {vocab_size:,}: use "
                         f"--vocab-size {math.ceil(n_ids / 64) * 64}")


def check_finite(description: str, *values: float):
    """Raises ArithmeticError unless all values are finite numbers."""
    if not all(map(math.isfinite, values)):
        raise ArithmeticError(f"{description}: stopped before anything was saved; {LAST_GOOD}")


def launcher() -> list[str]:
    """What a command like the one that runs now begins with: python, or torchrun with as many ranks."""
    world = os.environ.get("WORLD_SIZE", "1")
    per_node = os.environ.get("LOCAL_WORLD_SIZE", world)
    return ["python"] if world == "1" else ["torchrun", "--nproc-per-node", per_node]


def new_directory(opt) -> Path:
    """Makes runs/<data>-<preset>-<configuration>, with what was given of NAMED, as in tiny-adam-lr0.002, and with a
    number after it if that is taken."""
    given = [f"{name.replace('_', '-')}{getattr(opt, name)}" for name in NAMED if name in opt.given]
    name = "-".join([Path(opt.data).name, opt.preset, slug(vars(opt)), *given])
    for suffix in itertools.chain([""], (f"-{i}" for i in itertools.count(2))):
        path = ROOT / "runs" / (name + suffix)
        try:
            path.mkdir(parents=True)
            return path
        except FileExistsError:  # another run's, perhaps made a moment ago
            continue
