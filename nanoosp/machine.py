"""The machine that a run is on: its ranks, its device, and the signals that stop it."""

import gc
import math
import os
import signal
import sys
import time
from dataclasses import dataclass

import torch
import torch.distributed as dist
from tqdm import tqdm

from nanoosp.options import exit_at_once, fail, is_first


@dataclass
class Ranks:
    """This process among all of a run. Without torchrun there is one, and nothing is ever sent.

    As a context: all ranks leave together, and the process group ends with the block.
    """

    rank: int = 0
    world: int = 1
    device: str = "cpu"

    @classmethod
    def start(cls, device: str) -> "Ranks":
        if "RANK" not in os.environ:  # torchrun sets it
            return cls(device=device)
        if device == "cuda":
            device = f"cuda:{os.environ['LOCAL_RANK']}"
            torch.cuda.set_device(device)
            # device_id: else NCCL guesses from the rank which GPU is this process's, and warns of it
            dist.init_process_group("nccl", device_id=torch.device(device))
        else:
            dist.init_process_group("gloo")
        # --compile: else a block is cut wherever a bucket of gradients is full, into parts that fuse less
        torch._dynamo.config.optimize_ddp = False
        return cls(dist.get_rank(), dist.get_world_size(), device)

    @property
    def first(self) -> bool:
        return self.rank == 0

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """Sum over all ranks. Changes `values`."""
        if self.world > 1:
            dist.all_reduce(values)
        return values

    def mean(self, values: torch.Tensor) -> list[float]:
        """Mean over all ranks, as Python numbers. Changes `values`."""
        return (self.sum(values) / self.world).tolist()

    def wait(self):
        """Until all ranks are here."""
        if self.world > 1:
            dist.barrier()

    def __enter__(self):
        return self

    def __exit__(self, kind, *_):
        StopSignal.forget()
        if dist.is_initialized():
            if kind is None:
                dist.barrier()  # a rank that is gone early can break the others' goodbye
            dist.destroy_process_group()


def say(text: str, to_stderr: bool = False):
    """Print a line above any progress bar; only one rank does."""
    if is_first():
        tqdm.write(text, file=sys.stderr if to_stderr else sys.stdout)


class StopSignal:
    """Remembers Ctrl-C or SIGTERM, so that the step can be finished. A second Ctrl-C ends at once.

    Second means at least two seconds later: torchrun passes on what a terminal has already sent.
    """

    def __init__(self):
        self.received, self.when = 0, math.inf
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._remember)

    def _remember(self, number, frame):
        if number == signal.SIGINT and time.monotonic() > self.when + 2:
            exit_at_once()
        self.received, self.when = number, min(self.when, time.monotonic())

    @staticmethod
    def forget():
        """From now on signals do what they usually do."""
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def freeze_garbage():
    """Call once after the first step. Otherwise Python's garbage collector rescans the objects of
    torch.compile (0.3 s) at a different step on each rank, and every rank waits for it."""
    gc.collect()
    gc.freeze()


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
