"""Figures that only results/ draws, beside those of tools/plot.py."""

from tools.plot import draw_points, kurtosis_axis, legend_above, letter, panels, plt, style

ADDED_TICKS = (0.02, 0.03, 0.05, 0.1, 0.2, 0.3)  # of loss added at four bits
COLORS, LINES = plt.get_cmap("Dark2"), ("-", "--", "-.", ":")


def draw_knob(by_rate: dict, by_length: dict, floor: float, highest_loss: float):
    """Two rows of panels, against the learning rate and against the number of steps.

    Both: for each label (x, kurtosis, validation loss, loss added at 4-4-4) of its runs.
    """
    figure, axes = panels(6)
    rows = (axes[:3], by_rate, "peak learning rate"), (axes[3:], by_length, "steps")
    for (kurtosis, loss, added), points, name in rows:
        draw_points((kurtosis, loss, added), points)
        kurtosis_axis(kurtosis, floor)
        loss.set_ylabel("validation loss (nats)")
        loss.set_ylim(top=min(highest_loss, loss.get_ylim()[1]))
        added.set_ylabel("loss added at 4-4-4 bits")
        added.set_yscale("log")
        added.set_yticks([tick for tick in ADDED_TICKS if tick <= added.get_ylim()[1]])
        added.yaxis.set_major_formatter("{x:g}")
        for axis in (kurtosis, loss, added):
            axis.set_xlabel(name)
            axis.minorticks_off()
    steps = sorted({point[0] for group in by_length.values() for point in group})
    for axis in axes[3:]:
        axis.set_xticks(steps, [str(n) for n in steps])
    legend_above(figure, axes[0])
    return figure


def draw_pay_off(series: list[tuple[str, list[dict]]], added: dict, floor: float):
    """Loss, kurtosis and what 4-4-4 adds, against training tokens.

    Args:
        series: (label, records of log.jsonl), one a run.
        added: for each (label, method) its (million tokens, loss added on code). The first
            method's line is solid, the second's dashed.
        floor: the kurtosis of Gaussian vectors of this width.
    """
    figure, axes = panels(3)
    loss, kurtosis, cost = axes
    for label, log in series:
        points = [r for r in log if "val_loss" in r]
        millions = [r["tokens"] / 1e6 for r in points]
        look = dict(color=style(label)[0], label=label)
        loss.plot(millions[1:], [r["val_loss"] for r in points[1:]], **look)  # not the untrained
        kurtosis.plot(millions, [r["kurtosis"] for r in points], **look)
    methods = list(dict.fromkeys(method for _, method in added))
    for (label, method), points in added.items():
        cost.plot(*zip(*points), color=style(label)[0], marker=".",
                  linestyle=LINES[methods.index(method)])
    for method, line in zip(methods, LINES):
        cost.plot([], [], color="black", linestyle=line, label=method)
    cost.legend(fontsize=8)
    cost.set_ylim(0, 1.4 * cost.get_ylim()[1])  # room for the legend
    kurtosis_axis(kurtosis, floor)
    titles = "validation loss (nats)", "excess kurtosis", "loss added by 4-4-4 (code)"
    for i, (axis, title) in enumerate(zip(axes, titles)):
        axis.set_xlabel("training tokens (millions)")
        axis.set_xlim(left=0)
        axis.grid(alpha=0.3)
        letter(axis, i, title)
    legend_above(figure, loss)
    return figure


def draw_traces(traces: dict[str, list[list[dict]]], titles: dict[str, str], log=()):
    """A panel for each key of `titles`, against steps.

    Args:
        traces: for each name the records of its runs. Of a value that is a list, with one number a
            block, the largest is drawn.
        log: the keys whose axis is logarithmic.
    """
    figure, axes = panels(len(titles))
    for i, (name, runs) in enumerate(traces.items()):
        for j, records in enumerate(runs):
            for axis, key in zip(axes, titles):
                values = [max(r[key]) if isinstance(r[key], list) else r[key] for r in records]
                axis.plot([r["step"] for r in records], values, color=COLORS(i % 8),
                          linestyle=LINES[i // 3 % 4], linewidth=1.2, label=None if j else name)
    for axis, (key, title) in zip(axes, titles.items()):
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("step")
        axis.grid(alpha=0.3)
        if key in log:
            axis.set_yscale("log")
    axes[-1].legend(fontsize=7)
    return figure
