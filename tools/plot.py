"""Figures of what eval.py measures: python eval.py TARGET... --plot DIR

Needs matplotlib (requirements-extra.txt).

    grid.png             the loudest token's channels, and the 16 values that 4 bits leave for them
    activations.png      mean |activation| of each channel, the largest first (compare Figure 2)
    curves.png           loss and kurtosis against training tokens, from the logs (Figures 3 and 7)
    layers.png           kurtosis of every state of the residual stream
    learning_rates.png   kurtosis and loss against the learning rate, if one of the configurations has
                         three rates
    bits.png             loss against bits of weights and of activations, with --sweep (Figure 4)

The numbers are those of the paper's figures. A line is the mean over seeds, and the band around it
reaches from the lowest to the highest. grid.png and activations.png show all models in the same
state of the residual stream, the one in which some model has the highest kurtosis.
"""

from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from statistics import mean

import torch

from eval import sites
from model import hooked
from nanoosp.files import read_log, require
from quantize import Int
from tools.report import state_name

require("matplotlib", "drawing figures").use("Agg")  # write files, open no window
import matplotlib.pyplot as plt  # noqa: E402 (it needs the line above)
from matplotlib.colors import to_rgb  # noqa: E402

plt.rcParams["font.size"] = 10
WIDTH = 8.3  # inches: a README shows a figure 830 pixels wide, and 10 points are then 14 pixels
OUTLIER = 5  # times the token's root mean square: one in two million of a Gaussian's values

# Every configuration has the same colour, line and marker in all figures. Lines and markers tell
# them apart in black and white.
STYLES = {
    "Adam": ("#d55e00", "-", "o"),
    "Muon-only": ("#e69f00", "--", "s"),
    "Muon": ("#cc79a7", "-.", "^"),
    "Muon + SSNorm": ("#56b4e9", ":", "D"),
    "Muon + EmbProj": ("#009e73", "--", "v"),
    "OSP": ("#0072b2", "-", "*"),
    "Adam, hot": ("#7f3800", "--", "P"),
}
LINES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)))
METHOD_NAMES = {"rtn": "rounded", "had": "Hadamard", "gptq": "GPTQ", "quarot": "QuaRot",
                "spinquant": "SpinQuant"}
OTHERS = [("#444444", line, marker)
          for line, marker in zip(["-", "--", "-.", ":", "-", "--"], "PXhd<>")]


@dataclass
class Picture:
    """What the figures need of one model."""

    label: str
    options: dict  # how it was trained
    row: dict  # what was measured
    log: list[dict]
    states: torch.Tensor  # [L + 1, T, D], the residual stream of one validation window

    @classmethod
    def of(cls, loaded, row: dict, dataset) -> "Picture":
        """Measure what is drawn but not in `row`, which is tools.evaluate.measure's."""
        run = loaded.path if loaded.path.is_dir() else loaded.path.parent
        return cls(row["label"], loaded.options, row, read_log(run / "log.jsonl"),
                   states_of_a_window(loaded.model, dataset))


@torch.no_grad()
def states_of_a_window(model, data, n_tokens: int = 256) -> torch.Tensor:
    """The residual stream of one window, [L + 1, T, D], at most n_tokens long."""
    window = torch.from_numpy(data.windows(data.evaluation_windows(1)))[:, :-1][:, :n_tokens]
    seen = []
    hook = lambda module, inputs, x: seen.append(x[0].float().cpu())
    with hooked([(module, hook) for module in sites(model)["residual stream"]]):
        model(window.to(model.embed.weight.device))
    return torch.stack(seen)


def style(label: str):
    """(color, line, marker). "Adam, 0.002" has Adam's color, with a line and a marker of its own."""
    color, line, marker = OTHERS[sum(map(ord, label)) % len(OTHERS)]
    base = STYLES.get(label.split(",")[0])
    return STYLES.get(label) or (base[0] if base else color, line, marker)


def worst_state(pictures: list[Picture]) -> int:
    """The state of the residual stream in which one of the models has the highest kurtosis."""
    by_layer = [max(values) for values in zip(*(p.row["kurtosis_per_layer"] for p in pictures))]
    return by_layer.index(max(by_layer))


def letter(axis, i: int, title: str = ""):
    """A title above a panel, with the panel's letter."""
    axis.set_title(f"({'abcdefghijkl'[i]}) {title}".rstrip(), fontsize=10, loc="left")


def panels(n: int):
    """A figure as wide as a README, and its n axes, at most three in a row."""
    columns = min(n, 3)
    rows = -(-n // columns)
    size = (WIDTH, rows * {1: 3.8, 2: 3.3, 3: 2.9}[columns])
    figure, axes = plt.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")
    for spare in axes.flat[n:]:
        spare.set_axis_off()
    return figure, list(axes.flat[:n])


def draw_means(axis, points: list[tuple[float, float]], **look):
    """A line through the mean at each x, and a band from the lowest to the highest value there."""
    values = {}
    for x, y in sorted(points):
        values.setdefault(x, []).append(y)
    (line,) = axis.plot(list(values), [mean(ys) for ys in values.values()], **look)
    lowest, highest = ([edge(ys) for ys in values.values()] for edge in (min, max))
    axis.fill_between(list(values), lowest, highest, color=line.get_color(), alpha=0.2, linewidth=0)


def label_ends(axis):
    """Write the name of each line right of its end, moved apart where two would overlap.

    To be called last, when the axis has its scale and limits.
    """
    axis.get_ylim()  # matplotlib settles the limits when it is asked for them
    named = [line for line in axis.get_lines()
             if len(line.get_xydata()) and not line.get_label().startswith("_")]
    ends = [line.get_transform().transform(line.get_xydata()[-1]) for line in named]  # in pixels
    heights = axis.transAxes.inverted().transform(ends)[:, 1].clip(0, 1)
    order = heights.argsort()
    inches = axis.get_position().height * axis.figure.get_figheight()
    gap = 0.2 / inches  # what a line of text needs
    for _ in range(100):
        for low, high in pairwise(order):
            lack = max(0, gap - (heights[high] - heights[low])) / 2
            heights[low] -= lack
            heights[high] += lack
    for line, height in zip(named, heights):
        darker = [0.7 * part for part in to_rgb(line.get_color())]
        axis.text(1.02, height, line.get_label(), color=darker, fontsize=9.5, va="center",
                  transform=axis.transAxes)


def kurtosis_axis(axis, floor: float):
    """Linear near zero, logarithmic above 1; with the Gaussian floor drawn."""
    axis.set_yscale("symlog", linthresh=1, linscale=0.6)
    axis.set_ylim(-1, max(3, 1.5 * axis.get_ylim()[1]))
    ticks = [t for t in (-1, 0, 1, 3, 10, 30, 100, 300, 1000, 3000) if t <= axis.get_ylim()[1]]
    axis.set_yticks(ticks, [str(t) for t in ticks])
    axis.minorticks_off()
    axis.axhline(floor, color="black", linewidth=0.8, linestyle=(0, (1, 2)),
                 label="Gaussian")
    axis.grid(alpha=0.3)


def legend_above(figure, axis):
    """The axis's legend above all panels, where it hides no curve."""
    handles, labels = axis.get_legend_handles_labels()
    columns = len(labels) if len(labels) <= 5 else -(-len(labels) // 2)
    figure.legend(handles, labels, loc="outside upper center", ncols=columns, frameon=False)


def loudest_token(x: torch.Tensor) -> torch.Tensor:
    """[T, D] -> [D]: the vector with the largest value, over its root mean square."""
    x = x[x.abs().amax(dim=1).argmax()]
    return x / x.square().mean().sqrt()


def draw_grid(shown: list[tuple[str, torch.Tensor]], state: int):
    """Why outliers cost bits: a token's channels, and below them the 16 values of 4 bits.

    Args:
        shown: label, and the loudest token's vector [D] in units of its root mean square.
        state: of the residual stream, where they were taken.
    """
    height = 2.0 if len(shown) < 4 else 1.5
    figure, axes = plt.subplots(len(shown), 1, figsize=(WIDTH, height * len(shown)), sharex=True,
                                squeeze=False, layout="constrained")
    widest = 1.05 * max(x.abs().max().item() for _, x in shown)
    lowest = min(x.min().item() for _, x in shown)
    for i, (axis, (label, x)) in enumerate(zip(axes[:, 0], shown)):
        low, high = min(x.min().item(), 0), max(x.max().item(), 0)
        step = (high - low) / 15
        values = step * (torch.arange(16) - round(-low / step))  # those of Int.round()
        bins = torch.linspace(-widest, widest, 121).tolist()
        axis.hist(x.numpy(), bins=bins, color=style(label)[0])
        top = axis.get_ylim()[1]
        axis.set_ylim(-0.28 * top, 1.05 * top)
        axis.axhline(0, color="black", linewidth=0.8)
        axis.vlines(values, -0.22 * top, -0.04 * top, color="black", linewidth=1.6)
        axis.text(lowest - 0.04 * widest, -0.13 * top, "4-bit grid", ha="right", va="center")
        outliers = x[x.abs() > OUTLIER].tolist()
        for value in outliers:
            axis.annotate("", (value, 0.05 * top), (value, 0.35 * top),
                          arrowprops=dict(arrowstyle="->"))
        if outliers:
            axis.text(mean(outliers), 0.38 * top, "outliers", ha="center", va="bottom")
        axis.set_yticks([])
        axis.set_xlim(-widest, widest)
        axis.xaxis.set_major_locator(plt.MaxNLocator(6, integer=True))
        last = i == len(shown) - 1
        axis.tick_params(bottom=last)
        axis.spines[["left", "right", "top", *([] if last else ["bottom"])]].set_visible(False)
        n = len(outliers)
        number = {2: "two", 3: "three", 4: "four"}.get(n, n)
        title = f"{number} outliers stretch the 16 values"
        title = {0: "no outliers, so the 16 values lie close",
                 1: "one outlier stretches the 16 values"}.get(n, title)
        letter(axis, i, f"{label}: {title}")
    axes[-1, 0].set_xlabel(f"the channels of one token ({state_name(state)}), "
                           "in units of their root mean square")
    return figure


def draw_activations(pictures: list[Picture], state: int):
    """How large each channel is on average over tokens; a level line has no outlier channels."""
    figure, (axis,) = panels(1)
    for p in pictures:
        channels = p.states[state].abs().mean(dim=0).sort(descending=True).values  # [D]
        color, line, _ = style(p.label)
        axis.plot(range(1, len(channels) + 1), (channels / channels.median()).tolist(), color=color,
                  linestyle=line, label=p.label)
    axis.set_xscale("log")
    axis.set_yscale("log")
    low, high = axis.get_ylim()
    axis.set_yticks([t for t in (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 200) if low < t < high])
    for side in (axis.xaxis, axis.yaxis):
        side.set_major_formatter("{x:g}")
    axis.minorticks_off()
    axis.grid(alpha=0.3)
    axis.set_xlabel(f"channels, the largest first ({state_name(state)})")
    axis.set_ylabel("mean |activation|,\nin units of the median channel's")
    axis.legend()
    return figure


def draw_curves(series: list[tuple[str, list[dict]]], floor: float, highest_loss=None):
    """`series`: (label, records of log.jsonl), one a run."""
    figure, (left, right) = panels(2)
    for label in dict.fromkeys(label for label, _ in series):
        color, line, _ = style(label)
        look = dict(color=color, linestyle=line, linewidth=1.5, label=label)
        runs = [[r for r in log if "val_loss" in r] for name, log in series if name == label]
        # without the first: an untrained model's loss is ln V, too high
        points = [(r["tokens"] / 1e6, r["val_loss"]) for run in runs for r in run[1:]]
        draw_means(left, points, **look)
        draw_means(right, [(r["tokens"] / 1e6, r["kurtosis"]) for run in runs for r in run], **look)
    left.set_ylim(top=highest_loss)
    left.grid(alpha=0.3)
    kurtosis_axis(right, floor)
    titles = "validation loss (nats)", "excess kurtosis"
    for i, (axis, title) in enumerate(zip((left, right), titles)):
        axis.set_xlabel("training tokens (millions)")
        axis.set_xlim(left=0, right=axis.dataLim.x1)
        axis.xaxis.set_major_locator(plt.MaxNLocator("auto", integer=True))
        letter(axis, i, title)
    label_ends(right)
    return figure


def draw_layers(pictures: list[Picture], floor: float):
    """The kurtosis of every state of the residual stream."""
    figure, (axis,) = panels(1)
    names = set()
    for p in pictures:
        color, line, marker = style(p.label)
        values = p.row["kurtosis_per_layer"]
        axis.plot(range(len(values)), values, color=color, linestyle=line, marker=marker,
                  markersize=5, label=None if p.label in names else p.label)
        names.add(p.label)
    axis.set_xticks(range(len(values)), ["embedding", *range(1, len(values))])
    axis.set_xlabel("residual stream after the embedding, after block 1, 2, ...")
    axis.set_ylabel("excess kurtosis")
    kurtosis_axis(axis, floor)
    axis.legend(fontsize=9)
    return figure


def draw_points(axes, points: dict[str, list[tuple]]):
    """`points`: for each label (x, a value for each of the axes) of its runs."""
    for label, group in points.items():
        color, line, marker = style(label)
        for column, axis in enumerate(axes, start=1):
            draw_means(axis, [(point[0], point[column]) for point in group], color=color,
                       linestyle=line, marker=marker, markersize=5, label=label)
    for axis in axes:
        axis.set_xscale("log")
        axis.grid(alpha=0.3)


def draw_learning_rates(points: dict[str, list[tuple[float, float, float]]], floor: float):
    """`points`: for each label (learning rate, kurtosis, validation loss) of its runs."""
    figure, (left, right) = panels(2)
    draw_points((left, right), points)
    kurtosis_axis(left, floor)
    titles = "excess kurtosis", "validation loss (nats)"
    for i, (axis, title) in enumerate(zip((left, right), titles)):
        axis.set_xlabel("peak learning rate")
        letter(axis, i, title)
    legend_above(figure, left)
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
    """`series`: (label, the "quantized" of eval.py --sweep). A color a model, a line a method."""
    figure, axes = panels(2)
    axes[1].sharey(axes[0])
    for place, (axis, name) in enumerate(zip(axes, ("weights", "activations"))):
        for label, quantized in series:
            color, _, marker = style(label)
            results = swept(quantized, place)
            for line, method in zip(LINES, next(iter(results.values()))):
                losses = [result[method]["val_loss"] for result in results.values()]
                axis.plot(list(results), losses, color=color, linestyle=line, marker=marker,
                          markersize=5, label=f"{label}, {METHOD_NAMES[method]}")
        letter(axis, place, f"{name} at fewer bits")
        axis.set_xlabel(f"bits of {name}, the rest at 16")
        axis.set_xticks(sorted(results))
        axis.invert_xaxis()
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("validation loss (nats)")
    legend_above(figure, axes[0])
    return figure


def save(figure, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=200)  # twice a README's pixels, for sharp screens
    plt.close(figure)
    return path


def draw_all(pictures: list[Picture], out: Path) -> list[Path]:
    """Write the figures that these models allow. Returns their paths."""
    floor = pictures[0].row["kurtosis_floor"]
    rates = {}
    for p in pictures:
        rates.setdefault(p.label, set()).add(p.options.get("lr"))
    pictures = [replace(p, label=f"{p.label}, {p.options['lr']:g}") if len(rates[p.label]) > 1 else p
                for p in pictures]  # the same parts of OSP at several rates are several models
    first_of = {}
    for p in pictures:
        first_of.setdefault(p.label, p)
    shown = list(first_of.values())[:9]  # one model of each configuration
    state = worst_state(pictures)
    loudest = [(p.label, loudest_token(p.states[state])) for p in shown]
    figures = {
        "grid": draw_grid(loudest, state),
        "activations": draw_activations(shown, state),
        "layers": draw_layers(pictures, floor),
    }
    series = [(p.label, p.log) for p in pictures if any("val_loss" in r for r in p.log)]
    if series:
        figures["curves"] = draw_curves(series, floor)
    points = {}
    for p in pictures:
        if "lr" in p.options:  # a model from elsewhere does not say
            point = p.options["lr"], p.row["kurtosis"], p.row["val_loss"]
            points.setdefault(p.label.split(",")[0], []).append(point)
    if any(len({rate for rate, _, _ in group}) > 2 for group in points.values()):
        figures["learning_rates"] = draw_learning_rates(points, floor)
    sweeps = [(p.label, p.row["quantized"]) for p in pictures
              if all(len(swept(p.row.get("quantized", {}), place)) > 1 for place in (0, 1))]
    if sweeps:
        figures["bits"] = draw_bits(sweeps)
    return [save(figure, out / f"{name}.png") for name, figure in figures.items()]
