"""What quantization promises. Tolerances are measured; where one is 0, the numbers are equal bit for bit."""

import copy
import json
import math
from dataclasses import replace

import pytest
import torch
from conftest import train_osp

import eval as evaluation
import quantize as Q
from data.dataset import Dataset, tokenizer
from model import Config, Transformer, load_checkpoint, model_from_checkpoint
from quantize import (
    Bits,
    attach_ffn_hadamard,
    attach_rounding,
    cayley_step,
    gptq,
    hadamard,
    hadamard_factors,
    hadamard_transform,
    inverse_factor,
    learn_rotations,
    linears,
    per_column,
    quantize,
    random_rotations,
    rotated_weights,
    rotation_gradients,
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
    order = (["attn.k_proj", "attn.v_proj", "attn.q_proj"], ["attn.o_proj"], ["ffn.up_proj", "ffn.gate_proj"],
             ["ffn.down_proj"])
    exact = quantize(model, "16-16-16", "had")
    for (W, _), (i, names) in zip(calls, [(i, names) for i in (0, 1) for names in order], strict=True):
        assert torch.equal(W, torch.cat([exact.blocks[i].get_submodule(name).weight for name in names]))

    for call, point in ((5, "attn.at_output"), (7, "ffn.at_hidden")):  # the last layer's, found again afterwards
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
    model.blocks[1].attn_norm.gain[0] = 3e38  # finite, but what it multiplies is not
    with pytest.raises(ArithmeticError, match="blocks.1.attn.k_proj.*Cholesky"):
        quantize(model, "4-4-4", "gptq", calibration)
    for method in Q.METHODS:
        model.blocks[1].attn_norm.gain[0] = math.nan
        with pytest.raises(ArithmeticError, match="blocks.1.attn_norm.gain.*not finite"):
            quantize(model, "4-4-4", method, calibration)
    with pytest.raises(ValueError, match="gptq needs calibration"):
        quantize(randomized(), "4-4-4", "gptq")


# Rotations


@pytest.mark.parametrize("config", CONFIGS, ids=str)
@pytest.mark.parametrize("which", ["R1", "R2", "R3", "R4", "R1 R2 R3 R4"])
def test_rotations_leave_the_logits_alone(config, which, tokens, monkeypatch):
    """To 1e-4 in fp32. In fp64, which needs model.py's float() to mean double(), to 1e-10: no coincidence."""
    R1, R2 = random_rotations(config)
    for tolerance in (1e-4, 1e-10):
        model = randomized(config).fold()
        if tolerance == 1e-10:
            monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
            model = model.double()
        expected = model(tokens)
        rotations = dict(R1=R1 if "R1" in which else None, R2=R2 if "R2" in which else None, ffn_hadamard="R4" in which)
        model.load_state_dict(rotated_weights(model.state_dict(), **rotations), assign=True)
        if "R3" in which:
            for block in model.blocks:
                for point in (block.attn.at_q, block.attn.at_k):
                    point.register_forward_hook(lambda m, i, x: hadamard_transform(x))
        if "R4" in which:
            attach_ffn_hadamard(model)
        assert distance(model(tokens), expected) < tolerance
        monkeypatch.undo()


@pytest.mark.parametrize("method", ["quarot", "spinquant"])
def test_centred_embeddings_change_the_model_unless_they_were_centred(method, tokens):
    model = randomized()
    expected = model(tokens)
    assert distance(quantize(model, "16-16-16", method)(tokens), expected) < 1e-4
    assert distance(quantize(model, "16-16-16", method, center_embed=True)(tokens), expected) > 1e-3
    model.embed.weight -= model.embed.weight.mean(dim=1, keepdim=True)
    assert distance(quantize(model, "16-16-16", method, center_embed=True)(tokens), model(tokens)) < 1e-4


def test_random_rotations_are_orthogonal_and_drawn_in_the_official_order():
    R1, R2 = random_rotations(Config(n_layer=3, n_head=2, n_embd=64, vocab_size=96), seed=0)
    torch.manual_seed(0)
    for R in (R1, *R2):
        signs = 2 * torch.randint(0, 2, (len(R),)) - 1
        assert torch.equal(R, torch.diag(signs.double()) @ hadamard(len(R)))
        assert (R @ R.T - torch.eye(len(R))).abs().max() < 1e-12


# SpinQuant


@pytest.fixture(scope="module")
def trained(dataset_dir):
    """(a small model after 80 steps of Adam, windows of its training data)"""
    torch.manual_seed(0)
    data = Dataset(dataset_dir, "train", 32)
    model = Transformer(Config(n_layer=2, n_head=2, n_embd=64, vocab_size=256))
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    for step in range(80):
        window = torch.from_numpy(data.batch(step, 16))
        model(window[:, :-1], window[:, 1:]).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval().requires_grad_(False), torch.from_numpy(data.batch(80, 40))


def test_a_cayley_step_is_its_formula_turns_downhill_and_stays_a_rotation():
    torch.manual_seed(0)
    (R, _), target = random_rotations(Config(n_embd=64)), torch.randn(64, 64).double()
    G = 2 * (R - target)  # the gradient of |R - target|^2
    W = (R.T @ G - G.T @ R) / 2
    a = min(0.3, 1 / W.abs().sum(0).max())
    identity = torch.eye(64).double()
    expected = ((identity - a / 2 * W).inverse() @ (identity + a / 2 * W) @ R.T).T
    assert torch.allclose(cayley_step(R, G, 0.3), expected, atol=1e-12)
    assert torch.equal(cayley_step(R, G, 0.0), R)
    assert (cayley_step(R, G, 0.01) - target).norm() < (R - target).norm()
    for _ in range(100):
        R = cayley_step(R, 2 * (R - target), 0.3)
    assert (R @ R.T - identity).abs().max() < 1e-5
    both = cayley_step(torch.stack([R, R.T]), torch.stack([G, G.T]), 0.3)
    assert torch.allclose(both[1], cayley_step(R.T, G.T, 0.3))


def learner(trained):
    """What quantize() gives to learn_rotations."""
    model, windows = trained
    model = model.fold().requires_grad_(False)
    attach_ffn_hadamard(model)
    return model, model.state_dict(), *random_rotations(model.config), windows


def test_only_rotations_get_gradients_and_parts_of_a_batch_add_up(trained):
    model, weights, R1, R2, windows = learner(trained)
    handles = attach_rounding(model, Bits(16, 4, 4), straight_through=True)
    loss, G1, G2 = rotation_gradients(model, weights, R1, R2, windows[:8])
    assert G1.shape == R1.shape and G2.shape == R2.shape and G1.abs().max() > 0 and G2.abs().max() > 0
    assert all(p.grad is None for p in model.parameters()) and not R1.requires_grad
    parts = [rotation_gradients(model, weights, R1, R2, w) for w in windows[:8].split(2)]
    for i, whole in enumerate((loss, G1, G2)):
        assert torch.allclose(torch.as_tensor(whole), torch.as_tensor(sum(p[i] for p in parts) / 4), atol=1e-5)
    for handle in handles:
        handle.remove()
    W = R1.T @ rotation_gradients(model, weights, R1, R2, windows[:8])[1]  # nothing is rounded: nothing to turn
    assert (W - W.T).norm() < 1e-3 * G1.norm()


def test_learned_rotations_stay_rotations_and_lower_the_loss_they_were_learned_on(trained):
    model, weights, R1, R2, windows = learner(trained)
    windows = torch.cat([windows[:8], windows[:8]])  # judged by what they are learned on
    bits = Bits(16, 3, 3)
    best = learn_rotations(model, weights, R1, R2, bits, windows)
    assert not any(m._forward_hooks for m in model.blocks[0].attn.modules()) and not torch.equal(best[0], R1)
    for R in (best[0], *best[1]):
        assert (R @ R.T - torch.eye(len(R))).abs().max() < 1e-5
    attach_rounding(model, bits, straight_through=True)
    start, end = (rotation_gradients(model, weights, *R, windows[:8])[0] for R in ((R1, R2), best))
    assert end < start


def test_spinquant_without_steps_or_rate_is_quarot_and_its_exact_logits_never_change(trained):
    model, windows = trained
    reference = quantize(model, "4-4-4", "quarot", windows).state_dict()
    for options in (dict(lr=0.0, steps=10), dict(steps=0)):
        other = quantize(model, "4-4-4", "spinquant", windows, **options).state_dict()
        assert all(torch.equal(W, other[name]) for name, W in reference.items())
    learned = quantize(model, "16-4-4", "spinquant", windows, steps=10)
    for block in learned.blocks:
        for point in block.modules():
            point._forward_hooks.clear()
    attach_ffn_hadamard(learned)
    assert distance(learned(windows[:4]), model(windows[:4])) < 1e-4


@pytest.mark.parametrize("method", Q.METHODS)
def test_one_seed_gives_one_result_and_causality_holds(method, trained, dataset_dir):
    model, windows = trained
    a, b = (quantize(model, "4-4-4", method, windows, seed=1, steps=10) for _ in range(2))
    assert all(torch.equal(W, b.state_dict()[name]) for name, W in a.state_dict().items())
    changed = windows[:1].clone()
    changed[0, 20] = (changed[0, 20] + 1) % 96
    x, y = a(windows[:1]), a(changed)
    assert torch.equal(x[:, :20], y[:, :20]) and not torch.allclose(x[0, 20], y[0, 20])


def test_spinquant_wants_sequences_to_learn_from_besides_those_that_judge(trained):
    with pytest.raises(ValueError, match="more than 8"):
        quantize(trained[0], "4-4-4", "spinquant", trained[1][:8])


# What is refused


@pytest.mark.parametrize("bits", ["4-4", "0-4-4", "1-4-4", "9-4-4", "4-4-4-4", "4-a-4", "", "-4-4-4", "4-4-32"])
def test_impossible_bits_are_refused_with_the_value(bits):
    with pytest.raises(ValueError, match=f"{bits!r}.*4-4-4"):
        quantize(randomized(), bits)


# Files


@pytest.fixture(scope="module")
def run_dir(dataset_dir, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "osp"
    return train_osp(out, dataset_dir, n_layer=1, n_embd=32, seq_len=16, steps=4)


@pytest.fixture
def four_bit_file(run_dir, tmp_path):
    Q.main([str(run_dir), "--method", "had", "--out", str(tmp_path / "four.pt")])
    return tmp_path / "four.pt"


def test_packing_loses_nothing_and_puts_even_columns_low():
    codes = torch.randint(-8, 8, (6, 10)).float()
    assert torch.equal(Q.unpack(Q.pack(codes)), codes)
    assert Q.pack(torch.tensor([[-8.0, 7.0]])).tolist() == [[0xF0]]
    with pytest.raises(ValueError, match="5"):
        Q.pack(codes[:, :5])


@pytest.mark.parametrize("method, group", [("rtn", 0), ("had", 32), ("gptq", 0), ("spinquant", 0)])
def test_a_loaded_file_has_the_same_logits_bit_for_bit(method, group, trained, tmp_path):
    model, windows = trained
    for bits, dtype in (("4-4-4", torch.float32), ("4-8-16", torch.bfloat16)):
        q = quantize(copy.deepcopy(model).to(dtype), bits, method, windows, w_group=group, steps=3)
        Q.save_quantized(q, tmp_path / "q.pt", {}, {})
        loaded = Q.load_quantized(tmp_path / "q.pt")
        assert torch.equal(loaded(windows), q(windows)) and loaded.quantization["bits"] == bits
        assert all(torch.equal(W, loaded.state_dict()[name]) for name, W in q.state_dict().items())


def test_a_file_has_the_size_of_its_formula(tmp_path):
    model = randomized(Config(n_layer=2, n_head=4, n_embd=256, vocab_size=96))
    Q.save_quantized(quantize(model, "4-4-4"), tmp_path / "q.pt", {}, {})
    D, F, V, L = 256, model.config.n_ffn, 96, 2
    weights, rows = L * (4 * D * D + 3 * D * F), L * (5 * D + 2 * F)
    formula = weights / 2 + 4 * rows + 4 * (2 * V * D + (2 * L + 1) * D)
    assert (tmp_path / "q.pt").stat().st_size == pytest.approx(formula, rel=0.01)


def test_the_command_line_writes_what_quantize_gives(run_dir, dataset_dir, tmp_path, capsys):
    for method in Q.METHODS:
        (tmp_path / "q.pt").unlink(missing_ok=True)
        steps = ["--steps", "3"] if method == "spinquant" else []
        Q.main([str(run_dir), "--method", method, *steps, "--out", str(tmp_path / "q.pt")])
        assert f"{method} 4-4-4" in capsys.readouterr().out
    (tmp_path / "text.txt").write_text((dataset_dir.parent / "words.txt").read_text()[:2000])
    fp32 = (tmp_path / "q.pt").stat().st_size
    Q.main([str(run_dir), "--calib", str(tmp_path / "text.txt"), "--no-clip", "--w-group", "16", "--dtype", "bfloat16",
            "--out", str(tmp_path / "small.pt")])
    assert Q.load_quantized(tmp_path / "small.pt").embed.weight.dtype == torch.bfloat16
    assert (tmp_path / "small.pt").stat().st_size < fp32
    assert Q.load_quantized(tmp_path / "small.pt").quantization["method"] == "gptq"
    assert list(tmp_path.glob("*.tmp")) == []


def test_calibration_comes_from_the_training_split(run_dir, dataset_dir):
    options = load_checkpoint(run_dir)["options"]
    windows = Q.calibration_windows(options, tokenizer("bytes"), "gptq")
    data = Dataset(dataset_dir, "train", 16, 0)
    assert torch.equal(windows, torch.from_numpy(data.batch(0, len(windows)))) and len(windows) == 128
    assert Q.calibration_windows(options, tokenizer("bytes"), "rtn") is None


@pytest.fixture
def fails(run_dir, tmp_path, capsys):
    """fails(code, words, *argv): quantize.py ends with that exit code and one line that has the words, and no file."""

    def check(code, words, *argv, target=run_dir):
        with pytest.raises(SystemExit) as error:
            Q.main([str(a) for a in (target, "--out", tmp_path / "never.pt", *argv)])
        text = error.value.code if isinstance(error.value.code, str) else capsys.readouterr().err
        assert (1 if isinstance(error.value.code, str) else error.value.code) == code
        assert all(word in text.strip().splitlines()[-1] for word in (*words.split(), "error:")), text
        assert list(tmp_path.glob("never*")) == []

    return check


@pytest.mark.parametrize("bits", ["4-4", "0-4-4", "4-1-4", "4-9-4", "8-8-8", "x"])
def test_bits_that_no_file_can_have_are_exit_code_2(bits, fails):
    fails(2, f"--bits {bits}" if bits == "8-8-8" else bits, "--bits", bits)


def test_bad_options_are_exit_code_2(fails, run_dir, tmp_path):
    fails(2, "--method awq rtn spinquant", "--method", "awq")
    fails(2, "--center-embed quarot", "--center-embed")
    fails(2, "--w-group", "--w-group", "-1")
    fails(2, "--lr", "--lr", "nan")
    fails(2, "--out directory", "--out", tmp_path / "nowhere" / "q.pt")
    fails(2, f"{run_dir} exists", "--out", run_dir / "ckpt.pt")  # never over a trained model
    fails(2, "--calib rtn", "--method", "rtn", "--calib", tmp_path / "text.txt")
    fails(2, "--steps quarot", "--method", "quarot", "--steps", "5")


def test_bad_files_are_exit_code_1(fails, four_bit_file, tmp_path):
    (tmp_path / "short.txt").write_text("too short")
    fails(1, "short.txt 9 17", "--calib", tmp_path / "short.txt")
    fails(1, "no checkpoint", target=tmp_path / "nothing")
    fails(1, "quantized", target=four_bit_file)
    fails(1, "groups of 7", "--w-group", "7")
    (tmp_path / "cut.pt").write_bytes(four_bit_file.read_bytes()[:3000])
    fails(1, "cut.pt usable", target=tmp_path / "cut.pt")


def test_a_quantized_file_from_elsewhere_is_refused(four_bit_file, run_dir, tmp_path):
    state, bad = torch.load(four_bit_file, weights_only=True), tmp_path / "bad.pt"
    scales = state["quantization"]["scales"]
    wider = dict(state["config"], n_embd=64)
    wrong = [(dict(version=3), "version 3.*reads 2"), (dict(config=wider), "does not fit"), (dict(weights={}), "fit"),
             (dict(config=dict(n_moons=3)), "n_moons"), (dict(codes=[]), "not a quantized"),
             (dict(quantization=dict(state["quantization"], ffn_hadamard=None)), "contradicts"),
             (dict(quantization=dict(state["quantization"], bits="16-4-4")), "contradicts"),
             (dict(quantization=dict(state["quantization"], scales={n: -s for n, s in scales.items()})), "positive"),
             (dict(config=dict(state["config"], norm_eps=-1.0)), "norm_eps"),
             (dict(quantization={}), "does not fit"), (dict(codes={}), "does not fit")]
    for change, words in wrong:
        torch.save(state | change, bad)
        with pytest.raises(ValueError, match=f"bad.pt.*{words}"):
            Q.load_quantized(bad)
    torch.save(state | dict(options={}), bad)
    with pytest.raises(ValueError, match="bad.pt does not say data, embproj"):
        evaluation.load_target(bad, "cpu")
    bad.write_bytes(four_bit_file.read_bytes()[:-500])
    with pytest.raises(ValueError, match="usable"):
        Q.load_quantized(bad)
    with pytest.raises(ValueError, match="not a quantized"):
        Q.load_quantized(run_dir / "ckpt.pt")
    with pytest.raises(ValueError, match="4 bits, not 8"):
        Q.save_quantized(quantize(randomized(), "8-8-8"), tmp_path / "eight.pt", {}, {})
    assert not (tmp_path / "eight.pt").exists()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch's int4 kernel is for CUDA")
def test_the_int4_kernel_gives_what_the_dequantized_product_gives():
    codes, scale = torch.randint(-8, 8, (256, 5504), device="cuda").float(), torch.rand(256, 1, device="cuda") + 0.5
    x = torch.randn(3, 5, 5504, device="cuda")
    for scales in (scale, scale.expand(-1, 43) * torch.rand(43, device="cuda")):  # a scale a row or 128
        expected = x @ (Q.per_column(scales, 5504) * codes).mT
        assert (Q.Int4Linear(codes, scales)(x) - expected).norm() < 2e-2 * expected.norm()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch's int4 kernel is for CUDA")
def test_packed_weights_write_what_the_simulated_model_writes(tmp_path):
    model = randomized(Config(n_layer=2, n_head=2, n_embd=128, vocab_size=96)).cuda()
    Q.save_quantized(quantize(model, "4-16-16", "had"), tmp_path / "q.pt", {}, {})  # fewer bits would amplify bf16
    simulated, packed = (Q.quantized_model(torch.load(tmp_path / "q.pt"), "", "cuda", int4) for int4 in (False, True))
    tokens = torch.randint(96, (2, 32), device="cuda")
    assert (packed(tokens) - simulated(tokens)).norm() < 0.05 * simulated(tokens).norm()
    assert sum(isinstance(m, Q.Int4Linear) for m in packed.modules()) == 14


def test_the_int4_kernel_is_refused_where_it_cannot_run(four_bit_file, run_dir, capsys):
    with pytest.raises(SystemExit, match="needs a CUDA device"):
        evaluated(capsys, four_bit_file, "--prompt", "a", "--int4")
    with pytest.raises(SystemExit, match="not quantized"):
        evaluated(capsys, run_dir, "--prompt", "a", "--int4")
    with pytest.raises(ValueError, match="no 8 x 48"):
        Q.Int4Linear(torch.zeros(8, 48), torch.ones(8, 1))


# eval.py


def evaluated(capsys, *argv):
    evaluation.main([str(a) for a in (*argv, "--device", "cpu")])
    return capsys.readouterr().out


def test_eval_measures_bits_by_method_and_a_file_has_the_loss_of_its_simulation(run_dir, tmp_path, capsys):
    argv = run_dir, "--bits", "16-16-16,4-4-4", "--methods", "rtn,gptq"
    row, = json.loads(evaluated(capsys, *argv, "--json"))
    assert list(row["quantized"]) == ["16-16-16", "4-4-4"] and list(row["quantized"]["4-4-4"]) == ["rtn", "gptq"]
    rtn16, gptq4 = row["quantized"]["16-16-16"]["rtn"], row["quantized"]["4-4-4"]["gptq"]
    assert abs(rtn16["added"]) < 1e-5 < abs(gptq4["added"])
    assert gptq4["added"] == pytest.approx(gptq4["val_loss"] - row["val_loss"])
    Q.main([str(run_dir), "--method", "gptq", "--out", str(tmp_path / "four.pt"), "--device", "cpu"])
    table = evaluated(capsys, *argv).splitlines()[-3:]
    assert table[0].split()[-3:] == ["exact", "16-16-16", "4-4-4"] and table[2].split()[1] == "gptq"
    assert float(table[2].split()[-1]) == pytest.approx(gptq4["added"], abs=6e-5)
    file, = json.loads(evaluated(capsys, tmp_path / "four.pt", "--json"))
    assert file["val_loss"] == gptq4["val_loss"] and file["label"] == "OSP, gptq 4-4-4" and file["target"] == "four"
    assert "quantized" not in file and evaluated(capsys, tmp_path / "four.pt", "--prompt", "a", "--tokens", 5)
    with pytest.raises(SystemExit, match="already"):
        evaluated(capsys, tmp_path / "four.pt", "--bits", "4-4-4")


def test_one_setting_is_a_table_of_methods_by_targets_and_a_sweep_is_drawn(run_dir, tmp_path, capsys):
    lines = evaluated(capsys, run_dir, run_dir, "--bits", "4-4-4", "--methods", "rtn,had").splitlines()[-4:]
    assert lines[0].split() == ["loss", "at", "4-4-4", run_dir.name, run_dir.name]
    assert lines[1].startswith("not quantized") and lines[3].startswith("+ had") and len(lines[3].split()) == 6
    out = evaluated(capsys, run_dir, "--sweep", "--methods", "rtn", "--plot", tmp_path)
    assert "3-16-16" in out and "16-4-16" in out and (tmp_path / "bits.png").stat().st_size > 1000
    with pytest.raises(SystemExit):
        evaluated(capsys, run_dir, "--sweep", "--bits", "4-4-4")


def test_a_symmetric_grid_has_as_many_values_below_zero_as_above(run_dir):
    x = torch.linspace(-1, 3, 1000)[None]
    for rounded in (round_tokens(x, 3, True), Q.round_heads(x, 3, 1000, True)):
        assert rounded.unique().tolist() == pytest.approx([-1, 0, 1, 2, 3])  # steps of max / 3, 0 among them
        assert (rounded - x).abs().max() <= 0.5 + 1e-6
    assert torch.equal(round_tokens(-x, 3, True), -round_tokens(x, 3, True))
    model = model_from_checkpoint(load_checkpoint(run_dir))
    tokens = torch.arange(16)[None]
    symmetric, fitted = (quantize(model, "16-4-4", symmetric=s)(tokens) for s in (True, False))
    assert not torch.equal(symmetric, fitted) and (symmetric - fitted).norm() < fitted.norm()


def test_eval_finds_what_is_wrong_before_it_measures(run_dir, four_bit_file, tmp_path, capsys):
    (tmp_path / "short.txt").write_text("too short")
    (tmp_path / "mark.txt").write_bytes(b"\xef\xbb\xbfabc")
    assert Q.read_text(tmp_path / "mark.txt") == "abc"
    for argv, words in [((run_dir, tmp_path / "none", "--json"), "nothing at"),
                        ((run_dir, "--bits", "4-4-4", "--methods", "gptq", "--calib", tmp_path / "short.txt"), "short.txt"),
                        ((four_bit_file, "--bits", "4-4-4"), "quantized already")]:
        with pytest.raises(SystemExit, match=words):
            evaluated(capsys, *argv)
        assert capsys.readouterr().out == ""
    for argv in (["--calib", "x"], ["--methods", "gptq"], ["--symmetric"], ["--prompt", "a", "--bits", "4-4-4"],
                 ["--bits", "4-4-4", "--center-embed"], ["--text", "x", "--seq-len", "2"]):
        with pytest.raises(SystemExit) as error:
            evaluated(capsys, run_dir, *argv)
        assert error.value.code == 2


def test_a_model_of_nan_is_reported_and_json_stays_json(run_dir, tmp_path, capsys):
    state = torch.load(run_dir / "ckpt.pt", weights_only=True)
    state["model"]["norm.gain"] = torch.full_like(state["model"]["norm.gain"], math.nan)
    torch.save(state, tmp_path / "nan.pt")
    row, = json.loads(evaluated(capsys, tmp_path / "nan.pt", "--json"), parse_constant=pytest.fail)
    assert row["val_loss"] is None
    with pytest.raises(SystemExit, match="not finite"):
        evaluated(capsys, tmp_path / "nan.pt", "--prompt", "a")


def test_eval_refuses_impossible_bits_and_methods(run_dir, capsys):
    for argv in (["--bits", "4-4-4,4-4"], ["--bits", "1-4-4"], ["--bits", "4-4-4", "--methods", "rtn,awq"]):
        with pytest.raises(SystemExit) as error:
            evaluated(capsys, run_dir, *argv)
        assert error.value.code == 2 and argv[-1].split(",")[-1] in capsys.readouterr().err.splitlines()[-1]
