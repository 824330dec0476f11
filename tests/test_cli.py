"""What the scripts share."""

import subprocess
import sys
from pathlib import Path

import pytest

import eval as evaluation
import quantize
import train
from data import benchmarks, corpus, prepare
from nanoosp import files
from nanoosp.options import build_parser
from tools import evaluate, export

ROOT = Path(train.__file__).parent
DATA_SCRIPTS = {"data/prepare.py": prepare, "data/corpus.py": corpus,
                "data/benchmarks.py": benchmarks}
SCRIPTS = {name: (script.Options, script.__doc__) for name, script in DATA_SCRIPTS.items()} | {
    "train.py": (train.Options, train.__doc__), "eval.py": (evaluate.Options, evaluation.__doc__),
    "quantize.py": (export.Options, quantize.__doc__)}


@pytest.mark.parametrize("name", SCRIPTS)
def test_help_shows_commands_but_no_notes_on_the_code(name):
    text = build_parser(*SCRIPTS[name]).format_help()
    assert f"python {name}" in text and "--help" in text
    for notes in ("Glossary", "Words used here", "Read it top to bottom"):
        assert notes not in text


@pytest.mark.parametrize("name", ["prepare", "corpus", "benchmarks"])
def test_misspelt_options_of_the_data_scripts_name_the_nearest(name, capsys):
    required = {"prepare": [], "corpus": ["--out", "x"], "benchmarks": ["piqa", "--out", "x"]}[name]
    with pytest.raises(SystemExit) as error:
        DATA_SCRIPTS[f"data/{name}.py"].main([*required, "--ouut=x"])
    assert error.value.code == 2
    assert capsys.readouterr().err == "error: unknown option --ouut=x; did you mean --out?\n"


def test_the_data_scripts_start_from_any_directory_without_torch_and_extras(tmp_path):
    """Importing torch would take each of corpus.py's processes seconds."""
    for module in ("torch", "tokenizers", "pyarrow", "huggingface_hub"):
        (tmp_path / f"{module}.py").write_text(f"raise SystemExit('{module} was imported')")
    environment = {"PYTHONPATH": str(tmp_path)}
    for name in ("prepare", "corpus", "benchmarks"):
        command = [sys.executable, ROOT / f"data/{name}.py", "--help"]
        done = subprocess.run(command, capture_output=True, text=True, env=environment,
                              cwd=tmp_path)
        assert done.returncode == 0 and "usage" in done.stdout, done.stderr


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
