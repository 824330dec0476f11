"""Letting a model write: python eval.py TARGET --prompt TEXT

sample() draws a token, and generate() one after the other, which is all there is to it. write() is
the command. The rest makes it fast on a GPU: a Writer stands in for the model in generate() and
gives the same tokens.
"""

import math
import sys
import time

import torch
import torch.nn.functional as F

from data.tokenizer import beginning, encode_whole, separator, without_token
from model import apply_rope, rope_tables
from nanoosp.machine import peak_memory_gib
from nanoosp.recorded import Recorded


def sample(logits, generator, never, temperature=1.0, top_k=None):
    """A token drawn from logits [V], which are changed, as a tensor [].

    never: a tensor of ids that are not drawn. temperature: 0 takes the likeliest. top_k: draw from
    the k likeliest only.
    """
    logits[never] = -math.inf
    if top_k:
        logits[logits < logits.topk(min(top_k, len(logits))).values[-1]] = -math.inf
    if temperature < 1e-30:  # dividing by it would overflow
        return logits.argmax()
    p = (logits / temperature).softmax(dim=-1)
    # A race: each token waits for a random time, 1 / p on average, and the first one wins. It draws
    # from the same distribution as torch.multinomial, which makes a GPU wait for Python.
    return (p / torch.empty_like(p).exponential_(generator=generator)).argmax()


@torch.no_grad()
def generate(model, tokens, n, window, never=(), seed=0, **how):
    """Yield n tokens that continue `tokens`, a non-empty list of ids.

    window: most tokens the model may see. When it is full, the oldest are forgotten, many at once,
        since the rest must be read again: enough for all still to come, but at most half of it.
    never: ids that are not drawn, such as a model's rows that its tokenizer has no tokens for.
    how: temperature and top_k, for sample().
    """
    device = next(model.parameters()).device
    generator = torch.Generator(device).manual_seed(seed)
    never = torch.tensor([*never], dtype=torch.long, device=device)
    context = list(tokens)
    cache = model.new_cache()
    unread = torch.tensor([context], device=device)  # [1, T], after the first step [1, 1]
    for still_to_come in range(n, 0, -1):
        if len(context) > window:
            kept = window - min(window // 2, still_to_come - 1)
            context = context[-kept:]
            cache = model.new_cache()
            unread = torch.tensor([context], device=device)
        logits = model(unread, cache=cache)[0, -1]  # [V]
        finite = logits.isfinite().all()
        drawn = sample(logits, generator, never, **how)
        token, finite = torch.stack([drawn, finite]).tolist()  # all at once: a GPU waits meanwhile
        if not finite:
            raise ArithmeticError("the logits are not finite: there is nothing to draw from")
        context.append(token)
        unread = drawn.view(1, 1)
        yield token


def write(loaded, opt) -> dict:
    """A row with the text that continues opt.prompt, until it ends or has opt.tokens more. Unless
    --json, it is printed as it comes."""
    model, encoding = loaded.model, loaded.encoding
    if opt.dtype == "bfloat16":
        model.bfloat16()  # most of the time goes into reading weights
    prompt = encode_whole(encoding, opt.prompt).tolist()
    start = prompt or [separator(encoding)]  # a tokenizer may have no token for a blank
    window = opt.seq_len or loaded.window
    never = without_token(encoding, model.config.vocab_size)
    end_ids = loaded.end_ids
    if opt.device == "cuda":
        model = Writer(model, min(window, len(start) + opt.tokens), opt.compile)
    ids = prompt[len(beginning(encoding)) :]  # BOS is not shown
    n_shown = len(ids)
    printed = ""
    times = [time.perf_counter()]
    for token in generate(model, start, opt.tokens, window, never, opt.seed,
                          temperature=opt.temperature, top_k=opt.top_k):
        times.append(time.perf_counter())
        if token in end_ids:
            break
        ids.append(token)
        text = encoding.decode(ids)
        if not opt.json and not text.endswith("\ufffd"):  # half of a character: wait for the rest
            print(text[len(printed) :], end="", flush=True)
            printed = text
    n = len(ids) - n_shown
    text = encoding.decode(ids)
    if not opt.json:
        print(text[len(printed) :], flush=True)
        print(f"{n} tokens: {pace(times)}, peak memory {peak_memory_gib(opt.device):.2f} GiB",
              file=sys.stderr)
    if len(prompt) + n - (n == opt.tokens) > window:  # the last of opt.tokens is not read
        print(f"prompt ({len(prompt):,} tokens) and text ({n:,}) exceed the window of {window:,}: "
              "the oldest were forgotten", file=sys.stderr)
    return dict(target=loaded.name, text=text)


def pace(times: list) -> str:
    """How fast tokens came. `times`: the start and when each was there. Two take long: the first
    reads the prompt; at the second, on CUDA, the step is compiled and recorded."""
    waits = [after - before for before, after in zip(times, times[1:])]
    said = [f"the {name} after {sum(waits[: i + 1]):.2f} s"
            for i, name in enumerate(("first", "second")) if i < len(waits)]
    if len(waits) > 2:
        said.append(f"the rest at {len(waits[2:]) / sum(waits[2:]):,.1f} tokens/s")
    return ", ".join(said)


def block_step(block, x, rope, memory, at, seen):
    """Block.forward for one token x [1, 1, D] at position `at` [1]; rope: its cos and sin [1, d/2].
    K and V in `memory`, each [1, H_kv, window, d], get what it adds; it attends to those of their
    tokens that were `seen` [1, window]."""
    attn = block.attn
    K, V = memory
    heads = attn.at_input(block.attn_norm(x))
    q, k, v = (proj(heads).view(1, 1, -1, attn.head_dim).transpose(1, 2)  # [1, H, 1, d]
               for proj in (attn.q_proj, attn.k_proj, attn.v_proj))
    K.index_copy_(2, at, attn.at_k(apply_rope(k, *rope)).to(K.dtype))
    V.index_copy_(2, at, attn.at_v(v).to(V.dtype))
    q = attn.at_q(apply_rope(q, *rope))
    y = F.scaled_dot_product_attention(q, K, V, attn_mask=seen, enable_gqa=True)
    x = x + attn.o_proj(attn.at_output(y.transpose(1, 2).reshape(1, 1, -1)))
    return x + block.ffn(block.ffn_norm(x))


class Writer:
    """Takes calls like a Transformer with a cache: first the prompt, then one token at a time.

    With a Transformer a GPU waits for Python: a token takes hundreds of kernels, each started by
    itself, and K and V are copied for every token to make room for one more. Here they lie in
    memory for the whole window from the start. So every token takes exactly the same kernels on the
    same memory, and CUDA can record them once, as a graph, and start all of them with one call.
    """

    def __init__(self, model, window: int, compile: bool = False):
        c, device = model.config, model.embed.weight.device
        self.model = model
        self.parameters = model.parameters  # generate() asks them where they are
        self.window = math.ceil(window / 64) * 64  # attention is faster in whole tiles
        self.memory = None  # K and V of every block, each [1, H_kv, window, d]
        self.tables = rope_tables(self.window, c.head_dim, c.rope_theta, device)  # [window, d/2]
        self.at = torch.zeros(1, dtype=torch.long, device=device)
        self.block_step = torch.compile(block_step) if compile else block_step
        self.output = torch.compile(model.output) if compile else model.output
        self.step = Recorded(self._step)

    def new_cache(self):
        self.at.zero_()
        return self.model.new_cache()

    def __call__(self, tokens, cache):
        if not cache[0]:  # a prompt, or what is kept of a full window: read it the simple way
            logits = self.model(tokens, cache=cache)
            if self.memory is None:
                self.memory = [[t.new_zeros(*t.shape[:2], self.window, t.shape[3]) for t in pair]
                               for pair in cache]
            for memory, pair in zip(self.memory, cache):
                for whole, found in zip(memory, pair):
                    whole[:, :, : tokens.shape[1]] = found
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
            rope = [table[self.at] for table in self.tables]
            x = model.at_embed(model.embproj_in(model.embed(token)))
            for block, memory in zip(model.blocks, self.memory):
                x = self.block_step(block, x, rope, memory, self.at, seen)
            return self.output(x)
