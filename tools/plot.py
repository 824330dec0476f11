"""Figures of what eval.py measures: python eval.py TARGET... --plot DIR

Needs matplotlib (requirements-extra.txt).

    activations.png      |activation| over tokens x channels, where it stands out most (Figure 2)
    curves.png           loss and kurtosis against training tokens, from the logs (Figures 3 and 7)
    layers.png           kurtosis of every state of the residual stream
    sinks.png            q.k logits on the first token and elsewhere, in the head that looks at the
                         first token most (Figure 6)
    learning_rates.png   kurtosis and loss against the learning rate, if the targets differ in it
    bits.png             loss against bits of weights and of activations, with --sweep (Figure 4)

The numbers are those of the paper's figures.
"""

from dataclasses import dataclass
from pathlib import Path

import torch

from eval import attention_sinks, loud_window, strongest_sink
from nanoosp.files import read_log, require

require("matplotlib", "drawing figures").use("Agg")  # write files, open no window
import matplotlib.pyplot as plt  # noqa: E402 (it needs the line above)
from matplotlib.colors import LogNorm  # noqa: E402

# Every configuration has the same colour, line and marker in all figures. Lines and markers tell
# them apart in black and white.
STYLES = {
    "Adam": ("#d55e00", "-", "o"),
    "Muon-only": ("#e69f00", "--", "s"),
    "Muon": ("#cc79a7", "-.", "^"),
    "Muon + SSNorm": ("#56b4e9", ":", "D"),
    "Muon + EmbProj": ("#009e73", "--", "v"),
    "OSP": ("#0072b2", "-", "*"),
}
OTHERS = [("#444444", line, marker)
          for line, marker in zip(["-", "--", "-.", ":", "-", "--"], "PXhd<>")]


@dataclass
class Picture:
    """What the figures need of one model."""

    name: str
    label: str
    options: dict  # how it was trained
    row: dict  # what was measured
    log: list[dict]
    state: int  # of the residual stream, the one with the highest kurtosis
    activations: torch.Tensor  # [T, D], |x| over its median, of one validation window at that state
    head: tuple[int, int]  # (layer, head) with the strongest sink
    share: float  # of its attention, on the first token
    logits: dict  # of that head: `counts` [2][bins], on the first token and on others; `bins`

    @classmethod
    def of(cls, loaded, row: dict, dataset) -> "Picture":
        """Measure what is drawn but not in `row`, which is tools.evaluate.measure's."""
        run = loaded.path if loaded.path.is_dir() else loaded.path.parent
        by_layer = row["kurtosis_per_layer"]
        state = by_layer.index(max(by_layer))
        layer, head = strongest_sink(row["sinks"])
        return cls(
            name=loaded.name, label=loaded.label, options=loaded.options, row=row,
            log=read_log(run / "log.jsonl"),
            state=state, activations=loud_window(loaded.model, dataset, state),
            head=(layer, head), share=row["sinks"]["share"][layer][head],
            logits=attention_sinks(loaded.model, dataset, histogram=(layer, head)),
        )


def style(label: str):
    return STYLES.get(label) or OTHERS[sum(map(ord, label)) % len(OTHERS)]


def panels(n: int, width=4.2, height=3.2):
    """A figure with n panels, at most three in a row, and the list of its axes."""
    columns = min(n, 3)
    rows = -(-n // columns)
    if columns == 3:  # they fill the width of a README, with letters that can be read there
        width, height = 3.3, 2.7
    size = (width * columns, height * rows)
    figure, axes = plt.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")
    for spare in axes.flat[n:]:
        spare.set_axis_off()
    return figure, list(axes.flat[:n])


def kurtosis_axis(axis, floor: float):
    """Linear near zero, logarithmic above 1; with the Gaussian floor drawn."""
    axis.set_yscale("symlog", linthresh=1, linscale=0.6)
    axis.set_ylim(-1, max(3, 1.5 * axis.get_ylim()[1]))
    ticks = [t for t in (-1, 0, 1, 3, 10, 30, 100, 300, 1000, 3000) if t <= axis.get_ylim()[1]]
    axis.set_yticks(ticks, [str(t) for t in ticks])
    axis.minorticks_off()
    axis.axhline(floor, color="black", linewidth=0.8, linestyle=(0, (1, 2)),
                 label=f"Gaussian ({floor:.3f})")
    axis.set_ylabel("excess kurtosis")
    axis.grid(alpha=0.3)


def legend_above(figure, axis):
    """The axis's legend above all panels, where it hides no curve."""
    handles, labels = axis.get_legend_handles_labels()
    columns = len(labels) if len(labels) <= 4 else -(-len(labels) // 2)
    figure.legend(handles, labels, loc="outside upper center", ncols=columns, fontsize=9,
                  frameon=False)


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


def draw_activations(shown: list[tuple[str, int, torch.Tensor]]):
    """`shown`: (label, state of the residual stream, |activation| / median there [T, D])."""
    figure, axes = panels(len(shown))
    top = max(values.max().item() for _, _, values in shown)
    colors = plt.get_cmap("inferno", 12)  # few colours make small files
    for axis, (label, state, values) in zip(axes, shown):
        image = axis.imshow(values.clamp(min=1).numpy(), norm=LogNorm(1, top), cmap=colors,
                            aspect="auto", interpolation="nearest")
        where = f"{label}: {state_name(state)}"
        axis.set_title(f"{where}\nmaximum {values.max():.0f} x median", fontsize=10)
        axis.set_xlabel("channel")
        axis.set_ylabel("token")
    ticks = [t for t in (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000) if t <= top]
    bar = figure.colorbar(image, ax=axes, label="|activation| / median")
    bar.set_ticks(ticks, labels=[str(t) for t in ticks])
    bar.minorticks_off()
    return figure


def draw_curves(series: list[tuple[str, list[dict]]], floor: float, highest_loss=None):
    """`series`: (label, records of log.jsonl), one a run."""
    figure, (left, right) = panels(2, 5.2, 3.6)
    named = set()
    for label, log in series:
        color, line, _ = style(label)
        points = [r for r in log if "val_loss" in r]
        millions = [r["tokens"] / 1e6 for r in points]
        kwargs = dict(color=color, linestyle=line, linewidth=1.5)
        kwargs["label"] = None if label in named else label
        losses = [r["val_loss"] for r in points]
        left.plot(millions[1:], losses[1:], **kwargs)  # an untrained model's loss is ln V: too high
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


def draw_layers(series: list[tuple[str, list[float]]], floor: float):
    """`series`: (label, kurtosis of every state of the residual stream), one a model."""
    figure, (axis,) = panels(1, 6.4, 3.8)
    named = set()
    for label, values in series:
        color, line, marker = style(label)
        axis.plot(range(len(values)), values, color=color, linestyle=line, marker=marker,
                  markersize=5, label=None if label in named else label)
        named.add(label)
    axis.set_xticks(range(len(values)), ["embedding", *range(1, len(values))])
    axis.set_xlabel("residual stream after the embedding, after block 1, 2, ...")
    kurtosis_axis(axis, floor)
    axis.legend(fontsize=8)
    return figure


def draw_sinks(shown: list[tuple[str, tuple[int, int], float, dict]]):
    """`shown`: (label, (layer, head), its share of attention on the first token, its logits)."""
    figure, axes = panels(len(shown))
    for axis, (label, (layer, head), share, logits) in zip(axes, shown):
        edges = logits["bins"]
        centers = [(left + right) / 2 for left, right in zip(edges, edges[1:])]
        first, others = logits["counts"]
        for counts, color, line, name in ((first, "black", "--", "first token"),
                                          (others, style(label)[0], "-", "other tokens")):
            area = max(sum(counts), 1) * (edges[1] - edges[0])
            axis.plot(centers, [count / area for count in counts], color=color, linestyle=line,
                      label=name)
        where = f"{label}: block {layer + 1}, head {head + 1}"
        axis.set_title(f"{where}\n{share:.0%} of attention on the first token", fontsize=10)
        axis.set_xlabel("logit q.k / sqrt(d)")
        axis.set_ylabel("density")
        axis.set_xlim(-12, 12)
        axis.set_ylim(top=1.4 * axis.get_ylim()[1])  # room for the legend
        axis.legend(fontsize=8)
    return figure


def draw_points(axes, points: dict[str, list[tuple]]):
    """`points`: for each label (x, a value for each of the axes) of its runs.

    A line joins the means over runs with the same x.
    """
    for label, group in points.items():
        color, line, marker = style(label)
        for column, axis in enumerate(axes, start=1):
            means = {}
            for point in sorted(group):
                means.setdefault(point[0], []).append(point[column])
            axis.plot(list(means), [sum(v) / len(v) for v in means.values()], color=color,
                      linestyle=line, label=label)
            axis.scatter([p[0] for p in group], [p[column] for p in group], color=color,
                         marker=marker, s=18)
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


def swept(quantized: dict, place: int) -> dict[int, dict]:
    """The results of "W-A-KV" settings by W (place 0) or A (place 1), the other two at 16 bits."""
    found = {}
    for setting, results in quantized.items():
        bits = setting.split("-")
        own = int(bits.pop(place))
        if bits == ["16", "16"]:
            found[own] = results
    return found


def draw_bits(series: list[tuple[str, dict]]):
    """`series`: (label, the "quantized" of eval.py --sweep). Thick lines are the first method."""
    figure, axes = panels(2, 5.2, 3.6)
    axes[1].sharey(axes[0])
    for place, (axis, name) in enumerate(zip(axes, ("weights", "activations"))):
        for label, quantized in series:
            color, line, marker = style(label)
            results = swept(quantized, place)
            for i, method in enumerate(next(iter(results.values()))):
                losses = [result[method]["val_loss"] for result in results.values()]
                axis.plot(list(results), losses, color=color, linestyle=line, marker=marker,
                          markersize=5, linewidth=2 - i, alpha=1 - 0.4 * min(i, 1),
                          label=f"{label}, {method}")
        axis.set_xlabel(f"bits of {name}, the rest at 16")
        axis.set_xticks(sorted(results))
        axis.invert_xaxis()
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("validation loss (nats per token)")
    axes[1].legend(fontsize=8)
    return figure


def save(figure, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    # about as wide as a README, and under 200 kB
    figure.savefig(path, dpi=95 if len(figure.axes) > 3 else 110)
    plt.close(figure)
    return path


def draw_all(pictures: list[Picture], out: Path) -> list[Path]:
    """Write the figures that these models allow. Returns their paths."""
    floor = pictures[0].row["kurtosis_floor"]
    first_of = {}
    for p in pictures:
        first_of.setdefault(p.label, p)
    shown = list(first_of.values())[:6]  # one model of each configuration
    figures = {
        "activations": draw_activations([(p.label, p.state, p.activations) for p in shown]),
        "layers": draw_layers([(p.label, p.row["kurtosis_per_layer"]) for p in pictures], floor),
        "sinks": draw_sinks([(p.label, p.head, p.share, p.logits) for p in shown]),
    }
    series = [(p.label, p.log) for p in pictures if any("val_loss" in r for r in p.log)]
    if series:
        figures["curves"] = draw_curves(series, floor)
    points = {}
    for p in pictures:
        if "lr" in p.options:  # a model from elsewhere does not say
            point = p.options["lr"], p.row["kurtosis"], p.row["val_loss"]
            points.setdefault(p.label, []).append(point)
    if any(len({rate for rate, _, _ in group}) > 1 for group in points.values()):
        figures["learning_rates"] = draw_learning_rates(points, floor)
    sweeps = [(p.label, p.row["quantized"]) for p in pictures
              if all(len(swept(p.row.get("quantized", {}), place)) > 1 for place in (0, 1))]
    if sweeps:
        figures["bits"] = draw_bits(sweeps)
    return [save(figure, out / f"{name}.png") for name, figure in figures.items()]
