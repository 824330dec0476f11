"""Benchmarks: our answers to lm-eval against asking each question alone, and the paper's ten tasks."""

import json
import random
import shutil
import sys
from types import SimpleNamespace

import pytest
import tiktoken
import torch
import torch.nn as nn
from conftest import train_osp

pytest.importorskip("lm_eval")

from data.tokenizer import JsonTokenizer, json_from_encoding, tokenizer
from model import Config, Transformer
from quantize import Recipe, quantize
from tools import evaluate, export
from tools.harness import PAPER, Answers, find_tasks
from tools.loading import load
from tools.report import in_short, scores

BYTES = tokenizer("bytes")


@pytest.fixture(scope="module")
def merging():
    """An encoding that merges: " b", "ab", "abc", " blue", "..." and an end-of-text token, 267."""
    words = ["ab", "abc", " b", "bl", "ue", " blue", "blue", "..", "...", " a", "  "]
    ranks = {bytes([i]): i for i in range(256)} | {w.encode(): 256 + i for i, w in enumerate(words)}
    pattern = r" ?\w+|[^\w\s]+|\s+(?!\S)|\s+"
    return tiktoken.Encoding("merging", pat_str=pattern, mergeable_ranks=ranks, special_tokens={"<|endoftext|>": 267})


@pytest.fixture(scope="module")
def model():
    """Random and small, with all that OSP adds. In fp64 sums do not depend on a batch's shape."""
    torch.manual_seed(0)
    config = Config(n_layer=2, n_head=4, n_kv_head=2, n_embd=32, vocab_size=320, norm="ss", embproj=True)
    model = Transformer(config).double().eval()
    with torch.no_grad():
        model.head.weight.mul_(20)  # far from even
    return model


class Chain(nn.Module):
    """A model whose next token depends on the last one only, with the logits given."""

    def __init__(self, logits):
        super().__init__()
        self.logits, self.at_head, self.embed = nn.Parameter(logits), nn.Identity(), nn.Embedding(1, 1)

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


def answers(model, encoding=BYTES, seq_len=48, batch_size=2, end_ids=(0,)):
    return Answers(SimpleNamespace(encoding=encoding, end_ids=end_ids), model, seq_len, batch_size)


def requests(*args):
    return [SimpleNamespace(args=arg) for arg in args]


def write_after(model, *prompts, encoding=BYTES, until=(), n=8, **how):
    options = dict(until=list(until), max_gen_toks=n)
    return answers(model, encoding, **how).generate_until(requests(*((prompt, options) for prompt in prompts)))


def alone(model, encoding, context, choice, seq_len):
    """(log p of a choice, whether it is the likeliest), by the rules, without batches or padding."""
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
    places = range(len(ids) - len(after), len(ids))
    likeliest = all(int(log_p[t - 1].argmax()) == ids[t] for t in places)
    return sum(log_p[t - 1, ids[t]].item() for t in places), likeliest


# Likelihood


@pytest.mark.parametrize("seq_len", [12, 48])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_a_batch_scores_as_each_choice_alone(model, merging, seq_len, batch_size):
    rng = random.Random(0)
    pieces = ["ab", "c", "abc", " ", "  ", " blue", "...", "..", "\n", "x", ":", " b", "é"]
    pairs = [tuple("".join(rng.choices(pieces, k=rng.randint(*size))) for size in ((0, 12), (1, 2))) for _ in range(60)]
    for encoding in (merging, BYTES):
        want = [alone(model, encoding, *pair, seq_len) for pair in pairs]
        got = answers(model, encoding, seq_len, batch_size).loglikelihood(requests(*pairs))
        assert [log_p for log_p, _ in got] == pytest.approx([log_p for log_p, _ in want], abs=1e-4)
        assert [likeliest for _, likeliest in got] == [likeliest for _, likeliest in want]
    assert not model.at_head._forward_hooks


def test_known_probabilities_are_added_and_the_likeliest_choice_is_known():
    logits = torch.zeros(256, 256)
    logits[ord("a"), ord("b")] = torch.log(torch.tensor(255.0))  # p(b | a) = 1/2, others 1/510
    got = answers(Chain(logits)).loglikelihood(requests(("xa", "b"), ("xa", "bc"), ("x", "ab")))
    half, even = torch.log(torch.tensor([1 / 2, 1 / 256])).tolist()
    assert [log_p for log_p, _ in got] == pytest.approx([half, half + even, even + half], abs=1e-5)
    assert [likeliest for _, likeliest in got] == [True, False, False]


@pytest.mark.parametrize("context, choice, ids, n", [
    ("x: ", "blue", "x: blue", 1),  # blanks at the end of the context belong to the choice
    ("x a", "bc", "x abc", 1),  # encoded together: alone they are " a", "b", "c"
    ("x..", ".", "x...", 1),  # tokens that merge across the border leave one to score
    ("ab", "c", "<>abc", 1),  # a lone token needs one before it
    ("", "ab", "<>ab", 1),  # as an empty context does
])
def test_context_and_choice_are_encoded_as_one_text(merging, context, choice, ids, n):
    first = [267] * ids.startswith("<>")
    expected = first + merging.encode_ordinary(ids.removeprefix("<>"))
    assert answers(None, merging).encode_pair(context, choice) == (expected, n)


def test_every_context_begins_as_the_tokenizer_says():
    tokenizers = pytest.importorskip("tokenizers")
    library = tokenizers.Tokenizer.from_str(json_from_encoding(BYTES))
    library.add_special_tokens(["<s>", "</s>"])
    bos = library.token_to_id("<s>")
    library.post_processor = tokenizers.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", bos)])
    ours = answers(None, JsonTokenizer(library.to_str()))
    for context, choice in (("a b", " c d"), ("a  ", "b"), ("", "ab")):
        ids, n = ours.encode_pair(context, choice)
        assert ids == library.encode(context + choice).ids and ids[0] == bos == ours.first
        assert n == len(ids) - len(library.encode(context.rstrip()).ids)


def test_a_text_is_cut_into_windows_that_predict_every_token_once(model):
    text, T = "".join(random.Random(2).choices("abc xyz", k=100)), 16
    (got,) = answers(model, seq_len=T).loglikelihood_rolling(requests((text,)))
    ids, want = [0, *text.encode()], 0
    for end in (16, 32, 48, 64, 80, 96, 100):  # the last window begins earlier, to be full
        window = ids[max(0, end - T) : end + 1]
        log_p = torch.log_softmax(model(torch.tensor([window[:-1]]))[0].float(), dim=-1)
        n = 4 if end == 100 else 16
        want += sum(log_p[t - 1, window[t]].item() for t in range(len(window) - n, len(window)))
    assert got == pytest.approx(want, abs=1e-3)


def test_what_cannot_be_asked_or_answered_is_said(model):
    with pytest.raises(ValueError, match="a choice of 49 tokens, where 1 to 48 fit"):
        answers(model).loglikelihood(requests(("q", "b" * 49)))
    cut = answers(model, seq_len=8)
    cut.loglikelihood(requests(("x" * 8, "y"), ("x" * 7, "y"), ("x" * 8, "yz")))
    cut.generate_until(requests(("x" * 8, dict(max_gen_toks=2)), ("x" * 6, dict(max_gen_toks=2))))
    assert cut.cut == 2 and "2 texts cut at the left" in in_short(dict(cut=cut.cut))
    for ask in (lambda m: answers(m).loglikelihood(requests(("q", "a"))), lambda m: write_after(m, "q")):
        with pytest.raises(ArithmeticError, match="not finite"):
            ask(Chain(torch.full((256, 256), float("nan"))))


@pytest.mark.parametrize("method", ["rtn", "had"])
def test_a_quantized_model_answers_in_a_batch_as_alone(model, merging, method):
    quantized = quantize(model, Recipe("4-4-4", method))
    pairs = [("x ab" * n, " blue" * m) for n, m in ((1, 2), (5, 1), (9, 3), (2, 2))]
    got = answers(quantized, merging).loglikelihood(requests(*pairs))
    assert [p for p, _ in got] == pytest.approx([alone(quantized, merging, *pair, 48)[0] for pair in pairs], abs=1e-4)
    assert got[0][0] != pytest.approx(alone(model, merging, *pairs[0], 48)[0], abs=1e-2)


# Generation


def test_the_model_continues_each_prompt_as_it_would_alone(model):
    texts, seen = ["abc", "x", "xyz", "long prompt", "cba"], []
    watched = model.at_embed.register_forward_hook(lambda m, i, x: seen.append(tuple(x.shape[:2])))
    got = write_after(model, *texts, n=6)
    watched.remove()
    for prompt, text in zip(texts, got):
        ids = list(prompt.encode())
        for _ in range(6):
            with torch.no_grad():
                ids.append(int(model(torch.tensor([ids]))[0, -1, :256].argmax()))
        want = ids[len(prompt) :]
        want = want[: want.index(0)] if 0 in want else want
        assert text == BYTES.decode(want)
    assert len(set(got)) > 1 and (3, 3) in seen and (3, 1) in seen  # equal lengths together, then a token at a time


def test_writing_stops_at_a_stop_string_an_end_or_the_limit():
    chain = Chain.writing("abcdefghij")
    assert write_after(chain, "a", until=["ef"]) == ["bcd"]
    assert write_after(chain, "a", until=["gh", "d"]) == ["bc"]
    assert write_after(chain, "a", "c", n=3) == ["bcd", "def"]
    assert write_after(chain, "a", end_ids=[ord("f")]) == ["bcde"]
    assert write_after(chain, "a", seq_len=4) == ["bcd"]


def test_ids_without_a_token_are_never_written(merging):
    logits = torch.zeros(320, 320)
    logits[:, 300], logits[:, ord("q")] = 9, 5  # merging has no 300
    assert write_after(Chain(logits), "a", encoding=merging, n=3) == ["qqq"]
