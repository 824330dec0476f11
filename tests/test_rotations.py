"""What Hadamard matrices and rotations promise."""

import math

import pytest
import torch
from conftest import CONFIGS, distance, randomized

from model import Config
from nanoosp.hadamard import hadamard, hadamard_factors, hadamard_transform, williamson_172
from nanoosp.rotations import (
    cayley_step,
    learn_rotations,
    random_rotations,
    rotated_weights,
    rotation_gradients,
)
from quantize import Recipe, attach_ffn_hadamard, attach_rounding, quantize


# Hadamard matrices


@pytest.mark.parametrize("n", [1, 2, 12, 22, 43, 64, 86, 172, 384, 768, 896, 1024, 1408, 2432])
def test_a_hadamard_matrix_is_orthogonal_and_even(n):
    M = hadamard(n).float()
    assert (M @ M.T - torch.eye(n)).abs().max() < 1e-5
    largest = 1.4143 if n in (22, 43, 86) else 1.00001  # Hartley's entries differ
    assert M.abs().max() * math.sqrt(n) < largest


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
    """matmul_hadU of SpinQuant: Walsh-Hadamard on the last axis of (K, n/K), then H_K from left."""
    H, S = hadamard_factors(384)
    x = torch.randn(384, dtype=torch.float64)
    assert not torch.allclose(H, H.T)
    assert torch.allclose(hadamard_transform(x), (H @ (x.view(12, 32) @ S)).flatten())


# Rotations


@pytest.mark.parametrize("config", CONFIGS, ids=str)
@pytest.mark.parametrize("which", ["R1", "R2", "R3", "R4", "R1 R2 R3 R4"])
def test_rotations_leave_the_logits_alone(config, which, tokens, monkeypatch):
    """To 1e-4 in fp32, and to 1e-10 in fp64, for which model.py's float() must mean double()."""
    R1, R2 = random_rotations(config)
    for tolerance in (1e-4, 1e-10):
        model = randomized(config).fold()
        if tolerance == 1e-10:
            monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
            model = model.double()
        expected = model(tokens)
        rotated = rotated_weights(model.state_dict(), R1 if "R1" in which else None,
                                  R2 if "R2" in which else None, ffn_hadamard="R4" in which)
        model.load_state_dict(rotated, assign=True)
        if "R3" in which:
            for block in model.blocks:
                for point in (block.attn.at_q, block.attn.at_k):
                    point.register_forward_hook(lambda m, i, x: hadamard_transform(x))
        if "R4" in which:
            attach_ffn_hadamard(model)
        assert distance(model(tokens), expected) < tolerance
        monkeypatch.undo()


def test_random_rotations_are_orthogonal_and_drawn_in_the_official_order():
    R1, R2 = random_rotations(Config(n_layer=3, n_head=2, n_embd=64, vocab_size=96), seed=0)
    torch.manual_seed(0)
    for R in (R1, *R2):
        signs = 2 * torch.randint(0, 2, (len(R),)) - 1
        assert torch.equal(R, torch.diag(signs.double()) @ hadamard(len(R)))
        assert (R @ R.T - torch.eye(len(R))).abs().max() < 1e-12


@pytest.mark.parametrize("method", ["quarot", "spinquant"])
def test_centred_embeddings_change_the_model_unless_they_were_centred(method, tokens):
    model = randomized()
    expected = model(tokens)
    exact, centred = (Recipe("16-16-16", method, center_embed=c) for c in (False, True))
    assert distance(quantize(model, exact)(tokens), expected) < 1e-4
    assert distance(quantize(model, centred)(tokens), expected) > 1e-3
    model.embed.weight -= model.embed.weight.mean(dim=1, keepdim=True)
    assert distance(quantize(model, centred)(tokens), model(tokens)) < 1e-4


# SpinQuant


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


def learner(trained, bits):
    """(a model that rounds as in `bits`, rotations to start from, windows)"""
    model, windows = trained
    model = model.fold().requires_grad_(False)
    attach_ffn_hadamard(model)
    attach_rounding(model, Recipe(bits), straight_through=True)
    return model, random_rotations(model.config), windows


def test_only_rotations_get_gradients_and_parts_of_a_batch_add_up(trained):
    model, (R1, R2), windows = learner(trained, "16-4-4")
    weights = model.state_dict()
    loss, G1, G2 = rotation_gradients(model, weights, R1, R2, windows[:8])
    assert G1.shape == R1.shape and G2.shape == R2.shape
    assert G1.abs().max() > 0 and G2.abs().max() > 0
    assert all(p.grad is None for p in model.parameters()) and not R1.requires_grad
    parts = [rotation_gradients(model, weights, R1, R2, w) for w in windows[:8].split(2)]
    for i, whole in enumerate((loss, G1, G2)):
        mean = torch.as_tensor(sum(part[i] for part in parts) / 4)
        assert torch.allclose(torch.as_tensor(whole), mean, atol=1e-5)
    exact = learner(trained, "16-16-16")[0]
    _, G, _ = rotation_gradients(exact, weights, R1, R2, windows[:8])
    W = R1.T @ G  # nothing is rounded: nothing to turn
    assert (W - W.T).norm() < 1e-3 * G1.norm()


def test_learned_rotations_stay_rotations_and_lower_the_loss_they_were_learned_on(trained):
    model, start, windows = learner(trained, "16-3-3")
    windows = torch.cat([windows[:8], windows[:8]])  # judged by what they are learned on
    best = learn_rotations(model, *start, windows, Recipe(method="spinquant"))
    assert not torch.equal(best[0], start[0])
    for R in (best[0], *best[1]):
        assert (R @ R.T - torch.eye(len(R))).abs().max() < 1e-5
    before, after = (rotation_gradients(model, model.state_dict(), *R, windows[:8])[0]
                     for R in (start, best))
    assert after < before


def n_hooks(model):
    return sum(len(module._forward_hooks) for module in model.modules())


def test_spinquant_without_steps_or_rate_is_quarot_and_its_exact_logits_never_change(trained):
    model, windows = trained
    reference = quantize(model, Recipe("4-4-4", "quarot"), windows)
    for options in (dict(lr=0.0, steps=10), dict(steps=0)):
        other = quantize(model, Recipe("4-4-4", "spinquant", **options), windows)
        assert n_hooks(other) == n_hooks(reference)  # those of learning are gone
        weights = other.state_dict()
        assert all(torch.equal(W, weights[name]) for name, W in reference.state_dict().items())
    learned = quantize(model, Recipe("16-4-4", "spinquant", steps=10), windows)
    for block in learned.blocks:
        for point in block.modules():
            point._forward_hooks.clear()
    attach_ffn_hadamard(learned)
    assert distance(learned(windows[:4]), model(windows[:4])) < 1e-4


def test_spinquant_wants_sequences_to_learn_from_besides_those_that_judge(trained):
    with pytest.raises(ValueError, match="more than 8"):
        quantize(trained[0], Recipe("4-4-4", "spinquant"), trained[1][:8])
