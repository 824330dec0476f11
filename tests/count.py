"""Counts what a reader of the five top files reads: lines, code, and the share of it that is the subject.

    python tests/count.py                   all five: lines, code lines, subject, packed assignments
    python tests/count.py train.py          one, or any other files
    python tests/count.py --lines train.py  each code line with its label, to dispute

A code line is neither blank nor comment nor docstring; each line of a long statement counts. Its label is "subject",
what a student came for, or the first row of RULES that fits: by the name of what is defined there, or by words in the
statement. No rule knows a line number. Three rules more:
    - an `if`, `for`, `with`, `try` or `def` belongs where all that it holds belongs;
    - what an `if` or a definition holds belongs where the `if` or the name does;
    - `for` and `with` are not judged by their words: a loop is a loop, also over a progress bar.

A packed assignment says two things in one statement: `a, b = x, y` (a tuple written out on both sides, also in an
arm of `... if ... else ...`), or `a = b = x`. Unpacking one thing, as in `a, b = f(x)`, is not packed.
"""

import ast
import io
import re
import sys
import tokenize
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FIVE = [ROOT / f"{name}.py" for name in ("model", "muon", "train", "quantize", "eval")]

# label: (what is wholly so: functions, classes, constants in capitals; words in a statement)
RULES = {
    "imports": ("", r"^(import|from) "),
    "presets": ("PRESETS|SHAPE", ""),
    "options": ("Options|defaults|resolve",
                r"\b(parse|option|fill|early|answer_before_torch|start)\(|\bopt\.recompute\b|\beval_args =|"
                r"\bSHAPE\b|shape = dict|\*\*shape\b"),
    "door": ("main", r"\bdoor\(|__main__"),
    "hooks": ("hooked", ""),
    "cache": ("new_cache", r"^cache\b|\bcache\[0\]"),
    "loading": ("from_weights", ""),
    "figures": ("states_of_a_window|strongest_sink", r"\bhistogram\b|\bcounts\b|\bedges\b"),
    "writing": ("generate|sample|write", ""),
    "checks": (r"add_param_group|check_\w+", r"^raise\b|^assert\b|\bfail\(|\bcheck_\w+\(|^self\.allow_tables\b"),
    "ranks": ("_shares|_momenta|_all_gathered|everyones|(load_)?state_dict",
              r"\bdist\.|^(ranks|self)\.(world|first)\b|DistributedDataParallel|Divided|_all_gathered|everyones\("),
    "saving": ("", r"\.saves?\(|\brestore\(|\.resume\(|\bsave_every\b|^(not )?state$"),
    "signals": ("StopSignal", r"\bstop\.|\bstopping\b|StopSignal"),
    "logging": ("evaluate_and_log", r"\bsay\(|\brun\.(log|open_log|finish)|\bbar\b|perf_counter|\bprint\(|"
                r"\bseconds\b|^return dict\(result, step|\.summary\(|\bRun\(|\bevaluate_and_log\("),
    "speed": ("stacks|Half", r"\brecompute\b|\.?compile\(|[Rr]ecord|freeze_|^fused =|in_bf16|speed_up\(|cuda_graph"),
    "output": ("", r"^result = (\{|dict)|^return dict\(result|^return \{'\w+': watch"),
    "closure": ("", r"\bclosure\b|^return loss$"),
}


def label(names: str = "", words: str = "") -> str:
    """Of a definition of `names`, or of a statement with these `words`."""
    for name, (defined, pattern) in RULES.items():
        if names and re.fullmatch(defined or "$^", names) or words and re.search(pattern or "$^", words):
            return name
    return "subject"


class Labels(dict):
    """The label of each line of a source text, by number. Lines without code have one, too."""

    def __init__(self, text: str):
        self.block(ast.parse(text).body, None)

    def paint(self, first: int, last: int, name: str):
        self.update(dict.fromkeys(range(first, last + 1), name))

    def block(self, statements, outer) -> str:
        """Label statements, in something that is wholly `outer` or None. Returns the label they have in common, else
        "subject"."""
        names = {self.statement(statement, outer) for statement in statements}
        return names.pop() if len(names) == 1 else "subject"

    def statement(self, node, outer) -> str:
        """Label one statement and what it holds. Returns the label of the whole."""
        first = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", ()))])
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            name = outer or label(names=node.name)
        elif hasattr(node, "body"):  # if and while have a test; for, with and try have none
            name = outer or label(words=ast.unparse(node.test) if hasattr(node, "test") else "")
        else:
            constant = isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "").isupper()
            name = outer or label(node.targets[0].id if constant else "", ast.unparse(node))
        self.paint(first, node.end_lineno, name)
        if not hasattr(node, "body"):
            return name
        body = node.body[is_docstring(node.body[0]):] or node.body
        inner = {self.block(body, outer if name == "subject" else name)}
        for handler in getattr(node, "handlers", ()):
            inner.add(of_handler := self.block(handler.body, outer))
            self.paint(handler.lineno, handler.body[0].lineno - 1, of_handler)
            if of_handler == "checks":  # the try is there for it
                self.paint(node.lineno, node.lineno, "checks")
        for rest in filter(None, (getattr(node, "orelse", None), getattr(node, "finalbody", None))):
            inner.add(of_rest := self.block(rest, outer))
            if of_rest != "subject":  # so is the line of the `else`, which stands below the body
                self.paint(max(n.end_lineno for n in node.body) + 1, rest[0].lineno - 1, of_rest)
        if len(inner) > 1:
            return "subject"
        if "subject" not in inner:
            self.paint(first, node.end_lineno, *inner)
        return inner.pop()


def is_docstring(node) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


def code_lines(text: str) -> set[int]:
    """The numbers of the lines that hold code."""
    empty = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    lines = {i for t in tokens if t.type not in empty for i in range(t.start[0], t.end[0] + 1)}
    docstrings = [node for node in ast.walk(ast.parse(text)) if is_docstring(node)]
    return lines - {i for node in docstrings for i in range(node.lineno, node.end_lineno + 1)}


def packed(text: str) -> list[int]:
    """The numbers of the lines where packed assignments begin."""
    is_tuple = lambda node: isinstance(node, (ast.Tuple, ast.List))

    def says_two_things(node):
        arms = (node.value.body, node.value.orelse) if isinstance(node.value, ast.IfExp) else (node.value,)
        return len(node.targets) > 1 or is_tuple(node.targets[0]) and any(map(is_tuple, arms))

    return [n.lineno for n in ast.walk(ast.parse(text)) if isinstance(n, ast.Assign) and says_two_things(n)]


def count(path: Path) -> Counter:
    """Of a file: "lines", "code", "packed", "widest" (columns), and its code lines by label."""
    text = path.read_text(encoding="utf-8")
    labels, code = Labels(text), code_lines(text)
    return Counter(lines=len(text.splitlines()), code=len(code), packed=len(packed(text)),
                   widest=max(map(len, text.splitlines()))) + Counter(labels[i] for i in code)


def row(name: str, c: Counter) -> str:
    rest = ", ".join(f"{label} {c[label]}" for label in sorted(RULES, key=lambda label: -c[label]) if c[label])
    return (f"{name:10}{c['lines']:6}{c['code']:6}{c['subject']:9}{c['subject'] / c['code']:6.0%}{c['packed']:8}"
            f"{100 * c['packed'] / c['code']:9.1f}   {rest}")


def main(argv):
    if "--lines" in argv:
        for path in [Path(word) for word in argv if word != "--lines"] or FIVE:
            text = path.read_text(encoding="utf-8")
            labels, lines = Labels(text), text.splitlines()
            print(path, *(f"{labels[i]:>8} {i:4} {lines[i - 1]}" for i in sorted(code_lines(text))), sep="\n")
        return
    counts = [(path.name, count(path)) for path in map(Path, argv or FIVE)]
    print(f"{'':10}{'lines':>6}{'code':>6}{'subject':>9}{'':6}{'packed':>8}{'per 100':>9}   the rest, in code lines")
    print(*(row(*c) for c in counts), row("together", sum((c for _, c in counts), Counter())), sep="\n")


if __name__ == "__main__":
    main(sys.argv[1:])
