"""What quantization promises. Tolerances are measured; where one is 0, the numbers are equal bit for bit."""

import math
from dataclasses import replace

import pytest
import torch

import quantize as Q
from model import Config, Transformer
from quantize import (
    Bits,
    attach_rounding,
    gptq,
    hadamard,
    hadamard_factors,
    hadamard_transform,
    inverse_factor,
    linears,
    per_column,
    quantize,
    round_heads,
    round_tokens,
    weight_codes,
    weight_scale,
    williamson_172,
)

SMALL = Config(n_layer=2, n_head=4, n_embd=128, vocab_size=96)


def randomized(config=SMALL, seed=0):
    """A model whose gains are not all one and whose EmbProj is not orthogonal, as after training."""
    torch.manual_seed(seed)
    model = Transformer(config)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(3).add_(torch.randn_like(p) * 0.02) if p.ndim == 2 else p.uniform_(0.5, 2)
    return model.eval().requires_grad_(False)


def distance(a, b):
    """Relative, in the 2-norm."""
    return ((a - b).norm() / b.norm()).item()


@pytest.fixture
def tokens():
    return torch.randint(96, (2, 24), generator=torch.Generator().manual_seed(1))


# Hadamard matrices


@pytest.mark.parametrize("n", [1, 2, 12, 22, 43, 64, 86, 172, 384, 768, 896, 1024, 1408, 2432])
def test_a_hadamard_matrix_is_orthogonal_and_even(n):
    M = hadamard(n).float()
    assert (M @ M.T - torch.eye(n)).abs().max() < 1e-5
    assert M.abs().max() * math.sqrt(n) < (1.4143 if n in (22, 43, 86) else 1.00001)  # Hartley's entries differ


@pytest.mark.parametrize("n, even", [(2816, True), (5504, True), (13696, False)])
def test_large_hadamard_matrices_have_orthogonal_factors_and_keep_norms(n, even):
    H, S = hadamard_factors(n)  # H^T kron S is orthogonal if both are
    assert len(H) * len(S) == n
    for M in (H, S):
        assert (M @ M.T - torch.eye(len(M))).abs().max() < 1e-12
    assert H.abs().max() * S.abs().max() * math.sqrt(n) < (1.00001 if even else 1.4143)
    x = torch.randn(3, n)
    assert torch.allclose(hadamard_transform(x).norm(dim=-1), x.norm(dim=-1), rtol=1e-5)


def test_order_172_is_a_hadamard_matrix():
    H = williamson_172()
    assert H.abs().eq(1).all() and torch.equal(H @ H.T, 172 * torch.eye(172, dtype=torch.float64))


@pytest.mark.parametrize("n", [64, 384, 896, 344, 86])
def test_the_online_transform_multiplies_by_the_matrix(n):
    x = torch.randn(2, 5, n, dtype=torch.float64)
    assert torch.allclose(hadamard_transform(x), x @ hadamard(n), atol=1e-12)
    assert hadamard_transform(x.bfloat16()).dtype == torch.bfloat16


def test_the_transform_has_the_official_orientation():
    """matmul_hadU of SpinQuant: Walsh-Hadamard along the last axis of (K, n/K), then H_K from the left."""
    H, S = hadamard_factors(384)
    x = torch.randn(384, dtype=torch.float64)
    assert not torch.allclose(H, H.T)
    assert torch.allclose(hadamard_transform(x), (H @ (x.view(12, 32) @ S)).flatten())


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
    assert torch.equal(weight_codes(scale * codes, scale, bits), codes)  # the same scale finds the same codes


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
    W[0] = 7 * torch.tensor([1.0, -1.0]).repeat(128)  # nothing to gain here: the first candidate wins
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
    assert errors[2] == pytest.approx(0.108, abs=0.005) and errors[6] == pytest.approx(0.0073, abs=5e-4)


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
    assert (round_tokens(x, 2).unique() * 3 / 4).allclose(torch.tensor([2.0, 3.0]), atol=1.01)  # steps of 4/3 from 0
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


# Models


CONFIGS = [replace(SMALL, n_kv_head=kv, norm=norm, embproj=norm == "ss", tie_embeddings=kv == 1)
           for kv, norm in ((4, "rms"), (2, "ss"), (1, "rms"))] + [
    Config(n_layer=2, n_head=3, n_embd=96, vocab_size=96, n_ffn=172, n_kv_head=1),  # only head_dim is a power of two
    Config(n_layer=2, n_head=2, n_embd=44, vocab_size=96, n_ffn=100)]  # not even that: 22


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_sixteen_bits_change_no_bit(config, tokens):
    model = randomized(config)
    quantized, folded = quantize(model, "16-16-16"), model.fold()
    assert all(torch.equal(w, folded.state_dict()[name]) for name, w in quantized.state_dict().items())
    assert torch.equal(quantized(tokens), folded(tokens))
    assert not any(m._forward_hooks for m in quantized.modules())
    attach_rounding(quantized, Bits(16, 16, 16))
    assert not any(m._forward_hooks for m in quantized.modules())


def test_each_number_of_bits_acts_on_its_own_tensors():
    model, folded = randomized(), randomized().fold()
    activations, attention = {"at_input", "at_output", "at_hidden"}, {"at_q", "at_k", "at_v"}
    for bits, hooked in (("4-16-16", set()), ("16-4-16", activations), ("16-16-4", attention)):
        q = quantize(model, bits)
        assert {n.split(".")[-1] for n, m in q.named_modules() if m._forward_hooks} == hooked
        same = {n: torch.equal(w, folded.state_dict()[n]) for n, w in q.state_dict().items()}
        changed = {f"{n}.weight" for n in linears(q)} if bits.startswith("4") else set()
        assert {n for n, equal in same.items() if not equal} == changed
    assert len(linears(folded)) == 2 * 7


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_the_ffn_hadamard_leaves_the_logits_alone(config, tokens):
    model = randomized(config)
    assert distance(quantize(model, "16-16-16", "had")(tokens), model(tokens)) < 1e-4


def test_queries_and_keys_may_be_rotated_together_and_outliers_in_keys_round_better_then():
    torch.manual_seed(0)
    q, k = torch.randn(2, 2, 4, 10, 32)
    rotated = hadamard_transform(q) @ hadamard_transform(k).mT
    assert torch.allclose(rotated, q @ k.mT, atol=1e-5)
    k[..., 5] += 30
    assert distance(round_tokens(hadamard_transform(k), 4), hadamard_transform(k)) < distance(round_tokens(k, 4), k)


def test_spiky_hidden_states_lose_less_than_half_after_the_hadamard():
    torch.manual_seed(0)
    x = torch.randn(100, 384)
    x[torch.arange(100), torch.randint(384, (100,))] = 200
    y = hadamard_transform(x)
    assert distance(round_tokens(y, 4), y) < distance(round_tokens(x, 4), x) / 2


@pytest.mark.parametrize("method", ["rtn", "had"])
def test_a_later_token_never_changes_earlier_logits_in_four_bits(method, tokens):
    model, changed = quantize(randomized(), "4-4-4", method), tokens.clone()
    changed[0, 15] = (changed[0, 15] + 1) % 96
    a, b = model(tokens), model(changed)
    assert torch.equal(a[:, :15], b[:, :15]) and not torch.allclose(a[0, 15], b[0, 15])


def test_quantizing_leaves_the_original_as_it_was_and_happens_once(tokens):
    model = randomized()
    before = model(tokens)
    quantized = quantize(model, "4-4-4")
    assert torch.equal(model(tokens), before) and not torch.allclose(quantized(tokens), before)
    with pytest.raises(ValueError, match="already"):
        quantize(quantized, "4-4-4")


# GPTQ


def test_gptq_without_correlations_is_rounding():
    torch.manual_seed(0)
    W = torch.randn(32, 200)
    for group in (0, 50):
        scale = weight_scale(W, 4, group=group)
        assert torch.equal(gptq(W, torch.eye(200), scale, 4), weight_codes(W, scale, 4))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_gptq_beats_rounding_on_its_calibration_inputs_with_codes_of_so_many_bits(bits):
    for seed in range(10):
        torch.manual_seed(seed)
        X, W = torch.randn(300, 64) @ torch.randn(64, 64), torch.randn(32, 64)
        scale, m = weight_scale(W, bits), 2 ** (bits - 1) - 1
        codes = gptq(W, X.T @ X, scale, bits)
        assert torch.equal(codes, codes.round()) and codes.min() >= -m - 1 and codes.max() <= m
        error, rounding = (((scale * c - W) @ X.T).norm() for c in (codes, weight_codes(W, scale, bits)))
        assert error <= rounding


def test_the_block_size_of_gptq_is_only_a_matter_of_speed():
    torch.manual_seed(0)
    X, W = torch.randn(500, 300), torch.randn(32, 300)
    scale = weight_scale(W, 4)
    results = [gptq(W, X.T @ X, scale, 4, block) for block in (300, 128, 32)]
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def test_an_input_that_was_never_on_gets_no_weight():
    torch.manual_seed(0)
    X, W = torch.randn(300, 64), torch.randn(32, 64)
    X[:, [3, 50]] = 0
    codes = gptq(W, X.T @ X, weight_scale(W, 4), 4)
    assert codes.isfinite().all() and (codes[:, [3, 50]] == 0).all() and codes[:, 4].any()


def test_damping_grows_until_the_hessian_can_be_inverted():
    torch.manual_seed(0)
    X = torch.randn(300, 64)
    H = X.T @ X
    U = inverse_factor(H)
    assert torch.equal(U, U.triu())
    assert torch.allclose(U.T @ U, (H + 0.01 * H.diagonal().mean() * torch.eye(64)).inverse(), atol=1e-5)
    assert inverse_factor(X[:3].T @ X[:3]).isfinite().all()  # rank 3 of 64
    assert inverse_factor(torch.eye(64) - 1.05 / 64).isfinite().all()  # negative in one direction: 1 % is not enough
    for bad in (-torch.eye(4), torch.full((4, 4), math.nan)):
        with pytest.raises(ArithmeticError, match="Cholesky"):
            inverse_factor(bad)


@pytest.fixture
def calibration():
    return torch.randint(96, (20, 33), generator=torch.Generator().manual_seed(2))


def test_gptq_goes_through_the_groups_in_order_each_with_those_before_it_rounded(calibration, monkeypatch):
    model, calls = randomized(replace(SMALL, n_kv_head=2)), []

    def note(W, H, scale, bits):
        calls.append((W, H))
        return gptq(W, H, scale, bits)

    monkeypatch.setattr(Q, "gptq", note)
    q = quantize(model, "4-16-16", "gptq", calibration)
    order = [f"attn.{x}_proj" for x in "kvqo"] + [f"ffn.{x}_proj" for x in ("up", "gate", "down")]
    names = {m.weight.data_ptr(): n for n, m in linears(q).items()}
    assert [names[W.data_ptr()] for W, _ in calls] == [f"blocks.{i}.{name}" for i in (0, 1) for name in order]
    assert calls[0][1] is calls[1][1] is calls[2][1] and calls[4][1] is calls[5][1]

    for call, point in ((10, "attn.at_output"), (13, "ffn.at_hidden")):  # the last layer's, found again afterwards
        seen = []
        handle = q.blocks[1].get_submodule(point).register_forward_hook(lambda m, i, x, seen=seen: seen.append(x))
        q(calibration[:, :-1])
        handle.remove()
        X = seen[0].flatten(0, 1)  # at_hidden: after the online Hadamard
        assert distance(calls[call][1], X.T @ X) < 1e-4


def test_gptq_calibrates_with_exact_activations(calibration):
    a, b = (quantize(randomized(), bits, "gptq", calibration).state_dict() for bits in ("4-16-16", "4-2-2"))
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_gptq_is_closer_to_the_model_than_rounding_on_calibration(calibration):
    model = randomized()
    exact = model(calibration[:, :-1])
    had, optimal = (quantize(model, "4-16-16", m, calibration)(calibration[:, :-1]) for m in ("had", "gptq"))
    assert distance(optimal, exact) < distance(had, exact)


def test_gptq_names_the_linear_it_fails_at(calibration):
    model = randomized()
    model.blocks[1].attn_norm.gain[0] = math.nan
    with pytest.raises(ArithmeticError, match="blocks.1.attn.k_proj.*Cholesky"):
        quantize(model, "4-4-4", "gptq", calibration)
    with pytest.raises(ValueError, match="gptq needs calibration"):
        quantize(model, "4-4-4", "gptq")


# What is refused


@pytest.mark.parametrize("bits", ["4-4", "0-4-4", "1-4-4", "9-4-4", "4-4-4-4", "4-a-4", "", "-4-4-4", "4-4-32"])
def test_impossible_bits_are_refused_with_the_value(bits):
    with pytest.raises(ValueError, match=f"{bits!r}.*4-4-4"):
        quantize(randomized(), bits)
