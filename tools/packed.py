"""A file of four bits: two codes in a byte, and the scales. Those of mxfp4 and nvfp4 have 8 bits, as
in hardware; those of integers are fp32, one for each row or group.

    save_packed(quantize(model, recipe), path, options, data)     written by quantize.py --out
    packed_model(read_archive(path), path)                        bit for bit the same model

Int4Linear, at the end, computes with the packed weights. That is fast, but not bit-equal.
"""

from dataclasses import asdict
from pathlib import Path

import torch
import torch.nn as nn

from model import Config, Transformer
from nanoosp.files import save_archive
from nanoosp.formats import BLOCK_FORMATS, E2M1
from nanoosp.halves import stacks
from quantize import Recipe, attach_ffn_hadamard, attach_rounding, format_of, linears, per_column

VERSIONS = {"int": 2, "mxfp4": 3, "nvfp4": 3}
NUMBERS = {"int": range(9), "mxfp4": E2M1, "nvfp4": E2M1}  # what a code may be, but for its sign
PACKING = "code + 8 as a nibble; the low nibble of a byte is the even column"


def to_integer(codes, format: str):
    """Codes as integers -8 ... 7: a number's place among those of its format, with its sign; zero
    has none."""
    numbers = torch.tensor(NUMBERS[format], dtype=torch.float32, device=codes.device)
    return codes.sign() * torch.bucketize(codes.abs(), numbers)


def from_integer(integers, format: str):
    """What to_integer() was given."""
    numbers = torch.tensor(NUMBERS[format], dtype=torch.float32, device=integers.device)
    return integers.sign() * numbers[integers.abs().long()]


def integers(model) -> dict:
    """The codes of a model of quantize() as integers [out, in], by linears' names."""
    weights = model.state_dict()
    codes = {}
    for name, scale in model.scales.items():
        W = weights[f"{name}.weight"].float()
        code = format_of(model.recipe, 4).code(W / per_column(scale, W.shape[1]))
        codes[name] = to_integer(code, model.recipe.format)
    return codes


def stored_scales(model) -> dict:
    """Scales of MXFP4 or NVFP4 by linears' names: (a byte for each block, the scale of the tensor).
    Linears that read the same share the latter."""
    stored = {}
    for weights in stacks(model):
        scales = [model.scales[name] for name in weights]
        blocks, tensor = BLOCK_FORMATS[model.recipe.format].stored(torch.cat(scales))
        parts = blocks.split([len(scale) for scale in scales])
        stored |= {name: (part, tensor) for name, part in zip(weights, parts)}
    return stored


def pack(codes):
    """Codes -8 ... 7, [out, in] -> uint8 [out, in / 2]. Raises ValueError if `in` is odd."""
    if codes.shape[1] % 2:
        raise ValueError(f"rows of {codes.shape[1]} weights do not fill whole bytes")
    nibbles = (codes + 8).to(torch.uint8)
    return nibbles[:, 0::2] | nibbles[:, 1::2] << 4


def unpack(packed):
    """uint8 [out, in / 2] -> codes as fp32 [out, in]."""
    return torch.stack([packed & 15, packed >> 4], dim=-1).flatten(1).float() - 8


def check_weights(weights: dict, path):
    """Raise ArithmeticError if a tensor holds inf or nan. `path`: where they are to be written."""
    for name, W in weights.items():
        if not W.isfinite().all():
            raise ArithmeticError(f"{name} holds numbers that are not finite: {path} would be of "
                                  "no use, and is not written")


def save_packed(model, path: Path, options: dict, data: dict):
    """Write a model of quantize(), whole or not at all, with `options` and `data` of its run.

    Raises ValueError unless its weights have 4 bits, ArithmeticError if they are not finite, OSError
    if the file cannot be written.
    """
    recipe = model.recipe
    if recipe.w != 4 or recipe.portable:
        raise ValueError(f"a file holds weights of 4 bits, not {recipe.w}, and not portable ones")
    weights = {name: W.cpu() for name, W in model.state_dict().items()}
    check_weights(weights, path)  # rotating and rounding can overflow
    if torch.equal(weights["head.weight"], weights["embed.weight"]):  # they were tied
        weights["head.weight"] = weights["embed.weight"]  # one storage, which torch writes once
    scales = {name: scale.cpu() for name, scale in model.scales.items()}
    codes = {}
    for name, code in integers(model).items():
        del weights[f"{name}.weight"]
        codes[name] = pack(code).cpu()
    quantization = dict(bits=recipe.bits, method=recipe.method, symmetric=recipe.symmetric,
                        ffn_hadamard=recipe.has_r4, scales=scales)
    if recipe.format in BLOCK_FORMATS:
        scales = {name: tuple(x.cpu() for x in both) for name, both in stored_scales(model).items()}
        quantization |= dict(format=recipe.format, scales=scales)
    version = VERSIONS[recipe.format]
    state = dict(packing=PACKING, version=version, config=asdict(model.config), weights=weights,
                 codes=codes, quantization=quantization, options=options, data=data)
    save_archive(state, path)


def packed_model(state, path, device="cpu", int4: bool = False) -> Transformer:
    """The model in the contents of such a file. int4: with weights that stay packed.

    Raises ValueError, naming `path`, if they are not what save_packed writes.
    """
    kinds = {"packing": str, "config": dict, "weights": dict, "codes": dict, "quantization": dict,
             "options": dict, "data": dict}
    if not isinstance(state, dict) or not all(
            isinstance(state.get(name), kind) for name, kind in kinds.items()):
        raise ValueError(f"{path} is a torch file, but not a quantized model of quantize.py")
    format = str(state["quantization"].get("format", "int"))
    if (state.get("version"), state["packing"]) != (VERSIONS.get(format), PACKING):
        raise ValueError(f"{path} is of version {state.get('version')} or packed otherwise; this "
                         f"code reads version 2 for integers, 3 for {' and '.join(BLOCK_FORMATS)}")
    try:
        model = _unpacked_model(state)
    except (RuntimeError, ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{path} does not fit together ({reason}): write it again") from error
    model = model.requires_grad_(False).to(device).eval()
    if int4:
        if format in BLOCK_FORMATS:
            raise ValueError(f"{path} is in {format}: the int4 kernel takes integers only")
        use_int4_kernel(model, state["codes"])
    return model


def _unpacked_model(state: dict) -> Transformer:
    """Raises all kinds of errors for contents that do not fit together."""
    quantization = state["quantization"]
    weights = dict(state["weights"])
    scales = quantization["scales"]
    symmetric = quantization["symmetric"]
    format = quantization.get("format", "int")
    recipe = Recipe(quantization["bits"], quantization["method"], format, symmetric=symmetric)
    if blocks := BLOCK_FORMATS.get(format):
        if any(byte.dtype != torch.uint8 for byte, _ in scales.values()):
            raise ValueError("a scale is no byte")
        scales = {name: blocks.read(byte, tensor) for name, (byte, tensor) in scales.items()}
    if recipe.w != 4 or quantization["ffn_hadamard"] is not recipe.has_r4:
        raise ValueError("what was done to it contradicts itself")
    if symmetric not in (True, False):
        raise ValueError(f"symmetric is {symmetric!r}")
    if not all(s.dtype == torch.float32 and s.isfinite().all() and s.gt(0).all()
               for s in scales.values()):
        raise ValueError("a scale is no positive number")
    if len({W.dtype for W in weights.values()}) > 1:
        raise ValueError("weights of several precisions")
    for name, packed in state["codes"].items():
        if blocks and scales[name].shape[1] * blocks.group != 2 * packed.shape[1]:
            raise ValueError(f"{name} has {scales[name].shape[1]} scales a row")
        codes = from_integer(unpack(packed), format)
        W = per_column(scales[name], codes.shape[1]) * codes  # as quantize() computes it
        weights[f"{name}.weight"] = W.to(weights["norm.gain"].dtype)
    model = Transformer.from_weights(Config(**state["config"]), weights)
    if set(linears(model)) != set(scales):
        raise ValueError("not every linear has its scales")
    model.recipe = recipe
    model.scales = scales
    if recipe.has_r4:
        attach_ffn_hadamard(model)
    attach_rounding(model, recipe)
    return model


class Int4Linear(nn.Module):
    """x @ W^T on CUDA by torch's own int4 kernel. x and the result are bfloat16.

    A model that writes token by token spends its time reading weights, and packed ones are a
    quarter as long. The kernel rounds the scales to bfloat16, which makes the result close to the
    simulated model's, not equal. Raises ValueError for shapes that the kernel does not take.
    """

    def __init__(self, codes, scale):  # [out, in], [out, groups]
        super().__init__()
        n_out, n_in = codes.shape
        group = n_in // scale.shape[1]  # weights that share a scale
        self.group = next((g for g in (256, 128, 64, 32) if group % g == 0), 0)
        if not self.group or n_out % 8 or n_in % 128:
            raise ValueError(f"torch's int4 kernel takes no {n_out} x {n_in} weight with "
                             f"{scale.shape[1]} scales a row")
        swapped = codes.unflatten(1, (-1, 2)).flip(-1)  # here the high nibble is the even column
        packed = pack(swapped.flatten(1))
        self.register_buffer("packed", torch.ops.aten._convert_weight_to_int4pack(packed, 8))
        scales = per_column(scale, n_in // self.group).mT  # [in / group, out]
        scales = torch.stack([scales, torch.zeros_like(scales)], dim=-1)  # each with its zero
        self.register_buffer("scales", scales.bfloat16().contiguous())

    def forward(self, x):
        rows = x.bfloat16().flatten(0, -2)
        y = torch.ops.aten._weight_int4pack_mm(rows, self.packed, self.group, self.scales)
        return y.view(*x.shape[:-1], -1)


def use_int4_kernel(model, codes: dict):
    """Replace every linear of `model` by an Int4Linear, and make the rest bfloat16."""
    device = model.embed.weight.device
    if device.type != "cuda":
        raise ValueError("the int4 kernel needs a CUDA device; leave out --int4")
    model.bfloat16()
    for name, packed in codes.items():
        parent, _, child = name.rpartition(".")
        linear = Int4Linear(unpack(packed.to(device)), model.scales[name].to(device))
        setattr(model.get_submodule(parent), child, linear)
