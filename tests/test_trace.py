import json

import pytest
import torch
from conftest import read_log

import train
from data.dataset import Dataset
from model import Config, Transformer, hooked
from nanoosp.options import parse
from nanoosp.ranks import Ranks
from results.ffn_hidden import trace


def traced(small_run, tmp_path, variant, *options):
    """(first line, records) of a short run."""
    file = tmp_path / f"{variant}.jsonl"
    trace.main([variant, *small_run, *options, "--out", str(file)])
    first, *records = map(json.loads, file.read_text().splitlines())
    return first, records


def all_gains(record):
    gains = record["gains"]
    return torch.tensor([*gains["attn_norm"], *gains["ffn_norm"], gains["norm"]])


@pytest.mark.parametrize("variant", trace.VARIANTS)
def test_every_variant_trains_with_gains_where_it_says(small_run, tmp_path, variant):
    decay = [] if variant == "decay-0.1" else ["--weight-decay", "10"]  # of a visible size
    options = ["--steps", "5", "--trace-every", "2", *decay]
    first, records = traced(small_run, tmp_path, variant, *options)
    assert [r["step"] for r in records] == [0, 2, 4, 5] and first["variant"] == variant
    assert all("loss" in r for r in records[1:])
    assert records[-1]["quantized"]["4-4-4"].keys() == {"rtn", "had"}
    start = 32 ** trace.VARIANTS[variant].start  # 32 channels
    before, after = all_gains(records[0]), all_gains(records[-1])
    torch.testing.assert_close(before, torch.full_like(before, start))
    assert (before == after).all() == (variant == "frozen")
    if variant in ("official", "no-decay"):
        # a step of Muon moves a number by 0.2 lr, and decay takes 10 lr of it besides
        lr = 1e-2 * sum(train.trapezoid(step, 5, 0, 1) for step in range(1, 6))
        moved = (after - before).abs() <= 0.2 * lr + 1e-6
        assert moved.all() if variant == "no-decay" else not moved.any()


@pytest.mark.parametrize(
    "variant, options", [("official", "--osp"), ("rms", "--optimizer muon --embproj"), ("adam", "")]
)
def test_tracing_does_not_change_the_training(small_run, tmp_path, variant, options):
    _, records = traced(small_run, tmp_path, variant, "--steps", "6", "--trace-every", "1")
    train.main([*small_run, *options.split(), "--steps", "6", "--out", str(tmp_path / "run")])
    losses, evaluations = read_log(tmp_path / "run")
    assert [r["loss"] for r in records[1:]] == [r["loss"] for r in losses.values()]
    assert records[-1]["val_loss"] == evaluations[6]["val_loss"]


@pytest.mark.parametrize("variant, optimizer, decay", [
    ("official", "Muon", 0.3), ("no-decay", "Muon", 0), ("adamw", "AdamW", 0.3),
    ("adamw-no-decay", "AdamW", 0), ("adam", "AdamW", 0.3), ("frozen", None, None)])
def test_gains_belong_to_the_optimizer_a_variant_names(small_run, variant, optimizer, decay):
    opt = parse(train.Options, "", [*small_run, "--weight-decay", "0.3"])
    vars(opt).update(trace.VARIANTS[variant].options)
    train.resolve(opt)
    model, optimizers, _ = train.build(opt, 256, Ranks())
    trace.vary(trace.VARIANTS[variant], opt, model, optimizers)
    found = [(type(o).__name__, g["weight_decay"], g["peak_lr"], len(g["params"]))
             for o in optimizers for g in o.param_groups if g["role"] == "gain"]
    assert found == ([] if optimizer is None else [(optimizer, decay, opt.lr, 3)])
    covered = [p for o in optimizers for g in o.param_groups for p in g["params"]]
    assert {id(p) for p in covered} == {id(p) for p in model.parameters() if p.requires_grad}


def test_four_bit_errors_are_what_theory_says():
    even = torch.rand(4, 8, 2**14, generator=torch.Generator().manual_seed(0)) * 2 - 1
    # 15 steps over a range of 2, each with an error of step^2 / 12. The mean square is 1/3
    ratio = trace.error_4bit(even) / trace.squares(even)
    torch.testing.assert_close(ratio, torch.full_like(ratio, 1 / 225), rtol=0.05, atol=0)
    even = even.abs()  # the range must begin at 0 for the outlier to be one of the 16 values
    even[..., 3] = 0
    lone = even.clone()
    lone[..., 3] = 100.0  # a step is now 6.7: all that is not the outlier is lost
    torch.testing.assert_close(trace.error_4bit(lone), trace.squares(even), rtol=1e-4, atol=0)
    # Rotated it is 1024 numbers near +-100/32, 15 steps apart. The 16 codes include 0, so both ends
    # fall half a step away from a code: 1/15 of their size
    lone = torch.zeros(1, 1, 1024)
    lone[..., 3] = 100.0
    assert trace.error_4bit(lone).item() == 0
    ratio = trace.error_4bit_hadamard(lone) / trace.squares(lone)
    torch.testing.assert_close(ratio, torch.full_like(ratio, 1 / 225), rtol=1e-3, atol=0)


def test_a_record_is_what_the_kept_activations_give(dataset_dir):
    torch.manual_seed(0)
    model = Transformer(Config(n_layer=2, n_head=2, n_embd=32, norm="ss"))
    val = Dataset(dataset_dir, "val", 16)
    kept = [[] for _ in model.blocks]
    sites = [block.ffn.at_hidden for block in model.blocks]
    with hooked((at, lambda m, i, x, k=k: k.append(x)) for at, k in zip(sites, kept)):
        record = trace.measure(model, val, 5)
    for i, parts in enumerate(kept):
        x = torch.cat(parts).flatten(0, 1)
        assert len(x) == 16 * len(val.evaluation_windows(trace.WINDOWS))
        assert record["hidden_max"][i] == x.abs().max().item()
        assert record["hidden_rms"][i] == pytest.approx(x.square().mean().sqrt().item(), rel=1e-4)
        error = (trace.Int(4).round(x) - x).square().sum() / x.square().sum()
        assert record["hidden_error_4bit"][i] == pytest.approx(error.item(), rel=1e-4)
        weight = model.blocks[i].ffn.down_proj.weight
        rms = weight.norm().item() / weight.numel() ** 0.5
        assert record["down_weight_rms"][i] == pytest.approx(rms, rel=1e-4)


def test_a_trace_overwrites_nothing_and_leaves_nothing_where_it_cannot_start(small_run, tmp_path):
    traced(small_run, tmp_path, "official", "--steps", "1")
    before = (tmp_path / "official.jsonl").read_text()
    over = ["--out", tmp_path / "official.jsonl"]
    nosuch = ["--data", "nosuch", "--out", tmp_path / "new.jsonl"]
    for options in (over, nosuch):
        with pytest.raises(SystemExit, match="error: "):
            trace.main(["official", *small_run, "--steps", "1", *map(str, options)])
    assert (tmp_path / "official.jsonl").read_text() == before
    assert not (tmp_path / "new.jsonl").exists()
