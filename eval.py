"""What a model is worth and how its activations look. This measures anything and changes nothing.

    python eval.py runs/A runs/B                loss, kurtosis, outliers, sinks; what 4 bits add
    python eval.py runs/A --as-published        also the kurtosis of the paper's own script
    python eval.py runs/A --text FILE           loss and perplexity on any text
    python eval.py runs/A runs/B --bits 4-4-4 --methods rtn,had,gptq,quarot,spinquant
                                                what 4 bits cost (quantize.py)
    python eval.py runs/A --tasks osp           score it on benchmarks (needs lm_eval)
    python eval.py runs/A --prompt "ROMEO:"     let it write
    python eval.py runs/A runs/B --plot DIR     figures (needs matplotlib)

Excess kurtosis (eq. 4) asks how far a token's D activations are from a Gaussian:
E[((x - mean) / std)^4] - 3. It is about 0 for Gaussian values. It is about D - 5 if one channel
holds everything: the outliers that 4 bits cannot afford. We take it over the channels of one token,
centred, and average over all tokens of whole sequences. The headline is the mean over the states of
the residual stream: the embedding's output and the output of every block.

Words used here: a *site* is a place in every layer whose values we look at, a *state* is the
residual stream before or after a block, a *window* is a sequence of tokens to evaluate on, and the
*floor* is what Gaussian vectors measure. B, T, D, H, V are as in model.py; L is n_layer.

Read it top to bottom: statistics of vectors, watching a model, evaluation, attention sinks, 4 bits.
The command line, its tables and figures, and what lets a model write are in tools/.
"""

import functools
import math

from nanoosp.options import door

door(__name__, "tools.evaluate")  # python eval.py: before torch, which takes seconds

import torch
from tqdm import tqdm

from model import Transformer, hooked
from nanoosp.batches import windows_at_once

# Statistics of vectors: [..., D] -> [...]


def excess_kurtosis(x):
    """Excess kurtosis over the last axis, in fp32. A constant vector counts as 0."""
    x = x.float()
    x = x / x.abs().amax(dim=-1, keepdim=True).clamp(min=1e-30)  # else fourth powers may overflow
    x = x - x.mean(dim=-1, keepdim=True)
    variance = x.square().mean(dim=-1)
    fourth = x.pow(4).mean(dim=-1) / variance.square().clamp(min=1e-24)
    return fourth - 3 * (variance > 1e-12)  # 0 - 0 for a constant


def gaussian_floor(dim: int) -> float:
    """What excess_kurtosis gives on average for `dim` independent Gaussian numbers: not quite 0.

    (Exact: for a Gaussian sample of n, m4 / m2^2 has the expectation 3 (n - 1) / (n + 1).)
    """
    return -6 / (dim + 1)


def published_kurtosis(x):
    """The estimator of the paper's script (evaluate_kurtosis.py, line 38). The fourth moment is not
    centred, but the standard deviation is. Negative results become 0."""
    x = x.float()
    return (x.pow(4).mean(dim=-1) / x.std(dim=-1).pow(4).clamp(min=1e-30) - 3).relu()


@functools.lru_cache
def published_floor(dim: int) -> float:
    """What published_kurtosis gives for Gaussian vectors, by simulation: 0.042 for dim = 2048."""
    x = torch.randn(8192, dim, generator=torch.Generator().manual_seed(0))
    return published_kurtosis(x).mean().item()


# Watching a model


def sites(model: Transformer) -> dict[str, list]:
    """The places we look at: for each a list of modules, one per layer, whose outputs count."""
    blocks = model.blocks
    return {
        "residual stream": [model.at_embed, *blocks],  # embedding output, then every block's output
        "attention input": [b.attn.at_input for b in blocks],  # what q, k and v read
        "attention output": [b.attn.at_output for b in blocks],  # what o reads
        "ffn input": [b.ffn.at_input for b in blocks],  # what gate and up read
        "ffn hidden": [b.ffn.at_hidden for b in blocks],  # what down reads
        "final norm": [model.norm],
    }


class Watch:
    """While open, sums a statistic of the outputs of `modules` over all tokens that pass. Keeps no
    activations.

    Args:
        modules: a list of M modules whose outputs are [B, T, C].
        statistic: [B, T, C] -> [B, T].
        extremes: also note, per module, the largest |x|, where it was, and its ratio to the median
            |x| of its sequence.
    """

    def __init__(self, model, modules, statistic=excess_kurtosis, extremes=False):
        self.statistic = statistic
        self.extremes = extremes
        self.sums = [0.0] * len(modules)
        self.tokens_seen = 0
        nothing = dict(value=0.0, ratio=0.0, position=0, channel=0, token=0)
        self.largest = [nothing] * len(modules)  # stays so where activations are NaN: no NaN > 0
        hooks = [(module, functools.partial(self._add, i)) for i, module in enumerate(modules)]
        self.hooks = hooked([(model.embed, self._remember_tokens), *hooks])

    def __enter__(self):
        self.hooks.__enter__()
        return self

    def __exit__(self, *error):
        self.hooks.__exit__(*error)

    def _remember_tokens(self, embed, inputs, x):
        self.tokens = inputs[0]  # [B, T]
        self.tokens_seen += self.tokens.numel()

    def _add(self, i, module, inputs, x):
        self.width = x.shape[-1]  # C
        self.sums[i] += self.statistic(x).sum()  # stays on the device: no waiting
        if self.extremes:
            self._compare_largest(i, x)

    def _compare_largest(self, i, x):
        a = x.abs().flatten(1).float()  # [B, T C]
        maxima, places = a.max(dim=1)  # [B]
        b = int(maxima.argmax())
        if maxima[b] > self.largest[i]["value"]:  # only then take the median, which is slow
            position, channel = divmod(int(places[b]), x.shape[-1])
            ratio = maxima[b] / a[b].median().clamp(min=1e-30)
            self.largest[i] = dict(
                value=maxima[b].item(), ratio=ratio.item(), position=position, channel=channel,
                token=int(self.tokens[b, position]))

    def means(self) -> torch.Tensor:
        """Mean of the statistic over tokens, [M], on the CPU."""
        return torch.stack([torch.as_tensor(s) for s in self.sums]).cpu() / max(self.tokens_seen, 1)


# Evaluation. `data` is a Dataset, or anything of data/dataset.py that has windows


@torch.no_grad()
def mean_loss(model, data, numbers=None, batch_size=None, progress=False) -> torch.Tensor:
    """Mean loss in nats per token over the windows with these numbers, or all; 0 for none.

    `batch_size` windows are computed at once; it does not change the result beyond rounding.
    """
    if numbers is None:
        numbers = data.evaluation_windows(data.n_windows)
    batch_size = batch_size or windows_at_once(data.seq_len)
    device = model.embed.weight.device
    was_training = model.training
    model.eval()
    total = torch.zeros((), device=device)
    starts = range(0, len(numbers), batch_size)
    for i in tqdm(starts, "evaluate", leave=False, disable=None if progress else True):
        window = torch.from_numpy(data.windows(numbers[i : i + batch_size])).to(device)
        total += model(window[:, :-1], window[:, 1:]) * len(window)
    model.train(was_training)
    return total / max(len(numbers), 1)


def perplexity(loss: float) -> float:
    return math.exp(min(loss, 700))  # e^710 is more than a float can hold


def headline(model, data, loss: float, kurtosis_per_layer: list[float]) -> dict:
    """What is logged in training: the loss, also in bits, and the kurtosis beside its floor."""
    bytes_per_token = data.meta["bytes_per_token"]
    return {
        "val_loss": loss,
        "bits_per_byte": loss / math.log(2) / bytes_per_token if bytes_per_token else None,
        "kurtosis": sum(kurtosis_per_layer) / len(kurtosis_per_layer),
        "kurtosis_floor": gaussian_floor(model.config.n_embd),
        "kurtosis_per_layer": kurtosis_per_layer,
    }


def evaluate(model, data, n_windows=None, batch_size=None, ranks=None) -> dict:
    """Loss, and kurtosis of the residual stream, on n_windows fixed windows or on all.

    `ranks` (nanoosp.ranks) may share the windows among them. The result does not depend on their
    number or on batch_size beyond rounding.
    """
    numbers = data.evaluation_windows(n_windows or data.n_windows)
    share = numbers[ranks.rank :: ranks.world] if ranks else numbers
    with Watch(model, sites(model)["residual stream"]) as watch:
        loss = mean_loss(model, data, share, batch_size)
    means = torch.cat([loss[None], watch.means().to(loss.device)])  # the loss, then L + 1 states
    if ranks:
        means = ranks.sum(means * (len(share) / len(numbers)))
    loss, *kurtosis_per_layer = means.tolist()
    return headline(model, data, loss, kurtosis_per_layer)


def published_states(model: Transformer) -> list:
    """The states that the paper's script averages: Hugging Face's hidden_states. They lack the last
    block's output and have the final norm's output instead."""
    return [model.at_embed, *model.blocks[:-1], model.norm]


@torch.no_grad()
def kurtosis_as_published(model, data, n_tokens: int = 16384) -> dict:
    """The kurtosis of the paper's script, for comparison with its numbers, and its floor.

    It takes every token alone, at position 0 and without context: evaluate_kurtosis.py, line 35,
    turns 2048 tokens into 2048 sequences. It takes 262,144 tokens of C4, we fewer of the validation
    text. With byte tokens only about 64 occur, weighted here by frequency.
    """
    n_windows = max(1, n_tokens // (data.seq_len + 1))
    windows = data.windows(data.evaluation_windows(n_windows))
    tokens = torch.from_numpy(windows.reshape(-1, 1)).to(model.embed.weight.device)  # [tokens, 1]
    with Watch(model, published_states(model), published_kurtosis) as watch:
        for part in tokens.split(1024):
            model(part)
    return {
        "kurtosis_as_published": watch.means().mean().item(),
        "kurtosis_as_published_floor": published_floor(model.config.n_embd),
    }


# Attention sinks: heads that look at the first token, whatever it is


def attention_logits(model, tokens):
    """Yield for each layer the logits q.k / sqrt(d) [B, H, T, T], those on future tokens too. q and
    k are taken where attention multiplies them."""
    kept = []  # q and k of the first layer, q and k of the second, ...
    points = [point for block in model.blocks for point in (block.attn.at_q, block.attn.at_k)]
    with hooked([(point, lambda module, inputs, x: kept.append(x)) for point in points]):
        model(tokens)
    for q, k in zip(kept[::2], kept[1::2]):
        k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)  # [B, H_kv, T, d] -> [B, H, T, d]
        yield q.float() @ k.float().mT / math.sqrt(q.shape[-1])


def inside_and_outside(logits):
    """Of the logits [B, H, T, T] of tokens t >= 1: those on token 0, [B, H, T - 1], and those on
    tokens 1 ... t, [B, H, T (T - 1) / 2]."""
    later = logits[:, :, 1:]  # [B, H, T - 1, T]
    past = torch.ones_like(later[0, 0, :, 1:], dtype=torch.bool).tril()
    return later[..., 0], later[..., 1:][:, :, past]


@torch.no_grad()
def attention_sinks(model, data, n_windows: int = 32) -> dict:
    """How much attention later tokens give to the first one, per layer and head.

    Returns `share` [L][H], that attention, and `uniform`, what it would be if attention were even.
    `inside` [L][H] is the mean logit q.k / sqrt(d) on the first token, `outside` [L][H] that on all
    others.
    """
    windows = torch.from_numpy(data.windows(data.evaluation_windows(n_windows)))
    sums = [0.0] * len(model.blocks)  # each [3, H]
    for window in windows.split(1):  # one at a time: T x T logits of all heads are large
        tokens = window[:, :-1].to(model.embed.weight.device)
        for i, logits in enumerate(attention_logits(model, tokens)):  # [1, H, T, T]
            future = torch.ones_like(logits[0, 0], dtype=torch.bool).triu(1)
            share = logits.masked_fill(future, -math.inf).softmax(dim=-1)[:, :, 1:, 0]
            means = [x.mean(dim=(0, 2)) for x in (share, *inside_and_outside(logits))]  # each [H]
            sums[i] += torch.stack(means)
    share, inside, outside = (torch.stack(sums).cpu() / len(windows)).unbind(dim=1)  # each [L, H]
    T = data.seq_len
    return dict(share=share.tolist(), inside=inside.tolist(), outside=outside.tolist(),
                uniform=sum(1 / (t + 1) for t in range(1, T)) / (T - 1))


# What bits cost


def at_four_bits(model, data, n_windows=None, batch_size=None, ranks=None) -> dict:
    """evaluate() of the model at 4-4-4: rounded to nearest, and with a Hadamard in the FFN."""
    from quantize import Recipe, quantize  # only here: training starts without it

    results = {}
    for method in ("rtn", "had"):
        quantized = quantize(model, Recipe("4-4-4", method))
        results[method] = evaluate(quantized, data, n_windows, batch_size, ranks)
    return {"4-4-4": results}
