"""What the scripts share."""

import subprocess
import sys
from pathlib import Path

import pytest

from nanoosp import cli
import eval as evaluation
import quantize
import train
from data import benchmarks, corpus, prepare

ROOT = Path(train.__file__).parent
SCRIPTS = {"train.py": train, "eval.py": evaluation, "quantize.py": quantize, "data/prepare.py": prepare,
           "data/corpus.py": corpus, "data/benchmarks.py": benchmarks}


@pytest.mark.parametrize("name", SCRIPTS)
def test_help_shows_commands_but_no_notes_on_the_code(name):
    text = SCRIPTS[name].build_parser().format_help()
    assert f"python {name}" in text and "--help" in text
    assert "Glossary" not in text and "Words used here" not in text and "Read it top to bottom" not in text


@pytest.mark.parametrize("name", ["prepare", "corpus", "benchmarks"])
def test_misspelt_options_of_the_data_scripts_name_the_nearest(name, capsys):
    required = {"prepare": [], "corpus": ["--out", "x"], "benchmarks": ["piqa", "--out", "x"]}[name]
    with pytest.raises(SystemExit) as error:
        SCRIPTS[f"data/{name}.py"].main([*required, "--ouut=x"])
    assert error.value.code == 2
    assert capsys.readouterr().err == "error: unknown option --ouut=x; did you mean --out?\n"


def test_the_data_scripts_start_without_torch(tmp_path):
    """Importing it would take each of corpus.py's processes seconds."""
    (tmp_path / "torch.py").write_text("raise SystemExit('torch was imported')")
    for name in ("prepare", "corpus", "benchmarks"):
        command = [sys.executable, ROOT / f"data/{name}.py", "--help"]
        done = subprocess.run(command, capture_output=True, text=True, env={"PYTHONPATH": str(tmp_path)})
        assert done.returncode == 0 and "usage" in done.stdout, done.stderr


def test_a_log_is_read_but_for_torn_lines(tmp_path):
    path = tmp_path / "log.jsonl"
    assert cli.read_log(path) == []
    path.write_bytes(b'{"step": 1}\n\0\0{"step": 2}\n\xff\n7\n{"step": 3}\n{"step": 4, "los')
    assert cli.read_log(path) == [{"step": 1}, {"step": 3}]


def test_a_failed_write_leaves_the_old_file_alone(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    cli.write_whole(path, "old \u2014\r\n")
    assert path.read_bytes() == "old \u2014\r\n".encode()

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(cli.os, "replace", full)
    with pytest.raises(OSError):
        cli.write_whole(path, "new")
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"] and path.read_bytes().startswith(b"old")


def test_a_missing_package_is_named_with_what_needs_it(monkeypatch):
    assert cli.extra("json", "this") is sys.modules["json"]
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match="^--plot needs matplotlib: pip install -r requirements-extra.txt$"):
        cli.extra("matplotlib", "--plot")
