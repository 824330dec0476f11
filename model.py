"""A LLaMA-style decoder in which the two architectural parts of Outlier-Safe Pre-Training (OSP) are switches.

Paper: Park et al., "Outlier-Safe Pre-Training for Robust 4-Bit Quantization of Large Language Models", ACL 2025
(arXiv 2506.19697). With norm="rms" and embproj=False this is plain LLaMA. norm="ss" turns on SSNorm, embproj=True turns
on EmbProj, and fold() absorbs both after training: what you ship is plain LLaMA again. The third part of OSP is the
optimizer, muon.py.

Glossary: name here, symbol in the paper, meaning
    gain                     gamma (eq. 3)   the learned scale of a norm: D numbers in RMSNorm, a single one in SSNorm
    embproj_in, embproj_out  sec. 3.3        learned D x D matrices after the embedding and before the head
    B, T, D, V               -               sequences in a batch, tokens in a sequence, n_embd, vocab_size
    H, d                     -               heads, channels of a head

Deviations: SSNorm divides by the root mean square, as the released JAX code does, not by the 2-norm of eq. 3: the same
function with gain = gamma / sqrt(D), so that the initial gain of 1 gives unit RMS. There are no biases (the released
example has them, by a default of Flax; the published checkpoints are plain LLaMA).

Read it top to bottom: norms, EmbProj, RoPE, attention, FFN, block, then Config and the model, last the files on disk.
"""

import math
import os
import zipfile
from dataclasses import dataclass, fields, replace
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

# A Point is a named place in the network that does nothing here. quantize.py and eval.py hang forward hooks on it, to
# round the values that pass (what a hook returns replaces them) or to measure them. This file knows nothing of either.
Point = nn.Identity


class RMSNorm(nn.Module):
    """gain * x / rms(x) with one gain per channel, as in LLaMA. Computed in fp32, returned in the dtype of x."""

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.gain = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x):
        return (F.rms_norm(x.float(), x.shape[-1:], eps=self.eps) * self.gain).to(x.dtype)


class SSNorm(RMSNorm):
    """gain * x / rms(x) with a single gain for all channels (eq. 3).

    A gain per channel is a dial that training can turn to blow up one chosen channel: an outlier made on purpose.
    One common dial keeps the layer free to choose its overall scale (without any, the paper reports slow or unstable
    training, sec. 3.2), but treats every channel, and so every rotation of the channels, alike.
    """

    def __init__(self, dim: int, eps: float):
        super().__init__(dim, eps)
        self.gain = nn.Parameter(torch.ones(()))


class EmbProj(nn.Linear):
    """A learned D x D matrix beside an embedding (sec. 3.3), orthogonal at the start so that norms stay as they were.

    The embedding is trained by Adam, whose per-channel steps favour some channels. This matrix lets the model spread
    them over all channels before they enter the residual stream. It costs nothing later: fold() multiplies it away.
    """

    def __init__(self, dim: int):
        super().__init__(dim, dim, bias=False)


def rope_tables(n_tokens: int, head_dim: int, theta: float, device, first: int = 0):
    """cos and sin of the angles position * theta^(-2i/d), each [T, d/2] in fp32, for positions first, first + 1, ..."""
    inverse_wavelength = theta ** (-torch.arange(0, head_dim, 2, device=device, dtype=torch.float32) / head_dim)
    positions = torch.arange(first, first + n_tokens, device=device, dtype=torch.float32)
    angles = torch.outer(positions, inverse_wavelength)
    return angles.cos(), angles.sin()


def apply_rope(x, cos, sin):
    """Rotate the pairs (x_i, x_{i+d/2}) of x [B, H, T, d] by their position's angles: "half-split", as Hugging Face."""
    a, b = x.float().chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(x.dtype)


class Attention(nn.Module):
    """Causal self-attention. n_kv_head < n_head shares each K and V head among several Q heads (GQA)."""

    def __init__(self, config: "Config"):
        super().__init__()
        self.n_head, self.n_kv_head, self.head_dim = config.n_head, config.n_kv_head, config.head_dim
        self.q_proj = nn.Linear(config.n_embd, self.n_head * self.head_dim, bias=False)
        self.k_proj = nn.Linear(config.n_embd, self.n_kv_head * self.head_dim, bias=False)
        self.v_proj = nn.Linear(config.n_embd, self.n_kv_head * self.head_dim, bias=False)
        self.o_proj = nn.Linear(self.n_head * self.head_dim, config.n_embd, bias=False)
        self.at_input, self.at_q, self.at_k, self.at_v, self.at_output = (Point() for _ in range(5))

    def forward(self, x, cos, sin, cache=None):
        B, T, _ = x.shape
        x = self.at_input(x)
        q = self.q_proj(x).view(B, T, self.n_head, self.head_dim).transpose(1, 2)  # [B, H, T, d]
        k = self.k_proj(x).view(B, T, self.n_kv_head, self.head_dim).transpose(1, 2)  # [B, H_kv, T, d]
        v = self.v_proj(x).view(B, T, self.n_kv_head, self.head_dim).transpose(1, 2)  # [B, H_kv, T, d]
        q, k, v = self.at_q(apply_rope(q, cos, sin)), self.at_k(apply_rope(k, cos, sin)), self.at_v(v)
        if cache is not None:  # generating: a list, empty at first, then K and V of all tokens so far
            if cache:
                assert T == 1, "after the prompt, one token at a time"  # is_causal below would misalign several
                k, v = torch.cat([cache[0], k], dim=2), torch.cat([cache[1], v], dim=2)  # [B, H_kv, past + 1, d]
            cache[:] = k, v
        if self.n_kv_head < self.n_head:
            k, v = (t.repeat_interleave(self.n_head // self.n_kv_head, dim=1) for t in (k, v))  # [B, H, T, d]
        y = F.scaled_dot_product_attention(q, k, v, is_causal=T > 1)  # a single new token may see all before it
        y = y.transpose(1, 2).reshape(B, T, self.n_head * self.head_dim)
        return self.o_proj(self.at_output(y))


class FFN(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x)). Its hidden state is where outliers survive even in OSP models."""

    def __init__(self, config: "Config"):
        super().__init__()
        self.gate_proj = nn.Linear(config.n_embd, config.n_ffn, bias=False)
        self.up_proj = nn.Linear(config.n_embd, config.n_ffn, bias=False)
        self.down_proj = nn.Linear(config.n_ffn, config.n_embd, bias=False)
        self.at_input, self.at_hidden = Point(), Point()

    def forward(self, x):
        x = self.at_input(x)
        return self.down_proj(self.at_hidden(F.silu(self.gate_proj(x)) * self.up_proj(x)))


class Block(nn.Module):
    """One layer: both halves read a normed copy of the residual stream and add their result to it."""

    def __init__(self, config: "Config"):
        super().__init__()
        Norm = SSNorm if config.norm == "ss" else RMSNorm
        self.attn_norm, self.attn = Norm(config.n_embd, config.norm_eps), Attention(config)
        self.ffn_norm, self.ffn = Norm(config.n_embd, config.norm_eps), FFN(config)

    def forward(self, x, cos, sin, cache=None):
        x = x + self.attn(self.attn_norm(x), cos, sin, cache)
        return x + self.ffn(self.ffn_norm(x))


@dataclass
class Config:
    """The shape of a model. Zeros are filled in: n_kv_head = n_head, head_dim = n_embd / n_head, n_ffn = LLaMA's rule.

    Raises ValueError when the numbers cannot make a model.
    """

    n_layer: int = 4
    n_head: int = 4
    n_embd: int = 128  # D
    vocab_size: int = 256  # V
    norm: str = "rms"  # "rms": a gain per channel. "ss": SSNorm, one gain
    embproj: bool = False  # EmbProj on both sides
    n_kv_head: int = 0
    head_dim: int = 0
    n_ffn: int = 0  # 8/3 D rounded up to a multiple of 128: about as many parameters as the classic 4 D without a gate
    rope_theta: float = 10000.0
    norm_eps: float = 1e-6
    tie_embeddings: bool = False  # head shares the embedding's matrix (not in OSP; for models from elsewhere)

    def __post_init__(self):
        self.n_kv_head = self.n_kv_head or self.n_head
        for name in ("n_layer", "n_head", "n_kv_head", "n_embd", "vocab_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        for name in ("rope_theta", "norm_eps"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be a positive number, not {getattr(self, name)}")
        if self.norm not in ("rms", "ss"):
            raise ValueError(f"norm must be 'rms' or 'ss', not {self.norm!r}")
        if not self.head_dim and self.n_embd % self.n_head:
            raise ValueError(f"n_embd {self.n_embd} is not divisible by n_head {self.n_head}")
        if self.n_head % self.n_kv_head:
            raise ValueError(f"n_head {self.n_head} is not divisible by n_kv_head {self.n_kv_head}")
        self.head_dim = self.head_dim or self.n_embd // self.n_head
        if self.head_dim % 2:
            raise ValueError(f"head_dim {self.head_dim} is odd, but RoPE rotates pairs of channels")
        self.n_ffn = self.n_ffn or math.ceil(8 * self.n_embd / (3 * 128)) * 128


PRESETS = {  # the shapes; how long and how fast each is trained stands in train.py
    "tiny": dict(n_layer=4, n_head=4, n_embd=128),  # two CPU cores, about two minutes
    "toy": dict(n_layer=6, n_head=6, n_embd=384),  # one GPU, under a minute
    "small": dict(n_layer=12, n_head=12, n_embd=768),  # one GPU, real text
    "1.4b": dict(
        n_layer=24, n_head=16, n_embd=2048, vocab_size=49152
    ),  # the paper's size: 1,415,577,600 + norms
}


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
        self.recompute = False  # in backward, compute each block again instead of keeping what it computed
        self._initialize()

    @torch.no_grad()
    def _initialize(self):
        """N(0, 0.02) as in GPT-2; matrices that write to the residual stream are smaller by sqrt(2 n_layer), so that
        the stream's size does not grow with depth. (The paper names only EmbProj's initial value.)"""
        for name, module in self.named_modules():
            if isinstance(module, EmbProj):
                nn.init.orthogonal_(module.weight)
            elif isinstance(module, (nn.Linear, nn.Embedding)):
                writes_to_stream = name.endswith(("o_proj", "down_proj"))
                smaller = math.sqrt(2 * self.config.n_layer) if writes_to_stream else 1
                nn.init.normal_(module.weight, std=0.02 / smaller)

    def forward(self, tokens, targets=None, cache=None):
        """Logits [B, T, V] in fp32 or, if `targets` [B, T] are given, only the mean cross-entropy in nats per token.

        `cache`, from new_cache(), makes generation cheap: pass a whole prompt first, then one new token at a time.
        """
        past = cache[0][0].shape[2] if cache and cache[0] else 0  # tokens seen before
        config = self.config
        cos, sin = rope_tables(tokens.shape[1], config.head_dim, config.rope_theta, tokens.device, first=past)
        x = self.at_embed(self.embproj_in(self.embed(tokens)))  # [B, T, D]
        for i, block in enumerate(self.blocks):
            if self.recompute and torch.is_grad_enabled():
                x = checkpoint(block, x, cos, sin, use_reentrant=False)
            else:
                x = block(x, cos, sin, cache[i] if cache else None)
        return self.output(x, targets)

    def output(self, x, targets=None):
        """From the residual stream [B, T, D] to what forward() returns. (Apart, so that train.py can compile it: then
        the logits, 3 GB in fp32 for 16k tokens of 49k ids, stay in bf16 and are turned into fp32 in registers.)"""
        logits = self.head(self.at_head(self.embproj_out(self.norm(x)))).float()  # [B, T, V]
        return logits if targets is None else F.cross_entropy(logits.flatten(0, 1), targets.flatten())

    def new_cache(self) -> list[list]:
        """An empty KV cache: one list a block, which the block fills."""
        return [[] for _ in self.blocks]

    @torch.no_grad()
    def fold(self) -> "Transformer":
        """A new plain LLaMA (RMSNorm, no EmbProj, untied head) with the same logits.

        Why that works: (x P_in^T) is linear in the embedding row x, so P_in moves into the table; P_out moves into the
        head the same way; a single gain is a vector of equal gains. Products are taken in fp64 and rounded once.
        """
        weights = {name: tensor.clone() for name, tensor in self.state_dict().items()}
        for name, module in self.named_modules():
            if isinstance(module, SSNorm):
                weights[f"{name}.gain"] = module.gain.expand(self.config.n_embd).clone()
        if self.config.embproj:
            p_in, p_out = weights.pop("embproj_in.weight"), weights.pop("embproj_out.weight")
            embed, head = weights["embed.weight"], weights["head.weight"]
            weights["embed.weight"] = (embed.double() @ p_in.double().mT).to(embed.dtype)  # [V, D]
            weights["head.weight"] = (head.double() @ p_out.double()).to(head.dtype)  # [V, D]
        with torch.device("meta"):  # a skeleton without memory, which then takes over the tensors above
            plain = Transformer(replace(self.config, norm="rms", embproj=False, tie_embeddings=False))
        plain.load_state_dict(weights, assign=True)
        return plain.train(self.training)


# On disk. A checkpoint is a torch zip file of tensors, numbers, strings, lists and dicts, and nothing else.


def save_checkpoint(state: dict, path: Path):
    """Write `state` whole or not at all: to a temporary name, flushed to the disk, then renamed over `path`.

    Raises OSError (disk full, no permission); the old file at `path` is then still there.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:
        cause = error.__context__ if isinstance(error.__context__, OSError) else error  # torch hides it in there
        raise OSError(f"could not write {path}: {str(cause).splitlines()[0]}") from error
    finally:
        temporary.unlink(missing_ok=True)


def read_archive(path: Path):
    """The contents of a torch file. Nothing in it is executed.

    Raises FileNotFoundError, and ValueError for a file that is damaged or holds anything but data.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at {path}")
    try:
        # torch does not verify the checksums it writes; a flipped bit would go unseen
        with zipfile.ZipFile(path) as archive:
            if archive.testzip() is not None:
                raise zipfile.BadZipFile("a checksum does not match")
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # zipfile, pickle and torch each have their own kinds
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        if "Weights only load failed" in reason:
            reason = "it holds objects that would run code when loaded, not only tensors and numbers"
        raise ValueError(f"{path} is not a usable checkpoint: {reason}") from error


def load_checkpoint(path: Path) -> dict:
    """Read what train.py saved. `path` is the file or its run directory.

    Raises what read_archive does, and ValueError for a foreign file.
    """
    path = Path(path)
    path = path / "ckpt.pt" if path.is_dir() else path
    return check_checkpoint(read_archive(path), path)


def check_checkpoint(state, path) -> dict:
    """`state` as it is. Raises ValueError, naming `path`, unless it is what train.py saves."""
    kinds = {"step": int, "config": dict, "model": dict, "optimizers": list, "options": dict, "data": dict}
    if not isinstance(state, dict) or not all(isinstance(state.get(name), kind) for name, kind in kinds.items()):
        if isinstance(state, dict) and "packing" in state:
            raise ValueError(f"{path} is a quantized model (quantize.py made it): only eval.py reads these")
        raise ValueError(f"{path} is a torch file, but not a checkpoint of train.py")
    return state


def model_from_checkpoint(state: dict, device="cpu") -> Transformer:
    """The model of a checkpoint, in the precision it was saved in."""
    unknown = set(state["config"]) - {field.name for field in fields(Config)}
    if unknown:
        raise ValueError(f"the checkpoint's config has unknown entries {sorted(unknown)}: made by a newer version?")
    with torch.device("meta"):  # no random numbers for weights that are about to be replaced
        model = Transformer(Config(**state["config"]))
    model.load_state_dict(state["model"], assign=True)
    if model.config.tie_embeddings:
        model.head.weight = model.embed.weight
    return model.to(device)
