import json
import random
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import train
from data.prepare import prepare

torch.set_num_threads(1)  # the models are tiny: more threads only wait for each other


@pytest.fixture(scope="session")
def dataset_dir(tmp_path_factory):
    """A prepared dataset of 40 documents of made-up words, as bytes."""
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefghij", k=rng.randint(2, 7))) for _ in range(40)]
    documents = [" ".join(rng.choices(words, k=150)) for _ in range(40)]
    folder = tmp_path_factory.mktemp("data")
    (folder / "words.txt").write_text("\n<|endoftext|>\n".join(documents))
    prepare(folder / "words", "bytes", folder / "words.txt")
    return folder / "words"


@pytest.fixture
def small_run(dataset_dir):
    """Options of a run that takes a few milliseconds a step."""
    shape = "--preset tiny --n-layer 1 --n-head 2 --n-embd 32 --seq-len 16 --batch-size 8 --device cpu --lr 1e-2 --embed-lr 1e-2"
    return [*shape.split(), "--data", str(dataset_dir)]


def train_osp(out, dataset_dir, n_layer, n_embd, seq_len, steps):
    """A small OSP run in the directory `out`, which is returned."""
    shape = f"--preset tiny --n-layer {n_layer} --n-head 2 --n-embd {n_embd} --seq-len {seq_len} --batch-size 8"
    argv = f"{shape} --device cpu --lr 1e-2 --osp --steps {steps}"
    train.main([*argv.split(), "--data", str(dataset_dir), "--out", str(out)])
    return out


def read_log(run_dir):
    """(training records, evaluation records) of a run, by step."""
    records = [json.loads(line) for line in (run_dir / "log.jsonl").read_text().splitlines()]
    return {r["step"]: r for r in records if "loss" in r}, {r["step"]: r for r in records if "val_loss" in r}
