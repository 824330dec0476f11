import json
import random
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import train
from data.dataset import Dataset
from data.prepare import prepare
from model import Config, Transformer

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
    shape = "--preset tiny --n-layer 1 --n-head 2 --n-embd 32 --seq-len 16 --batch-size 8 --device cpu --lr 1e-2"
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


# Small models to quantize

SMALL = Config(n_layer=2, n_head=4, n_embd=128, vocab_size=96)
CONFIGS = [
    SMALL,
    replace(SMALL, n_kv_head=2, norm="ss", embproj=True),
    replace(SMALL, n_kv_head=1, tie_embeddings=True),
    Config(n_layer=2, n_head=3, n_embd=96, vocab_size=96, n_ffn=172, n_kv_head=1),
    Config(n_layer=2, n_head=2, n_embd=44, vocab_size=96, n_ffn=100),  # no width is a power of two
]


def randomized(config=SMALL, seed=0):
    """A model as after training: its gains are not all one, and EmbProj is not orthogonal."""
    torch.manual_seed(seed)
    model = Transformer(config)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(3).add_(torch.randn_like(p) * 0.02) if p.ndim == 2 else p.uniform_(0.5, 2)
    return model.eval().requires_grad_(False)


@pytest.fixture
def tokens():
    return torch.randint(96, (2, 24), generator=torch.Generator().manual_seed(1))


def distance(a, b):
    """Relative, in the 2-norm."""
    return ((a - b).norm() / b.norm()).item()


@pytest.fixture(scope="session")
def trained(dataset_dir):
    """(a small model after 80 steps of Adam, windows of its training data)"""
    torch.manual_seed(0)
    data = Dataset(dataset_dir, "train", 32)
    model = Transformer(Config(n_layer=2, n_head=2, n_embd=64, vocab_size=256))
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    for step in range(80):
        window = torch.from_numpy(data.batch(step, 16))
        model(window[:, :-1], window[:, 1:]).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval().requires_grad_(False), torch.from_numpy(data.batch(80, 40))
