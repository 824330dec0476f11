"""Run docs/lesson.ipynb from top to bottom, and write its outputs into it, cleaned:

    python -m tools.lesson

It needs nbclient and ipykernel (requirements-extra.txt), and takes as long as the lesson does.
"""

import sys
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # to run from any directory

from nanoosp.files import require, write_text
from nanoosp.options import ROOT, command, parse

LESSON = ROOT / "docs/lesson.ipynb"


def read():
    """The notebook, as nbformat has it: cells with `source`, `outputs` and `metadata`."""
    return require("nbformat", "reading the lesson").read(LESSON, as_version=4)


def execute(notebook, timeout: int):
    """Run its cells in a fresh kernel, and put their outputs into it. Raises nbclient's
    CellExecutionError if a cell fails, CellTimeoutError if one takes over `timeout` seconds."""
    require("ipykernel", "running the lesson")
    nbclient = require("nbclient", "running the lesson")
    folder = {"metadata": {"path": str(LESSON.parent)}}  # as in Jupyter
    nbclient.NotebookClient(notebook, timeout=timeout, resources=folder,
                            coalesce_streams=True).execute()  # all that a cell prints is one output


def as_committed(notebook) -> str:
    """The file's content: sources, text and figures, without times, versions and messages of the
    machine. Raises ValueError if an output still names one of its folders."""
    notebook.metadata = {"kernelspec": {"display_name": "Python 3", "language": "python",
                                        "name": "python3"},
                         "language_info": {"name": "python"}}
    for cell in notebook.cells:
        cell.metadata = {}
        if cell.cell_type == "code":  # stderr tells of downloads, in paths of this machine
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
            for output in cell.outputs:
                output.pop("transient", None)
                output.get("metadata", {}).clear()
    text = require("nbformat", "writing the lesson").writes(notebook) + "\n"
    for folder in (ROOT, Path.home(), Path(sys.prefix)):
        if f"{folder}/" in text:
            raise ValueError(f"an output names {folder}: nothing was written")
    return text


@dataclass
class Options:
    """There are none but --help."""


@command
def main(argv=None):
    parse(Options, __doc__, argv)
    began = time.perf_counter()
    notebook = read()
    execute(notebook, timeout=3600)
    text = as_committed(notebook)
    write_text(LESSON, text)
    print(f"wrote {LESSON.relative_to(ROOT)}: {len(text.encode()) / 1e6:.2f} MB, "
          f"in {time.perf_counter() - began:.0f} s")


if __name__ == "__main__":
    main()
