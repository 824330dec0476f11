"""Why are the weights of one model harder to round than another's? A line of JSON for each model:

    python results/rounding/measure.py runs/A runs/B >> results/rounding/toy.jsonl

Means over all linears of the blocks, rounded to nearest at 4 bits, each alone:
    weight_error    |Q - W| / |W|, in Frobenius norms
    output_error    |X (Q - W)^T| / |X W^T|, for inputs X of 16 windows of validation text
    stable_rank     |W|_F^2 / |W|_2^2 over the rank: 1 if all directions of W are equally strong
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # so that it runs from any directory

from nanoosp.options import answer_before_torch, command, option, parse  # noqa: E402 (it needs the line above)


@dataclass
class RoundingOptions:
    targets: Path = option(None, "run directories", positional=True, many=True, metavar="RUN",
                           required=True)


answer_before_torch("results/rounding/measure.py", RoundingOptions)

import torch  # noqa: E402

from model import hooked  # noqa: E402
from nanoosp.machine import pick_device  # noqa: E402
from quantize import Int, linears, per_column  # noqa: E402
from tools.loading import load  # noqa: E402


@torch.no_grad()
def measure(model, windows) -> dict:
    """The three means for a folded `model` and `windows` [n, T + 1] of text."""
    inputs, values = {}, []

    def keep(name):
        return lambda linear, x, output: inputs.__setitem__(name, x[0].flatten(0, -2))

    with hooked([(linear, keep(name)) for name, linear in linears(model).items()]):
        model(windows[:, :-1])
    for name, linear in linears(model).items():
        W, format = linear.weight, Int(4)
        scale = per_column(format.scale(W), W.shape[1])
        Q = scale * format.code(W.float() / scale)
        X, W, Q = (tensor.double() for tensor in (inputs[name], W, Q))
        S = torch.linalg.svdvals(W)
        values.append([(Q - W).norm() / W.norm(), (X @ (Q - W).mT).norm() / (X @ W.mT).norm(),
                       S.square().sum() / S[0] ** 2 / len(S)])
    means = torch.tensor(values).mean(dim=0).tolist()
    return dict(zip(("weight_error", "output_error", "stable_rank"), means))


@command
def main(argv=None):
    opt = parse(RoundingOptions, __doc__, argv)
    device = pick_device(None)
    for path in opt.targets:
        loaded = load(path, device)
        if loaded.recipe:
            raise ValueError(f"{path} is quantized already: start from the model that was trained")
        data = loaded.dataset()
        windows = torch.from_numpy(data.windows(data.evaluation_windows(16))).to(device)
        kept = {name: loaded.options[name] for name in ("preset", "lr", "weight_decay", "seed")}
        result = measure(loaded.model.fold().eval(), windows)
        print(json.dumps(dict(label=loaded.label, **kept, **result)), flush=True)


if __name__ == "__main__":
    main()
