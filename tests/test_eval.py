import json
import math
import re
import sys
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from conftest import read_log, train_osp
from launch import finish, start

import eval as evaluation
import train
from data.dataset import Dataset, tokenizer
from eval import (
    SinkWatch,
    TextBlocks,
    Watch,
    attention_sinks,
    evaluate,
    excess_kurtosis,
    gaussian_floor,
    generate,
    kurtosis_as_published,
    load_target,
    measure,
    published_floor,
    published_kurtosis,
    sites,
    strongest_sink,
    strongest_state,
)
from model import Config, Transformer

SMALL = Config(n_layer=2, n_head=2, n_embd=32, vocab_size=256)


@pytest.fixture
def val(dataset_dir):
    return Dataset(dataset_dir, "val", 32)


@pytest.fixture(scope="module")
def run_dir(dataset_dir, tmp_path_factory):
    """A small OSP model trained for 60 steps."""
    out = tmp_path_factory.mktemp("runs") / "osp"
    return train_osp(out, dataset_dir, n_layer=2, n_embd=64, seq_len=32, steps=60)


def model_with(seed=0, **changes):
    torch.manual_seed(seed)
    return Transformer(Config(**vars(SMALL) | changes)).eval()


# Estimators


@pytest.mark.parametrize("dim", [64, 384, 2048])
def test_gaussian_vectors_have_the_kurtosis_of_the_floor(dim):
    torch.manual_seed(0)
    k = excess_kurtosis(torch.randn(20000, dim)).mean().item()
    assert k == pytest.approx(gaussian_floor(dim), abs=0.01) and abs(k) < 0.02 + 6 / dim


def test_kurtosis_ignores_scale_and_offset_and_survives_extreme_numbers():
    torch.manual_seed(0)
    x = torch.randn(100, 256)
    for y in (x * 7 + 3, x * 1e15, x * 1e-15):
        assert torch.allclose(excess_kurtosis(y), excess_kurtosis(x), atol=1e-2)
    assert excess_kurtosis(torch.full((2, 64), 3.0)).tolist() == [0, 0]


def test_the_published_estimator_has_its_known_floors():
    assert published_floor(2048) == pytest.approx(0.042, abs=0.003)
    assert published_floor(384) == pytest.approx(0.0892, abs=0.002)  # 100,000 vectors, three seeds: 0.0888 to 0.0896


def test_one_hot_vectors_reach_the_cap_of_about_the_width():
    for dim in (128, 2048):
        x = torch.zeros(3, dim)
        x[range(3), [0, 5, dim - 1]] = 9
        # Published (raw fourth moment, unbiased std): exactly D - 3. Centred: 1 / p (1 - p) - 6 with p = 1/D, less 1 + 1/D^2...
        assert torch.allclose(published_kurtosis(x), torch.tensor(dim - 3.0), rtol=1e-4)
        p = 1 / dim
        assert torch.allclose(excess_kurtosis(x), torch.tensor((1 - 6 * p * (1 - p)) / (p * (1 - p))), rtol=1e-3)
        assert excess_kurtosis(x)[0].item() == pytest.approx(dim - 3, abs=2.5)


# Watching


def test_watch_equals_a_plain_loop_and_leaves_no_hook(val):
    model = model_with()
    windows = torch.from_numpy(val.windows(np.arange(5)))[:, :-1]
    kept = []
    handle = model.blocks[1].register_forward_hook(lambda m, i, x: kept.append(x.detach()))
    with Watch(model, [model.at_embed, model.blocks[1]], extremes=True) as watch, torch.no_grad():
        for window in windows:
            model(window[None])
    handle.remove()
    x = torch.cat(kept)  # [5, T, D]
    assert watch.means()[1].item() == pytest.approx(
        np.mean([excess_kurtosis(t).item() for s in x for t in s]), rel=1e-4
    )
    at = int(x.abs().argmax())
    sequence, rest = divmod(at, x[0].numel())
    found = watch.largest[1]
    assert (found["position"], found["channel"]) == divmod(rest, 32) and found["value"] == x.abs().max().item()
    assert found["token"] == windows[sequence, found["position"]]
    assert found["ratio"] == pytest.approx((x.abs().max() / x[sequence].abs().median()).item())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_a_planted_channel_is_found_where_it_was_planted(val):
    model = model_with()
    target = int(val.windows(np.array([0]))[0, 7])
    with torch.no_grad():
        model.embed.weight[target, 11] = 50.0  # this token's channel 11
    r = measure(model, val, 8, nullcontext())
    top = r["largest"][strongest_state(r["largest"])]
    assert (top["channel"], top["token"]) == (11, target) and top["ratio"] > 500
    clean = measure(model_with(), val, 8, nullcontext())
    assert r["kurtosis"] > 1 and r["kurtosis_per_layer"][0] > clean["kurtosis_per_layer"][0] + 1


def test_a_planted_sink_is_found_in_its_head_only(val):
    model = model_with()
    attention, d = model.blocks[1].attn, SMALL.head_dim

    def plant(heads, first, others):  # all queries of head 1 along one axis, the first key along it too
        x = heads.clone()
        x[:, 1] = 0
        x[:, 1, :, 0] = others
        x[:, 1, :1, 0] = first
        return x

    q_handle = attention.at_q.register_forward_hook(lambda m, i, q: plant(q, 4.0, 4.0))
    k_handle = attention.at_k.register_forward_hook(lambda m, i, k: plant(k, 8.0, -2.0))
    s = attention_sinks(model, val, nullcontext())
    q_handle.remove(), k_handle.remove()
    assert strongest_sink(s) == (1, 1) and s["share"][1][1] > 0.95
    assert s["inside"][1][1] == pytest.approx(4 * 8 / math.sqrt(d)) and s["outside"][1][1] == pytest.approx(
        -4 * 2 / math.sqrt(d)
    )
    for layer, head in ((0, 0), (0, 1), (1, 0)):
        assert s["share"][layer][head] == pytest.approx(s["uniform"], rel=0.05)  # tiny weights: even attention


def test_the_histogram_of_logits_counts_every_pair_once(val):
    T = 32
    counts = attention_sinks(model_with(), val, nullcontext(), n_windows=3, histogram=(0, 1))["counts"]
    assert [sum(c) for c in counts] == [3 * (T - 1), 3 * (T - 1) * T // 2]
    assert len(counts[0]) == len(SinkWatch.bins) - 1


def test_everything_can_be_measured_in_bfloat16(val):
    half, model = torch.autocast("cpu", dtype=torch.bfloat16), model_with()
    a, b = (measure(model, val, 8, context) for context in (half, nullcontext()))
    assert a["val_loss"] == pytest.approx(b["val_loss"], rel=1e-2)
    a, b = (attention_sinks(model, val, context, histogram=(0, 1)) for context in (half, nullcontext()))
    assert np.allclose(a["share"], b["share"], atol=1e-3) and np.allclose(a["outside"], b["outside"], atol=1e-2)
    assert sum(a["counts"][1]) == sum(b["counts"][1])


def test_published_kurtosis_feeds_single_tokens_and_context_matters(val):
    """The script's call is [T, 1]: attention then sees nothing. A model that attends must differ from the [1, T] call."""
    model = model_with()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(8)
    seen = []
    model.register_forward_pre_hook(lambda m, inputs: seen.append(tuple(inputs[0].shape)))
    published = kurtosis_as_published(model, val, nullcontext(), n_tokens=330)
    assert set(shape[1] for shape in seen) == {1} and sum(shape[0] for shape in seen) == 330
    states = [model.at_embed, model.blocks[0], model.norm]  # n_layer + 1 of them, the last raw output left out
    windows = torch.from_numpy(val.windows(val.evaluation_windows(10)))
    with Watch(model, states, published_kurtosis) as alone, torch.no_grad():
        model(windows.reshape(-1, 1))
    with Watch(model, states, published_kurtosis) as in_context, torch.no_grad():
        model(windows)
    assert published["kurtosis_as_published"] == pytest.approx(alone.means().mean().item(), rel=1e-5)
    assert abs(alone.means()[1] - in_context.means()[1]) > 0.01
    assert alone.means()[0] == pytest.approx(in_context.means()[0].item(), rel=1e-4)  # embeddings know no context


# Loss


def test_a_uniform_model_has_the_vocabulary_as_perplexity(val):
    model = model_with()
    torch.nn.init.zeros_(model.head.weight)
    r = measure(model, val, 8, nullcontext())
    assert r["perplexity"] == pytest.approx(256, rel=1e-5) and r["val_loss"] == pytest.approx(math.log(256))
    assert r["bits_per_byte"] == pytest.approx(8 / val.meta["bytes_per_token"], rel=1e-5)


def test_batch_size_changes_nothing_and_two_measurements_are_equal(val):
    model = model_with()
    a, b, c = (measure(model, val, size, nullcontext()) for size in (1, 7, 7))
    assert b == c
    for key in ("val_loss", "kurtosis", "perplexity"):
        assert a[key] == pytest.approx(b[key], rel=1e-5)
    for name in a["sites"]:
        assert a["sites"][name]["kurtosis"] == pytest.approx(b["sites"][name]["kurtosis"], rel=1e-4, abs=1e-5)
    assert [x["channel"] for x in a["largest"]] == [x["channel"] for x in b["largest"]]


def test_training_and_eval_measure_the_same(run_dir):
    target = load_target(run_dir, "cpu")
    n = target.dataset().n_windows
    during = evaluate(target.model, target.dataset(), n, 8, nullcontext())
    after = measure(target.model, target.dataset(), 8, nullcontext())
    assert during["val_loss"] == pytest.approx(after["val_loss"], rel=1e-5)
    assert during["kurtosis_per_layer"] == pytest.approx(after["kurtosis_per_layer"], rel=1e-4)


def test_text_blocks_follow_the_wikitext_protocol():
    text = "abcdefghij" * 10 + "xyz"
    blocks = TextBlocks(text, tokenizer("bytes"), 25)
    assert blocks.n_windows == 4  # the tail is dropped
    assert bytes(blocks.windows(np.arange(4)).reshape(-1).tolist()).decode() == text[:100]  # no BOS, no overlap
    model = model_with()
    loss = evaluation.mean_loss(model, blocks, np.arange(4), 3, nullcontext())
    by_hand = []
    for i in range(4):
        ids = torch.tensor(list(text[25 * i : 25 * i + 25].encode()))
        logp = model(ids[None, :-1])[0].log_softmax(-1)
        by_hand.append(-logp[range(24), ids[1:]].mean().item())  # 24 targets a block
    assert loss.item() == pytest.approx(np.mean(by_hand), rel=1e-5)
    with pytest.raises(ValueError, match="fewer than one block"):
        TextBlocks("short", tokenizer("bytes"), 2048)


# Sampling


def test_greedy_text_is_the_same_with_and_without_the_cache(run_dir):
    target = load_target(run_dir, "cpu")
    for prompt in ([97], list(b"abc def ghi " * 5)):  # also longer than the window, and running past it
        texts = [list(generate(target.model, prompt, 80, 32, temperature=0, use_cache=c)) for c in (True, False)]
        assert texts[0] == texts[1] and len(texts[0]) == 80


@pytest.mark.parametrize("n_kv_head", [1, 2])
def test_cached_logits_equal_uncached_ones(n_kv_head):
    model, tokens = model_with(n_kv_head=n_kv_head), torch.randint(256, (2, 12))
    cache, full = model.new_cache(), model(tokens)
    parts = [model(tokens[:, :5], cache=cache), *(model(tokens[:, i : i + 1], cache=cache) for i in range(5, 12))]
    assert torch.allclose(torch.cat(parts, dim=1), full, atol=1e-5)


def test_sampling_repeats_with_its_seed_and_obeys_top_k(run_dir):
    target = load_target(run_dir, "cpu")
    draw = lambda **kwargs: list(generate(target.model, [97], 60, 32, **kwargs))
    assert draw(seed=1) == draw(seed=1) != draw(seed=2)
    assert draw(top_k=1, seed=5) == draw(temperature=0)


# The commands


def call(capsys, *argv):
    evaluation.main([str(a) for a in argv])
    return capsys.readouterr().out


def test_eval_prints_a_description_a_comparison_and_json(run_dir, tmp_path, capsys):
    out = call(capsys, run_dir, run_dir / "ckpt.pt", "--as-published")
    assert out.count("excess kurtosis by site") == 2 and "as published" in out and "(OSP)" in out
    assert re.search(r"^target +loss", out, re.M)
    (result, _) = json.loads(call(capsys, run_dir, run_dir, "--json"))
    assert result["label"] == "OSP" and set(result["sites"]) == set(sites(load_target(run_dir, "cpu").model))
    (tmp_path / "t.txt").write_text("abc " * 100)
    (on_text,) = json.loads(call(capsys, run_dir, "--json", "--text", tmp_path / "t.txt", "--seq-len", "50"))
    assert on_text["tokens"] == 8 * 49


def test_eval_continues_a_prompt(run_dir, capsys):
    out = call(capsys, run_dir, "--prompt", "abc", "--tokens", "20", "--temperature", "0")
    assert out.startswith("abc") and len(out) == 3 + 20 + 1
    (written,) = json.loads(call(capsys, run_dir, "--prompt", "abc", "--tokens", "20", "--temperature", "0", "--json"))
    assert written["text"] + "\n" == out


def test_eval_errors_are_one_line(run_dir, tmp_path, capsys, monkeypatch):
    for argv, code, words in (
        ([run_dir, tmp_path / "none"], 1, "nothing at"),
        ([run_dir, "--text", tmp_path / "none.txt"], 1, "none.txt"),
        ([run_dir, "--prompt", ""], 1, "empty"),
        ([run_dir, "--tokens", "0"], 2, "--tokens"),
        ([run_dir, "--temperature", "nan"], 2, "--temperature"),
    ):
        with pytest.raises(SystemExit) as error:
            evaluation.main([str(a) for a in argv])
        message = error.value.code if isinstance(error.value.code, str) else capsys.readouterr().err
        assert (1 if isinstance(error.value.code, str) else error.value.code) == code
        assert words in message.splitlines()[-1] and "error: " in message
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.delitem(sys.modules, "plot", raising=False)
    with pytest.raises(SystemExit, match="error: figures need matplotlib: pip install"):
        evaluation.main([str(run_dir), "--plot", str(tmp_path)])


def test_figures_are_drawn(run_dir, tmp_path, capsys):
    evaluation.main([str(run_dir), str(run_dir), "--plot", str(tmp_path / "f")])
    assert {p.name for p in (tmp_path / "f").iterdir()} == {"activations.png", "curves.png", "layers.png", "sinks.png"}
    assert all(p.read_bytes().startswith(b"\x89PNG") for p in (tmp_path / "f").iterdir())


def test_a_killed_ablation_goes_on_and_repeats_no_finished_row(small_run, tmp_path):
    options = [
        *small_run[:-4],
        *small_run[-2:],
        "--ablation",
        "--steps",
        "30",
        "--save-every",
        "5",
        "--out",
        tmp_path / "a",
    ]
    (process,) = start(options, tmp_path)
    third = tmp_path / "a/muon-s0/log.jsonl"
    while not (third.exists() and '"step": 12,' in third.read_text()):
        assert process.is_alive(), (tmp_path / "rank0.txt").read_text()
    process.kill()
    process.join()
    first = (tmp_path / "a/adam-s0/ckpt.pt").stat().st_mtime_ns
    code, output = finish(start(options, tmp_path), tmp_path)
    assert code == 0, output
    assert (tmp_path / "a/adam-s0/ckpt.pt").stat().st_mtime_ns == first
    assert "muon-s0: at step 10 of 30" in output
    table = (tmp_path / "a/table.md").read_text()
    assert [line.split("|")[1].strip() for line in table.splitlines()[2:]] == [
        "Adam",
        "Muon-only",
        "Muon",
        "Muon + SSNorm",
        "Muon + EmbProj",
        "OSP",
    ]
    for row in ("adam", "muon-only", "muon", "muon-ss", "muon-embproj", "muon-ss-embproj"):
        assert set(read_log(tmp_path / f"a/{row}-s0")[0]) == set(range(1, 31))
    code, output = finish(start([*options[:-4], "--steps", "31", "--out", tmp_path / "a"], tmp_path), tmp_path)
    assert code == 0 and "at step 30 of 31" in output  # longer training is allowed, other options are not
    code, output = finish(start([*options, "--seq-len", "8"], tmp_path), tmp_path)
    assert code == 2 and "--seq-len 8" in output
    code, output = finish(start([*options, "--steps", "8", "--save-every", "4"], tmp_path), tmp_path)
    assert code == 2 and "has 31 steps already" in output  # no table of rows that were not asked for


def test_the_full_ablation_has_all_combinations_and_seeds_give_a_spread(small_run, tmp_path):
    options = [
        *small_run,
        "--ablation",
        "--full",
        "--seeds",
        "2",
        "--steps",
        "2",
        "--json",
        "--out",
        str(tmp_path / "a"),
    ]
    train.main(options)
    table = (tmp_path / "a/table.md").read_text()
    (tmp_path / "a/adam-s0/eval.json").write_text("{damaged")
    (tmp_path / "a/adam-s1/eval.json").write_text("{}")  # as of an older version
    train.main(options)
    assert (tmp_path / "a/table.md").read_text() == table
    assert len(table.splitlines()) == 2 + 12 and table.count("±") == 12 * 7 and "2 seed(s)" in table
