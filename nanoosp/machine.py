"""The machine that a run is on: its device and its memory."""

import math
import sys

import torch

from nanoosp.options import fail


def pick_device(wanted: str | None) -> str:
    """The device that was asked for, or the best there is. Ends the program if it is missing."""
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(),
                 "cpu": True}
    if wanted and not available[wanted]:
        fail(f"--device {wanted}: torch sees no {wanted.upper()} device here; use --device cpu")
    return wanted or next(device for device in available if available[device])


def peak_memory_gib(device: str) -> float:
    """The most memory held so far, of the GPU or of this process, in GiB; nan if unknown."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated() / 2**30
    try:
        import resource  # not on Windows
    except ImportError:
        return math.nan
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS, KiB elsewhere
    return peak / (2**30 if sys.platform == "darwin" else 2**20)
