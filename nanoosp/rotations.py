"""Rotations of the residual stream (R1) and of the values (R2), for quantize.py.

A rotation leaves the exact network as it is, but not the rounded one. QuaRot (Ashkboos et al. 2024)
takes random Hadamard matrices. SpinQuant (Liu et al. 2025) learns the rotations: the loss of the
rounded network has a gradient in R1 and R2, which is descended without ever leaving the rotations.
"""

import math
from contextlib import contextmanager

import torch
from torch.func import functional_call
from tqdm import tqdm

from nanoosp.batches import windows_at_once
from nanoosp.hadamard import hadamard, hadamard_transform
from nanoosp.recipe import Recipe

SPIN_BATCH = 8  # sequences a step of SpinQuant


def rotated_weights(weights: dict, R1=None, R2=None, ffn_hadamard=True, dtype=torch.float64,
                    names=None) -> dict:
    """The weights of a plain LLaMA in rotated coordinates. The network computes the same, if R4,
    the Hadamard matrix on the FFN's hidden state, is attached.

    Why that works: RMSNorm without gains commutes with a rotation R1 [D, D] of its input. So what
    writes to the residual stream may write rotated vectors, if what reads it rotates them back. For
    that the gains are first multiplied into the weights that read them. R2 [L, d, d] does the same
    between v_proj and o_proj, since attention only averages values over tokens. R4 does it between
    the hidden state and down_proj.

    Pure and differentiable. Computed in `dtype` and rounded once, to the dtype each weight has.
    `names`: only these weights.
    """
    R1, R2 = (None if R is None else R.to(dtype) for R in (R1, R2))
    norm_of = {"q_proj": "attn_norm", "k_proj": "attn_norm", "v_proj": "attn_norm",
               "gate_proj": "ffn_norm", "up_proj": "ffn_norm"}

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
        if R2 is not None and part == "v_proj":  # [H_kv, d, D] and back
            new = (R2[layer].mT @ new.unflatten(0, (-1, R2.shape[-1]))).flatten(0, 1)
        if R2 is not None and part == "o_proj":  # [D, H, d] and back
            new = (new.unflatten(1, (-1, R2.shape[-1])) @ R2[layer]).flatten(1)
        if ffn_hadamard and part == "down_proj":
            new = hadamard_transform(new)
        return new.to(W.dtype)

    return {name: rotated(name, weights[name]) for name in names or weights}


def random_rotations(config, seed: int = 0):
    """(R1 [D, D], R2 [L, d, d]) in fp64: Hadamard matrices whose rows have random signs. They are
    drawn in the official order: for powers of two, these are the official rotations."""
    generator = torch.Generator().manual_seed(seed)

    def draw(n):
        signs = 2 * torch.randint(0, 2, (n,), generator=generator) - 1
        return signs[:, None] * hadamard(n)

    return draw(config.n_embd), torch.stack([draw(config.head_dim) for _ in range(config.n_layer)])


def cayley_step(R, G, lr: float):
    """Rotations R [..., n, n] after one step against the gradient G.

    W is the part of the gradient that turns R and does not bend it. The Cayley transform,
    (I - aW/2)^-1 (I + aW/2), is exactly orthogonal because W^T = -W. A large W shortens the step.
    """
    W = R.mT @ G
    W = (W - W.mT) / 2
    largest_column_sum = W.abs().sum(dim=-2).amax(dim=-1)
    step = (1 / largest_column_sum).clamp(max=lr)[..., None, None]
    turn, identity = step / 2 * W, torch.eye(R.shape[-1], dtype=R.dtype, device=R.device)
    return torch.linalg.solve(identity - turn, (identity + turn) @ R.mT).mT


def loss_of(model, weights: dict, windows):
    """The loss of `model`, if its weights were these. On CUDA gradients are computed in bf16, while
    evaluations stay in fp32."""
    in_bf16 = windows.is_cuda and torch.is_grad_enabled()
    model.compute_dtype = torch.bfloat16 if in_bf16 else torch.float32
    return functional_call(model, weights, (windows[:, :-1], windows[:, 1:]))


def rotation_gradients(model, weights: dict, R1, R2, windows, ffn_hadamard=True):
    """(loss, gradient of R1, gradient of R2) for rotated weights on windows [n, T + 1].

    The windows pass through the rounded `model` in parts, whose gradients add up at the rotated
    weights. From there they go on to R1 and R2 one weight after the other: the intermediate results
    of all rotations at once would not fit into memory.
    """
    R1, R2 = R1.detach().requires_grad_(), R2.detach().requires_grad_()
    with torch.no_grad():
        rotated = rotated_weights(weights, R1, R2, ffn_hadamard, torch.float32)
    leaves = {name: W.requires_grad_() for name, W in rotated.items() if not name.endswith("gain")}
    total = 0.0
    for part in windows.split(windows_at_once(windows.shape[1] - 1)):
        loss = loss_of(model, rotated, part) * len(part) / len(windows)
        loss.backward()
        total += loss.item()
    for name, leaf in leaves.items():
        rotated_again = rotated_weights(weights, R1, R2, ffn_hadamard, torch.float32, [name])[name]
        rotated_again.backward(leaf.grad)
    return total, R1.grad, R2.grad


def learn_rotations(model, R1, R2, windows, recipe: Recipe):
    """The rotations (R1, R2), from those given, that keep the loss of `model` lowest, which rounds
    activations, keys and values by `recipe` and already has its R4. It is left in another
    compute_dtype.

    Of `windows` [n, T + 1] the first few only judge, every ten steps, and the best rotations so far
    are returned: small models may well get worse in between. The learning rate falls from its `lr`
    to 0 along a cosine. Raises ValueError if there are too few windows.
    """
    steps = recipe.steps
    ffn_hadamard = recipe.has_r4
    windows = windows.to(R1.device)
    held_out, windows = windows[:SPIN_BATCH], windows[SPIN_BATCH:]
    if not len(windows):
        raise ValueError(f"SpinQuant needs more than {SPIN_BATCH} sequences of calibration, not "
                         f"{len(held_out)}")
    weights = model.state_dict()
    best, least = (R1, R2), math.inf
    bar = tqdm(range(steps + 1), "SpinQuant", leave=False, disable=None)
    for step in bar:
        if step % 10 == 0 or step == steps:
            with torch.no_grad():
                rotated = rotated_weights(weights, R1, R2, ffn_hadamard, torch.float32)
                parts = held_out.split(windows_at_once(2 * held_out.shape[1]))
                losses = [loss_of(model, rotated, part) * len(part) for part in parts]
                loss = (sum(losses) / len(held_out)).item()
            bar.set_postfix_str(f"loss {loss:.4f}", refresh=False)
            if loss < least:
                best, least = (R1, R2), loss
        if step < steps:
            batch = windows[torch.arange(step * SPIN_BATCH, (step + 1) * SPIN_BATCH) % len(windows)]
            _, G1, G2 = rotation_gradients(model, weights, R1, R2, batch, ffn_hadamard)
            clip = (1 / torch.sqrt(G1.square().sum() + G2.square().sum())).clamp(max=1)  # norm <= 1
            rate = recipe.lr * (1 + math.cos(math.pi * step / steps)) / 2
            R1, R2 = cayley_step(R1, clip * G1, rate), cayley_step(R2, clip * G2, rate)
    return best


@contextmanager
def full_precision(device: torch.device):
    """No TF32, whose ten bits would drown what rotations and Hessians are about. No cache in
    autocast: it would keep weights of earlier steps."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.autocast(device.type, enabled=False, cache_enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(before)
