"""Four bits: quantize a trained model by the five methods of the paper's table (Table 4), each in one page.

    python quantize.py runs/NAME --method gptq --bits 4-4-4 --out FILE
    python quantize.py runs/NAME --hf DIR      not rounded: as a plain LLaMA that Hugging Face's library loads

W-A-KV bits, as in 4-4-4: weights, activations, keys and values; each 2 to 8, or 16 for "leave alone". The methods build
on each other:
    rtn        round every weight to the nearest of its 2^b values
    had        + rotate the FFN's hidden state by a Hadamard matrix, where outliers survive even in OSP models
    gptq       + let the weights not yet rounded make up for the error of those that are (Frantar et al. 2023)
    quarot     + rotate the residual stream (R1) and the values (R2) by random Hadamards (Ashkboos et al. 2024)
    spinquant  + learn R1 and R2 (Liu et al. 2025)

Values are rounded to what 4 bits can hold and computed with in full precision ("fake" quantization): that measures the
damage exactly and makes nothing faster (Int4Linear apart). Embedding, head and norms stay in 16 bits or more.

Glossary: name here, symbol in the papers, meaning
    code, scale, zero  q, s, z  a value is s (q - z), with q an integer of b bits; weights have no z (symmetric)
    R1, R2             -        learned or random rotations, multiplied into the weights: they cost nothing at run time
    R3                 -        Hadamard on Q and K after RoPE, online; in every method as soon as KV < 16 bits
    R4                 M4       Hadamard on the FFN's hidden state, online; its inverse is multiplied into down_proj
    H                  H        a Hadamard matrix at first; in GPTQ the Hessian, X^T X of a linear's inputs X
    D, d, F, L         -        n_embd, head_dim, n_ffn, n_layer

Deviations from the official code (a fork of SpinQuant's): arithmetic is fp32 where theirs is bf16, rotations are
rounded once instead of up to four times, and embeddings are not centred unless center_embed asks for it (RMSNorm does
not undo that: it changes the model).

Read it top to bottom: Hadamard matrices, rounding, points, rotations, GPTQ, SpinQuant, quantize(), files, command line.
"""

import copy
import functools
import math
import sys
import time
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn as nn
from tqdm import tqdm

from nanoosp.cli import Parser, peak_memory_gib, pick_device, run
from data.dataset import Dataset, encode, find_dataset, spread, tokenizer_of
from tools.huggingface import is_llama, last_evaluation, load_llama, save_llama
from model import (
    Config,
    Transformer,
    check_checkpoint,
    model_from_checkpoint,
    read_archive,
    rope_tables,
    save_checkpoint,
)

METHODS = ("rtn", "had", "gptq", "quarot", "spinquant")  # each does what those before it do, and one thing more


def includes(method: str, step: str) -> bool:
    """Does `method` do what `step` added?"""
    return METHODS.index(method) >= METHODS.index(step)


# ---------------------------------------------------------------------------------------------------------------------
# Hadamard matrices: entries +-1 with H H^T = n I. Divided by sqrt(n) they are rotations that spread whatever is in one
# channel over all of them, evenly. They are built, not looked up. "Order" is the number of rows.


def sylvester(n: int):
    """Order n = 2^t: H_2n = [[H_n, H_n], [H_n, -H_n]], starting from [1]."""
    H = torch.ones(1, 1, dtype=torch.float64)
    while len(H) < n:
        H = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64), H)
    return H


def williamson_172():
    """Order 172, for the paper's FFN of 5504 = 172 * 32: four symmetric circulant matrices (each row is the one above
    it, moved right by one) whose squares add up to 172 I, arranged like a quaternion (Williamson 1944)."""

    def circulant(bits: int):
        row = torch.tensor([1.0 if bits >> (42 - i) & 1 else -1.0 for i in range(43)], dtype=torch.float64)
        return torch.stack([row.roll(k) for k in range(43)])

    A, B, C, D = map(circulant, (0x467AECDD798, 0x6FC29B650FD, 0x7595E85EA6B, 0x63D260192F1))
    rows = [[A, B, C, D], [-B, A, -D, C], [-C, D, A, -B], [-D, -C, B, A]]
    return torch.cat([torch.cat(row, dim=1) for row in rows])


def is_prime(q: int) -> bool:
    return q > 1 and all(q % i for i in range(2, math.isqrt(q) + 1))


def paley(order: int):
    """Order q + 1 (q a prime, q % 4 == 3) or 2 (q + 1) (q % 4 == 1), from which numbers are squares modulo q (Paley
    1933). None if `order` is neither."""
    one, two = order - 1, order // 2 - 1
    q = one if is_prime(one) and one % 4 == 3 else two
    if q == two and not (order % 4 == 0 and is_prime(q) and q % 4 == 1):
        return None
    chi = -torch.ones(q, dtype=torch.float64)  # the Legendre symbol: 1 for squares, -1 for the others, 0 for 0
    chi[[i * i % q for i in range(1, q)]] = 1
    chi[0] = 0
    C = torch.zeros(q + 1, q + 1, dtype=torch.float64)
    i = torch.arange(q)
    C[1:, 1:] = chi[(i[:, None] - i) % q]
    C[0, 1:], C[1:, 0] = 1, -1 if q == one else 1
    identity = torch.eye(q + 1, dtype=torch.float64)
    if q == one:
        return C + identity
    plus, minus = torch.tensor([[[1, 1], [1, -1]], [[1, -1], [-1, -1]]], dtype=torch.float64)
    return torch.kron(C, plus) + torch.kron(identity, minus)


def hartley(m: int):
    """Any order: a real Fourier transform, orthogonal, but its entries are not all of one size (up to sqrt(2))."""
    angle = 2 * math.pi / m * (torch.outer(torch.arange(m), torch.arange(m)) % m).double()
    return angle.cos() + angle.sin()


@functools.lru_cache
def hadamard_factors(n: int, device="cpu", dtype=torch.float64):
    """Orthogonal (H [K, K], S [n/K, n/K]) that make up hadamard(n): S is Sylvester's, H is whatever fits the odd part.

    Hartley's matrix, the last resort, is no Hadamard matrix. A random rotation would be worse: for a lone outlier, it
    loses half of what a Hadamard matrix gains.
    """
    power = n & -n  # the largest power of two in n
    odd = n // power
    if odd == 1:
        H = sylvester(2 ** ((power.bit_length() - 1) // 2))  # Sylvester(ab) is Sylvester(a) kron Sylvester(b)
    elif odd == 43 and power >= 4:
        H = williamson_172()
    else:
        found = (paley(odd * 2**a) for a in range(2, power.bit_length()))
        H = next((H for H in found if H is not None), None)
        H = hartley(odd) if H is None else H
    S = sylvester(n // len(H))
    return (H / len(H) ** 0.5).to(device, dtype), (S / len(S) ** 0.5).to(device, dtype)


def hadamard(n: int):
    """The whole matrix, H^T kron S, [n, n] in fp64. Orthogonal, but not symmetric: H need not be."""
    H, S = hadamard_factors(n)
    return torch.kron(H.mT.contiguous(), S)


def hadamard_transform(x):
    """x @ hadamard(n) along the last axis of x [..., n], as two small products: n (K + n/K) multiplications, not n^2.

    In fp32 or finer, also under autocast; returned in the dtype of x.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    H, S = hadamard_factors(x.shape[-1], x.device, dtype)
    with torch.autocast(x.device.type, enabled=False):
        y = H @ x.to(dtype).unflatten(-1, (len(H), len(S))) @ S  # [..., K, n/K]
    return y.flatten(-2).to(x.dtype)


# ---------------------------------------------------------------------------------------------------------------------
# Rounding


class Bits(NamedTuple):
    """Bits of weights, activations, and keys and values; and whether the grid of activations is symmetric about 0."""

    w: int
    a: int
    kv: int
    symmetric: bool = False


def parse_bits(text: str) -> Bits:
    """ "4-4-4" -> Bits(4, 4, 4). Raises ValueError if that is not three numbers of 2 to 8, or 16."""
    parts = text.split("-")
    if len(parts) != 3 or not all(part in "2 3 4 5 6 7 8 16".split() for part in parts):
        raise ValueError(f"bits {text!r} must be three numbers W-A-KV, each 2 to 8 or 16 (as it is), like 4-4-4")
    return Bits(*map(int, parts))


def weight_scale(W, bits: int, clip: bool = True, group: int = 0):
    """Scales [out, groups] for a weight [out, in]: one per row, or one per `group` columns of a row.

    The widest value could be kept exactly with s = max|w| / m, where m is the largest code. Cutting it off makes all
    other steps finer: of 80 smaller scales we take the one with the least error, in the 2.4-norm, which minds large
    errors more than the square.
    """
    if group and W.shape[1] % group:
        raise ValueError(f"groups of {group} weights do not divide a row of {W.shape[1]}")
    rows, m = W.float().unflatten(1, (-1, group or W.shape[1])), 2 ** (bits - 1) - 1  # [out, groups, group]
    widest = rows.abs().amax(dim=-1, keepdim=True).clamp(min=1e-5)
    scale, least = widest / m, torch.full_like(widest, math.inf)
    for i in range(80 if clip else 0):
        s = (1 - i / 100) * widest / m
        error = (s * (rows / s).round().clamp(-m - 1, m) - rows).abs().pow(2.4).sum(dim=-1, keepdim=True)
        scale, least = torch.where(error < least, s, scale), torch.minimum(error, least)
    return scale.squeeze(-1)


def per_column(scale, n: int):
    """Scales [out, groups] repeated to the columns they belong to, [out, n]."""
    return scale.repeat_interleave(n // scale.shape[1], dim=1)


def weight_codes(W, scale, bits: int):
    """Integer codes -2^(b-1) ... 2^(b-1) - 1 as fp32, [out, in]; they stand for per_column(scale) * codes."""
    m = 2 ** (bits - 1) - 1
    return (W.float() / per_column(scale, W.shape[1])).round().clamp(-m - 1, m)


def _round_between(x, low, high, bits: int):
    """x rounded to 2^b values spaced evenly from low to high, with 0 among them (on the line they continue)."""
    n = 2**bits - 1
    scale = torch.where(high > low, (high - low) / n, high.abs()).clamp(min=1e-30)  # a constant is kept as it is
    zero = (-low / scale).round()
    return scale * (((x / scale).round() + zero).clamp(0, n) - zero)


def _round_symmetric(x, bits: int):
    """x rounded to 2^b - 1 values spaced evenly from -max|x| to max|x|: a grid without a zero to store."""
    m = 2 ** (bits - 1) - 1
    scale = x.abs().amax(dim=-1, keepdim=True).clamp(min=1e-30) / m
    return scale * (x / scale).round()


def round_tokens(x, bits: int, symmetric: bool = False):
    """Round x [..., C] with a range of its own for every vector; the range always contains 0, which stays exact."""
    y = x.to(torch.promote_types(x.dtype, torch.float32))
    if symmetric:
        return _round_symmetric(y, bits).to(x.dtype)
    low, high = y.amin(dim=-1, keepdim=True).clamp(max=0), y.amax(dim=-1, keepdim=True).clamp(min=0)
    return _round_between(y, low, high, bits).to(x.dtype)


def round_heads(x, bits: int, head_dim: int, symmetric: bool = False):
    """Round x [..., heads * head_dim] with a range of its own for every head. Here the range is just min to max: one
    that lies off 0 does not waste codes on reaching it."""
    if x.shape[-1] % head_dim:
        raise ValueError(f"{x.shape[-1]} channels are not a multiple of head_dim {head_dim}")
    y = x.to(torch.promote_types(x.dtype, torch.float32)).unflatten(-1, (-1, head_dim))
    if symmetric:
        return _round_symmetric(y, bits).flatten(-2).to(x.dtype)
    low, high = y.amin(dim=-1, keepdim=True), y.amax(dim=-1, keepdim=True)
    return _round_between(y, low, high, bits).flatten(-2).to(x.dtype)


# ---------------------------------------------------------------------------------------------------------------------
# Points: hooks on the named places of model.py


def _rotate(module, inputs, x):
    return hadamard_transform(x)


def attach_ffn_hadamard(model):
    """R4: from here on down_proj reads the rotated hidden state. Its weight must have been rotated too."""
    for block in model.blocks:
        block.ffn.at_hidden.register_forward_hook(_rotate)


def attach_rounding(model, bits: Bits, straight_through: bool = False) -> list:
    """Round activations, keys and values on their way. Returns the hooks' handles. Queries and attention stay exact.

    straight_through: let gradients pass as if nothing had been rounded (a rounded number has no slope of its own).
    """
    d, handles = model.config.head_dim, []

    def rounding(point, function, *args):
        def hook(module, inputs, x):
            rounded = function(x.detach(), *args)
            return x + (rounded - x).detach() if straight_through else rounded

        handles.append(point.register_forward_hook(hook))

    for block in model.blocks:
        attn, ffn = block.attn, block.ffn
        if bits.a < 16:
            for point in (attn.at_input, ffn.at_input, ffn.at_hidden):  # at_hidden: after R4, attached before
                rounding(point, round_tokens, bits.a, bits.symmetric)
            rounding(attn.at_output, round_heads, bits.a, d, bits.symmetric)
        if bits.kv < 16:
            handles += [point.register_forward_hook(_rotate) for point in (attn.at_q, attn.at_k)]  # R3: q.k stays
            rounding(attn.at_k, round_tokens, bits.kv)
            rounding(attn.at_v, round_heads, bits.kv, d)
    return handles


def linears(model) -> dict[str, nn.Linear]:
    """The matrices that are quantized, by name: all in the blocks, neither embedding nor head."""
    return {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear) and name.startswith("blocks.")}


# ---------------------------------------------------------------------------------------------------------------------
# Rotations


def rotated_weights(weights: dict, R1=None, R2=None, ffn_hadamard=True, dtype=torch.float64, names=None) -> dict:
    """The weights of a plain LLaMA in rotated coordinates. The network computes the same, if R4 is attached.

    Why that works: RMSNorm without gains commutes with a rotation R1 [D, D] of its input, so what writes to the
    residual stream may write rotated vectors if what reads it rotates them back. The gains are first multiplied into
    the weights that read them. R2 [L, d, d] does the same between v_proj and o_proj, since attention only averages
    values over tokens; R4 between the FFN's hidden state and down_proj.

    Pure and differentiable. Computed in `dtype` and rounded once to the dtype each weight has. `names`: only these.
    """
    R1, R2 = (None if R is None else R.to(dtype) for R in (R1, R2))
    norm_of = {"q_proj": "attn_norm", "k_proj": "attn_norm", "v_proj": "attn_norm", "gate_proj": "ffn_norm",
               "up_proj": "ffn_norm"}

    def rotated(name, W):
        part = name.split(".")[-2]  # "embed", "q_proj", ..., "head", or a norm
        layer = int(name.split(".")[1]) if name.startswith("blocks.") else None
        if part.endswith("norm"):
            return W if R1 is None else torch.ones_like(W)
        new = W.to(dtype)  # [out, in], the embedding [V, D]
        if R1 is not None:
            if part in norm_of:
                new = new * weights[f"blocks.{layer}.{norm_of[part]}.gain"].to(dtype)
            if part == "head":
                new = new * weights["norm.gain"].to(dtype)
            new = R1.mT @ new if part in ("o_proj", "down_proj") else new @ R1
        if R2 is not None and part == "v_proj":
            new = (R2[layer].mT @ new.unflatten(0, (-1, R2.shape[-1]))).flatten(0, 1)  # [H_kv, d, D] and back
        if R2 is not None and part == "o_proj":
            new = (new.unflatten(1, (-1, R2.shape[-1])) @ R2[layer]).flatten(1)  # [D, H, d] and back
        if ffn_hadamard and part == "down_proj":
            new = hadamard_transform(new)
        return new.to(W.dtype)

    return {name: rotated(name, weights[name]) for name in names or weights}


def random_rotations(config, seed: int = 0):
    """(R1 [D, D], R2 [L, d, d]) in fp64: Hadamard matrices whose rows have random signs. (Drawn in the official order:
    where D and d are powers of two, these are the official rotations of that seed.)"""
    generator = torch.Generator().manual_seed(seed)

    def draw(n):
        signs = 2 * torch.randint(0, 2, (n,), generator=generator) - 1
        return signs[:, None] * hadamard(n)

    return draw(config.n_embd), torch.stack([draw(config.head_dim) for _ in range(config.n_layer)])


# ---------------------------------------------------------------------------------------------------------------------
# GPTQ: rounding moves a linear's output by (Q - W) x. For inputs x seen in calibration, whose statistics are in
# H = X^T X, the error made in one column can partly be undone by changing the columns to the right of it.

GPTQ_SAMPLES = 128  # sequences of calibration

# In either half of a block, the input that several linears share, and those linears, which GPTQ treats as one: rows do
# not depend on each other. Each group is calibrated with the groups before it rounded.
GPTQ_GROUPS = {"attn": [("at_input", ["k_proj", "v_proj", "q_proj"]), ("at_output", ["o_proj"])],
               "ffn": [("at_input", ["up_proj", "gate_proj"]), ("at_hidden", ["down_proj"])]}


def inverse_factor(H):
    """The upper triangular U with U^T U = H^-1. Its row j says how much a later column can make up for column j.

    H gets 1 % of its mean diagonal added, and more if it still cannot be inverted: some inputs never vary on their own.
    Raises ArithmeticError if not even 100 % help.
    """
    for damping in (0.01, 0.1, 1.0):
        damped = H + damping * H.diagonal().mean() * torch.eye(len(H), device=H.device)
        L, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            U, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(L), upper=True)
        if not failed and U.isfinite().all():
            return U
    raise ArithmeticError("its Hessian has no Cholesky factor, not even damped: are the calibration inputs finite?")


def gptq(W, H, scale, bits: int, block: int = 128):
    """Codes [out, in] for a weight [out, in], so that their outputs for the inputs behind H [in, in] fit best.

    Columns are rounded from left to right; the error of each, in units of U_jj, is spread over all columns after it.
    Done at once within a block, and then for everything right of the block in one product: same result, less memory
    traffic. `scale` is that of the weight as it was.
    """
    W, H, codes = W.float().clone(), H.clone(), torch.zeros_like(W, dtype=torch.float32)
    dead = H.diagonal() == 0  # an input that was never on: its weights do nothing
    H[dead, dead], W[:, dead] = 1, 0
    U, s, m = inverse_factor(H), per_column(scale, W.shape[1]), 2 ** (bits - 1) - 1
    for start in range(0, W.shape[1], block):
        end = min(start + block, W.shape[1])
        errors = torch.zeros(len(W), end - start, device=W.device)
        for j in range(start, end):
            codes[:, j] = (W[:, j] / s[:, j]).round().clamp(-m - 1, m)
            errors[:, j - start] = (W[:, j] - s[:, j] * codes[:, j]) / U[j, j]
            W[:, j:end] -= torch.outer(errors[:, j - start], U[j, j:end])
        W[:, end:] -= errors @ U[start:end, end:]
    return codes


def inputs_hessian(point, forward, parts):
    """H = X^T X in fp32 of what passes `point` when forward(part) is run for each of `parts`, [n, T, D] each.
    (GPTQ's factor 2/N is left out: it cancels.)"""
    H = torch.zeros((), device=parts[0].device)

    def add(module, inputs, X):
        nonlocal H
        X = X.flatten(0, -2).float()  # [tokens, in]
        H = H + X.mT @ X

    handle = point.register_forward_hook(add)  # after the online Hadamard's hook, so it sees R4
    for part in parts:
        forward(part)
    handle.remove()
    return H


def gptq_half(model, half, norm, tables, groups, parts, bits: int, clip: bool, group: int) -> dict:
    """GPTQ for one half of a block, an Attention or FFN behind its norm. Adds to `parts`, the residual stream, what the
    rounded half writes to it: the next half reads that. Returns the scales by name."""
    scales = {}

    def whole(x):
        return half(norm(x), *tables)

    def start(x):
        return half.at_input(norm(x))  # all it takes for the first group

    for point, names in groups:
        H = inputs_hessian(getattr(half, point), start if point == "at_input" else whole, parts)
        weights = [model.get_submodule(name).weight for name in names]
        rows, W = [len(weight) for weight in weights], torch.cat(weights)
        scale = weight_scale(W, bits, clip, group)
        try:
            rounded = per_column(scale, W.shape[1]) * gptq(W, H, scale, bits)
        except ArithmeticError as error:
            raise ArithmeticError(f"GPTQ of {', '.join(names)}: {error}") from error
        for weight, new in zip(weights, rounded.split(rows)):
            weight.copy_(new)
        scales |= zip(names, scale.split(rows))
    for part in parts:
        part += whole(part)
    return scales


@torch.no_grad()
def gptq_weights(model, tokens, bits: int, clip: bool, group: int) -> dict:
    """GPTQ for all linears, layer by layer, on `tokens` [N, T]. Changes `model`; returns the scales by name.

    Only the residual stream at one place is kept. Activations, keys and values are not rounded: attach_rounding comes
    later. Raises ArithmeticError, with the linears' names, where H cannot be inverted.
    """
    config, scales = model.config, {}
    cos, sin = rope_tables(tokens.shape[1], config.head_dim, config.rope_theta, tokens.device)
    parts = model.embed(tokens).split(max(1, 4096 // tokens.shape[1]))  # of [N, T, D]
    for i, block in enumerate(tqdm(model.blocks, "GPTQ", leave=False, disable=None)):
        for name, half, norm, tables in (
            ("attn", block.attn, block.attn_norm, (cos, sin)),
            ("ffn", block.ffn, block.ffn_norm, ()),
        ):
            groups = [(point, [f"blocks.{i}.{name}.{x}" for x in linears]) for point, linears in GPTQ_GROUPS[name]]
            scales |= gptq_half(model, half, norm, tables, groups, parts, bits, clip, group)
    return scales


# ---------------------------------------------------------------------------------------------------------------------
# SpinQuant: which rotation is best? All of them leave the exact network as it is, but not the rounded one, so its loss
# has a gradient in R1 and R2. Descend it without ever leaving the rotations.

SPIN_BATCH, SPIN_STEPS, SPIN_LR = 8, 100, 1.5  # sequences a step, steps, first learning rate: SpinQuant's


def cayley_step(R, G, lr: float):
    """Rotations R [..., n, n] after one step against the gradient G.

    W is the part of the gradient that turns R and does not bend it. (I - aW/2)^-1 (I + aW/2), the Cayley transform, is
    exactly orthogonal because W^T = -W. The step is shortened where W is large.
    """
    W = R.mT @ G
    W = (W - W.mT) / 2
    step = (1 / W.abs().sum(dim=-2).amax(dim=-1)).clamp(max=lr)[..., None, None]  # 1 / the largest column sum
    turn, identity = step / 2 * W, torch.eye(R.shape[-1], dtype=R.dtype, device=R.device)
    return torch.linalg.solve(identity - turn, (identity + turn) @ R.mT).mT


def rotation_gradients(model, weights: dict, R1, R2, windows):
    """(loss, gradient of R1, gradient of R2) of `model` with rotated weights on windows [n, T + 1].

    The windows pass in parts, whose gradients add up at the rotated weights. From there they go on to R1 and R2 one
    weight after the other: what all rotations compute on their way would not fit into memory at once.
    """
    R1, R2 = R1.detach().requires_grad_(), R2.detach().requires_grad_()
    with torch.no_grad():
        rotated = rotated_weights(weights, R1, R2, dtype=torch.float32)
    leaves = {name: W.requires_grad_() for name, W in rotated.items() if not name.endswith("gain")}
    total = 0.0
    on_cuda, rows = windows.is_cuda, max(1, 4096 // (windows.shape[1] - 1))
    for part in windows.split(rows):
        # no cache: autocast's is only emptied at the end of the outermost autocast, which is not this one
        with torch.autocast(windows.device.type, torch.bfloat16, enabled=on_cuda, cache_enabled=False):
            inputs = part[:, :-1], part[:, 1:]
            loss = torch.func.functional_call(model, rotated, inputs) * len(part) / len(windows)
        loss.backward()
        total += loss.item()
    for name, leaf in leaves.items():
        rotated_weights(weights, R1, R2, dtype=torch.float32, names=[name])[name].backward(leaf.grad)
    return total, R1.grad, R2.grad


def learn_rotations(model, weights: dict, R1, R2, bits: Bits, windows, steps=SPIN_STEPS, lr=SPIN_LR):
    """The rotations (R1, R2), from those given, that keep the loss of the rounded model lowest.

    Activations, keys and values are rounded, weights are not: GPTQ will take care of them. Of `windows` [n, T + 1] the
    first few only judge, every ten steps, and the best rotations so far are returned: small models may well get worse
    in between. The learning rate falls from `lr` to 0 along a cosine.
    """
    held_out, windows = windows[:SPIN_BATCH], windows[SPIN_BATCH:]
    if not len(windows):
        raise ValueError(f"SpinQuant needs more than {SPIN_BATCH} sequences of calibration, not {len(held_out)}")
    handles = attach_rounding(model, bits, straight_through=True)
    best, least = (R1, R2), math.inf
    bar = tqdm(range(steps + 1), "SpinQuant", leave=False, disable=None)
    for step in bar:
        if step % 10 == 0 or step == steps:
            with torch.no_grad():
                rotated = rotated_weights(weights, R1, R2, dtype=torch.float32)
                parts = held_out.split(max(1, 2048 // held_out.shape[1]))
                losses = [torch.func.functional_call(model, rotated, (w[:, :-1], w[:, 1:])) * len(w) for w in parts]
                loss = (sum(losses) / len(held_out)).item()
            bar.set_postfix_str(f"loss {loss:.4f}", refresh=False)
            if loss < least:
                best, least = (R1, R2), loss
        if step < steps:
            batch = windows[torch.arange(step * SPIN_BATCH, (step + 1) * SPIN_BATCH) % len(windows)]
            _, G1, G2 = rotation_gradients(model, weights, R1, R2, batch)
            clip = (1 / torch.sqrt(G1.square().sum() + G2.square().sum())).clamp(max=1)  # to a norm of 1 at most
            now = lr * (1 + math.cos(math.pi * step / steps)) / 2
            R1, R2 = cayley_step(R1, clip * G1, now), cayley_step(R2, clip * G2, now)
    for handle in handles:
        handle.remove()
    return best


# ---------------------------------------------------------------------------------------------------------------------
# All together


@contextmanager
def full_precision(device: torch.device):
    """No autocast and no TF32, whose ten bits would drown what rotations and Hessians are about."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(before)


@torch.no_grad()
def round_weights(model, bits: int, clip: bool, group: int) -> dict:
    """RTN: every linear on its own. Changes `model`; returns the scales by name."""
    scales = {}
    for name, linear in tqdm(linears(model).items(), "round", leave=False, disable=None):
        W = linear.weight
        scales[name] = weight_scale(W, bits, clip, group)
        W.copy_(per_column(scales[name], W.shape[1]) * weight_codes(W, scales[name], bits))
    return scales


def bake_rotations(model, bits: Bits, method: str, calibration, center_embed: bool, seed: int, steps: int, lr: float):
    """Attach R4 and multiply the method's rotations into the weights of `model`."""
    attach_ffn_hadamard(model)
    weights, R1, R2 = model.state_dict(), None, None
    if includes(method, "quarot"):
        R1, R2 = (R.to(model.embed.weight.device) for R in random_rotations(model.config, seed))
        if center_embed:
            weights["embed.weight"] = weights["embed.weight"] - weights["embed.weight"].mean(dim=1, keepdim=True)
    if method == "spinquant" and min(bits.a, bits.kv) < 16:  # else nothing depends on R
        R1, R2 = learn_rotations(model, weights, R1, R2, bits, calibration, steps, lr)
    with torch.no_grad():
        model.load_state_dict(rotated_weights(weights, R1, R2), assign=True)


def quantize(model, bits="4-4-4", method="rtn", calibration=None, clip=True, w_group=0, symmetric=False,
             center_embed=False, seed=0, steps=SPIN_STEPS, lr=SPIN_LR) -> Transformer:
    """A quantized copy of `model`: a plain LLaMA (folded) with rounded weights, and hooks that round what passes.

    Args:
        bits: W-A-KV, each 2 to 8 or 16.
        method: one of METHODS.
        calibration: tokens int64 [N, T + 1] for GPTQ and SpinQuant; never those the result is judged by.
        clip: search for the scale of weights; without, their largest value decides.
        w_group: weights that share a scale (0: a whole row).
        symmetric: round activations on a grid from -max to max, not from min to max; keys and values are not touched.
        center_embed: quarot and spinquant: subtract each embedding's mean over channels, as the official code does.
        seed: of the random rotations.
        steps, lr: of SpinQuant.
    Raises ValueError for impossible options, ArithmeticError for weights that are not finite or where GPTQ fails.
    """
    b = parse_bits(bits)._replace(symmetric=symmetric)
    if method not in METHODS:
        raise ValueError(f"unknown method {method!r}: use one of {', '.join(METHODS)}")
    if hasattr(model, "quantization"):
        raise ValueError("this model is quantized already: start from the model that was trained")
    if broken := [name for name, W in model.named_parameters() if not W.isfinite().all()]:
        raise ArithmeticError(f"{broken[0]} holds numbers that are not finite: there is nothing to round them to")
    if center_embed and not includes(method, "quarot"):
        raise ValueError(f"only quarot and spinquant can center embeddings, not {method}")
    learns = method == "spinquant" and min(b.a, b.kv) < 16
    if calibration is None and (learns or includes(method, "gptq") and b.w < 16):
        raise ValueError(f"{method} needs calibration tokens")
    if model.embed.weight.device.type == "mps":
        model = copy.deepcopy(model).cpu()  # Apple's GPUs have no fp64, in which rotations are multiplied
    model = model.fold().requires_grad_(False)
    device, scales = model.embed.weight.device, {}
    calibration = None if calibration is None else calibration.to(device)
    with full_precision(device):
        if includes(method, "had"):
            bake_rotations(model, b, method, calibration, center_embed, seed, steps, lr)
        if b.w < 16 and includes(method, "gptq"):
            scales = gptq_weights(model, calibration[:GPTQ_SAMPLES, :-1], b.w, clip, w_group)
        elif b.w < 16:
            scales = round_weights(model, b.w, clip, w_group)
    attach_rounding(model, b)
    model.quantization = dict(
        bits=bits, method=method, symmetric=symmetric, ffn_hadamard=includes(method, "had"), scales=scales)
    return model


# ---------------------------------------------------------------------------------------------------------------------
# A file of four bits: two codes a byte, one fp32 scale a row. Dequantized it is, bit for bit, the simulated model.

VERSION, PACKING = 2, "code + 8 as a nibble; the low nibble of a byte is the even column"


def pack(codes):
    """Codes -8 ... 7, [out, in] -> uint8 [out, in / 2]. Raises ValueError for an odd number of columns."""
    if codes.shape[1] % 2:
        raise ValueError(f"rows of {codes.shape[1]} weights do not fill whole bytes")
    nibbles = (codes + 8).to(torch.uint8)
    return nibbles[:, 0::2] | nibbles[:, 1::2] << 4


def unpack(packed):
    """uint8 [out, in / 2] -> codes as fp32 [out, in]."""
    return torch.stack([packed & 15, packed >> 4], dim=-1).flatten(1).float() - 8


def save_quantized(model, path: Path, options: dict, data: dict):
    """Write a model of quantize(), whole or not at all. `options` and `data` are those of the run it comes from.

    Raises ValueError unless its weights have 4 bits, OSError if it cannot be written.
    """
    made = model.quantization
    if parse_bits(made["bits"]).w != 4:
        raise ValueError(f"a file holds weights of 4 bits, not {made['bits'].split('-')[0]}")
    weights = {name: W.cpu() for name, W in model.state_dict().items()}
    scales = {name: scale.cpu() for name, scale in made["scales"].items()}
    codes = {name: pack(weight_codes(weights.pop(f"{name}.weight"), scale, 4)) for name, scale in scales.items()}
    save_checkpoint(dict(packing=PACKING, version=VERSION, config=asdict(model.config), weights=weights, codes=codes,
                         quantization=dict(made, scales=scales), options=options, data=data), path)


class Int4Linear(nn.Module):
    """x @ W^T on CUDA by torch's own int4 kernel: the weights stay packed, x and the result are bfloat16.

    Writing token by token, a model spends its time reading weights, and these are a quarter as long. Scales are rounded
    to bfloat16: close to the simulated model, not equal. Raises ValueError for shapes the kernel does not take.
    """

    def __init__(self, codes, scale):  # [out, in], [out, groups]
        super().__init__()
        n_out, n_in = codes.shape
        self.group = next((g for g in (256, 128, 64, 32) if n_in // scale.shape[1] % g == 0), 0)
        if not self.group or n_out % 8 or n_in % 128:
            raise ValueError(f"torch's int4 kernel takes no {n_out} x {n_in} weight with {scale.shape[1]} scales a row")
        unsigned = (codes + 8).to(torch.uint8)
        packed = unsigned[:, 0::2] << 4 | unsigned[:, 1::2]  # this kernel wants the even column in the high nibble
        scales = per_column(scale, n_in // self.group).mT  # [in / group, out]
        self.register_buffer("packed", torch.ops.aten._convert_weight_to_int4pack(packed, 8))
        self.register_buffer("scales", torch.stack([scales, torch.zeros_like(scales)], dim=-1).bfloat16().contiguous())

    def forward(self, x):
        rows = x.bfloat16().flatten(0, -2)
        y = torch.ops.aten._weight_int4pack_mm(rows, self.packed, self.group, self.scales)
        return y.view(*x.shape[:-1], -1)


def use_int4_kernel(model, codes: dict, scales: dict):
    """Put an Int4Linear in the place of every linear of `model`, and make the rest bfloat16."""
    if model.embed.weight.device.type != "cuda":
        raise ValueError("the int4 kernel needs a CUDA device; leave out --int4")
    model.bfloat16()
    for name, packed in codes.items():
        parent, _, last = name.rpartition(".")
        device = model.embed.weight.device
        setattr(model.get_submodule(parent), last, Int4Linear(unpack(packed.to(device)), scales[name].to(device)))


def quantized_model(state: dict, path, device="cpu", int4: bool = False) -> Transformer:
    """The model in the contents of such a file, simulated or, if `int4`, with weights that stay packed.

    Raises ValueError, naming `path`, if they are not what we write.
    """
    kinds = {"packing": str, "config": dict, "weights": dict, "codes": dict, "quantization": dict, "options": dict,
             "data": dict}
    if not isinstance(state, dict) or not all(isinstance(state.get(name), kind) for name, kind in kinds.items()):
        raise ValueError(f"{path} is a torch file, but not a quantized model of quantize.py")
    if (state.get("version"), state["packing"]) != (VERSION, PACKING):
        raise ValueError(f"{path} is of version {state.get('version')} or packed otherwise; this code reads {VERSION}")
    made = state["quantization"]
    try:
        bits, scales, weights = parse_bits(made["bits"]), made["scales"], dict(state["weights"])
        bits = bits._replace(symmetric=made["symmetric"])
        if made["method"] not in METHODS or bits.symmetric not in (True, False):
            raise ValueError("unknown method")
        if bits.w != 4 or made["ffn_hadamard"] is not includes(made["method"], "had"):
            raise ValueError("what was done to it contradicts itself")
        if not all(s.dtype == torch.float32 and s.isfinite().all() and s.gt(0).all() for s in scales.values()):
            raise ValueError("a scale is no positive number")
        if len({W.dtype for W in weights.values()}) > 1:
            raise ValueError("weights of several precisions")
        with torch.device("meta"):
            model = Transformer(Config(**state["config"]))
        for name, packed in state["codes"].items():
            codes, dtype = unpack(packed), weights["norm.gain"].dtype
            weights[f"{name}.weight"] = (per_column(scales[name], codes.shape[1]) * codes).to(dtype)
        model.load_state_dict(weights, assign=True)
        if set(linears(model)) != set(scales):
            raise ValueError("not every linear has its scales")
    except (RuntimeError, ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{path} does not fit together ({reason}): write it again") from error
    if made["ffn_hadamard"]:
        attach_ffn_hadamard(model)
    attach_rounding(model, bits)
    model.quantization = made
    model = model.requires_grad_(False).to(device).eval()
    if int4:
        use_int4_kernel(model, state["codes"], scales)
    return model


def load_quantized(path, device="cpu") -> Transformer:
    """The model in a file of save_quantized(): its logits are, bit for bit, those of the model that was saved. Nothing
    in the file is executed. Raises FileNotFoundError and ValueError."""
    return quantized_model(read_archive(Path(path)), path, device)


def load_model(path, device="cpu", int4: bool = False):
    """(model, options, data, step or None) of anything that holds a model: a run directory, a checkpoint, a Hugging
    Face LLaMA directory, or such a file, of which `int4` leaves the weights packed.

    Raises what read_archive, check_checkpoint, quantized_model and load_llama do.
    """
    path = Path(path)
    if is_llama(path):
        return *load_llama(path, device), None
    state = read_archive(path / "ckpt.pt" if path.is_dir() else path)
    if isinstance(state, dict) and "packing" in state:
        model = quantized_model(state, path, device, int4)
    else:
        model = model_from_checkpoint(check_checkpoint(state, path), device).eval()
    return model, state["options"], state["data"], state.get("step")


# ---------------------------------------------------------------------------------------------------------------------
# Command line


def read_text(path) -> str:
    """The text of a file, without the byte order mark that some editors put in front. Raises OSError and ValueError."""
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text (byte {error.start} cannot be read)") from error


def calibration_windows(options: dict, encoding, method: str, steps: int = SPIN_STEPS, file=None):
    """Tokens to calibrate on, int64 [N, T + 1], or None for methods without: random windows of the training split of
    the run's own data, or blocks spread evenly over `file`. Raises ValueError for a file shorter than a block, or if a
    model from elsewhere, which has no data, is given none."""
    if not includes(method, "gptq"):
        return None
    n, block = GPTQ_SAMPLES, options["seq_len"] + 1
    if method == "spinquant":
        n = max(n, SPIN_BATCH * (steps + 1))  # every step sees new text, if there is enough
    if file is None and "data" not in options:
        raise ValueError(f"{method} needs text to calibrate on, which an imported model does not bring: --calib FILE")
    if file is None:
        data = Dataset(find_dataset(options["data"]), "train", options["seq_len"], options["seed"])
        return torch.from_numpy(data.batch(0, min(n, data.n_windows)))
    ids = torch.from_numpy(encode(encoding, read_text(file)))
    if len(ids) < block:
        raise ValueError(f"--calib {file} has {len(ids):,} tokens, fewer than one block of {block:,}")
    blocks = ids[: len(ids) // block * block].view(-1, block)
    return blocks[torch.from_numpy(spread(n, len(blocks)))]


SWITCHES = ("no_clip", "w_group", "symmetric", "center_embed")


def add_switches(add):
    """The options SWITCHES, which eval.py has too: what the official code fixes."""
    add("--no-clip", action="store_true", help="scale weights by their largest value, without search: the plain RTN")
    add("--w-group", type=int, default=0, metavar="N", help="N weights of a row share a scale (default: the whole row)")
    add("--symmetric", action="store_true", help="round activations on a grid symmetric about 0, not on min to max")
    add("--center-embed", action="store_true", help="quarot, spinquant: subtract embedding means, as the official code")


def switches(args, method: str) -> dict:
    """Keyword arguments of quantize() for these options; centring is only for the methods that rotate the embedding."""
    return dict(clip=not args.no_clip, w_group=args.w_group, symmetric=args.symmetric,
                center_embed=args.center_embed and includes(method, "quarot"))


def build_parser() -> Parser:
    p = Parser(__doc__)
    add = p.add_argument
    add("target", metavar="TARGET", help="a run directory, a checkpoint, or a Hugging Face LLaMA directory")
    goal = p.add_mutually_exclusive_group(required=True).add_argument
    goal("--out", type=Path, metavar="FILE", help="where the model goes, its weights in 4 bits")
    goal("--hf", type=Path, metavar="DIR", help="where it goes as trained, as a Hugging Face LLaMA directory")
    add("--method", help=f"one of {', '.join(METHODS)}, each building on those before (default: gptq)")
    add("--bits", help="weights-activations-KV: 4, and 2 to 8 or 16 for \"as it is\" (default: 4-4-4)")
    add("--calib", type=Path, metavar="FILE", help="text to calibrate on (default: the run's own training split)")
    add_switches(add)
    add("--steps", type=int, default=SPIN_STEPS, help="of SpinQuant's search: more find better rotations (default: "
        f"{SPIN_STEPS})")
    add("--lr", type=float, default=SPIN_LR, help=f"of SpinQuant; if its loss jumps, lower it (default: {SPIN_LR})")
    add("--seed", type=int, default=0, help="of the random rotations (default: 0)")
    add("--dtype", choices=["float32", "bfloat16"], help="of embedding, head, norms and all arithmetic "
        "(default: as in TARGET)")
    add("--device", choices=["cuda", "mps", "cpu"], help="default: the first of these that is there")
    return p


def check(args, error, defaults):
    """Call error(message) for the first option that cannot be."""
    goal, path = ("--hf", args.hf) if args.hf else ("--out", args.out)
    if path.exists() or path.is_symlink():
        error(f"{goal} {path} exists: remove it, or name another place")
    if not path.parent.is_dir():
        error(f"{goal} {path} must be in a directory that exists")
    given = {name for name, value in vars(args).items() if value != defaults(name)} - {"target", "out", "hf", "device"}
    if args.hf and given:
        error(f"--{min(given).replace('_', '-')} goes with --out: --hf writes the model as it was trained")
    args.method, args.bits = args.method or "gptq", args.bits or "4-4-4"
    try:
        if parse_bits(args.bits).w != 4:
            error(f"--bits {args.bits}: the file holds weights of 4 bits; quantize() can simulate other numbers")
    except ValueError as wrong:
        error(f"--bits: {wrong}")
    if args.method not in METHODS:
        error(f"--method {args.method}: use one of {', '.join(METHODS)}")
    needs = dict(calib="gptq", center_embed="quarot", seed="quarot", steps="spinquant", lr="spinquant")
    for name, step in needs.items():
        if name in given and not includes(args.method, step):
            error(f"--{name.replace('_', '-')} does nothing for --method {args.method}, only from {step} on")
    if args.w_group < 0 or args.steps < 0 or not 0 <= args.lr < math.inf or not 0 <= args.seed < 2**63:
        error("--w-group, --steps, --lr and --seed must be numbers of at least 0")


def main(argv=None):
    parser = build_parser()
    args = parser.parse(argv)
    check(args, parser.error, parser.get_default)
    device = pick_device(args.device, parser.error)
    try:
        model, options, data, step = load_model(args.target, device)
        if args.hf:
            path = Path(args.target)
            log = (path if path.is_dir() else path.parent) / "log.jsonl"
            save_llama(model, args.hf, options, data, None if step is None else last_evaluation(log, step))
            print(f"{args.hf}: a plain LLaMA, for AutoModelForCausalLM and AutoTokenizer.from_pretrained")
            return
        windows = calibration_windows(options, tokenizer_of(data), args.method, args.steps, args.calib)
        model = model.to(getattr(torch, args.dtype)) if args.dtype else model
        began = time.perf_counter()
        model = quantize(model, args.bits, args.method, windows, seed=args.seed, steps=args.steps, lr=args.lr,
                         **switches(args, args.method))
        wall = time.perf_counter() - began
        save_quantized(model, args.out, options, data)
    except (ValueError, OSError, ArithmeticError, KeyError, ImportError) as error:
        sys.exit(f"error: {error}")
    size, n = args.out.stat().st_size, sum(p.numel() for p in model.parameters())
    print(f"{args.method} {args.bits} in {wall:.1f} s, peak memory {peak_memory_gib(device):.2f} GiB: {args.out}, "
          f"{size / 2**20:.2f} MiB for {n:,} weights, {size / 2 / n:.3f} of bf16 (embedding and head are not rounded)")


if __name__ == "__main__":
    run(main)
