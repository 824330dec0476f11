"""Benchmarks: the rules of scoring, against scoring each choice alone; the datasets' own layouts,
on made-up rows."""

import gzip
import json
import lzma
import random
import sys
from pathlib import Path

import pytest
import tiktoken
import torch
import torch.nn as nn
from conftest import train_osp

from data import benchmarks as data
from data.tokenizer import JsonTokenizer, json_from_encoding, tokenizer, without_token
from model import Config, Transformer
from quantize import Recipe, quantize
from tools import evaluate
from tools.loading import load
from tools.report import describe_tasks, scores_table
from tools.tasks import (
    Task,
    encode_pair,
    finished_text,
    is_right,
    log_likelihoods,
    prompts,
    read_tasks,
    score_tasks,
    write_answers,
)

BYTES = tokenizer("bytes")
HOW = dict(seq_len=48, batch_size=2)


@pytest.fixture(scope="module")
def merging():
    """An encoding that merges: " b", "ab", "abc", " blue", "..." and an end-of-text token, 267."""
    words = ["ab", "abc", " b", "bl", "ue", " blue", "blue", "..", "...", " a", "  "]
    ranks = {bytes([i]): i for i in range(256)} | {w.encode(): 256 + i for i, w in enumerate(words)}
    pattern = r" ?\w+|[^\w\s]+|\s+(?!\S)|\s+"
    return tiktoken.Encoding("merging", pat_str=pattern, mergeable_ranks=ranks,
                             special_tokens={"<|endoftext|>": 267})


@pytest.fixture(scope="module")
def model():
    """Random and small, with all that OSP adds. In fp64 sums do not depend on a batch's shape."""
    torch.manual_seed(0)
    config = Config(n_layer=2, n_head=4, n_kv_head=2, n_embd=32, vocab_size=320, norm="ss",
                    embproj=True)
    model = Transformer(config).double().eval()
    with torch.no_grad():
        model.head.weight.mul_(20)  # far from even
    return model


class Chain(nn.Module):
    """A model whose next token depends on the last one only, with the logits given."""

    def __init__(self, logits):
        super().__init__()
        self.logits, self.at_head = nn.Parameter(logits), nn.Identity()

    def new_cache(self):
        return [[]]

    def forward(self, tokens, cache=None):
        return self.at_head(self.logits[tokens])

    @staticmethod
    def writing(text):
        """One that continues any letter of `text` (all different) with the next."""
        logits = torch.full((256, 256), 0.0)
        for a, b in zip(text.encode(), text.encode()[1:]):
            logits[a, b] = 20
        return Chain(logits)


def alone(model, encoding, context, choice, seq_len):
    """log p of a choice, by the rules, without batches, hooks or padding."""
    while context and context[-1].isspace():
        context, choice = context[:-1], context[-1] + choice
    whole, n = encoding.encode_ordinary(context + choice), len(encoding.encode_ordinary(context))
    if n >= len(whole):
        n = len(whole) - 1
    before, after = whole[:n], whole[n:]
    if not before:
        before = [0 if encoding.name == "bytes" else encoding.eot_token]
    ids = (before + after)[-(seq_len + 1) :]
    with torch.no_grad():
        log_p = torch.log_softmax(model(torch.tensor([ids[:-1]]))[0].float(), dim=-1)
    return sum(log_p[t - 1, ids[t]].item() for t in range(max(1, len(ids) - len(after)), len(ids)))


def likelihoods(model, encoding, pairs, **how):
    return log_likelihoods(model, [encode_pair(encoding, *pair) for pair in pairs], **(HOW | how))


def task(questions, **settings):
    return Task(questions, **dict(dict(pool=questions, task="t", benchmark="t"), **settings))


def mc(context, choices, gold=0, **more):
    return dict(type="mc", context=context, choices=choices, gold=gold, **more)


def gen(context, *answers, **more):
    return dict(type="gen", context=context, answers=list(answers), **more)


def write(path, *records):
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in records))
    return path


# Likelihood


@pytest.mark.parametrize("seq_len", [8, 48])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_a_batch_scores_as_each_choice_alone(model, merging, seq_len, batch_size):
    rng = random.Random(0)
    pieces = ["ab", "c", "abc", " ", "  ", " blue", "...", "..", "\n", "x", ":", " b", "é"]
    pairs = [tuple("".join(rng.choices(pieces, k=rng.randint(*size))) for size in ((0, 12), (1, 9)))
             for _ in range(60)]
    for encoding in (merging, BYTES):
        want = [alone(model, encoding, *pair, seq_len) for pair in pairs]
        got = likelihoods(model, encoding, pairs, seq_len=seq_len, batch_size=batch_size)
        assert got == pytest.approx(want, abs=1e-4)


def test_every_context_begins_as_the_tokenizer_says():
    """Llama's puts BOS in front of a text. The library's own ids are what is scored."""
    tokenizers = pytest.importorskip("tokenizers")
    library = tokenizers.Tokenizer.from_str(json_from_encoding(BYTES))
    library.add_special_tokens(["<s>", "</s>"])
    bos = library.token_to_id("<s>")
    library.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", bos)])
    ours = JsonTokenizer(library.to_str())
    for context, choice in (("a b", " c d"), ("a  ", "b"), ("", "ab")):
        ids, n = encode_pair(ours, context, choice)
        assert ids == library.encode(context + choice).ids and ids[0] == bos
        assert n == len(ids) - len(library.encode(context.rstrip()).ids)
    seen = []

    def write(model, encoding, prompts, *others):
        seen.extend(prompts)
        return ["x" for _ in prompts]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tools.tasks.write_answers", write)
        score_tasks(None, ours, [task([gen("ab c", "d"), gen("", "d")])], seq_len=48, batch_size=2)
    assert seen == [library.encode("ab c").ids, [bos]]


def test_hooks_do_not_stay_behind(model):
    likelihoods(model, BYTES, [("a", "b")])
    assert not model.at_head._forward_hooks


def test_blanks_at_the_end_of_the_context_belong_to_the_choice(merging):
    assert encode_pair(merging, "x:  ", "blue") == encode_pair(merging, "x:", "  blue")
    ids, n = encode_pair(merging, "x: ", "blue")
    assert (ids, n) == (merging.encode_ordinary("x: blue"), 1)
    assert merging.decode(ids[-n:]) == " blue"
    assert encode_pair(BYTES, "x\n", "y") == ([120, 10, 121], 2)


def test_context_and_choice_are_encoded_together(merging):
    ids, n = encode_pair(merging, "x a", "bc")  # alone: " a", "b", "c"
    assert ids == merging.encode_ordinary("x abc")
    assert len(ids) < 1 + 1 + len(merging.encode_ordinary("bc")) + 2
    assert n == len(ids) - len(merging.encode_ordinary("x a"))


def test_tokens_that_merge_across_the_border_leave_one_to_score(merging):
    assert merging.encode_ordinary("x...") == [120, 264]
    assert len(merging.encode_ordinary("x..")) == 2
    assert encode_pair(merging, "x..", ".") == ([120, 264], 1)
    assert encode_pair(merging, "ab", "c") == ([267, 257], 1)  # a lone token needs one before it
    assert encode_pair(merging, "abx", "y")[1] == 1


def test_an_empty_context_becomes_the_end_of_text_token(merging):
    assert encode_pair(merging, "", "ab") == ([267, 256], 1)
    assert encode_pair(BYTES, "", "ab") == ([0, 97, 98], 2)
    assert encode_pair(BYTES, "  ", "a") == ([0, 32, 32, 97], 3)


def test_what_exceeds_the_sequence_length_is_cut_at_the_left(model):
    short, long = [("x" * 8 + "ab", "cd")], [("far away" + "x" * 8 + "ab", "cd")]
    for seq_len, same in ((11, True), (40, False)):
        got, want = (likelihoods(model, BYTES, pairs, seq_len=seq_len) for pairs in (long, short))
        assert (got == pytest.approx(want)) == same
    questions = [mc("far away" + "x" * 8 + "ab", ["cd", "c"]), mc("x" * 8 + "ab", ["c", "cd"])]
    for seq_len, cut in ((10, 2), (11, 1), (18, 1), (19, 0)):
        result = score_tasks(model, BYTES, [task(questions)], seq_len=seq_len, batch_size=2)
        assert result["tasks"]["t"]["cut"] == cut
        said = f"to fit the window: {cut} of t" in describe_tasks("m", result)
        assert said == (cut > 0)
    assert likelihoods(model, BYTES, [("a", "bcdefgh")], seq_len=3) == pytest.approx(
        likelihoods(model, BYTES, [("e", "fgh")], seq_len=3)
    )


def test_known_probabilities_are_added():
    logits = torch.zeros(256, 256)
    logits[ord("a"), ord("b")] = torch.log(torch.tensor(255.0))  # p(b | a) = 1/2, others 1/510
    model = Chain(logits)
    got = likelihoods(model, BYTES, [("xa", "b"), ("xa", "bc"), ("x", "ab")])
    half, even = torch.log(torch.tensor([1 / 2, 1 / 256])).tolist()
    assert got == pytest.approx([half, half + even, even + half], abs=1e-5)


def test_a_model_of_nans_has_no_score():
    model = Chain(torch.full((256, 256), float("nan")))
    for ask in (task([mc("q", ["a", "b"])]), task([gen("q", "x")])):
        with pytest.raises(ArithmeticError, match="^t: the model's log.* not finite"):
            score_tasks(model, BYTES, [ask], **HOW)


def test_a_choice_longer_than_the_window_is_refused():
    ask = task([mc("q", ["a", "b"]), mc("q", ["a", "b" * 49])])
    words = "task t, question 2: a choice of 49 tokens is longer than the window of 48"
    with pytest.raises(ValueError, match=words):
        score_tasks(Chain(torch.zeros(256, 256)), BYTES, [ask], **HOW)
    ask = task([mc("q", ["a", "b" * 48])])
    assert score_tasks(Chain(torch.zeros(256, 256)), BYTES, [ask], **HOW)["tasks"]["t"]["n"] == 1


def test_a_million_blanks_can_be_asked_about(merging):
    text = "a" + " " * 1_000_000 + "b"
    assert merging.decode(encode_pair(merging, text, "c")[0]) == text + "c"
    ask = task([gen(text, "x")], pool=[gen("q", "a")] * 3, shots=1, max_new=2)
    assert score_tasks(Chain(torch.zeros(268, 268)), merging, [ask], **HOW)["tasks"]["t"]["n"] == 1


# Multiple choice


def test_acc_takes_the_sum_and_acc_norm_the_mean_per_character():
    model = Chain(torch.zeros(256, 256))  # every byte costs log 256
    # 3 bytes against 5; per character without the blank 3/2 against 5/4
    long_is_right = mc("q", [" ab", " abcd"], 1)
    assert score_tasks(model, BYTES, [task([long_is_right])], **HOW)["tasks"]["t"]["acc"] == 0
    assert score_tasks(model, BYTES, [task([long_is_right])], **HOW)["tasks"]["t"]["acc_norm"] == 1
    without_blank = mc("q", ["ab", "abcd"], 1)  # 1 against 1: a tie, and the first wins
    assert score_tasks(model, BYTES, [task([without_blank])], **HOW)["tasks"]["t"]["acc_norm"] == 0
    accents = mc("q", [" éé", " abc"], 1)  # characters, not bytes: 5/2 against 4/3
    assert score_tasks(model, BYTES, [task([accents])], **HOW)["tasks"]["t"]["acc_norm"] == 1


def test_equal_choices_go_to_the_first():
    model, same = Chain(torch.zeros(256, 256)), [" x", " y", " z"]
    ask = task([mc("q", same, 0), mc("q", same, 2)])
    result = score_tasks(model, BYTES, [ask], **HOW)["tasks"]["t"]
    assert (result["acc"], result["acc_norm"]) == (0.5, 0.5)


def test_scores_equal_a_plain_loop_over_the_questions(model, merging):
    rng, questions = random.Random(1), []
    for i in range(30):
        choices = [" " + "".join(rng.choices("abc xyz", k=rng.randint(1, 6))) + "."
                   for _ in range(4)]
        group = "odd" if i % 2 else "even"
        context = f"Question: {i} ab...\nAnswer:"
        questions.append(mc(context, choices, rng.randrange(4), group=group))
    result = score_tasks(model, merging, [task(questions)], **HOW)["tasks"]["t"]
    acc, norm = [], []
    for q in questions:
        log_p = [alone(model, merging, q["context"], c, 48) for c in q["choices"]]
        mean = [s / len(c[1:]) for s, c in zip(log_p, q["choices"])]
        acc.append(log_p.index(max(log_p)) == q["gold"])
        norm.append(mean.index(max(mean)) == q["gold"])
    p = sum(norm) / 30
    assert (result["n"], result["acc"]) == (30, sum(acc) / 30)
    assert result["acc_norm"] == result["score"] == p
    assert result["stderr"] == pytest.approx((p * (1 - p) / 30) ** 0.5) and 0 < p < 1
    assert result["groups"] == {"even": sum(norm[::2]) / 15, "odd": sum(norm[1::2]) / 15}


@pytest.mark.parametrize("method", ["rtn", "had"])
def test_a_quantized_model_scores_in_a_batch_as_alone(model, merging, method):
    quantized = quantize(model, Recipe("4-4-4", method))
    pairs = [("x ab" * n, " blue" * m) for n, m in ((1, 2), (5, 1), (9, 3), (2, 2))]
    got = likelihoods(quantized, merging, pairs)
    assert got == pytest.approx([alone(quantized, merging, *pair, 48) for pair in pairs], abs=1e-4)
    assert got != pytest.approx(likelihoods(model, merging, pairs), abs=1e-2)
    questions = [mc("x", [" ab", " blue"]), mc("x ab ab", [" b", " a"])]
    tasks = [task(questions), task([gen("x", "y")], task="g")]
    result = score_tasks(quantized, merging, tasks, **HOW)
    assert result["tasks"]["t"]["n"] == 2 and result["tasks"]["g"]["n"] == 1


def test_the_average_counts_two_tasks_of_one_benchmark_once():
    model, yes, no = Chain(torch.zeros(256, 256)), mc("q", ["a", "b"], 0), mc("q", ["a", "b"], 1)
    tasks = [task([yes], task="arc_easy", benchmark="ARC"),
             task([yes, no], task="arc_challenge", benchmark="ARC"),
             task([no], task="piqa", benchmark="PIQA")]
    result = score_tasks(model, BYTES, tasks, **HOW)
    assert result["benchmarks"] == {"ARC": 0.75, "PIQA": 0} and result["average"] == 0.375
    text = describe_tasks("m", result)
    assert "arc_challenge" in text and "average of 2" in text
    head, line = scores_table([result | {"target": "m"}]).splitlines()
    assert head.split()[2:] == ["ARC", "PIQA", "average"]
    assert line.split() == ["m", "75.0", "0.0", "37.5"]


# Generation


def greedy(model, ids, n):
    """Without a cache."""
    for _ in range(n):
        with torch.no_grad():
            ids = [*ids, int(model(torch.tensor([ids]))[0, -1, :256].argmax())]
    return ids


def test_the_model_continues_each_prompt_as_it_would_alone(model):
    texts = [list(b"abc"), list(b"x"), list(b"xyz"), list(b"long prompt"), list(b"cba")]
    seen = []
    watched = model.at_embed.register_forward_hook(lambda m, i, x: seen.append(tuple(x.shape[:2])))
    got = write_answers(model, BYTES, texts, task([], max_new=6), **HOW)
    watched.remove()
    want = [finished_text(BYTES, greedy(model, ids, 6)[len(ids) :], [], [0])[0] for ids in texts]
    assert got == want and len(set(got)) > 1
    assert (3, 3) in seen and (3, 1) in seen  # equal lengths together, then one token at a time


def test_ids_without_a_token_are_never_written(merging):
    """Gaps in a vocabulary and rows beyond it, where tiktoken itself raises KeyError."""
    ranks = {bytes([i]): i for i in range(256)} | {b"ab": 300}
    gaps = tiktoken.Encoding("gaps", pat_str=r"\w+", mergeable_ranks=ranks,
                             special_tokens={"<|endoftext|>": 310})
    assert without_token(gaps, 320) == [*range(256, 300), *range(301, 310), *range(311, 320)]
    assert without_token(BYTES, 256) == [] and without_token(merging, 270) == [268, 269]
    logits = torch.zeros(320, 320)
    logits[:, 256:300], logits[:, 311:], logits[:, 301:310] = 9, 9, 9
    logits[97, 98], logits[98, 300], logits[300, 99] = 1, 2, 3
    ask = task([], max_new=3)
    assert write_answers(Chain(logits), gaps, [[97]], ask, **HOW, end_ids=[99]) == ["bab"]


def test_writing_ends_at_a_stop_string_the_end_of_text_or_max_new():
    ask = task([], max_new=30, stop=["ijk", "gh"])
    model, steps = Chain.writing("abcdefghijkl"), []
    model.at_head.register_forward_hook(lambda m, i, x: steps.append(1))
    assert write_answers(model, BYTES, [[97]], ask, **HOW) == ["bcdef"]
    assert len(steps) == len("bcdefgh")
    assert write_answers(Chain.writing("abcdef\0ghijkl"), BYTES, [[97]], ask, **HOW) == ["bcdef"]
    for ends, text in ((list(b"ed"), "bc"), (list(b"z"), "bcdef"), ([], "bcdef")):
        assert write_answers(model, BYTES, [[97]], ask, **HOW, end_ids=ends) == [text]
    ask.max_new = 3
    assert write_answers(Chain.writing("abcdefghijkl"), BYTES, [[97]], ask, **HOW) == ["bcd"]
    full = [[97] * 46]  # of seq_len 48
    assert write_answers(Chain.writing("abcdefghijkl"), BYTES, full, ask, **HOW) == ["bc"]


def test_the_number_after_four_hashes_is_the_answer():
    assert is_right(" 2 * 9 = 18\n#### 18\n", ["18"], "number")
    assert is_right("#### 1,234", ["1234"], "number") and is_right("#### -3", ["-3"], "number")
    assert not is_right("#### 18.", ["18"], "number")  # the official rule takes the full stop along
    assert is_right("#### 18 #### 19", ["18"], "number")
    assert not is_right("#### 18 #### 19", ["19"], "number")
    assert not is_right("The answer is 18", ["18"], "number") and not is_right("", ["18"], "number")
    assert is_right("no hashes", ["[invalid]"], "number")  # what stands for no number


def test_an_alias_matches_bare_and_whole():
    aliases = ["Sinclair Lewis", "Lewis, Sinclair"]
    assert is_right(" sinclair lewis\n\n", aliases, "alias")
    assert is_right('"Sinclair Lewis"', aliases, "alias")
    assert is_right("LEWIS SINCLAIR!", aliases, "alias")
    assert not is_right(" Sinclair Lewis, the writer", aliases, "alias")
    assert not is_right(" Sinclair Lewis\nAnother line", aliases, "alias")
    assert not is_right("", ["!"], "alias")


def test_gen_tasks_are_scored_by_what_is_written():
    model = Chain.writing("abcdefgh#")
    questions = [gen("x a", "bcd"), gen("y b", "BCD"), gen("c", "def", "cde")]
    ask = task(questions, max_new=9, stop=["e"])
    result = score_tasks(model, BYTES, [ask], **HOW)["tasks"]["t"]
    assert result == dict(n=3, acc=1 / 3, score=1 / 3, cut=0, stderr=pytest.approx((2 / 27) ** 0.5))
    ask = task([gen("", "x")], max_new=2)
    assert score_tasks(model, BYTES, [ask], **HOW)["tasks"]["t"]["acc"] == 0


# Shots


def test_shots_are_drawn_in_the_official_order():
    questions = [gen(f"Q{i} A:", str(i)) for i in range(20)]
    pool = [gen(f"P{i} A:", str(i), target=f" {i}!") for i in range(50)]
    rng, order = random.Random(42), list(questions)
    rng.shuffle(order)
    want = {}
    for q in order:
        shots = [s["context"] + s["target"] for s in rng.sample(pool, 3)]
        want[q["context"]] = "\n\n".join([*shots, q["context"]])
    got = prompts(task(questions, pool=pool, shots=3), BYTES, room=1000)
    assert got == [want[q["context"]] for q in questions] and len({text[:20] for text in got}) > 5


def test_shots_that_do_not_fit_are_dropped_from_the_last_on():
    pool = [gen("0123456789", "y", target=str(i)) for i in range(9)]
    ask = task([gen("question", "x")], pool=pool, shots=3)
    whole = prompts(ask, BYTES, room=1000)[0].split("\n\n")
    assert len(whole) == 4
    for kept, room in ((3, 47), (2, 46), (1, 21), (0, 20), (0, 3)):
        assert prompts(ask, BYTES, room)[0].split("\n\n") == whole[:kept] + ["question"]


def test_a_file_may_lend_its_own_lines_but_never_the_question_itself():
    questions = [mc(f"Q{i}", [" no", f" yes{i}"], 1) for i in range(4)]
    for i, text in enumerate(prompts(task(questions, shots=3), BYTES, room=1000)):
        assert text.endswith(f"\n\nQ{i}") and text.count(f"Q{i}") == 1 and text.count(" yes") == 3


def test_room_is_left_to_write(model):
    ask = task([gen("question", "x")] * 2, pool=[gen("0123456789", "y")] * 9, shots=3, max_new=20)
    lengths = []
    watched = model.at_embed.register_forward_hook(lambda m, i, x: lengths.append(x.shape[1]))
    score_tasks(model, BYTES, [ask], **HOW)
    ask.questions = [gen("question" * 9, "x")]
    score_tasks(model, BYTES, [ask], **HOW)
    watched.remove()
    # one shot fits in 48 - 20; a long question is cut to that
    assert [n for n in lengths if n > 1] == [8 + 14, 28]


# Task files


@pytest.mark.parametrize("line, words", [
    ("{broken", "not JSON"),
    ("[1]", "not a JSON object"),
    ('{"type": "mc"', "not JSON"),
    (dict(type="essay", context="q"), "type 'essay' must be 'mc' or 'gen'"),
    (dict(context="q"), "type None"),
    (mc("q", ["a", "b"], 2), r"gold 2 is none of its 2 choices \(0 to 1\)"),
    (mc("q", ["a", "b"], -1), "gold -1"),
    (mc("q", ["a", "b"], "1"), "gold '1'"),
    (mc("q", ["a", "b"], True), "gold True"),
    (mc("q", [], 0), "choices must be"),
    (mc("q", ["a", ""], 0), "empty choice"),
    (mc(None, ["a"], 0), "context"),
    (dict(type="gen", context="q", answers="18"), "answers must be a list"),
    (gen("q", "a", target=5), "target"),
    ("[" * 100_000, "line 3"),
])
def test_a_bad_line_is_named_with_its_file(tmp_path, line, words):
    path = write(tmp_path / "bad.jsonl", dict(task="t"), mc("q", ["a"]), line)
    with pytest.raises(ValueError, match=words) as error:
        read_tasks([path])
    assert str(error.value).startswith(f"{path}, line 3: ") and "\n" not in str(error.value)


@pytest.mark.parametrize("settings, words", [
    (dict(task="t", shot=3), "line 1: unknown setting 'shot'"),
    (dict(shots="3"), "shots must be a whole number, 0 or more, not '3'"),
    (dict(shots=-1), "not -1"),
    (dict(stop=["a", ""]), "stop must be a list of strings"),
    (dict(max_new=0), "max_new must be 1 or more, not 0"),
    (dict(match="fuzzy"), "match 'fuzzy' must be 'alias' or 'number'"),
    (dict(shots=1), "asks for 1 shots, of 1 lines"),
])
def test_a_bad_setting_is_named(tmp_path, settings, words):
    with pytest.raises(ValueError, match=words):
        read_tasks([write(tmp_path / "bad.jsonl", settings, mc("q", ["a"]))])


def test_files_without_questions_are_refused(tmp_path):
    for lines in ([], [dict(task="t")], ["", ""]):
        with pytest.raises(ValueError, match="a.jsonl has no questions"):
            read_tasks([write(tmp_path / "a.jsonl", *lines)])
    with pytest.raises(ValueError, match="mixes mc and gen"):
        read_tasks([write(tmp_path / "a.jsonl", mc("q", ["a"]), gen("q", "a"))])
    (tmp_path / "none").mkdir()
    with pytest.raises(FileNotFoundError, match="no .*jsonl in .*none"):
        read_tasks([tmp_path / "none"])
    with pytest.raises(FileNotFoundError):
        read_tasks([tmp_path / "missing.jsonl"])
    (tmp_path / "latin.jsonl").write_bytes(b'{"type": "mc", "context": "caf\xe9"}\n')
    with pytest.raises(ValueError, match="latin.jsonl, line 1: not UTF-8 text"):
        read_tasks([tmp_path / "latin.jsonl"])


def test_a_folder_holds_tasks_and_their_shots(tmp_path):
    write(tmp_path / "b.jsonl", mc("q\u2028r", ["a"]), "", mc("s", ["a"]))
    settings = dict(task="sums", benchmark="S", shots=2, shots_from="shots/a.jsonl")
    write(tmp_path / "a.jsonl", settings, gen("q", "1"))
    write(tmp_path / "shots" / "a.jsonl", *[gen(f"{i}", "1") for i in range(5)])
    a, b = read_tasks([tmp_path])
    assert (a.task, a.benchmark, a.shots, len(a.pool)) == ("sums", "S", 2, 5)
    assert (b.task, b.benchmark, len(b.questions), b.match) == ("b", "b", 2, "alias")
    with pytest.raises(ValueError, match="second file of the task 'sums'"):
        read_tasks([tmp_path, tmp_path / "a.jsonl"])


# eval.py


@pytest.fixture(scope="module")
def run(dataset_dir, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "osp"
    return train_osp(out, dataset_dir, n_layer=2, n_embd=64, seq_len=32, steps=5)


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "tasks"
    questions = [mc(f"q {i}", [" one", " two", " three"], i % 3) for i in range(9)]
    write(folder / "mc.jsonl", *questions)
    write(folder / "gen.jsonl", dict(task="gen", max_new=5), gen("a", "b"), gen("c", "d"))
    return folder


def test_eval_scores_a_run_and_its_quantized_models(run, folder, capsys):
    command = [str(run), "--tasks", str(folder), "--device", "cpu",
               "--bits", "4-4-4,8-8-16", "--methods", "rtn,had"]
    evaluate.main([*command, "--json"])
    row = json.loads(capsys.readouterr().out)[0]
    loaded = load(run)
    want = score_tasks(loaded.model, loaded.encoding, read_tasks([folder]), 32, 128)
    assert {name: row[name] for name in want} == want and "val_loss" not in row
    for bits in ("4-4-4", "8-8-16"):
        for method in ("rtn", "had"):
            assert set(row["quantized"][bits][method]) == {"tasks", "benchmarks", "average"}
    evaluate.main(command)
    lines = capsys.readouterr().out.strip().splitlines()
    assert lines[-6].split()[-3:] == ["gen", "mc", "average"]
    rows = ["osp", "osp 4-4-4 rtn", "osp 4-4-4 had", "osp 8-8-16 rtn", "osp 8-8-16 had"]
    assert [" ".join(line.split()[:-3]) for line in lines[-5:]] == rows


def test_eval_measures_text_and_tasks_together(run, folder, tmp_path, capsys):
    (tmp_path / "t.txt").write_text("some words of text " * 40)
    command = [str(run), "--tasks", str(folder / "mc.jsonl"), "--device", "cpu",
               "--text", str(tmp_path / "t.txt")]
    evaluate.main([*command, "--bits", "4-4-4", "--methods", "rtn", "--json"])
    row = json.loads(capsys.readouterr().out)[0]
    assert row["val_loss"] > 0 and row["tasks"]["mc"]["n"] == 9
    assert {"val_loss", "added", "average"} <= set(row["quantized"]["4-4-4"]["rtn"])


def test_eval_says_what_is_wrong_in_one_line(run, folder, capsys):
    def fails(argv, code):
        with pytest.raises(SystemExit) as error:
            evaluate.main([str(a) for a in argv])
        assert (error.value.code == 2) == (code == 2)
        message = (capsys.readouterr().err if code == 2 else error.value.code).strip()
        assert "\n" not in message and message.startswith("error: ")
        return message

    write(folder / "mc.jsonl", mc("q", ["a"]), mc("q", ["a"], 3))
    assert "mc.jsonl, line 2: gold 3" in fails([run, "--tasks", folder], 1)
    assert "missing" in fails([run, "--tasks", folder / "missing"], 1)
    assert "--plot" in fails([run, "--tasks", folder, "--plot", folder], 2)
    assert "--tasks" in fails([run, "--tasks", folder, "--prompt", "x"], 2)


# Converters: made-up rows in the layout of each dataset


def choices(*texts, labels="ABCDE"):
    return {"text": list(texts), "label": list(labels[: len(texts)])}


ROWS = {
    "arc_easy": dict(id="x1", question="What melts?", choices=choices("ice", "rock", "fog"), answerKey="A"),
    "arc_challenge": dict(id="x2", question="What falls?", choices=choices("up", "rain", labels="1234"), answerKey="2"),
    "commonsense_qa": dict(id="c", question="Where do hats hang?", question_concept="hat", answerKey="E",
                           choices=choices("sea", "sky", "pan", "sock", "hook")),
    "gsm8k": dict(question="Two bags of 617 nuts?", answer="2 * 617 = <<2*617=1234>>1234\n#### 1,234"),
    "hellaswag": dict(ind=4, activity_label="Baking", ctx_a="A cook [substeps] opens a door.", ctx_b="the Oven",
                      ctx="unused", endings=["[header] is hot [title] Fine", "is  cold"], label="1", split_type="z"),
    "mmlu": dict(question="Which is odd?", subject="small_number_theory", choices=["2", "3", "4", "6"], answer=1),
    "openbook_qa": dict(id="7-1", question_stem="Frost comes from", choices=choices("fire", "cold", "jam", "wool"),
                        answerKey=" B "),
    "piqa": dict(goal="Open a jar", sol1="turn the lid", sol2="paint the lid", label=0),
    "siqa": dict(context="Kim lent Bo a pen.", question="What will Bo do?", answerA="write", answerB="swim",
                 answerC="fly", label="3"),
    "trivia_qa": dict(question="Who drew the map?", question_id="q", entity_pages={}, search_results={},
                      answer=dict(value="New York", aliases=["New York City", "N.Y.", "New York"], type="x")),
    "winogrande": dict(sentence="The cup missed the box because the _ was too small. ", option1="cup", option2="box",
                       answer="2"),
}
PLAIN = {
    "arc_easy": mc("Question: What melts?\nAnswer:", [" ice", " rock", " fog"], 0),
    "arc_challenge": mc("Question: What falls?\nAnswer:", [" up", " rain"], 1),
    "commonsense_qa": mc("Where do hats hang?", [" sea", " sky", " pan", " sock", " hook"], 4),
    "gsm8k": gen("Question: Two bags of 617 nuts?\nAnswer:", "1234",
                 target=" 2 * 617 = <<2*617=1234>>1234\n#### 1,234"),
    "hellaswag": mc("Baking: A cook opens a door. The oven", [" is hot. Fine", " is cold"], 1),
    "mmlu": mc("The following are questions about small number theory.\nQuestion: Which is odd?\nAnswer:",
               [" 2", " 3", " 4", " 6"], 1, group="small_number_theory"),
    "openbook_qa": mc("Frost comes from", [" fire", " cold", " jam", " wool"], 1),
    "piqa": mc("Question: Open a jar\nAnswer:", [" turn the lid", " paint the lid"], 0),
    "siqa": mc("Kim lent Bo a pen. What will Bo do?", [" write", " swim", " fly"], 2),
    "trivia_qa": gen("Question: Who drew the map?\nAnswer:", "New York City", "N.Y.", "New York", target=" New York"),
    "winogrande": mc("The cup missed the box because the ", ["cup was too small.", "box was too small."], 1),
}
EXACT = PLAIN | {
    "hellaswag": mc("Baking: A cook opens a door. The oven ", ["  is hot. Fine", " is cold"], 1),
    "trivia_qa": gen("Question: Who drew the map?\nAnswer:", "ny", "new york", target="ny"),
}


@pytest.mark.parametrize("name", ROWS)
def test_a_row_of_the_dataset_becomes_a_question(name):
    assert data.ORIGINS[name].convert(json.loads(json.dumps(ROWS[name])), False) == PLAIN[name]
    assert data.ORIGINS[name].convert(json.loads(json.dumps(ROWS[name])), True) == EXACT[name]


def test_the_ten_benchmarks_are_the_papers_columns():
    columns = list(dict.fromkeys(origin.benchmark for origin in data.ORIGINS.values()))
    assert columns == "ARC CSQA GSM8K HS MMLU OBQA PIQA SIQA TQA WG".split()


@pytest.mark.parametrize("exact", [False, True])
def test_all_ten_are_converted_from_files_and_scored(tmp_path, model, exact, capsys):
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow

    for i, (name, row) in enumerate(ROWS.items()):
        rows = [json.loads(json.dumps(row)) for _ in range(9)]
        if name == "trivia_qa":
            for r in rows:
                del r["entity_pages"], r["search_results"]  # parquet has no empty structs
        if i % 2:
            parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / f"{name}.parquet")
        else:
            ending, compress = [("gz", gzip.compress), ("xz", lzma.compress)][i // 2 % 2]
            (tmp_path / f"{name}.jsonl.{ending}").write_bytes(compress("\n".join(map(json.dumps, rows)).encode()))
        (file,) = tmp_path.glob(f"{name}.*")
        train_split = ["--train", str(file)] if name in ("gsm8k", "trivia_qa") else []
        data.main([name, str(file), *train_split, "--out", str(tmp_path / "out"), *["--osp-exact"] * exact])
    said = capsys.readouterr().out
    assert "piqa.jsonl: 9 questions (the paper's split has 1,838)" in said
    tasks = read_tasks([tmp_path / "out"])
    assert {t.task: t.questions for t in tasks} == {name: [q] * 9 for name, q in (EXACT if exact else PLAIN).items()}
    found = {t.task: t for t in tasks}
    assert (found["gsm8k"].shots, found["gsm8k"].max_new, found["gsm8k"].match) == (8, 256, "number")
    assert (found["trivia_qa"].shots, found["trivia_qa"].max_new, found["trivia_qa"].match) == (5, 20, "alias")
    assert found["gsm8k"].stop == ["Question:", "Question"] and len(found["gsm8k"].pool) == 9
    shown = prompts(found["trivia_qa"], BYTES, 1000)[0]
    assert shown.count("Answer:ny\n\n" if exact else "Answer: New York\n\n") == 5 and shown.endswith("Answer:")
    result = score_tasks(model, BYTES, tasks, seq_len=64, batch_size=8)
    assert len(result["tasks"]) == 11 and len(result["benchmarks"]) == 10
    assert all(t["n"] == 9 for t in result["tasks"].values())


def fails(capsys, *argv):
    with pytest.raises(SystemExit) as error:
        data.main([str(a) for a in argv])
    return error.value.code if isinstance(error.value.code, str) else capsys.readouterr().err.splitlines()[-1]


def test_rows_that_do_not_fit_are_named_and_nothing_half_written(tmp_path, capsys):
    out = ["--out", tmp_path / "out"]
    good, unlabelled = ROWS["piqa"], ROWS["piqa"] | dict(label=-1)
    for name, lines, words in (("piqa", [good, unlabelled], "rows.jsonl, row 2, does not fit piqa"),
                               ("siqa", [good], "row 1, does not fit siqa: KeyError('answerA')"),
                               ("piqa", [good, "{broken"], "row 2, does not fit piqa"),
                               ("piqa", [], "no rows")):
        assert words in fails(capsys, name, write(tmp_path / "rows.jsonl", *lines), *out)
    assert "missing.jsonl" in fails(capsys, "piqa", tmp_path / "missing.jsonl", *out)
    (tmp_path / "rows.parquet").write_bytes(b"no parquet")
    assert "rows.parquet, row 1" in fails(capsys, "piqa", tmp_path / "rows.parquet", *out)
    lines = json.dumps(good).encode() * 50
    for name, packed in (("gz", gzip.compress(lines)), ("xz", lzma.compress(lines))):
        for damaged in (packed[:-9], b"no such format", packed[:12] + b"x" * 40 + packed[12:]):
            (tmp_path / f"rows.jsonl.{name}").write_bytes(damaged)
            assert f"rows.jsonl.{name}, row 1" in fails(capsys, "piqa", tmp_path / f"rows.jsonl.{name}", *out)
    (tmp_path / "deep.jsonl").write_text("[" * 100_000)
    assert "deep.jsonl, row 1" in fails(capsys, "piqa", tmp_path / "deep.jsonl", *out)
    assert "--train" in fails(capsys, "gsm8k", write(tmp_path / "rows.jsonl", ROWS["gsm8k"]), *out)
    assert "--hub" in fails(capsys, "all", tmp_path / "rows.jsonl", *out) and "--hub" in fails(capsys, "piqa", *out)
    assert "row 1" in fails(capsys, "piqa", write(tmp_path / "rows.jsonl", good | dict(goal="\ud800")), *out)
    train_split = ["--train", write(tmp_path / "train.jsonl", ROWS["gsm8k"])]
    assert "row 1" in fails(capsys, "gsm8k", tmp_path / "rows.jsonl", *train_split, *out)
    assert not (tmp_path / "out").exists()


def test_a_full_disk_leaves_no_empty_folder(tmp_path, capsys, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device", str(args[0]))

    monkeypatch.setattr(data, "write_text", full)
    for name, more in (("piqa", []), ("gsm8k", ["--train", tmp_path / "rows.jsonl"])):
        rows = write(tmp_path / "rows.jsonl", ROWS[name])
        assert f"{name}.jsonl" in fails(capsys, name, rows, *more, "--out", tmp_path / "out")
        assert not (tmp_path / "out").exists()


def test_hub_fetches_the_split_and_the_training_split(tmp_path, capsys, monkeypatch):
    hub, asked = pytest.importorskip("huggingface_hub"), []

    def download(dataset, name, repo_type, revision, local_dir):
        assert local_dir is None  # then it is cached
        asked.append((dataset, name, repo_type, revision))
        return write(tmp_path / "fetched.jsonl", *[ROWS["trivia_qa"]] * 6)

    monkeypatch.setattr(hub, "hf_hub_download", download)
    data.main(["trivia_qa", "--hub", "--out", str(tmp_path / "out")])
    names = [f"rc.nocontext/{split}/0000.parquet" for split in ("train", "validation")]
    assert asked == [("mandarjoshi/trivia_qa", name, "dataset", "refs/convert/parquet") for name in names]
    (task,) = read_tasks([tmp_path / "out"])
    assert len(task.questions) == len(task.pool) == 6

    waits = []

    def offline(*args, **kwargs):
        raise OSError("no network\nand more")

    monkeypatch.setattr(hub, "hf_hub_download", offline)
    monkeypatch.setattr("data.sources.time.sleep", waits.append)
    message = fails(capsys, "piqa", "--hub", "--out", tmp_path / "out")
    assert "error: ybisk/piqa/plain_text/validation/0000.parquet could not be fetched (OSError: no network)" in message
    assert len(waits) == 5 and "\n" not in message
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert "pip install -r requirements-extra.txt" in fails(capsys, "piqa", "--hub", "--out", tmp_path / "out")


def test_without_pyarrow_one_line_says_what_to_install(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.delitem(sys.modules, "pyarrow.parquet", raising=False)
    Path(tmp_path / "rows.parquet").write_bytes(b"")
    assert "needs pyarrow: pip install" in fails(capsys, "piqa", tmp_path / "rows.parquet", "--out", tmp_path / "out")


def test_a_choice_without_a_token_is_refused():
    tokenizers = pytest.importorskip("tokenizers")
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "</s>": 1}, unk_token="a"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    words.add_special_tokens(["</s>"])
    with pytest.raises(ValueError, match="no tokens for the choice ' '"):
        encode_pair(JsonTokenizer(words.to_str()), "", " ")
