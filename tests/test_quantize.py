"""What quantization promises. Tolerances are measured. Where one is 0, every bit is equal."""

import math
from dataclasses import replace

import pytest
import torch
from conftest import CONFIGS, SMALL, distance, randomized

import quantize as Q
from model import hooked
from nanoosp.hadamard import hadamard_transform
from nanoosp.recipe import METHODS
from quantize import (
    Int,
    Recipe,
    attach_rounding,
    gptq,
    inverse_factor,
    linears,
    per_column,
    quantize,
)


def weight_scale(W, bits, clip=True, group=0):
    return Int(bits, clip, group).scale(W)


def weight_codes(W, scale, bits):
    return Int(bits).code(W / per_column(scale, W.shape[1]))


def round_tokens(x, bits, symmetric=False):
    return Int(bits, symmetric=symmetric).round(x)


def round_heads(x, bits, head_dim, symmetric=False):
    return Int(bits, symmetric=symmetric).round(x, head_dim)


def gptq_codes(W, H, scale, bits, block=128):
    return gptq(W, H, scale, Int(bits), block)


# Weights


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_weight_codes_are_integers_of_so_many_bits_and_off_by_half_a_step(bits):
    torch.manual_seed(0)
    W = torch.randn(64, 96)
    scale, m = weight_scale(W, bits), 2 ** (bits - 1) - 1
    codes = weight_codes(W, scale, bits)
    assert torch.equal(codes, codes.round()) and codes.min() >= -m - 1 and codes.max() <= m
    inside = (W / scale).round().abs() <= m
    assert ((scale * codes - W).abs() <= scale / 2 * (1 + 1e-5))[inside].all()
    assert torch.equal(weight_codes(scale * codes, scale, bits), codes)  # found again


def test_rows_are_quantized_each_for_itself_and_scale_along():
    torch.manual_seed(0)
    W, order = torch.randn(64, 96), torch.randperm(64)
    assert torch.equal(weight_scale(W[order], 4), weight_scale(W, 4)[order])
    for factor in (0.125, 4):
        assert torch.equal(weight_scale(W * factor, 4), weight_scale(W, 4) * factor)


def test_the_clip_search_beats_the_plain_maximum_which_it_starts_from():
    torch.manual_seed(0)
    W = torch.randn(64, 256)
    plain, clipped = weight_scale(W, 4, clip=False), weight_scale(W, 4)
    assert torch.equal(plain[:, 0], W.abs().amax(1) / 7)
    share = clipped / plain
    assert share.min() > 0.6 and share.max() <= 1 and 0.7 < share.mean() < 0.9

    def error(s):
        return (s * weight_codes(W, s, 4) - W).abs().pow(2.4).sum(1)

    assert (error(clipped) <= error(plain)).all()
    W[0] = 7 * torch.tensor([1.0, -1.0]).repeat(128)  # nothing to gain: the first candidate wins
    assert weight_scale(W, 4)[0] == 1


def test_groups_have_scales_of_their_own_and_must_divide_a_row():
    torch.manual_seed(0)
    W = torch.randn(8, 96)
    W[:, 32:64] *= 100
    scale = weight_scale(W, 4, group=32)
    assert torch.equal(scale[:, 1:2], weight_scale(W[:, 32:64], 4))
    assert (per_column(scale, 96) * weight_codes(W, scale, 4) - W)[:, :32].abs().max() < 1
    with pytest.raises(ValueError, match="36.*96"):
        weight_scale(W, 4, group=36)


def test_every_bit_more_is_more_exact():
    torch.manual_seed(0)
    W = torch.randn(256, 256)
    errors = []
    for bits in range(2, 9):
        s = weight_scale(W, bits)
        errors.append(distance(s * weight_codes(W, s, bits), W))
    assert errors == sorted(errors, reverse=True)
    assert errors[2] == pytest.approx(0.108, abs=0.005)
    assert errors[6] == pytest.approx(0.0073, abs=5e-4)


# Activations


def both_rules(x, bits):
    return [round_tokens(x, bits), round_heads(x, bits, x.shape[-1])]


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_activations_are_off_by_half_a_step_at_most(bits):
    torch.manual_seed(0)
    x = torch.cat([torch.randn(500, 64), torch.randn(500, 64).abs() + 3])
    low, high = x.amin(1, keepdim=True), x.amax(1, keepdim=True)
    for y, a, b in zip(both_rules(x, bits), (low.clamp(max=0), low), (high.clamp(min=0), high)):
        assert ((y - x).abs() <= (b - a) / (2**bits - 1) / 2 * (1 + 1e-5) + 1e-6).all()


def test_rounding_activations_twice_changes_nothing_more():
    torch.manual_seed(0)
    x = torch.randn(1000, 64)
    for rule, once in enumerate(both_rules(x, 4)):
        assert torch.allclose(both_rules(once, 4)[rule], once, rtol=1e-4, atol=1e-4)


def test_zeros_stay_zero_and_constants_finite():
    x = torch.zeros(3, 8)
    x[1], x[2] = 5.3, -1e-4
    for y in both_rules(x, 4):
        assert torch.equal(y[0], x[0]) and torch.allclose(y, x, rtol=1e-5)


def test_zero_is_exact_in_the_range_of_a_token_but_not_of_a_head():
    x = torch.tensor([[3.0, 3.2, 3.9, 4.0]])
    steps = round_tokens(x, 2).unique() * 3 / 4  # steps of 4/3 from 0
    assert steps.allclose(torch.tensor([2.0, 3.0]), atol=1.01)
    assert round_heads(x, 2, 4).sub(x).abs().max() <= 1 / 6 + 1e-6  # steps of 1/3 from 3
    zeros = torch.randn(50, 8)
    zeros[:, 3] = 0
    assert (round_tokens(zeros, 3)[:, 3] == 0).all()


def test_tokens_and_heads_do_not_see_each_other():
    torch.manual_seed(0)
    x = torch.randn(4, 64)
    changed = x.clone()
    changed[2, :16] = 1000
    assert torch.equal(round_tokens(x, 4)[[0, 1, 3]], round_tokens(changed, 4)[[0, 1, 3]])
    assert torch.equal(round_heads(x, 4, 16)[:, 16:], round_heads(changed, 4, 16)[:, 16:])
    with pytest.raises(ValueError, match="64.*24"):
        round_heads(x, 4, 24)


def test_a_symmetric_grid_has_as_many_values_below_zero_as_above(trained):
    x = torch.linspace(-1, 3, 1000)[None]
    for rounded in (round_tokens(x, 3, True), round_heads(x, 3, 1000, True)):
        # steps of max / 3, with 0 among them
        assert rounded.unique().tolist() == pytest.approx([-1, 0, 1, 2, 3])
        assert (rounded - x).abs().max() <= 0.5 + 1e-6
    assert torch.equal(round_tokens(-x, 3, True), -round_tokens(x, 3, True))
    model, windows = trained
    symmetric, fitted = (quantize(model, Recipe("16-4-4", symmetric=s))(windows[:1])
                         for s in (True, False))
    assert not torch.equal(symmetric, fitted) and (symmetric - fitted).norm() < fitted.norm()


# Models



@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_sixteen_bits_change_no_bit(config, tokens):
    model = randomized(config)
    quantized, folded = quantize(model, Recipe("16-16-16")), model.fold()
    weights = folded.state_dict()
    assert all(torch.equal(w, weights[name]) for name, w in quantized.state_dict().items())
    assert torch.equal(quantized(tokens), folded(tokens))
    assert not any(m._forward_hooks for m in quantized.modules())
    attach_rounding(quantized, Recipe("16-16-16"))
    assert not any(m._forward_hooks for m in quantized.modules())


def test_each_number_of_bits_acts_on_its_own_tensors():
    model, folded = randomized(), randomized().fold()
    activations, attention = {"at_input", "at_output", "at_hidden"}, {"at_q", "at_k", "at_v"}
    for bits, hooked in (("4-16-16", set()), ("16-4-16", activations), ("16-16-4", attention)):
        q = quantize(model, Recipe(bits))
        assert {n.split(".")[-1] for n, m in q.named_modules() if m._forward_hooks} == hooked
        same = {n: torch.equal(w, folded.state_dict()[n]) for n, w in q.state_dict().items()}
        changed = {f"{n}.weight" for n in linears(q)} if bits.startswith("4") else set()
        assert {n for n, equal in same.items() if not equal} == changed
    assert len(linears(folded)) == 2 * 7


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_the_ffn_hadamard_leaves_the_logits_alone(config, tokens):
    model = randomized(config)
    assert distance(quantize(model, Recipe("16-16-16", "had"))(tokens), model(tokens)) < 1e-4


def test_queries_and_keys_may_be_rotated_together_and_outliers_in_keys_round_better_then():
    torch.manual_seed(0)
    q, k = torch.randn(2, 2, 4, 10, 32)
    rotated = hadamard_transform(q) @ hadamard_transform(k).mT
    assert torch.allclose(rotated, q @ k.mT, atol=1e-5)
    k[..., 5] += 30
    rotated = hadamard_transform(k)
    assert distance(round_tokens(rotated, 4), rotated) < distance(round_tokens(k, 4), k)


def test_spiky_hidden_states_lose_less_than_half_after_the_hadamard():
    torch.manual_seed(0)
    x = torch.randn(100, 384)
    x[torch.arange(100), torch.randint(384, (100,))] = 200
    y = hadamard_transform(x)
    assert distance(round_tokens(y, 4), y) < distance(round_tokens(x, 4), x) / 2


def test_quantizing_leaves_the_original_as_it_was_and_happens_once(tokens):
    model = randomized()
    before = model(tokens)
    quantized = quantize(model, Recipe("4-4-4"))
    assert torch.equal(model(tokens), before) and not torch.allclose(quantized(tokens), before)
    with pytest.raises(ValueError, match="already"):
        quantize(quantized, Recipe("4-4-4"))


# GPTQ


def test_gptq_without_correlations_is_rounding():
    torch.manual_seed(0)
    W = torch.randn(32, 200)
    for group in (0, 50):
        scale = weight_scale(W, 4, group=group)
        assert torch.equal(gptq_codes(W, torch.eye(200), scale, 4), weight_codes(W, scale, 4))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_gptq_beats_rounding_on_its_calibration_inputs_with_codes_of_so_many_bits(bits):
    for seed in range(10):
        torch.manual_seed(seed)
        X, W = torch.randn(300, 64) @ torch.randn(64, 64), torch.randn(32, 64)
        scale, m = weight_scale(W, bits), 2 ** (bits - 1) - 1
        codes = gptq_codes(W, X.T @ X, scale, bits)
        assert torch.equal(codes, codes.round()) and codes.min() >= -m - 1 and codes.max() <= m
        error, rounding = (((scale * c - W) @ X.T).norm()
                           for c in (codes, weight_codes(W, scale, bits)))
        assert error <= rounding


def test_the_block_size_of_gptq_is_only_a_matter_of_speed():
    torch.manual_seed(0)
    X, W = torch.randn(500, 300), torch.randn(32, 300)
    scale = weight_scale(W, 4)
    results = [gptq_codes(W, X.T @ X, scale, 4, block) for block in (300, 128, 32)]
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def test_an_input_that_was_never_on_gets_no_weight():
    torch.manual_seed(0)
    X, W = torch.randn(300, 64), torch.randn(32, 64)
    X[:, [3, 50]] = 0
    codes = gptq_codes(W, X.T @ X, weight_scale(W, 4), 4)
    assert codes.isfinite().all() and (codes[:, [3, 50]] == 0).all() and codes[:, 4].any()


def test_damping_grows_until_the_hessian_can_be_inverted():
    torch.manual_seed(0)
    X = torch.randn(300, 64)
    H = X.T @ X
    U = inverse_factor(H)
    assert torch.equal(U, U.triu())
    damped = H + 0.01 * H.diagonal().mean() * torch.eye(64)
    assert torch.allclose(U.T @ U, damped.inverse(), atol=1e-5)
    assert inverse_factor(X[:3].T @ X[:3]).isfinite().all()  # rank 3 of 64
    negative = torch.eye(64) - 1.05 / 64  # in one direction: 1 % is not enough
    assert inverse_factor(negative).isfinite().all()
    for bad in (-torch.eye(4), torch.full((4, 4), math.nan)):
        with pytest.raises(ArithmeticError, match="Cholesky"):
            inverse_factor(bad)


@pytest.fixture
def calibration():
    return torch.randint(96, (20, 33), generator=torch.Generator().manual_seed(2))


def test_gptq_goes_through_the_groups_in_order_each_with_those_before_it_rounded(
        calibration, monkeypatch):
    model, calls = randomized(replace(SMALL, n_kv_head=2)), []

    def note(W, H, scale, format):
        calls.append((W, H))
        return gptq(W, H, scale, format)

    monkeypatch.setattr(Q, "gptq", note)
    q = quantize(model, Recipe("4-16-16", "gptq"), calibration)
    order = (["attn.q_proj", "attn.k_proj", "attn.v_proj"], ["attn.o_proj"],
             ["ffn.gate_proj", "ffn.up_proj"], ["ffn.down_proj"])
    exact = quantize(model, Recipe("16-16-16", "had"))
    groups = [(block, names) for block in exact.blocks for names in order]
    for (W, _), (block, names) in zip(calls, groups, strict=True):
        assert torch.equal(W, torch.cat([block.get_submodule(name).weight for name in names]))

    for call, point in ((5, "attn.at_output"), (7, "ffn.at_hidden")):  # of the last layer
        seen = []
        with hooked([(q.blocks[1].get_submodule(point), lambda m, i, x: seen.append(x))]):
            q(calibration[:, :-1])
        X = seen[0].flatten(0, 1)  # at_hidden: after the online Hadamard
        assert distance(calls[call][1], X.T @ X) < 1e-4


def test_gptq_calibrates_with_exact_activations(calibration):
    a, b = (quantize(randomized(), Recipe(bits, "gptq"), calibration).state_dict()
            for bits in ("4-16-16", "4-2-2"))
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_gptq_is_closer_to_the_model_than_rounding_on_calibration(calibration):
    model = randomized()
    exact = model(calibration[:, :-1])
    had, optimal = (quantize(model, Recipe("4-16-16", method), calibration)(calibration[:, :-1])
                    for method in ("had", "gptq"))
    assert distance(optimal, exact) < distance(had, exact)


def test_gptq_names_the_linear_it_fails_at(calibration):
    model = randomized()
    model.blocks[1].attn_norm.gain[0] = 3e38  # finite, but what it multiplies is not
    with pytest.raises(ArithmeticError, match="blocks.1.attn.q_proj.*Cholesky"):
        quantize(model, Recipe("4-4-4", "gptq"), calibration)
    for method in METHODS:
        model.blocks[1].attn_norm.gain[0] = math.nan
        with pytest.raises(ArithmeticError, match="blocks.1.attn_norm.gain.*not finite"):
            quantize(model, Recipe("4-4-4", method), calibration)
    with pytest.raises(ValueError, match="gptq needs calibration"):
        quantize(randomized(), Recipe("4-4-4", "gptq"))


@pytest.mark.parametrize("method", METHODS)
def test_one_seed_gives_one_result_and_causality_holds(method, trained, dataset_dir):
    model, windows = trained
    recipe = Recipe("4-4-4", method, seed=1, steps=10)
    a, b = (quantize(model, recipe, windows) for _ in range(2))
    assert all(torch.equal(W, b.state_dict()[name]) for name, W in a.state_dict().items())
    changed = windows[:1].clone()
    changed[0, 20] = (changed[0, 20] + 1) % 96
    x, y = a(windows[:1]), a(changed)
    assert torch.equal(x[:, :20], y[:, :20]) and not torch.allclose(x[0, 20], y[0, 20])


# Recipes


@pytest.mark.parametrize("bits", ["4-4", "0-4-4", "1-4-4", "9-4-4", "4-4-4-4", "4-a-4", "",
                                  "-4-4-4", "4-4-32"])
def test_impossible_bits_are_refused_with_the_value(bits):
    with pytest.raises(ValueError, match=f"{bits!r}.*4-4-4"):
        Recipe(bits)


@pytest.mark.parametrize("name, value", [("group", -1), ("steps", -1), ("seed", -1),
                                         ("seed", 2**63), ("lr", math.nan)])
def test_impossible_numbers_are_refused_with_the_value(name, value):
    with pytest.raises(ValueError, match=f"{name}.*{value}"):
        Recipe(**{name: value})


def test_unknown_methods_and_centring_without_rotations_are_refused():
    with pytest.raises(ValueError, match="'awq'.*rtn.*spinquant"):
        Recipe(method="awq")
    with pytest.raises(ValueError, match="quarot.*gptq"):
        Recipe(method="gptq", center_embed=True)
