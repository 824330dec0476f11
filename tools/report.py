"""What the tools print. eval.py: a description of each target, then tables that compare all of them.
train.py --ablation: its table. train.py --bench: its measurements.

A row is what tools/evaluate.py measured of one target; eval.py --json prints the same rows.
"""

import statistics
from textwrap import indent

from nanoosp.summary import table

SINK = 0.3  # share of attention on the first token that makes a head a sink (Gu et al. 2025)
SETTINGS_PER_TABLE = 6  # more would not fit beside each other


def strongest_state(largest: list[dict]) -> int:
    """The state of the residual stream whose largest activation stands out most."""
    return max(range(len(largest)), key=lambda i: largest[i]["ratio"])


def strongest_sink(sinks: dict) -> tuple[int, int]:
    """(layer, head) of the largest share."""
    shares = sinks["share"]
    return max((share, i, j) for i, heads in enumerate(shares) for j, share in enumerate(heads))[1:]


def n_sinks(sinks: dict) -> int:
    return sum(share > SINK for heads in sinks["share"] for share in heads)


def percent(share: float) -> str:
    return f"{100 * share:.1f}"


def loss_and_added(result: dict) -> str:
    """Of a quantized model: "1.4021 (+0.0213)"."""
    return f"{result['val_loss']:.4f} ({result['added']:+.4f})"


# --------------------------------------------------------------------------------------------------
# One target


def describe(loaded, row: dict) -> str:
    """A measurement in words, then the kurtosis of every layer and site."""
    state = strongest_state(row["largest"])
    top, sinks = row["largest"][state], row["sinks"]
    place = "embedding output" if state == 0 else f"output of block {state}"
    token = loaded.spelled(top["token"])
    layer, head = strongest_sink(sinks)
    share, inside, outside = (sinks[key][layer][head] for key in ("share", "inside", "outside"))
    bits = f", {row['bits_per_byte']:.4f} bits per byte" if row["bits_per_byte"] else ""
    lines = [
        ("loss", f"{row['val_loss']:.4f} nats per token, perplexity {row['perplexity']:.6g}{bits}"),
        ("excess kurtosis", f"{row['kurtosis']:.3f} (Gaussian {row['kurtosis_floor']:.3f}), mean "
                            "over the residual stream"),
        ("stands out most", f"|x| = {top['value']:.1f}, {top['ratio']:.0f} times the median of its "
                            f"sequence: {place}, channel {top['channel']}, position "
                            f"{top['position']}, token {token}"),
        ("attention sinks", f"{n_sinks(sinks)} heads give the first token over "
                            f"{100 * SINK:.0f} % (even attention gives {sinks['uniform']:.1%});"),
        ("", f"most, {share:.1%}, block {layer + 1} head {head + 1}, with a mean logit of "
             f"{inside:.2f} on it and {outside:.2f} on others"),
        ("measured", f"{row['tokens']:,} tokens at {row['tokens_per_s']:,.0f} tokens/s, peak "
                     f"memory {row['peak_memory_gib']:.2f} GiB"),
    ]
    if "kurtosis_as_published" in row:
        published, floor = row["kurtosis_as_published"], row["kurtosis_as_published_floor"]
        lines.insert(2, ("... as published", f"{published:.3f} (Gaussian {floor:.3f}): single "
                         "tokens without context, uncentred, negatives cut off"))
    text = "\n".join(f"{name:<17}{words}" for name, words in lines)
    sites = site_table(row["sites"])
    return f"{loaded.name} ({loaded.label})\n" + indent(f"{text}\n{sites}", "  ")


def site_table(sites: dict) -> str:
    """Kurtosis, a line for each layer and a column for each site."""
    embedding, *blocks = sites["residual stream"]["kurtosis"]
    n_layer = len(blocks)
    columns = {name: site["kurtosis"] for name, site in sites.items()}
    columns["residual stream"] = blocks
    columns["final norm"] = [None] * (n_layer - 1) + columns["final norm"]  # after the last block
    lines = [["embedding output", f"{embedding:.2f}"] + [""] * (len(sites) - 1)]
    for i in range(n_layer):
        values = [column[i] for column in columns.values()]
        cells = ["" if value is None else f"{value:.2f}" for value in values]
        lines.append([f"block {i + 1}", *cells])
    floors = {name: f"{site['floor']:.3f}" for name, site in sites.items()}
    floors["ffn hidden"] = "-"  # products of two numbers are never Gaussian, even at the start
    lines.append(["Gaussian", *floors.values()])
    return table(["excess kurtosis by site", *sites], lines)


def describe_tasks(name: str, row: dict) -> str:
    """Scores in percent, a line for each task, and how many questions were too long."""
    lines = []
    for task, result in row["tasks"].items():
        norm = percent(result["acc_norm"]) if "acc_norm" in result else ""
        lines.append([task, f"{result['n']:,}", percent(result["acc"]), norm,
                      percent(result["score"]), percent(result["stderr"])])
    average = f"average of {len(row['benchmarks'])}"
    lines.append([average, "", "", "", percent(row["average"]), ""])
    head = ["task", "questions", "acc", "acc_norm", "score", "+-"]
    text = table(head, lines)
    if cut := [f"{r['cut']:,} of {task}" for task, r in row["tasks"].items() if r["cut"]]:
        text += f"\ncut at the left, to fit the window: {', '.join(cut)}"
    return f"{name}\n" + indent(text, "  ")


# --------------------------------------------------------------------------------------------------
# All targets


def compare(rows: list[dict]) -> str:
    """The tables that compare all targets."""
    tables = []
    if "val_loss" in rows[0]:
        tables += [comparison(rows)] if len(rows) > 1 else []
        tables += [quantized_table(rows)] if any("quantized" in row for row in rows) else []
    if "tasks" in rows[0]:
        tables.append(scores_table(rows))
    return "\n\n".join(tables) + "\n" if tables else ""


def comparison(rows: list[dict]) -> str:
    """A line for each target. |x| is the activation that stands out most from its sequence."""
    published = "kurtosis_as_published" in rows[0]
    head = ["target", "loss", "ppl", "bits/byte", "kurtosis", "Gaussian"]
    head += ["as publ.", "Gaussian"] * published + ["|x|", "/ median", "sinks"]
    lines = []
    for row in rows:
        top = row["largest"][strongest_state(row["largest"])]
        line = [
            row["target"], f"{row['val_loss']:.4f}", f"{row['perplexity']:.5g}",
            f"{row['bits_per_byte']:.4f}" if row["bits_per_byte"] else "-",
            f"{row['kurtosis']:.3f}", f"{row['kurtosis_floor']:.3f}",
        ]
        if published:
            line += [f"{row['kurtosis_as_published']:.3f}",
                     f"{row['kurtosis_as_published_floor']:.3f}"]
        lines.append([*line, f"{top['value']:.1f}", f"{top['ratio']:.0f}", n_sinks(row["sinks"])])
    return table(head, lines)


def quantized_table(rows: list[dict]) -> str:
    """For one setting of bits the paper's Table 4, for several its Table 2."""
    rows = [row for row in rows if "quantized" in row]  # not what was quantized before
    settings = list(rows[0]["quantized"])
    form = "" if rows[0]["format"] == "int" else f" in {rows[0]['format']}"
    if len(settings) == 1:
        return methods_table(rows, settings[0], form)
    groups = [settings[i : i + SETTINGS_PER_TABLE]
              for i in range(0, len(settings), SETTINGS_PER_TABLE)]
    return "\n\n".join(bits_table(rows, group, form) for group in groups)


def methods_table(rows: list[dict], bits: str, form: str) -> str:
    """A line for each method and a column for each target: its loss, and what was added to it."""
    lines = [["not quantized", *(f"{row['val_loss']:.4f}" for row in rows)]]
    for method in rows[0]["quantized"][bits]:
        name = method if method == "rtn" else f"+ {method}"
        lines.append([name, *(loss_and_added(row["quantized"][bits][method]) for row in rows)])
    return table([f"loss at {bits}{form}", *(row["target"] for row in rows)], lines)


def bits_table(rows: list[dict], settings: list[str], form: str) -> str:
    """A line for each target and method, a column for each setting: what it adds to the loss."""
    lines = []
    for row in rows:
        for method in row["quantized"][settings[0]]:
            added = [f"{row['quantized'][bits][method]['added']:+.4f}" for bits in settings]
            lines.append([row["target"], method, f"{row['val_loss']:.4f}", *added])
    return table([f"loss added by W-A-KV bits{form}", "method", "exact", *settings], lines)


def in_short(result: dict) -> str:
    """What was measured of a quantized model, in one line."""
    words = [f"loss {loss_and_added(result)}"] if "val_loss" in result else []
    words += [f"average score {percent(result['average'])}"] if "average" in result else []
    return ", ".join(words)


def scores_table(rows: list[dict]) -> str:
    """A line for each target and each of its quantized models, a column for each benchmark, as in
    the paper's Tables 3 and 5."""
    scores = []
    for row in rows:
        scores.append((row["target"], row))
        for bits, methods in row.get("quantized", {}).items():
            scores += [(f"{row['target']} {bits} {method}", r) for method, r in methods.items()]
    benchmarks = list(rows[0]["benchmarks"])
    lines = [[name, *(percent(r["benchmarks"][b]) for b in benchmarks), percent(r["average"])]
             for name, r in scores]
    return table(["benchmarks, %", *benchmarks, "average"], lines)
