"""What the linears of a model read, from the first to the last, for GPTQ in quantize.py.

A half is attention or FFN. It runs no further than needed: the first Point comes right after the norm, and what a half
adds to the residual stream comes from its last linear alone, because the inputs of that are still here.
"""

import torch.nn as nn
from tqdm import tqdm

from model import hooked, rope_tables
from nanoosp.batches import windows_at_once

POINTS = {  # the linears that read each Point
    "attn": {"at_input": ["q_proj", "k_proj", "v_proj"], "at_output": ["o_proj"]},
    "ffn": {"at_input": ["gate_proj", "up_proj"], "at_hidden": ["down_proj"]},
}


def weights_at(name: str, part: nn.Module, linears: list[str]) -> dict:
    return {f"{name}.{linear}": getattr(part, linear).weight for linear in linears}


def stacks(model) -> list[dict]:
    """The weights [out, in] of `model` by name, those together that read the same Point."""
    return [weights_at(f"blocks.{i}.{half}", getattr(block, half), linears)
            for i, block in enumerate(model.blocks) for half, points in POINTS.items() for linears in points.values()]


def halves(model, tokens):
    """Yield all halves of `model` for `tokens` [N, T]. What they read comes from those before, as these are by then."""
    config = model.config
    n_tokens = tokens.shape[1]
    rope = rope_tables(n_tokens, config.head_dim, config.rope_theta, tokens.device)
    streams = model.embed(tokens).split(windows_at_once(n_tokens))  # each [n, T, D]
    for i, block in enumerate(tqdm(model.blocks, "GPTQ", leave=False, disable=None)):
        yield Half(f"blocks.{i}.attn", streams, block.attn_norm, block.attn, rope)
        yield Half(f"blocks.{i}.ffn", streams, block.ffn_norm, block.ffn)


class Half:
    """Attention or FFN of a block, and the residual `streams` that it reads and adds to, each [n, T, D]."""

    def __init__(self, name: str, streams, norm: nn.Module, part: nn.Module, tables=()):
        self.name = name
        self.points = POINTS[name.split(".")[-1]]
        self.streams = streams
        self.norm = norm
        self.part = part
        self.tables = tables  # of RoPE
        self.inputs = []

    def weights(self, point: str) -> dict:
        return weights_at(self.name, self.part, self.points[point])

    def run_to(self, point: str) -> list:
        """What passes a Point: for each stream an X [n, T, in]. It is kept, in place of what passed the last one."""
        self.inputs = []
        at = getattr(self.part, point)
        with hooked([(at, lambda module, inputs, X: self.inputs.append(X))]):  # after R4's hook
            for x in self.streams:
                if point == "at_input":
                    at(self.norm(x))
                else:
                    self.part(self.norm(x), *self.tables)
        return self.inputs

    def add(self, last: str):
        """Add what the last linear, rounded by now, makes of the inputs that were kept."""
        linear = getattr(self.part, last)
        for x, X in zip(self.streams, self.inputs):
            x += linear(X)
        self.inputs = []
