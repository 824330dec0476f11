"""The README's tables and three of its figures, made again from the logs in this folder: python results/tables.py

    first_minute/*.txt            what the first commands printed
    learning_rates/*.jsonl        one line a run of the sweeps: its command, hardware and final measurement
    pair_toy/                     eval.py's output and the logs of the pair at its best rates
    four_bits/*.json              the loss that quantization adds: the command, and what eval.py --json printed
    ablation_*/                   eval.json and (every tenth step of) log.jsonl of `python train.py --ablation`

A table stands in the README between <!-- table NAME --> and <!-- end -->. A test compares it with what this file makes.
"""

import json
import re
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))  # so that it runs from any directory

from ablation import ablation_table, mean_and_spread  # noqa: E402 (it needs the line above)

LABELS = {"adam": "Adam", "osp": "OSP", "muon-only": "Muon-only"}


def markdown(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def first_minute() -> str:
    rows = []
    for name, machine in (("tiny", "two CPU cores"), ("toy", "one H100")):
        for row in ("adam", "osp"):
            text = (HERE / f"first_minute/{name}-{row}.txt").read_text()
            command = re.match(r"\$ (.*?)  ", text).group(1)
            loss, bits = re.search(r"validation loss +(\S+) nats per token = (\S+)", text).groups()
            kurtosis, floor = re.search(r"(?m)^excess kurtosis +(\S+) \(.*: (\S+)\)", text).groups()
            speed, seconds = re.search(r"speed +(\S+) tokens/s in training, (\d+) s", text).groups()
            rows.append([f"`{command}`", f"{machine}, `{name}`", loss, bits, kurtosis, floor, speed, f"{seconds} s"])
    head = ["command", "where", "validation loss", "bits per byte", "excess kurtosis", "Gaussian", "tokens/s", "time"]
    return markdown(head, rows)


def sweep(name: str) -> list[dict]:
    return [json.loads(line) for line in (HERE / f"learning_rates/{name}.jsonl").read_text().splitlines()]


def learning_rates(name: str) -> str:
    groups = {}
    for r in sweep(name):
        groups.setdefault((r["row"], float(r["lr"]), float(r["embed_lr"] or 0)), []).append(r)
    rows = []
    for (row, lr, embed_lr), runs in sorted(groups.items()):
        rate = f"{lr:g}" + (f", embedding and head {embed_lr:g}" if embed_lr else "")
        loss, kurtosis = ([r[key] for r in runs] for key in ("val_loss", "kurtosis"))
        rows.append([LABELS[row], rate, str(len(runs)), mean_and_spread(loss, 4), mean_and_spread(kurtosis, 2)])
    return markdown(["", "peak learning rate", "runs", "validation loss", "excess kurtosis"], rows)


def quantized(name: str) -> list[dict]:
    return json.loads((HERE / f"four_bits/{name}.json").read_text())["rows"]


def four_bits(name: str) -> str:
    rows, methods = [], None
    for r in quantized(name):
        for bits, results in r["quantized"].items():
            methods = list(results)
            added = [f"{results[method]['added']:+.4f}" for method in methods]
            rows.append([bits, r["label"], f"{r['val_loss']:.4f}", *added])
    order = list(dict.fromkeys(row[0] for row in rows))
    return markdown(["bits", "", "exact loss", *methods], sorted(rows, key=lambda row: order.index(row[0])))


def pair_toy() -> str:
    rows = []
    for line in (HERE / "pair_toy/eval.txt").read_text().splitlines()[-2:]:
        target, loss, _, bits, kurtosis, floor, published, published_floor, *_ = line.split()
        label = {"adam1200": "Adam", "osp1200": "OSP"}[target]
        rows.append([label, loss, bits, kurtosis, floor, published, published_floor])
    head = ["", "validation loss", "bits per byte", "excess kurtosis", "Gaussian", "as published", "Gaussian"]
    return markdown(head, rows)


ROWS = ("adam", "muon-only", "muon", "muon-ss", "muon-embproj", "muon-ss-embproj")  # the paper's order


def ablation(preset: str) -> str:
    files = [HERE / f"ablation_{preset}/{row}-s0.eval.json" for row in ROWS]
    return ablation_table([json.loads(path.read_text()) for path in files])


TABLES = {
    "first_minute": first_minute,
    "pair_toy": pair_toy,
    "ablation_toy": lambda: ablation("toy"),
    "ablation_tiny": lambda: ablation("tiny"),
    "four_bits_tiny": lambda: four_bits("tiny"),
    "four_bits_toy": lambda: four_bits("toy"),
    **{name: lambda name=name: learning_rates(name) for name in ("tiny-800", "toy-1000", "toy-1200")},
}


def filled(readme: str) -> str:
    """`readme` with every table made new."""
    pattern = r"(<!-- table (\S+) -->\n).*?(<!-- end -->)"
    return re.sub(pattern, lambda m: f"{m.group(1)}{TABLES[m.group(2)]()}\n{m.group(3)}", readme, flags=re.S)


def figures():
    import plot

    runs = [r for r in sweep("toy-1200") if r["row"] != "muon-only"]
    points = {}
    for r in runs:
        points.setdefault(LABELS[r["row"]], []).append((float(r["lr"]), r["kurtosis"], r["val_loss"]))
    assets, floor = HERE.parent / "assets", runs[0]["kurtosis_floor"]
    yield plot.save(plot.draw_learning_rates(points, floor), assets / "learning_rates_toy.png")
    series = []
    for row in ROWS:
        folder = HERE / "ablation_toy"
        label = json.loads((folder / f"{row}-s0.eval.json").read_text())["label"]
        log = (folder / f"{row}-s0.log.jsonl").read_text().splitlines()
        series.append((label, [json.loads(line) for line in log]))
    yield plot.save(plot.draw_curves(series, floor), assets / "curves_toy.png")
    sweep_of_bits = [(r["label"], r["quantized"]) for r in quantized("toy_sweep")]
    yield plot.save(plot.draw_bits(sweep_of_bits), assets / "bits_toy.png")


if __name__ == "__main__":
    path = HERE.parent / "README.md"
    path.write_text(filled(path.read_text()))
    print(f"wrote the tables of {path.name}")
    for path in figures():
        print(f"wrote {path.name}")
