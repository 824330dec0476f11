"""The ranks of a run: one process, or as many as torchrun starts."""

import os
import sys
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from muon import Muon
from nanoosp.options import is_first
from nanoosp.signals import StopSignal


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

    def any(self, here: bool) -> bool:
        """Is it so on any rank?"""
        return here if self.world == 1 else self.sum(torch.tensor(float(here), device=self.device)).item() > 0

    def mean(self, values: torch.Tensor) -> list[float]:
        """Mean over all ranks, as Python numbers. Changes `values`."""
        return (self.sum(values) / self.world).tolist()

    def muon(self):
        """The class of Muon that divides its work among the ranks, if there are several."""
        if self.world == 1:
            return Muon
        from nanoosp.divided import DividedMuon  # only here: one process does without it

        return DividedMuon

    def average_gradients(self, model):
        """What to call instead of `model`, so that backward() leaves the mean of all ranks' gradients."""
        return model if self.world == 1 else DistributedDataParallel(model, gradient_as_bucket_view=True)

    def wait(self):
        """Until all ranks are here."""
        if self.world > 1:
            dist.barrier()

    def __enter__(self):
        return self

    def __exit__(self, kind, *_):
        StopSignal.forget()  # whatever ended the block: Ctrl-C is to end the program again
        if dist.is_initialized():
            if kind is None:
                dist.barrier()  # a rank that is gone early can break the others' goodbye
            dist.destroy_process_group()


def say(text: str, to_stderr: bool = False):
    """Print a line above any progress bar; only one rank does."""
    if is_first():
        tqdm.write(text, file=sys.stderr if to_stderr else sys.stdout)
