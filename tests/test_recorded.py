"""nanoosp/recorded.py: the same results, in fewer calls."""

import pytest
import torch
from conftest import read_log

import train
from nanoosp.recorded import Recorded
from quantize import Int, gptq, per_column, round_columns


def test_elsewhere_than_on_cuda_it_is_the_function():
    assert Recorded(lambda x, y: x + y)(torch.ones(2), torch.ones(2)).tolist() == [2, 2]
    assert Recorded(lambda x, y, n: x + n * y)(torch.ones(2), torch.ones(2), 3).tolist() == [4, 4]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_on_cuda_every_call_has_its_own_inputs_and_gptq_the_same_codes():
    graph, plain = Recorded(torch.outer), torch.outer
    for i in range(3):
        a, b = torch.randn(8, device="cuda"), torch.randn(8, device="cuda") + i
        assert torch.equal(graph(a, b), plain(a, b))
    X, W = torch.randn(512, 400, device="cuda"), torch.randn(512, 400, device="cuda")  # the last block is narrower
    for bits in (4, 3):
        H, scale = X.T @ X, Int(bits).scale(W)
        codes = gptq(W, H, scale, Int(bits))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("quantize.round_columns", round_columns.__wrapped__)
            assert torch.equal(codes, gptq(W, H, scale, Int(bits)))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_on_cuda_each_set_of_shapes_and_other_arguments_is_recorded_once():
    calls = []

    @Recorded
    def scaled(x, y, format):
        calls.append((len(x), format))
        return format.bits * x + y

    sets = [(8, Int(4)), (5, Int(4)), (8, Int(3))]
    for i in range(3):
        for n, format in sets:
            x, y = torch.randn(n, device="cuda"), torch.randn(n, device="cuda")
            assert torch.equal(scaled(x, y, Int(format.bits)), format.bits * x + y)
    assert calls == [both for both in sets for _ in range(2)]  # once to warm up, once to record


def test_columns_are_rounded_in_order_and_later_ones_make_up_for_earlier():
    W = torch.tensor([[0.4, 0.4]])
    U, scale = torch.tensor([[1.0, 0.5], [0.0, 1.0]]), torch.ones(1, 1)
    codes, errors = round_columns(W, U, per_column(scale, 2), Int(4))
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
