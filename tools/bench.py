"""How fast a training step is, and how near to what the GPU can do.

    python train.py --osp --preset 1.4b --bench --batch-size 256

The step is train.py's own `optimizer_step`, on random tokens; nothing is evaluated, nothing saved. --steps says how
many steps are counted; medians are reported. A few go before them uncounted, since the first compiles.

MFU, model FLOP/s utilisation, is the part of the GPU's arithmetic that went into what the model by definition needs: 6
FLOP a token for every weight of a matrix (2 forwards, 4 backwards), and the causal half of attention. What the
optimizer computes counts as loss, and so does all moving of data. There are two peaks to compare with: the vendor's,
which no program reaches, and that of one large matrix product just before, which tells this card on this day.

Last, where the time of a GPU goes, in forward and backward of one more step: shares of its kernels' time, told apart by
the names that torch.compile gives them. Of several GPUs, sums go on beside the rest, and waiting counts as summing.
"""

import re
import statistics
import time
from collections import Counter

import torch
from torch.profiler import ProfilerActivity, profile
from tqdm import tqdm

from nanoosp.cli import peak_memory_gib, precision
from model import PRESETS
from train import accumulate_gradients, build, keep_what_compiling_left, micro_batch, open_datasets, optimizer_step

UNCOUNTED = 2  # steps: the first compiles, in the second the memory pools settle
DATASHEET = {  # dense bfloat16 FLOP/s, by words in the name that torch gives the GPU
    "A100": 312e12,
    "H100 80GB HBM3": 989e12,
    "H100 PCIe": 756e12,
    "H200": 989e12,
}
KERNELS = {  # what a GPU's kernel is for, by words in the name its author or torch.compile gave it: the first match
    "attention": "sdpa|flash|fmha|cudnn",
    "matrix products": "nvjet|gemm|gemv|splitk|cutlass",
    "sums over GPUs": "nccl",
    "loss": "softmax",
    "SwiGLU": "silu",
    "norms and residual stream": r"rms_norm|view_add_\d+$",
    "RoPE and layout of heads": "_(cat|clone)_",
    "weight casts, sums of gradients": r"to_copy(_t)?_\d+$|CUDAFunctor_add",
    "other": "",
}


class RandomTokens:
    """Has what training needs of a Dataset, and no text."""

    def __init__(self, vocab_size: int, seq_len: int):
        self.meta, self.seq_len = {"vocab_size": vocab_size}, seq_len

    def batch(self, step: int, batch_size: int, rank: int = 0, world: int = 1):
        generator = torch.Generator().manual_seed(step * world + rank)
        shape = (batch_size // world, self.seq_len + 1)
        return torch.randint(self.meta["vocab_size"], shape, generator=generator).numpy()


def flops_per_token(model, seq_len: int) -> int:
    """What training on one token needs by definition. Attention: a token sees T / 2 keys on average, and each costs 2 d
    FLOP for its score and 2 d for its value, in every head and layer; backwards it is twice that again."""
    config = model.config
    matrices = sum(p.numel() for p in model.parameters() if p.ndim == 2)
    if not config.tie_embeddings:
        matrices -= model.embed.weight.numel()  # looked up, not multiplied
    attention = config.n_layer * config.n_head * (seq_len // 2) * 4 * config.head_dim
    return 6 * matrices + 3 * attention


def mark(device: str):
    """This moment by the clock of the device: a GPU works off its queue long after Python has filled it."""
    if not device.startswith("cuda"):
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def median_ms(starts, ends) -> float:
    """Of the times between two lists of marks, in milliseconds."""
    if isinstance(starts[0], float):
        return statistics.median(1e3 * (end - start) for start, end in zip(starts, ends))
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) for start, end in zip(starts, ends))


def matmul_flops(device: str, n: int = 8192) -> float:
    """FLOP/s of a bfloat16 product of random n x n matrices, kept up for two seconds: a card that was idle is faster
    for some tenths, until its power limit shows, as it does in training. (Zeros draw less power: they are faster.)"""
    a, b = (torch.randn(n, n, device=device, dtype=torch.bfloat16) for _ in range(2))
    marks, began = [], time.perf_counter()
    while time.perf_counter() - began < 2:
        for _ in range(10):
            a @ b
            marks.append(mark(device))
        marks[-1].synchronize()  # Python is far ahead
    half = len(marks) // 2
    return 2 * n**3 / median_ms(marks[half:-1], marks[half + 1 :]) * 1e3


def kind(kernel: str) -> str:
    return next(what for what, words in KERNELS.items() if re.search(words, kernel, re.IGNORECASE))


def where_time_goes(run) -> dict[str, float]:
    """Shares of a GPU's time in what run() computes there, by KERNELS, the largest first; none if it tells no times."""
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        run()
        torch.cuda.synchronize()
    us = Counter()
    for event in profiler.key_averages():
        us[kind(event.key)] += event.device_time_total
    return {what: time / us.total() for what, time in us.most_common() if time}


def bench(opt, ranks) -> dict:
    """Time opt.steps training steps. Returns what report() prints; a GPU's peaks only if they are known."""
    began, on_gpu = time.perf_counter(), ranks.device.startswith("cuda")
    result = {"gpu": torch.cuda.get_device_name() if on_gpu else None, "ranks": ranks.world}
    peaks = {}
    if on_gpu:
        mine = torch.tensor([matmul_flops(ranks.device)], device=ranks.device, dtype=torch.float64)
        peaks["mfu_matmul"] = ranks.mean(mine)[0]  # no two cards are equally fast
        result["matmul_tflops"] = peaks["mfu_matmul"] / 1e12
        for words, flops in DATASHEET.items():
            if words in result["gpu"]:
                peaks["mfu_datasheet"] = flops
    data = open_datasets(opt, ranks)[0] if opt.data != "random" else RandomTokens(
        opt.vocab_size or PRESETS[opt.preset].get("vocab_size", 256), opt.seq_len)
    model, optimizers, forward = build(opt, data.meta["vocab_size"], ranks)

    steps, before, after = [], [], []  # marks
    optimizers[0].register_step_pre_hook(lambda *_: before.append(mark(ranks.device)))
    optimizers[-1].register_step_post_hook(lambda *_: after.append(mark(ranks.device)))
    bar = tqdm(range(UNCOUNTED + opt.steps), "bench", leave=False, disable=True if ranks.rank else None)
    for i in bar:
        steps.append(mark(ranks.device))
        batch = torch.from_numpy(data.batch(i, opt.batch_size, ranks.rank, ranks.world)).to(ranks.device)
        optimizer_step(1, opt, batch, model, forward, precision(opt.device, opt.dtype), optimizers, ranks, 0)
        if i == 0:
            result["first_step_s"] = time.perf_counter() - began
            if opt.compile:
                keep_what_compiling_left()
    steps.append(mark(ranks.device))

    ms = median_ms(steps[UNCOUNTED:-1], steps[UNCOUNTED + 1 :])
    optimizer_ms = median_ms(before[UNCOUNTED:], after[UNCOUNTED:])
    tokens = opt.batch_size * opt.seq_len
    flops = flops_per_token(model, opt.seq_len) * tokens / ranks.world / ms * 1e3  # FLOP/s of each GPU
    peak_memory = peak_memory_gib(ranks.device)
    if on_gpu:
        result["forward_backward_shares"] = where_time_goes(lambda: accumulate_gradients(
            forward, batch, micro_batch(opt, ranks.world), precision(opt.device, opt.dtype), ranks.world))
    return dict(result, tokens_per_step=tokens, step_ms=ms, forward_backward_ms=ms - optimizer_ms,
                optimizer_ms=optimizer_ms, tokens_per_s=tokens / ms * 1e3, model_tflops=flops / 1e12,
                peak_memory_gib=peak_memory, **{name: flops / peak for name, peak in peaks.items()})


def report(r: dict) -> str:
    lines = f"""
speed              {r["tokens_per_s"]:,.0f} tokens/s, {r["tokens_per_step"]:,} tokens a step, {r["ranks"]} process(es)
step               {r["step_ms"]:,.1f} ms: forward and backward {r["forward_backward_ms"]:,.1f}, """
    lines += f"""optimizer {r["optimizer_ms"]:,.1f} ({r["optimizer_ms"] / r["step_ms"]:.1%})
first step         {r["first_step_s"]:.0f} s after the start, compilation included
peak memory        {r["peak_memory_gib"]:.2f} GiB
model arithmetic   {r["model_tflops"]:.1f} TFLOP/s for each process"""
    if "mfu_matmul" in r:
        lines += f"\nMFU                {r['mfu_matmul']:.1%} of the {r['matmul_tflops']:.0f} TFLOP/s of a product"
    if "mfu_datasheet" in r:
        lines += f"\n                   {r['mfu_datasheet']:.1%} of the datasheet's for {r['gpu']}"
    if r.get("forward_backward_shares"):
        shares = [f"{what} {share:.1%}" for what, share in r["forward_backward_shares"].items()]
        lines += "\nforward, backward  " + "\n                   ".join(shares)
    return lines
