"""python eval.py TARGET... measures models, or lets them write. Its help is eval.py's docstring."""

if __name__ == "__main__":
    raise SystemExit("error: run this as python eval.py")

import json
import math
import sys
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from nanoosp.options import answer_before_torch, changed, command, fail, flag, option, parse
from nanoosp.recipe import METHODS, Recipe, RecipeOptions

# The paper's Figure 4: first the weights alone, then the activations alone.
SWEEP = [f"{w}-16-16" for w in range(8, 2, -1)] + [f"16-{a}-16" for a in range(8, 3, -1)]


@dataclass
class Options(RecipeOptions):
    targets: Path = option(None, "a run directory, a checkpoint, a quantized file or a Hugging "
                           "Face LLaMA directory", positional=True, many=True, metavar="TARGET",
                           required=True)
    text: Path = option(None, "measure on this text instead of the run's validation split",
                        group="measuring", metavar="FILE")
    tasks: str = option(None, "score on these tasks of lm-eval, or folders of its YAML files, as "
                        "osp (the paper's ten) or arc_easy,my/tasks; no text is measured then, "
                        "unless --text names one", metavar="NAME,...")
    seq_len: int = option(None, "tokens that the model reads at once: a block of --text, a "
                          "question of --tasks, a --prompt with what follows (default: the length "
                          "it was trained on; of a Hugging Face model its own, at most "
                          "2,048 but for --prompt)", low=3)
    as_published: bool = option(False, "also the kurtosis of the paper's script (tokens without "
                                "context)")
    batch_size: int = option(None, "sequences at once; changes speed and memory, not results")
    plot: Path = option(None, "write figures there (pip install -r requirements-extra.txt)",
                        metavar="DIR")

    bits: str = option(None, "the loss with these bits of weights, activations, and keys and "
                       "values: each 2 to 8 or 16, as 16-16-16,4-8-16,4-8-8,4-4-16,4-4-4 (default: "
                       "4-4-4; none: leave this out)", group="quantizing", metavar="W-A-KV,...")
    sweep: bool = option(False, "for --bits: weights of 8 to 3 bits, then activations of 8 to 4, "
                         "the rest left alone (the paper's Figure 4; --plot draws it)")
    methods: str = option(None, f"some of {','.join(METHODS)} (default: rtn,had)")
    calib: Path = option(None, "text to calibrate on (default: the training split)",
                         metavar="FILE")
    int4: bool = option(False, "compute with the packed weights of a four-bit file (CUDA; not "
                        "bit-equal)")

    prompt: str = option(None, "let the model continue this text instead of measuring it",
                         group="writing")
    tokens: int = option(400, "how many tokens to write (default: 400)")
    temperature: float = option(0.8, "0 is greedy, 1 samples as trained (default: 0.8)", low=0)
    top_k: int = option(None, "draw from the k likeliest tokens only")
    compile: bool = option(False, "on CUDA: torch.compile the step that writes a token. Takes seconds "
                           "first, so it pays for thousands of tokens")
    seed: int = option(0, "another seed draws another text", low=0, high=2**63)

    device: str = option(None, "default: the first of these that is there", group="the machine",
                         choices=["cuda", "mps", "cpu"])
    dtype: str = option(None, "of matrix products (default: bfloat16 on CUDA)",
                        choices=["float32", "bfloat16"])
    json: bool = option(False, "one JSON list on stdout, everything else on stderr")


@command
def main(argv=None):
    opt = parse(Options, evaluation.__doc__, argv)
    opt.device = pick_device(opt.device)
    recipes = check(opt)
    opt.dtype = opt.dtype or ("bfloat16" if opt.device == "cuda" else "float32")
    for path in opt.targets:
        if not path.exists():
            raise FileNotFoundError(f"there is nothing at {path}")
    if opt.prompt is not None:
        rows = [write(load_target(path, opt), opt) for path in opt.targets]
    else:
        rows = measure_all(opt, recipes)
    if opt.json:
        rows = json.loads(json.dumps(rows), parse_constant=lambda name: None)  # JSON has no NaN
        print(json.dumps(rows))
    elif opt.prompt is None:
        print(compare(rows), end="")


def check(opt) -> list[Recipe]:
    """The recipes that are asked for. Ends the program at the first option that cannot be, or that
    would do nothing."""
    for name in ("text", "tasks", "as_published", "plot", *quantizing(opt)):
        if opt.prompt is not None and getattr(opt, name):
            fail(f"--prompt writes instead of measuring: leave out {flag(name)}")
    for name in changed(opt, ("tokens", "temperature", "top_k", "compile", "seed")):
        if opt.prompt is None:
            fail(f"{flag(name)} is for writing: add --prompt TEXT, or leave it out to measure")
    if opt.compile and opt.device not in (None, "cuda"):
        fail("--compile is for CUDA; elsewhere text is written the simple way")
    if opt.seq_len and not (opt.text or opt.tasks or opt.prompt is not None):
        fail("--seq-len goes with --text, --tasks or --prompt; a run's own validation text is cut "
             "as in its training")
    if opt.tasks and not opt.text and (opt.plot or opt.as_published):
        fail("--tasks measures no text: with --plot or --as-published, name one with --text")
    if opt.sweep and opt.bits:
        fail("--sweep chooses the bits itself: leave out --bits")
    for name in quantizing(opt):
        if opt.bits == "none" and name != "bits":
            fail(f"{flag(name)} is for quantizing, and --bits none leaves that out")
    by_default = [] if opt.tasks and not opt.text and not quantizing(opt) else ["4-4-4"]
    settings = SWEEP if opt.sweep else opt.bits.split(",") if opt.bits else by_default
    if settings == ["none"]:
        settings = []
    methods = (opt.methods or "rtn,had").split(",")
    for method in methods:
        if method not in METHODS:
            fail(f"--methods {method!r}: use some of {','.join(METHODS)}")
    try:
        recipes = [opt.recipe(bits, method) for bits in settings for method in methods]
    except ValueError as error:
        fail(str(error))
    if opt.calib and not any(recipe.calibrates for recipe in recipes):
        fail("--calib does nothing for these --methods: only gptq, quarot and spinquant calibrate")
    if opt.center_embed and not any(recipe.center_embed for recipe in recipes):
        fail("--center-embed is for --methods quarot and spinquant")
    return recipes


def quantizing(opt) -> list[str]:
    """The names of the options for quantizing that were given."""
    return changed(opt, ("bits", "sweep", "methods", "calib", *RecipeOptions.__annotations__))


answer_before_torch("eval.py", Options, check)

import torch
from tqdm import tqdm

import eval as evaluation
from eval import (Watch, attention_sinks, gaussian_floor, headline, kurtosis_as_published,
                  mean_loss, perplexity, sites)
from nanoosp.batches import windows_at_once
from nanoosp.machine import peak_memory_gib, pick_device
from quantize import format_of, linears, quantize
from tools.loading import Loaded, load, names_of
from tools.report import check_same_data, compare, describe, in_short, scores
from tools.writing import write


def load_target(path: Path, opt) -> Loaded:
    loaded = load(path, opt.device, opt.int4)
    loaded.model.compute_dtype = getattr(torch, opt.dtype)
    return loaded


def measure_all(opt, recipes: list[Recipe]) -> list[dict]:
    """A row for every target. Each is described as soon as it is measured."""
    if opt.plot:
        from tools import plot  # fails before the work, not after it

        opt.plot.mkdir(parents=True, exist_ok=True)
    tasks = None
    if opt.tasks:
        from tools.harness import find_tasks  # only then: lm-eval takes seconds to start

        tasks = find_tasks(opt.tasks.split(","))
    rows, pictures = [], []
    shown = names_of(opt.targets)
    for path in opt.targets:
        loaded = load_target(path, opt)
        loaded.shown = shown[path]
        dataset = dataset_of(loaded, opt)
        if opt.plot:
            check_same_data([*rows, dict(target=loaded.name, data=dataset.fingerprint)])
        rows.append(measure_target(loaded, dataset, tasks, recipes, opt))
        if opt.plot:
            pictures.append(plot.Picture.of(loaded, rows[-1], dataset))
    if opt.plot:
        for path in plot.draw_all(pictures, opt.plot):
            print(f"wrote {path}", file=sys.stderr)
    return rows


def dataset_of(loaded: Loaded, opt):
    """What the loss is measured on: --text, or the validation split; None for tasks alone."""
    if opt.text:
        return loaded.text_blocks(opt.text, opt.seq_len or loaded.seq_len)
    return None if opt.tasks else loaded.dataset()


def measure_target(loaded: Loaded, dataset, tasks, recipes: list[Recipe], opt) -> dict:
    """All that is asked for of one target, as a row."""
    out = sys.stderr if opt.json else sys.stdout
    if loaded.recipe and not quantizing(opt):
        recipes = []  # it is quantized already
    calibrations = calibrate(loaded, recipes, opt.calib)  # may fail: not after hours of measuring
    row = dict(target=loaded.name, label=loaded.label)
    if dataset is not None:
        row = measure(loaded, dataset, opt.batch_size, opt.as_published)
        print(describe(loaded, row), end="\n\n", file=out, flush=True)
    if tasks:
        row |= measure_tasks(loaded, loaded.model, tasks, opt)
        print(f"{loaded.name} ({loaded.label}): {in_short(row)}", file=out, flush=True)

    def measure_copy(model) -> dict:
        result = {}
        if dataset is not None:
            result |= measure_added(model, dataset, row["val_loss"], opt.batch_size)
        if tasks:
            result |= measure_tasks(loaded, model, tasks, opt)
        return result

    if recipes and (quantizing(opt) or math.isfinite(row["val_loss"])):
        row["format"] = recipes[0].format
        row["quantized"] = measure_quantized(loaded, calibrations, measure_copy, out)
    return row


def measure(loaded: Loaded, dataset, batch_size=None, as_published=False) -> dict:
    """Everything that eval.py measures on text. `batch_size` None: what fits on small machines."""
    model, began = loaded.model, time.perf_counter()
    result = measure_everywhere(model, dataset, batch_size)
    result["tokens_per_s"] = result["tokens"] / (time.perf_counter() - began)
    result["peak_memory_gib"] = peak_memory_gib(str(next(model.parameters()).device))
    if as_published:
        result |= kurtosis_as_published(model, dataset)
    sinks = attention_sinks(model, dataset)
    return dict(target=loaded.name, label=loaded.label, data=dataset.fingerprint, **result,
                sinks=sinks)


def measure_everywhere(model, dataset, batch_size=None) -> dict:
    """What eval.evaluate() measures, perplexity, the kurtosis at all `sites`, and the `largest`
    activation of each state."""
    stream = "residual stream"
    with ExitStack() as stack:
        watches = {name: stack.enter_context(Watch(model, modules, extremes=name == stream))
                   for name, modules in sites(model).items()}
        loss = mean_loss(model, dataset, batch_size=batch_size, progress=True).item()
    at_sites = {name: dict(kurtosis=watch.means().tolist(), floor=gaussian_floor(watch.width))
                for name, watch in watches.items()}
    result = headline(model, dataset, loss, at_sites[stream]["kurtosis"])
    return dict(result, perplexity=perplexity(loss), tokens=watches[stream].tokens_seen,
                sites=at_sites, largest=watches[stream].largest)


def measure_added(model, dataset, exact_loss: float, batch_size=None) -> dict:
    """The loss of a quantized model, and how much more that is than `exact_loss`."""
    loss = mean_loss(model, dataset, batch_size=batch_size, progress=True).item()
    return dict(val_loss=loss, perplexity=perplexity(loss), added=loss - exact_loss)


def measure_tasks(loaded: Loaded, model, tasks: dict, opt) -> dict:
    """lm-eval's results for `model`, which is loaded.model or a quantized copy of it."""
    from lm_eval import evaluate
    from tools.harness import Answers

    seq_len = opt.seq_len or loaded.seq_len
    answers = Answers(loaded, model, seq_len, opt.batch_size or windows_at_once(seq_len))
    for task in tasks["tasks"].values():
        task.set_fewshot_seed(1234)  # every model gets the same shots
    results = evaluate(answers, tasks, bootstrap_iters=1000, log_samples=False)["results"]
    return dict(tasks=results, cut=answers.cut, **scores(results, tasks["group_map"]))


def calibrate(loaded: Loaded, recipes: list[Recipe], file=None) -> dict:
    """What each recipe calibrates on. Raises ValueError if the target cannot be quantized so."""
    if recipes and loaded.recipe:
        raise ValueError(f"{loaded.path} is quantized already: start from the model that was "
                         "trained")
    for recipe in recipes:
        # only weights are cut into groups, but activations too into blocks
        bits = recipe.w if recipe.group else min(recipe.w, recipe.a)
        n = format_of(recipe, recipe.w).group if bits < 16 else 0
        name = "--w-group" if recipe.group else f"{recipe.format}'s block of"
        for linear in linears(loaded.model).values():
            if n and linear.in_features % n:
                raise ValueError(f"{name} {n} does not divide the {linear.in_features} weights of "
                                 "a row")
    windows = {}  # those of a method do not depend on its bits: a text is tokenized once
    for recipe in recipes:
        if (recipe.method, recipe.calibrates) not in windows:
            windows[recipe.method, recipe.calibrates] = loaded.calibration(recipe, file)
    return {recipe: windows[recipe.method, recipe.calibrates] for recipe in recipes}


def measure_quantized(loaded: Loaded, calibrations: dict, measure_copy, out=None) -> dict:
    """Bits -> method -> measure_copy(the model quantized so), for all recipes of `calibrations`. Each
    result is written to the file `out`, if there is one, as soon as it is known."""
    results = {}
    title = f"quantize {loaded.name}"
    for recipe, windows in tqdm(calibrations.items(), title, leave=False, disable=None):
        result = measure_copy(quantize(loaded.model, recipe, windows))
        if out:
            tqdm.write(f"{loaded.name} {recipe}: {in_short(result)}", out)
            out.flush()
        results.setdefault(recipe.bits, {})[recipe.method] = result
    return results
