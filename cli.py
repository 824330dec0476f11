"""What every script here asks of the command line and of the machine it runs on. Nothing in it is about OSP."""

import argparse
import difflib
import math
import os
import sys
from contextlib import nullcontext

import torch


def first() -> bool:
    """Of torchrun's processes, is this the one that talks?"""
    return os.environ.get("RANK", "0") == "0"


class Parser(argparse.ArgumentParser):
    """argparse that takes --batch_size for --batch-size, names the nearest option for a misspelt one, and is brief."""

    def __init__(self, description: str):
        layout = argparse.RawDescriptionHelpFormatter
        super().__init__(description=description, formatter_class=layout, allow_abbrev=False)

    def parse(self, argv):
        def dashes(word):
            name, *value = word.split("=", 1)
            return "=".join([name.replace("_", "-"), *value]) if word.startswith("--") else word

        args, unknown = self.parse_known_args([dashes(word) for word in argv])
        if unknown:
            near = difflib.get_close_matches(unknown[0].split("=")[0], self._option_string_actions, n=1)
            self.error(f"unknown option {unknown[0]}; " + (f"did you mean {near[0]}?" if near else "see --help"))
        return args

    def error(self, message):
        if first():
            print(f"error: {message}", file=sys.stderr)
        sys.exit(2)


def run(main):
    """Call a script's main(), and end without a traceback where a person ends it: by Ctrl-C, or a pipe into `head`."""
    try:
        main()
        sys.stdout.flush()
    except KeyboardInterrupt:
        sys.exit("interrupted")
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains once more at its exit
        sys.exit(1)


def pick_device(asked: str | None, error) -> str:
    """The device asked for, or the best there is. One that is not there goes to error(message)."""
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if asked and not there[asked]:
        error(f"--device {asked}: torch sees no {asked.upper()} device here; use --device cpu")
    return asked or next(device for device in there if there[device])


def precision(device: str, dtype: str):
    """The context of every forward pass: matrix products in bfloat16, or nothing."""
    return torch.autocast(device, dtype=torch.bfloat16) if dtype == "bfloat16" else nullcontext()


def peak_memory_gib(device: str) -> float:
    """The most memory held so far, of the GPU or of this process, in GiB; nan where that cannot be known."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated() / 2**30
    try:
        import resource  # not on Windows
    except ImportError:
        return math.nan
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS, KiB elsewhere
    return peak / (2**30 if sys.platform == "darwin" else 2**20)
