"""What makes training fast and changes no idea of it: float8, torch.compile, CUDA graphs, a quiet garbage collector."""

import gc
import warnings

import torch
import torch.nn as nn


def speed_up(model: nn.Module, opt) -> nn.Module:
    """Let `model` compute in opt.dtype, and sooner if opt.compile or opt.cuda_graph say so. Parameters stay fp32 and keep
    their names. Returns the model, which training is to call."""
    compute_in(model, opt.dtype)
    model.recompute = opt.recompute
    if opt.compile:
        for block in model.blocks:
            block.compile()  # blocks share one compiled program: seconds, not minutes
        model.output = torch.compile(model.output)  # so that its fp32 logits, gigabytes, never reach memory
    if opt.cuda_graph:
        record(model, opt.batch_size, opt.seq_len)
    if opt.compile:
        freeze_garbage_later(model)  # after recording, which allows no hook
    return model


def compute_in(model: nn.Module, dtype: str):
    """Let `model` compute as --dtype says. Ends the program where there are no float8 products."""
    model.compute_dtype = torch.float32 if dtype == "float32" else torch.bfloat16
    if dtype == "float8":
        from nanoosp.float8 import use_float8  # only here: few need it

        use_float8(model)


def record(model: nn.Module, rows: int, n_tokens: int):
    """Record model(tokens, targets), both [rows, n_tokens], and its backward; later calls replay them and take no other
    arguments. In eval mode the model runs as before. Weights may change, but not move in memory. Every backward writes
    its gradients to the same place, so there can be only one a step."""
    example = torch.zeros(rows, n_tokens, dtype=torch.long, device=model.embed.weight.device)
    # Gradients are added up on another stream than the graph was recorded on, as they should be
    warnings.filterwarnings("ignore", "The AccumulateGrad node's stream")
    torch.cuda.make_graphed_callables(model, (example, example.clone()))


def freeze_garbage_later(model: nn.Module):
    """When `model` is called for the second gradient, tell Python's garbage collector to leave alone what is there by then:
    what compiling made. Otherwise it rescans that (0.3 s) at a different step on each rank, and every rank waits."""
    calls = 0

    def freeze_at_the_second(module, inputs):
        nonlocal calls
        calls += torch.is_grad_enabled()
        if calls == 2:
            hook.remove()
            gc.collect()
            gc.freeze()

    hook = model.register_forward_pre_hook(freeze_at_the_second)
