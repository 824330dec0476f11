"""Figures of what eval.py measures: python eval.py TARGET... --plot DIR

Needs matplotlib (requirements-extra.txt).

    grid.png             the loudest token's channels, and the 16 values that 4 bits leave for them
    activations.png      |activation| over tokens x channels, where it stands out most (Figure 2)
    curves.png           loss and kurtosis against training tokens, from the logs (Figures 3 and 7)
    layers.png           kurtosis of every state of the residual stream
    sinks.png            q.k logits on the first token and elsewhere, in the head that looks at the
                         first token most (Figure 6)
    learning_rates.png   kurtosis and loss against the learning rate, if one of the configurations has
                         three rates
    bits.png             loss against bits of weights and of activations, with --sweep (Figure 4)

The numbers are those of the paper's figures. grid.png and activations.png show all models in the same
state of the residual stream, the one in which some model has the highest kurtosis.
"""

from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import torch

from eval import attention_logits, inside_and_outside, sites
from model import hooked
from nanoosp.files import read_log, require
from quantize import Int
from tools.report import state_name, strongest_sink

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
    "Adam, hot": ("#7f3800", "--", "P"),
}
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
    logits: dict  # of the head with the strongest sink, from logits_of_head()

    @classmethod
    def of(cls, loaded, row: dict, dataset) -> "Picture":
        """Measure what is drawn but not in `row`, which is tools.evaluate.measure's."""
        run = loaded.path if loaded.path.is_dir() else loaded.path.parent
        logits = logits_of_head(loaded.model, dataset, *strongest_sink(row["sinks"]))
        return cls(row["label"], loaded.options, row, read_log(run / "log.jsonl"),
                   states_of_a_window(loaded.model, dataset), logits)


@torch.no_grad()
def states_of_a_window(model, data, n_tokens: int = 256) -> torch.Tensor:
    """The residual stream of one window, [L + 1, T, D], at most n_tokens long."""
    window = torch.from_numpy(data.windows(data.evaluation_windows(1)))[:, :-1][:, :n_tokens]
    seen = []
    hook = lambda module, inputs, x: seen.append(x[0].float().cpu())
    with hooked([(module, hook) for module in sites(model)["residual stream"]]):
        model(window.to(model.embed.weight.device))
    return torch.stack(seen)


@torch.no_grad()
def logits_of_head(model, data, layer: int, head: int, n_windows: int = 32) -> dict:
    """`counts` [2][bins] of one head's logits, on the first token and on all others, and the edges
    of the `bins`."""
    edges = torch.linspace(-20, 20, 161)
    counts = torch.zeros(2, len(edges) - 1)
    for window in torch.from_numpy(data.windows(data.evaluation_windows(n_windows))).split(1):
        tokens = window[:, :-1].to(model.embed.weight.device)
        logits = next(islice(attention_logits(model, tokens), layer, None))  # [1, H, T, T]
        for row, values in zip(counts, inside_and_outside(logits)):
            row += torch.histc(values[:, head], len(row), -20, 20).cpu()
    return dict(counts=counts.tolist(), bins=edges.tolist())


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


def unless_named(axis, label: str) -> str | None:
    """The label of a curve, of which a legend is to have one only."""
    return None if label in axis.get_legend_handles_labels()[1] else label


def legend_above(figure, axis):
    """The axis's legend above all panels, where it hides no curve."""
    handles, labels = axis.get_legend_handles_labels()
    columns = len(labels) if len(labels) <= 4 else -(-len(labels) // 2)
    figure.legend(handles, labels, loc="outside upper center", ncols=columns, fontsize=9,
                  frameon=False)


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
    height = 2.1 if len(shown) < 4 else 1.4
    figure, axes = plt.subplots(len(shown), 1, figsize=(7.4, height * len(shown)), sharex=True,
                                squeeze=False, layout="constrained")
    widest = max(x.abs().max().item() for _, x in shown)
    for i, (axis, (label, x)) in enumerate(zip(axes[:, 0], shown)):
        low, high = min(x.min().item(), 0), max(x.max().item(), 0)
        step = (high - low) / 15
        values = step * (torch.arange(16) - round(-low / step))  # those of Int.round()
        fullest = Int(4).round(x).unique(return_counts=True)[1].sort(descending=True).values
        color = style(label)[0]
        axis.hist(x.numpy(), bins=torch.linspace(-widest, widest, 121).tolist(), color=color)
        top = axis.get_ylim()[1]
        axis.set_ylim(-0.28 * top, 1.05 * top)
        axis.axhline(0, color="black", linewidth=0.8)
        axis.vlines(values, -0.22 * top, -0.04 * top, color="black", linewidth=1.6)
        axis.set_yticks([])
        last = i == len(shown) - 1
        axis.tick_params(bottom=last)
        axis.spines[["left", "right", "top", *([] if last else ["bottom"])]].set_visible(False)
        share = fullest[:2].sum().item() / len(x)
        letter(axis, i, f"{label}: {share:.0%} of the channels become one of two values")
    axes[-1, 0].set_xlabel(f"a channel of the loudest token ({state_name(state)}), in units of its root "
                           "mean square;\nblack: the 16 values of 4 bits")
    return figure


def draw_activations(pictures: list[Picture], state: int):
    """|activation| / median of all tokens and channels at this state of the residual stream."""
    figure, axes = panels(len(pictures))
    shown = [p.states[state].abs() / p.states[state].abs().median() for p in pictures]  # [T, D]
    top = max(values.max().item() for values in shown)
    colors = plt.get_cmap("inferno", 12)  # few colours make small files
    for i, (axis, p, values) in enumerate(zip(axes, pictures, shown)):
        image = axis.imshow(values.clamp(min=1).numpy(), norm=LogNorm(1, top), cmap=colors,
                            aspect="auto", interpolation="nearest")
        letter(axis, i, f"{p.label}: up to {values.max():.0f} medians")
        axis.set_xlabel("channel")
        axis.set_ylabel("token")
    ticks = [t for t in (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000) if t <= top]
    bar = figure.colorbar(image, ax=axes, label="|activation| / median")
    bar.set_ticks(ticks, labels=[str(t) for t in ticks])
    bar.minorticks_off()
    figure.suptitle(f"residual stream, {state_name(state)}", fontsize=10)
    return figure


def draw_curves(series: list[tuple[str, list[dict]]], floor: float, highest_loss=None):
    """`series`: (label, records of log.jsonl), one a run."""
    figure, (left, right) = panels(2, 5.2, 3.6)
    for label, log in series:
        color, line, _ = style(label)
        points = [r for r in log if "val_loss" in r]
        millions = [r["tokens"] / 1e6 for r in points]
        kwargs = dict(color=color, linestyle=line, linewidth=1.5, label=unless_named(right, label))
        losses = [r["val_loss"] for r in points]
        left.plot(millions[1:], losses[1:], **kwargs)  # an untrained model's loss is ln V: too high
        right.plot(millions, [r["kurtosis"] for r in points], **kwargs)
    left.set_ylabel("validation loss (nats per token)")
    left.set_ylim(top=highest_loss)
    left.grid(alpha=0.3)
    kurtosis_axis(right, floor)
    for i, (axis, title) in enumerate(((left, "loss"), (right, "outliers"))):
        axis.set_xlabel("training tokens (millions)")
        letter(axis, i, title)
    legend_above(figure, right)
    return figure


def draw_layers(pictures: list[Picture], floor: float):
    """The kurtosis of every state of the residual stream."""
    figure, (axis,) = panels(1, 6.4, 3.8)
    for p in pictures:
        color, line, marker = style(p.label)
        values = p.row["kurtosis_per_layer"]
        axis.plot(range(len(values)), values, color=color, linestyle=line, marker=marker,
                  markersize=5, label=unless_named(axis, p.label))
    axis.set_xticks(range(len(values)), ["embedding", *range(1, len(values))])
    axis.set_xlabel("residual stream after the embedding, after block 1, 2, ...")
    kurtosis_axis(axis, floor)
    axis.legend(fontsize=8)
    return figure


def draw_sinks(pictures: list[Picture]):
    """The logits of each model's strongest sink."""
    figure, axes = panels(len(pictures))
    for i, (axis, p) in enumerate(zip(axes, pictures)):
        layer, head = strongest_sink(p.row["sinks"])
        share = p.row["sinks"]["share"][layer][head]
        edges = p.logits["bins"]
        centers = [(left + right) / 2 for left, right in zip(edges, edges[1:])]
        first, others = p.logits["counts"]
        for counts, color, line, name in ((first, "black", "--", "first token"),
                                          (others, style(p.label)[0], "-", "other tokens")):
            area = max(sum(counts), 1) * (edges[1] - edges[0])
            axis.plot(centers, [count / area for count in counts], color=color, linestyle=line,
                      label=name)
        letter(axis, i, f"{p.label}: block {layer + 1}, head {head + 1}\n"
                        f"{share:.0%} of attention on the first token")
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
    for i, (axis, title) in enumerate(((left, "outliers"), (right, "loss"))):
        axis.set_xlabel("peak learning rate")
        letter(axis, i, title)
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
        letter(axis, place, name)
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
        "sinks": draw_sinks(shown),
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
