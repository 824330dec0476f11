r"""How often a model picks or writes the right answer: the paper's ten benchmarks, or questions of
your own.

    python data/benchmarks.py all --hub --out tasks      make the task files from the originals
    python eval.py RUN --tasks tasks                     score a model with the functions below

A task file holds one JSON object a line. The first line may be settings (see Task). The others are
questions, all of one type:
    {"task": "gsm8k", "benchmark": "GSM8K", "shots": 8, "shots_from": "shots/gsm8k.jsonl"}
    {"type": "mc", "context": "Question: ...\nAnswer:", "choices": [" red", " blue"], "gold": 1}
    {"type": "gen", "context": "Question: ...\nAnswer:", "answers": ["18"], "target": " #### 18"}

*mc*, multiple choice: the model scores context + choice, blanks included, for every choice. The
likeliest choice is its answer. A "group" beside the gold gives each group a score of its own.
*gen*, generation: the model continues the context, and its text must match one of the answers.
A *shot* is another question in front of the one that is asked, with its answer: context + target,
or context + the right choice.

The rules are those of the paper's harness (lighteval 0.9.2), with two exceptions: log-probabilities
are computed in fp32 instead of bf16, and at least one token of every choice is scored
(docs/benchmarks.md).
Read it top to bottom: scores, likelihood, generation, prompts, task files.
"""

import json
import math
import random
import re
import string
from dataclasses import dataclass, field, fields
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

from data.tokenizer import beginning, encode_whole, separator, without_token
from model import hooked
from nanoosp.files import decoded

# Scores


@dataclass
class Task:
    """The questions of a file and its settings. The first line may change these defaults."""

    questions: list[dict]
    pool: list[dict]  # the lines that shots are drawn from
    task: str = ""  # its name; if empty, the file's
    benchmark: str = ""  # the column it is averaged into; if empty, its own. ARC has two tasks
    shots: int = 0  # in front of every question, drawn anew for each
    shots_from: str = ""  # a file to draw them from, beside this one; if empty, this one
    max_new: int = 32  # gen: tokens to write
    stop: list = field(default_factory=list)  # gen: an answer ends before any of these strings
    match: str = "alias"  # gen: the rule, see is_right
    source: str = ""  # for the reader


def score_tasks(model, encoding, tasks: list[Task], seq_len: int, batch_size: int,
                end_ids=None) -> dict:
    """Scores on the tasks of read_tasks. A batch has at most batch_size * seq_len tokens. Written
    answers end with one of `end_ids`; None: with the encoding's separator.

    Batches and padding change no score. This holds for quantized models too, since they round
    every token by itself.

    Returns:
        tasks: for each name n, acc, acc_norm (mc only), score (acc_norm for mc, acc for gen), its
            stderr, `cut`, how many questions were cut at the left to fit seq_len, and `groups`, the
            score of each group, if there are several.
        benchmarks: for each name the mean score of its tasks.
        average: the mean over benchmarks.
    """
    results, columns = {}, {}
    for task in tasks:
        if task.questions[0]["type"] == "mc":
            right = judge_choices(model, encoding, task, seq_len, batch_size)
        else:
            right = judge_writing(model, encoding, task, seq_len, batch_size, end_ids)
        n, cut = len(task.questions), sum(right.pop("cut"))
        means = {name: sum(values) / n for name, values in right.items()}
        counted = right.get("acc_norm", right["acc"])
        score = sum(counted) / n
        grouped = {}
        for question, value in zip(task.questions, counted):
            grouped.setdefault(str(question.get("group", "")), []).append(value)
        stderr = math.sqrt(score * (1 - score) / n)
        result = dict(n=n, **means, score=score, stderr=stderr, cut=cut)
        if len(grouped) > 1:
            result["groups"] = {name: sum(v) / len(v) for name, v in grouped.items()}
        results[task.task] = result
        columns.setdefault(task.benchmark, []).append(score)
    columns = {name: sum(scores) / len(scores) for name, scores in columns.items()}
    return dict(tasks=results, benchmarks=columns, average=sum(columns.values()) / len(columns))


def judge_choices(model, encoding, task: Task, seq_len: int, batch_size: int) -> dict[str, list]:
    """For every question: is the likeliest choice the right one, and was it cut at the left?

    acc compares log p of the choices. acc_norm compares log p per character, so that long choices
    are not punished for their length; one leading blank does not count.
    Raises ValueError for a choice longer than seq_len: the part cut off would cost nothing.
    """
    pairs, cut = [], []
    contexts = prompts(task, encoding, room=seq_len)
    for number, (context, question) in enumerate(zip(contexts, task.questions), 1):
        for choice in question["choices"]:
            ids, n = encode_pair(encoding, context, choice)
            if n > seq_len:
                raise ValueError(f"task {task.task}, question {number}: a choice of {n:,} tokens "
                                 f"is longer than the window of {seq_len:,}")
            pairs.append((ids, n))
        asked = pairs[-len(question["choices"]) :]
        cut.append(any(len(ids) > seq_len + 1 for ids, _ in asked))  # the last token is not read
    sums = iter(log_likelihoods(model, pairs, seq_len, batch_size, label=task.task))
    acc, acc_norm = [], []
    for question in task.questions:
        log_p = [next(sums) for _ in question["choices"]]
        lengths = [max(1, len(choice.removeprefix(" "))) for choice in question["choices"]]
        acc.append(likeliest(log_p) == question["gold"])
        acc_norm.append(likeliest([p / n for p, n in zip(log_p, lengths)]) == question["gold"])
    return dict(acc=acc, acc_norm=acc_norm, cut=cut)


def likeliest(scores: list[float]) -> int:
    """The index of the largest score. The first one wins a tie."""
    return scores.index(max(scores))


def judge_writing(model, encoding, task: Task, seq_len: int, batch_size: int, end_ids) -> dict:
    """For every question: does what the model writes match an answer, and was it cut at the left?

    A prompt that leaves no room for max_new tokens is cut at the left, to half a window at least.
    """
    room = max(seq_len - task.max_new, seq_len // 2)
    ids = [encode_whole(encoding, text).tolist() for text in prompts(task, encoding, room)]
    cut = [len(prompt) > room for prompt in ids]
    ids = [prompt[-room:] or [separator(encoding)] for prompt in ids]
    texts = write_answers(model, encoding, ids, task, seq_len, batch_size, end_ids)
    return dict(cut=cut, acc=[is_right(text, question["answers"], task.match)
                              for text, question in zip(texts, task.questions)])


def is_right(text: str, answers: list[str], match: str) -> bool:
    """Does the text equal one of the answers?

    alias: both are compared without case, punctuation and outer blanks. Empty text is wrong.
    number: the first number after "####", without commas. By the official rule a full stop right
        behind the number belongs to it, which makes the answer wrong.
    """
    if match == "alias":
        return bool(text) and bare(text) in map(bare, answers)
    found = re.search(r"#### (-?[0-9.,]+)", text)
    return (found[1].replace(",", "") if found else "[invalid]") in answers


def bare(text: str) -> str:
    return text.strip().lower().translate(str.maketrans("", "", string.punctuation))


# Likelihood


def encode_pair(encoding, context: str, continuation: str) -> tuple[list[int], int]:
    """(tokens of context + continuation, how many at their end belong to the continuation).

    Both are encoded together, as text was in training. The continuation is what is left after as
    many tokens as the context has without the spaces at its end: at least the last token, even if
    that contains the end of the context. Raises ValueError if there is no token at all.
    """
    ids = encode_whole(encoding, context + continuation).tolist()
    if len(ids) == len(beginning(encoding)):
        raise ValueError(f"the tokenizer has no tokens for the choice {continuation!r}")
    cut = len(encode_whole(encoding, context.rstrip()))
    cut = min(cut, len(ids) - 1)
    if cut == 0:  # the first token that is scored needs one before it
        return [separator(encoding), *ids], len(ids)
    return ids, len(ids) - cut


@torch.no_grad()
def log_likelihoods(model, pairs: list, seq_len: int, batch_size: int, label="") -> list[float]:
    """For every (ids, n) of `pairs` the sum of log p over its last n tokens.

    Sequences of more than seq_len tokens are cut at the left. Shorter ones are padded at the right,
    which causal attention never sees.
    Raises ArithmeticError if the model's numbers are not finite: no choice would be the largest.
    """
    device = next(model.parameters()).device
    sums = [0.0] * len(pairs)
    lengths = [min(len(ids) - 1, seq_len) for ids, _ in pairs]  # the last token is only predicted
    for batch in tqdm(batches(lengths, batch_size * seq_len), label, leave=False, disable=None):
        tokens = torch.zeros(len(batch), lengths[batch[0]], dtype=torch.long)  # [B, T]
        rows, columns, targets = [], [], []  # where a token is scored, and which one: [N] each
        for row, i in enumerate(batch):
            (ids, n), T = pairs[i], lengths[i]
            n = min(n, T)
            tokens[row, :T] = torch.tensor(ids[-T - 1 : -1])
            rows += [row] * n
            columns += range(T - n, T)
            targets += ids[-n:]
        logits = logits_at(model, tokens.to(device), rows, columns)  # [N, V]
        targets = torch.tensor(targets, device=device)
        log_p = -F.cross_entropy(logits.float(), targets, reduction="none")  # [N]
        if not log_p.isfinite().all():
            raise ArithmeticError(f"{label}: the model's log-probabilities are not finite: "
                                  "there is nothing to compare")
        for row, value in zip(rows, log_p.tolist()):
            sums[batch[row]] += value
    return sums


def logits_at(model, tokens, rows, columns, cache=None):
    """The model's logits at some places of `tokens` [B, T] only: [N, V].

    The places are chosen before the head. Logits of all places would fill gigabytes at V = 49,152.
    """
    def choose(module, inputs, x):
        return x[rows, columns]  # [B, T, D] -> [N, D]

    with hooked([(model.at_head, choose)]):
        return model(tokens, cache=cache)


def batches(lengths: list[int], budget: int, equal=False) -> list[list[int]]:
    """Indices in batches whose size times longest length is within `budget`.

    Longest sequences come first, so that a batch too large for the memory fails at the start.
    `equal`: all sequences of a batch have the same length.
    """
    found = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        longest = lengths[found[-1][0]] if found else 0
        full = not found or (len(found[-1]) + 1) * longest > budget
        if full or equal and lengths[i] != longest:
            found.append([])
        found[-1].append(i)
    return found


# Generation


@torch.no_grad()
def write_answers(model, encoding, prompts: list, task: Task, seq_len: int, batch_size: int,
                  end_ids=None) -> list[str]:
    """The texts that the model writes after `prompts` (lists of ids), always the likeliest token.

    Prompts of equal length share a batch, which then needs no padding. Short questions often do,
    long ones rarely. Raises ArithmeticError if the model's numbers are not finite.
    """
    device, texts = next(model.parameters()).device, [""] * len(prompts)
    end_ids = [separator(encoding)] if end_ids is None else end_ids
    lengths = [len(ids) + task.max_new for ids in prompts]
    grouped = batches(lengths, batch_size * seq_len, equal=True)
    for batch in tqdm(grouped, task.task, leave=False, disable=None):
        written, cache = [[] for _ in batch], model.new_cache()
        fresh = torch.tensor([prompts[i] for i in batch], device=device)  # [B, T], then [B, 1]
        for _ in range(min(task.max_new, seq_len - fresh.shape[1])):
            logits = logits_at(model, fresh, slice(None), -1, cache)  # [B, V]
            if not logits.isfinite().all():
                raise ArithmeticError(f"{task.task}: the model's logits are not finite: "
                                      "there is nothing to write")
            logits[:, without_token(encoding, logits.shape[1])] = -math.inf
            fresh = logits.argmax(dim=-1, keepdim=True)  # [B, 1]
            for ids, token in zip(written, fresh.flatten().tolist()):
                ids.append(token)
            if all(finished_text(encoding, ids, task.stop, end_ids)[1] for ids in written):
                break
        for i, ids in zip(batch, written):
            texts[i] = finished_text(encoding, ids, task.stop, end_ids)[0]
    return texts


def finished_text(encoding, ids: list[int], stop: list[str], end_ids) -> tuple[str, bool]:
    """(the text of `ids` up to the first of `end_ids` or stop strings, whether one was found)."""
    n = next((n for n, i in enumerate(ids) if i in end_ids), len(ids))
    whole = text = encoding.decode(ids[:n])
    for word in stop:
        text = text.split(word)[0]
    return text, n < len(ids) or text != whole


# Prompts


def prompts(task: Task, encoding, room: int) -> list[str]:
    """Every question's context after its own shots, as many of them as fit into `room` tokens.

    The paper's harness draws them so: one generator shuffles the questions, then samples shots for
    each question in that order.
    """
    if not task.shots:
        return [question["context"] for question in task.questions]
    rng, order, texts = random.Random(42), list(range(len(task.questions))), {}
    rng.shuffle(order)
    own = task.pool is task.questions  # then draw one more: a question may draw itself
    for i in tqdm(order, f"{task.task}: shots", leave=False, disable=None):
        question = task.questions[i]
        drawn = rng.sample(task.pool, task.shots + own)
        shots = [shot for shot in drawn if shot is not question][: task.shots]
        parts = [*map(solved, shots), question["context"]]
        while len(parts) > 1 and len(encode_whole(encoding, "\n\n".join(parts))) > room:
            parts.pop(-2)  # the last shot
        texts[i] = "\n\n".join(parts)
    return [texts[i] for i in range(len(texts))]


def solved(question: dict) -> str:
    """A question with its answer, as a shot."""
    if question["type"] == "mc":
        return question["context"] + question["choices"][question["gold"]]
    return question["context"] + question.get("target", " " + question["answers"][0])


# Task files


def read_tasks(paths) -> list[Task]:
    """The tasks in these files, and in the *.jsonl of these folders. Raises ValueError, OSError."""
    files = []
    for path in map(Path, paths):
        files += sorted(path.glob("*.jsonl")) if path.is_dir() else [path]
    tasks = {}
    for file in files:
        settings, questions = read_lines(file)
        task = Task(questions, pool=questions, **settings)
        task.task = task.task or file.stem
        task.benchmark = task.benchmark or task.task
        if task.shots and task.shots_from:
            task.pool = read_lines(file.parent / task.shots_from)[1]
        if task.shots > len(task.pool) - (task.pool is questions):
            raise ValueError(f"{file} asks for {task.shots} shots, of {len(task.pool)} lines to "
                             "draw them from")
        if task.task in tasks:
            raise ValueError(f"{file} is the second file of the task {task.task!r}: name one of "
                             "them")
        tasks[task.task] = task
    if not tasks:
        raise FileNotFoundError(f"no *.jsonl in {', '.join(map(str, paths))}: see "
                                "python data/benchmarks.py --help")
    return list(tasks.values())


def read_lines(path: Path) -> tuple[dict, list[dict]]:
    """(settings, questions) of a file. Raises OSError, and ValueError naming a bad line."""
    settings, questions = {}, []
    for number, line in enumerate(path.read_bytes().split(b"\n"), 1):
        try:
            line = decoded(line).strip()
            record = json.loads(line or "{}")
            if not isinstance(record, dict):
                raise ValueError("not a JSON object")
            if number == 1 and "type" not in record:
                check_settings(record)
                settings = record
            elif line:
                check_question(record)
                questions.append(record)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number}: not JSON ({error.msg})") from error
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}, line {number}: {error}") from error
    if not questions:
        raise ValueError(f"{path} has no questions")
    if len({question["type"] for question in questions}) > 1:
        raise ValueError(f"{path} mixes mc and gen: give each a file of its own")
    return settings, questions


def check_settings(settings: dict):
    """Raise ValueError for a setting that is unknown or impossible."""
    types = {f.name: f.type for f in fields(Task) if f.name not in ("questions", "pool")}
    described = {str: "a string", int: "a whole number, 0 or more", list: "a list of strings"}
    for name, value in settings.items():
        if name not in types:
            raise ValueError(f"unknown setting {name!r}: use some of {', '.join(types)}")
        valid = type(value) is types[name]
        if valid and types[name] is int:
            valid = value >= 0
        if valid and types[name] is list:
            valid = all(isinstance(word, str) and word for word in value)
        if not valid:
            raise ValueError(f"{name} must be {described[types[name]]}, not {value!r}")
    if settings.get("max_new", 1) == 0:
        raise ValueError("max_new must be 1 or more, not 0: the model would write nothing")
    if settings.get("match", "alias") not in ("alias", "number"):
        raise ValueError(f"match {settings['match']!r} must be 'alias' or 'number'")


def check_question(question: dict):
    """Raise ValueError unless the question can be asked and scored."""
    if question.get("type") not in ("mc", "gen"):
        raise ValueError(f"type {question.get('type')!r} must be 'mc' or 'gen'")
    context, target = question.get("context"), question.get("target", "")
    if not isinstance(context, str) or not isinstance(target, str):
        raise ValueError("context, and target if there is one, must be strings")
    name = "choices" if question["type"] == "mc" else "answers"
    texts = question.get(name)
    if not isinstance(texts, list) or not texts or not all(isinstance(t, str) for t in texts):
        raise ValueError(f"{name} must be a list of strings")
    if question["type"] == "gen":
        return
    if not all(texts):
        raise ValueError("an empty choice cannot be scored")
    gold = question.get("gold")
    if type(gold) is not int or not 0 <= gold < len(texts):
        raise ValueError(f"gold {gold!r} is none of its {len(texts)} choices "
                         f"(0 to {len(texts) - 1})")
