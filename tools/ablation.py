"""The ablation: python train.py --ablation. The rows of the paper's Table 2, trained, measured, tabulated and drawn.

Each row is an ordinary run in a directory of its own. Killed and started again, the ablation goes on where it was: a
finished row is kept, an unfinished one resumed, and a measurement is made once.
"""

import argparse
import contextlib
import json
import statistics
from pathlib import Path

import torch.distributed as dist

from nanoosp.cli import first, pick_device, precision, write_whole
from eval import load_target, measure_quantized, measure_target, strongest_state
from train import ROOT, Ranks, complete, default_preset, parts_name, train

TABLE_2 = [("adam", "rms", False), ("muon-only", "rms", False), ("muon", "rms", False), ("muon", "ss", False),
           ("muon", "rms", True), ("muon", "ss", True)]  # optimizer, norm, embproj: the paper's rows, in its order
LACKING = [("adam", "ss", False), ("adam", "rms", True), ("adam", "ss", True),
           ("muon-only", "ss", False), ("muon-only", "rms", True), ("muon-only", "ss", True)]


def ablation(opt, error, say):
    """Train every row that is not finished, one after the other in this process (under torchrun: these); then measure,
    tabulate and draw. `opt` are train.py's options, as given; `error` and `say` are its functions too."""
    if opt.resume or opt.osp or opt.optimizer or opt.norm or opt.embproj is not None or opt.dry_run:
        error("--ablation chooses the parts of OSP itself, and goes on by itself if it is started again")
    if opt.bench:
        error("--bench measures one model; leave out --ablation")
    if opt.seeds is not None and opt.seeds < 1:
        error(f"--seeds {opt.seeds} is out of range")
    opt.device = pick_device(opt.device, error)
    opt.preset = opt.preset or default_preset(opt.device)
    base = Path(opt.out or ROOT / "runs" / f"ablation-{Path(opt.data or 'shakespeare').name}-{opt.preset}")
    ranks, rows, first_seed = None, [], opt.seed or 0
    for seed in range(first_seed, first_seed + (1 if opt.seeds is None else opt.seeds)):
        for optimizer, norm, embproj in TABLE_2 + LACKING * opt.full:
            row = argparse.Namespace(**vars(opt) | dict(optimizer=optimizer, norm=norm, embproj=embproj, seed=seed))
            directory = base / f"{parts_name(row)}-s{seed}"
            done = (directory / "ckpt.pt").exists()
            row.resume, row.out = (str(directory), None) if done else (None, str(directory))
            state = complete(row, error)
            if state and state["step"] > row.steps:
                error(f"{directory} has {state['step']} steps already: give --steps {state['step']}, or another --out")
            ranks = ranks or Ranks.start(row.device)
            say(f"\n== {directory.name}" + (f": at step {state['step']} of {row.steps}" if state else ""))
            if not state or state["step"] < row.steps:
                train(row, state, ranks, say)
            if ranks.rank == 0:
                rows.append(measured(directory, row))
            if ranks.world > 1:
                dist.barrier()
    if first():
        table = ablation_table(rows)
        write_whole(base / "table.md", table + "\n")
        print(json.dumps(rows) if opt.json else f"\n{table}\n\n{base / 'table.md'}")
        try:
            from tools import plot  # only now: it needs matplotlib, which is optional
        except ImportError as missing:
            return say(f"no figures: {missing}")
        for path in plot.draw_runs(rows, base / "figures", row.device, precision(row.device, row.dtype)):
            say(f"wrote {path}")


def measured(directory: Path, opt) -> dict:
    """eval.py's measurement of a finished row, kept beside it so that it is done once."""
    kept = directory / "eval.json"
    if kept.exists() and kept.stat().st_mtime > (directory / "ckpt.pt").stat().st_mtime:
        with contextlib.suppress(ValueError, KeyError, TypeError):  # damaged, or an older version's: measure again
            result = json.loads(kept.read_text())
            ablation_table([result])
            return result
    target = load_target(directory, opt.device)
    how = target, target.dataset(), max(1, 4096 // opt.seq_len), precision(opt.device, opt.dtype)
    result = measure_target(*how, as_published=True)
    result["quantized"] = measure_quantized(*how, result["val_loss"], ["4-4-4"], dict(rtn=None, had=None))
    write_whole(kept, json.dumps(dict(result, path=str(directory))) + "\n")
    return json.loads(kept.read_text())


def mean_and_spread(values, digits: int) -> str:
    """Mean ± standard deviation; of a single value, the value."""
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{spread}"


def ablation_table(rows: list[dict]) -> str:
    """Markdown, one line a configuration: mean, and standard deviation over seeds where there are several."""
    grouped = {}
    for row in rows:
        grouped.setdefault(row["label"], []).append(row)

    floors = rows[0]["kurtosis_floor"], rows[0]["kurtosis_as_published_floor"]
    lines = [
        f"| model, {len(next(iter(grouped.values())))} seed(s) | validation loss | bits per byte | excess kurtosis "
        f"(Gaussian {floors[0]:.3f}) | as published (Gaussian {floors[1]:.3f}) | largest activation / median | "
        "loss at 4-4-4 | the same with an FFN Hadamard |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for label, group in grouped.items():
        largest = [r["largest"][strongest_state(r["largest"])]["ratio"] for r in group]
        bits = mean_and_spread([r["bits_per_byte"] for r in group], 4) if group[0]["bits_per_byte"] else "-"
        kurtosis, published = (mean_and_spread([r[k] for r in group], 3) for k in ("kurtosis", "kurtosis_as_published"))
        loss = mean_and_spread([r["val_loss"] for r in group], 4)
        four = (mean_and_spread([r["quantized"]["4-4-4"][m]["val_loss"] for r in group], 4) for m in ("rtn", "had"))
        cells = [label, loss, bits, kurtosis, published, mean_and_spread(largest, 0), *four]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)
