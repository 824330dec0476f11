"""What the tools print: of eval.py a description of each target, then tables that compare all of
them; the table of train.py --ablation; the speed that train.py --bench measured.

A row is what tools/evaluate.py measured of one target; eval.py --json prints the same rows.
"""

import math
import statistics
from textwrap import indent

from nanoosp.summary import table

SINK = 0.3  # share of attention on the first token that makes a head a sink (Gu et al. 2025)
SHARES = ("acc_norm", "exact_match", "acc")  # lm-eval's metrics; the first one there is the score
SETTINGS_PER_TABLE = 6  # more would not fit beside each other


def strongest_state(largest: list[dict]) -> int:
    """The state of the residual stream whose largest activation stands out most."""
    return max(range(len(largest)), key=lambda i: largest[i]["ratio"])


def state_name(i: int) -> str:
    return "embedding output" if i == 0 else f"output of block {i}"


def strongest_sink(sinks: dict) -> tuple[int, int]:
    """(layer, head) of the largest share."""
    shares = sinks["share"]
    return max((share, i, j) for i, heads in enumerate(shares) for j, share in enumerate(heads))[1:]


def n_sinks(sinks: dict) -> int:
    return sum(share > SINK for heads in sinks["share"] for share in heads)


def score(metric: str, value: float, stderr: float) -> str:
    """"45.2 ± 1.3", shares in percent."""
    scale, digits = (100, 1) if metric in SHARES else (1, 4)
    spread = "" if math.isnan(stderr) else f" ± {scale * stderr:.{digits}f}"
    return f"{scale * value:.{digits}f}{spread}"


def loss_and_added(result: dict) -> str:
    """Of a quantized model: "1.4021 (+0.0213)"."""
    return f"{result['val_loss']:.4f} ({result['added']:+.4f})"


# --------------------------------------------------------------------------------------------------
# One target


def describe(loaded, row: dict) -> str:
    """A measurement in words, then the kurtosis of every layer and site."""
    state = strongest_state(row["largest"])
    top, sinks = row["largest"][state], row["sinks"]
    token = loaded.spelled(top["token"])
    layer, head = strongest_sink(sinks)
    share, inside, outside = (sinks[key][layer][head] for key in ("share", "inside", "outside"))
    bits = f", {row['bits_per_byte']:.4f} bits per byte" if row["bits_per_byte"] else ""
    lines = [
        ("loss", f"{row['val_loss']:.4f} nats per token, perplexity {row['perplexity']:.6g}{bits}"),
        ("excess kurtosis", f"{row['kurtosis']:.3f} (Gaussian {row['kurtosis_floor']:.3f}), mean "
                            "over the residual stream"),
        ("stands out most", f"|x| = {top['value']:.1f}, {top['ratio']:.0f} times the median of its "
                            f"sequence: {state_name(state)}, channel {top['channel']}, position "
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


# --------------------------------------------------------------------------------------------------
# All targets


def check_same_data(rows: list[dict]):
    """Raise ValueError unless all rows were measured on the same data; older ones may not say."""
    measured_on = {}
    for row in rows:
        measured_on.setdefault(row.get("data"), row.get("target"))
    measured_on.pop(None, None)
    if len(measured_on) > 1:
        names = " and ".join(map(str, measured_on.values()))
        raise ValueError(f"{names} were measured on different data, so their numbers do not belong "
                         "into one table or figure; --text FILE measures all on one text")


def compare(rows: list[dict]) -> str:
    """The tables that compare all targets. Where they were measured on different data, a line that
    says so."""
    tables = []
    try:
        check_same_data(rows)
    except ValueError as error:
        return f"not compared: {error}\n"
    if "val_loss" in rows[0]:
        tables += [comparison(rows)] if len(rows) > 1 else []
        tables += [quantized_table(rows)] if any("quantized" in row for row in rows) else []
    if "tasks" in rows[0]:
        tables.append(scores_table(rows))
    return "\n\n".join(tables) + "\n" if tables else ""


def comparison(rows: list[dict]) -> str:
    """A line for each target. |x| is the activation that stands out most from its sequence."""
    def top(row):
        return row["largest"][strongest_state(row["largest"])]

    published = [
        ("as publ.", lambda row: f"{row['kurtosis_as_published']:.3f}"),
        ("Gaussian", lambda row: f"{row['kurtosis_as_published_floor']:.3f}"),
    ]
    columns = [
        ("target", lambda row: row["target"]),
        ("loss", lambda row: f"{row['val_loss']:.4f}"),
        ("ppl", lambda row: f"{row['perplexity']:.5g}"),
        ("bits/byte", lambda row: f"{row['bits_per_byte']:.4f}" if row["bits_per_byte"] else "-"),
        ("kurtosis", lambda row: f"{row['kurtosis']:.3f}"),
        ("Gaussian", lambda row: f"{row['kurtosis_floor']:.3f}"),
        *(published if "kurtosis_as_published" in rows[0] else []),
        ("|x|", lambda row: f"{top(row)['value']:.1f}"),
        ("/ median", lambda row: f"{top(row)['ratio']:.0f}"),
        ("sinks", lambda row: n_sinks(row["sinks"])),
    ]
    lines = [[cell(row) for _, cell in columns] for row in rows]
    return table([name for name, _ in columns], lines)


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
    """What was measured of a model, in one line."""
    words = [f"loss {loss_and_added(result)}"] if "added" in result else []
    if "average" in result:
        words.append(f"average score {score(*result['average'])}")
    if result.get("cut"):
        words.append(f"{result['cut']:,} texts cut at the left, to fit the window")
    return ", ".join(words)


def scores(results: dict, members: dict) -> dict:
    """Of lm-eval's results `benchmarks`: name -> (metric, value, standard error), and `average`,
    the same over those that are shares. Each of a group's `members` is a benchmark."""
    inner = {name for names in members.values() for name in names}
    names = [n for name in results if name not in inner for n in members.get(name, [name])]
    benchmarks = {}
    for result in map(results.get, names):
        keys = [key.split(",") for key in result if "," in key and "_stderr," not in key]
        metric, how = min(keys, key=lambda key: [*SHARES, key[0]].index(key[0]))
        values = result[f"{metric},{how}"], result[f"{metric}_stderr,{how}"]
        values = [v if isinstance(v, float) else math.nan for v in values]  # "N/A"
        benchmarks[result["alias"]] = metric, *values
    shares = [values for metric, *values in benchmarks.values() if metric in SHARES]
    if not shares:
        return dict(benchmarks=benchmarks)
    n, (values, errors) = len(shares), zip(*shares)
    return dict(benchmarks=benchmarks, average=("acc", sum(values) / n, math.hypot(*errors) / n))


def scores_table(rows: list[dict]) -> str:
    """A line for each benchmark, a column for each target and each of its quantized models."""
    models = []
    for row in rows:
        models.append((row["target"], row))
        for bits, methods in row.get("quantized", {}).items():
            models += [(f"{row['target']} {bits} {method}", r) for method, r in methods.items()]
    tables = []
    for i in range(0, len(models), SETTINGS_PER_TABLE):
        names, results = zip(*models[i : i + SETTINGS_PER_TABLE])
        lines = [[name, *(score(*r["benchmarks"][name]) for r in results)]
                 for name in results[0]["benchmarks"]]
        if "average" in results[0]:
            lines.append(["average", *(score(*r["average"]) for r in results)])
        tables.append(table(["benchmarks, %", *names], lines))
    return "\n\n".join(tables)


# --------------------------------------------------------------------------------------------------
# train.py --ablation


def mean_and_spread(values, digits: int) -> str:
    """Mean ± standard deviation; of a single value, the value; of what is not known, a dash."""
    if None in values:
        return "-"
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{spread}"


def with_rate(result: dict) -> str:
    """"Adam, hot (0.002)": what was measured, and its learning rate."""
    return f"{result['label']} ({result['lr']:g})"


def ablation_table(results: list[dict]) -> str:
    """Markdown, one line a configuration: the mean over seeds, and their standard deviation."""
    check_same_data(results)
    groups = {}
    for result in results:
        groups.setdefault(with_rate(result), []).append(result)
    floors = [results[0][f"{name}_floor"] for name in ("kurtosis", "kurtosis_as_published")]
    columns = [
        ("validation loss", 4, lambda r: r["val_loss"]),
        ("bits per byte", 4, lambda r: r["bits_per_byte"]),
        (f"excess kurtosis (Gaussian {floors[0]:.3f})", 3, lambda r: r["kurtosis"]),
        (f"as published (Gaussian {floors[1]:.3f})", 3, lambda r: r["kurtosis_as_published"]),
        ("largest activation / median", 0, lambda r: max(state["ratio"] for state in r["largest"])),
        ("4-4-4 adds", 4, lambda r: r["quantized"]["4-4-4"]["rtn"]["added"]),
        ("with a Hadamard in the FFN", 4, lambda r: r["quantized"]["4-4-4"]["had"]["added"]),
    ]
    lines = []
    for label, group in groups.items():
        cells = [mean_and_spread([of(r) for r in group], digits) for _, digits, of in columns]
        lines.append([label, *cells])
    seeds = len(next(iter(groups.values())))
    head = [f"model (learning rate), {seeds} seed(s)", *(name for name, _, _ in columns)]
    return table(head, lines, markdown=True)


# --------------------------------------------------------------------------------------------------
# train.py --bench


def describe_speed(r: dict) -> str:
    """What tools/bench.py measured, in words."""
    processes = f"{r['ranks']} process" + "es" * (r["ranks"] > 1)
    optimizer_share = r["optimizer_ms"] / r["step_ms"]
    lines = {
        "speed": f"{r['tokens_per_s']:,.0f} tokens/s, {r['tokens_per_step']:,} tokens a step, "
                 f"{processes}",
        "step": f"{r['step_ms']:,.1f} ms: forward and backward {r['forward_backward_ms']:,.1f}, "
                f"optimizer {r['optimizer_ms']:,.1f} ({optimizer_share:.1%})",
        "first step": f"{r['first_step_s']:.0f} s after the start, compilation included",
        "peak memory": f"{r['peak_memory_gib']:.2f} GiB",
        "model arithmetic": f"{r['model_tflops']:.3g} TFLOP/s for each process",
    }
    if "mfu_matmul" in r:
        lines["MFU"] = f"{r['mfu_matmul']:.1%} of the {r['matmul_tflops']:.0f} TFLOP/s of a product"
    if "mfu_datasheet" in r:
        lines[""] = f"{r['mfu_datasheet']:.1%} of the datasheet's for {r['gpu']}"
    return "\n".join(["", *(f"{name:<19}{text}" for name, text in lines.items())])
