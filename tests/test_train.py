import gc
import json
import os
import random
import signal
import time

import pytest
import torch
from conftest import read_log
from launch import finish, run, run_side_by_side, start, torchrun_environments
from torch.nn.parallel import DistributedDataParallel

import train
from eval import excess_kurtosis, gaussian_floor
from model import Config, Transformer
from nanoosp import run as run_directory
from nanoosp.checkpoint import load_checkpoint, model_from_checkpoint, restore
from nanoosp.options import parse
from nanoosp.ranks import Ranks
from tools import dry_run


def tensors(value, path=""):
    """All tensors of a nested checkpoint, by path."""
    if isinstance(value, torch.Tensor):
        return {path: value}
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, (list, tuple)) else ()
    return {k: t for name, v in items for k, t in tensors(v, f"{path}/{name}").items()}


def assert_same_run(a, b):
    """Two run directories agree in every bit of weights, optimizer state and logged losses."""
    states = [load_checkpoint(d) for d in (a, b)]
    first, second = ({**tensors(s["model"], "model"), **tensors(s["optimizers"], "optimizers")} for s in states)
    assert states[0]["step"] == states[1]["step"] and first.keys() == second.keys()
    assert any("momentum" in k for k in first) and any("exp_avg" in k for k in first)
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name
    for x, y in zip(read_log(a), read_log(b)):
        strip = lambda log: {s: {k: v for k, v in r.items() if k != "tokens_per_s"} for s, r in log.items()}
        assert strip(x) == strip(y) and len(x) > 1


@pytest.mark.parametrize("optimizer", ["adam", "muon", "muon-only"])
@pytest.mark.parametrize("norm", ["rms", "ss"])
@pytest.mark.parametrize("embproj", ["--embproj", "--no-embproj"])
def test_every_combination_of_the_parts_reduces_the_loss(small_run, tmp_path, optimizer, norm, embproj):
    train.main(
        [*small_run, "--optimizer", optimizer, "--norm", norm, embproj, "--steps", "20", "--out", str(tmp_path / "r")]
    )
    losses = [r["val_loss"] for r in read_log(tmp_path / "r")[1].values()]
    assert losses[0] > 5.3 and losses[-1] < losses[0] - 0.8  # from ln 256 = 5.5; muon-only, the slowest, reaches 4.5


def test_osp_is_exactly_its_three_parts(small_run, tmp_path):
    parts = ["--optimizer", "muon", "--norm", "ss", "--embproj"]
    for name, options in (("osp", ["--osp"]), ("parts", parts)):
        train.main([*small_run, *options, "--steps", "5", "--out", str(tmp_path / name)])
    assert_same_run(tmp_path / "osp", tmp_path / "parts")


def test_twenty_kills_in_a_row_lose_nothing(small_run, tmp_path):
    """kill -9 at random moments, also while starting and while saving, with gradient accumulation."""
    options = [*small_run, *"--osp --steps 200 --save-every 4 --eval-every 50 --micro-batch-size 2".split()]
    whole, pieces, rng = tmp_path / "whole", tmp_path / "pieces", random.Random(0)
    (tmp_path / "beside").mkdir()
    undisturbed = start([*options, "--out", whole], tmp_path / "beside")
    log, kills = pieces / "log.jsonl", 0
    while kills < 20:
        done = load_checkpoint(pieces)["step"] if (pieces / "ckpt.pt").exists() else 0
        argv = ["--device", "cpu", "--resume", pieces] if (pieces / "ckpt.pt").exists() else [*options, "--out", pieces]
        (process,) = start(argv, tmp_path)
        target = done + rng.randint(1, 12)  # steps; every fifth time it dies during the start instead
        until = time.monotonic() + (rng.uniform(0.01, 0.3) if kills % 5 == 4 else 30)
        while time.monotonic() < until and process.is_alive():
            if log.exists() and f'"step": {target},' in log.read_text():
                break
            time.sleep(0.001)
        assert process.is_alive(), (tmp_path / "rank0.txt").read_text()
        process.kill()
        process.join()
        kills += 1
    assert 0 < load_checkpoint(pieces)["step"] < 200
    for code, output in (run(["--device", "cpu", "--resume", pieces], tmp_path), finish(undisturbed, tmp_path / "beside")):
        assert code == 0, output
    assert_same_run(whole, pieces)
    assert {p.name for p in pieces.iterdir()} <= {"ckpt.pt", "log.jsonl", "config.json", "summary.json"}


def test_two_ranks_resume_exactly_and_hand_over_to_one(small_run, tmp_path):
    options = [*small_run, "--osp", "--steps", "12", "--save-every", "6", "--micro-batch-size", "2"]
    whole, pieces = tmp_path / "whole", tmp_path / "pieces"
    assert run([*options, "--out", whole], tmp_path, world=2)[0] == 0
    processes = start([*options, "--steps", "12", "--out", pieces], tmp_path, world=2)
    while not ((pieces / "log.jsonl").exists() and '"step": 8,' in (pieces / "log.jsonl").read_text()):
        time.sleep(0.001)
    for process in processes:
        process.kill()
        process.join()
    assert load_checkpoint(pieces)["step"] == 6
    half = load_checkpoint(pieces)
    assert run(["--device", "cpu", "--resume", pieces], tmp_path, world=2)[0] == 0
    assert_same_run(whole, pieces)

    torch.save(half, pieces / "ckpt.pt")  # what two ranks saved at step 6, loaded by one
    opt = parse(train.Options, train.__doc__, ["--device", "cpu", "--resume", str(pieces)])
    state = train.resolve(opt)
    data, _ = train.open_datasets(opt.data, opt.seq_len, opt.seed, Ranks())
    model = train.Transformer(train.model_config(opt, 256))
    optimizers = train.make_optimizers(model, opt.optimizer, opt.lr, opt.embed_lr, opt.weight_decay)
    restore(state, model, optimizers, data)
    saved, restored = tensors(half["optimizers"]), tensors([o.state_dict() for o in optimizers])
    assert saved.keys() == restored.keys() and all(torch.equal(saved[k], restored[k]) for k in saved)
    assert all(o.state[p] for o in optimizers for g in o.param_groups for p in g["params"])  # a momentum for each
    train.main(["--device", "cpu", "--resume", str(pieces)])
    assert_close_runs(whole, pieces)


def assert_close_runs(a, b, rtol=1e-5):
    for x, y, key in zip(read_log(a), read_log(b), ("loss", "val_loss")):
        assert x.keys() == y.keys()
        for step in x:
            assert y[step][key] == pytest.approx(x[step][key], rel=rtol), (step, key)


def test_ranks_and_micro_batches_do_not_change_the_losses(small_run, tmp_path):
    options = [*small_run, "--osp", "--steps", "8"]
    settings = {"8x1": (1, 8), "4x2": (1, 4), "1x8": (1, 1), "2 ranks": (2, 4), "2 ranks 2x2": (2, 2)}
    jobs = [([*options, "--micro-batch-size", micro, "--out", tmp_path / name], world)
            for name, (world, micro) in settings.items()]
    for code, output in run_side_by_side(jobs, tmp_path):
        assert code == 0, output
    for name in settings:
        assert_close_runs(tmp_path / "8x1", tmp_path / name)


def test_recomputing_trains_the_same_model(small_run, tmp_path):
    for name, extra in (("kept", []), ("again", ["--recompute"])):
        train.main([*small_run, "--osp", "--steps", "6", *extra, "--out", str(tmp_path / name)])
    kept, again = (load_checkpoint(tmp_path / name)["model"] for name in ("kept", "again"))
    assert all(torch.equal(kept[name], again[name]) for name in kept)


def test_evaluating_more_often_changes_no_weight(small_run, tmp_path):
    for every in (1, 7, 100):
        train.main(
            [*small_run, "--osp", "--steps", "14", "--eval-every", str(every), "--out", str(tmp_path / str(every))]
        )
    states = [load_checkpoint(tmp_path / str(every))["model"] for every in (1, 7, 100)]
    for name in states[0]:
        assert torch.equal(states[0][name], states[1][name]) and torch.equal(states[0][name], states[2][name])


def test_a_run_that_ended_in_its_first_step_logs_the_start_when_it_is_resumed(small_run, tmp_path, monkeypatch):
    def interrupted(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(train, "optimizer_step", interrupted)
        with pytest.raises(SystemExit):
            train.main([*small_run, "--steps", "4", "--eval-every", "2", "--out", str(tmp_path / "r")])
    assert load_checkpoint(tmp_path / "r")["step"] == 0
    train.main(["--resume", str(tmp_path / "r"), "--device", "cpu"])
    assert set(read_log(tmp_path / "r")[1]) == {0, 2, 4}


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_stop_signal_finishes_the_step_saves_and_says_how_to_resume(small_run, tmp_path, number, code):
    (process,) = start([*small_run, "--steps", "4000", "--eval-every", "4000", "--out", tmp_path / "r"], tmp_path)
    while not ((tmp_path / "r/log.jsonl").exists() and '"step": 3,' in (tmp_path / "r/log.jsonl").read_text()):
        time.sleep(0.001)
    os.kill(process.pid, number)
    exitcode, output = finish([process], tmp_path)
    step = load_checkpoint(tmp_path / "r")["step"]
    assert exitcode == code and f"stopped after step {step}" in output and "--resume" in output
    assert max(read_log(tmp_path / "r")[0]) == step >= 3


def test_a_non_finite_loss_stops_the_run_and_keeps_the_last_good_checkpoint(small_run, tmp_path, monkeypatch):
    real = train.Transformer.forward

    def explode(self, tokens, targets=None):
        out = real(self, tokens, targets)
        explode.calls += self.training
        return out * float("nan") if explode.calls == 8 and self.training else out

    explode.calls = 0
    monkeypatch.setattr(train.Transformer, "forward", explode)
    with pytest.raises(SystemExit, match="in step 8: stopped before.*the last good"):
        train.main([*small_run, "--steps", "20", "--save-every", "5", "--out", str(tmp_path / "r")])
    state = load_checkpoint(tmp_path / "r")
    assert state["step"] == 5 and all(t.isfinite().all() for t in tensors(state["model"]).values())


def test_the_log_has_the_promised_keys(small_run, tmp_path, capsys):
    train.main([*small_run, "--osp", "--steps", "4", "--eval-every", "2", "--json", "--out", str(tmp_path / "r")])
    steps, evaluations = read_log(tmp_path / "r")
    assert set(steps) == {1, 2, 3, 4} and set(evaluations) == {0, 2, 4}
    assert (
        steps[4].keys() == {"step", "tokens", "loss", "lr", "grad_norm", "tokens_per_s"}
        and steps[4]["tokens"] == 4 * 8 * 16
    )
    assert evaluations[4].keys() >= {
        "step",
        "tokens",
        "val_loss",
        "bits_per_byte",
        "kurtosis",
        "kurtosis_floor",
        "kurtosis_per_layer",
    }
    assert len(evaluations[4]["kurtosis_per_layer"]) == 2  # embedding output and one block
    summary = json.loads(capsys.readouterr().out)
    assert summary["val_loss"] == evaluations[4]["val_loss"] and summary["step"] == 4


def test_the_collector_leaves_out_what_compiling_left(small_run, tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function: function)  # not every machine can compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module: None)
    counts, original = [], train.backward

    def backward(*args):
        counts.append(gc.get_freeze_count())
        return original(*args)

    monkeypatch.setattr(train, "backward", backward)
    train.main([*small_run, "--compile", "--steps", "3", "--out", str(tmp_path / "r")])
    gc.unfreeze()
    assert counts[:2] == [0, 0] and counts[2] > 0  # from the second step's forward on


def test_the_schedule_is_a_trapezoid():
    shares = [train.trapezoid(s, 100, 10, 20) for s in range(1, 101)]
    assert shares[:10] == pytest.approx([s / 11 for s in range(1, 11)])
    assert set(shares[10:80]) == {1.0}
    assert shares[80:] == pytest.approx([s / 21 for s in range(20, 0, -1)])


def test_longer_training_by_resume_is_the_longer_run(small_run, tmp_path):
    """The flat part of the schedule does not know how long it will be."""
    flat = [*small_run, "--osp", "--warmup", "2", "--cooldown", "0", "--eval-every", "5"]
    train.main([*flat, "--steps", "15", "--out", str(tmp_path / "long")])
    train.main([*flat, "--steps", "10", "--out", str(tmp_path / "short")])
    train.main(["--device", "cpu", "--resume", str(tmp_path / "short"), "--steps", "15"])
    assert_same_run(tmp_path / "long", tmp_path / "short")


def test_two_runs_started_together_get_directories_of_their_own(small_run, tmp_path, monkeypatch):
    monkeypatch.setattr(run_directory, "ROOT", tmp_path)
    for _ in range(2):
        train.main([*small_run, "--osp", "--embed-lr", "1e-2", "--steps", "1"])
    name = "words-tiny-osp-lr0.01-embed-lr0.01-steps1"
    assert sorted(p.name for p in (tmp_path / "runs").iterdir()) == [name, f"{name}-2"]


@pytest.mark.parametrize("argv, name", [
    ("", "tiny-adam"),
    ("--osp", "tiny-osp"),
    ("--preset toy --optimizer muon --embproj", "toy-muon-embproj"),
    ("--lr 0.002", "tiny-adam-lr0.002"),
    ("--osp --seed 3 --lr 1e-2 --steps 40", "tiny-osp-lr0.01-steps40-seed3"),
    ("--weight-decay 0 --batch-size 8 --warmup 5 --no-compile", "tiny-adam-weight-decay0.0"),
])
def test_a_new_directory_says_what_was_given(argv, name, tmp_path, monkeypatch):
    monkeypatch.setattr(run_directory, "ROOT", tmp_path)
    opt = parse(train.Options, "", [*argv.split(), "--device", "cpu"])
    train.resolve(opt)
    assert run_directory.new_directory(opt) == tmp_path / f"runs/shakespeare-{name}"


def test_a_rate_that_is_not_given_is_the_presets_for_the_optimizer():
    for preset, values in train.PRESETS.items():
        only = "muon-only" if preset == "toy" else "muon"  # toy's own has been looked for
        for optimizer, name in (("adam", "adam"), ("muon", "muon"), ("muon-only", only)):
            argv = f"--preset {preset} --optimizer {optimizer} --data x --device cpu".split()
            opt = parse(train.Options, "", argv)
            train.resolve(opt)
            assert opt.lr == values["lr"][name]


def test_a_tied_model_survives_its_checkpoint():
    torch.manual_seed(0)
    model = train.Transformer(train.Config(tie_embeddings=True))
    state = dict(config=vars(model.config), model=model.state_dict())
    again = model_from_checkpoint(state)
    assert again.head.weight is again.embed.weight
    tokens = torch.randint(256, (1, 9))
    assert torch.equal(again(tokens), model(tokens))


def test_dry_run_counts_the_paper_model_without_memory(capsys):
    dry_run.main(["--preset", "1.4b", "--osp", "--dry-run", "--device", "cpu"])
    out = capsys.readouterr().out
    assert f"{1_415_577_600 + 8_388_608 + 49:,}" in out and "1,214,251,008" in out and "4,194,304 a step" in out


def test_kurtosis_of_gaussian_one_hot_and_constant_vectors():
    torch.manual_seed(0)
    for dim in (128, 2048):
        x = torch.randn(4000, dim)
        assert excess_kurtosis(x).mean().item() == pytest.approx(gaussian_floor(dim), abs=0.02)
        assert torch.allclose(excess_kurtosis(x * 7 + 3), excess_kurtosis(x), atol=1e-3)
        one_hot = torch.zeros(3, dim)
        one_hot[range(3), [0, 5, dim - 1]] = 9
        mean = 1 / dim  # closed form: p = 1/D, kurtosis of a Bernoulli variable
        assert torch.allclose(
            excess_kurtosis(one_hot), torch.tensor((1 - 6 * mean * (1 - mean)) / (mean * (1 - mean))), rtol=1e-3
        )
    assert excess_kurtosis(torch.full((2, 64), 3.0)).tolist() == [0, 0]


def test_ddp_leaves_a_compiled_block_whole(monkeypatch):
    for name, value in torchrun_environments(1)[0].items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch._dynamo.config, "optimize_ddp", True)  # torch's default; put back after the test
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    with Ranks.start("cpu"):
        model = Transformer(Config(n_layer=1))
        model.blocks[0].compile(backend=backend)
        buckets = DistributedDataParallel(model, bucket_cap_mb=0.01)  # less than one of its matrices
        buckets(torch.zeros(2, 8, dtype=torch.long)).sum().backward()
    assert len(graphs) == 1
