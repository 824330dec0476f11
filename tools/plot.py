"""Figures of what eval.py measures: python eval.py TARGET... --plot DIR. Needs matplotlib (requirements-extra.txt).

    activations.png      |activation| over tokens x channels, where it stands out most (the paper's Figure 2)
    curves.png           loss and kurtosis against training tokens, from the logs (Figures 3 and 7)
    layers.png           kurtosis of every state of the residual stream
    sinks.png            q.k logits on the first token and elsewhere, in the head that looks there most (Figure 6)
    learning_rates.png   kurtosis and loss against the learning rate, if the targets differ in it
    bits.png             loss against the bits of weights and of activations, with --sweep (Figure 4)
"""

from dataclasses import dataclass
from pathlib import Path

import torch

try:
    import matplotlib
except ImportError as error:
    raise ImportError("figures need matplotlib: pip install -r requirements-extra.txt") from error
matplotlib.use("Agg")  # files, no window
import matplotlib.pyplot as plt
from matplotlib.colors import LogNorm

from nanoosp.cli import read_log
from eval import SWEEP, SinkWatch, Target, attention_sinks, load_target, sites, strongest_sink

# One colour, line and marker per configuration, the same in every figure; told apart in grey by line and marker.
STYLES = {
    "Adam": ("#d55e00", "-", "o"),
    "Muon-only": ("#e69f00", "--", "s"),
    "Muon": ("#cc79a7", "-.", "^"),
    "Muon + SSNorm": ("#56b4e9", ":", "D"),
    "Muon + EmbProj": ("#009e73", "--", "v"),
    "OSP": ("#0072b2", "-", "*"),
}
OTHERS = [("#444444", line, marker) for line, marker in zip(["-", "--", "-.", ":", "-", "--"], "PXhd<>")]


@dataclass
class Picture:
    """What the figures need of one target."""

    name: str
    label: str
    options: dict
    result: dict  # of eval.measure
    log: list[dict]
    activations: torch.Tensor  # [T, D], |x| over its median, of one validation window, at state `state`
    state: int
    head: tuple[int, int]  # layer and head with the strongest sink
    counts: list  # [2][bins] of its logits

    @classmethod
    def of(cls, target: Target, result: dict, dataset, autocast) -> "Picture":
        path = (target.path if target.path.is_dir() else target.path.parent) / "log.jsonl"
        log = read_log(path)
        state = max(range(len(result["kurtosis_per_layer"])), key=result["kurtosis_per_layer"].__getitem__)
        window = torch.from_numpy(dataset.windows(dataset.evaluation_windows(1)))[:, :-1]
        kept = []
        module = sites(target.model)["residual stream"][state]
        handle = module.register_forward_hook(lambda module, inputs, x: kept.append(x[0].float().abs().cpu()))
        with torch.no_grad(), autocast:
            target.model(window.to(next(target.model.parameters()).device))
        handle.remove()
        head = strongest_sink(result["sinks"])
        counts = attention_sinks(target.model, dataset, autocast, histogram=head)["counts"]
        activations = kept[0] / kept[0].median()
        return cls(target.name, target.label(), target.options, result, log, activations, state, head, counts)


def style(label: str):
    return STYLES.get(label) or OTHERS[sum(map(ord, label)) % len(OTHERS)]


def panels(n: int, width=4.2, height=3.2):
    """A figure with n panels, at most three in a row, and the list of its axes."""
    columns = min(n, 3)
    rows = -(-n // columns)
    width, height = (width, height) if columns < 3 else (3.3, 2.7)  # three fill a README's width with legible letters
    size = (width * columns, height * rows)
    figure, axes = plt.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")
    for spare in axes.flat[n:]:
        spare.set_axis_off()
    return figure, list(axes.flat[:n])


def one_of_each(pictures):
    """The first picture of every configuration, at most six."""
    return list({p.label: p for p in reversed(pictures)}.values())[::-1][:6]


def kurtosis_axis(axis, floor: float):
    """Linear near zero, logarithmic above 1; with the Gaussian floor drawn."""
    axis.set_yscale("symlog", linthresh=1, linscale=0.6)
    axis.set_ylim(-1, max(3, 1.5 * axis.get_ylim()[1]))
    ticks = [t for t in (-1, 0, 1, 3, 10, 30, 100, 300, 1000, 3000) if t <= axis.get_ylim()[1]]
    axis.set_yticks(ticks, [str(t) for t in ticks])
    axis.minorticks_off()
    axis.axhline(floor, color="black", linewidth=0.8, linestyle=(0, (1, 2)), label=f"Gaussian ({floor:.3f})")
    axis.set_ylabel("excess kurtosis")
    axis.grid(alpha=0.3)


def legend_above(figure, axis):
    """The axis's legend above all panels, where it hides no curve."""
    handles, labels = axis.get_legend_handles_labels()
    columns = len(labels) if len(labels) <= 4 else -(-len(labels) // 2)
    figure.legend(handles, labels, loc="outside upper center", ncols=columns, fontsize=9, frameon=False)


def draw_front(series: list[tuple[str, list[dict]]], floor: float):
    """Kurtosis alone, on a linear axis: the front page's figure. The last of `series` is thickest.

    Args:
        series: label, with the learning rate in it, and log of each run.
    """
    figure, (axis,) = panels(1, 7.4, 3.0)
    for i, (label, log) in enumerate(series, start=1):
        points = [record for record in log if "kurtosis" in record]
        color, line, _ = style(label)
        axis.plot([r["tokens"] / 1e6 for r in points], [r["kurtosis"] for r in points], color=color,
                  linestyle=line, linewidth=3 if i == len(series) else 1.6,
                  label=label.replace(",", ", learning rate"))
    axis.axhline(floor, color="black", linewidth=1, linestyle=(0, (1, 2)),
                 label=f"Gaussian vectors ({floor:.3f})")
    axis.set_xlabel("training tokens (millions)")
    axis.set_ylabel("excess kurtosis of the activations")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=9, loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    return figure


def state_name(i: int) -> str:
    return "embedding output" if i == 0 else f"output of block {i}"


def draw_activations(pictures):
    shown = one_of_each(pictures)
    figure, axes = panels(len(shown))
    top = max(p.activations.max().item() for p in shown)
    colors = plt.get_cmap("inferno", 12)  # few colours make small files
    for axis, p in zip(axes, shown):
        shown_values = p.activations.clamp(min=1).numpy()  # [T, D]
        image = axis.imshow(shown_values, norm=LogNorm(1, top), cmap=colors, aspect="auto", interpolation="nearest")
        axis.set_title(f"{p.label}: {state_name(p.state)}\nmaximum {p.activations.max():.0f} x median", fontsize=10)
        axis.set_xlabel("channel")
        axis.set_ylabel("token")
    ticks = [t for t in (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000) if t <= top]
    bar = figure.colorbar(image, ax=axes, label="|activation| / median")
    bar.set_ticks(ticks, labels=[str(t) for t in ticks])
    bar.minorticks_off()
    return figure


def draw_curves(series: list[tuple[str, list[dict]]], floor: float, highest_loss: float | None = None):
    """`series`: (label, records of log.jsonl), one a run."""
    figure, (left, right) = panels(2, 5.2, 3.6)
    named = set()
    for label, log in series:
        color, line, _ = style(label)
        points = [r for r in log if "val_loss" in r]
        millions = [r["tokens"] / 1e6 for r in points]
        kwargs = dict(color=color, linestyle=line, linewidth=1.5, label=None if label in named else label)
        left.plot(millions[1:], [r["val_loss"] for r in points][1:], **kwargs)  # the first is ln V for all
        right.plot(millions, [r["kurtosis"] for r in points], **kwargs)
        named.add(label)
    left.set_ylabel("validation loss (nats per token)")
    left.set_ylim(top=highest_loss)
    left.grid(alpha=0.3)
    kurtosis_axis(right, floor)
    for axis in (left, right):
        axis.set_xlabel("training tokens (millions)")
    legend_above(figure, right)
    return figure


def draw_layers(pictures):
    figure, (axis,) = panels(1, 6.4, 3.8)
    named = set()
    for p in pictures:
        color, line, marker = style(p.label)
        values = p.result["kurtosis_per_layer"]
        label = None if p.label in named else p.label
        axis.plot(range(len(values)), values, color=color, linestyle=line, marker=marker, markersize=5, label=label)
        named.add(p.label)
    axis.set_xticks(range(len(values)), ["embedding", *range(1, len(values))])
    axis.set_xlabel("residual stream after the embedding, after block 1, 2, ...")
    kurtosis_axis(axis, pictures[0].result["kurtosis_floor"])
    axis.legend(fontsize=8)
    return figure


def draw_sinks(pictures):
    shown = one_of_each(pictures)
    figure, axes = panels(len(shown))
    centers = (SinkWatch.bins[1:] + SinkWatch.bins[:-1]) / 2
    width = (SinkWatch.bins[1] - SinkWatch.bins[0]).item()
    for axis, p in zip(axes, shown):
        series = (p.counts[0], "black", "--", "first token"), (p.counts[1], style(p.label)[0], "-", "other tokens")
        for counts, color, line, name in series:
            density = [count / max(sum(counts), 1) / width for count in counts]
            axis.plot(centers.numpy(), density, color=color, linestyle=line, label=name)
        layer, head = p.head
        share = p.result["sinks"]["share"][layer][head]
        where = f"{p.label}: block {layer + 1}, head {head + 1}"
        axis.set_title(f"{where}\n{share:.0%} of attention on the first token", fontsize=10)
        axis.set_xlabel("logit q.k / sqrt(d)")
        axis.set_ylabel("density")
        axis.set_xlim(-12, 12)
        axis.set_ylim(top=1.4 * axis.get_ylim()[1])  # room for the legend
        axis.legend(fontsize=8)
    return figure


def draw_points(axes, points: dict[str, list[tuple]]):
    """`points`: for each label (x, a value for each of the axes) of its runs; a line joins the means."""
    for label, group in points.items():
        color, line, marker = style(label)
        for column, axis in enumerate(axes, start=1):
            means = {}
            for point in sorted(group):
                means.setdefault(point[0], []).append(point[column])
            axis.plot(list(means), [sum(v) / len(v) for v in means.values()], color=color, linestyle=line, label=label)
            axis.scatter([p[0] for p in group], [p[column] for p in group], color=color, marker=marker, s=18)
    for axis in axes:
        axis.set_xscale("log")
        axis.grid(alpha=0.3)


def draw_learning_rates(points: dict[str, list[tuple[float, float, float]]], floor: float):
    """`points`: for each label (learning rate, kurtosis, validation loss) of its runs."""
    figure, (left, right) = panels(2, 5.2, 3.6)
    draw_points((left, right), points)
    kurtosis_axis(left, floor)
    right.set_ylabel("validation loss (nats per token)")
    for axis in (left, right):
        axis.set_xlabel("peak learning rate")
    left.legend(fontsize=8)
    return figure


def draw_knob(by_rate: dict[str, list[tuple]], by_length: dict[str, list[tuple]], floor: float, highest_loss: float):
    """Both: for each label (learning rate, or steps; kurtosis, validation loss, loss added at 4-4-4) of its runs."""
    figure, axes = panels(6)
    for row, points, name in ((axes[:3], by_rate, "peak learning rate"), (axes[3:], by_length, "steps")):
        draw_points(row, points)
        kurtosis_axis(row[0], floor)
        row[1].set_ylabel("validation loss (nats)")
        row[1].set_ylim(top=min(highest_loss, row[1].get_ylim()[1]))
        row[2].set_ylabel("loss added at 4-4-4 bits")
        row[2].set_yscale("log")
        row[2].set_yticks([t for t in (0.02, 0.03, 0.05, 0.1, 0.2, 0.3) if t <= row[2].get_ylim()[1]])
        row[2].yaxis.set_major_formatter("{x:g}")
        for axis in row:
            axis.set_xlabel(name)
            axis.minorticks_off()
    for axis in axes[3:]:
        steps = sorted({point[0] for group in by_length.values() for point in group})
        axis.set_xticks(steps, [str(n) for n in steps])
    legend_above(figure, axes[0])
    return figure


def draw_traces(traces: dict[str, list[list[dict]]], panels_of: dict[str, str], log=()):
    """`traces`: for each name the records of its runs, one list a run. `panels_of`: what the panels show, and titles. A
    value that is a list, one number a block, counts with its largest. `log`: what to show on a logarithmic axis."""
    figure, axes = panels(len(panels_of))
    for i, (name, runs) in enumerate(traces.items()):
        for j, records in enumerate(runs):
            for axis, key in zip(axes, panels_of):
                values = [max(r[key]) if isinstance(r[key], list) else r[key] for r in records]
                color, line = plt.get_cmap("Dark2")(i % 8), ["-", "--", "-.", ":"][i // 3 % 4]
                axis.plot([r["step"] for r in records], values, color=color, linestyle=line, linewidth=1.2,
                          label=None if j else name)
    for axis, (key, title) in zip(axes, panels_of.items()):
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("step")
        axis.grid(alpha=0.3)
        if key in log:
            axis.set_yscale("log")
    axes[-1].legend(fontsize=7)
    return figure


def draw_bits(series: list[tuple[str, dict]]):
    """`series`: (label, the "quantized" of eval.py --sweep), one a target. Thick lines are the first method."""
    figure, axes = panels(2, 5.2, 3.6)
    axes[1].sharey(axes[0])
    for axis, place, name in zip(axes, (0, 1), ("weights", "activations")):
        for label, quantized in series:
            color, line, marker = style(label)
            settings = [each for each in quantized if each.split("-")[1 - place] == "16"]
            for i, method in enumerate(quantized[settings[0]]):
                points = [(int(each.split("-")[place]), quantized[each][method]["val_loss"]) for each in settings]
                axis.plot(*zip(*points), color=color, linestyle=line, marker=marker, linewidth=2 - i, markersize=5,
                          label=f"{label}, {method}", alpha=1 - 0.4 * min(i, 1))
        axis.set_xlabel(f"bits of {name}, the rest at 16")
        axis.set_xticks(sorted({int(each.split("-")[place]) for each in settings}))
        axis.invert_xaxis()
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("validation loss (nats per token)")
    axes[1].legend(fontsize=8)
    return figure


def save(figure, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=95 if len(figure.axes) > 3 else 110)  # about as wide as a README, and under 200 kB
    plt.close(figure)
    return path


def draw_all(pictures: list[Picture], out: Path) -> list[Path]:
    """Write the figures that these targets allow; returns their paths."""
    floor = pictures[0].result["kurtosis_floor"]
    draw = {"activations": draw_activations, "layers": draw_layers, "sinks": draw_sinks}
    figures = {name: function(pictures) for name, function in draw.items()}
    series = [(p.label, p.log) for p in pictures if any("val_loss" in record for record in p.log)]
    if series:
        figures["curves"] = draw_curves(series, floor)
    points = {}
    for p in (p for p in pictures if "lr" in p.options):  # models from elsewhere do not say
        points.setdefault(p.label, []).append((p.options["lr"], p.result["kurtosis"], p.result["val_loss"]))
    if any(len({rate for rate, _, _ in group}) > 1 for group in points.values()):
        figures["learning_rates"] = draw_learning_rates(points, floor)
    sweeps = [(p.label, p.result["quantized"]) for p in pictures if set(SWEEP) <= set(p.result.get("quantized", ()))]
    if sweeps:
        figures["bits"] = draw_bits(sweeps)
    return [save(figure, out / f"{name}.png") for name, figure in figures.items()]


def draw_runs(rows: list[dict], out: Path, device: str, autocast) -> list[Path]:
    """Figures of measured run directories; each row is a result of eval.measure_target with its "path"."""
    pictures = []
    for row in rows:
        target = load_target(row["path"], device)
        pictures.append(Picture.of(target, row, target.dataset(), autocast))
    return draw_all(pictures, out)
