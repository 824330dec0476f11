"""Where does OSP's FFN keep its massive activations, and do the gains of SSNorm drive them? One variant of training.

    python results/ffn_hidden/trace.py official --preset toy --out FILE       any of VARIANTS below
    python results/ffn_hidden/trace.py adamw --preset tiny --device cpu --steps 20 --trace-every 5 --out FILE

All other options are train.py's, and `official` is exactly `train.py --osp`. Every --trace-every steps the FFN's hidden
state (what down_proj reads), the gains and the FFN's weights are measured, on the same few validation windows.

FILE holds JSON lines: first what was run, and where; then a record for step 0, every --trace-every steps and the last
step, which also has train.py's final evaluation. Lists have one number a block. Errors are what rounding each token to
4 bits changes, squared, over the square of the values. Of an SSNorm `gains` is its gain, of an RMSNorm the root mean
square of its gains.

Read it top to bottom: variants, what is measured, the run.
"""

import json
import os
import platform
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # so that it runs from any directory

import train  # noqa: E402 (it and the rest need the line above)
from nanoosp.cli import precision, run  # noqa: E402
from eval import Watch, excess_kurtosis, mean_loss, sites  # noqa: E402
from quantize import hadamard_transform, quantize, round_tokens  # noqa: E402

WINDOWS = 64  # validation sequences in a measurement: 16k tokens of toy, about one training step


class Variant(NamedTuple):
    """How a run differs from OSP."""

    question: str
    start: float = 0  # gains start at D to this power
    rule: str = "as built"  # who trains the gains: the optimizer of the matrices, "adamw" at --lr, or "nobody"
    decay: float | None = None  # weight decay of the gains; None: --weight-decay, as everything
    options: dict = train.OSP  # train.py's


VARIANTS = {
    "official": Variant("OSP as released: gains start at 1, Muon moves them by 0.2 lr a step, they decay"),
    "init-sqrt-d": Variant("eq. 3 starts at gamma = sqrt(D); here in a norm that divides by the rms", start=0.5),
    "init-inverse": Variant("eq. 3 with gamma = 1: dividing by the 2-norm is a gain of 1 / sqrt(D)", start=-0.5),
    "no-decay": Variant("is it the decay that holds the gains down?", decay=0),
    "adamw": Variant("is it Muon's rule for single numbers?", rule="adamw"),
    "adamw-no-decay": Variant("the same without decay, as most AdamW recipes treat gains", rule="adamw", decay=0),
    "adamw-sqrt-d": Variant("both readings that an own implementation may come to", start=0.5, rule="adamw"),
    "frozen": Variant("are gains that learn needed for massive activations at all?", rule="nobody"),
    "decay-0.1": Variant("do smaller weights make a smaller hidden state?", options=dict(train.OSP, weight_decay=0.1)),
    "rms": Variant("for comparison, a gain per channel", options=dict(train.OSP, norm="rms")),
    "adam": Variant("for comparison, none of OSP", options=dict(optimizer="adam", norm="rms", embproj=False)),
}


def vary(variant: Variant, opt, model, optimizers):
    """Set the gains of a new model to where they start, and hand them to who trains them."""
    owner, group = next((o, g) for o in optimizers for g in o.param_groups if g["role"] == "gain")
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
        for gain in group["params"]:
            gain.requires_grad_(False)  # or its gradient, never cleared, would count when gradients are clipped


# ---------------------------------------------------------------------------------------------------------------------
# What is measured. Statistics are of single tokens, [B, T, C] -> [B, T], as Watch wants them.


def squares(x):
    return x.float().square().sum(dim=-1)


def error_4bit(x):
    x = x.float()  # what 4 bits cost, without what rounding their result to bf16 would add
    return squares(round_tokens(x, 4) - x)


def error_4bit_hadamard(x):
    return error_4bit(hadamard_transform(x.float()))  # a rotation: squares stay what they were


def measure(model, dataset, batch_size: int, autocast) -> dict:
    """One record: the hidden state on WINDOWS windows, with the input of the FFN beside it for scale, and the weights.

    The input is a mix of many channels, and so nearly Gaussian, whatever happens to the hidden state.
    """
    at, blocks = sites(model), model.blocks
    hidden, ffn_input = at["ffn hidden"], at["ffn input"]
    with ExitStack() as stack:

        def watch(*args, **kwargs):
            return stack.enter_context(Watch(model, *args, **kwargs))

        shape = watch(hidden, extremes=True)
        size, error, rotated = (watch(hidden, f) for f in (squares, error_4bit, error_4bit_hadamard))
        input_size, input_error = (watch(ffn_input, f) for f in (squares, error_4bit))
        stream = watch(at["residual stream"], excess_kurtosis)
        loss = mean_loss(model, dataset, dataset.evaluation_windows(WINDOWS), batch_size, autocast).item()

    def rms(tensors):
        return [t.detach().square().mean().sqrt().item() for t in tensors]

    def gains(norms):
        gains = [norm.gain for norm in norms]
        return [g.item() for g in gains] if gains[0].ndim == 0 else rms(gains)  # a single gain may turn negative

    return {
        "windows_loss": loss,
        "gains": dict(attn_norm=gains(b.attn_norm for b in blocks), ffn_norm=gains(b.ffn_norm for b in blocks),
                      norm=gains([model.norm])[0]),
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


# ---------------------------------------------------------------------------------------------------------------------
# The run


def trace(variant: Variant, opt, data, val, write):
    """Train as train.py does, but in one process, without checkpoints. Calls write(record)."""
    ranks, autocast, rows = train.Ranks(device=opt.device), precision(opt.device, opt.dtype), train.micro_batch(opt, 1)
    model, optimizers, forward = train.build(opt, data.meta["vocab_size"], ranks)
    vary(variant, opt, model, optimizers)
    began, measuring = time.perf_counter(), 0.0

    def record(step, **more):
        nonlocal measuring
        start = time.perf_counter()
        result = dict(step=step, tokens=step * opt.batch_size * opt.seq_len, **more)
        result |= measure(model, val, rows, autocast)
        measuring += time.perf_counter() - start
        return result

    write(record(0))
    bar = tqdm(range(1, opt.steps + 1), opt.variant)
    for step in bar:
        batch = torch.from_numpy(data.batch(step - 1, opt.batch_size)).to(ranks.device)
        loss, *_ = train.optimizer_step(step, opt, batch, model, forward, autocast, optimizers, ranks, 0)  # 0: go on
        bar.set_postfix_str(f"loss {loss:.3f}", refresh=False)
        if step % opt.trace_every == 0 and step < opt.steps:
            write(record(step, loss=loss))
    last = record(opt.steps, loss=loss)
    seconds = dict(seconds=time.perf_counter() - began, seconds_measuring=measuring)

    how = val, opt, ranks, autocast
    four = {method: train.evaluated(quantize(model, "4-4-4", method), *how)["val_loss"] for method in ("rtn", "had")}
    write(dict(last, **seconds, **train.evaluated(model, *how), quantized={"4-4-4": four}))


def main(argv=None):
    parser = train.build_parser()
    parser.description = __doc__.split("\n\nRead it")[0]
    parser.add_argument("variant", choices=list(VARIANTS))
    parser.add_argument("--trace-every", type=int, default=50, help="steps between records (default: 50)")
    opt = parser.parse(argv)
    variant = VARIANTS[opt.variant]
    if "RANK" in os.environ:
        parser.error("a trace runs in one process: leave out torchrun")
    if not opt.out or opt.resume or opt.ablation or opt.bench or opt.dry_run:
        parser.error("name a file with --out; --resume, --ablation, --bench and --dry-run are train.py's alone")
    for name, value in variant.options.items():
        if getattr(opt, name) not in (None, value):
            parser.error(f"{opt.variant} means {name} {value}: leave out --{name.replace('_', '-')}")
        setattr(opt, name, value)
    train.complete(opt, parser.error)
    hardware = torch.cuda.get_device_name() if opt.device == "cuda" else f"{os.cpu_count()} x {platform.machine()} CPU"
    options = {name: value for name, value in vars(opt).items() if name not in train.LAUNCH}
    try:
        datasets = train.open_datasets(opt, train.Ranks())  # what is wrong with them shows before there is a file
        Path(opt.out).parent.mkdir(parents=True, exist_ok=True)
        with open(opt.out, "x", encoding="utf-8") as file:  # x: never over another trace

            def write(line: dict):
                print(json.dumps(line), file=file, flush=True)

            write(dict(variant=opt.variant, question=variant.question, start=variant.start, rule=variant.rule,
                       decay=variant.decay, options=options, hardware=hardware, torch=torch.__version__))
            trace(variant, opt, *datasets, write)
    except ArithmeticError as error:  # the records so far are written
        sys.exit(f"error: {error}".replace(train.LAST_GOOD, "try a lower --lr"))
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    run(main)
