"""Four bits in Hugging Face directories, against the library compressed-tensors in transformers."""

import copy
import json

import pytest
import torch
from conftest import CONFIGS, SMALL, distance, randomized, train_osp
from test_huggingface import change_config, from_transformers, hf_model

from model import Config
from nanoosp.halves import stacks
from quantize import Recipe, linears, quantize
from tools import evaluate, export
from tools.four_bit import input_scales
from tools.huggingface import load_llama, save_llama, their_names
from tools.loading import load

transformers = pytest.importorskip("transformers")
pytest.importorskip("compressed_tensors", minversion="0.17")
load_file = pytest.importorskip("safetensors.torch").load_file

OPTIONS = {"imported": "test", "seq_len": 64}
DATA = {"tokenizer": "bytes"}
OSP = CONFIGS[1]
TIED = Config(n_layer=2, n_head=4, n_embd=128, vocab_size=256, n_kv_head=1, tie_embeddings=True)


def windows(vocab_size, n=12):
    return torch.randint(vocab_size, (n, 33), generator=torch.Generator().manual_seed(0))


def written(directory, config=TIED, dtype=torch.float32, bits="4-16-16", method="rtn", **more):
    """Our model as it was saved, in the dtype that its format is unpacked to."""
    recipe = Recipe(bits, method, portable=True, **more)
    tokens = windows(256)
    model = randomized(copy.copy(config)).to(dtype if recipe.format == "int" else torch.bfloat16)
    quantized = quantize(model, recipe, tokens)
    scales = input_scales(quantized, tokens[:, :-1]) if recipe.a < 16 else None
    save_llama(quantized, directory, OPTIONS, DATA, input_scales=scales)
    return quantized


def in_fp32(directory):
    """What transformers reads, to compute with in fp32."""
    unpacked = transformers.CompressedTensorsConfig(dequantize=True)
    return transformers.AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, quantization_config=unpacked).eval()


@torch.no_grad()
@pytest.mark.parametrize("config", [TIED, Config(2, 3, 96, 256, n_kv_head=1, n_ffn=160, norm="ss",
                                                 embproj=True)], ids=["tied GQA", "OSP"])
@pytest.mark.parametrize("method, more", [
    ("rtn", {}), ("gptq", {}), ("gptq", dict(group=32)), ("gptq", dict(dtype=torch.bfloat16)),
    ("quarot", dict(group=16)), ("spinquant", {}), ("rtn", dict(format="mxfp4")),
    ("gptq", dict(format="nvfp4")), ("quarot", dict(format="nvfp4"))], ids=str)
def test_transformers_reads_our_codes_bit_for_bit_and_so_do_we(method, more, config, tmp_path):
    ours = written(tmp_path / "m", config, method=method, **more)
    theirs = from_transformers(tmp_path / "m", dtype="auto")
    tokens = windows(256)[:2, :-1]
    theirs(tokens)  # only this unpacks
    for name, linear in linears(ours).items():
        W = theirs.get_submodule(their_names(f"{name}.").removesuffix(".")).weight
        assert torch.equal(W, linear.weight) and W.dtype == linear.weight.dtype, name
    assert torch.allclose(in_fp32(tmp_path / "m")(tokens).logits, copy.deepcopy(ours).float()(tokens),
                          rtol=0, atol=5e-5)
    back = load_llama(tmp_path / "m")[0]
    assert torch.equal(back(tokens), ours(tokens))
    assert str(back.recipe) == f"4-16-16 {more.get('format', '')}".strip()
    for name, scale in ours.scales.items():
        assert torch.allclose(back.scales[name], scale, rtol=1e-6)
    tensors = load_file(tmp_path / "m/model.safetensors")
    assert ("lm_head.weight" in tensors) == (not config.tie_embeddings or method[0] in "qs")


def test_what_is_stacked_shares_the_scale_of_its_tensor(tmp_path):
    ours = written(tmp_path / "m", format="nvfp4")
    tensors = load_file(tmp_path / "m/model.safetensors")
    found = set()
    for weights in stacks(ours):
        names = [their_names(f"{name}.weight_global_scale") for name in weights]
        found.add(tensors[names[0]].item())
        assert len({tensors[name].item() for name in names}) == 1
    assert len(found) == 8  # but others do not


@torch.no_grad()
@pytest.mark.parametrize("format", ["nvfp4", "mxfp4"])
def test_activations_are_rounded_as_coarsely_as_here(format, tmp_path):
    """Not to the same numbers: scales of the tensor are constants there, and MXFP4's scales are
    larger where a block's largest number is just below a power of two."""
    ours = written(tmp_path / "m", bits="4-4-16", method="gptq", format=format)
    tokens = windows(256)[:, :-1]
    exact = quantize(randomized(TIED).bfloat16(), ours.recipe, windows(256))
    for module in exact.modules():
        module._forward_hooks.clear()
    exact = exact(tokens).float()
    theirs = from_transformers(tmp_path / "m", dtype="auto")(tokens).logits.float()
    assert 0.6 < distance(theirs, exact) / distance(ours(tokens).float(), exact) < 1.5
    assert torch.equal(load_llama(tmp_path / "m")[0](tokens), ours(tokens))
    inputs = {name: t for name, t in load_file(tmp_path / "m/model.safetensors").items()
              if name.endswith("input_global_scale")}
    assert len(inputs) == (14 if format == "nvfp4" else 0)


def test_a_constant_for_activations_fits_the_largest_in_calibration():
    model = randomized(TIED).fold()
    tokens = windows(256)[:, :-1]
    seen = []
    model.blocks[1].ffn.at_hidden.register_forward_hook(lambda module, inputs, x: seen.append(x))
    model(tokens)
    scale = input_scales(model, tokens)["blocks.1.ffn.down_proj"]
    assert scale.shape == (1,) and scale.item() == pytest.approx(seen[0].abs().max().item() / 2688)


def test_directories_that_compressed_tensors_made_itself_are_read(tmp_path):
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config

    theirs = hf_model(tmp_path / "plain", hidden_size=128, intermediate_size=256)
    config = QuantizationConfig(config_groups={"W4A16": ["Linear"]},
                                ignore=["lm_head", "model.layers.0.mlp.down_proj"])
    apply_quantization_config(theirs, config)
    for module in theirs.modules():
        if hasattr(module, "weight_scale"):
            scale = module.weight.unflatten(1, (-1, 128)).abs().amax(dim=-1) / 7
            module.weight_scale.data = scale.detach()
    compressor = ModelCompressor.from_pretrained_model(theirs)
    compressor.compress_model(theirs)
    theirs.save_pretrained(tmp_path / "m")
    compressor.update_config(tmp_path / "m")
    (tmp_path / "plain/tokenizer.json").rename(tmp_path / "m/tokenizer.json")
    ours = load_llama(tmp_path / "m")[0]
    assert ours.recipe.group == 128 and len(ours.scales) == 20
    tokens = windows(256)[:2]
    assert torch.allclose(ours(tokens), in_fp32(tmp_path / "m")(tokens).logits, rtol=0, atol=5e-5)


@pytest.mark.parametrize("change, words", [
    (dict(quant_method="awq"), "quantized by awq"),
    (dict(format="float-quantized"), "float-quantized"),
    (dict(kv_cache_scheme=dict(num_bits=8)), "kv_cache_scheme"),
    (dict(transform_config=dict(config_groups={"R4": {}})), "transform_config"),
    (dict(config_groups={}), "quantized by compressed-tensors"),
])
def test_other_quantized_directories_are_refused_by_name(change, words, tmp_path):
    written(tmp_path / "m")
    config = json.loads((tmp_path / "m/config.json").read_text())["quantization_config"]
    change_config(tmp_path / "m", quantization_config=config | change)
    with pytest.raises(ValueError, match=words) as error:
        load_llama(tmp_path / "m")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("part, change", [
    ("weights", dict(symmetric=False)), ("weights", dict(num_bits=8)),
    ("input_activations", dict(num_bits=8, type="int", symmetric=True, strategy="token"))])
def test_other_numbers_are_refused_by_name(part, change, tmp_path):
    written(tmp_path / "m")
    config = json.loads((tmp_path / "m/config.json").read_text())["quantization_config"]
    group = config["config_groups"]["group_0"]
    group[part] = (group[part] or {}) | change
    change_config(tmp_path / "m", quantization_config=config)
    with pytest.raises(ValueError, match=f"{part} {min(change)}"):
        load_llama(tmp_path / "m")


def test_tensors_that_do_not_fit_are_refused_in_one_line(tmp_path):
    from safetensors.torch import save_file

    written(tmp_path / "m")
    file = tmp_path / "m/model.safetensors"
    tensors, name = load_file(file), "model.layers.0.self_attn.q_proj.weight"
    for part, damaged in (("scale", torch.ones(128, 3)), ("packed", torch.ones(128, 3).int()),
                          ("shape", None), ("scale", None)):
        changed = {k: t for k, t in (tensors | {f"{name}_{part}": damaged}).items() if t is not None}
        save_file(changed, file, metadata={"format": "pt"})
        with pytest.raises(ValueError, match="q_proj") as error:
            load_llama(tmp_path / "m")
        assert "\n" not in str(error.value)


# The command line


@pytest.fixture(scope="module")
def run_dir(dataset_dir, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "osp"
    return train_osp(out, dataset_dir, n_layer=1, n_embd=32, seq_len=16, steps=4)


@pytest.mark.parametrize("options, label, dtype, said", [
    (["--bits", "4-16-16", "--w-group", "16"], "LLaMA, 4-16-16", "float32", "not of 16: transformers reads"),
    (["--bits", "4-4-16", "--method", "rtn", "--format", "nvfp4"], "LLaMA, 4-4-16 nvfp4", "bfloat16", ""),
])
def test_the_command_writes_a_directory_that_eval_measures(options, label, dtype, said, run_dir,
                                                           dataset_dir, tmp_path, capsys):
    m, text = tmp_path / "m", str(dataset_dir.parent / "words.txt")
    export.main([str(run_dir), "--hf", str(m), *options, "--calib", text, "--device", "cpu"]
                if "nvfp4" in options else [str(run_dir), "--hf", str(m), *options, "--device", "cpu"])
    assert said in capsys.readouterr().out
    config = json.loads((m / "config.json").read_text())
    assert config["dtype"] == config["torch_dtype"] == dtype
    assert options[1] in (m / "README.md").read_text()
    evaluate.main([str(m), str(run_dir), "--text", text, "--device", "cpu", "--json"])
    four, exact = json.loads(capsys.readouterr().out)
    assert four["label"] == label and 0 < abs(four["val_loss"] - exact["val_loss"]) < 0.1
    for argv in (["--hf", str(tmp_path / "n")], ["--out", str(tmp_path / "n")],
                 ["--hf", str(tmp_path / "n"), "--bits", "4-16-16", "--method", "rtn"]):
        with pytest.raises(SystemExit, match="quantized already"):
            export.main([str(m), *argv, "--device", "cpu"])
    with pytest.raises(SystemExit, match="not quantized by quantize.py --out"):
        evaluate.main([str(m), "--prompt", "a", "--int4", "--device", "cpu"])


@pytest.mark.parametrize("options, words", [
    ("--method rtn", "--method goes with --out, or --bits 4-16-16"),
    ("--bits 8-16-16", "holds weights of 4 bits"),
    ("--bits 4-16-4", "keys and values so: use 4-16-16"),
    ("--bits 4-4-16", "other integers: use 4-16-16"),
    ("--bits 4-16-16 --method had", "use rtn, gptq or quarot"),
    ("--bits 4-16-16 --format mxfp4 --dtype float32", "bfloat16 only"),
    ("--bits 4-16-16 --method rtn --calib x", "--calib does nothing"),
])
def test_what_other_programs_do_not_do_is_exit_code_2(options, words, run_dir, tmp_path, capsys):
    with pytest.raises(SystemExit) as error:
        export.main([str(run_dir), "--hf", str(tmp_path / "m"), *options.split()])
    lines = capsys.readouterr().err.splitlines()
    assert error.value.code == 2 and words in lines[-1]
    assert not (tmp_path / "m").exists()


def test_rows_that_are_not_stored_in_eights_are_refused(tmp_path):
    hf_model(tmp_path / "odd", intermediate_size=108)
    with pytest.raises(SystemExit, match="down_proj has rows of 108 .*only --out"):
        export.main([str(tmp_path / "odd"), "--hf", str(tmp_path / "m"), "--bits", "4-16-16",
                     "--method", "rtn", "--device", "cpu"])
