"""What --bench and --dry-run say, and that they leave nothing behind."""

import json
import re

import pytest
import torch

import train
from model import Config, Transformer
from nanoosp import run
from tools import bench, dry_run
from tools.bench import RandomTokens, flops_per_token, longest_kernels

SHAPE = "--preset tiny --n-layer 1 --n-head 2 --n-embd 32 --seq-len 16 --batch-size 4 --device cpu".split()


def test_flops_of_the_paper_model_are_the_sum_of_its_products():
    with torch.device("meta"):
        model = Transformer(Config(n_layer=24, n_head=16, n_embd=2048, vocab_size=49152,
                                   norm="ss", embproj=True))
    layer = 4 * 2048**2 + 3 * 2048 * 5504  # q, k, v, o; gate, up, down
    # EmbProj twice, and the head; the embedding is a look-up
    matrices = 24 * layer + 2 * 2048**2 + 2048 * 49152
    # half of the 2048 keys, on average
    scores_and_values = 24 * 16 * 2048 * (2 * 128 + 2 * 128) / 2
    assert flops_per_token(model, 2048) == 3 * (2 * matrices + scores_and_values)


def test_bench_measures_and_leaves_nothing_behind(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(run, "ROOT", tmp_path)
    monkeypatch.chdir(tmp_path)
    bench.main([*SHAPE, "--steps", "3", "--osp", "--bench", "--data", "random", "--json"])
    result = json.loads(capsys.readouterr().out)
    step_ms = result["forward_backward_ms"] + result["optimizer_ms"]
    assert result["step_ms"] == pytest.approx(step_ms)
    assert result["tokens_per_s"] == pytest.approx(4 * 16 / result["step_ms"] * 1e3)
    assert 0 < result["optimizer_ms"] < result["step_ms"] and result["peak_memory_gib"] > 0
    assert not any("mfu" in key for key in result)  # the peak of a CPU is not known
    assert result["ranks"] == 1 and result["wall_s"] > result["first_step_s"] > 0
    bench.main([*SHAPE, "--steps", "3", "--bench"])
    out = capsys.readouterr().out
    assert "tokens/s" in out and float(re.search(r"(\S+) TFLOP/s", out).group(1)) > 0
    assert list(tmp_path.iterdir()) == []


def test_a_bench_step_trains_as_a_step_of_a_run_does(dataset_dir, tmp_path, monkeypatch, capsys):
    """Same data, same seed, constant rate: the losses must be those that a run logs."""
    losses, backward = [], train.backward

    def watched(*args):
        losses.append(backward(*args))
        return losses[-1]

    argv = [*SHAPE, "--data", str(dataset_dir), "--warmup", "0", "--cooldown", "0",
            "--micro-batch-size", "2", "--osp"]
    train.main([*argv, "--steps", "4", "--out", str(tmp_path / "r")])
    log = [json.loads(line) for line in (tmp_path / "r/log.jsonl").read_text().splitlines()]
    monkeypatch.setattr(train, "backward", watched)
    bench.main([*argv, "--steps", "2", "--bench"])  # and two that are not timed
    assert [loss.item() for loss in losses] == [r["loss"] for r in log if "loss" in r]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="only a GPU has kernels")
def test_the_longest_kernels_come_first_and_their_shares_add_up_to_one():
    a = torch.randn(512, 512, device="cuda")
    kernels, text = longest_kernels(lambda: torch.softmax(a @ a, dim=0))
    shares = [kernel["share"] for kernel in kernels]
    assert sum(shares) == pytest.approx(1) and shares == sorted(shares, reverse=True)
    names = " ".join(kernel["name"] for kernel in kernels)
    assert "softmax" in text.lower() and "softmax" in names.lower()


def test_random_tokens_are_shared_among_ranks_and_depend_on_the_step():
    data = RandomTokens(50, seq_len=8)
    places = (0, 0), (0, 0), (0, 1), (1, 0)  # step, rank of two
    a, again, b, later = (data.batch(step, 6, rank, 2).tolist() for step, rank in places)
    assert a == again and a != b and a != later
    assert len(a) == 3 and len(a[0]) == 9
    assert 0 <= min(map(min, a)) and max(map(max, a)) < 50


def test_dry_run_says_it_in_json_too(capsys):
    dry_run.main([*SHAPE, "--osp", "--steps", "3", "--dry-run", "--json"])
    result = json.loads(capsys.readouterr().out)
    with torch.device("meta"):
        config = Config(n_layer=1, n_embd=32, vocab_size=256, norm="ss", embproj=True)
        n = sum(p.numel() for p in Transformer(config).parameters())
    tables = 2 * 32 * 256  # embedding and head, of which AdamW keeps two numbers each
    assert result == dict(parameters=n, optimizer_state=n + tables, tokens_per_step=64, tokens=192)
