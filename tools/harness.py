"""Benchmarks: lm-eval asks the questions and counts right answers, and here our models answer."""

import logging
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

from data.tokenizer import beginning, encode, encode_whole, separator, without_token
from model import hooked
from nanoosp.files import require

LM = require("lm_eval.api.model", "--tasks").LM
TaskManager = require("lm_eval.tasks", "--tasks").TaskManager
rolling_windows = require("lm_eval.utils", "--tasks").get_rolling_token_windows
PAPER = Path(__file__).resolve().parent.parent / "data/tasks"


def find_tasks(names: list[str]) -> dict:
    """lm-eval's tasks with these names. A folder of YAML files stands for its groups or, without
    any, its tasks. Raises ValueError."""
    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # else it says what overrides what
    known = [PAPER, *(name for name in names if Path(name).is_dir())]
    wanted = []
    try:
        for name in names:
            own = TaskManager(include_path=name, include_defaults=False)
            wanted += own.all_groups or own.all_subtasks or [name]
        manager = TaskManager(include_path=known, include_defaults=False)
        if not set(wanted) <= set(manager.all_tasks):  # look among its own, for half a minute
            manager = TaskManager(include_path=known)
        return manager.load(wanted)
    except Exception as error:  # files, templates and the hub raise many kinds
        reason = str(error).splitlines() or [repr(error)]
        raise ValueError(f"--tasks {','.join(names)}: {reason[0]}") from error


class Answers(LM):
    """loaded.model, or a quantized copy of it, as lm-eval asks it. Batches and padding change no
    answer, since quantized models too round every token by itself. Raises ValueError for what
    cannot be asked, and ArithmeticError if the model's numbers are not finite."""

    def __init__(self, loaded, model, seq_len: int, batch_size: int):
        super().__init__()
        self.model, self.encoding, self.end_ids = model, loaded.encoding, loaded.end_ids
        self.window, self.budget = seq_len, batch_size * seq_len  # tokens of a text, of a batch
        self.first = (beginning(self.encoding) or [separator(self.encoding)])[-1]
        self.cut = 0  # how many texts were cut at the left to fit the window

    def loglikelihood(self, requests) -> list[tuple[float, bool]]:
        return self.score([self.encode_pair(*request.args) for request in requests])

    def loglikelihood_rolling(self, requests) -> list[float]:
        sums = []
        for request in requests:
            ids = encode(self.encoding, request.args[0]).tolist()
            pairs = [([*before, after[-1]], len(after))
                     for before, after in rolling_windows(ids, self.first, self.window, 1)]
            sums.append(sum(log_p for log_p, _ in self.score(pairs)))
        return sums

    def encode_pair(self, context: str, choice: str) -> tuple[list[int], int]:
        """(tokens of both, encoded together as text was in training; how many to score: those after
        as many as the context has without the blanks at its end, but at least one)."""
        ids = encode_whole(self.encoding, context + choice).tolist()
        n = max(1, len(ids) - len(encode_whole(self.encoding, context.rstrip())))
        if n >= len(ids):
            ids, n = [self.first, *ids], len(ids)
        if not 0 < n <= self.window:
            raise ValueError(f"a choice of {n:,} tokens, where 1 to {self.window:,} fit the window")
        self.cut += len(ids) > self.window + 1  # the last token is only predicted
        return ids[-self.window - 1 :], n

    @torch.no_grad()
    def score(self, pairs) -> list[tuple[float, bool]]:
        """Of every (ids, n): the sum of log p over its last n tokens; is each the likeliest one?"""
        scores = [None] * len(pairs)
        for batch in batches([(len(ids) - 1,) for ids, _ in pairs], self.budget, "score"):
            text = torch.zeros(len(batch), len(pairs[batch[0]][0]), dtype=torch.long)  # [B, T + 1]
            scored = torch.zeros(text.shape, dtype=torch.bool)
            for row, (ids, n) in enumerate(pairs[i] for i in batch):
                text[row, : len(ids)] = torch.tensor(ids)  # padding comes after it, unseen
                scored[row, len(ids) - n : len(ids)] = True
            logits = self.logits(text[:, :-1], scored[:, 1:])  # [N, V]
            targets = text[scored].to(logits.device)  # [N]
            log_p = -F.cross_entropy(logits, targets, reduction="none")
            found = torch.stack([log_p, logits.argmax(dim=-1) == targets]).cpu().double()  # [2, N]
            for i, (values, hits) in zip(batch, found.split(scored.sum(dim=1).tolist(), dim=1)):
                scores[i] = values.sum().item(), bool(hits.all())
        return scores

    @torch.no_grad()
    def generate_until(self, requests) -> list[str]:
        """What the model writes, always the likeliest token, up to a stop string or its end."""
        texts, prompts, sizes = [""] * len(requests), [], []
        for context, options in (request.args for request in requests):
            n, ids = options.get("max_gen_toks", 256), encode_whole(self.encoding, context).tolist()
            room = max(self.window - n, self.window // 2)
            self.cut += len(ids) > room
            prompts.append(ids[-room:] or [self.first])
            sizes.append((len(prompts[-1]), min(n, self.window - len(prompts[-1]))))
        for batch in batches(sizes, self.budget, "write", equal=True):  # which needs no padding
            written, cache = [[] for _ in batch], self.model.new_cache()
            fresh = torch.tensor([prompts[i] for i in batch])  # [B, T], then [B, 1]
            for _ in range(sizes[batch[0]][1]):
                logits = self.logits(fresh, (slice(None), -1), cache)  # [B, V]
                logits[:, without_token(self.encoding, logits.shape[1])] = -math.inf
                fresh = logits.argmax(dim=-1, keepdim=True)  # [B, 1]
                written = [ids + token for ids, token in zip(written, fresh.tolist())]
                done = [self.finished(ids, requests[i]) for i, ids in zip(batch, written)]
                if all(ended for _, ended in done):
                    break
            for i, (text, _) in zip(batch, done):
                texts[i] = text
        return texts

    def finished(self, ids: list[int], request) -> tuple[str, bool]:
        """(their text up to the first end of text or stop string, whether there is one)."""
        n = next((n for n, i in enumerate(ids) if i in self.end_ids), len(ids))
        whole = text = self.encoding.decode(ids[:n])
        for word in request.args[1].get("until", []):
            text = text.split(word)[0]
        return text, n < len(ids) or text != whole

    def logits(self, tokens, places, cache=None):
        """Those of tokens [B, T] at some places, [N, V], chosen before the head: all of them would
        fill gigabytes at V = 49,152."""
        with hooked([(self.model.at_head, lambda module, inputs, x: x[places])]):
            logits = self.model(tokens.to(self.model.embed.weight.device), cache=cache).float()
        if not logits.isfinite().all():
            raise ArithmeticError("the model's logits are not finite: there is nothing to compare")
        return logits


def batches(sizes: list[tuple], budget: int, label: str, equal=False):
    """Indices in batches of at most `budget` tokens, the longest texts first. The sum of a size is
    a text's length; `equal`: all of a batch have the same size."""
    found, first = [], None
    for i in sorted(range(len(sizes)), key=sizes.__getitem__, reverse=True):
        full = not found or (len(found[-1]) + 1) * sum(first) > budget
        if full or equal and sizes[i] != first:
            first = sizes[i]
            found.append([])
        found[-1].append(i)
    return tqdm(found, label, leave=False, disable=None)
