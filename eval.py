"""What a model is worth and how its activations look: loss, bits per byte, excess kurtosis.

Excess kurtosis (eq. 4) asks how far a token's D activations are from a Gaussian: E[((x - mean) / std)^4] - 3. It is
about 0 for Gaussian values and about D - 3 if one channel holds everything: the outliers that 4 bits cannot afford.
We take it over the channels of one token, centred, average over all tokens of whole sequences, and give one number per
state of the residual stream (embedding output, output of every block). Their mean is the headline.
"""

import math
from contextlib import contextmanager

import torch
import torch.distributed as dist


def excess_kurtosis(x):
    """Excess kurtosis over the last axis: [..., D] -> [...] in fp32. A constant vector counts as 0."""
    x = x.float()
    x = x - x.mean(dim=-1, keepdim=True)
    variance = x.square().mean(dim=-1)
    return x.pow(4).mean(dim=-1) / variance.square().clamp(min=1e-30) - 3 * (variance > 1e-15)


def gaussian_floor(dim: int) -> float:
    """What excess_kurtosis gives on average for `dim` independent Gaussian numbers: not 0 but -6 / (dim + 1).

    (Exact: for a Gaussian sample of n, m4 / m2^2 has expectation 3 (n - 1) / (n + 1).)
    """
    return -6 / (dim + 1)


@contextmanager
def residual_kurtosis(model):
    """While active, every forward pass of `model` appends one row [n_layer + 1] to the yielded list: excess kurtosis of
    the embedding output and of each block's output, summed over the tokens of the pass."""
    rows = []

    def hook(module, inputs, output):
        if module is model.at_embed:
            rows.append([])
        rows[-1].append(excess_kurtosis(output).sum())

    handles = [module.register_forward_hook(hook) for module in (model.at_embed, *model.blocks)]
    try:
        yield rows
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def evaluate(model, dataset, n_windows: int, batch_size: int, autocast, rank: int = 0, world: int = 1) -> dict:
    """Loss and kurtosis of `model` on at most n_windows fixed windows of `dataset`, shared among `world` ranks.

    `autocast` is the context the forward pass runs in. Returns val_loss (nats per token), bits_per_byte (None where the
    dataset does not know its bytes), kurtosis, kurtosis_floor and kurtosis_per_layer [n_layer + 1]. The result does not
    depend on batch_size or world beyond rounding, and no random number is drawn.
    """
    device = next(model.parameters()).device
    mine = dataset.evaluation_windows(n_windows)[rank::world]
    totals = torch.zeros(2 + model.config.n_layer + 1)  # tokens, summed loss, summed kurtosis per state
    model.eval()
    with (
        residual_kurtosis(model) as rows,
        autocast,
        torch.compiler.set_stance("force_eager"),
    ):  # compiled blocks skip hooks
        for i in range(0, len(mine), batch_size):
            window = torch.from_numpy(dataset.windows(mine[i : i + batch_size])).to(device)
            loss = model(window[:, :-1], window[:, 1:])
            tokens = window[:, 1:].numel()
            totals += torch.stack([torch.tensor(float(tokens)), loss.cpu() * tokens, *(k.cpu() for k in rows.pop())])
    model.train()
    if world > 1:
        totals = totals.to(device)
        dist.all_reduce(totals)
    tokens, loss, *kurtosis = totals.tolist()
    per_layer = [k / tokens for k in kurtosis]
    bytes_per_token = dataset.meta["bytes_per_token"]
    return {
        "val_loss": loss / tokens,
        "bits_per_byte": loss / tokens / math.log(2) / bytes_per_token if bytes_per_token else None,
        "kurtosis": sum(per_layer) / len(per_layer),
        "kurtosis_floor": gaussian_floor(model.config.n_embd),
        "kurtosis_per_layer": per_layer,
    }
