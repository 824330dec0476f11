"""The last lines of train.py: what four bits add, and what a run is compared with."""

import json
import os
import re
import shlex
from pathlib import Path

import pytest

import train
from nanoosp.options import parse
from nanoosp.run import ROOT
from tools.compare import find_sibling, sibling_command

SCRIPT = os.path.relpath(train.__file__)
RUN = ROOT / "runs/any"


def remembered_options(*argv):
    from nanoosp.run import remembered

    opt = parse(train.Options, "", [*argv, "--device", "cpu"])
    train.resolve(opt)
    return remembered(opt)


@pytest.mark.parametrize("mine, sibling", [
    ("", "--osp"),
    ("--osp", ""),
    ("--osp --lr 0.001 --embed-lr 0.001", ""),  # each optimizer has a rate of its own
    ("--optimizer muon --norm ss --embproj", ""),
    ("--optimizer muon --norm ss", "--osp"),
    ("--norm ss --seed 3", "--osp --seed 3"),
    ("--osp --steps 40", "--steps 40"),  # warmup and cooldown follow from it
    ("--osp --steps 40 --warmup 7", "--steps 40 --warmup 7"),
    ("--osp --preset toy --no-compile", "--preset toy"),
    ("--preset small --data shakespeare --osp", "--preset small --data shakespeare"),
    ("--n-layer 2 --weight-decay 0.1 --micro-batch-size 4",
     "--osp --n-layer 2 --micro-batch-size 4 --weight-decay 0.1"),
    ("--osp --dtype bfloat16 --recompute", "--dtype bfloat16 --recompute"),
    ("--n-head 3 --n-embd 96", "--osp --n-head 3 --n-embd 96"),  # neither goes alone
    ("--steps 10 --warmup 10 --cooldown 0", "--osp --steps 10 --warmup 10 --cooldown 0"),
    ("--steps 100 --warmup 90 --cooldown 5", "--osp --steps 100 --warmup 90 --cooldown 5"),
    ("--osp --grad-clip 0 --batch-size 8 --seq-len 64",
     "--seq-len 64 --batch-size 8 --grad-clip 0.0"),
])
def test_the_command_to_compare_with_is_whole_and_has_nothing_that_goes_without_saying(mine, sibling):
    command = sibling_command(remembered_options(*mine.split()), RUN)
    assert command == " ".join(["python", SCRIPT, *sibling.split()])


def test_the_command_trains_the_same_but_for_the_method():
    mine = remembered_options(*"--osp --preset toy --steps 77 --warmup 3 --seq-len 32 --seed 5".split())
    words = shlex.split(sibling_command(mine, RUN))[2:]
    theirs = remembered_options(*words)
    differing = {name for name in mine if mine[name] != theirs[name]}
    assert differing == {"optimizer", "norm", "embproj", "lr", "embed_lr"}


def test_on_several_ranks_the_command_has_as_many(monkeypatch):
    options = remembered_options("--osp")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert sibling_command(options, RUN) == f"torchrun --nproc-per-node 2 {SCRIPT}"


def test_on_several_nodes_the_command_has_one_nodes_ranks(monkeypatch):
    options = remembered_options(*"--osp --batch-size 60".split())
    monkeypatch.setenv("WORLD_SIZE", "6")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    assert sibling_command(options, RUN) == (
        f"torchrun --nproc-per-node 3 {SCRIPT} --preset tiny --data shakespeare --device cpu "
        "--batch-size 60")  # without --batch-size 60, six ranks could not do it


def test_a_run_at_its_presets_rate_is_preferred(small_run, tmp_path):
    argv = [arg for arg in small_run if arg not in ("--lr", "--embed-lr", "1e-2")] + ["--steps", "2"]
    for name, more in (("osp", ["--osp"]), ("tuned", []), ("hot", ["--lr", "0.006"])):
        train.main([*argv, *more, "--out", str(tmp_path / name)])
    mine = json.loads((tmp_path / "osp/config.json").read_text())
    assert find_sibling(mine, tmp_path / "osp")[0]["lr"] == 0.003
    (tmp_path / "tuned/summary.json").unlink()
    assert find_sibling(mine, tmp_path / "osp")[0]["lr"] == 0.006


def test_a_run_names_its_sibling_and_the_sibling_shows_both(small_run, tmp_path, capsys):
    argv = [arg for arg in small_run if arg not in ("--lr", "--embed-lr", "1e-2")] + ["--steps", "4"]
    train.main([*argv, "--out", str(tmp_path / "adam")])
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("to compare         python") and last.endswith("   (OSP)")
    typed = shlex.split(last.removeprefix("to compare").removesuffix("(OSP)"))
    assert typed[-2:] == ["--out", os.path.relpath(tmp_path / "osp")]  # beside it
    train.main(typed[2:])
    *_, head, mine, other = capsys.readouterr().out.splitlines()
    assert head.split("  ")[0] == "this run, and the one beside it"
    assert mine.startswith("OSP, learning rate 0.006") and other.startswith("Adam, learning rate 0.003")
    summary = json.loads((tmp_path / "adam/summary.json").read_text())
    four = summary["quantized"]["4-4-4"]["had"]["val_loss"] - summary["val_loss"]
    assert other.split()[-4:] == [f"{summary['val_loss']:.4f}", f"{summary['kurtosis']:.3f}",
                                  other.split()[-2], f"{four:+.4f}"]

    train.main(["--resume", str(tmp_path / "osp"), "--steps", "5"])  # now the other is shorter
    out = capsys.readouterr().out
    assert re.search(r"(?m)^to compare +python \S+ .*--steps 5.*\(Adam\)$", out)
    assert "the one beside it" not in out


def test_only_a_finished_whole_run_of_the_same_text_and_length_is_a_sibling(
        small_run, tmp_path, monkeypatch):
    argv = [*small_run, "--steps", "3"]
    train.main([*argv, "--osp", "--out", str(tmp_path / "osp")])
    adam = tmp_path / "adam"
    train.main([*argv, "--out", str(adam)])
    mine = json.loads((tmp_path / "osp/config.json").read_text())
    theirs, summary = find_sibling(mine, tmp_path / "osp")
    assert theirs["optimizer"] == "adam" and summary["step"] == 3
    assert find_sibling(dict(mine, seed=1), tmp_path / "osp") is None
    assert find_sibling(dict(mine, batch_size=4), tmp_path / "osp") is None
    monkeypatch.chdir(tmp_path / "osp")
    assert find_sibling(mine, Path(".")) is not None
    for damaged in ('{"step": 3, "val_loss": 1' + 400 * "0" + "}", "{", "[]", '{"step": 3}', json.dumps(dict(summary, step=2))):
        (adam / "summary.json").write_text(damaged)
        assert find_sibling(mine, tmp_path / "osp") is None
