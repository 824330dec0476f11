"""The five files stay an evening's reading, and imports go one way."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
BUDGETS = {"model": 300, "muon": 220, "train": 260, "quantize": 350, "eval": 380}  # lines
MAY_IMPORT = {
    "model": (),
    "muon": (),
    "nanoosp": ("model", "nanoosp"),
    "data": ("data", "nanoosp.files", "nanoosp.options"),
    "quantize": ("model", "nanoosp.formats", "nanoosp.hadamard", "nanoosp.recipe", "nanoosp.options",
                 "nanoosp.recorded", "nanoosp.rotations"),
    "eval": ("model", "quantize", "data", "nanoosp.batches", "nanoosp.options"),
    "train": ("model", "muon", "eval", "data", "nanoosp"),
    "tools": (*BUDGETS, "data", "nanoosp", "tools"),
    "results": (*BUDGETS, "data", "nanoosp", "tools", "results"),
}


def modules() -> dict[str, Path]:
    """All of the product's modules by their dotted names."""
    paths = [*ROOT.glob("*.py"), *(path for folder in ("nanoosp", "data", "tools", "results")
                                   for path in (ROOT / folder).rglob("*.py"))]
    return {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in paths}


def imports(name: str, path: Path, known) -> set[str]:
    """Our modules that a file imports anywhere, inside functions too."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}: relative import"
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names & known - {name}


@pytest.fixture(scope="module")
def graph():
    known = modules()
    return {name: imports(name, path, known.keys()) for name, path in known.items()}


def test_imports_go_one_way_also_inside_functions(graph):
    for name, imported in graph.items():
        allowed = MAY_IMPORT[name.split(".")[0]]
        for other in imported:
            fits = any(other == prefix or other.startswith(prefix + ".") for prefix in allowed)
            assert fits, f"{name} imports {other}"


def test_no_module_imports_itself_by_way_of_others(graph):
    def reach(name, path):
        assert name not in path, " -> ".join([*path, name])
        for other in graph[name]:
            reach(other, [*path, name])

    for name in graph:
        reach(name, [])


def test_import_train_loads_few_lines():
    script = "import sys, train; print(*(m.__file__ for m in sys.modules.values() if getattr(m, '__file__', 0)), sep='\\n')"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    ours = {Path(line) for line in done.stdout.splitlines()} & {*modules().values()}  # not those of a .venv
    lines = sum(len(path.read_text(encoding="utf-8").splitlines()) for path in ours)
    assert ROOT / "eval.py" in ours and lines <= 2400, lines


def test_the_five_files_keep_to_their_budgets():
    texts = {name: (ROOT / f"{name}.py").read_text(encoding="utf-8") for name in BUDGETS}
    lengths = {name: len(text.splitlines()) for name, text in texts.items()}
    assert all(lengths[name] <= BUDGETS[name] for name in BUDGETS) and sum(lengths.values()) <= 1500, lengths
    assert max(len(line) for text in texts.values() for line in text.splitlines()) <= 100


def test_functions_of_train_have_at_most_five_parameters():
    for node in ast.walk(ast.parse((ROOT / "train.py").read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef):
            assert len(node.args.args) <= 5, node.name
