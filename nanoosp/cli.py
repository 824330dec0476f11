"""What the scripts here share: command line, small files, optional packages, the machine. Nothing in it is about OSP.

torch is imported where it is used: data/*.py need none of it, and it takes seconds to start.
"""

import argparse
import difflib
import importlib
import json
import math
import os
import re
import sys
from contextlib import nullcontext
from pathlib import Path

# ---------------------------------------------------------------------------------------------------------------------
# The command line

NOTES = r"\n\n(?:Glossary|Words used here|Deviations|Read it top to bottom)"  # from here on for who reads the code


def first() -> bool:
    """Of torchrun's processes, is this the one that talks?"""
    return os.environ.get("RANK", "0") == "0"


class Parser(argparse.ArgumentParser):
    """argparse that takes --batch_size for --batch-size, names the nearest option for a misspelt one, and is brief.

    Its --help begins with the script's docstring, up to the notes for who reads the code.
    """

    def __init__(self, docstring: str):
        layout = argparse.RawDescriptionHelpFormatter
        super().__init__(description=re.split(NOTES, docstring)[0], formatter_class=layout, allow_abbrev=False)

    def parse(self, argv=None):
        """The options in `argv`, or else in sys.argv."""
        argv = sys.argv[1:] if argv is None else argv

        def dashes(word):
            name, *value = word.split("=", 1)
            return "=".join([name.replace("_", "-"), *value]) if word.startswith("--") else word

        args, unknown = self.parse_known_args([dashes(word) for word in argv])
        if unknown:
            near = difflib.get_close_matches(unknown[0].split("=")[0], self._option_string_actions, n=1)
            what = "unknown option" if unknown[0].startswith("-") else "unexpected word"
            self.error(f"{what} {unknown[0]}; " + (f"did you mean {near[0]}?" if near else "see --help"))
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


# ---------------------------------------------------------------------------------------------------------------------
# Small files


def write_whole(path: Path, text: str):
    """Write a file under a temporary name, then rename it: a kill leaves the old file or the new one."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        temporary.write_text(text, encoding="utf-8", newline="\n")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def read_log(path: Path) -> list[dict]:
    """The records of a run's log.jsonl, but for lines torn by a crash; none if there is no such file."""
    records = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []:
        try:
            records.append(json.loads(line))
        except ValueError:
            pass
    return [record for record in records if isinstance(record, dict)]


# ---------------------------------------------------------------------------------------------------------------------
# Optional packages, and the machine


def extra(module: str, what: str):
    """A module of requirements-extra.txt. Raises ImportError, which says that `what` needs it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise ImportError(f"{what} needs {package}: pip install -r requirements-extra.txt") from error


def pick_device(asked: str | None, error) -> str:
    """The device asked for, or the best there is. One that is not there goes to error(message)."""
    import torch

    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if asked and not there[asked]:
        error(f"--device {asked}: torch sees no {asked.upper()} device here; use --device cpu")
    return asked or next(device for device in there if there[device])


def precision(device: str, dtype: str):
    """The context of every forward pass: matrix products in bfloat16, or nothing."""
    import torch

    return torch.autocast(device, dtype=torch.bfloat16) if dtype == "bfloat16" else nullcontext()


def peak_memory_gib(device: str) -> float:
    """The most memory held so far, of the GPU or of this process, in GiB; nan where that cannot be known."""
    if device.startswith("cuda"):
        import torch

        return torch.cuda.max_memory_allocated() / 2**30
    try:
        import resource  # not on Windows
    except ImportError:
        return math.nan
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS, KiB elsewhere
    return peak / (2**30 if sys.platform == "darwin" else 2**20)
