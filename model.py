"""A LLaMA-style decoder in which two of the three parts of Outlier-Safe Pre-Training are switches.

Paper: Park et al., "Outlier-Safe Pre-Training for Robust 4-Bit Quantization of Large Language
Models", ACL 2025 (arXiv 2506.19697). With norm="rms" and embproj=False this is plain LLaMA.
norm="ss" turns on SSNorm and embproj=True turns on EmbProj. After training, fold() absorbs both:
what you ship is plain LLaMA again. The third part is the optimizer, in muon.py.

Glossary: name here, symbol in the paper, meaning
    gain                     gamma (eq. 3)  learned scale of a norm: D numbers, in SSNorm just one
    embproj_in, embproj_out  sec. 3.3       learned D x D matrices after embedding, before head
    B, T, D, V               -              batch, tokens in a sequence, n_embd, vocab_size
    H, d                     -              attention heads, channels of one head

Deviations: SSNorm divides by the root mean square, as the released JAX code does. Eq. 3 divides
by the 2-norm. The two are the same function with gain = gamma / sqrt(D), and ours starts at a
gain of 1, which gives unit RMS. No layer has a bias, as in the published checkpoints.

Read it top to bottom: Config, norms, EmbProj, RoPE, attention, FFN, block, Transformer.
"""

import math
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

# A Point is a named place in the network that does nothing by itself. quantize.py and eval.py
# attach hooks to Points, to round the values that pass or to measure them.
Point = nn.Identity


@dataclass
class Config:
    """The shape of a model. 0 means a default. Raises ValueError if the numbers do not fit."""

    n_layer: int = 4
    n_head: int = 4
    n_embd: int = 128  # D
    vocab_size: int = 256  # V
    norm: str = "rms"  # "rms": one gain per channel. "ss": SSNorm, a single gain
    embproj: bool = False  # EmbProj on both sides
    n_kv_head: int = 0  # 0: n_head
    head_dim: int = 0  # 0: n_embd / n_head
    n_ffn: int = 0  # 0: 8/3 D rounded up to 128s, as many parameters as an ungated FFN of 4 D
    rope_theta: float = 10000.0
    norm_eps: float = 1e-6
    tie_embeddings: bool = False  # one matrix for embedding and head; OSP never does this

    def __post_init__(self):
        self.n_kv_head = self.n_kv_head or self.n_head
        for name in "n_layer n_head n_kv_head n_embd vocab_size rope_theta norm_eps".split():
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be a positive number, not {getattr(self, name)}")
        if self.norm not in ("rms", "ss"):
            raise ValueError(f"norm must be 'rms' or 'ss', not {self.norm!r}")
        if self.n_head % self.n_kv_head:
            raise ValueError(f"n_head {self.n_head} is not divisible by n_kv_head {self.n_kv_head}")
        if not self.head_dim and self.n_embd % self.n_head:
            raise ValueError(f"n_embd {self.n_embd} is not divisible by n_head {self.n_head}")
        self.head_dim = self.head_dim or self.n_embd // self.n_head
        if self.head_dim % 2:
            raise ValueError(f"head_dim {self.head_dim} is odd, but RoPE rotates pairs of channels")
        self.n_ffn = self.n_ffn or math.ceil(8 * self.n_embd / (3 * 128)) * 128


class RMSNorm(nn.Module):
    """gain * x / rms(x), one gain per channel, as in LLaMA. Computes in fp32, keeps x's dtype."""

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.gain = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x):
        return (F.rms_norm(x.float(), x.shape[-1:], eps=self.eps) * self.gain).to(x.dtype)


class SSNorm(RMSNorm):
    """gain * x / rms(x), a single gain for all channels (eq. 3).

    A gain per channel is a dial that training can turn to blow up one chosen channel: an outlier
    made on purpose. One common dial treats all channels alike. The layer can still choose its
    overall scale; without that, the paper saw slow or unstable training (sec. 3.2).
    """

    def __init__(self, dim: int, eps: float):
        super().__init__(dim, eps)
        self.gain = nn.Parameter(torch.ones(()))


class EmbProj(nn.Linear):
    """A learned D x D matrix after the embedding or before the head (sec. 3.3). Starts orthogonal.

    Adam trains the embedding, and its per-channel steps favour some channels. This matrix lets the
    model spread what these hold over all channels before it enters the residual stream.
    """

    def __init__(self, dim: int):
        super().__init__(dim, dim, bias=False)


def rope_tables(n_tokens: int, head_dim: int, theta: float, device, past: int = 0):
    """cos and sin of position * theta^(-2i/d), each [T, d/2] in fp32, after `past` tokens."""
    channels = torch.arange(0, head_dim, 2, device=device, dtype=torch.float32)
    positions = torch.arange(past, past + n_tokens, device=device, dtype=torch.float32)
    angles = torch.outer(positions, 1 / theta ** (channels / head_dim))
    return angles.cos(), angles.sin()


def apply_rope(x, cos, sin):
    """Rotate the pairs (x_i, x_{i+d/2}) of x [B, H, T, d]: "half-split" RoPE, as Hugging Face's."""
    a, b = x.float().chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(x.dtype)


class Attention(nn.Module):
    """Causal self-attention. With n_kv_head < n_head, Q heads share K and V heads (GQA)."""

    def __init__(self, config: Config):
        super().__init__()
        self.n_head = config.n_head
        self.n_kv_head = config.n_kv_head
        self.head_dim = config.head_dim
        self.q_proj = nn.Linear(config.n_embd, self.n_head * self.head_dim, bias=False)
        self.k_proj = nn.Linear(config.n_embd, self.n_kv_head * self.head_dim, bias=False)
        self.v_proj = nn.Linear(config.n_embd, self.n_kv_head * self.head_dim, bias=False)
        self.o_proj = nn.Linear(self.n_head * self.head_dim, config.n_embd, bias=False)
        self.at_input = Point()
        self.at_q = Point()
        self.at_k = Point()
        self.at_v = Point()
        self.at_output = Point()

    def forward(self, x, cos, sin, cache=None):
        B, T, _ = x.shape
        x = self.at_input(x)
        q = self.q_proj(x).view(B, T, self.n_head, self.head_dim).transpose(1, 2)  # [B, H, T, d]
        k = self.k_proj(x).view(B, T, self.n_kv_head, self.head_dim).transpose(1, 2)
        v = self.v_proj(x).view(B, T, self.n_kv_head, self.head_dim).transpose(1, 2)
        q = self.at_q(apply_rope(q, cos, sin))
        k = self.at_k(apply_rope(k, cos, sin))
        v = self.at_v(v)
        if cache is not None:  # generating: a list, empty at first, then K and V of all past tokens
            if cache:
                assert T == 1, "after the prompt, one token at a time: is_causal assumes no past"
                k = torch.cat([cache[0], k], dim=2)
                v = torch.cat([cache[1], v], dim=2)
            cache[:] = [k, v]
        if self.n_kv_head < self.n_head:  # [B, H_kv, T, d] -> [B, H, T, d]
            k, v = (t.repeat_interleave(self.n_head // self.n_kv_head, dim=1) for t in (k, v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=T > 1)  # a lone new token sees all
        y = y.transpose(1, 2).reshape(B, T, self.n_head * self.head_dim)
        return self.o_proj(self.at_output(y))


class FFN(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x)). Outliers survive in its hidden state, even under OSP."""

    def __init__(self, config: Config):
        super().__init__()
        self.gate_proj = nn.Linear(config.n_embd, config.n_ffn, bias=False)
        self.up_proj = nn.Linear(config.n_embd, config.n_ffn, bias=False)
        self.down_proj = nn.Linear(config.n_ffn, config.n_embd, bias=False)
        self.at_input = Point()
        self.at_hidden = Point()

    def forward(self, x):
        x = self.at_input(x)
        return self.down_proj(self.at_hidden(F.silu(self.gate_proj(x)) * self.up_proj(x)))


class Block(nn.Module):
    """One layer. Each half reads a normed copy of the residual stream and adds its result to it."""

    def __init__(self, config: Config):
        super().__init__()
        Norm = SSNorm if config.norm == "ss" else RMSNorm
        self.attn_norm = Norm(config.n_embd, config.norm_eps)
        self.attn = Attention(config)
        self.ffn_norm = Norm(config.n_embd, config.norm_eps)
        self.ffn = FFN(config)

    def forward(self, x, cos, sin, cache=None):
        x = x + self.attn(self.attn_norm(x), cos, sin, cache)
        return x + self.ffn(self.ffn_norm(x))


class Transformer(nn.Module):
    """tokens [B, T] -> logits [B, T, V]."""

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.n_embd)
        self.embproj_in = EmbProj(config.n_embd) if config.embproj else nn.Identity()
        self.at_embed = Point()  # where the residual stream begins
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.norm = (SSNorm if config.norm == "ss" else RMSNorm)(config.n_embd, config.norm_eps)
        self.embproj_out = EmbProj(config.n_embd) if config.embproj else nn.Identity()
        self.at_head = Point()
        self.head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        if config.tie_embeddings:
            self.head.weight = self.embed.weight
        self.compute_dtype = torch.float32  # of matrix products; torch.bfloat16 turns on autocast
        self.recompute = False  # True: backward computes blocks again, which needs less memory
        self._initialize()

    @torch.no_grad()
    def _initialize(self):
        """As in GPT-2: N(0, 0.02), and less for what writes to the residual stream, so that it does
        not grow with depth. The paper says it of EmbProj alone; its code draws all with a standard
        deviation of 1/sqrt(inputs)."""
        for name, module in self.named_modules():
            if isinstance(module, EmbProj):
                nn.init.orthogonal_(module.weight)
            elif isinstance(module, (nn.Linear, nn.Embedding)):
                to_stream = name.endswith(("o_proj", "down_proj"))
                std = 0.02 / (math.sqrt(2 * self.config.n_layer) if to_stream else 1)
                nn.init.normal_(module.weight, std=std)

    def forward(self, tokens, targets=None, cache=None):
        """Logits [B, T, V] in fp32. With `targets` [B, T], only the mean cross-entropy in nats.

        To generate, pass a `cache` from new_cache(): first with the whole prompt, then with one
        new token at a time.
        """
        c = self.config
        device = tokens.device
        past = cache[0][0].shape[2] if cache and cache[0] else 0  # tokens seen before
        with torch.autocast(device.type, torch.bfloat16, self.compute_dtype == torch.bfloat16):
            cos, sin = rope_tables(tokens.shape[1], c.head_dim, c.rope_theta, device, past)
            x = self.at_embed(self.embproj_in(self.embed(tokens)))  # [B, T, D]
            for i, block in enumerate(self.blocks):
                if self.recompute and torch.is_grad_enabled():
                    x = checkpoint(block, x, cos, sin, use_reentrant=False)
                else:
                    x = block(x, cos, sin, cache[i] if cache else None)
            return self.output(x, targets)

    def output(self, x, targets=None):
        """The last part of forward(), from the residual stream [B, T, D] on. Separate, so that it
        can be compiled with the loss: fp32 logits (gigabytes) then never reach memory."""
        logits = self.head(self.at_head(self.embproj_out(self.norm(x)))).float()  # [B, T, V]
        if targets is None:
            return logits
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())

    @torch.no_grad()
    def fold(self) -> "Transformer":
        """A new plain LLaMA (RMSNorm, no EmbProj, untied head) with the same logits:

            embed'  = embed @ P_in^T     EmbProj after the embedding multiplies each of its rows
            head'   = head @ P_out       EmbProj before the head multiplies what the head reads
            gain'_c = gain for every c   a single gain is a vector of equal gains
        """
        weights = {name: tensor.clone() for name, tensor in self.state_dict().items()}
        for name, module in self.named_modules():
            if isinstance(module, SSNorm):
                weights[f"{name}.gain"] = module.gain.expand(self.config.n_embd).clone()
        if self.config.embproj:
            p_in = weights.pop("embproj_in.weight").double()  # in fp64, rounded once
            p_out = weights.pop("embproj_out.weight").double()
            embed = weights["embed.weight"]  # [V, D]
            head = weights["head.weight"]  # [V, D]
            weights["embed.weight"] = (embed.double() @ p_in.mT).to(embed.dtype)
            weights["head.weight"] = (head.double() @ p_out).to(head.dtype)
        config = replace(self.config, norm="rms", embproj=False, tie_embeddings=False)
        plain = Transformer.from_weights(config, weights).train(self.training)
        plain.compute_dtype = self.compute_dtype
        return plain

    @classmethod
    def from_weights(cls, config: Config, weights: dict) -> "Transformer":
        """A model that takes over these tensors. Raises RuntimeError if they do not fit."""
        if config.n_layer > len(weights):  # a damaged config could take hours to build
            raise RuntimeError(f"{config.n_layer} layers of {len(weights)} tensors")
        with torch.device("meta"):  # a skeleton without memory
            model = cls(config)
        model.load_state_dict(weights, assign=True)
        if config.tie_embeddings:
            model.head.weight = model.embed.weight
        return model

    def new_cache(self) -> list[list]:
        """An empty KV cache: one list per block, which the block fills."""
        return [[] for _ in self.blocks]


@contextmanager
def hooked(hooks):
    """`hooks`: pairs (module, function). In the `with` block, function(module, inputs, output) runs
    after each module's forward; what it returns, unless None, replaces the output. Compiled code
    would skip hooks, so all runs eagerly in the `with` block."""
    handles = [module.register_forward_hook(function) for module, function in hooks]
    try:
        with torch.compiler.set_stance("force_eager"):
            yield
    finally:
        for handle in handles:
            handle.remove()
