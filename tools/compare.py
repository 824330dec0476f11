"""The last lines of train.py: what the run reached, what four bits cost it, and what to compare it with.

OSP is compared with plain Adam, and everything else with OSP. If that run lies beside this one, the two
are printed side by side; if not, the command that makes it.
"""

import contextlib
import io
import json
import os
import shlex
from dataclasses import fields
from pathlib import Path

import train
from nanoosp.files import write_text
from nanoosp.options import parse
from nanoosp.run import ROOT, label, launcher, numbered, remembered, slug, usual_lr
from nanoosp.summary import table
from tools.ablation import typed

PLAIN = dict(optimizer="adam", norm="rms", embproj=False)
RATES = ("lr", "embed_lr")  # each optimizer has its own
MEMORY = {"micro_batch_size", "recompute"}  # they change no result beyond rounding


def finish(opt, summary: dict):
    """Keep `summary`, the result of train(), in the run's directory as summary.json, and print it."""
    directory, options = Path(summary["run"]), remembered(opt)
    write_text(directory / "summary.json", json.dumps(summary) + "\n")
    print(json.dumps(summary) if opt.json else run_summary(summary, options, directory))


def run_summary(summary: dict, options: dict, directory: Path) -> str:
    """The last lines of a run with these options in this directory."""
    bits = f" = {summary['bits_per_byte']:.4f} bits per byte" if summary["bits_per_byte"] else ""
    rtn, had = added(summary)
    lines = {
        "validation loss": f"{summary['val_loss']:.4f} nats per token{bits}",
        "excess kurtosis": f"{summary['kurtosis']:.3f} (perfectly Gaussian activations: "
                           f"{summary['kurtosis_floor']:.3f})",
        "4-4-4 bits add": f"{rtn:+.4f} to the loss, rounded to nearest; {had:+.4f} with a Hadamard in "
                          "the FFN",
        "speed": f"{summary['tokens_per_s']:,.0f} tokens/s in training, {summary['wall_s']:.0f} s in all",
        "peak memory": f"{summary['peak_memory_gib']:.2f} GiB",
        "run directory": os.path.relpath(directory),
    }
    found = find_sibling(options, directory)
    if found is None:
        lines["to compare"] = f"{sibling_command(options, directory)}   ({label(sibling_method(options))})"
    text = "\n".join(f"{name:<19}{words}" for name, words in lines.items())
    return f"\n{text}" if found is None else f"\n{text}\n\n{side_by_side((options, summary), found)}"


def added(summary: dict) -> list[float]:
    """What 4-4-4 adds to the loss: rounded to nearest, and with a Hadamard in the FFN."""
    results = summary["quantized"]["4-4-4"]
    return [results[method]["val_loss"] - summary["val_loss"] for method in ("rtn", "had")]


def side_by_side(*runs: tuple[dict, dict]) -> str:
    """A table of (options, summary) of some runs."""
    rows = []
    for options, summary in runs:
        rows.append([f"{label(options)}, learning rate {options['lr']:g}", f"{summary['val_loss']:.4f}",
                     f"{summary['kurtosis']:.3f}", *(f"{loss:+.4f}" for loss in added(summary))])
    head = ["this run, and the one beside it", "validation loss", "excess kurtosis", "4-4-4 adds",
            "with a Hadamard"]
    return table(head, rows)


# --------------------------------------------------------------------------------------------------
# The sibling


def sibling_method(options: dict) -> dict:
    """Which parts of OSP the run has that this one is compared with."""
    return PLAIN if train.OSP.items() <= options.items() else train.OSP


def compared(options: dict) -> dict:
    """The options that two runs must share to be compared."""
    names = {*train.Options.__annotations__, "dtype"} - {*PLAIN, *RATES, *MEMORY}
    return {name: value for name, value in options.items() if name in names}


def find_sibling(options: dict, directory: Path):
    """(options, summary) of a finished run in the same folder to compare with, or None: of several
    the newest, but one at its preset's learning rate before all others."""
    wanted, at_other_rates = sibling_method(options), []
    beside = directory.resolve().parent.glob("*/summary.json")
    for path in sorted(beside, key=lambda path: -path.stat().st_mtime):
        try:
            theirs = json.loads((path.parent / "config.json").read_text(encoding="utf-8"))
            summary = json.loads(path.read_text(encoding="utf-8"))
            same = compared(theirs) == compared(options) and summary["step"] == theirs["steps"]
            if same and wanted.items() <= theirs.items():
                side_by_side((theirs, summary))  # it has all that will be printed
                if theirs["lr"] == usual_lr(train.PRESETS[theirs["preset"]], theirs["optimizer"]):
                    return theirs, summary
                at_other_rates.append((theirs, summary))
        except (OSError, ValueError, KeyError, TypeError, AttributeError, ArithmeticError):
            continue  # another program's, or damaged
    return at_other_rates[0] if at_other_rates else None


def sibling_command(options: dict, directory: Path) -> str:
    """The command that trains the run to compare with, at its preset's learning rate, beside the
    run in `directory`."""
    method = ["--osp"] if sibling_method(options) is train.OSP else []

    def resolved(words):
        opt = parse(train.Options, "", [*method, *words])
        train.resolve(opt)
        return vars(opt)

    wanted = compared(options).keys() | MEMORY | {"device"}
    words = {f.name: options[f.name] for f in fields(train.Options)
             if f.name in wanted and options[f.name] is not None}
    first = {name: words.pop(name) for name in ("preset", "data", "device")}
    for name in reversed([*words]):  # leave out what follows from the rest; warmup before steps
        rest = {other: value for other, value in words.items() if other != name}
        with contextlib.suppress(SystemExit), contextlib.redirect_stderr(io.StringIO()):
            if resolved(typed(first | rest))[name] == options[name]:  # SystemExit: they need it
                words = rest
    has_text = options["preset"] in ("tiny", "toy")  # which the other presets must be given
    with contextlib.suppress(SystemExit), contextlib.redirect_stderr(io.StringIO()):
        usual = resolved([])
        first = {name: value for name, value in first.items()
                 if usual[name] != value or name == "data" and not has_text}
    if "data" in first and Path(first["data"]).exists():
        first["data"] = os.path.relpath(first["data"])
    words, folder = first | words, directory.resolve().parent
    if folder != (ROOT / "runs").resolve():  # where new runs go by themselves
        free = (path for path in numbered(folder / slug(sibling_method(options)))
                if not os.path.lexists(path))
        words["out"] = os.path.relpath(next(free))
    return shlex.join([*launcher(), os.path.relpath(train.__file__), *method, *typed(words)])
