"""What a model is worth and how its activations look. It measures anything and changes nothing.

    python eval.py runs/A runs/B              loss, kurtosis, massive activations, attention sinks: one table
    python eval.py runs/A --as-published      also the kurtosis of the paper's own script
    python eval.py runs/A --text FILE         loss and perplexity on any text, by the WikiText-2 protocol
    python eval.py runs/A runs/B --bits 4-4-4 --methods rtn,had,gptq,quarot,spinquant     what 4 bits cost (quantize.py)
    python eval.py runs/A --tasks DIR         score it on benchmarks (benchmarks.py; --bits and --text go with it)
    python eval.py runs/A --prompt "ROMEO:"   let it write
    python eval.py runs/A runs/B --plot DIR   figures (needs matplotlib)

Excess kurtosis (eq. 4) asks how far a token's D activations are from a Gaussian: E[((x - mean) / std)^4] - 3. It is
about 0 for Gaussian values and about D - 3 if one channel holds everything: the outliers that 4 bits cannot afford.
We take it over the channels of one token, centred, and average over all tokens of whole sequences. The headline is
the mean over the states of the residual stream: embedding output, output of every block.

Words used here: a *site* is a place in every layer whose values we look at, a *state* one layer's residual stream, a
*window* a sequence of tokens to evaluate on, the *floor* what Gaussian vectors would measure.
Read it top to bottom: statistics of vectors, watching a model's sites, evaluation, sinks, sampling, targets, output,
all measurements of a target, command line.
"""

import functools
import json
import math
import sys
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

from tools.tasks import describe_tasks, read_tasks, score_tasks, tasks_table
from nanoosp.cli import Parser, peak_memory_gib, pick_device, precision, run
from data.dataset import TOKENIZER_JSON, Dataset, encode, find_dataset, spread, tokenizer_of
from model import Transformer
from quantize import (
    METHODS,
    SWITCHES,
    add_switches,
    calibration_windows,
    includes,
    load_model,
    parse_bits,
    quantize,
    read_text,
    switches,
)

# ---------------------------------------------------------------------------------------------------------------------
# Statistics of vectors


def excess_kurtosis(x):
    """Excess kurtosis over the last axis: [..., D] -> [...] in fp32. A constant vector counts as 0."""
    x = x.float()
    x = x / x.abs().amax(dim=-1, keepdim=True).clamp(min=1e-30)  # fourth powers of huge numbers would overflow
    x = x - x.mean(dim=-1, keepdim=True)
    variance = x.square().mean(dim=-1)
    return x.pow(4).mean(dim=-1) / variance.square().clamp(min=1e-24) - 3 * (variance > 1e-12)  # 0 - 0 if constant


def gaussian_floor(dim: int) -> float:
    """What excess_kurtosis gives on average for `dim` independent Gaussian numbers: not 0 but -6 / (dim + 1).

    (Exact: for a Gaussian sample of n, m4 / m2^2 has expectation 3 (n - 1) / (n + 1).)
    """
    return -6 / (dim + 1)


def published_kurtosis(x):
    """The estimator of the paper's script, [..., D] -> [...]: the fourth moment is not centred, the standard deviation
    is (and unbiased), and negative results become 0. (Official implementation: evaluate_kurtosis.py, line 38.)"""
    x = x.float()
    return (x.pow(4).mean(dim=-1) / x.std(dim=-1).pow(4).clamp(min=1e-30) - 3).relu()


@functools.lru_cache
def published_floor(dim: int) -> float:
    """What published_kurtosis gives for Gaussian vectors, by simulation (about 0.4 sqrt(24 / dim)): 0.042 at 2048."""
    x = torch.randn(8192, dim, generator=torch.Generator().manual_seed(0))
    return published_kurtosis(x).mean().item()


# ---------------------------------------------------------------------------------------------------------------------
# Watching a model


def sites(model: Transformer) -> dict[str, list]:
    """The places we look at, each a list of modules whose outputs are the activations, one per layer."""
    blocks = model.blocks
    return {
        "residual stream": [model.at_embed, *blocks],  # embedding output, then every block's output
        "attention input": [b.attn.at_input for b in blocks],  # what q, k and v read
        "attention output": [b.attn.at_output for b in blocks],  # what o reads
        "ffn input": [b.ffn.at_input for b in blocks],  # what gate and up read
        "ffn hidden": [b.ffn.at_hidden for b in blocks],  # what down reads
        "final norm": [model.norm],
    }


def published_states(model: Transformer) -> list:
    """The states the paper's script averages: Hugging Face's hidden_states, where the last block's raw output is
    missing and the output of the final norm stands in its place."""
    return [model.at_embed, *model.blocks[:-1], model.norm]


class Hooked:
    """A context in which the hooks of attach() are active. Compiled blocks run past hooks, so all runs eagerly."""

    def __enter__(self):
        self.handles = self.attach()
        self.eager = torch.compiler.set_stance("force_eager")
        self.eager.__enter__()
        return self

    def __exit__(self, *error):
        self.eager.__exit__(*error)
        for handle in self.handles:
            handle.remove()


class Watch(Hooked):
    """While active, sums a statistic of the outputs of `modules` over all tokens that pass; keeps no activations.

    Args:
        modules: M modules whose outputs are [B, T, C].
        statistic: [B, T, C] -> [B, T].
        extremes: also note, per module, the largest |x|, where it was, and its ratio to the median |x| of its sequence.
    """

    def __init__(self, model, modules, statistic=excess_kurtosis, extremes=False):
        self.model, self.modules, self.statistic, self.extremes = model, list(modules), statistic, extremes
        self.sums = [0.0] * len(self.modules)
        self.tokens_seen = 0
        self.largest = [dict(value=0.0, ratio=0.0)] * len(self.modules)

    def attach(self):
        modules = enumerate(self.modules)
        handles = [module.register_forward_hook(functools.partial(self._add, i)) for i, module in modules]
        return [self.model.register_forward_pre_hook(self._remember_tokens), *handles]

    def _remember_tokens(self, model, inputs):
        self.tokens = inputs[0]
        self.tokens_seen += self.tokens.numel()

    def _add(self, i, module, inputs, x):
        self.sums[i] += self.statistic(x).sum()  # stays on the device: no waiting
        if self.extremes:
            a = x.abs().flatten(1).float()  # [B, T C]
            biggest, at = a.max(dim=1)  # [B]
            b = int(biggest.argmax())
            if biggest[b] > self.largest[i]["value"]:  # a record is rare, and a median of millions slow
                position, channel = divmod(int(at[b]), x.shape[-1])
                ratio = biggest[b] / a[b].median().clamp(min=1e-30)
                self.largest[i] = dict(value=biggest[b].item(), ratio=ratio.item(), position=position,
                                       channel=channel, token=int(self.tokens[b, position]))

    def means(self) -> torch.Tensor:
        """Mean of the statistic over tokens, [M], on the CPU."""
        return torch.stack([torch.as_tensor(s) for s in self.sums]).cpu() / max(self.tokens_seen, 1)


# ---------------------------------------------------------------------------------------------------------------------
# Loss and activations


class TextBlocks:
    """A text as evaluation windows, as WikiText-2 perplexity is measured: non-overlapping blocks of `block` tokens,
    each scored on its block - 1 next tokens; the tail that fills no block is dropped, nothing is put in front.

    Has what mean_loss needs of a Dataset. Raises ValueError if the text is shorter than one block.
    """

    def __init__(self, text: str, encoding, block: int):
        ids = encode(encoding, text)
        self.n_windows = len(ids) // block
        if not self.n_windows:
            raise ValueError(f"the text has {len(ids):,} tokens, fewer than one block of {block:,}")
        self.blocks = ids[: self.n_windows * block].reshape(self.n_windows, block)
        self.meta = {"bytes_per_token": len(text.encode("utf-8")) / len(ids)}

    def windows(self, index):
        return self.blocks[index]

    def evaluation_windows(self, n: int):
        return spread(n, self.n_windows)


@torch.no_grad()
def mean_loss(model, dataset, numbers, batch_size: int, autocast, progress=False) -> torch.Tensor:
    """Mean loss in nats per token over the windows with these numbers; 0 for none. Draws no random number."""
    device, was_training = next(model.parameters()).device, model.training
    total = torch.zeros((), device=device)
    starts = range(0, len(numbers), batch_size)
    model.eval()
    for i in tqdm(starts, "evaluate", leave=False, disable=None if progress else True):
        window = torch.from_numpy(dataset.windows(numbers[i : i + batch_size])).to(device)
        with autocast:
            total += model(window[:, :-1], window[:, 1:]) * len(window)
    model.train(was_training)
    return total / max(len(numbers), 1)


def perplexity(loss: float) -> float:
    return math.exp(min(loss, 700))  # e^710 is more than a float can hold


def loss_and_kurtosis(loss: float, per_layer: list[float], config, bytes_per_token) -> dict:
    """The keys that every evaluation shares."""
    return {
        "val_loss": loss,
        "bits_per_byte": loss / math.log(2) / bytes_per_token if bytes_per_token else None,
        "kurtosis": sum(per_layer) / len(per_layer),
        "kurtosis_floor": gaussian_floor(config.n_embd),
        "kurtosis_per_layer": per_layer,
    }


def evaluate(model, dataset, n_windows: int, batch_size: int, autocast, rank: int = 0, world: int = 1) -> dict:
    """The evaluation during training: loss and kurtosis of the residual stream on n_windows fixed windows.

    The windows are shared among `world` ranks. The result does not depend on batch_size or world beyond rounding.
    """
    numbers = dataset.evaluation_windows(n_windows)
    mine = numbers[rank::world]
    with Watch(model, sites(model)["residual stream"]) as watch:
        loss = mean_loss(model, dataset, mine, batch_size, autocast)
    totals = torch.cat([loss[None], watch.means().to(loss.device)]) * (len(mine) / len(numbers))
    if world > 1:
        dist.all_reduce(totals)
    loss, *per_layer = totals.tolist()
    return loss_and_kurtosis(loss, per_layer, model.config, dataset.meta["bytes_per_token"])


def measure(model, dataset, batch_size: int, autocast) -> dict:
    """Everything in one pass over the whole split: what evaluate gives, and perplexity,
    `sites` (kurtosis per layer and floor, per site) and `largest` (per state of the residual stream, see Watch).
    """
    config = model.config
    width = {"ffn hidden": config.n_ffn, "attention output": config.n_head * config.head_dim}
    with ExitStack() as stack:
        watches = {
            name: stack.enter_context(Watch(model, modules, extremes=name == "residual stream"))
            for name, modules in sites(model).items()
        }
        loss = mean_loss(model, dataset, np.arange(dataset.n_windows), batch_size, autocast, progress=True).item()
    stream = watches["residual stream"]
    result = loss_and_kurtosis(loss, stream.means().tolist(), config, dataset.meta["bytes_per_token"])
    per_site = {
        name: dict(kurtosis=watch.means().tolist(), floor=gaussian_floor(width.get(name, config.n_embd)))
        for name, watch in watches.items()
    }
    return dict(result, perplexity=perplexity(loss), tokens=stream.tokens_seen, sites=per_site, largest=stream.largest)


@torch.no_grad()
def kurtosis_as_published(model, dataset, autocast, n_tokens: int = 16384) -> dict:
    """The paper's kurtosis, for comparison with its numbers: every token alone, as a sequence of length 1, so at
    position 0 and without context; published_kurtosis over published_states; its floor beside it.

    (Official implementation: evaluate_kurtosis.py, line 35: `seq.unsqueeze(1)` turns 2048 tokens into 2048 sequences.
    Its text is C4, ours the validation text: in bytes only some 64 different tokens, weighted by how often they come.)
    """
    n = max(1, n_tokens // dataset.windows(np.array([0])).shape[1])
    tokens = torch.from_numpy(dataset.windows(dataset.evaluation_windows(n)).reshape(-1, 1))  # [tokens, 1]
    device = next(model.parameters()).device
    with Watch(model, published_states(model), published_kurtosis) as watch:
        for part in tokens.split(1024):
            with autocast:
                model(part.to(device))
    return {
        "kurtosis_as_published": watch.means().mean().item(),
        "kurtosis_as_published_floor": published_floor(model.config.n_embd),
    }


# ---------------------------------------------------------------------------------------------------------------------
# Attention sinks


class SinkWatch(Hooked):
    """While active, measures per layer and head how much attention later tokens give to the first one.

    share [H] is that attention; inside [H] the mean logit q.k / sqrt(d) on the first token, outside [H] on the other
    tokens that may be seen. `histogram` (a (layer, head) pair) also counts that head's logits, inside and outside, in
    `bins`. Both come from Q and K as they meet, so the attention itself stays untouched.
    """

    bins = torch.linspace(-20, 20, 161)

    def __init__(self, model, histogram=None):
        self.blocks, self.histogram = model.blocks, histogram
        self.sums = [0.0] * len(model.blocks)  # each [3, H]
        self.counts = torch.zeros(2, len(self.bins) - 1)
        self.sequences = 0

    def attach(self):
        handles = [block.attn.at_q.register_forward_hook(self._keep_q) for block in self.blocks]
        for i, block in enumerate(self.blocks):
            handles.append(block.attn.at_k.register_forward_hook(functools.partial(self._add, i)))
        return handles

    def _keep_q(self, module, inputs, q):
        self.q = q

    def _add(self, i, module, inputs, k):
        B, H, T, d = self.q.shape
        k = k.repeat_interleave(H // k.shape[1], dim=1)
        with torch.autocast(k.device.type, enabled=False):  # it would take the product in bf16
            logits = self.q.float() @ k.float().mT / math.sqrt(d)  # [B, H, T, T]
        hidden = torch.ones(T, T, dtype=torch.bool, device=k.device).triu(1)
        attention = logits.masked_fill(hidden, -math.inf).softmax(dim=-1)
        others = ~hidden[1:, 1:]  # token t >= 1 looking at tokens 1 ... t
        inside, outside = logits[:, :, 1:, 0], logits[:, :, 1:, 1:][:, :, others]  # [B, H, T-1], [B, H, T(T-1)/2]
        means = [attention[:, :, 1:, 0].mean(dim=(0, 2)), inside.mean(dim=(0, 2)), outside.mean(dim=(0, 2))]
        self.sums[i] += B * torch.stack(means)
        self.sequences += B if i == 0 else 0
        if self.histogram and self.histogram[0] == i:
            for row, values in enumerate((inside, outside)):
                self.counts[row] += torch.histc(values[:, self.histogram[1]], len(self.bins) - 1, -20, 20).cpu()

    def result(self) -> dict:
        share, inside, outside = (torch.stack(self.sums).cpu() / self.sequences).unbind(dim=1)  # each [L, H]
        return dict(share=share.tolist(), inside=inside.tolist(), outside=outside.tolist())


@torch.no_grad()
def attention_sinks(model, dataset, autocast, n_windows: int = 32, histogram=None) -> dict:
    """SinkWatch over n_windows: share, inside, outside, [L][H] each; `uniform`, the share if attention were even; and,
    if `histogram` names a (layer, head), `counts` [2, bins] of its logits."""
    device = next(model.parameters()).device
    windows = torch.from_numpy(dataset.windows(dataset.evaluation_windows(n_windows))).to(device)
    with SinkWatch(model, histogram) as watch:
        for window in windows.split(1):  # one at a time: T x T logits of all heads are large
            with autocast:
                model(window[:, :-1])
    T = windows.shape[1] - 1
    result = dict(watch.result(), uniform=sum(1 / (t + 1) for t in range(1, T)) / (T - 1))
    return dict(result, counts=watch.counts.tolist()) if histogram else result


# ---------------------------------------------------------------------------------------------------------------------
# Sampling


@torch.no_grad()
def generate(model, tokens, n: int, window: int, temperature=1.0, top_k=None, seed=0, use_cache=True, n_vocab=None):
    """Yield n tokens that continue `tokens` (a list of ids, not empty), all smaller than n_vocab: a model may have more
    rows than its tokenizer has ids.

    temperature 0 takes the likeliest token (greedy). top_k draws from the k likeliest only. When `window` tokens are
    full, the older half is forgotten, since the model has never seen longer sequences. The cache changes no result.
    """
    device = next(model.parameters()).device
    generator = torch.Generator(device).manual_seed(seed)
    context, cache, unread = tokens[-window:], model.new_cache(), None
    for _ in range(n):
        if len(context) >= window:
            context, cache, unread = context[-(window // 2) :], model.new_cache(), None
        fresh = context if unread is None or not use_cache else unread
        logits = model(torch.tensor([fresh], device=device), cache=cache if use_cache else None)[0, -1, :n_vocab]
        if not logits.isfinite().all():
            raise ArithmeticError("the model's logits are not finite: there is nothing to draw from")
        if temperature == 0:
            token = int(logits.argmax())
        else:
            if top_k:
                logits[logits < logits.topk(min(top_k, len(logits))).values[-1]] = -math.inf
            token = int(torch.multinomial((logits / temperature).softmax(dim=-1), 1, generator=generator))
        context, unread = [*context, token], [token]
        yield token


# ---------------------------------------------------------------------------------------------------------------------
# Targets: anything that holds a model


@dataclass
class Target:
    """A model on disk and what is known of it."""

    name: str
    path: Path
    model: Transformer
    encoding: object  # tiktoken.Encoding
    seq_len: int  # the length it was trained on
    options: dict  # how it was trained

    def label(self) -> str:
        """What is on, in words: "Adam", "Muon + SSNorm", "OSP", "OSP, gptq 4-4-4"."""
        made = getattr(self.model, "quantization", None)
        return configuration_label(self.options) + (f", {made['method']} {made['bits']}" if made else "")

    def dataset(self) -> Dataset:
        """The validation split of the data it was trained on. Raises ValueError for a model from elsewhere."""
        if "data" not in self.options:
            raise ValueError(f"{self.path} is a Hugging Face model, which brings no text: name one with --text FILE")
        return Dataset(find_dataset(self.options["data"]), "val", self.seq_len)


OPTIMIZERS = {"adam": "Adam", "muon": "Muon", "muon-only": "Muon-only"}


def configuration_label(options: dict) -> str:
    if "imported" in options:
        return "LLaMA"
    parts = [OPTIMIZERS[options["optimizer"]]]
    parts += ["SSNorm"] * (options["norm"] == "ss") + ["EmbProj"] * bool(options["embproj"])
    return "OSP" if parts == ["Muon", "SSNorm", "EmbProj"] else " + ".join(parts)


def check_known(options: dict, data: dict, path):
    """Raise ValueError, naming `path`, unless a file says of its model what we need to know."""
    needed = {"imported"} if "imported" in options else {"optimizer", "norm", "embproj", "data", "seed"}
    missing = (needed | {"seq_len"}) - options.keys() | {"tokenizer"} - data.keys()
    if missing:
        raise ValueError(f"{path} does not say {', '.join(sorted(missing))}: train.py or quantize.py would have")
    sensible = type(options["seq_len"]) is int and options["seq_len"] > 0 and isinstance(data["tokenizer"], str)
    sensible = sensible and options.get("optimizer", "adam") in OPTIMIZERS
    if not sensible or data["tokenizer"] == TOKENIZER_JSON and not isinstance(data.get("tokenizer_json"), str):
        raise ValueError(f"{path} says impossible things of its training or its tokenizer: it is damaged")


def load_target(path: str, device: str, int4: bool = False) -> Target:
    """What quantize.load_model finds at `path`, with what is known of it. Raises what that does, and ValueError."""
    path = Path(path)
    model, options, data, _ = load_model(path, device, int4)
    if int4 and not hasattr(model, "quantization"):
        raise ValueError(f"{path} is not quantized: --int4 is for files of quantize.py --out")
    check_known(options, data, path)
    name = path.resolve().name if path.is_dir() else path.stem
    return Target(name, path, model.requires_grad_(False), tokenizer_of(data), options["seq_len"], options)


# ---------------------------------------------------------------------------------------------------------------------
# Output


def strongest_sink(sinks: dict) -> tuple[int, int]:
    """(layer, head) of the largest share."""
    return max((share, i, j) for i, heads in enumerate(sinks["share"]) for j, share in enumerate(heads))[1:]


def n_sinks(sinks: dict) -> int:
    """Heads that give the first token more than 30 % of their attention (the threshold of Gu et al. 2025)."""
    return sum(share > 0.3 for heads in sinks["share"] for share in heads)


def strongest_state(largest: list[dict]) -> int:
    """Which state of the residual stream has the activation that stands out most."""
    return max(range(len(largest)), key=lambda i: largest[i]["ratio"])


def describe(target: Target, r: dict) -> str:
    """A measurement in words, and kurtosis per layer and site as a table."""
    state = strongest_state(r["largest"])
    top, sinks = r["largest"][state], r["sinks"]
    layer, head = strongest_sink(sinks)
    share, inside, outside = (sinks[name][layer][head] for name in ("share", "inside", "outside"))
    even, bits = sinks["uniform"], f", {r['bits_per_byte']:.4f} bits per byte" if r["bits_per_byte"] else ""
    where = "embedding output" if state == 0 else f"output of block {state}"
    token = target.encoding.decode([top["token"]])
    lines = [
        f"{target.name} ({target.label()})",
        f"  loss             {r['val_loss']:.4f} nats per token, perplexity {r['perplexity']:.6g}{bits}",
        f"  excess kurtosis  {r['kurtosis']:.3f} (Gaussian {r['kurtosis_floor']:.3f}), mean over the residual stream",
        f"  stands out most  |x| = {top['value']:.1f}, {top['ratio']:.0f} times the median of its sequence: {where}, "
        f"channel {top['channel']}, position {top['position']}, token {token!r}",
        f"  attention sinks  {n_sinks(sinks)} heads give the first token over 30 % (even attention gives {even:.1%});",
        f"                   most, {share:.1%}, block {layer + 1} head {head + 1}, with a mean logit of {inside:.2f} "
        f"on it and {outside:.2f} on others",
        f"  measured         {r['tokens']:,} tokens at {r['tokens_per_s']:,.0f} tokens/s, "
        f"peak memory {r['peak_memory_gib']:.2f} GiB",
    ]
    if "kurtosis_as_published" in r:
        floor = r["kurtosis_as_published_floor"]
        lines.insert(3, f"  ... as published {r['kurtosis_as_published']:.3f} (Gaussian {floor:.3f}): "
                        "single tokens without context, uncentred, negatives cut off")
    lines.append("  excess kurtosis by site" + "".join(f"{name:>18}" for name in r["sites"]))
    first = r["sites"]["residual stream"]["kurtosis"][0]
    lines.append(f"  {'embedding output':<23}{first:>18.2f}")
    for i in range(len(r["kurtosis_per_layer"]) - 1):
        last = i == len(r["kurtosis_per_layer"]) - 2
        columns = {name: site["kurtosis"] for name, site in r["sites"].items()}
        columns["residual stream"] = columns["residual stream"][1:]
        columns["final norm"] = [None] * i + columns["final norm"] if last else [None] * (i + 1)
        cells = "".join(f"{'' if values[i] is None else format(values[i], '.2f'):>18}" for values in columns.values())
        lines.append(f"  {'block ' + str(i + 1):<23}{cells}")
    floors = {name: f"{site['floor']:.3f}" for name, site in r["sites"].items()}
    floors["ffn hidden"] = "-"  # a product of two numbers, never Gaussian, even at the start
    lines.append(f"  {'Gaussian':<23}" + "".join(f"{floor:>18}" for floor in floors.values()))
    return "\n".join(lines)


def comparison(rows: list[dict]) -> str:
    """One line a target. |x| is the activation that stands out most from the median of its sequence."""
    head = f"{'target':<32}{'loss':>8}{'ppl':>9}{'bits/byte':>10}{'kurtosis':>10}{'Gaussian':>9}"
    published = "kurtosis_as_published" in rows[0]
    lines = [head + f"{'as publ.':>9}{'Gaussian':>9}" * published + f"{'|x|':>9}{'/ median':>9}{'sinks':>6}"]
    for r in rows:
        top = r["largest"][strongest_state(r["largest"])]
        bits = f"{r['bits_per_byte']:.4f}" if r["bits_per_byte"] else "-"
        line = f"{r['target']:<32}{r['val_loss']:>8.4f}{r['perplexity']:>9.5g}{bits:>10}"
        line += f"{r['kurtosis']:>10.3f}{r['kurtosis_floor']:>9.3f}"
        if published:
            line += f"{r['kurtosis_as_published']:>9.3f}{r['kurtosis_as_published_floor']:>9.3f}"
        lines.append(line + f"{top['value']:>9.1f}{top['ratio']:>9.0f}{n_sinks(r['sinks']):>6}")
    return "\n".join(lines)


def quantized_table(rows: list[dict]) -> str:
    """For one bit setting the paper's Table 4: a line a method, a column a target. For several its Table 2: a line a
    target and method, a column a setting."""
    settings = list(rows[0]["quantized"])
    methods = list(rows[0]["quantized"][settings[0]])
    if len(settings) == 1:
        lines = [f"{'loss at ' + settings[0]:<16}" + "".join(f"{r['target'][:26]:>28}" for r in rows),
                 f"{'not quantized':<16}" + "".join(f"{r['val_loss']:>18.4f}{'':>10}" for r in rows)]
        for method in methods:
            results = [r["quantized"][settings[0]][method] for r in rows]
            cells = "".join(f"{x['val_loss']:>18.4f} ({x['added']:+.4f})"[:28].rjust(28) for x in results)
            lines.append(f"{'' if method == 'rtn' else '+ '}{method:<14}".ljust(16) + cells)
        return "\n".join(lines)
    lines = []
    for start in range(0, len(settings), 6):  # what fits beside each other
        part = settings[start : start + 6]
        head = f"{'loss added by W-A-KV bits':<44}{'exact':>8}" + "".join(f"{each:>10}" for each in part)
        lines += [""] * (start > 0) + [head]
        for r in rows:
            for method in methods:
                cells = "".join(f"{r['quantized'][each][method]['added']:>+10.4f}" for each in part)
                lines.append(f"{r['target']:<34}{method:<10}{r['val_loss']:>8.4f}{cells}")
    return "\n".join(lines)


def all_scores(rows: list[dict]) -> str:
    """The benchmarks of every target, and of its quantized models below it."""
    scores = []
    for r in rows:
        scores.append((r["target"], r))
        for bits, methods in r.get("quantized", {}).items():
            scores += [(f"{r['target'][:24]} {bits} {method}", q) for method, q in methods.items()]
    return tasks_table(scores)


# ---------------------------------------------------------------------------------------------------------------------
# All there is to measure of a target


def measure_target(target: Target, dataset, batch_size: int, autocast, as_published: bool) -> dict:
    """All of the above for one target."""
    began = time.perf_counter()
    result = measure(target.model, dataset, batch_size, autocast)
    result["tokens_per_s"] = result["tokens"] / (time.perf_counter() - began)
    result["peak_memory_gib"] = peak_memory_gib(str(next(target.model.parameters()).device))
    if as_published:
        result |= kurtosis_as_published(target.model, dataset, autocast)
    sinks = attention_sinks(target.model, dataset, autocast)
    return dict(target=target.name, label=target.label(), **result, sinks=sinks)


def calibrations(target, methods, file=None) -> dict:
    """What each method calibrates on. Raises ValueError if the target cannot be quantized by one of them."""
    if hasattr(target.model, "quantization"):
        raise ValueError(f"{target.path} is quantized already: start from the model that was trained")
    found = {method: calibration_windows(target.options, target.encoding, method, file=file) for method in methods}
    for method, windows in found.items():
        if windows is None and includes(method, "gptq"):
            raise ValueError(f"{method} needs text to calibrate on, and {target.path} has none: use --calib FILE")
    return found


def measure_quantized(target, dataset, batch_size, autocast, exact, bits, calibration, args=None, tasks=()) -> dict:
    """Per bit setting and method: the quantized model's loss on `dataset`, and how much that adds to the `exact` loss,
    unless the dataset is None; and its scores on `tasks`, if there are any. `args`: with quantize.py's switches."""
    results = {each: {} for each in bits}
    for method, windows in tqdm(calibration.items(), f"quantize {target.name}", leave=False, disable=None):
        for each in bits:
            model = quantize(target.model, each, method, windows, **switches(args, method) if args else {})
            result = results[each][method] = {}
            if dataset is not None:
                numbers = np.arange(dataset.n_windows)
                loss = mean_loss(model, dataset, numbers, batch_size, autocast, progress=True).item()
                result |= dict(val_loss=loss, perplexity=perplexity(loss), added=loss - exact)
            if tasks:
                result |= score_tasks(model, target.encoding, tasks, target.seq_len, batch_size, autocast)
    return results


# ---------------------------------------------------------------------------------------------------------------------
# The command line


def write(target: Target, args) -> str:
    """Continue args.prompt; prints as it goes unless --json. With --dtype bfloat16, weights are bfloat16 too: reading
    them is what takes the time."""
    if args.dtype == "bfloat16":
        target.model.bfloat16()
    prompt = target.encoding.encode_ordinary(args.prompt)
    if not prompt:
        raise ValueError("--prompt is empty")
    drawn, shown, began = [], "", time.perf_counter()
    how = args.tokens, target.seq_len, args.temperature, args.top_k, args.seed
    for token in generate(target.model, prompt, *how, n_vocab=target.encoding.n_vocab):
        drawn.append(token)
        text = target.encoding.decode([*prompt, *drawn])
        if not args.json and not text.endswith("\ufffd"):  # half of a character: wait for the rest
            print(text[len(shown) :], end="", flush=True)
            shown = text
    seconds = time.perf_counter() - began
    if not args.json:
        print(flush=True)
        print(f"{len(drawn)} tokens at {len(drawn) / seconds:,.1f} tokens/s, peak memory "
              f"{peak_memory_gib(args.device):.2f} GiB", file=sys.stderr)
    return target.encoding.decode([*prompt, *drawn])


SWEEP = [f"{w}-16-16" for w in range(8, 2, -1)] + [f"16-{a}-16" for a in range(8, 3, -1)]  # the paper's Figure 4


def build_parser() -> Parser:
    p = Parser(__doc__)
    p.add_argument("targets", nargs="+", metavar="TARGET", help="a run directory, a checkpoint, a quantized file or a "
                   "Hugging Face LLaMA directory")
    add = p.add_argument_group("measuring").add_argument
    add("--text", type=Path, metavar="FILE", help="measure on this text instead of the run's validation split")
    add("--tasks", nargs="+", metavar="PATH", help="score on these task files, or folders of them, made by python "
        "data/benchmarks.py; no text is measured then, unless --text names one")
    add("--seq-len", type=int, help="with --text: tokens a block (default: the length the model was trained on)")
    add("--as-published", action="store_true", help="also the kurtosis of the paper's script (tokens without context)")
    add("--batch-size", type=int, help="sequences at once; changes speed and memory, not results")
    add("--plot", type=Path, metavar="DIR", help="write figures there (pip install -r requirements-extra.txt)")
    add = p.add_argument_group("quantizing").add_argument
    add("--bits", metavar="W-A-KV,...", help="also the loss with these bits of weights, activations, and keys and "
        "values: each 2 to 8 or 16, as 4-4-4 or 16-16-16,4-8-16,4-8-8,4-4-16,4-4-4")
    add("--sweep", action="store_true", help="for --bits: weights of 8 to 3 bits, then activations of 8 to 4, the rest "
        "left alone (the paper's Figure 4; --plot draws it)")
    add("--methods", help=f"with --bits: some of {','.join(METHODS)} (default: rtn,had)")
    add("--calib", type=Path, metavar="FILE", help="with --bits: text to calibrate on (default: the training split)")
    add_switches(add)
    add("--int4", action="store_true", help="compute with the packed weights of a four-bit file (CUDA; not bit-equal)")
    add = p.add_argument_group("writing").add_argument
    add("--prompt", help="let the model continue this text instead of measuring it")
    add("--tokens", type=int, default=400, help="how many tokens to write (default: 400)")
    add("--temperature", type=float, default=0.8, help="0 is greedy, 1 samples as trained (default: 0.8)")
    add("--top-k", type=int, help="draw from the k likeliest tokens only")
    add("--seed", type=int, default=0, help="another seed draws another text")
    add = p.add_argument_group("the machine").add_argument
    add("--device", choices=["cuda", "mps", "cpu"], help="default: the first of these that is there")
    add("--dtype", choices=["float32", "bfloat16"], help="of matrix products (default: bfloat16 on CUDA)")
    add("--json", action="store_true", help="one JSON list on stdout, everything else on stderr")
    return p


def check(args, error):
    """Call error(message) for the first option that cannot be, or that would do nothing."""
    measuring = ("text", "tasks", "as_published", "plot", "bits", "sweep")
    if args.prompt is not None and (useless := [name for name in measuring if getattr(args, name)]):
        error(f"--prompt writes instead of measuring: leave out --{useless[0].replace('_', '-')}")
    if args.seq_len and not args.text:
        error("--seq-len goes with --text; a run's own validation text is cut as in its training")
    if args.tasks and not args.text and (args.plot or args.as_published):
        error("--tasks measures no text: with --plot or --as-published, name one with --text")
    for name in ("methods", "calib", *SWITCHES):
        if getattr(args, name) and not (args.bits or args.sweep):
            error(f"--{name.replace('_', '-')} is for quantizing: say how, with --bits 4-4-4")
    least = dict(tokens=1, temperature=0, top_k=1, batch_size=1, seq_len=3, w_group=0, seed=0)
    for name, low in least.items():
        value = getattr(args, name)
        if value is not None and not low <= value < 2**63:
            error(f"--{name.replace('_', '-')} must be at least {low}, not {value}")
    check_quantization(args, error)


def check_quantization(args, error):
    """Cut --bits and --methods at their commas. One that cannot be goes to error(message)."""
    if args.sweep and args.bits:
        error("--sweep chooses the bits itself: leave out --bits")
    args.bits = args.bits.split(",") if args.bits else SWEEP * args.sweep
    args.methods = (args.methods or "rtn,had").split(",")
    if args.center_embed and not any(includes(method, "quarot") for method in args.methods if method in METHODS):
        error("--center-embed is for --methods quarot and spinquant")
    try:
        for bits in args.bits:
            parse_bits(bits)
    except ValueError as wrong:
        error(f"--bits: {wrong}")
    for method in args.methods:
        if method not in METHODS:
            error(f"--methods {method!r}: use some of {','.join(METHODS)}")


def main(argv=None):
    parser = build_parser()
    args = parser.parse(argv)
    check(args, parser.error)
    args.device = pick_device(args.device, parser.error)
    args.dtype = args.dtype or ("bfloat16" if args.device == "cuda" else "float32")
    autocast = precision(args.device, args.dtype)
    try:
        plot = None
        if args.plot:
            from tools import plot  # fails before the work, not after it
            args.plot.mkdir(parents=True, exist_ok=True)
        text = read_text(args.text) if args.text else None
        for path in args.targets:
            if not Path(path).exists():
                raise FileNotFoundError(f"there is nothing at {path}")
        tasks = read_tasks(args.tasks) if args.tasks else []
        rows, pictures = [], []
        for path in args.targets:
            target = load_target(path, args.device, args.int4)
            if args.prompt is not None:
                with autocast:
                    rows.append(dict(target=target.name, text=write(target, args)))
                continue
            block, dataset = args.seq_len or target.seq_len, None
            if text is not None or not tasks:
                dataset = target.dataset() if text is None else TextBlocks(text, target.encoding, block)
            batch_size, calibration = args.batch_size or max(1, 4096 // block), {}
            if args.bits:  # what is wrong with them shows before the hours of measuring
                calibration = calibrations(target, args.methods, args.calib)
            row, out = dict(target=target.name, label=target.label()), sys.stderr if args.json else sys.stdout
            if dataset is not None:
                row = measure_target(target, dataset, batch_size, autocast, args.as_published)
                print(describe(target, row), end="\n\n", file=out, flush=True)
            if tasks:
                row |= score_tasks(target.model, target.encoding, tasks, target.seq_len, batch_size, autocast)
                print(describe_tasks(f"{target.name} ({target.label()})", row), end="\n\n", file=out, flush=True)
            if args.bits:
                exact = row.get("val_loss")
                row["quantized"] = measure_quantized(
                    target, dataset, batch_size, autocast, exact, args.bits, calibration, args, tasks)
            rows.append(row)
            if plot:
                pictures.append(plot.Picture.of(target, rows[-1], dataset, autocast))
        if plot and pictures:
            for path in plot.draw_all(pictures, args.plot):
                print(f"wrote {path}", file=sys.stderr)
        if args.json:
            rows = json.loads(json.dumps(rows), parse_constant=lambda name: None)  # NaN is not JSON; null is
            print(json.dumps(rows))
        elif args.prompt is None:
            tables = []
            if "val_loss" in rows[0]:
                tables += [comparison(rows)] * (len(rows) > 1) + ([quantized_table(rows)] if args.bits else [])
            if tasks:
                tables.append(all_scores(rows))
            print("\n\n".join(tables), end="\n" if tables else "")
    except BrokenPipeError:
        raise
    except (ValueError, OSError, ImportError, ArithmeticError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    run(main)
