"""The last lines of train.py: what four bits add, and what a run is compared with."""

import json
import shutil
import sys
from pathlib import Path

import pytest

import train
from data.prepare import prepare
from nanoosp.methods import OSP
from nanoosp.summary import find_sibling, sibling_method
from tools import evaluate


def without_rates(small_run):
    return [arg for arg in small_run if arg not in ("--lr", "1e-2")]


@pytest.mark.parametrize("mine, theirs", [
    (OSP, "adam"), (dict(optimizer="adam", norm="rms", embproj=False), "muon"),
    (dict(OSP, norm="rms"), "muon"), (dict(OSP, optimizer="adam"), "muon")])
def test_osp_is_compared_with_adam_and_all_else_with_osp(mine, theirs):
    assert sibling_method(mine)["optimizer"] == theirs


def test_a_run_names_its_sibling_and_the_sibling_shows_both(small_run, tmp_path, capsys):
    argv = [*without_rates(small_run), "--steps", "4"]
    train.main([*argv, "--out", str(tmp_path / "adam")])
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == "to compare         python train.py --osp (OSP), with this run's other options"
    train.main([*argv, "--osp", "--out", str(tmp_path / "osp")])
    *_, head, mine, other = capsys.readouterr().out.splitlines()
    assert head.split("  ")[0] == "this run, and the one beside it"
    rates = train.PRESETS["tiny"]["lr"]
    assert mine.startswith(f"OSP, learning rate {rates['muon']:g} ")
    assert other.startswith(f"Adam, learning rate {rates['adam']:g} ")
    summary = json.loads((tmp_path / "adam/summary.json").read_text())
    four = summary["quantized"]["4-4-4"]["had"]["val_loss"] - summary["val_loss"]
    assert other.split()[-4:] == [f"{summary['val_loss']:.4f}", f"{summary['kurtosis']:.3f}",
                                  other.split()[-2], f"{four:+.4f}"]

    train.main(["--resume", str(tmp_path / "osp"), "--steps", "5"])  # now the other is shorter
    out = capsys.readouterr().out
    assert out.splitlines()[-1] == "to compare         python train.py (Adam), with this run's other options"
    assert "the one beside it" not in out


def test_of_several_runs_that_of_the_lowest_loss_is_the_sibling(small_run, tmp_path):
    argv = [*without_rates(small_run), "--steps", "6"]
    for name, more in (("osp", ["--osp"]), ("tuned", ["--lr", "0.01"]), ("slow", ["--lr", "0.0001"])):
        train.main([*argv, *more, "--out", str(tmp_path / name)])
    mine = json.loads((tmp_path / "osp/config.json").read_text())
    data = json.loads((tmp_path / "osp/summary.json").read_text())["data"]
    assert find_sibling(mine, data, tmp_path / "osp")[0]["lr"] == 0.01
    (tmp_path / "tuned/summary.json").unlink()
    assert find_sibling(mine, data, tmp_path / "osp")[0]["lr"] == 0.0001


def test_only_a_finished_whole_run_of_the_same_text_and_length_is_a_sibling(
        small_run, tmp_path, monkeypatch):
    argv = [*small_run, "--steps", "3"]
    train.main([*argv, "--osp", "--out", str(tmp_path / "osp")])
    adam = tmp_path / "adam"
    train.main([*argv, "--micro-batch-size", "4", "--out", str(adam)])  # which changes no result
    mine = json.loads((tmp_path / "osp/config.json").read_text())
    data = json.loads((tmp_path / "osp/summary.json").read_text())["data"]
    theirs, summary = find_sibling(mine, data, tmp_path / "osp")
    assert theirs["optimizer"] == "adam" and summary["step"] == 3
    assert find_sibling(dict(mine, seed=1), data, tmp_path / "osp") is None
    assert find_sibling(dict(mine, batch_size=4), data, tmp_path / "osp") is None
    assert find_sibling(mine, "other data", tmp_path / "osp") is None
    assert find_sibling(dict(mine, data="elsewhere"), data, tmp_path / "osp")  # a path says nothing
    monkeypatch.chdir(tmp_path / "osp")
    assert find_sibling(mine, data, Path(".")) is not None
    for damaged in ('{"step": 3, "val_loss": 1' + 400 * "0" + "}", "{", "[]", '{"step": 3}', json.dumps(dict(summary, step=2))):
        (adam / "summary.json").write_text(damaged)
        assert find_sibling(mine, data, tmp_path / "osp") is None


def prepared(folder, text):
    """The folder's dataset `d`, prepared (again) from this text."""
    (folder / "t.txt").write_text(text)
    shutil.rmtree(folder / "d", ignore_errors=True)
    prepare(folder / "d", "bytes", folder / "t.txt")
    return str(folder / "d")


def test_runs_on_data_that_were_prepared_again_in_between_are_not_compared(small_run, tmp_path, capsys):
    """The same folder, but another text: its name cannot tell."""
    argv = [*small_run[:-1], prepared(tmp_path, "some words\n" * 900), "--steps", "2"]
    train.main([*argv, "--out", str(tmp_path / "runs/adam")])
    prepared(tmp_path, "other words\n" * 900)
    train.main([*argv, "--osp", "--out", str(tmp_path / "runs/osp")])
    assert "the one beside it" not in capsys.readouterr().out
    train.main([*argv, "--out", str(tmp_path / "runs/adam-again")])
    head, _, other = capsys.readouterr().out.splitlines()[-3:]
    assert head.startswith("this run, and the one beside it") and other.startswith("OSP")

    with pytest.raises(SystemExit, match="other data than this run was trained on"):
        evaluate.main([str(tmp_path / "runs/adam"), str(tmp_path / "runs/osp"), "--device", "cpu"])


def test_a_finished_run_has_its_summary_without_any_optional_package(small_run, tmp_path, monkeypatch):
    for package in ("tiktoken", "matplotlib", "transformers", "tokenizers"):
        monkeypatch.setitem(sys.modules, package, None)
    train.main([*small_run, "--steps", "2", "--out", str(tmp_path / "r")])
    assert json.loads((tmp_path / "r/summary.json").read_text())["step"] == 2
