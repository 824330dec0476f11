"""nanoosp/recorded.py: the same results, in fewer calls."""

import pytest
import torch
from conftest import read_log

import train
from nanoosp.recorded import Recorded
from quantize import Recipe, gptq, per_column, recipe_scale, round_columns


def test_elsewhere_than_on_cuda_it_is_the_function():
    assert Recorded(lambda x, y: x + y)(torch.ones(2), torch.ones(2)).tolist() == [2, 2]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_on_cuda_every_call_has_its_own_inputs_and_gptq_the_same_codes():
    recorded, plain = Recorded(torch.outer), torch.outer
    for i in range(3):
        a, b = torch.randn(8, device="cuda"), torch.randn(8, device="cuda") + i
        assert torch.equal(recorded(a, b), plain(a, b))
    X, W = (torch.randn(512, 384, device="cuda") for _ in range(2))
    recipe = Recipe("4-16-16")
    H, scale = X.T @ X, recipe_scale(W, recipe)
    codes = gptq(W, H, scale, recipe)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("quantize.Recorded", lambda function: function)
        assert torch.equal(codes, gptq(W, H, scale, recipe))


def test_columns_are_rounded_in_order_and_later_ones_make_up_for_earlier():
    W, recipe = torch.tensor([[0.4, 0.4]]), Recipe("4-16-16")
    U, scale = torch.tensor([[1.0, 0.5], [0.0, 1.0]]), torch.ones(1, 1)
    codes, errors = round_columns(W, U, per_column(scale, 2), recipe)
    assert codes.tolist() == [[0, 0]]  # 0.4 -> 0; then 0.4 - 0.5 * 0.4 = 0.2 -> 0
    torch.testing.assert_close(errors, torch.tensor([[0.4, 0.2]]))


def test_a_graph_is_refused_where_there_is_none(small_run, capsys):
    with pytest.raises(SystemExit):
        train.main([*small_run, "--cuda-graph"])
    assert "--cuda-graph is for one GPU" in capsys.readouterr().err


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("dtype", ["float32", "float8"])
def test_training_with_a_graph_is_training(dtype, small_run, tmp_path):
    argv = [*small_run, "--osp", "--steps", "6", "--save-every", "3", "--device", "cuda", "--dtype", dtype,
            "--no-compile"]
    for name, way in (("plain", "--no-cuda-graph"), ("graph", "--cuda-graph")):
        train.main([*argv, way, "--out", str(tmp_path / name)])
    train.main([*argv, "--cuda-graph", "--out", str(tmp_path / "parts"), "--steps", "5", "--warmup", "0", "--cooldown", "0"])
    train.main(["--resume", str(tmp_path / "parts"), "--steps", "6", "--cuda-graph"])
    plain, graph = (read_log(tmp_path / name)[0] for name in ("plain", "graph"))
    for step in plain:
        assert graph[step]["loss"] == pytest.approx(plain[step]["loss"], rel=1e-4)
        assert graph[step]["grad_norm"] == pytest.approx(plain[step]["grad_norm"], rel=1e-3)
    assert len(read_log(tmp_path / "parts")[0]) == 6
