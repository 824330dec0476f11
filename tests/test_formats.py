"""MXFP4 and NVFP4, against torchao, against ml_dtypes, and by hand."""

import math
from dataclasses import replace

import pytest
import torch
from conftest import CONFIGS, SMALL, distance, randomized

from model import Config
from nanoosp.files import read_archive
from nanoosp.formats import BLOCK_FORMATS, E2M1, E4M3_MIN, e2m1
from quantize import Int, Recipe, attach_rounding, linears, per_column, quantize
from tools.packed import from_integer, pack, packed_model, save_packed, to_integer, unpack

FORMATS = list(BLOCK_FORMATS)
NUMBERS = torch.tensor(E2M1)


def rounded(W, name):
    scale = per_column(BLOCK_FORMATS[name].scale(W), W.shape[1])
    return scale * e2m1(W / scale)


def test_e2m1_keeps_every_number_it_has_and_rounds_the_rest_to_the_nearest():
    both = torch.cat([NUMBERS, -NUMBERS])
    assert torch.equal(e2m1(both), both)
    x = torch.linspace(-9, 9, 20001)
    nearest = (x[:, None] - both).abs().amin(dim=1)
    assert torch.equal((x - e2m1(x)).abs(), nearest)  # beyond 6 the nearest is 6
    assert set(e2m1(x).tolist()) == set(both.tolist())


@pytest.mark.parametrize("low, high, even", [
    (0, 0.5, 0), (0.5, 1, 1), (1, 1.5, 1), (1.5, 2, 2), (2, 3, 2), (3, 4, 4), (4, 6, 4)])
def test_ties_go_to_the_even_mantissa(low, high, even):
    middle = torch.tensor((low + high) / 2)
    assert e2m1(middle) == even and e2m1(-middle) == -even
    assert e2m1(middle * (1 - 1e-6)) == low and e2m1(middle * (1 + 1e-6)) == high


def test_e2m1_is_what_ml_dtypes_rounds_to():
    ml_dtypes = pytest.importorskip("ml_dtypes")
    torch.manual_seed(0)
    x = torch.cat([torch.randn(10000) * 3, torch.arange(-400, 401) / 64])
    theirs = x.numpy().astype(ml_dtypes.float4_e2m1fn).astype("float32")
    assert torch.equal(e2m1(x), torch.from_numpy(theirs))


def samples():
    """Weights [64, 64] of many kinds: Gaussian, with outliers, with zeros, tiny, huge, constant."""
    torch.manual_seed(0)
    W = torch.randn(64, 64)
    outlier, zeros = W.clone(), W.clone()
    outlier[:, 3] *= 1000
    zeros[5], zeros[:, :32] = 0, 0
    powers = torch.exp2(torch.randint(-8, 8, (64, 64)).float())
    return dict(gaussian=W, outlier=outlier, zeros=zeros, small=W * 1e-20, large=W * 1e20,
                powers=powers, constant=torch.full((64, 64), 0.7), numbers=NUMBERS.repeat(64, 8))


@pytest.mark.parametrize("kind", samples())
def test_mxfp4_is_torchaos(kind):
    mx = pytest.importorskip("torchao.prototype.mx_formats.mx_tensor")
    W = samples()[kind]
    scale, data = mx.to_mx(W, torch.float4_e2m1fn_x2, 32)
    theirs = mx.to_dtype(data.view(torch.uint8), scale, torch.float4_e2m1fn_x2, 32, torch.float32)
    assert torch.equal(rounded(W, "mxfp4"), theirs)
    assert torch.equal(BLOCK_FORMATS["mxfp4"].scale(W).log2() + 127, scale.view(torch.uint8).float())


@pytest.mark.parametrize("broken", [math.inf, -math.inf, math.nan])
def test_activations_that_are_not_finite_stay_so_in_every_format(broken):
    x = torch.randn(2, 64)
    x[0, 40] = broken
    mxfp4, nvfp4 = BLOCK_FORMATS.values()
    for rounded in (Int(4).round(x), mxfp4.round(x), nvfp4.round(x)):
        assert rounded[0, 32:].isnan().all() and rounded[1].isfinite().all()
    assert mxfp4.round(x).isnan().sum() == 32  # of its block only
    if math.isnan(broken):  # where torchao agrees; of inf it makes numbers
        mx = pytest.importorskip("torchao.prototype.mx_formats.mx_tensor")
        scale, _ = mx.to_mx(x, torch.float4_e2m1fn_x2, 32)
        assert torch.equal(mxfp4.scale(x).isnan(), scale.float().isnan())


@pytest.mark.parametrize("kind", samples())
def test_nvfp4_is_torchaos(kind):
    nv = pytest.importorskip("torchao.prototype.mx_formats.nvfp4_tensor")
    W = samples()[kind]
    tensor = nv.per_tensor_amax_to_scale(W.abs().max())
    block, data = nv.nvfp4_quantize(W, 16, tensor)
    ours = BLOCK_FORMATS["nvfp4"].scale(W)
    # torchao has no block scale under 2^-6 of the tensor's; the format has, and we use them
    same = ours / tensor >= 2**-6
    theirs = block.float() / (1 / tensor)  # of torchao's blocks, as compressed-tensors computes it
    assert torch.equal(ours[same], theirs[same])
    assert same.all() or kind != "gaussian"
    nibbles = torch.stack([data & 15, data >> 4], dim=-1).flatten(1).long()
    numbers = torch.cat([NUMBERS, -NUMBERS])[nibbles]
    near_a_tie = (W / per_column(ours, 64)).abs()
    near_a_tie = torch.isin((near_a_tie * 1e5).round() / 1e5,
                            torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5]))
    check = per_column(same, 64) & ~near_a_tie  # it multiplies by the inverse, we divide
    assert torch.equal((per_column(ours, 64) * e2m1(W / per_column(ours, 64)))[check],
                       (per_column(theirs, 64) * numbers)[check])


@pytest.mark.parametrize("name", FORMATS)
def test_a_block_is_hurt_by_its_own_outlier_only(name):
    torch.manual_seed(0)
    W = torch.randn(8, 128)
    calm = rounded(W, name)
    W[:, 5] = 300
    loud = rounded(W, name)
    n = BLOCK_FORMATS[name].group
    if name == "mxfp4":
        assert torch.equal(loud[:, n:], calm[:, n:])
    assert distance(loud[:, n:], W[:, n:]) < 0.2 < distance(loud[:, 6:n], W[:, 6:n])


@pytest.mark.parametrize("name", FORMATS)
def test_the_extremes_of_one_block(name):
    n = BLOCK_FORMATS[name].group
    assert not rounded(torch.zeros(2, n), name).any()
    W = torch.zeros(1, n)
    W[0, 0] = 5.0
    assert (rounded(W, name)[0, 1:] == 0).all() and 4 <= rounded(W, name)[0, 0] <= 6
    for value in (1e-37, 1e37):
        got = rounded(torch.full((1, n), value), name) / value
        assert got.isfinite().all()
        assert (got - 1).abs().max() < 0.25 or name == "nvfp4" and value < 1  # its scale has a floor
    mixed = torch.zeros(1, 2 * n)
    mixed[0, 0], mixed[0, n] = 1.0, 1e-6  # a block far below the tensor's largest
    assert BLOCK_FORMATS["nvfp4"].scale(mixed).min() > 0 and rounded(mixed, name).isfinite().all()


def test_mxfp4_cuts_off_what_is_beyond_six_steps_of_its_power_of_two():
    W = torch.zeros(1, 32)
    W[0, :2] = torch.tensor([7.9, 3.1])
    assert BLOCK_FORMATS["mxfp4"].scale(W) == 1 and rounded(W, "mxfp4")[0, :2].tolist() == [6, 3]


@pytest.mark.parametrize("name", FORMATS)
def test_scales_are_stored_in_a_byte_each_and_read_back_bit_for_bit(name):
    for kind, W in samples().items():
        scale = BLOCK_FORMATS[name].scale(W)
        stored, tensor = BLOCK_FORMATS[name].stored(scale)
        assert stored.dtype == torch.uint8 and tensor.ndim == 0, kind
        assert torch.equal(BLOCK_FORMATS[name].read(stored, tensor), scale), kind
    for seed in range(400):
        torch.manual_seed(seed)
        scale = BLOCK_FORMATS[name].scale(torch.randn(16, 64) * 10 ** (3 * torch.randn(())))
        assert torch.equal(BLOCK_FORMATS[name].read(*BLOCK_FORMATS[name].stored(scale)), scale)


def test_a_file_whose_linears_have_nvfp4_scales_of_their_own_reads_as_it_was_written(tokens, tmp_path):
    """Up to the last place: such files are from when a scale was block * tensor, not block / (1 / tensor)."""
    q = quantize(randomized(CONFIGS[0]), Recipe("4-16-16", "rtn", "nvfp4"))
    save_packed(q, tmp_path / "q.pt", dict(seed=0), dict(tokenizer="bytes"))
    state = read_archive(tmp_path / "q.pt")
    scales = state["quantization"]["scales"]
    for i, (name, (block, tensor)) in enumerate(scales.items()):
        scales[name] = (block, tensor * (1 + i / 7))
    back = packed_model(state, tmp_path / "q.pt")
    differing = 0
    for name, linear in linears(back).items():
        block, tensor = scales[name]
        codes = from_integer(unpack(state["codes"][name]), "nvfp4")
        written = per_column(block.view(torch.float8_e4m3fn).float() * tensor, codes.shape[1]) * codes
        assert torch.allclose(linear.weight, written, rtol=3e-7, atol=0), name
        differing += (linear.weight != written).sum().item()
    assert differing and back(tokens).isfinite().all()


def test_codes_of_e2m1_fill_a_nibble_and_come_back():
    codes = torch.cat([NUMBERS, -NUMBERS])[None]
    assert torch.equal(from_integer(unpack(pack(to_integer(codes, "mxfp4"))), "mxfp4"), codes)


@pytest.mark.parametrize("name", FORMATS)
def test_tokens_are_rounded_each_for_itself(name):
    torch.manual_seed(0)
    x = torch.randn(2, 5, 64)
    alone = torch.stack([BLOCK_FORMATS[name].round(row[None])[0] for row in x.flatten(0, 1)]).view(2, 5, 64)
    assert torch.equal(BLOCK_FORMATS[name].round(x), alone)
    assert torch.equal(BLOCK_FORMATS[name].round(x)[0], rounded(x[0], name)) or name == "nvfp4"
    assert BLOCK_FORMATS[name].round(x.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("method", ["rtn", "had", "gptq", "quarot"])
@pytest.mark.parametrize("name", FORMATS)
def test_every_method_keeps_to_the_numbers_of_the_format(name, method, tokens, tmp_path):
    model = randomized(CONFIGS[0])
    recipe = Recipe("4-4-4", method, name)
    q = quantize(model, recipe, torch.randint(96, (12, 25)))
    for linear_name, linear in linears(q).items():
        scale = q.scales[linear_name]
        assert scale.shape == (linear.out_features, linear.in_features // BLOCK_FORMATS[name].group)
        codes = e2m1(linear.weight / per_column(scale, linear.in_features))
        assert set(codes.abs().unique().tolist()) <= set(E2M1)
        assert torch.equal(per_column(scale, linear.in_features) * codes, linear.weight)
    save_packed(q, tmp_path / "q.pt", dict(seed=0), dict(tokenizer="bytes"))
    back = packed_model(read_archive(tmp_path / "q.pt"), tmp_path / "q.pt")
    assert back.recipe.format == name and torch.equal(back(tokens), q(tokens))


def test_gptq_beats_rounding_in_these_formats_too():
    calibration = torch.randint(96, (40, 25), generator=torch.Generator().manual_seed(0))
    model = randomized(SMALL)
    exact = model(calibration[:, :-1])
    for name in FORMATS:
        had, gptq = (distance(quantize(model, Recipe("4-16-16", m, name), calibration)(calibration[:, :-1]), exact)
                     for m in ("had", "gptq"))
        assert gptq < had


def test_activations_alone_are_rounded_in_blocks_and_keys_and_values_stay_integers():
    model, tokens = randomized(SMALL), torch.randint(96, (2, 9))
    for name in FORMATS:
        plain = quantize(model, Recipe("16-16-4")), quantize(model, Recipe("16-16-4", format=name))
        assert torch.equal(plain[0](tokens), plain[1](tokens))
        q = model.fold()
        attach_rounding(q, Recipe("16-4-16", format=name))
        assert 0 < distance(q(tokens), model(tokens)) < 1


@pytest.mark.parametrize("recipe, words", [
    (dict(format="fp4"), "unknown format 'fp4'"),
    (dict(format="mxfp4", bits="3-4-4"), "must be 4 or 16"),
    (dict(format="nvfp4", bits="4-8-16"), "must be 4 or 16"),
    (dict(format="nvfp4", group=32), "scales of its own"),
    (dict(format="mxfp4", symmetric=True), "scales of its own"),
    (dict(format="mxfp4", clip=False), "scales of its own"),
])
def test_what_the_formats_do_not_have_is_refused(recipe, words):
    with pytest.raises(ValueError, match=words):
        Recipe(**recipe)


def test_rows_that_blocks_do_not_fill_are_refused():
    model = randomized(replace(SMALL, n_ffn=100))
    with pytest.raises(ValueError, match="blocks of 32, which do not divide 100"):
        quantize(model, Recipe("4-4-4", format="mxfp4"))
    assert Config(n_embd=48).n_ffn % 16 == 0 and E4M3_MIN == 2**-9
