"""Where does OSP's FFN keep its massive activations, and do the gains of SSNorm drive them?

    python results/ffn_hidden/trace.py official --preset toy --out FILE    any of VARIANTS below
    python results/ffn_hidden/trace.py adamw --preset tiny --trace-every 5 --out FILE

This trains one variant. `official` is exactly `train.py --osp`, and all other options are
train.py's. Every --trace-every steps the FFN's hidden state (what down_proj reads), the gains and
the FFN's weights are measured, on the same few validation windows.

FILE holds JSON lines. The first says what was run, and where. Then comes a record for step 0, every
--trace-every steps and the last step, which also has train.py's final evaluation. Lists have one
number a block. Errors are what rounding each token to 4 bits changes, squared, over the square of
the values. `gains` are the gain of every SSNorm, or the root mean square of an RMSNorm's gains.

Read it top to bottom: variants, what is measured, the run.
"""

import json
import os
import platform
import sys
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # so that it runs from any directory

import train  # noqa: E402 (it and the rest need the line above)
from data.splits import open_datasets  # noqa: E402
from eval import Watch, at_four_bits, evaluate, mean_loss, sites  # noqa: E402
from nanoosp.hadamard import hadamard_transform  # noqa: E402
from nanoosp.methods import OSP  # noqa: E402
from nanoosp.options import as_if_given, command, fail, flag, option, parse  # noqa: E402
from nanoosp.ranks import Ranks  # noqa: E402
from nanoosp.run_options import remembered  # noqa: E402
from quantize import Int  # noqa: E402

WINDOWS = 64  # validation sequences in a measurement: 16k tokens of toy, about one training step


class Variant(NamedTuple):
    """How a run differs from OSP."""

    question: str
    start: float = 0  # gains start at D to this power
    rule: str = "as built"  # the gains' optimizer: that of the matrices, "adamw" at --lr, "nobody"
    decay: float | None = None  # weight decay of the gains; None: --weight-decay, as all else
    options: dict = OSP  # train.py's


VARIANTS = {
    "official": Variant(
        "OSP as released: gains start at 1, Muon moves them by 0.2 lr a step, they decay"),
    "init-sqrt-d": Variant(
        "eq. 3 starts at gamma = sqrt(D); here in a norm that divides by the rms", start=0.5),
    "init-inverse": Variant(
        "eq. 3 with gamma = 1: dividing by the 2-norm is a gain of 1 / sqrt(D)", start=-0.5),
    "no-decay": Variant("is it the decay that holds the gains down?", decay=0),
    "adamw": Variant("is it Muon's rule for single numbers?", rule="adamw"),
    "adamw-no-decay": Variant(
        "the same without decay, as most AdamW recipes treat gains", rule="adamw", decay=0),
    "adamw-sqrt-d": Variant(
        "both readings that an own implementation may come to", start=0.5, rule="adamw"),
    "frozen": Variant(
        "are gains that learn needed for massive activations at all?", rule="nobody"),
    "decay-0.1": Variant(
        "do smaller weights make a smaller hidden state?",
        options=dict(OSP, weight_decay=0.1)),
    "rms": Variant("for comparison, a gain per channel", options=dict(OSP, norm="rms")),
    "adam": Variant(
        "for comparison, none of OSP",
        options=dict(optimizer="adam", norm="rms", embproj=False)),
}


@dataclass
class TraceOptions(train.Options):
    variant: str = option(None, "what to train", positional=True, choices=list(VARIANTS),
        group="the trace")
    trace_every: int = option(50, "steps between records (default: 50)")


def vary(variant: Variant, opt, model, optimizers):
    """Set the gains of a new model to their start, and give them the optimizer of the variant."""
    owner, group = next((optimizer, group) for optimizer in optimizers
                        for group in optimizer.param_groups if group["role"] == "gain")
    with torch.no_grad():
        for gain in group["params"]:
            gain.mul_(model.config.n_embd**variant.start)
    if variant.decay is not None:
        group["weight_decay"] = variant.decay
    if variant.rule == "as built":
        return
    owner.param_groups.remove(group)
    if variant.rule == "adamw":
        named = list(zip(group["param_names"], group["params"]))
        rates = dict(lr=opt.lr, peak_lr=opt.lr, weight_decay=group["weight_decay"])
        adamw = next(o for o in optimizers if isinstance(o, torch.optim.AdamW))
        adamw.add_param_group(dict(role="gain", params=named, **rates))
    else:
        for gain in group["params"]:  # a gradient that nobody clears would count in the clipping
            gain.requires_grad_(False)


# --------------------------------------------------------------------------------------------------
# What is measured. Statistics are of single tokens, [B, T, C] -> [B, T], as Watch takes them.


def squares(x):
    return x.float().square().sum(dim=-1)


def error_4bit(x):
    x = x.float()  # in bf16 the result would be rounded once more
    return squares(Int(4).round(x) - x)


def error_4bit_hadamard(x):
    return error_4bit(hadamard_transform(x.float()))  # a rotation, which changes no squares


def measure(model, data, batch_size: int) -> dict:
    """One record: the hidden state on WINDOWS windows, and the weights.

    The FFN's input is measured beside it for scale. It mixes many channels, so it is nearly
    Gaussian, whatever happens to the hidden state.
    """
    at, blocks = sites(model), model.blocks
    hidden, ffn_input = at["ffn hidden"], at["ffn input"]
    with ExitStack() as stack:

        def watch(*args, **kwargs):
            return stack.enter_context(Watch(model, *args, **kwargs))

        shape = watch(hidden, extremes=True)
        size, error = watch(hidden, squares), watch(hidden, error_4bit)
        rotated = watch(hidden, error_4bit_hadamard)
        input_size, input_error = watch(ffn_input, squares), watch(ffn_input, error_4bit)
        stream = watch(at["residual stream"])
        loss = mean_loss(model, data, data.evaluation_windows(WINDOWS), batch_size).item()

    def rms(tensors):
        return [t.detach().square().mean().sqrt().item() for t in tensors]

    def gains(norms):
        gains = [norm.gain for norm in norms]
        return rms(gains) if gains[0].ndim else [gain.item() for gain in gains]  # may be negative

    return {
        "windows_loss": loss,
        "gains": dict(attn_norm=gains(b.attn_norm for b in blocks),
                      ffn_norm=gains(b.ffn_norm for b in blocks), norm=gains([model.norm])[0]),
        "hidden_max": [largest["value"] for largest in shape.largest],
        "hidden_rms": (size.means() / model.config.n_ffn).sqrt().tolist(),
        "hidden_kurtosis": shape.means().tolist(),
        "hidden_error_4bit": (error.means() / size.means()).tolist(),
        "hidden_error_4bit_hadamard": (rotated.means() / size.means()).tolist(),
        "ffn_input_error_4bit": (input_error.means() / input_size.means()).tolist(),
        "residual_kurtosis": stream.means().mean().item(),
        **{f"{name}_weight_rms": rms(getattr(b.ffn, f"{name}_proj").weight for b in blocks)
           for name in ("gate", "up", "down")},
    }


# --------------------------------------------------------------------------------------------------
# The run


def trace(variant: Variant, opt, data, val, write):
    """Train as train.py does, in one process and without checkpoints. Calls write(record)."""
    ranks = Ranks(device=opt.device)
    built = model, optimizers, _ = train.build(opt, data.meta["vocab_size"], ranks)
    vary(variant, opt, model, optimizers)
    began, measuring = time.perf_counter(), 0.0

    def record(step, **more):
        nonlocal measuring
        start = time.perf_counter()
        result = dict(step=step, tokens=step * opt.batch_size * opt.seq_len, **more)
        result |= measure(model, val, opt.micro_batch_size)
        measuring += time.perf_counter() - start
        return result

    write(record(0))
    bar = tqdm(range(1, opt.steps + 1), opt.variant)
    for step in bar:
        batch = torch.from_numpy(data.batch(step - 1, opt.batch_size)).to(ranks.device)
        loss, _ = train.optimizer_step(step, opt, batch, built, ranks)
        bar.set_postfix_str(f"loss {loss:.3f}", refresh=False)
        if step % opt.trace_every == 0 and step < opt.steps:
            write(record(step, loss=loss))
    last = record(opt.steps, loss=loss)
    seconds = dict(seconds=time.perf_counter() - began, seconds_measuring=measuring)

    measured_on = (val, opt.eval_windows, opt.micro_batch_size, ranks)
    quantized = {
        bits: {method: result["val_loss"] for method, result in results.items()}
        for bits, results in at_four_bits(model, *measured_on).items()
    }
    write(dict(last, **seconds, **evaluate(model, *measured_on), quantized=quantized))


@command
def main(argv=None):
    opt = parse(TraceOptions, __doc__, argv)
    variant = VARIANTS[opt.variant]
    if "RANK" in os.environ:
        fail("a trace runs in one process: leave out torchrun")
    if not opt.out or opt.resume or opt.ablation or opt.bench or opt.dry_run:
        fail("name a file with --out; --resume, --ablation, --bench and --dry-run are train.py's "
             "alone")
    for name, value in variant.options.items():
        if name in opt.given and getattr(opt, name) != value:
            fail(f"{opt.variant} means {name} {value}: leave out {flag(name)}")
    as_if_given(opt, variant.options)
    train.resolve(opt)
    # this may fail, and then there should be no file
    datasets = open_datasets(opt.data, opt.seq_len, opt.seed, Ranks())
    hardware = f"{os.cpu_count()} x {platform.machine()} CPU"
    if opt.device == "cuda":
        hardware = torch.cuda.get_device_name()
    Path(opt.out).parent.mkdir(parents=True, exist_ok=True)
    with open(opt.out, "x", encoding="utf-8") as file:  # x: never over another trace

        def write(line: dict):
            print(json.dumps(line), file=file, flush=True)

        write(dict(variant=opt.variant, question=variant.question, start=variant.start,
                   rule=variant.rule, decay=variant.decay, options=remembered(opt),
                   hardware=hardware, torch=torch.__version__))
        trace(variant, opt, *datasets, write)


if __name__ == "__main__":
    main()
