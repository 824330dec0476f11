import json
import math
import re
import shutil
import sys

import numpy as np
import pytest
import torch
from conftest import train_osp

import eval as evaluation
import train
from data.dataset import Dataset, TextBlocks
from data.prepare import prepare
from data.tokenizer import encode, tokenizer
from eval import (
    Watch,
    attention_sinks,
    evaluate,
    excess_kurtosis,
    gaussian_floor,
    kurtosis_as_published,
    published_floor,
    published_kurtosis,
    sites,
)
from model import Config, Transformer
from tools import export
from tools.evaluate import main as evaluate_main
from tools.evaluate import measure_everywhere
from tools.loading import Loaded, load
from tools.report import strongest_sink, strongest_state
from tools.writing import generate

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


def measure(model, data, batch_size=8):
    return measure_everywhere(model, data, batch_size)


# Without a network


def test_a_run_on_gpt2_tokens_needs_no_network(tmp_path, monkeypatch, capsys):
    """It is trained, continued, evaluated and quantized where GPT-2's table cannot be fetched."""
    def no_network(*args, **kwargs):
        raise ConnectionError("no route to host")

    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path / "empty"))
    monkeypatch.setattr("tiktoken.registry.ENCODINGS", {})
    monkeypatch.setattr("tiktoken.load.read_file", no_network)
    with pytest.raises(ValueError, match="could not be fetched .ConnectionError.; set TIKTOKEN"):
        tokenizer("r50k_base")
    (tmp_path / "d").mkdir()
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        rng.integers(50257, size=500).astype(np.uint16).tofile(tmp_path / f"d/{split}.bin")
    shape = "--preset tiny --n-layer 1 --n-head 2 --n-embd 32 --seq-len 16 --batch-size 8"
    run, four = str(tmp_path / "r"), str(tmp_path / "four.pt")
    train.main([*shape.split(), "--device", "cpu", "--steps", "2", "--data", str(tmp_path / "d"),
                "--out", run])
    train.main(["--resume", run, "--steps", "3", "--device", "cpu"])
    export.main([run, "--method", "gptq", "--out", four, "--device", "cpu"])
    capsys.readouterr()
    evaluate_main([run, "--device", "cpu", "--methods", "rtn,gptq"])
    evaluate_main([four, "--device", "cpu"])
    out = capsys.readouterr().out
    assert re.search(r"position \d+, token \d+\n", out) and "bits per byte" not in out
    with pytest.raises(SystemExit, match="error: tokenizer 'r50k_base' could not be fetched"):
        evaluate_main([run, "--device", "cpu", "--prompt", "some"])


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
    # 100,000 vectors, three seeds: 0.0888 to 0.0896
    assert published_floor(384) == pytest.approx(0.0892, abs=0.002)


def test_one_hot_vectors_reach_the_cap_of_about_the_width():
    for dim in (128, 2048):
        x = torch.zeros(3, dim)
        x[range(3), [0, 5, dim - 1]] = 9
        # raw fourth moment, unbiased std: exactly D - 3
        assert torch.allclose(published_kurtosis(x), torch.tensor(dim - 3.0), rtol=1e-4)
        variance = 1 / dim * (1 - 1 / dim)  # centred: that of a coin which is heads once in D times
        expected = torch.tensor((1 - 6 * variance) / variance)
        assert torch.allclose(excess_kurtosis(x), expected, rtol=1e-3)
        assert excess_kurtosis(x)[0].item() == pytest.approx(dim - 5 + 1 / (dim - 1), rel=1e-3)


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
    assert (found["position"], found["channel"]) == divmod(rest, 32)
    assert found["value"] == x.abs().max().item()
    assert found["token"] == windows[sequence, found["position"]]
    assert found["ratio"] == pytest.approx((x.abs().max() / x[sequence].abs().median()).item())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_a_planted_channel_is_found_where_it_was_planted(val):
    model = model_with()
    target = int(val.windows(np.array([0]))[0, 7])
    with torch.no_grad():
        model.embed.weight[target, 11] = 50.0  # this token's channel 11
    r = measure(model, val)
    top = r["largest"][strongest_state(r["largest"])]
    assert (top["channel"], top["token"]) == (11, target) and top["ratio"] > 500
    clean = measure(model_with(), val)
    assert r["kurtosis"] > 1 and r["kurtosis_per_layer"][0] > clean["kurtosis_per_layer"][0] + 1


def test_the_window_of_a_figure_is_the_residual_stream_in_all_its_states(val):
    from tools.plot import states_of_a_window

    model, found = model_with(), []
    window = torch.from_numpy(val.windows(val.evaluation_windows(1)))[:, :-1]
    handle = model.blocks[1].register_forward_hook(lambda m, i, x: found.append(x[0]))
    model(window)
    handle.remove()
    shown = states_of_a_window(model, val)
    assert shown.shape == (len(model.blocks) + 1, 32, 32) and torch.equal(shown[2], found[0])
    assert torch.allclose(states_of_a_window(model, val, 7), shown[:, :7], atol=1e-5)


def test_a_planted_sink_is_found_in_its_head_only(val):
    model = model_with()
    attention, d = model.blocks[1].attn, SMALL.head_dim

    def plant(heads, first, others):  # head 1: all queries along one axis, and the first key
        x = heads.clone()
        x[:, 1] = 0
        x[:, 1, :, 0] = others
        x[:, 1, :1, 0] = first
        return x

    q_handle = attention.at_q.register_forward_hook(lambda m, i, q: plant(q, 4.0, 4.0))
    k_handle = attention.at_k.register_forward_hook(lambda m, i, k: plant(k, 8.0, -2.0))
    s = attention_sinks(model, val)
    q_handle.remove(), k_handle.remove()
    assert strongest_sink(s) == (1, 1) and s["share"][1][1] > 0.95
    assert s["inside"][1][1] == pytest.approx(4 * 8 / math.sqrt(d))
    assert s["outside"][1][1] == pytest.approx(-4 * 2 / math.sqrt(d))
    for layer, head in ((0, 0), (0, 1), (1, 0)):
        # tiny weights: even attention
        assert s["share"][layer][head] == pytest.approx(s["uniform"], rel=0.05)


def test_everything_can_be_measured_in_bfloat16(val):
    half, model = model_with(), model_with()
    half.compute_dtype = torch.bfloat16
    a, b = (measure(m, val) for m in (half, model))
    assert a["val_loss"] != b["val_loss"]
    assert a["val_loss"] == pytest.approx(b["val_loss"], rel=1e-2)
    a, b = (attention_sinks(m, val) for m in (half, model))
    assert np.allclose(a["share"], b["share"], atol=1e-3)
    assert np.allclose(a["outside"], b["outside"], atol=1e-2)


def test_published_kurtosis_feeds_single_tokens_and_context_matters(val):
    """The script's call is [T, 1]: attention then sees nothing. [1, T] must give something else."""
    model = model_with()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(8)
    seen = []
    model.register_forward_pre_hook(lambda m, inputs: seen.append(tuple(inputs[0].shape)))
    published = kurtosis_as_published(model, val, n_tokens=330)
    assert set(shape[1] for shape in seen) == {1} and sum(shape[0] for shape in seen) == 330
    states = [model.at_embed, model.blocks[0], model.norm]  # without the last block's output
    windows = torch.from_numpy(val.windows(val.evaluation_windows(10)))
    with Watch(model, states, published_kurtosis) as alone, torch.no_grad():
        model(windows.reshape(-1, 1))
    with Watch(model, states, published_kurtosis) as in_context, torch.no_grad():
        model(windows)
    mean = alone.means().mean().item()
    assert published["kurtosis_as_published"] == pytest.approx(mean, rel=1e-5)
    assert abs(alone.means()[1] - in_context.means()[1]) > 0.01
    # embeddings know no context
    assert alone.means()[0] == pytest.approx(in_context.means()[0].item(), rel=1e-4)


# Loss


def test_a_uniform_model_has_the_vocabulary_as_perplexity(val):
    model = model_with()
    torch.nn.init.zeros_(model.head.weight)
    r = measure(model, val)
    assert r["perplexity"] == pytest.approx(256, rel=1e-5)
    assert r["val_loss"] == pytest.approx(math.log(256))
    assert r["bits_per_byte"] == pytest.approx(8, rel=1e-5)  # a separator is a byte of the text


def test_bits_per_byte_are_all_bits_of_a_text_over_its_bytes_and_ends(tmp_path):
    """Counted by hand for documents of 23 bytes. Without the ends it would be 4 % more."""
    texts = [f"line {i:03} of short texts" for i in range(200)]
    (tmp_path / "t.txt").write_text("\n<|endoftext|>\n".join(texts))
    assert {len(text) for text in texts} == {23}
    prepare(tmp_path / "bytes", "bytes", tmp_path / "t.txt")
    measured = Dataset(tmp_path / "bytes", "val", 23)
    model = model_with()
    r = measure(model, measured)
    windows = torch.from_numpy(measured.windows(np.arange(measured.n_windows)))
    assert windows.shape == (10, 24)  # a document each: as many bytes, and the byte 0
    bits = model(windows[:, :-1], windows[:, 1:]).item() / math.log(2)
    assert r["bits_per_byte"] == pytest.approx(bits, rel=1e-5)  # per token, which is per byte
    loaded = Loaded(None, model, {"seq_len": 23}, {"tokenizer": "bytes"}, None)
    (tmp_path / "val.txt").write_text("\n<|endoftext|>\n".join(texts[19::20]))
    by_text = measure(model, loaded.text_blocks(tmp_path / "val.txt", 24))
    assert by_text["bits_per_byte"] == pytest.approx(r["bits_per_byte"], rel=1e-6)


def test_batch_size_changes_nothing_and_two_measurements_are_equal(val):
    model = model_with()
    a, b, c = (measure(model, val, size) for size in (1, 7, 7))
    assert b == c
    for key in ("val_loss", "kurtosis", "perplexity"):
        assert a[key] == pytest.approx(b[key], rel=1e-5)
    for name, site in a["sites"].items():
        expected = pytest.approx(b["sites"][name]["kurtosis"], rel=1e-4, abs=1e-5)
        assert site["kurtosis"] == expected
    assert [x["channel"] for x in a["largest"]] == [x["channel"] for x in b["largest"]]


def test_training_and_eval_measure_the_same(run_dir):
    loaded = load(run_dir)
    dataset = loaded.dataset()
    during = evaluate(loaded.model, dataset, dataset.n_windows, 8)
    after = measure(loaded.model, dataset)
    assert during["val_loss"] == pytest.approx(after["val_loss"], rel=1e-5)
    assert during["kurtosis_per_layer"] == pytest.approx(after["kurtosis_per_layer"], rel=1e-4)


def test_text_blocks_follow_the_wikitext_protocol():
    text = "abcdefghij" * 10 + "xyz"
    blocks = TextBlocks(encode(tokenizer("bytes"), text), 25, len(text))
    assert blocks.n_windows == 4  # the tail is dropped
    ids = blocks.windows(np.arange(4)).reshape(-1).tolist()
    assert bytes(ids).decode() == text[:100]  # no BOS, no overlap
    model = model_with()
    loss = evaluation.mean_loss(model, blocks, np.arange(4), 3)
    by_hand = []
    for i in range(4):
        ids = torch.tensor(list(text[25 * i : 25 * i + 25].encode()))
        logp = model(ids[None, :-1])[0].log_softmax(-1)
        by_hand.append(-logp[range(24), ids[1:]].mean().item())  # 24 targets a block
    assert loss.item() == pytest.approx(np.mean(by_hand), rel=1e-5)
    with pytest.raises(ValueError, match="fewer than one block"):
        TextBlocks(encode(tokenizer("bytes"), "short"), 2048, 5)


# Sampling


class Uncached:
    """A model that reads all tokens again for each new one."""

    def __init__(self, model):
        self.model, self.parameters = model, model.parameters

    def new_cache(self):
        return []

    def __call__(self, tokens, cache):
        cache.append(tokens)
        return self.model(torch.cat(cache, dim=1))


def test_greedy_text_is_the_same_with_and_without_the_cache(run_dir):
    model = load(run_dir).model
    for prompt in ([97], list(b"abc def ghi " * 5)):  # also longer than the window
        texts = [list(generate(m, prompt, 80, 32, temperature=0)) for m in (model, Uncached(model))]
        assert texts[0] == texts[1] and len(texts[0]) == 80


@pytest.mark.parametrize("window, n", [(32, 5), (32, 80), (7, 30), (1, 4), (60, 20), (61, 1)])
def test_a_full_window_forgets_no_more_than_it_must(run_dir, window, n):
    """A short continuation of a long prompt reads all that leaves room for it; no text ever sees
    less than half a window, or more than a whole one."""
    model, prompt, seen = load(run_dir).model, list(b"abc def ghi " * 5), []
    hook = model.register_forward_pre_hook(lambda m, inputs: seen.append(inputs[0].shape[1]))
    written = list(generate(Uncached(model), prompt, n, window, temperature=0))
    hook.remove()
    assert seen[-1] <= max(seen) <= window and min(seen) >= window - window // 2
    if len(prompt) + n - 1 <= window:
        assert seen == list(range(len(prompt), len(prompt) + n))
    elif len(prompt) > window and n - 1 <= window // 2:
        assert seen == list(range(window - n + 1, window + 1))
    ids = list(prompt)
    for length, token in zip(seen, written):
        assert int(model(torch.tensor([ids[-length:]]))[0, -1].argmax()) == token
        ids.append(token)


@pytest.mark.parametrize("n_kv_head", [1, 2])
def test_cached_logits_equal_uncached_ones(n_kv_head):
    model, tokens = model_with(n_kv_head=n_kv_head), torch.randint(256, (2, 12))
    cache, full = model.new_cache(), model(tokens)
    parts = [model(tokens[:, :5], cache=cache)]
    parts += [model(tokens[:, i : i + 1], cache=cache) for i in range(5, 12)]
    assert torch.allclose(torch.cat(parts, dim=1), full, atol=1e-5)


def test_sampling_repeats_with_its_seed_and_obeys_top_k(run_dir):
    model = load(run_dir).model
    draw = lambda **kwargs: list(generate(model, [97], 60, 32, **kwargs))
    assert draw(seed=1) == draw(seed=1) != draw(seed=2)
    assert draw(top_k=1, seed=5) == draw(temperature=0)
    for temperature in (5e-324, 1e-30, 1e-9):  # logits over these may be too large for a float
        assert draw(temperature=temperature) == draw(temperature=0)
    assert len(draw(temperature=1e308, top_k=10**9)) == 60


# The commands


def call(capsys, *argv):
    evaluate_main([str(a) for a in argv])
    return capsys.readouterr().out


def test_eval_prints_a_description_a_comparison_and_json(run_dir, tmp_path, capsys):
    out = call(capsys, run_dir, run_dir / "ckpt.pt", "--as-published")
    assert out.count("excess kurtosis by site") == 2 and "as published" in out and "(OSP)" in out
    assert re.search(r"^target +loss", out, re.M)
    (result, _) = json.loads(call(capsys, run_dir, run_dir, "--json"))
    assert result["label"] == "OSP" and set(result["sites"]) == set(sites(load(run_dir).model))
    (tmp_path / "t.txt").write_text("abc " * 100)
    text = "--text", tmp_path / "t.txt", "--seq-len", "50"
    (on_text,) = json.loads(call(capsys, run_dir, "--json", *text))
    assert on_text["tokens"] == 8 * 49


def test_eval_continues_a_prompt(run_dir, capsys):
    argv = run_dir, "--prompt", "abc", "--tokens", "20", "--temperature", "0"
    out = call(capsys, *argv)
    assert out.startswith("abc") and len(out) == 3 + 20 + 1
    (written,) = json.loads(call(capsys, *argv, "--json"))
    assert written["text"] + "\n" == out


def test_a_prompt_may_be_longer_than_the_model_reads_which_is_said_once(run_dir, capsys):
    argv = [str(run_dir), "--temperature", "0", "--tokens", "8", "--prompt", "abc def " * 10]
    texts = {}
    for more in ([], ["--json"], ["--seq-len", "24"], ["--seq-len", "86"], ["--seq-len", "87"]):
        evaluate_main([*argv, *more])
        texts[" ".join(more)], err = capsys.readouterr()
        said = "prompt (80 tokens) and text (8) exceed the window of {}: the oldest were forgotten"
        window = int(more[-1]) if "--seq-len" in more else 32
        assert err.count("forgot") == (window < 87) and (window == 87 or said.format(window) in err)
    prompt, model = list(b"abc def " * 10), load(run_dir).model
    for more, window in (("", 32), ("--seq-len 24", 24)):
        ids = generate(model, prompt, 8, window, temperature=0)
        assert texts[more] == bytes([*prompt, *ids]).decode() + "\n"


def test_eval_errors_are_one_line(run_dir, tmp_path, capsys, monkeypatch):
    for argv, code, words in (
        ([run_dir, tmp_path / "none"], 1, "nothing at"),
        ([run_dir, "--text", tmp_path / "none.txt"], 1, "none.txt"),
        ([run_dir, "--prompt", ""], 2, "--prompt is empty"),
        ([run_dir, "--tokens", "0"], 2, "--tokens"),
        ([run_dir, "--temperature", "nan"], 2, "--temperature"),
    ):
        with pytest.raises(SystemExit) as error:
            evaluate_main([str(a) for a in argv])
        message = error.value.code if isinstance(error.value.code, str) else capsys.readouterr().err
        assert (1 if isinstance(error.value.code, str) else error.value.code) == code
        assert words in message.splitlines()[-1] and "error: " in message
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.delitem(sys.modules, "tools.plot", raising=False)  # as if it was never imported
    monkeypatch.delattr("tools.plot", raising=False)
    with pytest.raises(SystemExit, match="error: drawing figures needs matplotlib: pip install"):
        evaluate_main([str(run_dir), "--plot", str(tmp_path)])


def test_figures_are_drawn(run_dir, tmp_path, capsys):
    evaluate_main([str(run_dir), str(run_dir), "--plot", str(tmp_path / "f")])
    paths = list((tmp_path / "f").iterdir())
    names = {"grid.png", "activations.png", "curves.png", "layers.png"}
    assert {path.name for path in paths} == names
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in paths)


def test_a_line_is_the_mean_of_its_seeds_and_its_band_their_range():
    from tools import plot

    axis = plot.panels(1)[1][0]
    plot.draw_means(axis, [(1, 3.0), (2, 5.0), (1, 1.0), (2, 5.0)], label="OSP")
    assert axis.get_lines()[0].get_xydata().tolist() == [[1, 2], [2, 5]]
    corners = axis.collections[0].get_paths()[0].vertices.tolist()
    assert [1, 1] in corners and [1, 3] in corners and [2, 5] in corners


def test_names_beside_the_ends_of_lines_do_not_overlap():
    from tools import plot

    figure, (axis,) = plot.panels(1)
    for name, end in (("Adam", 9.0), ("Muon", 1.001), ("OSP", 1.0), ("Gaussian", 1.002)):
        axis.plot([0, 1], [0, end], label=name)
    axis.plot([0, 1], [0, 0])  # one without a name
    plot.label_ends(axis)
    figure.draw_without_rendering()
    boxes = sorted((text.get_window_extent() for text in axis.texts), key=lambda box: box.y0)
    assert [text.get_text() for text in sorted(axis.texts, key=lambda text: text.get_position()[1])] == [
        "OSP", "Muon", "Gaussian", "Adam"]
    assert all(low.y1 <= high.y0 for low, high in zip(boxes, boxes[1:]))
    adam = axis.transAxes.inverted().transform(axis.transData.transform((1, 9)))
    assert axis.texts[0].get_position()[1] == pytest.approx(adam[1])  # none is near, so it stays at its line


def test_a_grid_names_the_number_of_outliers():
    from tools import plot

    token = torch.cat([torch.linspace(-2, 2, 60), torch.tensor([7.0, 9.0])])
    figure = plot.draw_grid([("Adam", token), ("Muon", token[:-1]), ("OSP", token[:-2])], state=2)
    assert [axis.get_title(loc="left") for axis in figure.axes] == [
        "(a) Adam: two outliers stretch the 16 values", "(b) Muon: one outlier stretches the 16 values",
        "(c) OSP: no outliers, so the 16 values lie close"]
    arrows = [sum(hasattr(text, "arrow_patch") and text.arrow_patch is not None for text in axis.texts) for axis in figure.axes]
    assert arrows == [2, 1, 0]


def test_numbers_on_different_data_stand_in_no_table_and_no_figure(run_dir, dataset_dir, tmp_path, capsys):
    """A second run on a dataset of another name: the same text prepared in another place is the same data."""
    for name, words in (("same", None), ("other", "some other words\n" * 900)):
        if words:
            (tmp_path / "t.txt").write_text(words)
            prepare(tmp_path / name, "bytes", tmp_path / "t.txt")
        else:
            shutil.copytree(dataset_dir, tmp_path / name)
        train.main(["--preset", "tiny", "--n-layer", "2", "--n-head", "2", "--n-embd", "32", "--seq-len", "32", "--steps", "1",
                    "--device", "cpu", "--data", str(tmp_path / name), "--out", str(tmp_path / f"on-{name}")])
    capsys.readouterr()
    argv = ["--device", "cpu", "--bits", "none"]
    evaluate_main([str(run_dir), str(tmp_path / "on-same"), *argv])
    assert re.search(rf"(?m)^{run_dir.name} .*\n^on-same ", capsys.readouterr().out)
    evaluate_main([str(run_dir), str(tmp_path / "on-other"), *argv])
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith(f"not compared: {run_dir.name} and on-other were measured on different data")
    evaluate_main([str(run_dir), str(tmp_path / "on-other"), "--text", str(tmp_path / "t.txt"), *argv])
    assert "not compared" not in capsys.readouterr().out
    with pytest.raises(SystemExit, match="different data"):
        evaluate_main([str(run_dir), str(tmp_path / "on-other"), "--plot", str(tmp_path / "f"), *argv])


def test_targets_of_the_same_name_are_told_apart(run_dir, tmp_path, capsys):
    shutil.copytree(run_dir, tmp_path / run_dir.name)
    evaluate_main([str(run_dir), str(tmp_path / run_dir.name), "--device", "cpu", "--bits", "none", "--json"])
    names = [row["target"] for row in json.loads(capsys.readouterr().out)]
    assert names == [str(run_dir), str(tmp_path / run_dir.name)]
