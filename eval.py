"""What a model is worth and how its activations look. This measures anything and changes nothing.

    python eval.py runs/A runs/B                loss, kurtosis, outliers, sinks; what 4 bits add
    python eval.py runs/A --as-published        also the kurtosis of the paper's own script
    python eval.py runs/A --text FILE           loss and perplexity on any text
    python eval.py runs/A runs/B --bits 4-4-4 --methods rtn,had,gptq,quarot,spinquant
                                                what 4 bits cost (quantize.py)
    python eval.py runs/A --tasks DIR           score it on benchmarks (data/benchmarks.py)
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

Read it top to bottom: statistics of vectors, watching a model, evaluation, attention sinks, 4 bits,
writing. The command line, its tables and figures are in tools/.
"""

import functools
import math
from contextlib import ExitStack

from nanoosp.options import door

door(__name__, "tools.evaluate")  # python eval.py: before torch, which takes seconds

import torch
from tqdm import tqdm

from model import Transformer, hooked

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
        modules: M modules whose outputs are [B, T, C].
        statistic: [B, T, C] -> [B, T].
        extremes: also note, per module, the largest |x|, where it was, and its ratio to the median
            |x| of its sequence.
    """

    def __init__(self, model, modules, statistic=excess_kurtosis, extremes=False):
        self.statistic, self.extremes, self.modules = statistic, extremes, list(modules)
        hooks = [(m, functools.partial(self._add, i)) for i, m in enumerate(self.modules)]
        self.hooks = hooked([(model.embed, self._remember_tokens), *hooks])
        self.sums = [0.0] * len(self.modules)
        self.tokens_seen = 0
        nothing = dict(value=0.0, ratio=0.0, position=0, channel=0, token=0)  # NaN beats nothing
        self.largest = [nothing] * len(self.modules)

    def __enter__(self):
        self.hooks.__enter__()
        return self

    def __exit__(self, *error):
        self.hooks.__exit__(*error)

    def _remember_tokens(self, embed, inputs, x):
        self.tokens = inputs[0]  # [B, T]
        self.tokens_seen += self.tokens.numel()

    def _add(self, i, module, inputs, x):
        self.sums[i] += self.statistic(x).sum()  # stays on the device: no waiting
        if self.extremes:
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


# Evaluation. `data` is a Dataset, or anything of data/dataset.py that has windows.


@torch.no_grad()
def mean_loss(model, data, numbers=None, batch_size=None, progress=False) -> torch.Tensor:
    """Mean loss in nats per token over the windows with these numbers, or all; 0 for none.

    `batch_size` windows are computed at once; it does not change the result beyond rounding.
    """
    numbers = data.evaluation_windows(data.n_windows) if numbers is None else numbers
    n_predicted = data.windows(data.evaluation_windows(1)).shape[1] - 1  # tokens of a window
    batch_size = batch_size or max(1, 4096 // n_predicted)
    device, was_training = model.embed.weight.device, model.training
    total = torch.zeros((), device=device)
    starts = range(0, len(numbers), batch_size)
    model.eval()
    for i in tqdm(starts, "evaluate", leave=False, disable=None if progress else True):
        window = torch.from_numpy(data.windows(numbers[i : i + batch_size])).to(device)
        total += model(window[:, :-1], window[:, 1:]) * len(window)
    model.train(was_training)
    return total / max(len(numbers), 1)


def perplexity(loss: float) -> float:
    return math.exp(min(loss, 700))  # e^710 is more than a float can hold


def evaluate(model, data, n_windows=None, batch_size=None, ranks=None, everywhere=False) -> dict:
    """Loss, and kurtosis of the residual stream, on n_windows fixed windows or on all.

    `everywhere` adds perplexity, the kurtosis at all `sites`, and the `largest` activation of each
    state. Without it, `ranks` (nanoosp.machine) may share the windows among them. The result does
    not depend on batch_size or the number of ranks beyond rounding.
    """
    config, numbers = model.config, data.evaluation_windows(n_windows or data.n_windows)
    share = numbers[ranks.rank :: ranks.world] if ranks else numbers
    places = sites(model) if everywhere else {"residual stream": sites(model)["residual stream"]}
    with ExitStack() as stack:
        watches = {name: stack.enter_context(Watch(model, modules, extremes=everywhere and i == 0))
                   for i, (name, modules) in enumerate(places.items())}
        loss = mean_loss(model, data, share, batch_size, progress=everywhere)
    stream = watches["residual stream"]
    totals = torch.cat([loss[None], stream.means().to(loss.device)]) * (len(share) / len(numbers))
    loss, *per_layer = (ranks.sum(totals) if ranks else totals).tolist()
    bytes_per_token = data.meta["bytes_per_token"]
    result = {
        "val_loss": loss,
        "bits_per_byte": loss / math.log(2) / bytes_per_token if bytes_per_token else None,
        "kurtosis": sum(per_layer) / len(per_layer),
        "kurtosis_floor": gaussian_floor(config.n_embd),
        "kurtosis_per_layer": per_layer,
    }
    if not everywhere:
        return result
    width = {"ffn hidden": config.n_ffn, "attention output": config.n_head * config.head_dim}
    at_sites = {name: dict(kurtosis=watch.means().tolist(),
                           floor=gaussian_floor(width.get(name, config.n_embd)))
                for name, watch in watches.items()}
    return dict(result, perplexity=perplexity(loss), tokens=stream.tokens_seen, sites=at_sites,
                largest=stream.largest)


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
    n = max(1, n_tokens // data.windows(data.evaluation_windows(1)).shape[1])
    windows = data.windows(data.evaluation_windows(n))
    tokens = torch.from_numpy(windows.reshape(-1, 1)).to(model.embed.weight.device)  # [tokens, 1]
    with Watch(model, published_states(model), published_kurtosis) as watch:
        for part in tokens.split(1024):
            model(part)
    return {
        "kurtosis_as_published": watch.means().mean().item(),
        "kurtosis_as_published_floor": published_floor(model.config.n_embd),
    }


@torch.no_grad()
def states_of_a_window(model, data, n_tokens: int = 256) -> torch.Tensor:
    """The residual stream of one window, [L + 1, T, D], at most n_tokens long, for figures."""
    window = torch.from_numpy(data.windows(data.evaluation_windows(1)))[:, :-1][:, :n_tokens]
    seen = []
    hook = lambda module, inputs, x: seen.append(x[0].float().cpu())
    with hooked([(module, hook) for module in sites(model)["residual stream"]]):
        model(window.to(model.embed.weight.device))
    return torch.stack(seen)


# Attention sinks: heads that look at the first token, whatever it is


@torch.no_grad()
def attention_sinks(model, data, n_windows: int = 32, histogram=None) -> dict:
    """How much attention later tokens give to the first one, per layer and head.

    Returns `share` [L][H], that attention, and `uniform`, what it would be if attention were even.
    `inside` [L][H] is the mean logit q.k / sqrt(d) on the first token, `outside` [L][H] that on all
    others. If `histogram` names a (layer, head): also `counts` [2][bins] of its logits inside and
    outside, and the edges of the `bins`. Q and K are taken as attention multiplies them.
    """
    device, edges = model.embed.weight.device, torch.linspace(-20, 20, 161)
    windows = torch.from_numpy(data.windows(data.evaluation_windows(n_windows)))
    sums = [0.0] * len(model.blocks)  # each [3, H]
    counts, queries = torch.zeros(2, len(edges) - 1), {}

    def remember_q(i, module, inputs, q):
        queries[i] = q.float()

    def add(i, module, inputs, k):
        q = queries.pop(i)
        B, H, T, d = q.shape
        k = k.repeat_interleave(H // k.shape[1], dim=1).float()
        with torch.autocast(k.device.type, enabled=False):  # it would take the product in bf16
            logits = q @ k.mT / math.sqrt(d)  # [B, H, T, T]
        future = torch.ones(T, T, dtype=torch.bool, device=k.device).triu(1)
        attention = logits.masked_fill(future, -math.inf).softmax(dim=-1)
        others = ~future[1:, 1:]  # token t >= 1 looks at tokens 1 ... t
        inside, outside = logits[:, :, 1:, 0], logits[:, :, 1:, 1:][:, :, others]  # [B, H, many]
        means = [values.mean(dim=(0, 2)) for values in (attention[:, :, 1:, 0], inside, outside)]
        sums[i] += B * torch.stack(means)
        if histogram and histogram[0] == i:
            for row, values in enumerate((inside, outside)):
                counts[row] += torch.histc(values[:, histogram[1]], len(edges) - 1, -20, 20).cpu()

    hooks = []
    for i, block in enumerate(model.blocks):
        hooks.append((block.attn.at_q, functools.partial(remember_q, i)))
        hooks.append((block.attn.at_k, functools.partial(add, i)))
    with hooked(hooks):
        for window in windows.split(1):  # one at a time: T x T logits of all heads are large
            model(window[:, :-1].to(device))
    share, inside, outside = (torch.stack(sums).cpu() / len(windows)).unbind(dim=1)  # each [L, H]
    T = windows.shape[1] - 1
    result = dict(share=share.tolist(), inside=inside.tolist(), outside=outside.tolist(),
                  uniform=sum(1 / (t + 1) for t in range(1, T)) / (T - 1))
    return dict(result, counts=counts.tolist(), bins=edges.tolist()) if histogram else result


def strongest_sink(sinks: dict) -> tuple[int, int]:
    """(layer, head) of the largest share."""
    shares = sinks["share"]
    return max((share, i, j) for i, heads in enumerate(shares) for j, share in enumerate(heads))[1:]


# What bits cost


def at_four_bits(model, data, n_windows=None, batch_size=None, ranks=None) -> dict:
    """evaluate() of the model at 4-4-4: rounded to nearest, and with a Hadamard in the FFN."""
    from quantize import Recipe, quantize  # only here: nothing else in this file needs it

    measured_on, results = (data, n_windows, batch_size, ranks), {}
    for method in ("rtn", "had"):
        results[method] = evaluate(quantize(model, Recipe("4-4-4", method)), *measured_on)
    return {"4-4-4": results}


# Writing


@torch.no_grad()
def generate(model, tokens, n, window, temperature=1.0, top_k=None, seed=0, use_cache=True,
             never=()):
    """Yield n tokens that continue `tokens`, a non-empty list of ids. The cache changes no result.

    window: most tokens the model may see. When it is full, the oldest are forgotten, many at once,
        since the rest must be read again: enough for all still to come, but at most half of it.
    temperature: 0 takes the likeliest token. top_k: draw from the k likeliest only.
    never: ids that are not drawn, such as a model's rows that its tokenizer has no tokens for.
    """
    device = next(model.parameters()).device
    generator = torch.Generator(device).manual_seed(seed)
    never = torch.tensor([*never], dtype=torch.long, device=device)
    read = lambda ids: torch.tensor([ids], device=device)  # [1, T]
    context, cache, unread = tokens, model.new_cache(), read(tokens)
    for still_to_come in range(n, 0, -1):
        if len(context) > window:
            kept = window - min(window // 2, still_to_come - 1)
            context, cache, unread = context[-kept:], model.new_cache(), read(context[-kept:])
        logits = model(unread, cache=cache if use_cache else None)[0, -1]
        finite = logits.isfinite().all()
        logits[never] = -math.inf
        if top_k:
            logits[logits < logits.topk(min(top_k, len(logits))).values[-1]] = -math.inf
        if temperature < 1e-30:  # dividing by it would overflow
            drawn = logits.argmax()
        else:  # as torch.multinomial draws: of waiting times 1 / p on average, the shortest wins
            p = (logits / temperature).softmax(dim=-1)
            drawn = (p / torch.empty_like(p).exponential_(generator=generator)).argmax()
        token, finite = torch.stack([drawn, finite]).tolist()  # all at once: a GPU waits meanwhile
        if not finite:
            raise ArithmeticError("the logits are not finite: there is nothing to draw from")
        context = [*context, token]
        unread = drawn.view(1, 1) if use_cache else read(context)
        yield token
