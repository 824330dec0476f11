"""The ablation: train the rows of the paper's Table 2, measure them, tabulate and draw them.

    python train.py --ablation                      seven rows, one after the other
    python train.py --ablation --full --seeds 3     all 12 combinations too, three seeds each
    python train.py --ablation --gpus 4             four rows at a time, each on a GPU of its own

The seventh row is Adam once more, hot: at twice its rate. It trains a little worse, and shows what
the learning rate does to outliers.

Every row is an ordinary run of train.py, in a process and a directory of its own. Its command is
printed. Other options of train.py are passed on to all rows. The same command again goes on where
it was stopped: it keeps finished rows and measurements, and resumes unfinished rows.
"""

if __name__ == "__main__":
    raise SystemExit("error: run this as python train.py --ablation")

import contextlib
import json
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

import train
from data.dataset import Dataset, find_dataset
from nanoosp.checkpoint import check_data
from nanoosp.files import sha256_of, write_text
from nanoosp.fast import compute_in
from nanoosp.machine import pick_device
from nanoosp.methods import slug
from nanoosp.options import ROOT, command, fail, flag, parse
from nanoosp.run_options import expand, resume
from nanoosp.signals import StopSignal
from quantize import Recipe
from tools.evaluate import measure, measure_added, measure_quantized
from tools.loading import load
from tools.report import ablation_table

TABLE_2 = [  # optimizer, norm, embproj, hot: the rows of the paper, in its order, and a hot Adam
    ("adam", "rms", False, False),
    ("adam", "rms", False, True),
    ("muon-only", "rms", False, False),
    ("muon", "rms", False, False),
    ("muon", "ss", False, False),
    ("muon", "rms", True, False),
    ("muon", "ss", True, False),
]
NOT_IN_THE_PAPER = [
    (optimizer, norm, embproj, False)
    for optimizer in ("adam", "muon-only") for embproj in (False, True) for norm in ("rms", "ss")
    if norm == "ss" or embproj
]
HOT = 2  # a hot row's learning rate over Adam's
SHAPE = ("n_layer", "n_head", "n_embd", "vocab_size", "seq_len", "batch_size", "steps")
OWN_OPTIONS = {"ablation", "full", "seeds", "gpus", "seed", "out", "json"}  # not those of a row


@dataclass
class Row:
    directory: Path
    hot: bool
    options: list[str]  # of train.py
    step: int | None  # that its checkpoint has reached; None: it has not begun
    steps: int


@command
def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    opt = parse(train.Options, train.__doc__, argv)
    check(opt)
    device, out = pick_device(opt.device), sys.stderr if opt.json else sys.stdout
    preset = opt.preset = opt.preset or ("toy" if device == "cuda" else "tiny")
    name = f"ablation-{Path(opt.data or 'shakespeare').name}-{preset}"
    base = Path(opt.out or ROOT / "runs" / name)
    rows = plan(opt, base)
    train_rows(rows, opt.gpus or 1, shlex.join(["python", "train.py", *argv]), out)
    results = [measured(row, device) for row in rows]
    text = ablation_table(results)
    write_text(base / "table.md", text + "\n")
    print(json.dumps(results) if opt.json else f"\n{text}\n\n{base / 'table.md'}")
    try:
        from tools import plot  # it needs matplotlib, which is optional
    except ImportError as missing:
        print(f"no figures: {missing}", file=out)
        return
    pictures = []
    for row, result in zip(rows, results):
        loaded = load_row(row.directory, device)
        pictures.append(plot.Picture.of(loaded, result, loaded.dataset()))
    for path in plot.draw_all(pictures, base / "figures"):
        print(f"wrote {path}", file=out)


def check(opt):
    """End the program if it is asked for what an ablation cannot do."""
    expand(opt)
    if "RANK" in os.environ:
        fail("the rows of --ablation are processes of their own: use --gpus N instead of torchrun")
    if opt.gpus and opt.gpus > torch.cuda.device_count():
        fail(f"--gpus {opt.gpus}: torch sees {torch.cuda.device_count()} GPUs here")


# --------------------------------------------------------------------------------------------------
# Rows


def plan(opt, base: Path) -> list[Row]:
    """All rows. Ends the program if their options, or what they were started with, do not fit."""
    adam_rate = opt.lr or train.PRESETS[opt.preset]["lr"]["adam"]
    given = {name: value for name, value in vars(opt).items() if name in opt.given - OWN_OPTIONS}
    rows, shapes, first_seed = [], {}, opt.seed
    for seed in range(first_seed, first_seed + (opt.seeds or 1)):
        for optimizer, norm, embproj, hot in TABLE_2 + NOT_IN_THE_PAPER * opt.full:
            parts = dict(optimizer=optimizer, norm=norm, embproj=embproj)
            own = given | dict(lr=HOT * adam_rate) if hot else dict(given)
            if optimizer != "muon":
                own.pop("embed_lr", None)  # the others have one rate
            directory, step = base / f"{slug(parts)}{'-hot' * hot}-s{seed}", None
            path = os.path.relpath(directory)
            if (directory / "ckpt.pt").exists():
                row_options = ["--resume", path, *typed(own)]
                row = parse(train.Options, train.__doc__, row_options)
                state = resume(row)
                step = state["step"]
                if find_dataset(row.data).is_dir():  # else it is Shakespeare, and will be
                    check_data(state["data"], Dataset(find_dataset(row.data), "val", row.seq_len))
                if step > row.steps:
                    fail(f"{directory} has {step} steps already: give --steps {step}, or another "
                         "--out")
            else:
                row_options = typed(parts | own | dict(seed=seed, out=path))
                row = parse(train.Options, train.__doc__, row_options)
                train.resolve(row)
            rows.append(Row(directory, hot, row_options, step, row.steps))
            shapes[path] = {name: getattr(row, name) for name in SHAPE}
    check_one_shape(shapes)
    return rows


def check_one_shape(shapes: dict[str, dict]):
    """End the program if rows differ in shape or length: some began when a preset was another."""
    first, *others = shapes
    for path in others:
        for name, value in shapes[path].items():
            if value != shapes[first][name]:
                fail(f"{path} has {flag(name)} {value} and {first} {shapes[first][name]}: they belong "
                     "into no one table, so give another --out")


def typed(options: dict) -> list[str]:
    """dict(lr=0.01, compile=False) -> ["--lr", "0.01", "--no-compile"]"""
    words = []
    for name, value in options.items():
        if isinstance(value, bool):
            words.append(flag(name if value else f"no_{name}"))
        else:
            words += [flag(name), str(value)]
    return words


# --------------------------------------------------------------------------------------------------
# Training


def train_rows(rows: list[Row], gpus: int, again: str, out):
    """Train all rows that are not finished, `gpus` of them at a time.

    If one fails or is stopped, the others finish their step and save, and the program ends.
    `again` is the command that goes on.
    """
    for row in rows:
        if row.step == row.steps:
            print(f"== {row.directory.name}: finished, {row.steps} steps", file=out)
    waiting = [row for row in rows if row.step != row.steps]
    running = {}  # on every GPU: a process, and the thread that shows what it prints
    stop = StopSignal()
    try:
        while waiting or running:
            for gpu in range(gpus):
                if waiting and gpu not in running:
                    row = waiting.pop(0)
                    running[gpu] = start(row, gpu if gpus > 1 else None, out)
            time.sleep(0.05)
            codes = {gpu: process.poll() for gpu, (process, _) in running.items()}  # None: it runs
            if stop.received or any(codes.values()):
                for process, _ in running.values():
                    process.terminate()
                for process, thread in running.values():
                    process.wait()
                    thread.join()
                give_up(stop.received, next(filter(None, codes.values()), 0), again)
            for gpu in [gpu for gpu, code in codes.items() if code == 0]:
                _, thread = running.pop(gpu)
                thread.join()
    finally:
        stop.forget()


def start(row: Row, gpu: int | None, out) -> tuple[subprocess.Popen, threading.Thread]:
    """The process that trains a row, and a thread that shows what it prints.

    `gpu` is the only one it sees; then every line begins with the row's name. Without `gpu`, the
    row is alone and has the terminal.
    """
    script, progress = os.path.relpath(train.__file__), ""
    if row.step is not None:
        progress = f": at step {row.step} of {row.steps}"
    print(f"\n== {row.directory.name}{progress}\n$ {shlex.join(['python', script, *row.options])}",
          file=out, flush=True)
    arguments = [sys.executable, script, *row.options]
    environment = dict(os.environ)
    if gpu is None:
        shown = 2 if out is sys.stderr else None
        process = subprocess.Popen(arguments, env=environment, stdout=shown)
    else:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(gpu + 1)))
        environment |= dict(CUDA_VISIBLE_DEVICES=visible.split(",")[gpu], PYTHONUNBUFFERED="1")
        process = subprocess.Popen(arguments, env=environment, stdout=subprocess.PIPE,
                                   stderr=subprocess.STDOUT, encoding="utf-8", errors="replace")

    def show():
        for line in process.stdout or ():
            print(f"{row.directory.name}: {line}", end="", file=out, flush=True)

    thread = threading.Thread(target=show)
    thread.start()
    return process, thread


def give_up(stop_signal: int, code: int, again: str):
    """End the program because of a signal to it, or of a row that ended with `code`."""
    if stop_signal:
        code = 128 + stop_signal
    elif code < 0:  # subprocess says -9 of what a shell calls 137: a row killed by signal 9
        code = 128 - code
    if code - 128 in (signal.SIGINT, signal.SIGTERM):
        print(f"stopped; all is saved, go on with {again}", file=sys.stderr)
    else:
        print(f"error: a row ended with exit code {code}; go on with {again}", file=sys.stderr)
    sys.exit(code)


# --------------------------------------------------------------------------------------------------
# Measuring


def load_row(directory: Path, device: str):
    """A finished row, computing in the precision it was trained in."""
    loaded = load(directory, device)
    compute_in(loaded.model, loaded.options["dtype"])
    return loaded


def measured(row: Row, device: str) -> dict:
    """What eval.py measures of a finished row. It is kept beside the row, with the hash of the
    checkpoint that it is of, and made again for another."""
    path = row.directory / "eval.json"
    of = sha256_of(row.directory / "ckpt.pt")
    if path.exists():
        with contextlib.suppress(ValueError, KeyError, TypeError):  # damaged or an older version's
            result = json.loads(path.read_text(encoding="utf-8"))
            ablation_table([result])
            if result["of"] == of:
                return result
    loaded = load_row(row.directory, device)
    dataset = loaded.dataset()
    result = measure(loaded, dataset, as_published=True)
    result |= dict(label=loaded.label + ", hot" * row.hot, lr=loaded.options["lr"])
    recipes = [Recipe("4-4-4", method) for method in ("rtn", "had")]
    adds = partial(measure_added, dataset=dataset, exact_loss=result["val_loss"])
    result["quantized"] = measure_quantized(loaded, dict.fromkeys(recipes), adds)
    write_text(path, json.dumps(dict(result, of=of)) + "\n")
    return json.loads(path.read_text(encoding="utf-8"))
