"""nanoosp/float8.py: its products beside those of fp32, and what stays as it is."""

import copy
import json

import pytest
import torch
from conftest import SMALL, randomized, read_log

import train
from nanoosp.fast import compute_in
from nanoosp.float8 import E4M3, E5M2, Float8Product, product, to_float8
from nanoosp.checkpoint import load_checkpoint


def randn(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def test_to_float8_is_within_half_a_step_and_keeps_the_largest():
    x = randn(64, 48) * 1e-3
    for dtype, half_step in ((E4M3, 1 / 16), (E5M2, 1 / 8)):
        x8, back = to_float8(x, dtype)
        assert (x8.float() * back).abs().max() == pytest.approx(x.abs().max().item(), rel=1e-6)
        big = x.abs() > 1e-2 * x.abs().max()
        assert ((x8.float() * back - x).abs() <= half_step * x.abs())[big].all()
    assert not to_float8(torch.zeros(2, 2), E4M3)[0].float().any()


def test_an_outlier_takes_the_small_values_away():
    x = randn(4096)
    with_outlier = torch.cat([x, torch.tensor([1e5])])
    lost = [(to_float8(values, E4M3)[0] == 0).float().mean() for values in (x, with_outlier)]
    assert lost[0] < 0.002 and lost[1] > 0.1


def test_a_product_is_that_of_the_rounded_numbers():
    a, b = to_float8(randn(32, 64), E4M3), to_float8(randn(48, 64), E4M3)
    expected = (a[0].float() * a[1]) @ (b[0].float() * b[1]).T
    torch.testing.assert_close(product(a, b).float(), expected, rtol=1e-2, atol=1e-2)


def test_output_and_both_gradients_are_those_of_fp32_but_for_rounding():
    X, W, G = randn(64, 96).requires_grad_(), randn(48, 96).requires_grad_(), randn(64, 48)
    y = Float8Product.apply(X, W)
    y.backward(G.bfloat16())
    for ours, exact, bound in ((y, X @ W.T, 0.06), (X.grad, G @ W, 0.09), (W.grad, G.T @ X, 0.09)):
        assert ours.shape == exact.shape
        assert (ours - exact).norm() < bound * exact.norm()
    assert y.dtype == torch.bfloat16 and X.grad.dtype == W.grad.dtype == torch.float32


def test_it_is_what_torchao_computes():
    float8 = pytest.importorskip("torchao.float8")
    W, X = randn(48, 96).bfloat16(), randn(64, 96).bfloat16()
    theirs = torch.nn.Sequential(torch.nn.Linear(96, 48, bias=False).bfloat16())
    theirs[0].weight.data.copy_(W)
    float8.convert_to_float8_training(theirs, config=float8.Float8LinearConfig(emulate=True))
    ours, xs = W.clone().requires_grad_(), [X.clone().requires_grad_() for _ in range(2)]
    outputs = theirs(xs[0]), Float8Product.apply(xs[1], ours)
    for y in outputs:
        y.backward(randn(64, 48).bfloat16())
    for a, b in (outputs, (xs[0].grad, xs[1].grad), (theirs[0].weight.grad, ours.grad)):
        torch.testing.assert_close(a, b, rtol=2**-7, atol=2**-10)  # a step of bfloat16
        assert (a != b).float().mean() < 0.002


def test_a_model_in_float8_learns_what_one_in_bfloat16_does_and_evaluates_as_it():
    exact, tokens = randomized(SMALL).requires_grad_(), torch.randint(96, (4, 33))
    eight = copy.deepcopy(exact)
    compute_in(exact, "bfloat16")
    compute_in(eight, "float8")
    assert list(exact.state_dict()) == list(eight.state_dict())
    losses = []
    for model in (exact, eight):
        loss = model(tokens[:, :-1], tokens[:, 1:])
        loss.backward()
        losses.append(loss.item())
        with torch.no_grad():
            losses.append(model(tokens[:, :-1], tokens[:, 1:]).item())
    assert losses[3] == losses[1] and losses[2] == pytest.approx(losses[0], rel=0.02)
    assert losses[2] != losses[0]
    for (name, p), (_, q) in zip(exact.named_parameters(), eight.named_parameters()):
        assert q.dtype == q.grad.dtype == torch.float32
        assert (p.grad - q.grad).norm() < 0.25 * p.grad.norm(), name


def test_a_run_in_float8_recomputes_accumulates_resumes_and_keeps_its_dtype(tmp_path, small_run):
    argv = [*small_run, "--osp", "--dtype", "float8", "--steps", "6", "--save-every", "3"]
    train.main([*argv, "--out", str(tmp_path / "whole")])
    train.main([*argv, "--out", str(tmp_path / "recomputed"), "--recompute"])
    whole, recomputed = (read_log(tmp_path / name)[0] for name in ("whole", "recomputed"))
    assert [r["loss"] for r in whole.values()] == [r["loss"] for r in recomputed.values()]
    state = load_checkpoint(tmp_path / "whole")
    assert state["options"]["dtype"] == "float8"
    assert all(tensor.dtype == torch.float32 for tensor in state["model"].values())
    with pytest.raises(SystemExit):
        train.main(["--resume", str(tmp_path / "whole"), "--steps", "8", "--dtype", "float32"])
    train.main(["--resume", str(tmp_path / "whole"), "--steps", "8", "--cooldown", "1",
                "--warmup", "0"])
    assert json.loads((tmp_path / "whole/summary.json").read_text())["step"] == 8


@pytest.mark.parametrize("options, said", [
    (["--n-embd", "40"], "multiples of 16, not of --n-embd 40"),
    (["--micro-batch-size", "2", "--seq-len", "12"], "a multiple of 16 tokens, not 2 x 12")])
def test_shapes_that_float8_cannot_multiply(options, said, small_run, tmp_path, capsys):
    with pytest.raises(SystemExit):
        train.main([*small_run, *options, "--dtype", "float8", "--out", str(tmp_path / "run")])
    assert said in capsys.readouterr().err
