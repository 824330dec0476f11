"""How fast 1.4b trains, writes and is quantized, one thing after another in one process.

    python results/speed/measure.py train osp:float8:16 hf:bfloat16:8
    python results/speed/measure.py write
    python results/speed/measure.py gptq

It prints lines of JSON. Those of float8.jsonl, writing.jsonl and gptq.jsonl beside this file also
say which host, or which code, they are of.

train: three steps of 256 x 2048 random tokens, optimizer included, of each METHOD:DTYPE:MICRO-BATCH
    osp, adam      train.py's own models and optimizers
    adam16         adam, with a residual stream in bfloat16 as OSP's, where it is otherwise float32
    hf             transformers' LLaMA, compiled, with torch.optim.Muon and fused AdamW
    DTYPE          bfloat16; float8, of the blocks; float8-all, of head and EmbProj too; torchao and
                   torchao-all, its float8 instead of ours
write: random weights, in bfloat16 and packed in four bits; the simple way, with a graph, compiled.
gptq: 24 layers on 128 x 2048 random tokens, with a hash of the codes.
"""

import gc
import hashlib
import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # so that it runs from any directory

from nanoosp.options import answer_before_torch, command, fail, option, parse  # noqa: E402 (it needs the line above)


@dataclass
class SpeedOptions:
    what: str = option(None, "train, write or gptq", positional=True, choices=["train", "write", "gptq"],
                       required=True)
    models: str = option(None, "for train: as adam:bfloat16:8", positional=True, many=True,
                         metavar="MODEL")
    small: bool = option(False, "a small model on a CPU, to see that it runs")


answer_before_torch("results/speed/measure.py", SpeedOptions)

import torch  # noqa: E402
import torch.nn as nn  # noqa: E402

import train  # noqa: E402
from model import Transformer  # noqa: E402
from nanoosp.float8 import Float8Linear  # noqa: E402
from nanoosp.machine import peak_memory_gib  # noqa: E402
from nanoosp.ranks import Ranks  # noqa: E402
from quantize import Int, Recipe, linears, per_column, quantize  # noqa: E402
from tools.bench import RandomTokens, matmul_flops, median_ms, timed_step  # noqa: E402
from tools.packed import Int4Linear  # noqa: E402
from tools.writing import Writer, generate  # noqa: E402


DTYPES = ("bfloat16", "float8", "float8-all", "torchao", "torchao-all")


def emit(**record):
    print(json.dumps(record), flush=True)


# --------------------------------------------------------------------------------------------------
# Training


def transformers_model(opt, device):
    """(model, optimizers, forward) like train.build()'s, of transformers and torch alone."""
    from transformers import LlamaConfig, LlamaForCausalLM

    c = train.model_config(opt, 256)
    with torch.device(device):
        model = LlamaForCausalLM(LlamaConfig(
            vocab_size=c.vocab_size, hidden_size=c.n_embd, intermediate_size=c.n_ffn,
            num_hidden_layers=c.n_layer, num_attention_heads=c.n_head, use_cache=False,
            max_position_embeddings=opt.seq_len, tie_word_embeddings=False))
    compiled = torch.compile(model)
    is_table = lambda name, p: p.ndim < 2 or "embed" in name or "lm_head" in name
    matrices = [p for name, p in model.named_parameters() if not is_table(name, p)]
    rest = [p for name, p in model.named_parameters() if is_table(name, p)]
    muon = torch.optim.Muon(matrices, lr=1e-5, adjust_lr_fn="match_rms_adamw")

    def forward(tokens, targets):
        with torch.autocast(torch.device(device).type, torch.bfloat16):
            logits = compiled(input_ids=tokens).logits
        return nn.functional.cross_entropy(logits.float().flatten(0, 1), targets.flatten())

    return model, [muon, torch.optim.AdamW(rest, lr=1e-5, fused=device != "cpu")], forward


def in_other_float8(model, dtype: str):
    """float8-all, torchao or torchao-all: all linears or the blocks', ours or torchao's."""
    for parent in [*model.blocks.modules()] if dtype == "torchao" else [*model.modules()]:
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Linear) and dtype == "float8-all":
                child.__class__ = Float8Linear
            elif isinstance(child, nn.Linear):
                from torchao.float8 import convert_to_float8_training

                setattr(parent, name, convert_to_float8_training(nn.Sequential(child))[0])


def time_training(name: str, small: bool):
    method, dtype, micro = name.split(":")
    kinds = {"osp": DTYPES, "adam": DTYPES[:2], "adam16": DTYPES[:3], "hf": DTYPES[:1]}
    if dtype not in kinds.get(method, ()):
        fail(f"{name}: that was not built; see --help")
    shape = "--preset tiny --device cpu --batch-size 16" if small else "--preset 1.4b --batch-size 256"
    argv = [*shape.split(), "--bench", "--data", "random", "--lr", "1e-5", "--micro-batch-size", micro,
            "--dtype", "bfloat16" if "-all" in dtype or dtype == "torchao" else dtype]
    opt = parse(train.Options, "", argv + ["--osp"] * (method == "osp"))
    train.resolve(opt)
    ranks, began = Ranks(device=opt.device), time.perf_counter()
    data = RandomTokens(train.model_config(opt, 256).vocab_size, opt.seq_len)
    if method == "hf":
        built = transformers_model(opt, ranks.device)
    else:
        built = train.build(opt, data.meta["vocab_size"], ranks)
    if opt.dtype != dtype:
        in_other_float8(built[0], dtype)
    if method == "adam16":
        built[0].at_embed.register_forward_hook(lambda module, inputs, x: x.bfloat16())
    marks = [timed_step(opt, ranks, data, built, 0)]
    first = time.perf_counter() - began
    marks += [timed_step(opt, ranks, data, built, i) for i in range(1, 4)]
    starts, middles, ends = zip(*marks[1:])
    ms = median_ms(starts, ends)
    emit(model=name, tokens_per_s=opt.batch_size * opt.seq_len / ms * 1e3, step_ms=ms,
         optimizer_ms=median_ms(middles, ends), first_step_s=first,
         peak_memory_gib=peak_memory_gib(ranks.device))


# --------------------------------------------------------------------------------------------------
# Writing and quantizing


def random_model(small: bool) -> Transformer:
    preset = "tiny" if small else "1.4b"
    opt = parse(train.Options, "", ["--preset", preset, "--bench", "--data", "random", "--device", "cpu" if small else "cuda"])
    train.resolve(opt)
    config = train.model_config(opt, 256)
    torch.manual_seed(0)
    with torch.device("cpu" if small else "cuda"):
        return Transformer(config).requires_grad_(False)


@torch.no_grad()
def time_writing(small: bool):
    model = random_model(small).bfloat16()
    model.compute_dtype, prompt, n, window = torch.bfloat16, list(range(100)), 400, 512 if small else 2048
    for weights in ("bfloat16", "int4"):
        if weights == "int4":
            for name, linear in linears(model).items() if not small else ():
                W, format = linear.weight.float(), Int(4)
                scale, (parent, _, child) = format.scale(W), name.rpartition(".")
                int4 = Int4Linear(format.code(W / per_column(scale, W.shape[1])), scale)
                setattr(model.get_submodule(parent), child, int4)
        length, compile = len(prompt) + n, not small
        ways = {"simple, first": lambda: model, "simple": lambda: model,
                "graph": lambda: Writer(model, length),
                "compiled": lambda: Writer(model, length, compile),
                "compiled, full window": lambda: Writer(model, window, compile)}
        for way, make in ways.items():
            writer = None
            gc.collect()  # a writer and its graph go only now
            writer = make()
            if not small:
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
            times = [time.perf_counter()]
            for _ in generate(writer, prompt, n, window, temperature=0.8):
                times.append(time.perf_counter())
            emit(weights=weights, way=way, tokens_per_s=(n - 2) / (times[-1] - times[2]),
                 first_s=times[1] - times[0], second_s=times[2] - times[0],
                 peak_memory_gib=peak_memory_gib("cpu" if small else "cuda"))


def time_gptq(small: bool):
    model = random_model(small)
    rows, length = (8, 65) if small else (128, 2049)
    tokens = torch.randint(model.config.vocab_size, (rows, length), device=model.embed.weight.device)
    began = time.perf_counter()
    quantized = quantize(model, Recipe("4-16-16", "gptq"), tokens)
    if not small:
        torch.cuda.synchronize()
    seconds, codes = time.perf_counter() - began, hashlib.sha256()
    for name, linear in sorted(linears(quantized).items()):
        codes.update(linear.weight.cpu().numpy().tobytes())
    emit(gptq_s=seconds, sha256=codes.hexdigest(), peak_memory_gib=peak_memory_gib(str(tokens.device)))


@command
def main(argv=None):
    opt = parse(SpeedOptions, __doc__, argv)
    on_gpu = torch.cuda.is_available() and not opt.small
    emit(gpu=torch.cuda.get_device_name() if on_gpu else None, torch=torch.__version__)
    if opt.what == "write":
        time_writing(opt.small)
    if opt.what == "gptq":
        time_gptq(opt.small)
    names = opt.models or () if opt.what == "train" else ()
    for name in names:
        if on_gpu and name == names[0]:
            emit(product_tflops=matmul_flops("cuda") / 1e12)
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
        try:
            time_training(name, opt.small)
        except torch.OutOfMemoryError:
            emit(model=name, failed="out of memory")
        gc.collect()
        torch._dynamo.reset()
        if on_gpu:
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
