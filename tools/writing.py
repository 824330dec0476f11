"""Writing fast: a stand-in for the model that eval.generate() calls. The text to read is generate()
with Transformer.forward; this gives the same tokens.

There a GPU waits for Python: a token takes hundreds of kernels, each started on its own, and K and V
are copied for every token to make room for one more. Here they lie in memory for the whole window
from the start. So every token takes exactly the same kernels on the same memory, and CUDA can
record them once, as a graph, and start all of them with a single call.
"""

import torch
import torch.nn.functional as F

from model import apply_rope, rope_tables
from nanoosp.recorded import Recorded


def block_step(block, x, cos, sin, K, V, at, seen):
    """Block.forward for one token x [1, 1, D] at position `at` [1]. K and V [1, H_kv, window, d] get
    what it adds; it attends to those of their tokens that were `seen` [1, window]."""
    attn = block.attn
    heads = attn.at_input(block.attn_norm(x))
    q, k, v = (proj(heads).view(1, 1, -1, attn.head_dim).transpose(1, 2)  # [1, H, 1, d]
               for proj in (attn.q_proj, attn.k_proj, attn.v_proj))
    K.index_copy_(2, at, attn.at_k(apply_rope(k, cos, sin)).to(K.dtype))
    V.index_copy_(2, at, attn.at_v(v).to(V.dtype))
    q = attn.at_q(apply_rope(q, cos, sin))
    y = F.scaled_dot_product_attention(q, K, V, attn_mask=seen, enable_gqa=True)
    x = x + attn.o_proj(attn.at_output(y.transpose(1, 2).reshape(1, 1, -1)))
    return x + block.ffn(block.ffn_norm(x))


class Writer:
    """Takes calls like a Transformer with a cache: first the prompt, then one token at a time."""

    def __init__(self, model, window: int, compile: bool = False):
        c, device = model.config, model.embed.weight.device
        self.model, self.K = model, None
        self.window = window = -(-window // 64) * 64  # attention is faster in whole tiles
        self.tables = rope_tables(window, c.head_dim, c.rope_theta, device)  # each [window, d/2]
        self.at = torch.zeros(1, dtype=torch.long, device=device)
        self.block_step = torch.compile(block_step) if compile else block_step
        self.output = torch.compile(model.output) if compile else model.output
        self.step = Recorded(self._step)

    def parameters(self):
        return self.model.parameters()

    def new_cache(self):
        self.at.zero_()
        return self.model.new_cache()

    def __call__(self, tokens, cache):
        if not cache[0]:  # a prompt, or what is kept of a full window: read it the simple way
            logits = self.model(tokens, cache=cache)
            if self.K is None:
                self.K, self.V = ([t.new_zeros(*t.shape[:2], self.window, t.shape[3]) for t in kind]
                                  for kind in zip(*cache))
            for block, pair in enumerate(cache):
                for memory, found in zip((self.K[block], self.V[block]), pair):
                    memory[:, :, : tokens.shape[1]] = found
            self.at += tokens.shape[1]
            return logits
        logits = self.step(tokens)
        self.at += 1
        return logits

    def _step(self, token):
        """Logits [1, 1, V] after `token` [1, 1] at position self.at."""
        model, device = self.model, token.device
        seen = torch.arange(self.window, device=device)[None] <= self.at  # [1, window]
        with torch.autocast(device.type, torch.bfloat16, model.compute_dtype == torch.bfloat16):
            cos, sin = (table[self.at] for table in self.tables)  # each [1, d/2]
            x = model.at_embed(model.embproj_in(model.embed(token)))
            for block, K, V in zip(model.blocks, self.K, self.V):
                x = self.block_step(block, x, cos, sin, K, V, self.at, seen)
            return self.output(x)
