"""results/rounding/measure.py: what it calls error and stable rank."""

import pytest
import torch
from conftest import SMALL, randomized

from quantize import linears
from results.rounding.measure import main, measure


def windows():
    return torch.randint(96, (4, 25), generator=torch.Generator().manual_seed(0))


def test_equally_strong_directions_have_a_stable_rank_of_one_and_one_direction_of_one_over_n():
    model = randomized(SMALL)
    for linear in linears(model).values():
        torch.nn.init.orthogonal_(linear.weight)
    assert measure(model, windows())["stable_rank"] == pytest.approx(1, abs=1e-5)
    for linear in linears(model).values():
        linear.weight.copy_(torch.outer(linear.weight[:, 0], linear.weight[0]))
    ranks = [min(linear.weight.shape) for linear in linears(model).values()]
    expected = sum(1 / rank for rank in ranks) / len(ranks)
    assert measure(model, windows())["stable_rank"] == pytest.approx(expected, rel=1e-4)


def test_weights_on_the_grid_have_no_error_and_gaussian_ones_a_tenth_in_weight_and_output():
    model = randomized(SMALL)
    for linear in linears(model).values():
        torch.nn.init.normal_(linear.weight)
    gaussian = measure(model, windows())
    assert 0.09 < gaussian["weight_error"] < 0.12
    for linear in linears(model).values():
        linear.weight.copy_(torch.randint(-7, 8, linear.weight.shape) / 8)
        linear.weight[:, 0] = 7 / 8  # the widest value is a code: no clipping helps
    exact = measure(model, windows())
    assert exact["weight_error"] < 1e-6 and exact["output_error"] < 1e-5


def test_it_needs_a_run(capsys):
    with pytest.raises(SystemExit) as error:
        main([])
    assert error.value.code == 2 and "RUN" in capsys.readouterr().err
