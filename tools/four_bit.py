"""Four bits in a Hugging Face directory, as the library compressed-tensors stores them: transformers
and vLLM read it, and llama.cpp's converter reads NVFP4.

    quantization_config(recipe)           what config.json says
    packed_tensors(model, input_scales)   what is stored of a model of quantize(): just its codes
    recipe_of(config)                     and back, for directories of other programs too
    unpack_tensors(weights, recipe)

    format  weight_packed [out, ...]            weight_scale [out, groups]  besides
    int     int32, eight nibbles: code + 8      the model's dtype           weight_shape
    mxfp4   uint8, two nibbles: bits of E2M1    uint8: E8M0                 -
    nvfp4   uint8, two nibbles: bits of E2M1    float8: E4M3                weight_global_scale

The first nibble is the lowest. weight_global_scale is 1 / the scale of the tensor. If NVFP4 is to
round activations, input_global_scale is the same of them: a constant, where we have a scale for
each token.
"""

import json
from dataclasses import dataclass

import torch

from model import Transformer, hooked
from nanoosp.batches import windows_at_once
from nanoosp.formats import BLOCK_FORMATS, E2M1, E4M3_MAX
from quantize import Recipe, linears, per_column
from tools.packed import from_integer, integers, pack, stored_scales, unpack

STORED_AS = {"int": "pack-quantized", "mxfp4": "mxfp4-pack-quantized",
             "nvfp4": "nvfp4-pack-quantized"}
BLOCKS = {"mxfp4": dict(strategy="group", scale_dtype="torch.uint8"),
          "nvfp4": dict(strategy="tensor_group", scale_dtype="torch.float8_e4m3fn")}
DYNAMIC = {"int": False, "mxfp4": True, "nvfp4": "local"}  # scales of activations: from each token
TOLD = ("num_bits", "type", "symmetric", "dynamic", "strategy", "group_size")
KINDS = ("weight_packed", "weight_scale", "weight_shape", "weight_global_scale", "input_global_scale")
KERNELS = (0, 32, 64, 128)  # groups that Marlin, vLLM's kernel for GPUs, takes; 0: whole rows


# Out


def check_rows(model, recipe: Recipe):
    """Raise ValueError for a model that such a directory cannot hold."""
    for name, linear in linears(model).items():
        if recipe.format == "int" and linear.in_features % 8:
            raise ValueError(f"{name} has rows of {linear.in_features} weights, but other programs "
                             "read eight at a time: only --out takes such a model")


def scheme_of(recipe: Recipe, dynamic=False) -> dict:
    """How weights are stored or, if `dynamic`, activations are rounded."""
    scheme = dict(num_bits=4, type="int", symmetric=True, dynamic=dynamic, strategy="channel",
                  group_size=recipe.group or None)
    if recipe.group:
        scheme["strategy"] = "group"
    if recipe.format in BLOCKS:
        group = BLOCK_FORMATS[recipe.format].group
        scheme |= dict(type="float", group_size=group, **BLOCKS[recipe.format])
    return scheme


def quantization_config(recipe: Recipe) -> dict:
    """The entry of config.json. A group says its format too: with activations it is not guessed."""
    stored_as = STORED_AS[recipe.format]
    activations = scheme_of(recipe, DYNAMIC[recipe.format]) if recipe.a < 16 else None
    group = dict(targets=["Linear"], weights=scheme_of(recipe), input_activations=activations,
                 output_activations=None, format=stored_as)
    return dict(quant_method="compressed-tensors", format=stored_as, ignore=["lm_head"],
                quantization_status="compressed", kv_cache_scheme=None,
                config_groups=dict(group_0=group))


@torch.no_grad()
def input_scales(model, tokens) -> dict:
    """The scale [1] of the tensor that NVFP4 needs for a linear's inputs, by linears' names: the one
    that fits the largest in `tokens` [N, T]."""
    plain = Transformer.from_weights(model.config, model.state_dict())  # which rounds no inputs
    scales = {name: torch.full((1,), 1e-30, device=tokens.device) for name in linears(plain)}

    def watch(name):
        def hook(module, inputs, y):
            scale = inputs[0].float().abs().max() / (E2M1[-1] * E4M3_MAX)
            scales[name] = torch.maximum(scales[name], scale)
        return hook

    with hooked([(linear, watch(name)) for name, linear in linears(plain).items()]):
        for part in tokens.split(windows_at_once(tokens.shape[1])):
            plain(part)
    return scales


def packed_tensors(model, input_scales: dict | None = None) -> dict:
    """All tensors of a model of quantize(), by our names, as they are stored. `input_scales`: for
    activations in NVFP4."""
    format = model.recipe.format
    tensors = model.state_dict()
    blocks = stored_scales(model) if format in BLOCKS else {}
    for name, code in integers(model).items():
        W = tensors.pop(f"{name}.weight")
        stored = {}
        if format == "int":
            stored["weight_packed"] = pack(code).view(torch.int32)
            stored["weight_scale"] = model.scales[name].to(W.dtype)
            stored["weight_shape"] = torch.tensor(W.shape)
        else:
            bits = code.abs() + 8 * (code < 0)  # a sign, and which of the eight numbers
            stored["weight_packed"] = pack(bits - 8)
            stored["weight_scale"], of_tensor = blocks[name]
        if format == "nvfp4":
            stored["weight_scale"] = stored["weight_scale"].view(torch.float8_e4m3fn)
            stored["weight_global_scale"] = 1 / of_tensor.view(1)
            if model.recipe.a < 16:
                stored["input_global_scale"] = 1 / input_scales[name]
        tensors |= {f"{name}.{kind}": tensor.contiguous() for kind, tensor in stored.items()}
    return tensors


# In


@dataclass(frozen=True)
class Found(Recipe):
    """What a directory says: how numbers are stored, but not by which method they were found."""

    def __str__(self) -> str:
        return f"{self.bits} {self.format}".removesuffix(" int")


def recipe_of(config: dict | None) -> Found | None:
    """How a directory is quantized, by the quantization_config in its config.json; None if it has
    none. Raises ValueError for other numbers than those of quantize.py --hf."""
    if config is None:
        return None
    formats = {stored_as: format for format, stored_as in STORED_AS.items()}
    format = formats.get(config.get("format"))
    groups = [*config.get("config_groups", {}).values()]
    if config.get("quant_method") != "compressed-tensors" or not format or not groups:
        raise ValueError(f"it is quantized by {config.get('quant_method')}, format "
                         f"{config.get('format')}: of quantized directories, only those of "
                         f"compressed-tensors can be read whose format is {', '.join(formats)}")
    activations = format in BLOCKS and groups[0].get("input_activations")
    found = Found(f"4-{4 if activations else 16}-16", "rtn", format, portable=True,
                  group=format == "int" and groups[0]["weights"].get("group_size") or 0)
    wanted = quantization_config(found)["config_groups"]["group_0"]
    strange = {name: config[name] for name in ("kv_cache_scheme", "transform_config")
               if config.get(name)}  # what rounds or rotates while a model runs
    for group in groups:
        for part in ("weights", "input_activations"):
            told = group.get(part) or {}
            strange |= {f"{part} {name}": told.get(name) for name in TOLD
                        if told.get(name) != (wanted[part] or {}).get(name)}
    if strange:
        raise ValueError("of compressed-tensors only what quantize.py --hf writes can be read, but "
                         f"quantization_config says {json.dumps(strange)[:160]}")
    return found


def unpack_tensors(weights: dict, recipe: Recipe) -> dict:
    """Replace what is stored of each linear in `weights`, by our names, by its weight, in the dtype
    that transformers gives it. Returns the scales [out, groups] by linears' names. Raises ValueError
    for what does not fit together."""
    scales = {}
    for name in [n.removesuffix(".weight_packed") for n in weights if n.endswith(".weight_packed")]:
        stored = {kind: weights.pop(f"{name}.{kind}", None) for kind in KINDS}
        packed, scale = stored["weight_packed"], stored["weight_scale"]
        try:
            if recipe.format == "int":
                n_in = int(stored["weight_shape"][1])
                codes = unpack(packed.view(torch.uint8))[:, :n_in]
                scales[name] = scale.float()
                dtype = scale.dtype
            else:
                bits = unpack(packed) + 8
                codes = from_integer(torch.where(bits < 8, bits, 8 - bits), recipe.format)
                if recipe.format == "nvfp4":
                    scales[name] = scale.float() / stored["weight_global_scale"]
                else:
                    scales[name] = BLOCK_FORMATS["mxfp4"].read(scale, None)
                dtype = torch.bfloat16
            weights[f"{name}.weight"] = (per_column(scales[name], codes.shape[1]) * codes).to(dtype)
        except (AttributeError, TypeError, IndexError, RuntimeError, ZeroDivisionError) as error:
            raise ValueError(f"what is stored of {name} does not fit together: "
                             f"{str(error).splitlines()[0]}") from error
    return scales
