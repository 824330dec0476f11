"""All tables of the pages, and most figures, made again from the logs in this folder:

    python results/tables.py

    ablation_full/          all 12 combinations on Shakespeare, three seeds each
                            (runs.jsonl: command and measurement; logs.jsonl: training curves)
    ablation_tiny/          the seven rows of train.py --ablation on two CPU cores: eval.json and
                            every tenth step of log.jsonl; today*.jsonl: of tiny as it is now
    ablation_toy/           the same rows on toy, with --seeds 3
    adam_parts/             SSNorm and EmbProj for an Adam with outliers: tiny at twice its best
                            rate, two seeds, on a CPU
    books/                  six models of books: rates tried, all methods of quantize.py, bits
    ablation_narrow/        the same rows on toy as it is now, three seeds; more.jsonl: more of Adam
                            and OSP, and Muon-only's rates; *_192.jsonl: with 192 channels
    depth/                  shapes of equal size, rates and lengths, on Shakespeare and books; also
                            how today's tiny and toy were found
    smollm2/                what four bits cost a model of two trillion tokens: the output of eval.py
    decay/                  weight decay on Shakespeare and on books, and the formats of hardware
                            for the books; loudest.jsonl is the front page's figure
    embed_lr/               Muon with a slower embedding
    ffn_hidden/             trace.py, and what it wrote for every variant of the norms' gains
    first_minute/           what the first commands printed, and seeds.jsonl: more seeds of tiny
    float8/                 losses of models trained with products of eight-bit floats
    formats/                Adam and OSP on Shakespeare, with the formats of hardware
    four_bits/*.json        the loss that quantization adds: command, and output of eval.py --json
    knob/                   optimizers and OSP on Shakespeare against learning rate and training
                            length, one to three seeds
    learning_rates/*.jsonl  the sweeps, one line for each run: command, hardware, measurement
    rounding/               measure.py, and what it says of the weights of Adam and OSP
    small/                  GPT-2's size on books, documentation and code: documents.py, which makes
                            the text, and two models; stages.jsonl: what 4 bits cost on the way
    speed/                  what --bench and the comparisons measured, one line each; measure.py
                            makes float8, writing and gptq

Each folder's README.md is the page of its experiment. A table stands on one of PAGES between
<!-- table NAME --> and <!-- end -->, and once more on README.md or results/README.md where these
show it. A test compares it with what this file makes.
"""

import json
import math
import re
import statistics
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))  # so that it runs from any directory

from nanoosp.files import write_text  # noqa: E402 (it and the rest need the line above)
from nanoosp.options import answer_before_torch, command, parse  # noqa: E402


@dataclass
class Options:
    """There are none but --help."""


answer_before_torch("results/tables.py", Options)

from nanoosp.recipe import FORMATS  # noqa: E402
from nanoosp.summary import table  # noqa: E402
from tools.report import ablation_table, check_same_data, mean_and_spread, with_rate  # noqa: E402
from results.ffn_hidden.trace import VARIANTS  # noqa: E402

METHODS = ("rtn", "had", "gptq", "quarot", "spinquant")
LABELS = {"adam": "Adam", "osp": "OSP"}
ABLATION_BITS = ("4-4-16", "4-4-4", "3-3-3")
FLOOR = -6 / 385  # the kurtosis of Gaussian vectors with 384 channels, the width of most models
KNOB = ("Adam", "Muon-only", "Muon", "OSP")
BOOKS = {  # with their learning rates
    "books-adam-1e-3": "Adam, 0.001",
    "books-adam-2e-3": "Adam, 0.002",
    "books-adam-4e-3": "Adam, 0.004",
    "books-adam-8e-3": "Adam, 0.008",
    "books-muon": "Muon, 0.002",
    "books-osp": "OSP, 0.002",
}
TEXTS = {"books": "books", "docs": "documentation", "code": "code"}  # held-out texts of small/
SMALL_STEP = 256 * 1024  # tokens
ROWS = ("adam", "adam-hot", "muon-only", "muon", "muon-ssnorm", "muon-embproj", "osp")
ADDED = ("added at 4-4-4, rtn", "had")  # heads of the two columns that both_added() fills
KERNELS = {  # what a GPU's kernel is for, by words in its name; the first match counts
    "attention": "sdpa|flash|fmha|cudnn",
    "matrix products": "nvjet|gemm|gemv|splitk|cutlass",
    "sums over GPUs": "nccl",
    "loss": "softmax",
    "SwiGLU": "silu",
    "norms and residual stream": r"rms_norm|view_add_\d+$",
    "RoPE and layout of heads": "_(cat|clone)_",
    "weight casts, sums of gradients": r"to_copy(_t)?_\d+$|CUDAFunctor_add",
    "other": "",
}
FORMAT_METHODS = ("rtn", "had", "gptq", "quarot")
TRACES_SHOWN = {  # of the FFN's hidden state, with what their figure calls them
    "official": "gain starts at 1 (OSP)",
    "init-sqrt-d": "gain starts at sqrt(D)",
    "init-inverse": "gain starts at 1/sqrt(D)",
    "adamw": "gain trained by AdamW",
    "frozen": "gain stays at 1",
    "adam": "Adam, a gain for each channel",
}
CURVES_SHOWN = ("Adam", "Muon", "Muon + SSNorm", "OSP")  # each has one part of OSP more


# --------------------------------------------------------------------------------------------------
# Records, and cells of tables


def markdown(head: list[str], rows: list[list[str]]) -> str:
    return table(head, rows, markdown=True)


def records(path: str) -> list[dict]:
    """The lines of a log in this folder. Raises ValueError for a damaged line, with its number."""
    found = []
    for number, line in enumerate((HERE / path).read_text(encoding="utf-8").splitlines(), 1):
        try:
            found.append(dict(json.loads(line)))
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path}, line {number}: {error}") from error
    if not found:
        raise ValueError(f"{path} is empty")
    return found


def logs(folder: str) -> dict[str, list[dict]]:
    return {run["name"]: run["log"] for run in records(f"{folder}/logs.jsonl")}


def grouped(runs: list[dict], *keys: str) -> dict[tuple, list[dict]]:
    """Runs that differ in nothing but the seed, in the order in which they come."""
    groups = {}
    for run in runs:
        group = tuple(run[key] if key in run else run["eval"][key] for key in keys)
        groups.setdefault(group, []).append(run)
    return groups


def spread(runs: list[dict], get, digits: int, sign: bool = False) -> str:
    """Mean ± standard deviation of get(run); with a + in front if it is a difference."""
    check_same_data([run.get("eval", {}) for run in runs])
    values = [get(run) for run in runs]
    return ("+" if sign and statistics.mean(values) >= 0 else "") + mean_and_spread(values, digits)


def measured_cells(runs: list[dict]) -> list[str]:
    """Loss, kurtosis and the two costs at 4-4-4 of records that have them at the top."""
    return [mean_and_spread([run[key] for run in runs], digits)
            for key, digits in (("val_loss", 4), ("kurtosis", 2), ("rtn", 4), ("had", 4))]


def of_eval(key: str):
    return lambda run: run["eval"][key]


def added(bits: str, method: str):
    return lambda run: run["eval"]["quantized"][bits][method]["added"]


def both_added(runs: list[dict], bits: str = "4-4-4") -> list[str]:
    """Two cells: the loss that these bits add, with plain rounding and with an FFN Hadamard."""
    return [spread(runs, added(bits, method), 4, sign=True) for method in ("rtn", "had")]


def hidden_kurtosis(run) -> float:
    """Of the FFN's hidden state, mean over blocks."""
    return statistics.mean(run["eval"]["sites"]["ffn hidden"]["kurtosis"])


def largest_ratio(run) -> float:
    """The largest activation of the residual stream, over the median of its sequence."""
    return max(state["ratio"] for state in run["eval"]["largest"])


def kurtosis_head(runs: list[dict]) -> str:
    return f"excess kurtosis (Gaussian {runs[0]['eval']['kurtosis_floor']:.3f})"


def kurtosis_heads(runs: list[dict]) -> list[str]:
    floor = runs[0]["eval"]["kurtosis_as_published_floor"]
    return [kurtosis_head(runs), f"as published (Gaussian {floor:.3f})"]


# --------------------------------------------------------------------------------------------------
# The books, the ablation, the knob


def books_runs() -> dict[str, dict]:
    return {run["name"]: run for run in records("books/runs.jsonl")}


def method_cells(e: dict) -> list[str]:
    """What 4-4-4 adds with each method, and the best loss."""
    results = e["quantized"]["4-4-4"]
    best = min(result["val_loss"] for result in results.values())
    return [*(f"{results[method]['added']:+.4f}" for method in METHODS), f"{best:.4f}"]


def books_methods() -> str:
    runs, rows = books_runs(), []
    for name, label in BOOKS.items():
        e = runs[name]["eval"]
        rows.append([label, f"{e['val_loss']:.4f}", f"{e['kurtosis']:.2f}", *method_cells(e)])
    heads = kurtosis_heads([runs["books-osp"]])
    return markdown(["", "validation loss", heads[0], *METHODS, "best loss at 4-4-4"], rows)


def books_bits() -> str:
    runs, rows = books_runs(), []
    settings = ("4-8-16", "4-8-8", "4-4-16", "4-4-4", "3-3-3")
    for name, label in BOOKS.items():
        results = dict(runs[f"table2-{name}"]["eval"]["quantized"])
        results["4-4-4"] = runs[name]["eval"]["quantized"]["4-4-4"]
        for method in ("rtn", "had"):
            cells = [f"{results[bits][method]['added']:+.4f}" for bits in settings]
            rows.append([label, method, *cells])
    return markdown(["", "", *settings], rows)


def books_parts() -> str:
    """Weights alone at four and at three bits, and activations alone, as --sweep measured them."""
    columns = [(bits, method) for bits in ("4-16-16", "3-16-16", "16-4-16")
               for method in ("rtn", "had")]
    runs, rows = books_runs(), []
    for name, label in BOOKS.items():
        costs = [added(*column)(runs[f"sweep-{name}"]) for column in columns]
        rows.append([label, *(f"{cost:+.4f}" for cost in costs)])
    return markdown(["", *(" ".join(column) for column in columns)], rows)


def books_rates() -> str:
    runs = [run for name, run in books_runs().items() if name.startswith("rate-")]
    rows = []
    for run in sorted(runs, key=lambda run: (run["eval"]["label"], run["lr"])):
        e = run["eval"]
        rows.append([e["label"], f"{run['lr']:g}", f"{e['val_loss']:.4f}", f"{e['kurtosis']:.2f}",
                     *both_added([run])])
    return markdown(["", "peak learning rate", "validation loss", "excess kurtosis", *ADDED], rows)


def books() -> str:
    runs, rows = books_runs(), []
    for name, label in BOOKS.items():
        run, held = runs[name], runs[f"held-{name}"]
        rows.append([label, f"{held['eval']['val_loss']:.4f}", *both_added([held]),
                     f"{run['eval']['kurtosis_as_published']:.2f}", f"{largest_ratio(run):,.0f}",
                     f"{hidden_kurtosis(run):,.0f}"])
    heads = kurtosis_heads([runs["books-osp"]])
    return markdown(["", "loss on books not seen", *ADDED, heads[1], "largest / median",
                     "FFN hidden kurtosis"], rows)


def ablation_full() -> str:
    runs = records("ablation_full/runs.jsonl")
    rows = [
        [label, spread(group, of_eval("val_loss"), 4), spread(group, of_eval("bits_per_byte"), 4),
         spread(group, of_eval("kurtosis"), 2), spread(group, of_eval("kurtosis_as_published"), 2),
         spread(group, largest_ratio, 0), spread(group, hidden_kurtosis, 0)]
        for (label,), group in grouped(runs, "label").items()
    ]
    return markdown(["", "validation loss", "bits per byte", *kurtosis_heads(runs),
                     "largest / median", "FFN hidden kurtosis"], rows)


def loss_kurtosis_added(runs: list[dict]) -> list[list[str]]:
    """A row for each label: loss, kurtosis, and the loss that 4-4-4 adds."""
    return [[label, spread(group, of_eval("val_loss"), 4), spread(group, of_eval("kurtosis"), 2),
             *both_added(group)]
            for (label,), group in grouped(runs, "label").items()]


def ablation_seven(runs: list[dict]) -> str:
    """The paper's six rows and a hot Adam."""
    rows = [[with_rate(group[0]["eval"]), *cells] for group, (_, *cells)
            in zip(grouped(runs, "label").values(), loss_kurtosis_added(runs))]
    return markdown(["", "validation loss", kurtosis_head(runs), "4-4-4 adds",
                     "with a Hadamard"], rows)


def toy_runs() -> list[dict]:
    """The ablation's, more seeds of Adam and OSP, and Muon-only at other rates."""
    return records("ablation_narrow/runs.jsonl") + records("ablation_narrow/more.jsonl")


def toy_seeds() -> str:
    runs = toy_runs()
    rows = [[with_rate(group[0]["eval"]), str(len(group)), *loss_kurtosis_added(group)[0][1:]]
            for (label,), group in grouped(runs, "label").items() if label in ("Adam", "OSP")]
    return markdown(["", "seeds", "validation loss", kurtosis_head(runs), "4-4-4 adds",
                     "with a Hadamard"], rows)


def muon_only_rates() -> str:
    runs = sorted((run for run in toy_runs() if run["eval"]["label"] == "Muon-only"),
                  key=lambda run: run["lr"])
    rows = [[f"{rate:g}", str(len(group)), *loss_kurtosis_added(group)[0][1:]]
            for (rate,), group in grouped(runs, "lr").items()]
    return markdown(["Muon-only's rate", "seeds", "validation loss", kurtosis_head(runs),
                     "4-4-4 adds", "with a Hadamard"], rows)


def embed_lr() -> str:
    """Muon with embedding and head at three rates; the first is twice --lr, the default."""
    runs = records("embed_lr/runs.jsonl")
    rows = [[f"{rate:g}", *loss_kurtosis_added(group)[0][1:]]
            for (rate,), group in grouped(runs, "embed_lr").items()]
    return markdown(["AdamW's rate for embedding and head", "validation loss",
                     kurtosis_heads(runs)[0], "4-4-4 adds", "with a Hadamard"], rows)


# --------------------------------------------------------------------------------------------------
# Formats of 4 bits, weight decay, rounding


def formats(runs: list[dict]) -> str:
    """A row for each format and model, a column for each method: what 4-4-4 adds."""
    runs = [run for run in runs if "formats" in run["eval"]]
    runs.sort(key=lambda run: (run["eval"]["label"], run["lr"]))
    groups = grouped(runs, "label", "lr")
    rows = []
    for name in FORMATS:
        for group in groups.values():
            def quantized(run, name=name):
                e = run["eval"]
                return (e["quantized"] if name == "int" else e["formats"][name])["4-4-4"]

            cells = [spread(group, lambda run, m=method: quantized(run)[m]["added"], 4, sign=True)
                     for method in FORMAT_METHODS]
            best = spread(group, lambda run: min(quantized(run)[method]["val_loss"]
                                                 for method in FORMAT_METHODS), 4)
            loss = spread(group, of_eval("val_loss"), 4)
            rows.append([name, with_rate(group[0]["eval"]), loss, *cells, best])
    return markdown(["format", "model (learning rate)", "validation loss", *FORMAT_METHODS,
                     "best loss at 4 bits"], rows)


def decay_runs(text: str) -> list[dict]:
    """Those of Adam and OSP that differ in weight decay alone, by label and decay."""
    runs = records("decay/runs.jsonl")
    if text == "toy":  # a decay of 0.01 is the default: these runs have been measured in formats, too
        runs += [run for run in records("formats/runs.jsonl")
                 if run["eval"]["label"] in ("Adam", "OSP")]
    runs = [run for run in runs if ("books" in run["name"]) == (text == "books")]
    rate = {"Adam": 0.004 if text == "books" else 0.001, "OSP": 0.002 if text == "books" else 0.004}
    runs = [run for run in runs if run["lr"] == rate[run["eval"]["label"]]]
    return sorted(runs, key=lambda run: (run["eval"]["label"], run["weight_decay"]))


def decay(text: str) -> str:
    rows, runs = [], decay_runs(text)
    columns = [(bits, method) for bits in ("4-16-16", "16-4-16", "4-4-4")
               for method in ("rtn", "had", "gptq") if (bits, method) != ("16-4-16", "gptq")]
    for (label, wd), group in grouped(runs, "label", "weight_decay").items():
        cells = [spread(group, added(*column), 4, sign=True) for column in columns]
        rows.append([with_rate(group[0]["eval"]), f"{wd:g}", spread(group, of_eval("val_loss"), 4),
                     spread(group, of_eval("kurtosis"), 2), *cells])
    head = ["model (learning rate)", "weight decay", "validation loss", kurtosis_heads(runs)[0]]
    return markdown([*head, *(f"{bits} {method}" for bits, method in columns)], rows)


def rounding() -> str:
    rows = []
    for (label, wd), group in grouped(records("rounding/toy.jsonl"), "label", "weight_decay").items():
        values = [spread(group, lambda run, key=key: 100 * run[key], 1)
                  for key in ("weight_error", "output_error", "stable_rank")]
        rows.append([label, f"{wd:g}", *values])
    return markdown(["", "weight decay", "error of a weight, %", "error of its output, %",
                     "stable rank, % of the rank"], rows)


def by_site(named: list[tuple[str, list[dict]]]) -> str:
    """Mean kurtosis over the blocks, for every site. `named`: label and runs of each row."""
    names = list(named[0][1][0]["eval"]["sites"])

    def mean_of(site):
        return lambda run: statistics.mean(run["eval"]["sites"][site]["kurtosis"])

    rows = [[label, *(spread(runs, mean_of(name), 2) for name in names)] for label, runs in named]
    return markdown(["", *names], rows)


def ablation_full_sites() -> str:
    groups = grouped(records("ablation_full/runs.jsonl"), "label")
    return by_site([(label, runs) for (label,), runs in groups.items()])


def books_sites() -> str:
    runs = books_runs()
    return by_site([(label, [runs[name]]) for name, label in BOOKS.items()])


def ablation_full_bits() -> str:
    rows = []
    for (label,), group in grouped(records("ablation_full/runs.jsonl"), "label").items():
        rows.append([label, *(cell for bits in ABLATION_BITS for cell in both_added(group, bits))])
    heads = [f"{bits} {method}" for bits in ABLATION_BITS for method in ("rtn", "had")]
    return markdown(["", *heads], rows)


def adam_parts() -> str:
    runs = records("adam_parts/runs.jsonl")
    head = ["", "validation loss", kurtosis_heads(runs)[0], *ADDED]
    return markdown(head, loss_kurtosis_added(runs))


def knob_runs(what: str) -> list[dict]:
    """Runs of knob/ and ablation_full/ that differ from the defaults in nothing but `what`."""
    runs = records("knob/runs.jsonl") + records("ablation_full/runs.jsonl")
    runs = [run for run in runs if run["eval"]["label"] in KNOB]
    if what == "lr":
        return [run for run in runs if run["steps"] == 1000]
    default_rate = {run["eval"]["label"]: run["lr"] for run in runs if run["steps"] != 1000}
    return [run for run in runs if run["lr"] == default_rate.get(run["eval"]["label"])]


def knob(what: str) -> str:
    """`what`: "lr" or "steps", which the rows differ in."""
    runs = knob_runs(what)
    name = {"lr": "peak learning rate", "steps": "steps"}[what]
    rows = [
        [label, f"{x:g}", str(len(group)), spread(group, of_eval("val_loss"), 4),
         spread(group, of_eval("kurtosis"), 2), spread(group, hidden_kurtosis, 0),
         *both_added(group)]
        for (label, x), group in sorted(grouped(runs, "label", what).items())
    ]
    return markdown(["", name, "runs", "validation loss", kurtosis_heads(runs)[0],
                     "FFN hidden kurtosis", *ADDED], rows)


# --------------------------------------------------------------------------------------------------
# Depth, and how today's presets were found


def depth_runs(text: str) -> list[dict]:
    """Runs of equal length on shapes of about equal size, by number of blocks."""
    runs = [r for r in records("depth/runs.jsonl")
            if r["text"] == text and r["batch_size"] == 32 and r["steps"] == 2000]
    return sorted(runs, key=lambda r: (r["n_layer"], r["label"], r["lr"]))


DEPTH_HEAD = ["model (learning rate)", "runs", "validation loss", "excess kurtosis",
              "its worst state", "rtn", "had", "gptq", "quarot"]


def depth_rows(runs: list[dict], shape, *keys: str) -> list[list[str]]:
    rows = []
    for _, group in grouped(runs, "n_layer", "n_embd", *keys, "label", "lr").items():
        check_same_data([r for r in group if "data" in r])
        r = group[0]
        later = [run for run in group if "eval" in run]  # measured with more methods, too
        cells = [mean_and_spread([run["added"][method] for run in group], 4)
                 for method in ("rtn", "had")]
        cells += [mean_and_spread([run["eval"]["added"][method] for run in later], 4)
                  if later and "gptq" in later[0]["eval"]["added"] else ""
                  for method in ("gptq", "quarot")]
        worst = [max(run["kurtosis_per_layer"]) for run in group]
        rows.append([shape(r), f"{r['label']} ({r['lr']:g})", str(len(group)),
                     mean_and_spread([run["val_loss"] for run in group], 4),
                     mean_and_spread([run["kurtosis"] for run in group], 2),
                     mean_and_spread(worst, 1), *cells])
    return rows


def depth(text: str) -> str:
    rows = depth_rows(depth_runs(text), lambda r: f"{r['n_layer']} × {r['n_embd']}")
    return markdown(["blocks × width", *DEPTH_HEAD], rows)


def depth_presets(preset: str) -> str:
    """The shapes that were tried for today's tiny or toy."""
    runs = [r for r in records("depth/runs.jsonl") if f"--preset {preset} " in r["command"] + " "
            and not (r["batch_size"] == 32 and r["steps"] == 2000)]
    for r in runs:
        r.setdefault("seq_len", {"tiny": 128, "toy": 256}[preset])
    runs.sort(key=lambda r: (r["n_layer"], r["n_embd"], r["steps"], r["label"], r["lr"]))
    rows = depth_rows(runs, lambda r: f"{r['n_layer']} × {r['n_embd']}, {r['steps']:,} of "
                      f"{r['batch_size']} × {r['seq_len']}", "steps", "batch_size", "seq_len")
    head = ["blocks × width, steps of tokens", *DEPTH_HEAD]
    return markdown(head[:-2], [row[:-2] for row in rows])  # without gptq and quarot


def smollm2() -> str:
    """Perplexities that eval.py printed, one row a format and method."""
    text = (HERE / "smollm2/eval.txt").read_text()
    exact = re.search(r"loss +(\S+) nats per token, perplexity (\S+),", text)
    found = {}
    for method, bits, name, loss in re.findall(
            r"(?m)^smol (\w+) (\S+?)(?: (mxfp4|nvfp4))?: loss (\S+) ", text):
        found[name or "int", method, bits] = float(loss)
    columns = ("4-16-16", "16-4-16", "16-16-4", "4-4-4")
    rows = [["not quantized", "", "", "", "", exact[2]]]
    for name in FORMATS:
        for method in METHODS:
            values = [found.get((name, method, bits)) for bits in columns]
            rows.append([name, method, *("" if v is None else f"{math.exp(v):,.1f}"
                                         for v in values)])
    return markdown(["format", "method", *columns], rows)


# --------------------------------------------------------------------------------------------------
# small on real text


def small_runs(text: str | None) -> list[dict]:
    """Adam's and OSP's, measured on this held-out text; on the mixture's own if None."""
    return [run for run in records("small/runs.jsonl") if run.get("text") == text]


def small() -> str:
    texts, rows = [small_runs(text) for text in TEXTS], []
    for mixture, *held in zip(small_runs(None), *texts, strict=True):
        e, books = mixture["eval"], held[0]
        sink = max(max(shares) for shares in books["eval"]["sinks"]["share"])
        losses = [f"{run['eval']['val_loss']:.4f}" for run in (mixture, *held)]
        rows.append([with_rate(e), *losses, f"{e['kurtosis']:.2f}",
                     f"{books['eval']['kurtosis_as_published']:.2f}",
                     f"{largest_ratio(books):,.0f}", f"{sink:.0%}"])
    floors = kurtosis_heads(texts[0])
    return markdown(["model (learning rate)", "loss: mixture", *TEXTS.values(), *floors,
                     "largest / median", "largest sink"], rows)


def small_methods() -> str:
    rows = []
    for text, name in TEXTS.items():
        for run in small_runs(text):
            e = run["eval"]
            rows.append([name, with_rate(e), f"{e['val_loss']:.4f}", *method_cells(e)])
    return markdown(["text", "model (learning rate)", "loss", *METHODS, "best loss at 4-4-4"], rows)


def small_parts() -> str:
    columns = [("4-16-16", method) for method in ("rtn", "had", "gptq")]
    columns += [("16-4-16", method) for method in ("rtn", "had")]
    rows = [[with_rate(run["eval"]), *(f"{added(*column)(run):+.4f}" for column in columns)]
            for run in small_runs("code")]
    return markdown(["model (learning rate)", *(" ".join(column) for column in columns)], rows)


def small_stages() -> str:
    """A row for each text and stage: loss, kurtosis and cost at 4-4-4 of both models."""
    kurtosis = {(name, r["step"]): r["kurtosis"] for name, log in logs("small").items()
                for r in log if "kurtosis" in r}
    rows = []
    for (text, step), group in grouped(records("small/stages.jsonl"), "text", "step").items():
        row = [TEXTS[text], f"{step * SMALL_STEP / 1e6:,.0f}M"]
        for name in ("small-adam", "small-osp"):
            cost = {r["method"]: r for r in group if r["name"] == name}
            row += [f"{cost['rtn']['exact']:.4f}", f"{kurtosis[name, step]:.2f}",
                    *(f"{cost[method]['added']:+.4f}" for method in ("rtn", "had"))]
        rows.append(row)
    heads = [f"{label}: {head}" for label in ("Adam", "OSP")
             for head in ("loss", "kurtosis (mixture)", "4-4-4 adds", "with a Hadamard")]
    return markdown(["text", "tokens", *heads], rows)


# --------------------------------------------------------------------------------------------------
# The FFN's hidden state, speed, the laptop's tables


def trace_runs() -> dict[str, list[list[dict]]]:
    """For every variant of ffn_hidden/trace.py its runs: first line and records."""
    runs = {}
    for path in sorted(HERE.glob("ffn_hidden/*.jsonl")):
        run = records(f"ffn_hidden/{path.name}")
        if "val_loss" not in run[-1]:
            raise ValueError(f"{path.name} is not a finished trace")
        runs.setdefault(run[0]["variant"], []).append(run)
    return {variant: runs[variant] for variant in VARIANTS if variant in runs}


def ffn_hidden() -> str:
    rows = []
    for variant, runs in trace_runs().items():
        last = [run[-1] for run in runs]

        def cell(get, digits, last=last):
            return mean_and_spread([get(r) for r in last], digits)

        rows.append([
            f"`{variant}`", cell(lambda r: r["val_loss"], 4), cell(lambda r: r["kurtosis"], 2),
            cell(lambda r: statistics.mean(r["gains"]["ffn_norm"]), 2),
            cell(lambda r: max(r["hidden_max"]), 0),
            cell(lambda r: max(r["hidden_max"]) / max(r["hidden_rms"]), 0),
            cell(lambda r: statistics.mean(r["hidden_kurtosis"]), 0),
            cell(lambda r: 100 * statistics.mean(r["hidden_error_4bit"]), 1),
            cell(lambda r: 100 * statistics.mean(r["hidden_error_4bit_hadamard"]), 1),
            cell(lambda r: r["quantized"]["4-4-4"]["rtn"] - r["val_loss"], 4),
            cell(lambda r: r["quantized"]["4-4-4"]["had"] - r["val_loss"], 4),
        ])
    return markdown(["variant", "validation loss", "residual kurtosis", "FFN norm's gain",
                     "hidden max", "max / rms", "hidden kurtosis", "4-bit error, %",
                     "after Hadamard, %", *ADDED], rows)


def speed() -> str:
    """speed/1.4b.jsonl: the comparison in one process, and --bench with larger micro-batches."""
    found = records("speed/1.4b.jsonl")
    peaks = ("peak_start_TF", "peak_end_TF")
    peak = statistics.mean(r[name] for r in found for name in peaks if name in r)
    names = {"osp": "OSP", "adam": "Adam", "muon": "Muon",
             "hf": "transformers' LLaMA, compiled, with torch.optim.Muon and fused AdamW"}
    rows = []
    for r in found:
        if "result" in r:
            name, micro = r["result"].split(":")
            share = r["model_tflops"] / peak
            rows.append([names[name], micro, f"{r['tok_s']:,.0f}", f"{share:.0%}",
                         f"{r['optimizer_ms']:.0f} ms", f"{r['peak_gib']:.1f} GiB"])
    for r in found:
        if r.get("bench") == "a_micro16":
            rows.append(["OSP, on another GPU", "16", f"{r['tokens_per_s']:,.0f}",
                         f"{r['mfu_matmul']:.0%}", f"{r['optimizer_ms']:.0f} ms",
                         f"{r['peak_memory_gib']:.1f} GiB"])
    return markdown(["", "micro-batch", "tokens/s", "of the product's speed", "optimizer",
                     "peak memory"], rows)


def kind(kernel: str) -> str:
    return next(what for what, words in KERNELS.items() if re.search(words, kernel, re.IGNORECASE))


def where_time_goes() -> str:
    """The kernels of a micro-batch of 16 in speed/variants.jsonl, and the optimizer's share."""
    step = next(r for r in records("speed/1.4b.jsonl") if r.get("bench") == "a_micro16")
    optimizer, ms = step["optimizer_ms"] / step["step_ms"], Counter()
    for r in records("speed/variants.jsonl"):
        if "kernel" in r:
            ms[kind(r["kernel"])] += r["ms"]
    shares = Counter({name: time / ms.total() * (1 - optimizer) for name, time in ms.items()})
    shares["optimizer"] = optimizer
    rows = [[name, f"{share:.1%}"] for name, share in shares.most_common()]
    return markdown(["where the time goes", "share of a step"], rows)


def two_gpus() -> str:
    """Both methods and dtypes on one GPU and on two: host 7, which ran all eight with today's code."""
    runs = {(r["method"], r["dtype"], r["bench"]): r for r in records("speed/two_gpus.jsonl")
            if r.get("host") == 7 and "bench" in r}
    rows = []
    for method, dtype in [(method, dtype) for method in ("osp", "adam") for dtype in ("bfloat16", "float8")]:
        one, two = runs[method, dtype, "one"], runs[method, dtype, "two"]
        speeds = [f"{r['tokens_per_s']:,.0f}" for r in (one, two)]
        ratio = f"{two['tokens_per_s'] / one['tokens_per_s']:.2f}"
        optimizer = " and ".join(f"{r['optimizer_ms']:.0f}" for r in (one, two))
        memory = " and ".join(f"{r['peak_memory_gib']:.1f}" for r in (one, two))
        rows.append([LABELS[method], dtype, *speeds, ratio, optimizer, memory])
    return markdown(["", "products", "tokens/s of one GPU", "of two", "ratio", "optimizer, ms: one and two",
                     "GiB per GPU: one and two"], rows)


def forward_backward_variants() -> str:
    tried = [r for r in records("speed/variants.jsonl") if "forward_backward" in r]
    kept = tried[0]["ms"]
    rows = [[r["forward_backward"], f"{r['ms']:.0f}", f"{r['ms'] / kept:.3f}"] for r in tried]
    return markdown(["forward and backward of 16 x 2048 tokens", "ms", "of what is kept"], rows)


def writing() -> str:
    rows = []
    for r in records("speed/writing.jsonl")[1:]:
        if r["host"] > 1:  # the first one's code wrote differently
            memory = f"{r['peak_memory_gib']:.2f} GiB" if r["host"] == 3 else "-"
            rows.append([r["weights"], r["way"], f"{r['host']}", f"{r['tokens_per_s']:,.0f}",
                         f"{r['first_s']:.2f} s", f"{r['second_s']:.1f} s", memory])
    return markdown(["weights", "step", "host", "tokens/s", "first token after", "second token after",
                     "peak memory"], rows)


def float8_rows() -> list[dict]:
    """speed/float8.jsonl with the parts of a row's name, and its speed beside the same host's OSP in bfloat16."""
    found = records("speed/float8.jsonl")[1:]
    for r in found:
        r["method"], r["dtype"], r["micro"] = r["model"].split(":")
        base = [b["tokens_per_s"] for b in found
                if b["host"] == r["host"] and b["model"] == "osp:bfloat16:16"]
        r["ratio"] = r["tokens_per_s"] / statistics.mean(base)
    return found


def float8_speed() -> str:
    names = LABELS | {"hf": "transformers, torch.optim.Muon"}
    rows = [[names[r["method"]], r["dtype"], r["micro"], f"{r['tokens_per_s']:,.0f}",
             f"{r['ratio']:.3f}", f"{r['optimizer_ms']:.0f} ms", f"{r['peak_memory_gib']:.1f} GiB"]
            for r in float8_rows() if r["host"] == 4]
    return markdown(["", "products", "micro-batch", "tokens/s", "of OSP in bfloat16", "optimizer",
                     "peak memory"], rows)


FLOAT8 = {"bfloat16": "none", "float8": "blocks", "torchao": "blocks, torchao", "float8-all": "all linears",
          "torchao-all": "all linears, torchao"}
SUMS = {"fast": "-", "weights": "the weights' gradients", "exact": "both gradients"}


def float8_variants() -> str:
    groups = {}
    for r in float8_rows():
        if r["method"] == "osp" and r["micro"] == "16" and "sums" in r:
            group = FLOAT8[r["dtype"]], SUMS[r["sums"]]
            groups.setdefault(group, []).append(r["ratio"])
    order = [*FLOAT8.values(), *SUMS.values()]
    rows = [[*group, f"{len(groups[group])}", mean_and_spread(groups[group], 3)] for group in
            sorted(groups, key=lambda group: [order.index(part) for part in group])]
    return markdown(["linears in float8", "summed exactly", "runs", "times the speed of bfloat16"], rows)


def float8_adam() -> str:
    """OSP's speed beside Adam's, on hosts that ran both in the same way."""
    found, rows = float8_rows(), []
    for host, kind, sums in ((2, "bfloat16:8", None), (2, "float8-all:16", "exact"), (3, "float8:16", "weights")):
        speed = {}
        for r in found:
            if r["host"] == host and r["model"].endswith(f":{kind}") and r.get("sums") == sums:
                speed.setdefault(r["method"], []).append(r["tokens_per_s"])
        osp, adam16, adam = (statistics.mean(speed[name]) for name in ("osp", "adam16", "adam"))
        dtype, micro = kind.split(":")
        rows.append([FLOAT8[dtype], micro, f"{osp:,.0f}", f"{adam16:,.0f}",
                     f"{osp / adam16:.3f}", f"{adam:,.0f}", f"{osp / adam:.3f}"])
    return markdown(["linears in float8", "micro-batch", "OSP, tokens/s", "Adam, bf16 stream", "ratio",
                     "Adam, as usual", "ratio"], rows)


def float8_runs() -> dict:
    """The runs of float8/runs.jsonl by text, method and dtype."""
    groups = {}
    for r in records("float8/runs.jsonl")[1:]:
        groups.setdefault((r["text"], r["method"], r["dtype"]), []).append(r)
    return groups


def float8_quality() -> str:
    rows = []
    for (text, method, dtype), runs in float8_runs().items():
        if dtype in ("bfloat16", "float8"):
            rows.append([text, LABELS[method], dtype, f"{len(runs)}", *measured_cells(runs)])
    return markdown(["text", "", "products", "runs", "validation loss",
                     "excess kurtosis (Gaussian -0.016)", *ADDED], rows)


def float8_losses() -> str:
    """A row for each text and method, a column for each way to use float8."""
    dtypes = {"bfloat16": "none", "float8": "blocks", "float8-exact": "blocks, exact sums",
              "float8-all": "all linears, exact sums", "float8-all-e4m3": "the same, gradients in E4M3"}
    runs, rows = float8_runs(), []
    for text, method in dict.fromkeys(key[:2] for key in runs):
        groups = [runs[text, method, dtype] for dtype in dtypes]
        losses = [mean_and_spread([r["val_loss"] for r in group], 4) for group in groups]
        rows.append([text, LABELS[method], "loss", *losses])
        if method == "adam":  # OSP's is a Gaussian's in all of them
            kurtosis = [f"{statistics.mean(r['kurtosis'] for r in group):.1f}" for group in groups]
            rows.append([text, LABELS[method], "kurtosis", *kurtosis])
    return markdown(["text", "", "", *dtypes.values()], rows)


def float8_sums() -> str:
    """toy as it is now, OSP: how the weights' gradients are summed."""
    names = {"bfloat16": "bfloat16", "float8": "float8, fast sums",
             "float8-exact": "float8, the weights' gradients summed exactly"}
    runs, rows = records("float8/sums.jsonl")[1:], []
    for (dtype,), group in grouped(runs, "dtype").items():
        check_same_data(group)
        rows.append([names[dtype], str(len(group)), *measured_cells(group)])
    head = f"excess kurtosis (Gaussian {runs[0]['kurtosis_floor']:.3f})"
    return markdown(["products", "seeds", "validation loss", head, *ADDED], rows)


def float8_parts() -> str:
    rows = [[r["linears"], r["gradient"], f"{r['val_loss']:.3f}"]
            for r in records("float8/tiny.jsonl")[1:]]
    return markdown(["linears in float8", "their gradient", "validation loss"], rows)


def toy_seconds() -> str:
    """speed/toy.jsonl without the lines "before", from when toy was compiled."""
    rows = []
    for r in records("speed/toy.jsonl")[1:]:
        if r["code"] != "before":
            others = r["wall_s"] - r["first_step_s"] - r["other_steps_s"]
            seconds = r["wall_s"], r["first_step_s"], r["other_steps_s"], others
            options = r["code"].removeprefix("after").removeprefix(", with ")
            rows.append([LABELS[r["method"]], f"`{options}`" if options else "",
                         *(f"{s:.1f}" for s in seconds)])
    return markdown(["", "options", "seconds in all", "first step", "other steps", "the rest"], rows)


def first_minute() -> str:
    rows = []
    for name, machine in (("tiny", "two CPU cores"), ("toy", "one H200")):
        for row in ("adam", "osp"):
            text = (HERE / f"first_minute/{name}-{row}.txt").read_text()
            shell_command = re.match(r"\$ (.*?)  ", text).group(1)
            loss = re.search(r"validation loss +(\S+) nats per token", text).group(1)
            kurtosis, floor = re.search(r"(?m)^excess kurtosis +(\S+) \(.*: (\S+)\)", text).groups()
            costs = re.search(r"(?m)^4-4-4 bits add +(\S+) .*; (\S+) with", text).groups()
            speed, seconds = re.search(r"speed +(\S+) tokens/s in training, (\d+) s", text).groups()
            rows.append([f"`{shell_command}`", f"{machine}, `{name}`", loss, *costs, kurtosis,
                         floor, speed, f"{seconds} s"])
    return markdown(["command", "where", "validation loss", "4-4-4 adds", "with a Hadamard",
                     "excess kurtosis", "Gaussian", "tokens/s", "time"], rows)


def tiny_seeds() -> str:
    rows = []
    for (label,), group in grouped(records("first_minute/seeds.jsonl"), "label").items():
        check_same_data(group)
        rows.append([f"{label} ({group[0]['lr']:g})", str(len(group)), *measured_cells(group)])
    return markdown(["`tiny` (learning rate)", "seeds", "validation loss", "excess kurtosis",
                     "4-4-4 adds", "with a Hadamard"], rows)


def rates_tiny() -> str:
    groups = {}
    for r in records("learning_rates/tiny-800.jsonl"):
        groups.setdefault((r["row"], float(r["lr"]), float(r["embed_lr"] or 0)), []).append(r)
    rows = []
    for (row, lr, embed_lr), runs in sorted(groups.items()):
        rate = f"{lr:g}" + (f", embedding and head {embed_lr:g}" if embed_lr else "")
        loss, kurtosis = ([r[key] for r in runs] for key in ("val_loss", "kurtosis"))
        rows.append([LABELS[row], rate, str(len(runs)), mean_and_spread(loss, 4),
                     mean_and_spread(kurtosis, 2)])
    return markdown(["", "peak learning rate", "runs", "validation loss", "excess kurtosis"], rows)


def four_bits_tiny() -> str:
    rows = []
    for r in json.loads((HERE / "four_bits/tiny.json").read_text())["rows"]:
        for bits, results in r["quantized"].items():
            cells = [f"{results[method]['added']:+.4f}" for method in METHODS]
            rows.append([bits, r["label"], f"{r['val_loss']:.4f}", *cells])
    return markdown(["bits", "", "exact loss", *METHODS], rows)


def ablation_tiny() -> str:
    files = [HERE / f"ablation_tiny/{row}-s0.eval.json" for row in ROWS]
    return ablation_table([json.loads(path.read_text()) for path in files])


# --------------------------------------------------------------------------------------------------
# All tables and figures


TABLES = {
    "books": books,
    "books_methods": books_methods,
    "books_bits": books_bits,
    "books_parts": books_parts,
    "books_rates": books_rates,
    "first_minute": first_minute,
    "ablation_seven": lambda: ablation_seven(records("ablation_toy/runs.jsonl")),
    "ablation_narrow": lambda: ablation_seven(records("ablation_narrow/runs.jsonl")),
    "ablation_192": lambda: ablation_seven([  # Adam has a second seed in the records
        run for run in records("ablation_narrow/runs_192.jsonl") if run["seed"] == 0]),
    "toy_seeds": toy_seeds,
    "muon_only_rates": muon_only_rates,
    "depth_shakespeare": lambda: depth("Shakespeare"),
    "depth_books": lambda: depth("books"),
    "depth_toy": lambda: depth_presets("toy"),
    "depth_tiny": lambda: depth_presets("tiny"),
    "smollm2": smollm2,
    "embed_lr": embed_lr,
    "formats_books": lambda: formats(records("decay/runs.jsonl")),
    "formats_toy": lambda: formats(records("formats/runs.jsonl")),
    "formats_narrow": lambda: formats(records("ablation_narrow/runs.jsonl")),
    "formats_small": lambda: formats(small_runs("code")),
    "small": small,
    "small_methods": small_methods,
    "small_stages": small_stages,
    "small_parts": small_parts,
    "small_sites": lambda: by_site([(run["eval"]["label"], [run]) for run in small_runs("code")]),
    "decay_books": lambda: decay("books"),
    "decay_toy": lambda: decay("toy"),
    "rounding": rounding,
    "ablation_full": ablation_full,
    "ablation_full_bits": ablation_full_bits,
    "ablation_full_sites": ablation_full_sites,
    "books_sites": books_sites,
    "ablation_tiny": ablation_tiny,
    "ablation_tiny_today": lambda: ablation_table(records("ablation_tiny/today.jsonl")),
    "ffn_hidden": ffn_hidden,
    "four_bits_tiny": four_bits_tiny,
    "speed": speed,
    "where_time_goes": where_time_goes,
    "two_gpus": two_gpus,
    "forward_backward_variants": forward_backward_variants,
    "writing": writing,
    "toy_seconds": toy_seconds,
    "float8_speed": float8_speed,
    "float8_variants": float8_variants,
    "float8_adam": float8_adam,
    "float8_quality": float8_quality,
    "float8_losses": float8_losses,
    "float8_parts": float8_parts,
    "float8_sums": float8_sums,
    "adam_parts": adam_parts,
    "knob_lr": lambda: knob("lr"),
    "knob_steps": lambda: knob("steps"),
    "tiny_seeds": tiny_seeds,
    "rates_tiny": rates_tiny,
}
OVERVIEWS = (HERE.parent / "README.md", HERE / "README.md")
PAGES = (*OVERVIEWS, *sorted(HERE.parent.glob("docs/*.md")), *sorted(HERE.glob("*/README.md")))


def filled(page: str) -> str:
    """`page` with every table made new."""
    def made_new(match):
        name = match[1]
        return f"<!-- table {name} -->\n{TABLES[name]()}\n<!-- end -->"

    return re.sub(r"<!-- table (\S+) -->\n.*?<!-- end -->", made_new, page, flags=re.S)


def figures():
    import torch

    from results.figures import draw_depth, draw_knob, draw_method, draw_pay_off, draw_traces
    from tools import plot

    assets = HERE / "figures"
    plot.STYLES |= {"Adam, 0.001": ("#f3b98a", ":", "o"), "Adam, 0.002": ("#e58a3c", "-.", "o"),
                    "Adam, 0.004": ("#d55e00", "-", "o"), "Adam, 0.008": ("#7f3800", "--", "o"),
                    "Muon, 0.002": plot.STYLES["Muon"], "OSP, 0.002": plot.STYLES["OSP"]}
    loudest = records("decay/loudest.jsonl")
    shown = [(r["label"], torch.tensor(r["channels"])) for r in loudest]
    yield plot.save(plot.draw_grid(shown, loudest[0]["state"]), assets / "front.png")
    yield plot.save(draw_method(), assets / "method.png")
    yield plot.save(draw_depth(depth_runs("Shakespeare"), logs("depth"), FLOOR), assets / "depth.png")
    logged = logs("books")
    series = [(label, logged[name]) for name, label in BOOKS.items()]
    yield plot.save(plot.draw_curves(series, FLOOR, 4.4), assets / "books_curves.png")

    labels = {run["name"]: run["eval"]["label"] for run in small_runs(None)}
    series = [(labels[name], log) for name, log in logs("small").items()]
    stages = {}
    for r in (r for r in records("small/stages.jsonl") if r["text"] == "code"):
        point = r["step"] * SMALL_STEP / 1e6, r["added"]
        stages.setdefault((r["label"], r["method"]), []).append(point)
    floor = records("small/runs.jsonl")[0]["eval"]["kurtosis_floor"]
    for name, with_loss in (("pay_off", False), ("small", True)):
        yield plot.save(draw_pay_off(series, stages, floor, with_loss), assets / f"{name}.png")

    def points(what):
        found = {}
        for r in sorted(knob_runs(what), key=lambda r: KNOB.index(r["eval"]["label"])):
            values = r["eval"]["kurtosis"], r["eval"]["val_loss"], added("4-4-4", "rtn")(r)
            found.setdefault(r["eval"]["label"], []).append((r[what], *values))
        return found

    by_rate = draw_knob(points("lr"), FLOOR, "peak learning rate", (0.0001, 0.001, 0.01))
    yield plot.save(by_rate, assets / "knob_rates.png")
    by_length = draw_knob(points("steps"), FLOOR, "steps", (250, 500, 1000, 2000, 4000))
    yield plot.save(by_length, assets / "knob_steps.png")
    runs = books_runs()
    shown = ("books-adam-4e-3", "books-muon", "books-osp")
    bits = [(BOOKS[name], runs[f"sweep-{name}"]["eval"]["quantized"]) for name in shown]
    yield plot.save(plot.draw_bits(bits), assets / "books_bits.png")
    for folder in ("ablation_toy", "ablation_narrow"):
        evals = {run["name"]: run["eval"] for run in records(f"{folder}/runs.jsonl")}
        floor = next(iter(evals.values()))["kurtosis_floor"]
        series = [(evals[name]["label"], log) for name, log in logs(folder).items()
                  if name in evals and evals[name]["label"] in CURVES_SHOWN]
        path = assets / f"{folder.replace('ablation', 'curves')}.png"
        yield plot.save(plot.draw_curves(series, floor), path)
    runs = trace_runs()
    traces = {TRACES_SHOWN[variant]: [run[1:] for run in runs[variant]] for variant in TRACES_SHOWN}
    for r in (r for runs in traces.values() for run in runs for r in run):
        r["ffn_norm_gain"] = statistics.mean(r["gains"]["ffn_norm"])
    shown = {"ffn_norm_gain": "gain of the FFN's norm", "hidden_max": "largest |hidden state|",
             "hidden_kurtosis": "its excess kurtosis"}
    yield plot.save(draw_traces(traces, shown), assets / "ffn_hidden.png")


@command
def main(argv=None):
    parse(Options, __doc__, argv)
    for path in PAGES:
        write_text(path, filled(path.read_text(encoding="utf-8")))
        print(f"wrote the tables of {path.relative_to(HERE.parent)}")
    for path in figures():
        print(f"wrote {path.name}")


if __name__ == "__main__":
    main()
