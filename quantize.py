"""Four bits: quantize a trained model by the five methods of the paper's Table 4.

    python quantize.py runs/NAME --method gptq --bits 4-4-4 --out FILE
    python quantize.py runs/NAME --hf DIR      not rounded: a plain LLaMA for Hugging Face's library

The bits W-A-KV, as in 4-4-4, are those of weights, activations, and keys and values: 2 to 8, or 16
for "leave alone". Each method does what those before it do, and one thing more:
    rtn        round every weight to the nearest of its 2^b values
    had        + rotate the FFN's hidden state by a Hadamard matrix: outliers survive there
    gptq       + let weights not yet rounded make up for the error of those that are (Frantar 2023)
    quarot     + rotate residual stream and values by random Hadamard matrices (Ashkboos 2024)
    spinquant  + learn these rotations (Liu 2025)

--format mxfp4 or nvfp4 takes the 4-bit numbers that hardware has instead of integers, for weights
and activations: blocks of 32 or 16 values, with scales of their own (nanoosp/formats.py).

Values are rounded to what 4 bits can hold and used in full precision ("fake" quantization): this
measures the damage, and makes nothing faster. Embedding, head and norms stay as they are.

Glossary: name here, symbol in the papers, meaning
    code, scale, zero  q, s, z  a value is s (q - z), q an integer of b bits; weights have no z, and
                                in mxfp4 and nvfp4 nothing has, and q is a number of E2M1
    R1, R2             -        rotations of stream and values, multiplied into the weights
    R3                 -        Hadamard on Q and K after RoPE, online, if KV has under 16 bits
    R4                 M4       Hadamard on the FFN's hidden state, online; down_proj undoes it
    H                  H        in GPTQ the Hessian, X^T X of a linear's inputs X
    D, d, F, L         -        n_embd, head_dim, n_ffn, n_layer

Deviations from the official code, a fork of SpinQuant's: arithmetic is fp32 instead of bf16,
rotations are rounded once, and embeddings are centred only on request: RMSNorm does not undo it.

Read it top to bottom. Recipe, rotations and formats are in nanoosp/, the command line and the file
of four bits in tools/.
"""

import copy
import math
from functools import partial

from nanoosp.options import door

door(__name__, "tools.export")  # python quantize.py: before torch, which takes seconds

import torch
import torch.nn as nn
from torch.func import functional_call
from tqdm import tqdm

from model import Transformer, hooked, rope_tables
from nanoosp.formats import block_scale, e2m1, round_blocks
from nanoosp.hadamard import hadamard_transform
from nanoosp.recipe import METHODS, Recipe  # noqa: F401
from nanoosp.recorded import Recorded
from nanoosp.rotations import full_precision, learn_rotations, random_rotations, rotated_weights

GPTQ_SAMPLES = 128  # sequences of calibration


def weight_scale(W, bits: int, clip: bool = True, group: int = 0):
    """Scales [out, groups] for a weight [out, in]: one a row, or one for each `group` columns.

    s = max|w| / m, with m the largest code, keeps the widest value exactly. A smaller s cuts it off
    and makes all other steps finer: of 80 we take that with the least error, to the power of 2.4.
    """
    if group and W.shape[1] % group:
        raise ValueError(f"groups of {group} weights do not divide a row of {W.shape[1]}")
    rows, m = W.float().unflatten(1, (-1, group or W.shape[1])), 2 ** (bits - 1) - 1
    widest = rows.abs().amax(dim=-1, keepdim=True).clamp(min=1e-5)  # of rows [out, groups, group]
    scale, least = widest / m, torch.full_like(widest, math.inf)
    for i in range(80 if clip else 0):
        s = (1 - i / 100) * widest / m
        rounded = s * (rows / s).round().clamp(-m - 1, m)
        error = (rounded - rows).abs().pow(2.4).sum(dim=-1, keepdim=True)
        scale, least = torch.where(error < least, s, scale), torch.minimum(error, least)
    return scale.squeeze(-1)


def per_column(scale, n: int):
    """Scales [out, groups] repeated to the columns they belong to, [out, n]."""
    return scale.repeat_interleave(n // scale.shape[1], dim=1)


def nearest_code(x, recipe: Recipe):
    """x rounded to codes: integers -2^(b-1) ... 2^(b-1) - 1, or the numbers of E2M1. In fp32."""
    if recipe.format != "int":
        return e2m1(x)
    m = 2 ** (recipe.w - 1) - 1
    return x.round().clamp(-m - 1, m)


def weight_codes(W, scale, recipe: Recipe):
    """The codes [out, in] of a weight for scales [out, groups]; the weights are scale * codes."""
    return nearest_code(W.float() / per_column(scale, W.shape[1]), recipe)


def recipe_scale(W, recipe: Recipe):
    """Scales [out, groups] of a whole weight [out, in], as the recipe wants them."""
    if recipe.format != "int":
        return block_scale(W, recipe.format)
    return weight_scale(W, recipe.w, recipe.clip, recipe.group)


def round_vectors(x, bits: int, symmetric: bool, keep_zero: bool):
    """Round each vector of x [..., C] to 2^b evenly spaced values from its minimum to its maximum.
    keep_zero: 0 is always one of them. symmetric: from -max|x| to max|x|, one value fewer."""
    y = x.to(torch.promote_types(x.dtype, torch.float32))
    low, high, n = y.amin(dim=-1, keepdim=True), y.amax(dim=-1, keepdim=True), 2**bits - 1
    if symmetric:
        high, n = torch.maximum(high, -low), n - 1
        low = -high
    elif keep_zero:
        low, high = low.clamp(max=0), high.clamp(min=0)
    scale = torch.where(high > low, (high - low) / n, high.abs()).clamp(min=1e-30)
    zero = (-low / scale).round()
    return (scale * (((y / scale).round() + zero).clamp(0, n) - zero)).to(x.dtype)


def round_tokens(x, bits: int, symmetric: bool = False):
    """Round x [..., C], every token's vector in a range of its own."""
    return round_vectors(x, bits, symmetric, keep_zero=True)


def round_heads(x, bits: int, head_dim: int, symmetric: bool = False):
    """Round x [..., heads * head_dim], every head in a range of its own, which may lie off 0."""
    if x.shape[-1] % head_dim:
        raise ValueError(f"{x.shape[-1]} channels are not a multiple of head_dim {head_dim}")
    heads = x.unflatten(-1, (-1, head_dim))
    return round_vectors(heads, bits, symmetric, keep_zero=False).flatten(-2)


# What passes a Point of model.py is rotated and rounded by hooks. They run in the order in which
# they were attached: first rotate, then round.


def _rotate(module, inputs, x):
    return hadamard_transform(x)


def attach_ffn_hadamard(model):
    """R4: from here on down_proj reads the rotated hidden state. Its weight must be rotated too."""
    for block in model.blocks:
        block.ffn.at_hidden.register_forward_hook(_rotate)


def attach_rounding(model, recipe: Recipe, straight_through: bool = False) -> list:
    """Round activations, keys and values on their way; returns the hooks' handles.
    straight_through: gradients pass as if nothing had been rounded."""
    d, handles = model.config.head_dim, []

    def rounding(point, function, *args):
        def hook(module, inputs, x):
            rounded = function(x.detach(), *args)
            return x + (rounded - x).detach() if straight_through else rounded

        handles.append(point.register_forward_hook(hook))

    for block in model.blocks:
        attn, ffn = block.attn, block.ffn
        if recipe.a < 16 and recipe.format != "int":
            for point in (attn.at_input, attn.at_output, ffn.at_input, ffn.at_hidden):
                rounding(point, round_blocks, recipe.format)
        elif recipe.a < 16:
            for point in (attn.at_input, ffn.at_input, ffn.at_hidden):
                rounding(point, round_tokens, recipe.a, recipe.symmetric)
            rounding(attn.at_output, round_heads, recipe.a, d, recipe.symmetric)
        if recipe.kv < 16:  # R3 on both: each q.k stays what it was
            handles += [point.register_forward_hook(_rotate) for point in (attn.at_q, attn.at_k)]
            rounding(attn.at_k, round_tokens, recipe.kv)
            rounding(attn.at_v, round_heads, recipe.kv, d)
    return handles


def linears(model) -> dict[str, nn.Linear]:
    """The matrices that are quantized, by name: all those inside the blocks."""
    modules = model.blocks.named_modules(prefix="blocks")
    return {name: module for name, module in modules if isinstance(module, nn.Linear)}


# GPTQ: rounding moves a linear's output by (Q - W) x. H = X^T X sums up the inputs of calibration.
# With it, columns can partly undo the errors made in the columns left of them. Linears that read
# one Point share H, and are stacked into one matrix: rows do not depend on each other.
GPTQ_POINTS = {
    "attn": [("at_input", ["k_proj", "v_proj", "q_proj"]), ("at_output", ["o_proj"])],
    "ffn": [("at_input", ["up_proj", "gate_proj"]), ("at_hidden", ["down_proj"])],
}


def inverse_factor(H):
    """The upper triangular U with U^T U = H^-1. Row j says how later columns make up for column j.
    Raises ArithmeticError if H, with some of its mean diagonal added, has no inverse."""
    for damping in (0.01, 0.1, 1.0):
        damped = H + damping * H.diagonal().mean() * torch.eye(len(H), device=H.device)
        L, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            U, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(L), upper=True)
        if not failed and U.isfinite().all():
            return U
    raise ArithmeticError("its damped Hessian has no Cholesky factor: are its inputs finite?")


def round_columns(W, U, s, recipe: Recipe):
    """Codes and errors [out, n] of n columns W, from left to right. The error of column j, in units
    of U_jj, is spread over those after it. U [n, n]; s [out, n]: scales."""
    W, codes, errors = W.clone(), torch.zeros_like(W), torch.zeros_like(W)
    for j in range(W.shape[1]):
        codes[:, j] = nearest_code(W[:, j] / s[:, j], recipe)
        errors[:, j] = (W[:, j] - s[:, j] * codes[:, j]) / U[j, j]
        W[:, j:] -= torch.outer(errors[:, j], U[j, j:])
    return codes, errors


def gptq(W, H, scale, recipe: Recipe, block: int = 128):
    """Codes [out, in] of a weight [out, in] that fit best for the inputs behind H [in, in]. The
    scales, those of groups too, are fixed before any column is rounded ("static groups").

    Errors spread at once within a block, and right of it in one product, to move less memory.
    """
    W, H, codes = W.float().clone(), H.clone(), torch.zeros_like(W, dtype=torch.float32)
    dead = H.diagonal() == 0  # an input that was never on: its weights do nothing
    H[dead, dead], W[:, dead] = 1, 0
    U, s = inverse_factor(H), per_column(scale, W.shape[1])
    plain = partial(round_columns, recipe=recipe)
    recorded = Recorded(plain)  # hundreds of small kernels, the same for every whole block
    for start in range(0, W.shape[1], block):
        here, right = slice(start, start + block), slice(start + block, None)
        parts = W[:, here], U[here, here], s[:, here]
        codes[:, here], errors = (recorded if len(parts[1]) == block else plain)(*parts)
        W[:, right] -= errors @ U[here, right]
    return codes


def inputs_hessian(point, forward, streams, passed: list):
    """H = X^T X, [in, in] in fp32, of what passes `point` in forward(x) for x in `streams`. The
    list `passed` gets it, one X for each x."""
    H = 0
    with hooked([(point, lambda module, inputs, X: passed.append(X))]):  # after R4's hook
        for x in streams:
            forward(x)
            X = passed[-1].flatten(0, -2).float()  # [tokens, in]
            H = H + X.mT @ X
    return H


@torch.no_grad()
def gptq_weights(model, tokens, recipe: Recipe) -> dict:
    """GPTQ layer by layer on `tokens` [N, T], keeping one state of the residual stream. Changes
    `model`; returns the scales by name. Raises ArithmeticError where H cannot be inverted."""
    config, scales = model.config, {}
    rope = rope_tables(tokens.shape[1], config.head_dim, config.rope_theta, tokens.device)
    streams = model.embed(tokens).split(max(1, 4096 // tokens.shape[1]))  # each [n, T, D]
    passed = []  # the inputs of the linear that is rounded
    for i, block in enumerate(tqdm(model.blocks, "GPTQ", leave=False, disable=None)):
        halves = ("attn", block.attn, block.attn_norm, rope), ("ffn", block.ffn, block.ffn_norm, ())
        for name, half, norm, tables in halves:
            forward = lambda x: half(norm(x), *tables)
            to_input = lambda x: half.at_input(norm(x))  # enough to reach the first Point
            for point, parts in GPTQ_POINTS[name]:
                run = to_input if point == "at_input" else forward
                passed.clear()
                H = inputs_hessian(getattr(half, point), run, streams, passed)
                weights = {f"blocks.{i}.{name}.{p}": getattr(half, p).weight for p in parts}
                W, rows = torch.cat([*weights.values()]), [len(W) for W in weights.values()]
                scale = torch.cat([recipe_scale(W, recipe) for W in weights.values()])
                try:
                    rounded = per_column(scale, W.shape[1]) * gptq(W, H, scale, recipe)
                except ArithmeticError as error:
                    raise ArithmeticError(f"GPTQ of {', '.join(weights)}: {error}") from error
                for weight, new in zip(weights.values(), rounded.split(rows)):
                    weight.copy_(new)
                scales |= zip(weights, scale.split(rows))
            last = getattr(half, parts[-1])  # o_proj or down_proj: only that has changed since
            for x, X in zip(streams, passed):
                x += last(X)  # what the next half reads comes from the rounded half
    return scales


@torch.no_grad()
def round_weights(model, recipe: Recipe) -> dict:
    """RTN: every linear on its own. Changes `model`; returns its scales by name."""
    scales = {}
    for name, linear in tqdm(linears(model).items(), "round", leave=False, disable=None):
        W = linear.weight
        scales[name] = recipe_scale(W, recipe)
        W.copy_(per_column(scales[name], W.shape[1]) * weight_codes(W, scales[name], recipe))
    return scales


def bake_rotations(model, recipe: Recipe, calibration):
    """Attach R4, and multiply the method's rotations into the weights of `model`."""
    attach_ffn_hadamard(model)
    weights, R1, R2 = model.state_dict(), None, None
    if recipe.does("quarot"):
        embed = weights["embed.weight"]
        R1, R2 = (R.to(embed.device) for R in random_rotations(model.config, recipe.seed))
        if recipe.center_embed:
            weights["embed.weight"] = embed - embed.mean(dim=1, keepdim=True)
    if recipe.learns:  # with activations, keys and values rounded; the weights are left to GPTQ
        handles, dtype = attach_rounding(model, recipe, straight_through=True), model.compute_dtype

        def loss_of(weights, windows):
            in_bf16 = windows.is_cuda and torch.is_grad_enabled()  # evaluations stay in fp32
            model.compute_dtype = torch.bfloat16 if in_bf16 else torch.float32
            return functional_call(model, weights, (windows[:, :-1], windows[:, 1:]))

        windows = calibration.to(R1.device)
        R1, R2 = learn_rotations(loss_of, weights, R1, R2, windows, recipe.steps, recipe.lr)
        model.compute_dtype = dtype
        for handle in handles:
            handle.remove()
    with torch.no_grad():
        model.load_state_dict(rotated_weights(weights, R1, R2), assign=True)


def quantize(model, recipe: Recipe, calibration=None) -> Transformer:
    """A quantized copy of `model`: a plain LLaMA (folded) with rounded weights, and hooks that
    round what passes. It carries its `recipe`, and its `scales` [out, groups] by linears' names.
    `calibration`: tokens [N, T + 1] for GPTQ and SpinQuant, never those that judge the result.
    Raises ValueError if they are missing, ArithmeticError for weights that are not finite."""
    if getattr(model, "recipe", None):
        raise ValueError("this model is quantized already: start from the model that was trained")
    if broken := [name for name, W in model.named_parameters() if not W.isfinite().all()]:
        raise ArithmeticError(f"{broken[0]} holds numbers that are not finite: nothing to round to")
    if calibration is None and recipe.calibrates:
        raise ValueError(f"{recipe.method} needs calibration tokens")
    if model.embed.weight.device.type == "mps":
        model = copy.deepcopy(model).cpu()  # Apple's GPUs have no fp64 to multiply rotations in
    model = model.fold().requires_grad_(False)
    device, model.recipe, model.scales = model.embed.weight.device, recipe, {}
    with full_precision(device):
        if recipe.does("had"):
            bake_rotations(model, recipe, calibration)
        if recipe.w < 16 and recipe.does("gptq"):
            tokens = calibration[:GPTQ_SAMPLES, :-1].to(device)
            model.scales = gptq_weights(model, tokens, recipe)
        elif recipe.w < 16:
            model.scales = round_weights(model, recipe)
    attach_rounding(model, recipe)
    return model
