"""The ablation: rows are processes of their own, which may be killed, stopped or fail. Figures."""

import json
import multiprocessing
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import read_log
from launch import _child, context

import train
from data.prepare import prepare
from nanoosp.methods import label
from nanoosp.options import parse
from tools import ablation

TRAIN = Path(train.__file__)
SEVEN = ["Adam (0.01)", "Adam, hot (0.02)", "Muon-only (0.01)", "Muon (0.01)",
         "Muon + SSNorm (0.01)", "Muon + EmbProj (0.01)", "OSP (0.01)"]
THREE = ablation.TABLE_2[:1] + ablation.TABLE_2[2:4]  # rows, where it is not the rows that matter
DIRECTORIES = ["adam", "adam-hot", "muon-only", "muon", "muon-ssnorm", "muon-embproj", "osp"]


class ForkedRow:
    """What ablation.py uses of subprocess.Popen, without paying for `import torch` in each row."""

    fork_with = context
    started = []

    def __init__(self, arguments, env, stdout=None, **_):
        self.options, self.environment = arguments[2:], env
        self.stdout = self.lines() if stdout == FORKING.PIPE else None
        at = self.options.index("--out" if "--out" in self.options else "--resume")
        self.output = Path(self.options[at + 1]).with_suffix(".txt")
        self.output.parent.mkdir(exist_ok=True)
        self.output.touch()
        arguments = self.options, env, self.output
        self.process = self.fork_with.Process(target=_child, args=arguments)
        self.process.start()
        self.began, self.ended, self.code = time.monotonic(), None, None
        self.started.append(self)

    def poll(self):
        self.code = self.process.exitcode
        if self.code is not None and self.ended is None:
            self.ended = time.monotonic()
        return self.code

    def wait(self):
        self.process.join()
        self.code = self.process.exitcode

    def terminate(self):
        self.process.terminate()

    def lines(self):
        while self.code is None:  # only one thread may ask the process itself
            time.sleep(0.01)
        yield from self.output.read_text().splitlines(keepends=True)


FORKING = SimpleNamespace(Popen=ForkedRow, PIPE=-1, STDOUT=-2)


@pytest.fixture
def forked(monkeypatch):
    """Rows of an ablation in this process are forked; a list of them."""
    monkeypatch.setattr(ablation, "subprocess", FORKING)
    monkeypatch.setattr(ForkedRow, "started", [])
    return ForkedRow.started


def in_own_session(argv, output):
    """train.py with forked rows. All of its processes die by one os.killpg."""
    os.setsid()
    ForkedRow.fork_with = multiprocessing.get_context("fork")
    ablation.subprocess, ablation.TABLE_2 = FORKING, THREE
    _child(argv, {}, output)


def wait_for(log, step, output):
    """Until a row has logged this step."""
    until = time.monotonic() + 120
    while not (log.exists() and f'"step": {step},' in log.read_text()):
        assert time.monotonic() < until, output.read_text()
        time.sleep(0.01)


def row_output(out):
    """What a forked row printed; a row that is a process of its own prints where the ablation does."""
    return "".join(path.read_text() for path in out.glob("*.txt"))


def ends(argv, capsys):
    """(exit code, the last line on stderr) of an ablation that does not succeed."""
    with pytest.raises(SystemExit) as error:
        ablation.main([str(a) for a in argv])
    return error.value.code, capsys.readouterr().err.strip().splitlines()[-1]


def test_a_killed_ablation_goes_on_and_repeats_no_finished_row(
        small_run, tmp_path, capsys, forked, monkeypatch):
    monkeypatch.setattr(ablation, "TABLE_2", THREE)
    out, output = tmp_path / "a", tmp_path / "output.txt"
    short = [*small_run, "--ablation", "--save-every", "5", "--out", str(out)]
    options = [*short, "--steps", "30", "--eval-every", "30"]
    killed = context.Process(target=in_own_session, args=(options, output))
    killed.start()
    wait_for(out / "muon-s0/log.jsonl", 12, output)
    os.killpg(killed.pid, signal.SIGKILL)
    killed.join()
    first = (out / "adam-s0/ckpt.pt").stat().st_mtime_ns
    again = context.Process(target=in_own_session, args=(options, output))
    again.start()
    again.join(120)
    assert again.exitcode == 0, output.read_text()
    assert (out / "adam-s0/ckpt.pt").stat().st_mtime_ns == first
    text = output.read_text()
    assert "adam-s0: finished, 30 steps" in text and "muon-s0: at step 10 of 30" in text
    lines = (out / "table.md").read_text().splitlines()[2:]
    assert [line.split("|")[1].strip() for line in lines] == [SEVEN[0], *SEVEN[2:4]]
    for row in ("adam", "muon-only", "muon"):
        assert set(read_log(out / f"{row}-s0")[0]) == set(range(1, 31))
    assert (out / "figures/layers.png").exists() and "wrote" in text

    monkeypatch.setitem(sys.modules, "tools.plot", None)  # no figures again: they take time
    ablation.main([*short, "--steps", "31"])  # longer training is allowed, other options are not
    assert "at step 30 of 31" in capsys.readouterr().out and len(forked) == 3
    code, line = ends([*short, "--steps", "31", "--seq-len", "8"], capsys)
    assert code == 2 and "--seq-len 8" in line
    code, line = ends([*short[:-4], "--steps", "8", "--save-every", "4", *short[-2:]], capsys)
    assert code == 2 and "--save-every" not in line and "has 31 steps already" in line
    assert len(forked) == 3  # no row begins, and no table has rows that were not asked for


def test_the_printed_commands_are_those_of_ordinary_runs(
        small_run, tmp_path, capsys, forked, monkeypatch):
    monkeypatch.chdir(TRAIN.parent)
    monkeypatch.setitem(sys.modules, "tools.plot", None)  # no figures: they take time
    out = os.path.relpath(tmp_path / "a")
    ablation.main([*small_run, "--ablation", "--steps", "2", "--seed", "3", "--no-compile",
                "--out", out])
    printed = re.findall(r"^\$ (.*)$", capsys.readouterr().out, re.M)
    assert len(printed) == 7
    lines = (tmp_path / "a/table.md").read_text().splitlines()[2:]
    assert [line.split("|")[1].strip() for line in lines] == SEVEN
    assert sorted(path.name for path in (tmp_path / "a").glob("*-s3")) == sorted(
        f"{name}-s3" for name in DIRECTORIES)
    python, script, *options = shlex.split(printed[4])
    assert [python, script] == ["python", "train.py"]
    assert options[:5] == ["--optimizer", "muon", "--norm", "ss", "--no-embproj"]
    assert options[-4:] == ["--seed", "3", "--out", f"{out}/muon-ssnorm-s3"]
    assert "--no-compile" in options and not {"--ablation", "--json"} & set(options)
    train.main([*options[:-1], str(tmp_path / "typed")])
    rows = tmp_path / "typed", tmp_path / "a/muon-ssnorm-s3"
    typed, row = (read_log(directory)[0] for directory in rows)
    assert [typed[step]["loss"] for step in typed] == [row[step]["loss"] for step in row]


def test_the_full_ablation_has_all_combinations(small_run, tmp_path):
    argv = [*small_run, "--ablation", "--full", "--seeds", "2", "--embed-lr", "0.03",
            "--out", str(tmp_path / "a")]
    rows = ablation.plan(parse(train.Options, "", [*argv, "--preset", "tiny"]), tmp_path / "a")
    labels = {label(vars(parse(train.Options, "", row.options))) for row in rows}
    assert len(rows) == len({row.directory for row in rows}) == 26 and len(labels) == 12
    slow = {row.options[1] for row in rows if "--embed-lr" in row.options}
    assert slow == {"muon"}  # in the others everything has one rate
    hot = [row for row in rows if row.hot]
    assert [row.options[row.options.index("--lr") + 1] for row in hot] == ["0.02", "0.02"]
    assert {row.directory.name[-3:] for row in rows} == {"-s0", "-s1"}


def test_seeds_give_a_spread_and_measurements_are_made_once(
        small_run, tmp_path, capsys, forked, monkeypatch):
    options = [*small_run, "--ablation", "--seeds", "2", "--steps", "2", "--json",
               "--eval-every", "2", "--out", str(tmp_path / "a")]
    monkeypatch.setitem(sys.modules, "tools.plot", None)  # no figures: they take time
    monkeypatch.setattr(ablation, "TABLE_2", [ablation.TABLE_2[0], ablation.TABLE_2[-1]])
    ablation.main(options)
    assert len(json.loads(capsys.readouterr().out)) == len(forked) == 4
    table = (tmp_path / "a/table.md").read_text()
    (tmp_path / "a/adam-s0/eval.json").write_text("{damaged")
    (tmp_path / "a/adam-s1/eval.json").write_text("{}")  # as of an older version
    measured = (tmp_path / "a/osp-s1/eval.json").stat().st_mtime_ns
    ablation.main(options)
    assert len(forked) == 4 and (tmp_path / "a/table.md").read_text() == table
    assert (tmp_path / "a/osp-s1/eval.json").stat().st_mtime_ns == measured
    assert len(table.splitlines()) == 2 + 2 and table.count("±") == 2 * 7
    assert "2 seed(s)" in table


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_stop_signal_saves_the_row_and_says_how_to_go_on(small_run, tmp_path, number, code):
    out, output = tmp_path / "a", tmp_path / "output.txt"
    argv = [*small_run, "--ablation", "--steps", "9000", "--eval-every", "9000", "--out", str(out)]
    if number == signal.SIGINT:
        with open(output, "w") as file:  # here the rows, too, are processes as in use
            process = subprocess.Popen([sys.executable, TRAIN, *argv], stdout=file, stderr=file,
                                       start_new_session=True)
        wait_for(out / "adam-s0/log.jsonl", 3, output)
        os.killpg(process.pid, number)  # as a terminal does: to all of its processes
        exit_code = process.wait(60)
    else:
        process = context.Process(target=in_own_session, args=(argv, output))
        process.start()
        wait_for(out / "adam-s0/log.jsonl", 3, output)
        os.kill(process.pid, number)
        process.join(60)
        exit_code = process.exitcode
    assert exit_code == code, output.read_text()
    *_, line = output.read_text().splitlines()
    assert line.startswith("stopped; all is saved, go on with python train.py")
    assert "--ablation" in line and str(out) in line
    hints = re.findall("go on with (.*)", output.read_text() + row_output(out))
    assert len(hints) == 2 and "--ablation" in hints[0] + hints[1]  # the row also says how it alone could
    step = max(read_log(out / "adam-s0")[0])
    assert torch.load(out / "adam-s0/ckpt.pt")["step"] == step < 9000
    assert not (out / "muon-only-s0").exists() and "Traceback" not in output.read_text()


def test_an_ablation_is_not_continued_or_widened_on_other_data(small_run, tmp_path, forked, monkeypatch):
    """The folder's name is the same, but it was prepared again: rows of both may not be averaged."""
    monkeypatch.setattr(ablation, "TABLE_2", THREE[:1])
    monkeypatch.setitem(sys.modules, "tools.plot", None)

    def prepared(text):
        shutil.rmtree(tmp_path / "d", ignore_errors=True)
        (tmp_path / "t.txt").write_text(text)
        prepare(tmp_path / "d", "bytes", tmp_path / "t.txt")

    prepared("some words\n" * 900)
    argv = [*small_run[:-1], str(tmp_path / "d"), "--ablation", "--steps", "2", "--out", str(tmp_path / "a")]
    ablation.main(argv)
    kept = json.loads((tmp_path / "a/adam-s0/eval.json").read_text())
    assert len(kept["of"]) == 64 and len(kept["data"]) == 16
    prepared("other words\n" * 900)
    with pytest.raises(SystemExit, match="^error: .* is other data than this run was trained on"):
        ablation.main([*argv, "--seeds", "2"])
    assert not (tmp_path / "a/adam-s1").exists()


def test_rows_of_two_lengths_make_no_table(small_run, tmp_path, monkeypatch, capsys):
    """As when a preset has changed since the first rows were trained."""
    train.main([*small_run, "--steps", "2", "--out", str(tmp_path / "a/adam-s0")])
    monkeypatch.setattr(ablation, "TABLE_2", THREE[:2])
    monkeypatch.setitem(train.PRESETS["tiny"], "steps", 3)
    code, line = ends([*small_run, "--ablation", "--out", tmp_path / "a"], capsys)
    assert code == 2 and "has --steps 3" in line and "they belong into no one table" in line
    assert len(list((tmp_path / "a").glob("*/ckpt.pt"))) == 1


def test_a_measurement_is_known_by_its_checkpoint_and_not_by_its_date(small_run, tmp_path, forked, monkeypatch):
    monkeypatch.setattr(ablation, "TABLE_2", THREE[:1])
    monkeypatch.setitem(sys.modules, "tools.plot", None)
    argv = [*small_run, "--ablation", "--out", str(tmp_path / "a")]
    ablation.main([*argv, "--steps", "2"])
    path = tmp_path / "a/adam-s0/eval.json"
    first = json.loads(path.read_text())
    os.utime(path, (2**32, 2**32))  # a date after any training
    ablation.main([*argv, "--steps", "4"])
    assert json.loads(path.read_text())["val_loss"] < first["val_loss"]
    second = path.stat().st_mtime_ns
    ablation.main([*argv, "--steps", "4"])
    assert path.stat().st_mtime_ns == second


def test_a_failed_row_ends_the_ablation_with_its_exit_code_and_one_line(
        small_run, tmp_path, capsys, forked):
    argv = [*small_run[:-1], "no-such-data", "--ablation", "--out", tmp_path / "a"]
    assert ends(argv, capsys) == (
        1, "error: a row ended with exit code 1; go on with "
        + shlex.join(["python", "train.py", *map(str, argv)]))
    assert len(forked) == 1 and "no such dataset" in forked[0].output.read_text()
    assert not (tmp_path / "a/table.md").exists()


def test_rows_train_side_by_side_each_on_a_gpu_of_its_own(
        small_run, tmp_path, capsys, forked, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6,7")
    monkeypatch.setitem(sys.modules, "tools.plot", None)
    monkeypatch.setattr(ablation, "TABLE_2", ablation.TABLE_2[1:6])
    options = [*small_run, "--ablation", "--steps", "40", "--eval-every", "40",
               "--out", str(tmp_path / "a")]
    ablation.main([*options, "--gpus", "3"])
    assert len(forked) == 5 and all(row.process.exitcode == 0 for row in forked)
    gpus = [row.environment["CUDA_VISIBLE_DEVICES"] for row in forked]
    assert gpus[:3] == ["4", "6", "7"] and set(gpus[3:]) <= {"4", "6", "7"}
    assert max(row.began for row in forked[:3]) < min(row.ended for row in forked[:3])
    for row in forked:
        others = [other for other in forked if other.began < row.began < other.ended]
        assert row.environment["CUDA_VISIBLE_DEVICES"] not in [
            other.environment["CUDA_VISIBLE_DEVICES"] for other in others]
    assert re.search(r"^muon-s0: validation loss", capsys.readouterr().out, re.M)
    code, line = ends([*options, "--gpus", "4"], capsys)
    assert code == 2 and "--gpus 4: torch sees 3 GPUs here" in line


def test_when_one_of_several_rows_fails_the_others_are_saved(
        small_run, tmp_path, capsys, forked, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(ablation, "TABLE_2", THREE)
    (tmp_path / "a/muon-only-s0").mkdir(parents=True)
    (tmp_path / "a/muon-only-s0/log.jsonl").write_text("someone else's\n")
    code, _ = ends([*small_run, "--ablation", "--steps", "9000", "--gpus", "2",
                    "--out", tmp_path / "a"], capsys)
    assert code == 1 and len(forked) == 2
    assert {row.process.exitcode for row in forked} <= {1, 143, -signal.SIGTERM}
    assert (tmp_path / "a/muon-only-s0/log.jsonl").read_text() == "someone else's\n"


@pytest.mark.parametrize("options, words", [
    (["--osp"], "chooses the parts of OSP itself"),
    (["--optimizer", "muon"], "chooses the parts of OSP itself"),
    (["--norm", "rms"], "chooses the parts of OSP itself"),
    (["--no-embproj"], "chooses the parts of OSP itself"),
    (["--dry-run"], "--dry-run is for one model"),
    (["--resume", "x"], "goes on by itself"),
    (["--bench"], "--bench is for one model"),
    (["--seeds", "0"], "--seeds 0"),
    (["--gpus", "0"], "--gpus 0"),
    (["--n-head", "5"], "--n-head 5"),
])
def test_options_that_an_ablation_cannot_obey_are_refused(small_run, capsys, options, words):
    code, line = ends([*small_run, "--ablation", *options], capsys)
    assert code == 2 and line.startswith("error: ") and words in line


def test_an_ablation_under_torchrun_is_refused(small_run, capsys, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    code, line = ends([*small_run, "--ablation"], capsys)
    assert code == 2 and "--gpus N instead of torchrun" in line


def test_without_matplotlib_there_is_a_table_and_no_figure(
        small_run, tmp_path, capsys, forked, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.delitem(sys.modules, "tools.plot", raising=False)
    monkeypatch.delattr("tools.plot", raising=False)
    monkeypatch.setattr(ablation, "TABLE_2", ablation.TABLE_2[:1])  # one row is enough
    ablation.main([*small_run, "--ablation", "--steps", "1", "--out", str(tmp_path / "a")])
    assert "no figures: drawing figures needs matplotlib: pip install" in capsys.readouterr().out
    assert (tmp_path / "a/table.md").exists() and not (tmp_path / "a/figures").exists()
