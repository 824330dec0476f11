"""Four bits: quantize a trained model by the five methods of the paper's Table 4.

    python quantize.py runs/NAME --method gptq --bits 4-4-4 --out FILE
    python quantize.py runs/NAME --hf DIR      not rounded: a plain LLaMA for Hugging Face's library
    python quantize.py runs/NAME --hf DIR --bits 4-16-16     rounded, for transformers and vLLM

The bits W-A-KV, as in 4-4-4, are those of weights, activations, and keys and values: 2 to 8, or 16
for "leave alone". Each method does what those before it do, and one thing more:
    rtn        round all to the nearest of 2^b values, and with KV under 16 rotate Q and K (R3)
    had        + rotate the FFN's hidden state by a Hadamard matrix: outliers survive there
    gptq       + let weights not yet rounded make up for the error of those that are (Frantar 2023)
    quarot     + rotate residual stream and values by random Hadamard matrices (Ashkboos 2024)
    spinquant  + learn these rotations (Liu 2025)

--format mxfp4 or nvfp4 takes the 4-bit numbers that hardware has instead of integers, for weights
and activations: blocks of 32 or 16 values, with scales of their own (nanoosp/formats.py).

Values are rounded to what 4 bits can hold and used in full precision ("fake" quantization): this
measures the damage. Programs that are faster at 4 bits run what --hf with --bits writes (R3 and R4,
which they lack, are left out). Embedding, head and norms are not rounded.

Glossary: name here, symbol in the papers, meaning
    code, scale, zero  q, s, z  a value is s (q - z), q an integer of b bits; weights have no z. In
                                mxfp4, nvfp4 nothing has, and q is one of the 16 numbers of E2M1
    R1, R2             -        rotations of stream and values, multiplied into the weights
    R3                 -        Hadamard on Q and K after RoPE, online, if KV has under 16 bits
    R4                 M4       Hadamard on the FFN's hidden state, online; down_proj undoes it
    H                  H        in GPTQ the Hessian, X^T X of a linear's inputs X
    D, d, F, L         -        n_embd, head_dim, n_ffn, n_layer

Deviations from the official code, a fork of SpinQuant's: arithmetic is fp32 instead of bf16,
rotations are rounded once, and embeddings are centred only on request: RMSNorm does not undo it.

Read it top to bottom. Recipe, rotations and the other formats are in nanoosp/, the command line and
the file of four bits in tools/.
"""

import copy
from dataclasses import dataclass

from nanoosp.options import door

door(__name__, "tools.export")  # python quantize.py: before torch, which takes seconds

import torch
from tqdm import tqdm

from model import Transformer
from nanoosp.formats import BLOCK_FORMATS
from nanoosp.hadamard import hadamard_transform
from nanoosp.halves import halves, stacks
from nanoosp.recipe import Recipe
from nanoosp.recorded import Recorded
from nanoosp.rotations import full_precision, learn_rotations, random_rotations, rotated_weights

GPTQ_SAMPLES = 128  # sequences of calibration


def round_vectors(x, bits: int, symmetric: bool, keep_zero: bool):
    """Round each vector of x [..., C] to 2^b evenly spaced values from its minimum to its maximum.
    keep_zero: 0 is always one of them. symmetric: from -max|x| to max|x|, one value fewer."""
    y = x.to(torch.promote_types(x.dtype, torch.float32))
    low = y.amin(dim=-1, keepdim=True)
    high = y.amax(dim=-1, keepdim=True)
    steps = 2**bits - 2 if symmetric else 2**bits - 1
    if symmetric:
        high = torch.maximum(high, -low)
        low = -high
    elif keep_zero:
        low = low.clamp(max=0)
        high = high.clamp(min=0)
    # a constant vector gets one step of its own size, so that it stays what it is
    scale = torch.where(high > low, (high - low) / steps, high.abs()).clamp(min=1e-30)
    zero = (-low / scale).round()
    code = ((y / scale).round() + zero).clamp(0, steps)
    return (scale * (code - zero)).to(x.dtype)


@dataclass(frozen=True)
class Int:
    """Integers of b bits. Weights get scales and codes, which GPTQ needs apart; activations are
    rounded at once. mxfp4 and nvfp4 have the same three methods."""

    bits: int
    clip: bool = True  # search for the scale of weights
    group: int = 0  # weights of a row that share a scale; 0: all of them
    symmetric: bool = False  # round activations from -max to max
    in_dtype: bool = False  # scales of weights are numbers of the weights' dtype

    def scale(self, W):
        """Scales [out, groups] for a weight [out, in]: one a row, or one for each group of columns.

        s = max|w| / m, with m the largest code, keeps the widest value. A smaller s cuts it off and
        makes the grid finer: of 80 we take that with the least error, to the power of 2.4.
        """
        n = self.group or W.shape[1]
        if W.shape[1] % n:
            raise ValueError(f"groups of {n} weights do not divide a row of {W.shape[1]}")
        rows = W.float().unflatten(1, (-1, n))  # [out, groups, n]
        m = 2 ** (self.bits - 1) - 1
        widest = rows.abs().amax(dim=-1, keepdim=True).clamp(min=1e-5)
        scale = widest / m
        least = torch.full_like(widest, torch.inf)
        for i in range(80 if self.clip else 0):
            s = (1 - i / 100) * widest / m
            error = (s * self.code(rows / s) - rows).abs().pow(2.4).sum(dim=-1, keepdim=True)
            scale = torch.where(error < least, s, scale)
            least = torch.minimum(error, least)
        return (scale.to(W.dtype).float() if self.in_dtype else scale).squeeze(-1)

    def code(self, x):
        """Weights x, in units of their scale, as integers -2^(b-1) ... 2^(b-1) - 1."""
        m = 2 ** (self.bits - 1) - 1
        return x.round().clamp(-m - 1, m)

    def round(self, x, head_dim: int = 0):
        """Round activations x [..., C], every token's vector in a range of its own, which has 0 in
        it. head_dim: C is heads * head_dim, and every head has its range, which may lie off 0, as
        in the official code."""
        if not head_dim:
            return round_vectors(x, self.bits, self.symmetric, keep_zero=True)
        if x.shape[-1] % head_dim:
            raise ValueError(f"{x.shape[-1]} channels are not a multiple of head_dim {head_dim}")
        heads = x.unflatten(-1, (-1, head_dim))
        return round_vectors(heads, self.bits, self.symmetric, keep_zero=False).flatten(-2)


def format_of(recipe: Recipe, bits: int):
    """The numbers that a recipe has for weights (`bits` is recipe.w) or activations (recipe.a)."""
    blocks = BLOCK_FORMATS.get(recipe.format)
    return blocks or Int(bits, recipe.clip, recipe.group, recipe.symmetric, recipe.portable)


def per_column(scale, n: int):
    """Scales [out, groups] repeated to the columns they belong to, [out, n]."""
    return scale.repeat_interleave(n // scale.shape[1], dim=1)


# What passes a Point of model.py is rotated and rounded by hooks. They run in the order in which
# they were attached: first rotate, then round.


def rotate_at(point):
    """From here on, what passes `point` is multiplied by a Hadamard matrix."""
    point.register_forward_hook(lambda module, inputs, x: hadamard_transform(x))


def round_at(point, format, straight_through: bool, head_dim: int = 0):
    """From here on, what passes `point` is rounded, but not its gradients if straight_through."""

    def hook(module, inputs, x):
        rounded = format.round(x.detach(), head_dim)
        return x + (rounded - x).detach() if straight_through else rounded

    point.register_forward_hook(hook)


def attach_ffn_hadamard(model):
    """R4: from here on down_proj reads the rotated hidden state. Its weight must be rotated too."""
    for block in model.blocks:
        rotate_at(block.ffn.at_hidden)


def attach_rounding(model, recipe: Recipe, straight_through: bool = False):
    """Round activations, keys and values on their way."""
    activations = format_of(recipe, recipe.a)
    for block in model.blocks:
        attn, ffn = block.attn, block.ffn
        if recipe.a < 16:
            for point in (attn.at_input, ffn.at_input, ffn.at_hidden):
                round_at(point, activations, straight_through)
            round_at(attn.at_output, activations, straight_through, attn.head_dim)
        if recipe.kv < 16:
            rotate_at(attn.at_q)  # R3 on both: each q.k stays what it was
            rotate_at(attn.at_k)
            round_at(attn.at_k, Int(recipe.kv), straight_through)
            round_at(attn.at_v, Int(recipe.kv), straight_through, attn.head_dim)


def linears(model) -> dict[str, torch.nn.Linear]:
    """The matrices that are quantized, by name: all those inside the blocks."""
    modules = model.blocks.named_modules(prefix="blocks")
    return {name: module for name, module in modules if isinstance(module, torch.nn.Linear)}


# GPTQ: rounding moves a linear's output by (Q - W) x. H = X^T X sums up its inputs in calibration.
# With it, columns can partly undo the errors made in the columns left of them.


def inputs_hessian(inputs):
    """H [in, in] in fp32 for `inputs`, a list of X [n, T, in]."""
    rows = (X.flatten(0, -2).float() for X in inputs)  # [tokens, in]
    return sum(X.mT @ X for X in rows)


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


@Recorded  # as a CUDA graph: it is hundreds of small kernels, and the same for every block
def round_columns(W, U, s, format):
    """Codes and errors [out, n] of n columns W, from left to right. The error of column j, in units
    of U_jj, is spread over those after it. U [n, n]; s [out, n]: scales."""
    W = W.clone()
    codes = torch.zeros_like(W)
    errors = torch.zeros_like(W)
    for j in range(W.shape[1]):
        codes[:, j] = format.code(W[:, j] / s[:, j])
        errors[:, j] = (W[:, j] - s[:, j] * codes[:, j]) / U[j, j]
        W[:, j:] -= torch.outer(errors[:, j], U[j, j:])
    return codes, errors


def gptq(W, H, scale, format, block: int = 128):
    """Codes [out, in] of a weight [out, in] that fit best for the inputs behind H [in, in]. The
    scales, those of groups too, are fixed before any column is rounded ("static groups").

    Errors spread at once within a block, and right of it in one product, to move less memory.
    """
    dead = H.diagonal() == 0  # an input that was never on: its weights do nothing
    W = torch.where(dead, 0, W.float())
    U = inverse_factor(H + torch.diag(dead.float()))
    s = per_column(scale, W.shape[1])
    codes = torch.zeros_like(W)
    for start in range(0, W.shape[1], block):
        end = start + block
        codes[:, start:end], errors = round_columns(
            W[:, start:end], U[start:end, start:end], s[:, start:end], format)
        W[:, end:] -= errors @ U[start:end, end:]
    return codes


def round_together(weights: dict, format, H=None) -> dict:
    """Round weights [out, in] that read the same inputs, stacked into one matrix: to the nearest,
    or with H by GPTQ. Rows do not depend on each other, but NVFP4 has one scale of the tensor for
    all: programs that run the model stack them too. Changes the weights; returns their scales. Both
    are dicts by name."""
    W = torch.cat([*weights.values()])
    scale = format.scale(W)
    s = per_column(scale, W.shape[1])
    try:
        codes = format.code(W.float() / s) if H is None else gptq(W, H, scale, format)
    except ArithmeticError as error:
        raise ArithmeticError(f"GPTQ of {', '.join(weights)}: {error}") from error
    rows = [len(weight) for weight in weights.values()]
    for weight, new in zip(weights.values(), (s * codes).split(rows)):
        weight.copy_(new)
    return dict(zip(weights, scale.split(rows)))


@torch.no_grad()
def gptq_weights(model, tokens, recipe: Recipe) -> dict:
    """GPTQ on `tokens` [N, T], from the first layer to the last: each linear is calibrated on what
    the rounded ones before it give. Changes `model`; returns the scales by name. Raises
    ArithmeticError where H cannot be inverted."""
    format = format_of(recipe, recipe.w)
    scales = {}
    for half in halves(model, tokens):  # "blocks.0.attn", "blocks.0.ffn", "blocks.1.attn", ...
        for point, names in half.points.items():  # "at_input", ["q_proj", "k_proj", ...]
            H = inputs_hessian(half.run_to(point))
            scales |= round_together(half.weights(point), format, H)
        half.add(names[-1])  # to the residual stream: the next half reads what the rounded one adds
    return scales


@torch.no_grad()
def round_weights(model, recipe: Recipe) -> dict:
    """RTN: every weight to its nearest code. Changes `model`; returns the scales by name."""
    format = format_of(recipe, recipe.w)
    scales = {}
    for weights in tqdm(stacks(model), "round", leave=False, disable=None):
        scales |= round_together(weights, format)
    return scales


def rotations(model, recipe: Recipe, calibration):
    """R1 [D, D] and R2 [L, d, d] of QuaRot, or what SpinQuant learns from there: with activations,
    keys and values rounded, while the weights are left to GPTQ."""
    device = model.embed.weight.device
    R1, R2 = (R.to(device) for R in random_rotations(model.config, recipe.seed))
    if recipe.learns:
        rounded = Transformer.from_weights(model.config, model.state_dict())  # for its hooks
        if recipe.has_r4:
            attach_ffn_hadamard(rounded)
        attach_rounding(rounded, recipe, straight_through=True)
        R1, R2 = learn_rotations(rounded, R1, R2, calibration, recipe)
    return R1, R2


def bake_rotations(model, recipe: Recipe, calibration):
    """Multiply the method's rotations and R4, which is attached, into the weights of `model`."""
    if recipe.has_r4:
        attach_ffn_hadamard(model)
    if recipe.center_embed:
        model.embed.weight -= model.embed.weight.mean(dim=1, keepdim=True)
    R1, R2 = rotations(model, recipe, calibration) if recipe.does("quarot") else (None, None)
    model.load_state_dict(rotated_weights(model.state_dict(), R1, R2, recipe.has_r4), assign=True)


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
    model.recipe = recipe
    model.scales = {}
    device = model.embed.weight.device
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
