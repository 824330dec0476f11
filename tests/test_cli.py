"""What the scripts share."""

import ast
import dataclasses
import math
import os
import re
import signal
import subprocess
import sys
import time
import weakref

import pytest
from launch import fork
from test_structure import ROOT, modules

import eval as evaluation
import quantize
import train
from data import corpus, prepare
from nanoosp import files
from nanoosp.options import build_parser, flag, parse
from nanoosp.signals import StopSignal
from results.ffn_hidden import trace
from results.tables import PAGES
from tools import evaluate, export

DATA_SCRIPTS = {"data/prepare.py": prepare, "data/corpus.py": corpus}
SCRIPTS = {name: (script.Options, script.__doc__) for name, script in DATA_SCRIPTS.items()} | {
    "train.py": (train.Options, train.__doc__), "eval.py": (evaluate.Options, evaluation.__doc__),
    "quantize.py": (export.Options, quantize.__doc__)}


@pytest.mark.parametrize("name", SCRIPTS)
def test_help_shows_commands_but_no_notes_on_the_code(name):
    text = build_parser(*SCRIPTS[name]).format_help()
    assert f"python {name}" in text and "--help" in text
    for notes in ("Glossary", "Words used here", "Read it top to bottom"):
        assert notes not in text


@pytest.mark.parametrize("name", ["prepare", "corpus"])
def test_misspelt_options_of_the_data_scripts_name_the_nearest(name, capsys):
    required = {"prepare": [], "corpus": ["--out", "x"]}[name]
    with pytest.raises(SystemExit) as error:
        DATA_SCRIPTS[f"data/{name}.py"].main([*required, "--ouut=x"])
    assert error.value.code == 2
    assert capsys.readouterr().err == "error: unknown option --ouut=x; did you mean --out?\n"


def stand_in(folder, code, *modules):
    """An environment in which importing one of these packages runs `code` instead."""
    for module in modules:
        (folder / f"{module}.py").write_text(code.format(module))
    return {"PYTHONPATH": str(folder)}


FILES = [*modules().values()]
ELSEWHERE = {"tools/ablation.py": "python train.py --ablation", "tools/bench.py": "python train.py --bench",
             "tools/dry_run.py": "python train.py --dry-run", "tools/evaluate.py": "python eval.py",
             "tools/export.py": "python quantize.py"}  # these say so
RUNNABLE = [str(path.relative_to(ROOT)) for path in FILES if str(path.relative_to(ROOT)) not in ELSEWHERE
            if re.search('__name__ == "__main__"|^door', path.read_text(encoding="utf-8"), re.MULTILINE)]
SLOW = ["results/ffn_hidden/trace.py"]  # its options are train.py's and more, so it imports train.py


@pytest.mark.parametrize("command, words", [
    ("train.py --osp --norm rms", "--osp means"),
    ("train.py --n-embd 100 --n-head 3", "--n-embd 100 is not divisible by twice --n-head 3"),
    ("train.py --n-head 5", "--n-head 5"),  # fits neither a CPU's nor a GPU's preset
    ("train.py --steps 10 --warmup 9 --cooldown 2", "do not fit into --steps 10"),
    ("train.py --batch-size 6 --micro-batch-size 4", "not divisible by --micro-batch-size 4"),
    ("train.py --dtype float8 --seq-len 12 --micro-batch-size 2", "16 tokens, not 2 x 12"),
    ("train.py --dtype float8 --n-embd 40 --n-head 2", "multiples of 16, not of --n-embd 40"),
    ("train.py --preset small", "name a dataset with --data"),
    ("train.py --data random", "it is for --bench"),
    ("train.py --seeds 3", "are for --ablation"),
    ("train.py --device cpu --cuda-graph", "--cuda-graph is for one GPU"),
    ("train.py --ablation --osp", "--ablation chooses the parts of OSP itself"),
    ("train.py --ablation --bench", "--bench is for one model"),
    ("train.py --resume x --bench", "leave out --resume"),
    ("train.py --resume x --out y", "leave out --out"),
    ("train.py --bench --preset small --n-head 5", "--n-head 5"),
    ("eval.py x --bits none --methods rtn", "--methods is for quantizing"),
    ("train.py --embed-lr 0.01", "--embed-lr is for --optimizer muon"),
    ("train.py --optimizer muon-only --embed-lr 0.01", "--optimizer muon-only has one rate, --lr"),
    ("eval.py x --prompt a --compile --device cpu", "--compile is for CUDA"),
    ("eval.py x --tokens 50", "--tokens is for writing: add --prompt TEXT"),
    ("eval.py x --temperature 0", "--temperature is for writing"),
    ("eval.py x --top-k 5", "--top-k is for writing"),
    ("eval.py x --compile", "--compile is for writing"),
    ("eval.py x --seed 1 --text y", "--seed is for writing"),
    ("eval.py x --format mxfp4 --w-group 32", "error: mxfp4 has scales of its own: leave out"),
    ("quantize.py x --hf y --bits 4-16-16 --format mxfp4 --w-group 32",
     "error: mxfp4 has scales of its own: leave out"),
    ("quantize.py x --hf y --seed 1", "--seed goes with --out"),
    ("quantize.py x --out y --method rtn --steps 5", "--steps does nothing for --method rtn"),
])
def test_options_that_do_not_go_together_are_found_before_torch_is_imported(command, words,
                                                                           tmp_path):
    """Which takes 1.5 seconds on a good day."""
    script, *options = command.split()
    environment = stand_in(tmp_path, "raise SystemExit('{} was imported')", "torch")
    done = subprocess.run([sys.executable, ROOT / script, *options], capture_output=True, text=True,
                          env=environment, cwd=tmp_path)
    assert done.returncode == 2 and words in done.stderr, done.stderr
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


@pytest.mark.parametrize("option", ["--n-head 6", "--cuda-graph", "--resume x --n-head 5",
                                    "--bench --preset small", "--dry-run --preset small"])
def test_options_that_some_machine_or_run_can_obey_wait_for_torch(option, tmp_path):
    environment = stand_in(tmp_path, "raise SystemExit('{} was imported')", "torch")
    done = subprocess.run([sys.executable, ROOT / "train.py", *option.split()], capture_output=True,
                          text=True, env=environment, cwd=tmp_path)
    assert done.stderr == "torch was imported\n"


@pytest.mark.parametrize("script", RUNNABLE)
def test_help_and_mistakes_are_answered_from_any_directory_before_torch_is_imported(
        script, tmp_path):
    """That would take seconds, also in each of corpus.py's processes. Extras may be missing."""
    packages = ["tokenizers", "pyarrow", "huggingface_hub", "transformers", "matplotlib",
                "lm_eval"]
    environment = stand_in(tmp_path, "raise SystemExit('{} was imported')",
                           *packages, *["torch"] * (script not in SLOW))
    before = {path: path.stat().st_mtime_ns for path in (*FILES, *PAGES)}

    processes = [subprocess.Popen([sys.executable, ROOT / script, option], stdout=subprocess.PIPE,
                                  stderr=subprocess.PIPE, text=True, env=environment, cwd=tmp_path)
                 for option in ("--help", "--no-such-option")]  # side by side
    (help_text, nothing), (silence, error) = (process.communicate() for process in processes)
    assert processes[0].returncode == 0 and help_text.startswith("usage") and not nothing
    assert processes[1].returncode == 2 and re.fullmatch("error: .*\n", error) and not silence
    assert {path: path.stat().st_mtime_ns for path in before} == before  # tables.py writes pages
    assert not [path for path in tmp_path.iterdir() if path.suffix != ".py"]


def test_all_other_files_only_define_when_they_are_run():
    harmless = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef, ast.Assign, ast.Try,
                ast.AnnAssign)
    for path in FILES:
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            is_call = isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)
            if str(path.relative_to(ROOT)) not in RUNNABLE and is_call:
                called = ast.unparse(node.value.func)
                assert called in ("answer_before_torch", "door") or ".use" in called, path
            elif str(path.relative_to(ROOT)) not in RUNNABLE and not isinstance(node, ast.Expr):
                says_where = str(path.relative_to(ROOT)) in ELSEWHERE and isinstance(node, ast.If)
                assert isinstance(node, harmless) or says_where, path


@pytest.mark.parametrize("file", ELSEWHERE)
def test_a_tool_that_is_run_as_a_file_names_its_command(file, tmp_path):
    done = subprocess.run([sys.executable, ROOT / file, "--help"], capture_output=True, text=True, cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (1, "", f"error: run this as {ELSEWHERE[file]}\n")


@pytest.mark.parametrize("script", ["train.py", "eval.py", "quantize.py", "results/tables.py",
                                    "results/rounding/measure.py"])
def test_ctrl_c_while_torch_is_imported_ends_with_one_line(script, tmp_path):
    """A torch whose import lasts, and in which an exception would get lost."""
    lasting = "import os, time\nopen('begun', 'w')\nwhile True:\n    try: time.sleep(9)\n    except BaseException: pass\n"
    argv = {"eval.py": ["x"], "quantize.py": ["x", "--out", "y"], "results/rounding/measure.py": ["x"]}
    process = subprocess.Popen([sys.executable, ROOT / script, *argv.get(script, [])],
                               env=stand_in(tmp_path, lasting, "torch"), cwd=tmp_path,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    until = time.monotonic() + 30
    while not (tmp_path / "begun").exists():
        assert time.monotonic() < until and process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=30)
    assert (process.returncode, out, err) == (130, "", "interrupted\n")


def press_ctrl_c_twice():
    """torch.compile runs callbacks of weak references, from which Python prints exceptions and goes on."""
    stop = StopSignal()
    os.kill(os.getpid(), signal.SIGINT)
    assert stop.received == signal.SIGINT  # the first
    stop.when -= 3  # seconds ago

    class Kernel:
        pass

    kernel = Kernel()
    callback = weakref.ref(kernel, lambda _: os.kill(os.getpid(), signal.SIGINT))
    del kernel
    print("went on", callback)


def test_a_second_ctrl_c_ends_a_run_where_an_exception_would_get_lost(tmp_path):
    code = fork(press_ctrl_c_twice, output=tmp_path / "output.txt")
    assert (code, (tmp_path / "output.txt").read_text()) == (130, "interrupted\n")


@pytest.mark.parametrize("script, argv", [("train.py", []), ("eval.py", ["x"]),
                                          ("quantize.py", ["x", "--out", "y"])])
def test_threads_of_torch_are_told_to_give_up_their_cores_soon(script, argv, tmp_path):
    """Once torch is there, it is too late. Who sets one of the variables decides."""
    asked = stand_in(tmp_path, "import os\nraise SystemExit(os.environ.get('GOMP_SPINCOUNT', 'none'))", "torch")
    for given, expected in (({}, "1000"), ({"GOMP_SPINCOUNT": "0"}, "0"), ({"OMP_WAIT_POLICY": "PASSIVE"}, "none")):
        done = subprocess.run([sys.executable, ROOT / script, *argv], capture_output=True,
                              text=True, env=asked | given, cwd=tmp_path)
        assert done.stderr == expected + "\n"


NUMBERS = [(options, field.name) for options in (
               train.Options, evaluate.Options, export.Options, prepare.Options, corpus.Options,
               trace.TraceOptions)
           for field in dataclasses.fields(options) if field.type in (int, float)]


@pytest.mark.parametrize("options, name", NUMBERS)
def test_numbers_are_taken_up_to_their_bounds_and_refused_past_them(options, name, capsys):
    field = next(field for field in dataclasses.fields(options) if field.name == name)
    low, high = field.metadata["low"], field.metadata["high"]
    if field.type is int:
        smallest, largest = 1 if low is None else low, (high or 2**31) - 1
        too_small, too_large = [smallest - 1, -(10**30)], [largest + 1, 10**30]
    else:
        smallest, largest = 5e-324 if low is None else low, math.nextafter(high or math.inf, 0)
        too_small, too_large = [0 if low is None else -5e-324, -math.inf], [high or math.inf, math.inf]
    needed = {evaluate.Options: ["x"], export.Options: ["x"], trace.TraceOptions: ["adam"],
              corpus.Options: ["--out", "x"]}
    given = [*needed.get(options, []), flag(name)]
    for value in (smallest, largest):
        assert getattr(parse(options, "", [*given, repr(value)]), name) == value
    for value in (*too_small, *too_large, math.nan, "x", "1e"):
        with pytest.raises(SystemExit) as error:
            parse(options, "", [*given[:-1], f"{flag(name)}={value}"])
        line = capsys.readouterr().err
        assert error.value.code == 2 and line.count("\n") == 1 and flag(name) in line


def test_batches_are_read_with_numpy_alone(tmp_path):
    for module in ("torch", "tokenizers", "tiktoken"):
        (tmp_path / f"{module}.py").write_text(f"raise SystemExit('{module} was imported')")
    done = subprocess.run([sys.executable, "-c", "import data.dataset"], capture_output=True,
                          text=True, env={"PYTHONPATH": str(tmp_path)}, cwd=ROOT)
    assert done.returncode == 0, done.stderr


def test_a_log_is_read_but_for_torn_lines(tmp_path):
    path = tmp_path / "log.jsonl"
    assert files.read_log(path) == []
    path.write_bytes(b'{"step": 1}\n\0\0{"step": 2}\n\xff\n7\n{"step": 3}\n{"step": 4, "los')
    assert files.read_log(path) == [{"step": 1}, {"step": 3}]


def test_a_failed_write_leaves_the_old_file_alone(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    files.write_text(path, "old \u2014\r\n")
    assert path.read_bytes() == "old \u2014\r\n".encode()

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "replace", full)
    with pytest.raises(OSError):
        files.write_text(path, "new")
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]
    assert path.read_bytes().startswith(b"old")


def test_a_missing_package_is_named_with_what_needs_it(monkeypatch):
    assert files.require("json", "this") is sys.modules["json"]
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    line = "^--plot needs matplotlib: pip install -r requirements-extra.txt$"
    with pytest.raises(ImportError, match=line):
        files.require("matplotlib", "--plot")
