"""What train.py prints: before a run a table of its parameters, and after it what it reached."""

import json
import os
from pathlib import Path

from nanoosp.methods import OSP, PLAIN, label


def table(head, rows, markdown: bool = False) -> str:
    """`head` and `rows`: lists of cells. Aligned, the first column to the left, or as Markdown."""
    lines = [[str(cell) for cell in line] for line in [head, *rows]]
    if markdown:
        lines.insert(1, ["---"] * len(head))
        return "\n".join("| " + " | ".join(line) + " |" for line in lines)
    widths = [max(map(len, column)) for column in zip(*lines)]

    def aligned(line):
        cells = [cell.rjust(width) for cell, width in zip(line, widths)]
        return "  ".join([line[0].ljust(widths[0]), *cells[1:]]).rstrip()

    return "\n".join(map(aligned, lines))


def optimizer_table(optimizers) -> str:
    """A line for each group of parameters, to check before a run who trains what."""
    rows = []
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            n = sum(p.numel() for p in group["params"])
            rates = f"{group['peak_lr']:.2g}", f"{group['weight_decay']:.2g}"
            name = type(optimizer).__name__
            rows.append([group["role"], name, *rates, len(group["params"]), f"{n:,}"])
    return table(["role", "optimizer", "lr", "decay", "tensors", "parameters"], rows)


# What a run ends with: what it reached, what four bits cost it, and the run to compare it with


# Options that may differ between two runs that are compared: those of the method, and those that change no result
METHOD = {"optimizer", "norm", "embproj", "lr", "embed_lr"}
MACHINE = {"device", "compile", "recompute", "micro_batch_size", "eval_every", "save_every"}


def run_summary(summary: dict, options: dict, directory: Path) -> str:
    """The last lines of a run with these options in this directory."""
    bits = f" = {summary['bits_per_byte']:.4f} bits per byte" if summary["bits_per_byte"] else ""
    rtn, had = added(summary)
    lines = {
        "validation loss": f"{summary['val_loss']:.4f} nats per token{bits}",
        "excess kurtosis": f"{summary['kurtosis']:.3f} (perfectly Gaussian activations: {summary['kurtosis_floor']:.3f})",
        "4-4-4 bits add": f"{rtn:+.4f} to the loss, rounded to nearest; {had:+.4f} with a Hadamard in the FFN",
        "speed": f"{summary['tokens_per_s']:,.0f} tokens/s in training, {summary['wall_s']:.0f} s in all",
        "peak memory": f"{summary['peak_memory_gib']:.2f} GiB",
        "run directory": os.path.relpath(directory),
    }
    sibling = find_sibling(options, summary["data"], directory)
    if sibling is None:
        lines["to compare"] = f"{advice(options)}, with this run's other options"
    text = "\n".join(f"{name:<19}{words}" for name, words in lines.items())
    return f"\n{text}" if sibling is None else f"\n{text}\n\n{side_by_side((options, summary), sibling)}"


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
    head = ["this run, and the one beside it", "validation loss", "excess kurtosis", "4-4-4 adds", "with a Hadamard"]
    return table(head, rows)


def sibling_method(options: dict) -> dict:
    """Which parts of OSP the run has that this one is compared with: OSP with plain Adam, all else with OSP."""
    return PLAIN if OSP.items() <= options.items() else OSP


def advice(options: dict) -> str:
    """The command of the run to compare with."""
    return "python train.py (Adam)" if sibling_method(options) is PLAIN else "python train.py --osp (OSP)"


def compared(options: dict) -> dict:
    """The options that two runs must share to be compared. What their data are, a path does not say."""
    return {name: value for name, value in options.items() if name not in METHOD | MACHINE | {"data"}}


def find_sibling(options: dict, data: str, directory: Path):
    """(options, summary) of the finished run in the same folder to compare with, or None. `data`: the fingerprint of what
    this one was trained on, which both must share. Of several it is that of the lowest validation loss: the other side
    deserves its best learning rate."""
    found = []
    for path in directory.resolve().parent.glob("*/summary.json"):
        try:
            theirs = json.loads((path.parent / "config.json").read_text(encoding="utf-8"))
            summary = json.loads(path.read_text(encoding="utf-8"))
            same = compared(theirs) == compared(options) and summary["data"] == data
            if same and summary["step"] == theirs["steps"] and sibling_method(options).items() <= theirs.items():
                side_by_side((theirs, summary))  # it has all that will be printed
                found.append((theirs, summary))
        except (OSError, ValueError, KeyError, TypeError, AttributeError, ArithmeticError):
            continue  # another program's, or damaged
    return min(found, key=lambda run: run[1]["val_loss"], default=None)
