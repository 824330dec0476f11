"""What --bench measures, and that it leaves nothing behind."""

import json

import pytest
import torch

import train
from bench import RandomTokens, flops_per_token
from model import PRESETS, Config, Transformer


def test_flops_of_the_paper_model_are_the_sum_of_its_products():
    with torch.device("meta"):
        model = Transformer(Config(**PRESETS["1.4b"], norm="ss", embproj=True))
    layer = 4 * 2048**2 + 3 * 2048 * 5504  # q, k, v, o; gate, up, down
    matrices = 24 * layer + 2 * 2048**2 + 2048 * 49152  # EmbProj twice, and the head; the embedding is a look-up
    scores_and_values = 24 * 16 * 2048 * (2 * 128 + 2 * 128) / 2  # half of the 2048 keys, on average
    assert flops_per_token(model, 2048) == 3 * (2 * matrices + scores_and_values)


def test_bench_measures_and_leaves_nothing_behind(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train, "ROOT", tmp_path)
    monkeypatch.chdir(tmp_path)
    shape = "--preset tiny --n-layer 1 --n-embd 32 --seq-len 16 --batch-size 4 --device cpu --steps 3".split()
    train.main([*shape, "--osp", "--bench", "--data", "random", "--json"])
    result = json.loads(capsys.readouterr().out)
    assert result["step_ms"] == pytest.approx(result["forward_backward_ms"] + result["optimizer_ms"])
    assert result["tokens_per_s"] == pytest.approx(4 * 16 / result["step_ms"] * 1e3)
    assert 0 < result["optimizer_ms"] < result["step_ms"] and result["peak_memory_gib"] > 0
    assert not any("mfu" in key for key in result)  # the peak of a CPU is not known
    train.main([*shape, "--bench"])
    assert "tokens/s" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


def test_random_tokens_are_shared_among_ranks_and_depend_on_the_step():
    data = RandomTokens(50, seq_len=8)
    a, again, b, later = (data.batch(step, 6, rank, 2).tolist() for step, rank in [(0, 0), (0, 0), (0, 1), (1, 0)])
    assert a == again and a != b and a != later
    assert len(a) == 3 and len(a[0]) == 9 and 0 <= min(map(min, a)) and max(map(max, a)) < 50
