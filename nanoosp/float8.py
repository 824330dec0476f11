"""Matrix products of eight-bit floats, for train.py --dtype float8: faster, and with less memory.

A GPU multiplies bytes at twice the speed of bfloat16. But a byte has few values, and the two
formats divide them differently:

    E4M3   4 bits of exponent, 3 of mantissa: 0.0020 to 448, steps of 1/8    activations, weights
    E5M2   5 bits of exponent, 2 of mantissa: 0.000015 to 57344, of 1/4      gradients

Gradients get the wider range, for they differ by more powers of two. A tensor has one scale, which
moves its largest value to the format's largest. So an outlier pushes all others down, towards the
values below which E4M3 has nothing but zero: outlier-safe activations are what this format wants.

Only the linears of the blocks multiply so. With head and EmbProj too, OSP's loss on Shakespeare was
0.2 higher (results/float8/README.md). The rest computes as with --dtype bfloat16. So does
everything without a gradient: evaluation sees the model as it is. Parameters, their gradients, the
optimizer and checkpoints stay fp32.
"""

import torch
import torch.nn as nn

from nanoosp.options import fail

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2


def to_float8(x, dtype):
    """x in float8, scaled to use all of its range, and what to multiply it by to get x again."""
    largest = torch.finfo(dtype).max
    scale = largest / x.abs().amax().float().clamp(min=1e-12)  # x may be all zeros
    return (x.float() * scale).clamp(-largest, largest).to(dtype), 1 / scale


def product(a, b):
    """A B^T in bfloat16, for a = (A, factor) and b = (B, factor) as to_float8() makes them. A is
    [n, k] and B [m, k]; the hardware wants both contiguous along k. It sums in fewer bits
    than fp32 has, which makes a step 3 % faster. What that costs is in
    results/float8/README.md."""
    return torch._scaled_mm(a[0].contiguous(), b[0].contiguous().t(), scale_a=a[1], scale_b=b[1],
                            out_dtype=torch.bfloat16, use_fast_accum=True)


class Float8Product(torch.autograd.Function):
    """X W^T for X [n, k], W [m, k], and its two gradients: three products in float8."""

    @staticmethod
    def forward(ctx, X, W):
        X8, W8 = to_float8(X, E4M3), to_float8(W, E4M3)
        ctx.save_for_backward(*X8, *W8)  # a byte a number, where bfloat16 would keep two
        ctx.dtypes = X.dtype, W.dtype
        return product(X8, W8)

    @staticmethod
    def backward(ctx, gradient):  # [n, m]
        X, X_scale, W, W_scale = ctx.saved_tensors
        G, G_scale = to_float8(gradient, E5M2)
        to_X = product((G, G_scale), (W.t(), W_scale))  # G W
        to_W = product((G.t(), G_scale), (X.t(), X_scale))  # G^T X
        return to_X.to(ctx.dtypes[0]), to_W.to(ctx.dtypes[1])


class Float8Linear(nn.Linear):
    """[..., k] -> [..., m]. The tokens of a micro-batch must be a multiple of 16."""

    def forward(self, x):
        if not torch.is_grad_enabled():
            return super().forward(x)
        return Float8Product.apply(x.flatten(0, -2), self.weight).unflatten(0, x.shape[:-1])


def use_float8(model):
    """Let the linears of the blocks multiply in float8 while gradients are taken. Ends the program where that cannot be."""
    device = model.embed.weight.device
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (9, 0):
        fail(f"--dtype float8: a {torch.cuda.get_device_name(device)} has no float8 products; "
             "Hopper and newer GPUs have: use --dtype bfloat16")
    if device.type == "mps":
        fail("--dtype float8: MPS has no float8 products; use --dtype bfloat16")
    for module in model.blocks.modules():
        if isinstance(module, nn.Linear):
            module.__class__ = Float8Linear  # the same tensors, with another forward()
