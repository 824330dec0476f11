r"""How often a model picks or writes the right answer: the ten benchmarks of the paper, or any questions of your own.

    python data/benchmarks.py all --hub --out tasks      make the task files from the original datasets
    python eval.py RUN --tasks tasks                     score a model on them, with the functions below

A task file holds one JSON object a line: settings first (see Task; may be missing), then questions of one type:
    {"task": "gsm8k", "benchmark": "GSM8K", "shots": 8, "shots_from": "shots/gsm8k.jsonl", "match": "number"}
    {"type": "mc", "context": "Question: ...\nAnswer:", "choices": [" red", " blue"], "gold": 1, "group": "colours"}
    {"type": "gen", "context": "Question: ...\nAnswer:", "answers": ["18"], "target": " ... #### 18"}

*mc*, multiple choice: context + choice is exactly the text that is scored, blanks included; the likeliest choice is the
model's answer. *gen*: the model continues the context; what it writes must match one of the answers. A *shot* is
another line, solved (context + target, or context + the right choice), in front of the question.

The rules are those of the paper's harness (lighteval 0.9.2), except that log-probabilities are taken in fp32, not bf16.
Read it top to bottom: task files, prompts, likelihood, generation, scores, output.
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

from data.dataset import encode, separator

# ---------------------------------------------------------------------------------------------------------------------
# Task files


@dataclass
class Task:
    """The questions of a file, and its settings: what the first line may say, with the defaults."""

    questions: list[dict]
    pool: list[dict]  # the lines that shots are drawn from
    task: str = ""  # its name; if empty, the file's
    benchmark: str = ""  # the column it is averaged into; if empty, its own. (ARC is the mean of two tasks.)
    shots: int = 0  # how many, new ones for every question
    shots_from: str = ""  # a file to draw them from, beside this one; if empty, this one
    max_new: int = 32  # gen: tokens to write
    stop: list = field(default_factory=list)  # gen: an answer ends before any of these strings
    match: str = "alias"  # gen: the rule, see is_right
    source: str = ""  # for the reader


SETTINGS = {f.name: f.type for f in fields(Task) if f.name not in ("questions", "pool")}
KINDS = {str: "a string", int: "a whole number, 0 or more", list: "a list of strings"}


def check_settings(settings: dict):
    """Raise ValueError for a setting that is unknown or impossible."""
    for name, value in settings.items():
        if name not in SETTINGS:
            raise ValueError(f"unknown setting {name!r}: use some of {', '.join(SETTINGS)}")
        kind = SETTINGS[name]
        good = type(value) is kind and (kind is not int or value >= 0)
        if not good or kind is list and not all(isinstance(word, str) and word for word in value):
            raise ValueError(f"{name} must be {KINDS[kind]}, not {value!r}")
    if settings.get("max_new", 1) == 0:
        raise ValueError("max_new must be 1 or more, not 0: the model would write nothing")
    if settings.get("match", "alias") not in ("alias", "number"):
        raise ValueError(f"match {settings['match']!r} must be 'alias' or 'number'")


def check_question(q: dict):
    """Raise ValueError unless the question can be asked and scored."""
    if q.get("type") not in ("mc", "gen"):
        raise ValueError(f"type {q.get('type')!r} must be 'mc' or 'gen'")
    if not isinstance(q.get("context"), str) or not isinstance(q.get("target", ""), str):
        raise ValueError("context, and target if there is one, must be strings")
    name, gold = "choices" if q["type"] == "mc" else "answers", q.get("gold")
    texts = q.get(name)
    if not isinstance(texts, list) or not texts or not all(isinstance(t, str) for t in texts):
        raise ValueError(f"{name} must be a list of strings")
    if q["type"] == "mc" and not all(texts):
        raise ValueError("an empty choice cannot be scored")
    if q["type"] == "mc" and not (type(gold) is int and 0 <= gold < len(texts)):
        raise ValueError(f"gold {gold!r} is none of its {len(texts)} choices (0 to {len(texts) - 1})")


def read_lines(path: Path) -> tuple[dict, list[dict]]:
    """(settings, questions) of a file. Raises OSError, and ValueError with file and line for what cannot be used."""
    settings, questions = {}, []
    for number, line in enumerate(path.read_bytes().split(b"\n"), 1):
        try:
            line = line.strip()
            record = json.loads(line or b"{}")
            if not isinstance(record, dict):
                raise ValueError("not a JSON object")
            if number == 1 and "type" not in record:
                check_settings(record)
                settings = record
            elif line:
                check_question(record)
                questions.append(record)
        except (ValueError, RecursionError) as error:
            reason = f"not JSON ({error.msg})" if isinstance(error, json.JSONDecodeError) else error
            reason = "not UTF-8 text" if isinstance(error, UnicodeDecodeError) else reason
            raise ValueError(f"{path}, line {number}: {reason}") from error
    if not questions:
        raise ValueError(f"{path} has no questions")
    if len({q["type"] for q in questions}) > 1:
        raise ValueError(f"{path} mixes mc and gen: give each a file of its own")
    return settings, questions


def read_tasks(paths) -> list[Task]:
    """The tasks in these files, and in the *.jsonl of these folders. Raises ValueError and OSError."""
    files = [file for path in map(Path, paths) for file in (sorted(path.glob("*.jsonl")) if path.is_dir() else [path])]
    tasks = {}
    for file in files:
        settings, questions = read_lines(file)
        task = Task(questions, pool=questions, **settings)
        task.task = task.task or file.stem
        task.benchmark = task.benchmark or task.task
        if task.shots and task.shots_from:
            task.pool = read_lines(file.parent / task.shots_from)[1]
        if task.shots > len(task.pool) - (task.pool is questions):
            raise ValueError(f"{file} asks for {task.shots} shots, of {len(task.pool)} lines to draw them from")
        if task.task in tasks:
            raise ValueError(f"{file} is the second file of the task {task.task!r}: name one of them")
        tasks[task.task] = task
    if not tasks:
        raise FileNotFoundError(f"no *.jsonl in {', '.join(map(str, paths))}: see python data/benchmarks.py --help")
    return list(tasks.values())


# ---------------------------------------------------------------------------------------------------------------------
# Prompts


def solved(q: dict) -> str:
    """A question with its answer, as a shot."""
    target = q["choices"][q["gold"]] if q["type"] == "mc" else q.get("target", " " + q["answers"][0])
    return q["context"] + target


def prompts(task: Task, encoding, room: int) -> list[str]:
    """Every question's context behind its own shots, as many of them as fit into `room` tokens.

    Drawn as the paper's harness draws them: one generator shuffles the questions, then samples for each in that order.
    """
    if not task.shots:
        return [q["context"] for q in task.questions]
    rng, order, texts = random.Random(42), list(range(len(task.questions))), {}
    rng.shuffle(order)
    for i in tqdm(order, f"{task.task}: shots", leave=False, disable=None):
        q, own = task.questions[i], task.pool is task.questions  # if own, one more, in case it draws itself
        shots = [s for s in rng.sample(task.pool, task.shots + own) if s is not q][: task.shots]
        parts = [*map(solved, shots), q["context"]]
        while len(parts) > 1 and len(encode(encoding, "\n\n".join(parts))) > room:
            parts.pop(-2)  # the last shot
        texts[i] = "\n\n".join(parts)
    return [texts[i] for i in range(len(texts))]


# ---------------------------------------------------------------------------------------------------------------------
# Likelihood


def encode_pair(encoding, context: str, continuation: str) -> tuple[list[int], int]:
    """Tokens of context + continuation, and how many at their end count as the continuation's: at least one.

    They are encoded together, as text was in training. Blanks at the end of the context belong to the continuation.
    """
    head = context.rstrip()
    ids = encode(encoding, context + continuation).tolist()
    cut = min(len(encode(encoding, head)), len(ids) - 1)  # tokens may merge across the border
    if cut == 0:
        return [separator(encoding), *ids], len(ids)  # the first token that is scored needs one before it
    return ids, len(ids) - cut


def logits_at(model, tokens, rows, columns, cache=None):
    """The model's logits, at some places of `tokens` [B, T] only: [N, V]. The places are chosen before the head, which
    at all of them would fill gigabytes when V is 49,152."""
    handle = model.at_head.register_forward_hook(lambda module, inputs, x: x[rows, columns])  # [B, T, D] -> [N, D]
    try:
        return model(tokens, cache=cache)
    finally:
        handle.remove()


def batches(lengths: list[int], budget: int, equal=False) -> list[list[int]]:
    """Indices, longest first (if memory ends, then at once), cut where number times longest would exceed `budget`;
    with `equal`, also where the length changes."""
    found = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        longest = lengths[found[-1][0]] if found else 0
        if not found or (len(found[-1]) + 1) * longest > budget or equal and lengths[i] != longest:
            found.append([])
        found[-1].append(i)
    return found


@torch.no_grad()
def log_likelihoods(model, pairs: list, seq_len: int, batch_size: int, autocast, label="") -> list[float]:
    """Sum of log p of the last n tokens, for every (ids, n) of `pairs`. What exceeds seq_len tokens is cut off at
    the left. Shorter sequences are padded at the right, which causal attention never sees.

    Raises ArithmeticError for a model without finite numbers: of NaNs none is the largest."""
    device, sums = next(model.parameters()).device, [0.0] * len(pairs)
    lengths = [min(len(ids) - 1, seq_len) for ids, _ in pairs]  # of the input: the last token is only predicted
    for batch in tqdm(batches(lengths, batch_size * seq_len), label, leave=False, disable=None):
        tokens = torch.zeros(len(batch), lengths[batch[0]], dtype=torch.long)  # [B, T]
        rows, columns, targets = [], [], []
        for row, i in enumerate(batch):
            (ids, n), T = pairs[i], lengths[i]
            n = min(n, T)
            tokens[row, :T] = torch.tensor(ids[-T - 1 : -1])
            rows += [row] * n
            columns += range(T - n, T)
            targets += ids[-n:]
        with autocast:
            logits = logits_at(model, tokens.to(device), rows, columns)  # [N, V]
        log_p = -F.cross_entropy(logits.float(), torch.tensor(targets, device=device), reduction="none")  # [N]
        if not torch.isfinite(log_p).all():
            raise ArithmeticError(f"{label}: the model's log-probabilities are not finite: there is nothing to compare")
        for row, value in zip(rows, log_p.tolist()):
            sums[batch[row]] += value
    return sums


# ---------------------------------------------------------------------------------------------------------------------
# Generation


def finished_text(encoding, ids: list[int], stop: list[str]) -> tuple[str, bool]:
    """The text of `ids` before the end-of-text token and all stop strings; and whether one of these has come."""
    end = separator(encoding)
    whole = text = encoding.decode(ids[: ids.index(end)] if end in ids else ids)
    for word in stop:
        text = text.split(word)[0]
    return text, end in ids or text != whole


@torch.no_grad()
def write_answers(model, encoding, prompts: list, task: Task, seq_len: int, batch_size: int, autocast) -> list[str]:
    """What the model writes after each prompt (a list of ids), taking the likeliest token every time.

    Prompts of one length share a batch: these need neither padding nor a mask, which the model does not have. Short
    questions often meet that way; long ones rarely do, and then go alone. Raises ArithmeticError, as above.
    """
    device, texts, lengths = next(model.parameters()).device, {}, [len(ids) + task.max_new for ids in prompts]
    for batch in tqdm(batches(lengths, batch_size * seq_len, equal=True), task.task, leave=False, disable=None):
        written, cache = [[] for _ in batch], model.new_cache()
        fresh = torch.tensor([prompts[i] for i in batch], device=device)  # [B, T], after that [B, 1]
        for _ in range(min(task.max_new, seq_len - fresh.shape[1])):
            with autocast:
                logits = logits_at(model, fresh, slice(None), -1, cache)  # [B, V]
            if not torch.isfinite(logits).all():
                raise ArithmeticError(f"{task.task}: the model's logits are not finite: there is nothing to write")
            fresh = logits[:, : encoding.n_vocab].argmax(dim=-1, keepdim=True)  # V may be padded beyond the tokens
            for ids, token in zip(written, fresh.flatten().tolist()):
                ids.append(token)
            if all(finished_text(encoding, ids, task.stop)[1] for ids in written):
                break
        texts.update((i, finished_text(encoding, ids, task.stop)[0]) for i, ids in zip(batch, written))
    return [texts[i] for i in range(len(prompts))]


def bare(text: str) -> str:
    """Without blanks around it, capitals and punctuation."""
    return text.strip().lower().translate(str.maketrans("", "", string.punctuation))


def is_right(written: str, answers: list[str], match: str) -> bool:
    """Does the text equal one of the answers? alias: when both are bare; writing nothing is wrong. number: the first
    number behind "####", without commas (a full stop right behind it stays, and makes it wrong: the official rule)."""
    if match == "alias":
        return bool(written) and bare(written) in map(bare, answers)
    found = re.search(r"#### (-?[0-9.,]+)", written)
    return (found[1].replace(",", "") if found else "[invalid]") in answers


# ---------------------------------------------------------------------------------------------------------------------
# Scores


def likeliest(scores: list[float]) -> int:
    """The index of the largest; of equals, the first."""
    return max(range(len(scores)), key=lambda i: scores[i])


def score_choices(model, encoding, task: Task, seq_len: int, batch_size: int, autocast) -> dict[str, list[bool]]:
    """For every question, is the likeliest choice the right one? acc: by log p. acc_norm: by log p per character, not
    counting one leading blank, so that long choices are not punished for their length. Raises ValueError for a choice
    that does not fit into seq_len: what is cut off would cost nothing."""
    pairs = []
    for number, (text, q) in enumerate(zip(prompts(task, encoding, room=seq_len), task.questions), 1):
        pairs += [encode_pair(encoding, text, choice) for choice in q["choices"]]
        longest = max(n for _, n in pairs[-len(q["choices"]) :])
        if longest > seq_len:
            raise ValueError(f"task {task.task}, question {number}: a choice of {longest:,} tokens is longer than the "
                             f"window of {seq_len:,}")
    sums = iter(log_likelihoods(model, pairs, seq_len, batch_size, autocast, label=task.task))
    acc, acc_norm = [], []
    for q in task.questions:
        log_p = [next(sums) for _ in q["choices"]]
        per_character = [s / max(1, len(c) - c.startswith(" ")) for s, c in zip(log_p, q["choices"])]
        acc.append(likeliest(log_p) == q["gold"])
        acc_norm.append(likeliest(per_character) == q["gold"])
    return dict(acc=acc, acc_norm=acc_norm)


def score_writing(model, encoding, task: Task, seq_len: int, batch_size: int, autocast) -> dict[str, list[bool]]:
    """For every question, does what the model writes match? A prompt that leaves no room for it is cut at the left."""
    room = max(seq_len - task.max_new, seq_len // 2)
    texts = prompts(task, encoding, room)
    ids = [encode(encoding, text)[-room:].tolist() or [separator(encoding)] for text in texts]
    written = write_answers(model, encoding, ids, task, seq_len, batch_size, autocast)
    return dict(acc=[is_right(text, q["answers"], task.match) for text, q in zip(written, task.questions)])


def score_tasks(model, encoding, tasks: list[Task], seq_len: int, batch_size: int, autocast) -> dict:
    """The scores of any Transformer on tasks of read_tasks. A quantized one too: values are rounded token by token, so
    that batches and padding change nothing. A batch has at most batch_size * seq_len tokens.

    Returns `tasks`: name -> n, acc, acc_norm (mc), score (acc_norm if there is one, else acc) with its stderr, and the
    score of every group if there are groups; `benchmarks`: the mean score of the tasks of each; `average`: their mean.
    """
    results, columns = {}, {}
    for task in tasks:
        score = score_choices if task.questions[0]["type"] == "mc" else score_writing
        right, n, groups = score(model, encoding, task, seq_len, batch_size, autocast), len(task.questions), {}
        means = {name: sum(values) / n for name, values in right.items()}
        p, counted = list(means.values())[-1], list(right.values())[-1]
        for q, value in zip(task.questions, counted):
            groups.setdefault(str(q.get("group", "")), []).append(value)
        groups = {"groups": {name: sum(v) / len(v) for name, v in groups.items()}} if len(groups) > 1 else {}
        results[task.task] = dict(n=n, **means, score=p, stderr=math.sqrt(p * (1 - p) / n), **groups)
        columns.setdefault(task.benchmark, []).append(p)
    columns = {name: sum(scores) / len(scores) for name, scores in columns.items()}
    return dict(tasks=results, benchmarks=columns, average=sum(columns.values()) / len(columns))


# ---------------------------------------------------------------------------------------------------------------------
# Output


def describe_tasks(name: str, r: dict) -> str:
    """One line a task, in percent."""
    lines = [name, f"  {'task':<24}{'questions':>10}{'acc':>8}{'acc_norm':>10}{'score':>8}{'+-':>6}"]
    for task, t in r["tasks"].items():
        norm = f"{100 * t['acc_norm']:.1f}" if "acc_norm" in t else ""
        lines.append(f"  {task:<24}{t['n']:>10,}{100 * t['acc']:>8.1f}{norm:>10}{100 * t['score']:>8.1f}"
                     f"{100 * t['stderr']:>6.1f}")
    return "\n".join([*lines, f"  {'average of ' + str(len(r['benchmarks'])):<52}{100 * r['average']:>8.1f}"])


def tasks_table(rows: list[tuple[str, dict]]) -> str:
    """One line a model, one column a benchmark, then their average, in percent: as the paper's Tables 3 and 5."""
    columns = list(rows[0][1]["benchmarks"])
    lines = [f"{'benchmarks, %':<44}" + "".join(f"{name[:7]:>8}" for name in columns) + f"{'average':>9}"]
    for name, r in rows:
        cells = "".join(f"{100 * r['benchmarks'][column]:>8.1f}" for column in columns)
        lines.append(f"{name:<44}{cells}{100 * r['average']:>9.1f}")
    return "\n".join(lines)
