"""docs/lesson.ipynb runs, its exercises tell right from wrong, and its file is fit to be shown."""

import ast
import json
import re
import sys
from base64 import b64decode
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from count import FIVE
from nbformat.v4 import new_code_cell, new_output

from nanoosp.hadamard import hadamard
from tools import exercises, lesson

ROOT = Path(__file__).resolve().parent.parent
QUICK = "--steps 4 --n-layer 2 --n-head 2 --n-embd 32 --seq-len 32 --batch-size 8 --eval-windows 16"
FIGURES = {"gradient", "gains", "side-by-side", "heat-maps", "grid-figure", "bars"}
FACTS = """
import json
print(json.dumps(dict(
    after=[after[large].min().item(), after[large].max().item()], width=D, kurtosis=kurtosis, added=added,
    steps={name: [record["step"] for record in log] for name, log in logs.items()},
    losses={name: [record["val_loss"] for record in log] for name, log in logs.items()},
    differ=(logits - folded).abs().max().item(), logits=logits.abs().max().item())))
"""
NOTEBOOK = json.loads(lesson.LESSON.read_text(encoding="utf-8"))
CELLS = {cell["id"]: cell for cell in NOTEBOOK["cells"]}
ANSWERS = [name for name in CELLS if name.startswith("answer-")]


def source(cell) -> str:
    return "".join(cell["source"])


def printed(cell) -> str:
    return "".join("".join(output["text"]) for output in cell["outputs"] if output["output_type"] == "stream")


def figures(cell) -> list[str]:
    """The PNGs that a cell shows, in base64."""
    shown = [output["data"] for output in cell["outputs"] if "data" in output]
    return ["".join(data["image/png"]) for data in shown if "image/png" in data]


def solution(name: str) -> str:
    """What is folded away in the text of an exercise."""
    text = source(CELLS[name.replace("answer", "exercise")])
    folded = r".*\n<details>\n<summary>Solution</summary>\n\n```python\n(.*?)```\n\n</details>"
    return re.fullmatch(folded, text, re.S).group(1)


def solved(name: str) -> str:
    """An exercise's cell with the solution in place of the dots."""
    unsolved = source(CELLS[name])
    function = ast.get_source_segment(unsolved, ast.parse(unsolved).body[0])
    return unsolved.replace(function, solution(name))


@pytest.fixture(scope="module")
def run(dataset_dir):
    """The cells by id after a quick run on made-up words, with each exercise solved after it was left open, and
    "facts": what the run's variables hold."""
    notebook = lesson.read()
    added = [(f"solved-{name}", solved(name), name) for name in ANSWERS] + [("facts", FACTS, "end")]
    for name, code, after in added:
        place = [cell.id for cell in notebook.cells].index(after) + 1
        notebook.cells.insert(place, new_code_cell(code, id=name))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LESSON_OPTIONS", f"{QUICK} --data {dataset_dir}")
        patch.setenv("OMP_NUM_THREADS", "1")
        lesson.execute(notebook, timeout=120)
    return {cell.id: cell for cell in notebook.cells}


def test_the_lesson_runs_and_draws_its_figures(run):
    assert {name for name, cell in run.items() if cell.cell_type == "code" and figures(cell)} == FIGURES
    for name in FIGURES:
        (png,) = figures(run[name])
        assert len(b64decode(png)) > 5000, name  # an empty one has fewer bytes


def test_its_numbers_lie_within_bounds(run):
    facts = json.loads(printed(run["facts"]))
    low, high = facts["after"]
    assert 0.6 < low < high < 1.25
    assert facts["width"] == 32 and {len(values) for values in facts["kurtosis"].values()} == {3}
    assert facts["steps"] == {"Adam": [0, 1, 2, 3, 4], "OSP": [0, 1, 2, 3, 4]}
    for losses in facts["losses"].values():
        assert losses[0] == pytest.approx(5.55, abs=0.05)  # ln 256
        assert all(later < earlier for earlier, later in pairwise(losses))
    assert facts["differ"] < 1e-5 * facts["logits"]
    assert {name: len(values) for name, values in facts["added"].items()} == {"Adam": 4, "OSP": 4}
    assert all(abs(more) < 0.05 for values in facts["added"].values() for more in values)


@pytest.mark.parametrize("name", ANSWERS)
def test_an_unsolved_exercise_says_what_is_missing_and_a_solution_is_right(run, name):
    function = ast.parse(solution(name)).body[0].name
    assert printed(run[name]) == f"Not yet: put your code in place of the dots in {function}().\n"
    assert printed(run[f"solved-{name}"]).startswith("Right. ")
    assert "nan" not in printed(run[f"solved-{name}"])


def svd(G):
    return torch.linalg.svd(G, full_matrices=False)


def first(log, loss):
    return next((record["step"] for record in log if record["val_loss"] <= loss), -1)


def grid(w, bits, clip, low, high):
    scale = clip * w.abs().max() / high
    return scale * (w / scale).round().clamp(low, high)


LOG = [dict(step=10 * i, val_loss=3 - i / 10) for i in range(6)]
SHOWN = {  # what the checks show of a model, here of random numbers
    "orthogonal": [torch.randn(6, 9)],
    "special": [{"the signs": torch.sign}, 16],
    "step_of_loss": [LOG, LOG],
    "loudness": [{"Adam": torch.randn(9, 5)}, torch.arange(9) % 4],
    "round_row": [torch.randn(20)],
    "folded_head": [None, None],
    "round_rotated": [hadamard(20).float(), {"Adam": torch.randn(4, 20)}],
}


@pytest.mark.parametrize("name, answer, hint", [
    ("orthogonal", lambda G: G / G.norm(), "its singular values are not all 1"),
    ("orthogonal", lambda G: (svd(G)[0] @ svd(G)[2]).mT, "a matrix of shape [6, 4] became one of [4, 6]"),
    ("orthogonal", lambda G: svd(G)[0] @ svd(G)[2].mT, "V^T need not be transposed again"),
    ("orthogonal", lambda G: G @ G, "stops with RuntimeError"),
    ("special", lambda f, x, Q: (f(x @ Q) - f(x)).norm() / f(x).norm(), "for f(x) = 3x it should be 0"),
    ("special", lambda f, x, Q: (f(x @ Q) - f(x) @ Q).norm(), "divide the norm of the difference"),
    ("special", lambda f, x, Q: f(x @ Q) - f(x) @ Q, "the shape is [8, 8], but should be []"),
    ("step_of_loss", lambda log, loss: first(log, loss - 1e-6), "a loss equal to the one asked for counts"),
    ("step_of_loss", lambda log, loss: first(log[::-1], loss), "a loss of 3.0 is 10"),
    ("step_of_loss", lambda log, loss: first(log, loss) if loss > 1 else 40, "if the loss is never reached"),
    ("loudness", lambda x: x.amax(dim=1) / x.median(dim=1).values, "take absolute values first"),
    ("loudness", lambda x: x.abs().amax(dim=1) / x.abs().median(), "of one token"),
    ("loudness", lambda x: x.abs().amax(dim=0), "the shape is [7], but should be [20]"),
    ("round_row", lambda w, bits, clip: grid(w, bits, clip, -8, 7), "with 3 bits the largest code is 3"),
    ("round_row", lambda w, bits, clip: grid(w, bits, 1.0, -(2 ** (bits - 1)), 2 ** (bits - 1) - 1), "clamped"),
    ("round_row", lambda w, bits, clip: grid(w, bits, clip, -8, 7).clamp(max=0.5), "so 0.6 stays as it is"),
    ("folded_head", lambda head, P: head @ P.mT, "Which W has x @ W.T equal to it?"),
    ("folded_head", lambda head, P: P @ head, "stops with RuntimeError"),
    ("round_rotated", lambda x, H, round: round(x @ H), "H.T undoes H"),
    ("round_rotated", lambda x, H, round: round(x @ H) @ H, "H.T undoes H"),
    ("round_rotated", lambda x, H, round: round(x), "what is rounded should be x @ H"),
    ("round_rotated", lambda x, H, round: x, "round() is never called"),
    ("round_rotated", lambda x, H, round: [round(x @ H), x][1], "that has to be rotated back"),
    *((name, lambda *given: None, "returns nothing") for name in SHOWN),
])
def test_a_wrong_answer_gets_a_hint(name, answer, hint, capsys):
    getattr(exercises, f"check_{name}")(answer, *SHOWN[name])
    told = capsys.readouterr().out
    assert told.startswith("Not yet: ") and hint in told


def test_the_committed_outputs_are_those_of_one_whole_run():
    code = [cell for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == [*range(1, len(code) + 1)]
    assert {cell["id"] for cell in code if figures(cell)} == FIGURES
    assert all(printed(CELLS[name]).startswith("Not yet: put your code") for name in ANSWERS)
    kinds = {(output["output_type"], output.get("name")) for cell in code for output in cell["outputs"]}
    assert kinds == {("stream", "stdout"), ("display_data", None)}  # no errors, no warnings


def numbers(name: str) -> list[list[float]]:
    """Those that the committed lesson shows in each line that a cell printed."""
    number = r"[-+]?\d+\.?\d*(?:e-\d+)?"
    return [[float(x) for x in re.findall(number, line)] for line in printed(CELLS[name]).splitlines()]


def test_the_committed_numbers_say_what_the_text_says():
    (_, _, _, low, high), = numbers("gradient")
    assert 0.6 < low < high < 1.25
    (per_channel, gaussian), (single, _) = numbers("training")
    assert abs(single - gaussian) < 0.2 < per_channel - gaussian
    (adam, adam_kurtosis, gaussian), (osp, osp_kurtosis, _) = numbers("trained")
    assert osp < adam < 2 and abs(osp_kurtosis - gaussian) < 0.2 and adam_kurtosis > 1
    assert numbers("fold")[-1][1] < 1e-3
    _, adam, osp = numbers("methods")
    assert all(0 < more < 0.2 for more in (*adam, *osp)) and adam[0] > adam[1]


def test_the_lesson_is_small_and_names_no_machine():
    text = lesson.LESSON.read_text(encoding="utf-8")
    assert len(text.encode()) <= 1_500_000 and len(CELLS) == len(NOTEBOOK["cells"]) <= 40
    without_figures = re.sub(r'"image/png": (\[[^]]*\]|"[^"]*")', "", text)
    assert len(without_figures) < 100_000
    assert not re.search(r"/(?:home|root|tmp|work|usr|content|Users|var)/", without_figures)
    assert {*NOTEBOOK["metadata"]} == {"kernelspec", "language_info"}
    assert all(cell["metadata"] == {} for cell in CELLS.values())


def test_an_output_that_names_a_folder_of_the_machine_is_refused():
    notebook = lesson.read()
    notebook.cells[1].outputs = [new_output("stream", name="stderr", text=f"{ROOT}/data")]
    assert "stderr" not in lesson.as_committed(notebook)
    notebook.cells[1].outputs = [new_output("stream", name="stdout", text=f"{ROOT}/data")]
    with pytest.raises(ValueError, match="an output names"):
        lesson.as_committed(notebook)


def test_the_lesson_repeats_nothing_of_the_five_files():
    def of(code):
        nodes = [node for text in code for node in ast.walk(ast.parse(text))]
        names = {node.name for node in nodes if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
        kinds = (ast.Assign, ast.AugAssign, ast.Return, ast.For, ast.If)
        lines = {ast.unparse(node) for node in nodes if isinstance(node, kinds)}
        return names, {line for line in lines if len(line) > 40}

    cells = [source(cell).replace("%matplotlib inline", "") for cell in CELLS.values() if cell["cell_type"] == "code"]
    names, lines = of([*cells, *map(solution, ANSWERS)])
    names_of_five, lines_of_five = of(path.read_text(encoding="utf-8") for path in FIVE)
    assert {"training", "orthogonal"} <= names and not names & names_of_five
    calls = {"data, val = open_datasets(opt.data, opt.seq_len, opt.seed, ranks)"}  # as train() does
    assert len(lines) > 20 and lines & lines_of_five == calls


@pytest.mark.parametrize("here", ["clone", "clone/docs", "."])
def test_the_first_cell_finds_the_repository(here, tmp_path, monkeypatch):
    (tmp_path / "clone").symlink_to(ROOT)
    monkeypatch.chdir(tmp_path / here)
    monkeypatch.setattr("sys.path", [])
    monkeypatch.setenv("GOMP_SPINCOUNT", "0")
    exec(source(CELLS["root"]), {})
    assert (Path(sys.path[0]) / "muon.py").is_file()


def test_without_the_repository_the_first_cell_says_so(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GOMP_SPINCOUNT", "0")
    with pytest.raises(FileNotFoundError, match="clone it first"):
        exec(source(CELLS["root"]), {})


def test_every_link_of_the_lesson_resolves():
    text = "\n".join(source(cell) for cell in CELLS.values() if cell["cell_type"] == "markdown")
    links = [link for link in re.findall(r"\]\(([^)]+)\)", text) if not link.startswith("https://")]
    assert len(links) > 5
    for link in links:
        assert (lesson.LESSON.parent / link).is_file(), link
