"""python quantize.py TARGET --out FILE or --hf DIR. Its help is the docstring of quantize.py."""

if __name__ == "__main__":
    raise SystemExit("error: run this as python quantize.py")

import time
from dataclasses import dataclass
from pathlib import Path

from nanoosp.options import answer_before_torch, changed, command, fail, flag, option, parse
from nanoosp.recipe import METHODS, Recipe, RecipeOptions


@dataclass
class Options(RecipeOptions):
    target: Path = option(None, "a run directory, a checkpoint, or a Hugging Face LLaMA directory",
                          positional=True, metavar="TARGET")
    out: Path = option(None, "where the model goes, its weights in 4 bits", metavar="FILE")
    hf: Path = option(None, "where it goes as a Hugging Face LLaMA directory: as trained, or with "
                      "--bits in 4 bits", metavar="DIR")
    method: str = option(None, "each builds on those before it (default: gptq)", choices=METHODS)
    bits: str = option(None, "weights-activations-KV: 4, and 2 to 8 or 16 for \"as it is\" "
                       "(default with --out: 4-4-4)", metavar="W-A-KV")
    calib: Path = option(None, "text to calibrate on (default: the run's own training split)",
                         metavar="FILE")
    steps: int = option(Recipe.steps, "of SpinQuant's search: more find better rotations "
                        f"(default: {Recipe.steps})", low=0)
    lr: float = option(Recipe.lr, "of SpinQuant; if its loss jumps, lower it "
                       f"(default: {Recipe.lr})", low=0, high=2**63)
    seed: int = option(Recipe.seed, "of the random rotations (default: 0)", low=0, high=2**63)
    dtype: str = option(None, "of embedding, head, norms and all arithmetic (default: as in "
                        "TARGET)", choices=["float32", "bfloat16"])
    device: str = option(None, "default: the first of these that is there",
                         choices=["cuda", "mps", "cpu"])


@command
def main(argv=None):
    opt = parse(Options, quantization.__doc__, argv)
    recipe = check(opt)
    device = pick_device(opt.device)
    loaded = load(opt.target, device)
    if loaded.recipe:
        raise ValueError(f"{opt.target} is quantized already: name the model that it was made from")
    if opt.hf and not opt.bits:
        export_llama(loaded, opt.hf)
    else:
        export_four_bits(loaded, opt, recipe, device)


def check(opt) -> Recipe:
    """End the program at the first option that cannot be, or that would do nothing."""
    if bool(opt.out) == bool(opt.hf):
        problem = "both are not allowed" if opt.out else "one is needed"
        fail(f"--out --hf: {problem}. --out FILE quantizes, --hf DIR writes the model as trained, or "
             "with --bits for other programs")
    goal, path = ("--hf", opt.hf) if opt.hf else ("--out", opt.out)
    if path.exists() or path.is_symlink():
        fail(f"{goal} {path} exists: remove it, or name another place")
    if not path.parent.is_dir():
        fail(f"{goal} {path} must be in a directory that exists")
    given = changed(opt, opt.given - {"target", "out", "hf", "device"})
    if opt.hf and given and not opt.bits:
        fail(f"{flag(min(given))} goes with --out, or --bits 4-16-16: --hf alone writes the model as "
             "it was trained")
    try:
        recipe = opt.recipe(opt.bits or Recipe.bits, opt.method or "gptq", seed=opt.seed,
                            steps=opt.steps, lr=opt.lr, portable=bool(opt.hf))
    except ValueError as error:
        fail(str(error))
    if recipe.w != 4:
        fail(f"--bits {recipe.bits}: {goal} holds weights of 4 bits; eval.py --bits simulates "
             "other numbers")
    if opt.hf and opt.bits:
        check_portable(opt, recipe)
    needs = dict(calib="gptq", center_embed="quarot", seed="quarot", steps="spinquant",
                 lr="spinquant")
    for name, method in needs.items():
        if name in given and not recipe.does(method) and not (name == "calib" and needs_inputs(recipe)):
            fail(f"{flag(name)} does nothing for --method {recipe.method}, only from {method} on")
    return recipe


def check_portable(opt, recipe: Recipe):
    """End the program at what other programs do not do, or do otherwise."""
    if recipe.kv < 16:
        fail(f"--bits {recipe.bits}: no other program rounds keys and values so: use 4-16-16")
    if recipe.a < 16 and recipe.format == "int":
        fail(f"--bits {recipe.bits}: other programs round activations to other integers: use 4-16-16, "
             "or --format nvfp4")
    if recipe.method == "had":
        fail("--method had: what it adds is a rotation while the model runs, which other programs "
             "lack: use rtn, gptq or quarot")
    if opt.dtype == "float32" and recipe.format != "int":
        fail(f"--dtype float32: transformers computes with {recipe.format} in bfloat16 only")


def needs_inputs(recipe: Recipe) -> bool:
    """Does a directory hold constants for activations, from calibration?"""
    return recipe.portable and recipe.format == "nvfp4" and recipe.a < 16


answer_before_torch("quantize.py", Options, check)

import torch

import quantize as quantization
from nanoosp.machine import peak_memory_gib, pick_device
from quantize import quantize
from tools.four_bit import KERNELS, check_rows, input_scales
from tools.huggingface import last_evaluation, save_llama
from tools.loading import Loaded, load
from tools.packed import save_packed


def evaluation_of(loaded: Loaded) -> dict | None:
    """How good a run is by its log, if it has one."""
    if loaded.step is None:
        return None
    run = loaded.path if loaded.path.is_dir() else loaded.path.parent
    return last_evaluation(run / "log.jsonl", loaded.step)


def export_llama(loaded: Loaded, directory: Path):
    save_llama(loaded.model, directory, loaded.options, loaded.data, evaluation_of(loaded))
    print(f"{directory}: a plain LLaMA, for AutoModelForCausalLM and AutoTokenizer.from_pretrained")


def export_four_bits(loaded: Loaded, opt: Options, recipe: Recipe, device: str):
    calibration = loaded.calibration(recipe, opt.calib)
    n = sum(p.numel() for p in loaded.model.parameters())  # tied ones count once
    if opt.hf:
        check_rows(loaded.model, recipe)
    if opt.dtype or recipe.portable and recipe.format != "int":  # these are unpacked to bfloat16
        loaded.model.to(getattr(torch, opt.dtype or "bfloat16"))
    began = time.perf_counter()
    model = quantize(loaded.model, recipe, calibration)
    seconds = time.perf_counter() - began
    if opt.hf:
        scales = None
        if needs_inputs(recipe):
            tokens = loaded.calibration(Recipe(method="gptq"), opt.calib)[:, :-1]
            scales = input_scales(model, tokens.to(device))
        save_llama(model, opt.hf, loaded.options, loaded.data, evaluation_of(loaded),
                   input_scales=scales)
    else:
        save_packed(model, opt.out, loaded.options, loaded.data)
    files = [opt.out] if opt.out else opt.hf.glob("*.safetensors")
    size = sum(file.stat().st_size for file in files)
    print(f"{recipe} in {seconds:.1f} s, peak memory "
          f"{peak_memory_gib(device):.2f} GiB: {opt.out or opt.hf}, {size / 2**20:.2f} MiB, which is "
          f"{size / 2 / n:.3f} of what the {n:,} weights of {loaded.name} take in bf16 (embedding "
          "and head are not rounded)")
    if opt.hf and recipe.group not in KERNELS:
        print("vLLM's Marlin kernels for GPUs take groups of 32, 64 or 128 weights or whole rows, "
              f"not of {recipe.group}: transformers reads this directory, and vLLM on a CPU")
