"""Figures that only results/ draws, beside those of tools/plot.py."""

from statistics import mean

from tools.plot import LINES, METHOD_NAMES, WIDTH, draw_means, draw_points, kurtosis_axis
from tools.plot import label_ends, legend_above, letter, panels, plt, style

ADDED_TICKS = (0.02, 0.03, 0.05, 0.07, 0.1, 0.2, 0.3)  # of loss added at four bits
COLORS = ("#009e73", "#d55e00", "#0072b2", "#cc79a7", "#999999", "#000000")
BY_MUON, BY_ADAMW, PLAIN = "#cfe3f2", "#f8d9c4", "#eeeeee"  # what trains a part, in draw_method()


def draw_method():
    """The model that OSP trains, and below it the plain LLaMA that fold() leaves."""
    figure, axis = plt.subplots(figsize=(WIDTH, 3.7), layout="constrained")
    axis.set(xlim=(-0.5, 100.5), ylim=(-0.5, 43))
    axis.set_axis_off()

    def box(left, right, y, text, color):
        axis.add_patch(plt.Rectangle((left, y - 2.6), right - left, 5.2, facecolor=color,
                                     edgecolor="black", zorder=2))
        axis.text((left + right) / 2, y, text, ha="center", va="center", fontsize=9.5)

    def arrow(start, end, color="black"):
        look = dict(arrowstyle="->", shrinkA=0, shrinkB=0, color=color)
        axis.annotate("", end, start, arrowprops=look)

    def model(y, norm, gains, of_norm, of_block, ends):
        """The residual stream is a line at height y. `ends`: boxes (left, right, text, color)."""
        axis.plot((5, 95), (y, y), color="black", linewidth=2, zorder=1)
        axis.add_patch(plt.Rectangle((25.3, y - 2.6), 46.2, 15.5, fill=False, edgecolor="gray",
                                     linestyle="--"))
        axis.text(26.7, y + 10, f"{norm}: {gains}", fontsize=9)
        axis.text(70.4, y + 10, "× N", ha="right")
        axis.text(28.2, y - 0.5, "residual stream", fontsize=9, va="top")
        for start, middle, end, name in ((29, 38, 48, "attention"), (53, 62, 68.5, "FFN")):
            out = start - 1.5  # where the branch leaves the stream, and where it comes back
            back = end + 1.1
            axis.plot((out, out, back), (y, y + 6, y + 6), color="black", linewidth=1, zorder=1)
            arrow((start - 1, y + 6), (start, y + 6))
            box(start, middle, y + 6, norm, of_norm)
            box(middle, end, y + 6, name, of_block)
            arrow((back, y + 6), (back, y + 1))
            axis.plot(back, y, "o", color="white", markeredgecolor="black", markersize=11)
            axis.plot(back, y, "+", color="black", markersize=8)
        for left, right, text, color in (*ends, (74, 83, norm, of_norm)):
            box(left, right, y, text, color)

    axis.text(0, 41, "In training:", fontweight="bold", va="center")
    for left, color, name in ((25.3, BY_MUON, "Muon"), (51, BY_ADAMW, "AdamW")):
        axis.add_patch(plt.Rectangle((left, 39.8), 3, 2.6, facecolor=color, edgecolor="black"))
        axis.text(left + 4, 41, f"trained by {name}", va="center")
    model(26, "SSNorm", "one gain for all channels", BY_MUON, BY_MUON,
          ((0, 11, "embedding", BY_ADAMW), (13, 22, "EmbProj", BY_MUON),
           (84.5, 92.5, "EmbProj", BY_MUON), (94.3, 100, "head", BY_ADAMW)))
    axis.text(25.3, 18.2, "After fold(), a plain LLaMA with the same logits:", fontweight="bold")
    model(2.5, "RMSNorm", "all its gains are equal", PLAIN, PLAIN,
          ((0, 22, "embedding × EmbProj", PLAIN), (84.5, 100, "EmbProj × head", PLAIN)))
    for left, right in ((5.5, 17.5), (88.5, 97)):
        arrow((left, 23), (left, 5.5), "gray")
        arrow((right, 23), (right, 5.5), "gray")
    return figure


def draw_knob(points: dict[str, list[tuple]], floor: float, name: str, ticks: tuple):
    """Kurtosis, loss and what 4 bits add, against what is called `name`.

    Args:
        points: for each label (x, kurtosis, validation loss, loss added at 4-4-4) of its runs.
        ticks: the values of x that the axes name.
    """
    figure, axes = panels(3)
    draw_points(axes, points)
    kurtosis, loss, added = axes
    kurtosis_axis(kurtosis, floor)
    added.set_yscale("log")
    added.set_yticks([tick for tick in ADDED_TICKS if tick <= added.get_ylim()[1]])
    added.yaxis.set_major_formatter("{x:g}")
    titles = "excess kurtosis", "validation loss (nats)", "loss added by 4-4-4"
    for i, (axis, title) in enumerate(zip(axes, titles)):
        axis.minorticks_off()
        axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axis.set_xlabel(name)
        letter(axis, i, title)
    legend_above(figure, kurtosis)
    return figure


def draw_pay_off(series: list[tuple[str, list[dict]]], added: dict, floor: float, with_loss: bool):
    """Kurtosis and what 4-4-4 adds, and before them the loss if `with_loss`, against tokens.

    Args:
        series: (label, records of log.jsonl), one a run.
        added: for each (label, method) its (million tokens, loss added on code).
        floor: the kurtosis of Gaussian vectors of this width.
    """
    figure, axes = panels(3 if with_loss else 2)
    *before, kurtosis, cost = axes
    for label, log in series:
        look = dict(color=style(label)[0], label=label)
        points = [(r["tokens"] / 1e6, r) for r in log if "val_loss" in r]
        for loss in before:
            # without the first: an untrained model's loss is too high
            draw_means(loss, [(x, r["val_loss"]) for x, r in points[1:]], **look)
        draw_means(kurtosis, [(x, r["kurtosis"]) for x, r in points], **look)
    lines = dict(zip(dict.fromkeys(method for _, method in added), LINES))
    for (label, method), points in added.items():
        look = dict(color=style(label)[0], linestyle=lines[method], label=label)
        cost.plot(*zip(*points), marker=".", **look)
    cost.legend([plt.Line2D([], [], color="black", linestyle=line) for line in lines.values()],
                [METHOD_NAMES[method] for method in lines], loc="upper left", frameon=False)
    cost.set_ylim(bottom=0)
    kurtosis_axis(kurtosis, floor)
    titles = "validation loss (nats)", "excess kurtosis", "loss added by 4 bits (code)"
    for i, (axis, title) in enumerate(zip(axes, titles[-len(axes):])):
        axis.set_xlabel("training tokens (millions)")
        axis.set_xlim(left=0, right=1.01 * axis.dataLim.x1)
        axis.grid(alpha=0.3)
        letter(axis, i, title)
        label_ends(axis)
    return figure


def draw_traces(traces: dict[str, list[list[dict]]], titles: dict[str, str]):
    """A panel with a logarithmic axis for each key of `titles`, against steps.

    `traces`: for each name the records of its runs. Of a value that is a list, with one number a
    block, the largest is drawn.
    """
    figure, axes = panels(len(titles))
    for i, (axis, (key, title)) in enumerate(zip(axes, titles.items())):
        for j, (name, runs) in enumerate(traces.items()):
            points = [(r["step"], max(r[key]) if isinstance(r[key], list) else r[key])
                      for run in runs for r in run]
            draw_means(axis, points, color=COLORS[j], linestyle=LINES[j % len(LINES)], label=name)
        letter(axis, i, title)
        axis.set_xlabel("step")
        axis.grid(alpha=0.3)
        axis.set_yscale("log")
    legend_above(figure, axes[0])
    return figure


def draw_depth(runs: list[dict], logs: dict[str, list[dict]], floor: float):
    """Kurtosis by depth and by step, and what 4 bits add by depth.

    Args:
        runs: records of depth/runs.jsonl, of one text.
        logs: the evaluations of each run, by its name.
    """
    figure, axes = panels(3)
    by_depth, by_step, cost = axes

    def look(label, lr, line="-"):
        name = f"{label}, {lr:g}" if label == "Adam" else label
        return dict(color=style(label)[0], linestyle=line, label=name)

    def of(label, lr):
        return [r for r in runs if (r["label"], r["lr"]) == (label, lr)]

    for label, lr, line in (("Adam", 0.001, "--"), ("Adam", 0.002, "-"), ("Muon", 0.004, "-"),
                            ("OSP", 0.004, "-")):
        points = [(r["n_layer"], r["kurtosis"]) for r in of(label, lr)]
        draw_means(by_depth, points, marker=".", **look(label, lr, line))
    for label, lr, line in (("Adam", 0.0007, ":"), ("Adam", 0.001, "--"), ("Adam", 0.0014, "-."),
                            ("Adam", 0.002, "-"), ("OSP", 0.004, "-")):
        points = [(point["step"], point["kurtosis"]) for r in of(label, lr)
                  if r["n_layer"] == 16 and "eval" in r for point in logs[r["name"]]]
        draw_means(by_step, points, **look(label, lr, line))
    for label in ("Adam", "Muon", "OSP"):
        points = []
        for n_layer in sorted({r["n_layer"] for r in runs}):
            rates = {}
            for r in runs:
                if (r["label"], r["n_layer"]) == (label, n_layer):
                    rates.setdefault(r["lr"], []).append(r)
            best = min(rates.values(), default=[], key=lambda group: mean(r["val_loss"] for r in group))
            points += [(n_layer, r["added"]["rtn"]) for r in best]
        draw_means(cost, points, color=style(label)[0], marker=".", label=label)
    cost.set_ylim(bottom=0)
    titles = "excess kurtosis", "while 16 blocks train", "loss added by 4-4-4"
    for i, (axis, title) in enumerate(zip(axes, titles)):
        letter(axis, i, title)
        axis.grid(alpha=0.3)
        axis.set_xlabel("steps" if axis is by_step else "blocks (12 million parameters)")
        if axis is not by_step:
            axis.set_xscale("log")
            axis.minorticks_off()
            axis.set_xticks([4, 8, 16, 32], ["4", "8", "16", "32"])
    for axis in (by_depth, by_step):
        kurtosis_axis(axis, floor)
    for axis in axes:
        label_ends(axis)
    return figure
