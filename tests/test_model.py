import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from model import Config, RMSNorm, SSNorm, Transformer, apply_rope, rope_tables
from train import PRESETS
from muon import parameter_groups

SMALL = Config(n_layer=2, n_head=4, n_embd=64, vocab_size=96)

PAPER = {name: PRESETS["1.4b"][name] for name in ("n_layer", "n_head", "n_embd", "vocab_size")}


def randomized(config):
    """A model whose gains are not all one and whose EmbProj is not orthogonal, as after training."""
    torch.manual_seed(0)
    model = Transformer(config)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(3).add_(torch.randn_like(p) * 0.02) if p.ndim == 2 else p.uniform_(0.5, 2)
    return model


def reference_logits(model, tokens):
    """The same network written once more in the plainest way: fp64, complex numbers for RoPE, loops and an explicit softmax."""
    c, w = model.config, {k: v.double() for k, v in model.state_dict().items()}
    T, group = len(tokens), c.n_head // c.n_kv_head

    def norm(x, gain):
        return x / (x.square().mean(-1, keepdim=True) + c.norm_eps).sqrt() * gain

    def rope(x):  # [T, d]; channel i and i + d/2 are the real and imaginary part
        frequency = c.rope_theta ** (-torch.arange(0, c.head_dim, 2).double() / c.head_dim)
        turn = torch.polar(torch.ones(T, c.head_dim // 2).double(), torch.arange(T).double()[:, None] * frequency)
        z = torch.complex(*x.chunk(2, -1)) * turn
        return torch.cat([z.real, z.imag], -1)

    x = w["embed.weight"][tokens]
    if c.embproj:
        x = x @ w["embproj_in.weight"].T
    for i in range(c.n_layer):
        b = {k.removeprefix(f"blocks.{i}."): v for k, v in w.items() if k.startswith(f"blocks.{i}.")}
        h = norm(x, b["attn_norm.gain"])
        q, k, v = (h @ b[f"attn.{n}_proj.weight"].T for n in "qkv")
        heads = []
        for j in range(c.n_head):
            q_j, k_j = (
                rope(q[:, j * c.head_dim :][:, : c.head_dim]),
                rope(k[:, j // group * c.head_dim :][:, : c.head_dim]),
            )
            scores = q_j @ k_j.T / math.sqrt(c.head_dim)
            scores = scores.masked_fill(torch.ones(T, T).triu(1).bool(), -math.inf)
            heads.append(
                scores.exp() / scores.exp().sum(-1, keepdim=True) @ v[:, j // group * c.head_dim :][:, : c.head_dim]
            )
        x = x + torch.cat(heads, -1) @ b["attn.o_proj.weight"].T
        h = norm(x, b["ffn_norm.gain"])
        gate = h @ b["ffn.gate_proj.weight"].T
        x = x + (gate / (1 + (-gate).exp()) * (h @ b["ffn.up_proj.weight"].T)) @ b["ffn.down_proj.weight"].T
    x = norm(x, w["norm.gain"])
    if c.embproj:
        x = x @ w["embproj_out.weight"].T
    return x @ w["head.weight"].T


@pytest.mark.parametrize("norm", ["rms", "ss"])
@pytest.mark.parametrize("embproj", [False, True])
@pytest.mark.parametrize("kv, tied", [(4, False), (2, False), (1, True)])
def test_logits_equal_a_plain_fp64_reference(norm, embproj, kv, tied):
    model = randomized(replace(SMALL, norm=norm, embproj=embproj, n_kv_head=kv, tie_embeddings=tied))
    tokens = torch.randint(96, (2, 40))
    for row, logits in zip(tokens, model(tokens)):
        expected = reference_logits(model, row)
        assert (logits - expected).norm() < 1e-5 * expected.norm()


@pytest.mark.parametrize("norm", ["rms", "ss"])
@pytest.mark.parametrize("embproj", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_fold_gives_a_plain_llama_with_the_same_logits(norm, embproj, tied):
    model = randomized(replace(SMALL, norm=norm, embproj=embproj, tie_embeddings=tied))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    folded, tokens = model.fold(), torch.randint(96, (2, 40))
    expected = model(tokens)
    assert (folded(tokens) - expected).norm() < 1e-5 * expected.norm()
    assert folded.config == replace(SMALL, norm="rms", embproj=False, tie_embeddings=False)
    assert not any(isinstance(m, SSNorm) for m in folded.modules())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert not {p.data_ptr() for p in folded.parameters()} & {p.data_ptr() for p in model.parameters()}


def test_the_paper_model_has_its_parameter_count():
    with torch.device("meta"):
        plain, osp = (
            Transformer(Config(**PAPER, norm=n, embproj=e)) for n, e in (("rms", False), ("ss", True))
        )
    count = {m: {g["role"]: sum(p.numel() for _, p in g["params"]) for g in parameter_groups(m)} for m in (plain, osp)}
    assert count[plain].pop("gain") == 49 * 2048 and sum(count[plain].values()) == 1_415_577_600
    assert count[osp].pop("gain") == 49 and sum(count[osp].values()) == 1_415_577_600 + 8_388_608


def test_rope_only_sees_relative_positions():
    torch.manual_seed(0)
    q, k = torch.randn(2, 1, 1, 1, 64)
    cos, sin = rope_tables(200, 64, 10000.0, "cpu")
    score = lambda i, j: (apply_rope(q, cos[i], sin[i]) * apply_rope(k, cos[j], sin[j])).sum()
    assert torch.allclose(score(5, 2), score(150, 147), atol=1e-4)
    assert not torch.allclose(score(5, 2), score(5, 3), atol=1e-2)
    assert torch.allclose(apply_rope(q, cos[9], sin[9]).norm(), q.norm())


def test_a_later_token_never_changes_earlier_logits():
    model, tokens = randomized(SMALL), torch.randint(96, (1, 30))
    changed = tokens.clone()
    changed[0, 20] = (changed[0, 20] + 1) % 96
    a, b = model(tokens), model(changed)
    assert torch.equal(a[:, :20], b[:, :20]) and not torch.allclose(a[:, 20], b[:, 20])


def test_norms_are_their_formula_and_work_in_fp32_on_bf16_input():
    torch.manual_seed(0)
    x = torch.randn(5, 64, dtype=torch.bfloat16) * 100
    unit = x.double() / x.double().square().mean(-1, keepdim=True).sqrt()
    for norm, gain in ((RMSNorm(64, 1e-6), torch.rand(64)), (SSNorm(64, 1e-6), torch.tensor(1.7))):
        norm.gain.data = gain
        assert norm(x).dtype == torch.bfloat16
        assert torch.allclose(norm(x).double(), (unit * gain).bfloat16().double(), rtol=2**-7)
    assert SSNorm(64, 1e-6).gain.shape == () and SSNorm(64, 1e-6).gain == 1


def test_embproj_starts_orthogonal():
    model = Transformer(replace(SMALL, embproj=True))
    for p in (model.embproj_in.weight, model.embproj_out.weight):
        assert torch.allclose(p @ p.T, torch.eye(64), atol=1e-5)


def test_the_loss_is_the_mean_cross_entropy_of_the_logits():
    model, tokens = randomized(SMALL), torch.randint(96, (3, 21))
    logits = model(tokens[:, :-1])
    assert torch.allclose(
        model(tokens[:, :-1], tokens[:, 1:]), F.cross_entropy(logits.reshape(-1, 96), tokens[:, 1:].reshape(-1))
    )


def test_every_point_is_passed_and_can_replace_its_value():
    model, seen = randomized(SMALL), {}
    names = [n for n, m in model.named_modules() if n.rsplit(".", 1)[-1].startswith("at_")]
    for name in names:
        model.get_submodule(name).register_forward_hook(lambda m, i, out, name=name: seen.update({name: out.shape}))
    tokens = torch.randint(96, (2, 10))
    expected = model(tokens)
    assert list(seen) == [
        "at_embed",
        *(
            f"blocks.{i}.{p}"
            for i in (0, 1)
            for p in (
                "attn.at_input",
                "attn.at_q",
                "attn.at_k",
                "attn.at_v",
                "attn.at_output",
                "ffn.at_input",
                "ffn.at_hidden",
            )
        ),
        "at_head",
    ]
    assert seen["blocks.0.attn.at_k"] == (2, 4, 10, 16) and seen["blocks.1.ffn.at_hidden"] == (2, 10, SMALL.n_ffn)
    handle = model.blocks[0].ffn.at_hidden.register_forward_hook(lambda m, i, out: out * 0)
    assert not torch.allclose(model(tokens), expected)
    handle.remove()
    assert torch.equal(model(tokens), expected)


@pytest.mark.parametrize(
    "wrong, named",
    [
        (dict(norm="layer"), "layer"),
        (dict(n_head=3), "n_head 3"),
        (dict(n_kv_head=3), "n_kv_head 3"),
        (dict(n_layer=0), "n_layer"),
        (dict(head_dim=7), "7"),
    ],
)
def test_impossible_shapes_are_refused_by_name(wrong, named):
    with pytest.raises(ValueError, match=named):
        replace(SMALL, **dict(dict(head_dim=0), **wrong))


def test_recomputing_keeps_less_and_changes_no_gradient():
    tokens, kept, gradients = torch.randint(96, (2, 33), generator=torch.Generator().manual_seed(0)), [], []
    for recompute in (False, True):
        model, stored = randomized(SMALL), {}
        model.recompute = recompute

        def note(t, stored=stored):
            stored[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
            loss = model(tokens[:, :-1], tokens[:, 1:])
        loss.backward()
        kept.append(sum(stored.values()))
        gradients.append([p.grad for p in model.parameters()])
    assert kept[1] < kept[0] / 2
    assert all(torch.equal(a, b) for a, b in zip(*gradients))
