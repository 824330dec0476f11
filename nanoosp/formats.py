"""The 4-bit formats that hardware has, MXFP4 and NVFP4, for quantize.py.

A row is cut into blocks, each with a scale of its own: an outlier makes the grid coarse only for
its block. In both formats a value is scale * v, and v one of the sixteen numbers of E2M1 (a sign,
two bits of exponent, one of mantissa):

    0  0.5  1  1.5  2  3  4  6     and their negatives: finer near 0, where most numbers are

    format  values in a block  scale of a block             and of the tensor
    mxfp4   32                 a power of two (E8M0)        -                   OCP MX v1.0, 6.3
    nvfp4   16                 E4M3, a float of eight bits  fp32                NVIDIA Blackwell

In NVFP4 a "tensor" is a whole weight, but one token's vector of activations: so no token depends on
another. (Inference servers use a constant from calibration instead.)
"""

import torch

E2M1 = (0, 0.5, 1, 1.5, 2, 3, 4, 6)
E4M3_MAX, E4M3_MIN = 448.0, 2.0**-9  # the smallest above 0: no block has a scale of 0


def e2m1(x):
    """x rounded to the nearest number of E2M1, and ties to the one with an even mantissa. What is
    beyond 6 becomes 6. The numbers are 0.5 apart up to 2, 1 apart up to 4, and then 2 apart."""
    size = x.abs()
    step = torch.where(size < 2, 0.5, torch.where(size < 4, 1.0, 2.0))
    return ((x / step).round() * step).clamp(-6, 6)


class Blocks:
    """What both have in common. scale, code and round are used like those of Int in quantize.py."""

    code = staticmethod(e2m1)

    def scale(self, x, per_token: bool = False):
        """Scales [..., n / group] in fp32 for x [..., n], which is one tensor; per_token: every
        vector is one. Raises ValueError if blocks do not fill a row."""
        if x.shape[-1] % self.group:
            raise ValueError(f"{self.name} cuts rows into blocks of {self.group}, which do not "
                             f"divide {x.shape[-1]}")
        largest = x.float().unflatten(-1, (-1, self.group)).abs().amax(dim=-1)
        return self.scale_for(largest, per_token)

    def round(self, x, head_dim: int = 0):
        """Round x [..., C] in blocks, each token's vector on its own. Heads have no scales here."""
        scale = self.scale(x, per_token=True)[..., None]
        blocks = x.float().unflatten(-1, (-1, self.group))
        return (scale * e2m1(blocks / scale)).flatten(-2).to(x.dtype)


class Mxfp4(Blocks):
    name = "mxfp4"
    group = 32

    def scale_for(self, largest, per_token):
        # largest = m 2^e with 0.5 <= m < 1; largest / scale is then in [4, 8)
        exponent = torch.where(largest > 0, torch.frexp(largest).exponent - 3, -127)
        scale = torch.ldexp(torch.ones_like(largest), exponent.clamp(-127, 127))
        return torch.where(largest.isfinite(), scale, torch.nan)  # inf and nan have no exponent

    def stored(self, scale):
        """Scales [out, n / 32] of a weight as a file holds them: (a byte each, the tensor's)."""
        return (torch.frexp(scale).exponent + 126).to(torch.uint8), torch.ones(())

    def read(self, stored, tensor):
        """What stored() was given, bit for bit."""
        return torch.ldexp(torch.ones(stored.shape), stored.int() - 127)


class Nvfp4(Blocks):
    name = "nvfp4"
    group = 16

    def scale_for(self, largest, per_token):
        tensor = largest.amax(dim=-1, keepdim=True) if per_token else largest.max()
        tensor = (tensor / (6 * E4M3_MAX)).clamp(min=1e-30)
        block = (largest / 6 / tensor).clamp(E4M3_MIN, E4M3_MAX).to(torch.float8_e4m3fn)
        return block.float() / (1 / tensor)  # as others do, whose files hold 1 / tensor

    def stored(self, scale):
        guess = scale.max() / E4M3_MAX  # the largest is 448 times the tensor's, up to rounding
        for ulps in (0, 1, -1, 2, -2):
            tensor = (guess.view(torch.int32) + ulps).view(torch.float32)
            block = (scale / tensor).to(torch.float8_e4m3fn)
            if torch.equal(self.read(block.view(torch.uint8), tensor), scale):
                return block.view(torch.uint8), tensor
        raise ValueError("these are not scales of NVFP4")

    def read(self, stored, tensor):
        return stored.view(torch.float8_e4m3fn).float() / (1 / tensor)


BLOCK_FORMATS = {"mxfp4": Mxfp4(), "nvfp4": Nvfp4()}
