"""The five files stay an evening's reading, and imports go one way."""

import ast
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from count import FIVE, Labels, code_lines, count, packed

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("nanoosp", "data", "tools", "results")
TOP = tuple(path.stem for path in FIVE)
MAY_IMPORT = {
    "model": (),
    "muon": (),
    "nanoosp": ("model", "muon", "nanoosp"),
    "data": ("data", "nanoosp.files", "nanoosp.options"),
    "quantize": ("model", "nanoosp.formats", "nanoosp.hadamard", "nanoosp.halves", "nanoosp.recipe", "nanoosp.options",
                 "nanoosp.recorded", "nanoosp.rotations"),
    "eval": ("model", "quantize", "data", "nanoosp.batches", "nanoosp.options"),
    "train": ("model", "muon", "eval", "data", "nanoosp"),
    "tools": (*TOP, "data", "nanoosp", "tools"),
    "results": (*TOP, "data", "nanoosp", "tools", "results"),
}


def modules(root=ROOT) -> dict[str, Path]:
    """All of the product's modules by their dotted names."""
    paths = [*root.glob("*.py"), *(path for folder in FOLDERS for path in (root / folder).rglob("*.py"))]
    return {".".join(path.relative_to(root).with_suffix("").parts): path for path in paths}


class Imports(ast.NodeVisitor):
    """Our modules that a file imports anywhere, inside functions too, by statement or by string.

    A string is an import if it is the dotted name of one of our modules; a name without a dot only in a call of door(),
    import_module() or __import__(). An f-string that begins as in f"tools.{name}" stands for all of the folder.

    `of_module` is what is imported by whoever imports the file. `of_program` is what only `python file.py` imports: what
    stands under `if __name__ == "__main__"`, or in a call that is handed `__name__`.
    """

    def __init__(self, name: str, path: Path, known):
        self.name, self.known = name, known
        self.of_module, self.of_program = set(), set()
        self.into = self.of_module
        tree = ast.parse(path.read_text(encoding="utf-8"))
        self.constants = {node.targets[0].id: node.value for node in tree.body
                          if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)}
        self.visit(tree)
        self.of_program -= self.of_module

    def add(self, *names):
        self.into.update({*names} & self.known - {self.name})

    def visit_Import(self, node):
        self.add(*(alias.name for alias in node.names))

    def visit_ImportFrom(self, node):
        assert node.level == 0, f"{self.name}: relative import"
        self.add(node.module, *(f"{node.module}.{alias.name}" for alias in node.names))

    def visit_Constant(self, node):
        if isinstance(node.value, str) and "." in node.value:
            self.add(node.value)
            if node.value.removesuffix(".") in FOLDERS:  # as in "tools." + name
                self.add(*(name for name in self.known if name.startswith(node.value)))

    def visit_JoinedStr(self, node):
        match node.values:
            case [ast.Constant(value=prefix), ast.FormattedValue(), *_] if prefix.split(".")[0] in FOLDERS and "." in prefix:
                self.add(*(name for name in self.known if name.startswith(prefix)))
        self.generic_visit(node)

    def visit_If(self, node):
        self.visit(node.test)
        self.visit_apart(node.body, is_program=is_name(node.test.left) if isinstance(node.test, ast.Compare) else False)
        self.visit_apart(node.orelse, is_program=False)

    def visit_Call(self, node):
        arguments = [*node.args, *(keyword.value for keyword in node.keywords)]
        called = getattr(node.func, "attr", getattr(node.func, "id", ""))
        if called in ("door", "import_module", "__import__"):
            names = [part.value for a in arguments for part in ast.walk(self.looked_up(a)) if isinstance(part, ast.Constant)]
            arguments += [ast.Import([ast.alias(name)]) for name in names if isinstance(name, str)]
        self.visit(node.func)
        self.visit_apart(map(self.looked_up, arguments), is_program=any(map(is_name, arguments)))

    def looked_up(self, node):
        """A constant of the file in place of its NAME or NAME[key]."""
        name = node.value if isinstance(node, ast.Subscript) else node
        return self.constants.get(name.id, node) if isinstance(name, ast.Name) else node

    def visit_apart(self, nodes, is_program: bool):
        before = self.into
        self.into = self.of_program if is_program else self.into
        for node in nodes:
            self.visit(node)
        self.into = before


def is_name(node) -> bool:
    return isinstance(node, ast.Name) and node.id == "__name__"


def import_graph(root=ROOT) -> dict[str, set[str]]:
    """What each module imports. A module with a program in it is two nodes: nothing imports the program."""
    graph, known = {}, modules(root)
    for name, path in known.items():
        found = Imports(name, path, known.keys())
        graph[name] = found.of_module
        if found.of_program:
            graph[f"{name}.py (program)"] = found.of_module | found.of_program
    return graph


def circle(graph) -> list[str]:
    """The names along a circle of imports, or []."""
    done = set()

    def search(name, path):
        if name in path:
            return [*path[path.index(name):], name]
        if name in done:
            return []
        done.add(name)
        return next(filter(None, (search(other, [*path, name]) for other in sorted(graph[name]))), [])

    return next(filter(None, (search(name, []) for name in sorted(graph))), [])


@pytest.fixture(scope="module")
def graph():
    return import_graph()


def test_imports_go_one_way_also_inside_functions(graph):
    for name, imported in graph.items():
        allowed = MAY_IMPORT[name.split(".")[0]]
        if name.endswith("(program)") and name.removesuffix(".py (program)") in TOP:
            allowed = (*allowed, "tools")  # where the command lines are
        for other in imported:
            fits = any(other == prefix or other.startswith(prefix + ".") for prefix in allowed)
            assert fits, f"{name} imports {other}"


def test_no_module_imports_itself_by_way_of_others(graph):
    assert circle(graph) == []


@pytest.mark.parametrize("source", [
    "import tools.export",
    "def f():\n    from tools import export",
    "importlib.import_module('tools.export').main()",
    "def main():\n    import_module(name='tools.export')",
    "__import__('tools.export')",
    "for name in ('export', 'plot'):\n    import_module(f'tools.{name}')",
    "import_module('tools.' + name)",
    "TOOLS = {'--hf': 'tools.export'}\ndef main(argv):\n    import_module(TOOLS[argv[0]])",
    "EXPORT = 'tools.export'\nload(EXPORT)",
    "begin({'--hf': 'tools.export'})",
    "door('__main__', 'tools.export')",
    "if 'x' == name:\n    import_module('tools.export')",
])
def test_a_planted_circle_is_seen(tmp_path, source):
    (tmp_path / "tools").mkdir()
    (tmp_path / "tools/export.py").write_text("from nanoosp.options import parse\nimport quantize\n")
    (tmp_path / "nanoosp").mkdir()
    (tmp_path / "nanoosp/options.py").write_text('"""No door of its own: see tools.export."""\n')
    (tmp_path / "quantize.py").write_text(source + "\n")
    assert circle(import_graph(tmp_path)) == ["quantize", "tools.export", "quantize"]


@pytest.mark.parametrize("source", [
    "door(__name__, 'tools.export')",
    "begin(__name__, main, {'--hf': 'tools.export'})",
    "TOOLS = {'--hf': 'a'}\nif __name__ == '__main__':\n    begin(main, {'--hf': 'tools.export'})",
])
def test_what_only_a_program_imports_makes_no_circle(tmp_path, source):
    (tmp_path / "tools").mkdir()
    (tmp_path / "tools/export.py").write_text("import quantize\n")
    (tmp_path / "quantize.py").write_text(source + "\n")
    graph = import_graph(tmp_path)
    assert graph.pop("quantize.py (program)") == {"tools.export"}
    assert graph == {"quantize": set(), "tools.export": {"quantize"}} and circle(graph) == []


def test_import_train_loads_few_lines():
    script = "import sys, train; print(*(m.__file__ for m in sys.modules.values() if getattr(m, '__file__', 0)), sep='\\n')"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    ours = {Path(line) for line in done.stdout.splitlines()} & {*modules().values()}  # not those of a .venv
    lines = sum(len(path.read_text(encoding="utf-8").splitlines()) for path in ours)
    assert ROOT / "eval.py" in ours and lines <= 2400, lines


# How much there is to read. `python tests/count.py` prints it, and with --lines FILE the label of each line.


@pytest.fixture(scope="module")
def counts():
    return {path.stem: count(path) for path in FIVE}


def test_the_five_files_keep_to_their_budgets(counts):
    together = sum(counts.values(), Counter())
    assert together["code"] <= 800 and together["lines"] <= 1400, together
    assert counts["train"]["code"] <= 130 and counts["muon"]["code"] <= 85, counts
    assert all(c["widest"] <= 100 for c in counts.values()), counts


def test_most_of_what_is_read_is_the_subject(counts):
    together = sum(counts.values(), Counter())
    for c, least in ((counts["train"], 0.34), (counts["muon"], 0.85), (together, 0.68)):
        assert c["subject"] / c["code"] >= least, c
    assert (counts["train"]["subject"] + counts["train"]["presets"]) / counts["train"]["code"] >= 0.44, counts["train"]


def test_statements_say_one_thing_each(counts):
    together = sum(counts.values(), Counter())
    assert 100 * together["packed"] / together["code"] <= 1.5, counts


def test_functions_of_train_have_at_most_five_parameters():
    for node in ast.walk(ast.parse((ROOT / "train.py").read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef):
            assert len(node.args.args) <= 5, node.name


LABELLED = '''"""A docstring.

No code.
"""
import math  # imports
from os import (  # imports
    path,  # imports
)  # imports

PRESETS = {  # presets
    "tiny": dict(n_layer=4),  # presets
}  # presets


@dataclass  # options
class Options:  # options
    """What can be chosen."""

    steps: int = option(None, "steps")  # options


def train(opt, ranks):  # subject
    """Train."""
    # a comment
    if opt.steps > 9:  # checks
        raise ValueError(  # checks
            "too many")  # checks
    if opt.talks:  # logging
        print("begin")  # logging
    for step in tqdm(range(opt.steps)):  # subject
        loss = step**2  # subject
        if ranks.world > 1:  # ranks
            loss = mean(loss)  # ranks
        else:  # ranks
            loss = 2 * loss  # subject
        try:  # checks
            optimizer.step()  # subject
        except ValueError as error:  # checks
            raise ArithmeticError from error  # checks
        run.log(step)  # logging
        for name in names:  # checks
            if not name:  # checks
                fail(name)  # checks
            elif name == "x":  # checks
                fail("x")  # checks
    return """one  # subject
two"""  # subject
'''


def test_each_code_line_has_one_label():
    labels, code = Labels(LABELLED), code_lines(LABELLED)
    for number, line in enumerate(LABELLED.splitlines(), 1):
        expected = re.search(r"  # (\w+)$", line)
        assert (number in code) == bool(expected), line
        assert not expected or labels[number] == expected[1], (line, labels[number])


@pytest.mark.parametrize("statement, is_packed", [
    ("a, b = x, y", True),
    ("self.a, self.b = x, y", True),
    ("a, b = (x, y) if z else (y, x)", True),
    ("a = b = x", True),
    ("a, b = f(x)", False),
    ("a, b = x.shape", False),
    ("a, b = [g(t) for t in (x, y)]", False),
    ("a = x, y", False),
    ("cache[:] = x, y", False),
    ("for a, b in ((x, y), (y, x)):\n    pass", False),
])
def test_an_assignment_of_two_things_is_packed(statement, is_packed):
    assert packed(statement) == ([1] if is_packed else [])
