"""How fast a training step is, and how near it comes to what the GPU can do.

    python train.py --osp --preset 1.4b --bench --batch-size 256

The steps are those of train.py's loop, on random tokens. Nothing is evaluated or saved. --steps
says how many are timed, after a few that are not: the first one compiles. Medians are reported.

MFU, model FLOP/s utilization, is the share of the GPU's arithmetic that goes into what the model by
definition needs: 6 FLOP a token for every weight of a matrix (2 forward, 4 backward), and the
causal half of attention. The optimizer's arithmetic and all moving of data count as loss. There are
two peaks to compare with: the datasheet's, which no program reaches, and the speed of one large
matrix product right before, which tells what this card can do today.

On a GPU the kernels of one more step are listed, those that take the longest first. On several
GPUs, waiting for the others counts as time of the nccl kernels.
"""

if __name__ == "__main__":
    raise SystemExit("error: run this as python train.py --bench")

import functools
import json
import statistics
import time

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile
from tqdm import tqdm

import train
from data.splits import open_datasets
from nanoosp.machine import peak_memory_gib
from nanoosp.methods import label
from nanoosp.options import command, parse
from nanoosp.ranks import Ranks, say
from tools.report import describe_speed

UNTIMED = 2  # steps: the first compiles, in the second the memory pools settle
KERNELS = 20  # that are listed
DATASHEET = {  # dense bfloat16 FLOP/s, by words in the name that torch gives the GPU
    "A100": 312e12,
    "H100 80GB HBM3": 989e12,
    "H100 PCIe": 756e12,
    "H200": 989e12,
}


class RandomTokens:
    """Stands in for a Dataset where only speed is measured."""

    def __init__(self, vocab_size: int, seq_len: int):
        self.meta, self.seq_len = {"vocab_size": vocab_size}, seq_len

    def batch(self, step: int, batch_size: int, rank: int = 0, world: int = 1) -> np.ndarray:
        rng = np.random.default_rng([step, rank])
        return rng.integers(self.meta["vocab_size"], size=(batch_size // world, self.seq_len + 1))


@command
def main(argv=None):
    began = time.perf_counter()
    opt = parse(train.Options, train.__doc__, argv)
    train.resolve(opt)
    say(f"{label(vars(opt))}, preset {opt.preset}, on {opt.device} in {opt.dtype}", opt.json)
    with Ranks.start(opt.device) as ranks:
        result, kernels = bench(opt, ranks)
        result["wall_s"] = time.perf_counter() - began
        if ranks.first:
            text = f"{describe_speed(result)}\n\n{kernels}".rstrip()
            print(json.dumps(result) if opt.json else text)


def bench(opt, ranks) -> tuple[dict, str]:
    """Time opt.steps training steps. Returns (what is measured, a GPU's table of kernels)."""
    began, device = time.perf_counter(), ranks.device
    result = {"gpu": None, "ranks": ranks.world}
    peaks = {}
    if device.startswith("cuda"):
        result["gpu"] = torch.cuda.get_device_name()
        speed = torch.tensor([matmul_flops(device)], device=device, dtype=torch.float64)
        peaks["mfu_matmul"] = ranks.mean(speed)[0]  # no two cards are equally fast
        result["matmul_tflops"] = peaks["mfu_matmul"] / 1e12
        for words, flops in DATASHEET.items():
            if words in result["gpu"]:
                peaks["mfu_datasheet"] = flops
    if opt.data == "random":
        data = RandomTokens(opt.vocab_size or 256, opt.seq_len)
    else:
        data, _ = open_datasets(opt.data, opt.seq_len, opt.seed, ranks)
    built = train.build(opt, data.meta["vocab_size"], ranks)
    model, step = built[0], functools.partial(timed_step, opt, ranks, data, built)
    marks = []
    for i in tqdm(range(UNTIMED + opt.steps), "bench", leave=False,
                  disable=None if ranks.first else True):
        marks.append(step(i))
        if i == 0:
            result["first_step_s"] = time.perf_counter() - began
    starts, middles, ends = zip(*marks[UNTIMED:])
    ms, optimizer_ms = median_ms(starts, ends), median_ms(middles, ends)
    tokens = opt.batch_size * opt.seq_len
    flops = flops_per_token(model, opt.seq_len) * tokens / ranks.world / ms * 1e3  # of each GPU
    result |= dict(tokens_per_step=tokens, step_ms=ms, forward_backward_ms=ms - optimizer_ms,
                   optimizer_ms=optimizer_ms, tokens_per_s=tokens / ms * 1e3,
                   model_tflops=flops / 1e12, peak_memory_gib=peak_memory_gib(device),
                   **{name: flops / peak for name, peak in peaks.items()})
    if result["gpu"] is None:
        return result, ""
    result["kernels"], text = longest_kernels(lambda: step(UNTIMED + opt.steps))
    return result, text


def timed_step(opt, ranks, data, built, i: int):
    """A step on batch number i, for what train.build() returned. Returns marks: its start, before the
    optimizers, its end."""
    _, optimizers, _ = built
    marks = [mark(ranks.device)]
    hook = optimizers[0].register_step_pre_hook(lambda *_: marks.append(mark(ranks.device)))
    batch = torch.from_numpy(data.batch(i, opt.batch_size, ranks.rank, ranks.world))
    train.optimizer_step(1, opt, batch.to(ranks.device), built, ranks)
    hook.remove()
    return *marks, mark(ranks.device)


def flops_per_token(model, seq_len: int) -> int:
    """What training on one token needs by definition.

    In attention a token sees T / 2 keys on average. Each key costs 2 d FLOP for its score and 2 d
    for its value, in every head and layer. The backward pass costs twice the forward pass.
    """
    config = model.config
    matrices = sum(p.numel() for p in model.parameters() if p.ndim == 2)
    if not config.tie_embeddings:
        matrices -= model.embed.weight.numel()  # looked up, not multiplied
    attention = config.n_layer * config.n_head * (seq_len // 2) * 4 * config.head_dim
    return 6 * matrices + 3 * attention


def matmul_flops(device: str, n: int = 8192) -> float:
    """FLOP/s of a bfloat16 product of random n x n matrices, kept up for two seconds.

    An idle card is faster for a few tenths of a second, until it meets its power limit, as it does
    in training. Random numbers draw more power than zeros.
    """
    a, b = (torch.randn(n, n, device=device, dtype=torch.bfloat16) for _ in range(2))
    marks, began = [], time.perf_counter()
    while time.perf_counter() - began < 2:
        for _ in range(10):
            a @ b
            marks.append(mark(device))
        marks[-1].synchronize()  # or Python would run far ahead of the GPU
    half = len(marks) // 2
    return 2 * n**3 / median_ms(marks[half:-1], marks[half + 1 :]) * 1e3


def mark(device: str):
    """This moment by the clock of the device. A GPU runs behind Python, which fills its queue."""
    if not device.startswith("cuda"):
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def median_ms(starts, ends) -> float:
    """The median time between two lists of marks, in milliseconds."""
    if isinstance(starts[0], float):
        return statistics.median(1e3 * (end - start) for start, end in zip(starts, ends))
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) for start, end in zip(starts, ends))


def longest_kernels(run) -> tuple[list[dict], str]:
    """The GPU's kernels that take the longest in run(): name, ms and share; and as text."""
    with profile(activities=[ProfilerActivity.CUDA], acc_events=True) as profiler:  # else it warns
        run()
        torch.cuda.synchronize()
    kernels = profiler.key_averages()
    total = sum(kernel.self_device_time_total for kernel in kernels)  # microseconds
    longest = sorted(kernels, key=lambda kernel: -kernel.self_device_time_total)[:KERNELS]
    listed = [dict(name=kernel.key, ms=kernel.self_device_time_total / 1e3,
                   share=kernel.self_device_time_total / total) for kernel in longest]
    return listed, kernels.table(sort_by="device_time_total", row_limit=KERNELS,
                                 max_name_column_width=90)
