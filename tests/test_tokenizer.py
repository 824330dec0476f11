"""Tokenizers: tiktoken's, and any tokenizer.json, against Hugging Face's library itself."""

import glob
import json
import pickle
import random
import sys
from pathlib import Path

import pytest
import tiktoken
import torch

import train
from data.dataset import Dataset, open_shard, read_meta
from data.prepare import prepare
from data.tokenizer import (JsonTokenizer, beginning, encode, encode_document, encode_whole,
                            separator, tokenizer, tokenizer_for_shards, tokenizer_of)
from tools import evaluate, export
from tools.huggingface import save_llama
from tools.loading import load

tokenizers = pytest.importorskip("tokenizers")
decoders, models, normalizers, pre_tokenizers, trainers = (
    tokenizers.decoders, tokenizers.models, tokenizers.normalizers, tokenizers.pre_tokenizers,
    tokenizers.trainers)

GPT2_PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
LLAMA3_PATTERN = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
                  r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
# The bytes that SmolLM lacks
LACKING = bytes([4, 6, 0x13, 0x14, 0x16, 0x1D, 0xC0, 0xC1, 0xF1, 0xF2, *range(0xF5, 0x100)])

# Texts


def made_up_text(rng, n):
    words = ["".join(rng.choices("abcdefghijéß—", k=rng.randint(1, 7))) for _ in range(60)]
    between = [" ", "  ", "\n", "\n\n", ", ", ". ", "'s ", "'ll ", "1 ", "23", " 4567 ", "\t"]
    return "".join(rng.choice(words) + rng.choice(between) for _ in range(n))


def random_strings(n):
    """Strings of blanks, digits of many scripts, letters, signs, control characters and
    contractions."""
    rng = random.Random(0)
    pools = [range(0x20, 0x7F), range(0x20), range(0x80, 0x250), range(0x250, 0xD800),
             range(0xE000, 0x10000), range(0x10000, 0x20000),
             [0x20, 0xA0, 0x2003, 0x3000, 9, 10, 13, 0x85, 0x2028],
             [0x30, 0x664, 0xBD, 0xB2, 0x2167], [4, 6, 0x13, 0x14, 0x16, 0x1D]]
    ends = ["'s", "'ll", "'t", " 1", "<|endoftext", "  ", ""]
    for _ in range(n):
        pool = rng.choices(pools, k=3)
        letters = (chr(rng.choice(rng.choice(pool))) for _ in range(rng.randint(0, 20)))
        yield "".join(letters) + rng.choice(ends)


# Small tokenizers of the library


def byte_level(**options):
    return pre_tokenizers.ByteLevel(add_prefix_space=False, **options)


def fit(model, trainer, special=(), alphabet=(), vocab_size=600):
    trainer = trainer(vocab_size=vocab_size, special_tokens=[*special],
                      initial_alphabet=sorted(alphabet), show_progress=False)
    model.train_from_iterator([made_up_text(random.Random(1), 4000)], trainer)
    return model


def like_gpt2(digits=False, alphabet=None):
    t = tokenizers.Tokenizer(models.BPE())
    steps = [pre_tokenizers.Digits(individual_digits=True)] * digits + [byte_level()]
    t.pre_tokenizer = pre_tokenizers.Sequence(steps) if digits else byte_level()
    t.decoder = decoders.ByteLevel()
    alphabet = byte_level().alphabet() if alphabet is None else alphabet
    return fit(t, trainers.BpeTrainer, ["<|endoftext|>", "<|im_start|>"], alphabet)


def like_llama3():
    """Byte-level BPE of pieces that a pattern cuts. Its special tokens are not in the vocabulary,
    and its post-processor would put one in front."""
    t = tokenizers.Tokenizer(models.BPE(ignore_merges=True))
    split = pre_tokenizers.Split(tokenizers.Regex(LLAMA3_PATTERN), "isolated")
    t.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level(use_regex=False)])
    t.decoder = decoders.ByteLevel()
    fit(t, trainers.BpeTrainer, alphabet=byte_level().alphabet())
    t.add_special_tokens(["<|begin_of_text|>", "<|end_of_text|>"])
    begin = ("<|begin_of_text|>", t.token_to_id("<|begin_of_text|>"))
    t.post_processor = tokenizers.processors.TemplateProcessing(
        single=f"{begin[0]} $A", special_tokens=[begin])
    return t


BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def like_llama2(metaspace=False):
    """BPE of whole texts, as sentencepiece makes it: blanks are letters, and a letter that it does
    not know becomes its bytes. Newer files have Metaspace in place of the normalizer."""
    t = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    steps = [decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    if metaspace:
        t.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=False)
    else:
        t.normalizer = normalizers.Sequence(
            [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    t.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), *steps])
    t.add_special_tokens(["<unk>", "<s>", "</s>"])
    return fit(t, trainers.BpeTrainer, ["<unk>", "<s>", "</s>", *BYTES])


def like_t5():
    """sentencepiece's other kind of vocabulary, Unigram, has whole words, </s> among them."""
    pieces = [("<unk>", 0.0), ("</s>", 0.0), *((byte, -20.0) for byte in BYTES)]
    letters = sorted({*made_up_text(random.Random(1), 4000), "<", "/", "s", ">", "\u2581"} - {" "})
    pieces += [(letter, -8.0) for letter in letters] + [("\u2581ab", -3.0), ("cd", -3.0)]
    t = tokenizers.Tokenizer(models.Unigram(pieces, unk_id=0, byte_fallback=True))
    t.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    t.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(),
                                   decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    t.add_special_tokens(["<unk>", "</s>"])
    return t


@pytest.fixture(scope="module")
def theirs():
    """gpt2: all bytes. smollm: all but those that SmolLM lacks. gaps: those of its training text.
    llama3, llama2, metaspace, t5: as those models have them."""
    full = tiktoken_letters()
    known = [letter for byte, letter in full.items() if byte not in LACKING]
    return {"gpt2": like_gpt2(), "smollm": like_gpt2(True, known), "gaps": like_gpt2(True, []),
            "llama3": like_llama3(), "llama2": like_llama2(), "metaspace": like_llama2(True),
            "t5": like_t5()}


def tiktoken_letters() -> dict[int, str]:
    """GPT-2's alphabet: bytes that can be printed as themselves, others from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {
        byte: chr(0x100 + i) for i, byte in enumerate(others)}


ENDS = {"gpt2": "<|endoftext|>", "smollm": "<|endoftext|>", "gaps": "<|endoftext|>",
        "llama3": "<|end_of_text|>", "llama2": "</s>", "metaspace": "</s>", "t5": "</s>"}


def differences(ours, theirs, texts):
    """The texts to which the library gives other ids than we do."""
    texts = list(texts)
    expected = [e.ids for e in theirs.encode_batch(texts, add_special_tokens=False)]
    return [text for text, ids in zip(texts, expected) if encode(ours, text).tolist() != ids]


# A tokenizer.json gives its library's ids


@pytest.mark.parametrize("name", ENDS)
def test_a_tokenizer_json_gives_the_ids_of_the_tokenizers_library(theirs, name):
    paths = sorted(glob.glob(torch.__path__[0] + "/nn/modules/*.py"))
    texts = [Path(path).read_text(encoding="utf-8") for path in paths]
    texts = [made_up_text(random.Random(2), 3000), *(texts if name in ("gpt2", "smollm") else [])]
    ours = JsonTokenizer(theirs[name].to_str())
    assert ours.n_vocab == theirs[name].get_vocab_size() and ours.name == "tokenizer.json"
    assert differences(ours, theirs[name], [*texts, "", " a", "a  b\n\n c", "x\u4e2d 1234"]) == []


@pytest.mark.parametrize("name", ENDS)
def test_ids_agree_on_random_unicode_also_where_bytes_are_missing(theirs, name):
    ours = JsonTokenizer(theirs[name].to_str())
    assert differences(ours, theirs[name], random_strings(3000)) == []


def test_dropped_bytes_join_their_neighbours_but_no_pieces(theirs):
    ours = JsonTokenizer(theirs["smollm"].to_str())
    cases = ["ab\x04cd", ", \x04. ", "\x04", "", "  \x04  a", "1\x042", "'\x04s", "\U00040000",
             "a\U00080000b"]
    assert differences(ours, theirs["smollm"], cases) == []
    assert ours.decode(encode(ours, "ab\x04cd")) == "abcd"


@pytest.mark.parametrize("name", ENDS)
def test_half_a_surrogate_pair_becomes_a_question_mark(theirs, name):
    for ours in (JsonTokenizer(theirs[name].to_str()), tokenizer("bytes")):
        a, b = (encode(ours, text).tolist() for text in ("ab cd \ud800", "ab cd ?"))
        assert a == b  # such text can come out of JSON


@pytest.mark.parametrize("name", ["gpt2", "llama3", "llama2", "metaspace"])
def test_text_survives_a_round_trip(theirs, name):
    ours = JsonTokenizer(theirs[name].to_str())
    for text in [made_up_text(random.Random(7), 300), *random_strings(300), " a", "  a ", "\n"]:
        text = text.lstrip(" ") if name == "metaspace" else text  # for which " a" and "a" are equal
        assert ours.decode(encode(ours, text)) == text


def test_text_decoded_behind_a_prompt_keeps_its_blanks(theirs):
    """As eval.py shows it. Alone, sentencepiece's decoders drop the blank before a word."""
    for name in ENDS:
        ours = JsonTokenizer(theirs[name].to_str())
        ids = encode(ours, "ab cd ab").tolist()
        for cut in range(1, len(ids)):
            shown = ours.decode(ids[:cut])
            assert ours.decode(ids) == shown + ours.decode(ids)[len(shown):] == "ab cd ab"


def test_a_tokenizer_survives_pickling_as_processes_need_it(theirs):
    text = "hi\x04 12 <|endoftext|>"
    for name in ENDS:
        ours = JsonTokenizer(theirs[name].to_str())
        again = pickle.loads(pickle.dumps(ours))
        assert again.n_vocab == ours.n_vocab and separator(again) == separator(ours)
        assert encode(again, text).tolist() == encode(ours, text).tolist()


def test_the_older_spelling_of_merges_is_read_too(theirs):
    parts = json.loads(theirs["gpt2"].to_str())
    parts["model"]["merges"] = [" ".join(merge) for merge in parts["model"]["merges"]]
    del parts["model"]["type"]  # GPT-2's own file is that old
    ours = JsonTokenizer(json.dumps(parts))
    assert differences(ours, theirs["gpt2"], ["hello abc, def's 12"]) == []


# What marks the beginning: the post-processor's, as the library gives it

processors = tokenizers.processors


def framed(library, single):
    """A copy of a small tokenizer of the library whose texts are framed so."""
    copy = tokenizers.Tokenizer.from_str(library.to_str())
    special = copy.get_added_tokens_decoder().items()
    copy.post_processor = processors.Sequence([
        processors.ByteLevel(), processors.TemplateProcessing(
            single=single, special_tokens=[(token.content, i) for i, token in special])])
    return copy


TEMPLATES = {"llama3": "<|begin_of_text|> $A", "llama2": "<s> $A", "metaspace": "<s> <unk> $A",
             "gpt2": "<|endoftext|> $A", "t5": "$A", "smollm": "$A"}


@pytest.mark.parametrize("name, template", TEMPLATES.items())
def test_a_text_begins_as_its_library_begins_it(theirs, name, template):
    library = framed(theirs[name], template)
    ours = JsonTokenizer(library.to_str())
    library.encode_special_tokens = True
    n = len(template.split()) - 1
    assert len(beginning(ours)) == n
    for text in ("", "ab", " ab  cd\n", made_up_text(random.Random(3), 50)):
        wanted = library.encode(text, add_special_tokens=True).ids
        assert encode_whole(ours, text).tolist() == wanted
        assert encode(ours, text).tolist() == wanted[n:]
        end = separator(ours)
        in_front = [] if wanted[: n and 1] == [end] else [end]  # nothing is doubled
        assert encode_document(ours, text).tolist() == in_front + wanted
    assert beginning(tokenizer("bytes")) == []


def test_a_prompt_begins_with_bos_which_is_not_shown(theirs, tmp_path, monkeypatch, capsys):
    library = framed(theirs["llama2"], "<s> $A")
    (tmp_path / "tokenizer.json").write_text(library.to_str(), encoding="utf-8")
    (tmp_path / "t.txt").write_text(made_up_text(random.Random(5), 900), encoding="utf-8")
    prepare(tmp_path / "data", str(tmp_path), tmp_path / "t.txt")
    shape = "--preset tiny --n-layer 1 --n-head 2 --n-embd 32 --seq-len 16 --batch-size 8"
    train.main([*f"{shape} --device cpu --steps 2 --data".split(), str(tmp_path / "data"),
                "--out", str(tmp_path / "run")])
    prompts = []

    def generate(model, tokens, *others, **more):
        prompts.append(tokens)
        return iter(library.encode(" cd", add_special_tokens=False).ids)

    monkeypatch.setattr("tools.writing.generate", generate)
    capsys.readouterr()
    evaluate.main([str(tmp_path / "run"), "--device", "cpu", "--prompt", "ab"])
    assert prompts == [library.encode("ab").ids] and prompts[0][0] == library.token_to_id("<s>")
    assert capsys.readouterr().out.startswith("ab") and prompts[0][0] == 1

    capsys.readouterr()
    pytest.importorskip("transformers")
    export.main([str(tmp_path / "run"), "--hf", str(tmp_path / "hf")])
    config = json.loads((tmp_path / "hf/tokenizer_config.json").read_text())
    assert config["bos_token"] == "<s>" and config["add_bos_token"]
    assert load(tmp_path / "hf").encoding.beginning == [1]
    older = load(tmp_path / "run")  # as if its dataset had been made without <s>
    del older.data["beginning"]
    save_llama(older.model, tmp_path / "older", older.options, older.data)
    assert load(tmp_path / "older").encoding.beginning == []
    config = json.loads((tmp_path / "older/tokenizer_config.json").read_text())
    assert config["bos_token"] == config["eos_token"] == "</s>" and not config["add_bos_token"]


def test_a_tokenizer_that_ends_texts_is_refused_where_a_text_is_to_go_on(theirs, tmp_path):
    for single in ("$A </s>", "<s> $A </s>"):
        library = framed(theirs["llama2"], single)
        (tmp_path / "tokenizer.json").write_text(library.to_str(), encoding="utf-8")
        ours = tokenizer(str(tmp_path))  # which reads and separates as before
        assert ours.decode(encode(ours, "ab")) == "ab" and separator(ours) == 2
        for use in (tokenizer_for_shards, lambda name: encode_whole(tokenizer(name), "ab")):
            with pytest.raises(ValueError, match="post_processor") as error:
                use(str(tmp_path))
            assert "\n" not in str(error.value)


def test_a_dataset_keeps_how_its_documents_begin(theirs, tmp_path):
    library = framed(theirs["llama2"], "<s> $A")
    (tmp_path / "tokenizer.json").write_text(library.to_str(), encoding="utf-8")
    texts = [made_up_text(random.Random(i), 30).strip() for i in range(40)]
    (tmp_path / "t.txt").write_text("\n<|endoftext|>\n".join(texts), encoding="utf-8")
    prepare(tmp_path / "data", str(tmp_path), tmp_path / "t.txt")
    meta = read_meta(tmp_path / "data")
    wanted = [i for text in texts[19::20] for i in (2, *library.encode(text).ids)]
    assert open_shard(tmp_path / "data/val_000000.bin").tolist() == wanted and wanted[1] == 1
    assert meta["beginning"] == [1] == beginning(tokenizer_of(meta))
    imported = {key: meta[key] for key in ("tokenizer", "tokenizer_json")}
    assert beginning(tokenizer_of(imported)) == [1]
    del meta["beginning"]  # one that an older version made: without <s>, which its model never saw
    assert beginning(tokenizer_of(meta)) == []
    assert encode_document(tokenizer_of(meta), "ab").tolist() == [2, *library.encode("ab").ids[1:]]


# What marks the end


@pytest.mark.parametrize("name, end", ENDS.items())
def test_special_tokens_are_ids_but_never_come_out_of_text(theirs, name, end):
    ours = JsonTokenizer(theirs[name].to_str())
    assert separator(ours) == theirs[name].token_to_id(end)
    assert ours.decode([separator(ours)]) == end
    for text in (f"ab{end}cd", end, f"{end}{end} ab", f"ab {end}"):
        assert separator(ours) not in encode(ours, text)
        if name != "gaps":  # which drops most letters
            assert ours.decode(encode(ours, text)) == text


def sentencepiece_model(path, kind, byte_fallback):
    """(a model of sentencepiece in the file `path`, the same as a tokenizer of the library). In the
    second, merges make all words of which two others are the parts, as in older conversions."""
    sentencepiece = pytest.importorskip("sentencepiece")
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdef</s>é", k=rng.randint(1, 7))) for _ in range(200)]
    texts = (" ".join(rng.choices(words, k=12)) for _ in range(1000))
    with open(path, "wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=texts, model_writer=file, vocab_size=500, model_type=kind,
            byte_fallback=byte_fallback, normalization_rule_name="identity", num_threads=1,
            remove_extra_whitespaces=False, hard_vocab_limit=False, minloglevel=2)
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(path))
    vocab = [(theirs.id_to_piece(i), theirs.get_score(i)) for i in range(len(theirs))]
    if kind == "unigram":
        model = models.Unigram(vocab, unk_id=theirs.unk_id(), byte_fallback=byte_fallback)
    else:
        ids = {word: i for i, (word, _) in enumerate(vocab)}
        merges = [(word[:n], word[n:]) for word in ids for n in range(1, len(word))
                  if word[:n] in ids and word[n:] in ids]
        model = models.BPE(ids, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=byte_fallback)
    library = tokenizers.Tokenizer(model)
    library.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    library.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback()])
    library.add_special_tokens(["<unk>", "<s>", "</s>"])
    return theirs, library


@pytest.mark.parametrize("byte_fallback", [False, True])
@pytest.mark.parametrize("kind", ["unigram", "bpe"])
def test_pieces_are_those_of_sentencepiece_also_where_a_special_token_stands(tmp_path, kind,
                                                                            byte_fallback):
    theirs, library = sentencepiece_model(tmp_path / "spiece.model", kind, byte_fallback)
    ours = JsonTokenizer(library.to_str())
    unknown = ["\n", "\t", "\u4e2d", "\u4e2d\u6587", "\u0416", "!"]
    parts = ["</s>", "<s>", "<unk>", "<0x41>", "<0xE4>", "</", "s>", "abc", "fed", "\u2581", " ",
             "  ", "     ", "é", *unknown]
    rng = random.Random(1)
    texts = [*parts, *("".join(rng.choices(parts, k=rng.randint(2, 14))) for _ in range(1500))]
    wanted = [theirs.encode(text) for text in texts]
    assert [text for text, ids in zip(texts, wanted) if encode(ours, text).tolist() != ids] == []
    found = {i for ids in wanted for i in ids}
    assert len(found) > 20 and not found & {1, 2} and (0 in found) != byte_fallback
    assert [library.decode(ids, False) for ids in wanted] == [ours.decode(ids) for ids in wanted]


def test_pieces_are_those_of_the_slow_classes_of_transformers(tmp_path):
    slow = pytest.importorskip("transformers.tokenization_utils_sentencepiece")
    _, library = sentencepiece_model(tmp_path / "spiece.model", "unigram", True)
    theirs = slow.SentencePieceBackend(vocab_file=str(tmp_path / "spiece.model"), legacy=True,
                                       split_special_tokens=True, unk_token="<unk>",
                                       bos_token="<s>", eos_token="</s>")
    ours = JsonTokenizer(library.to_str())
    for text in ("ab</s>fed", "</s>", "ab <s>  fed", "\u4e2d</s>\u4e2d ab", "   ab</s>   ab\n"):
        assert encode(ours, text).tolist() == theirs.encode(text, add_special_tokens=False)


def test_without_such_a_token_the_byte_0_separates(theirs):
    for name, spelling in (("gpt2", "\u0100"), ("llama2", "<0x00>"), ("t5", "<0x00>")):
        parts = json.loads(theirs[name].to_str())
        parts["added_tokens"] = []
        ours = JsonTokenizer(json.dumps(parts))
        assert separator(ours) == theirs[name].token_to_id(spelling)
        assert ours.decode([separator(ours)]) == "\0"
    words = tokenizers.Tokenizer(models.WordLevel({"a": 0, "\u0100": 1}, unk_token="a"))
    with pytest.raises(ValueError, match="neither <|endoftext|> nor .* byte 0") as error:
        separator(JsonTokenizer(words.to_str()))
    assert "\n" not in str(error.value)


# Whatever a file asks for is done, but for what would lose text


@pytest.mark.parametrize("change", [
    dict(normalizer={"type": "NFC"}), dict(normalizer={"type": "Lowercase"}),
    dict(pre_tokenizer=None), dict(pre_tokenizer={"type": "Whitespace"}),
    dict(pre_tokenizer={"type": "Digits", "individual_digits": False}),
    dict(pre_tokenizer={"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True,
                        "use_regex": True}),
    dict(model=dict(byte_fallback=True)), dict(model=dict(end_of_word_suffix="</w>")),
    dict(model=dict(unk_token="a")), dict(model=dict(ignore_merges=True)),
    dict(model=dict(type="Unigram", vocab=[["a", -1.0], ["b", -2.0], ["ab", -2.5]], unk_id=0)),
    dict(model=dict(type="WordLevel", vocab={"a": 0, "b": 1}, unk_token="a")),
    dict(model=dict(type="WordPiece", vocab={"a": 0, "##b": 1}, unk_token="a",
                    continuing_subword_prefix="##", max_input_chars_per_word=100)),
    dict(added_tokens=[dict(id=9999, content="  ", single_word=False, lstrip=False, rstrip=False,
                            normalized=False, special=False)]),
], ids=lambda change: "-".join(f"{k}" for part in change.values()
                               for k in (part if isinstance(part, dict) else [part])))
def test_tokenizers_that_tiktoken_could_not_be_work_and_equal_the_library(theirs, change):
    parts = json.loads(theirs["smollm"].to_str())
    for key, value in change.items():
        keep = key == "model" and "type" not in value
        parts[key] = parts[key] | value if keep else value
    library = tokenizers.Tokenizer.from_str(json.dumps(parts))
    library.encode_special_tokens = True
    ours = JsonTokenizer(json.dumps(parts))
    texts = [made_up_text(random.Random(8), 200), "Ab  cD 12 e\u0301", *random_strings(50)]
    assert differences(ours, library, texts) == []
    assert ours.n_vocab == max(library.get_vocab(with_added_tokens=True).values()) + 1


def test_texts_are_not_cut_or_padded_and_merges_not_dropped(theirs):
    parts = json.loads(theirs["gpt2"].to_str())
    parts["truncation"] = dict(direction="Right", max_length=3, strategy="LongestFirst", stride=0)
    parts["padding"] = dict(strategy={"Fixed": 50}, direction="Right", pad_to_multiple_of=None,
                            pad_id=0, pad_type_id=0, pad_token="<|endoftext|>")
    parts["model"]["dropout"] = 0.5
    library = tokenizers.Tokenizer.from_str(json.dumps(parts))
    text = made_up_text(random.Random(9), 100)
    assert len(library.encode(text).ids) == 50
    assert differences(JsonTokenizer(json.dumps(parts)), theirs["gpt2"], [text, "a"]) == []


# What can be wrong


def test_damaged_files_are_refused_in_one_line(theirs):
    parts = json.loads(theirs["smollm"].to_str())
    model = parts["model"]
    damaged = [parts | {"model": change} for change in (
        {}, model | {"merges": [["a"]]}, model | {"merges": [["a", "\u4e2d"]]},
        model | {"vocab": [["a", 1]]}, model | {"vocab": model["vocab"] | {"Q": -1}},
        model | {"vocab": model["vocab"] | {"Q": "1"}})]
    empty = parts | {"model": model | {"vocab": {}, "merges": []}, "added_tokens": []}
    texts = ["", "{", "[]", "3", "null", "[" * 100000, *map(json.dumps, [*damaged, empty])]
    for text in texts:
        with pytest.raises(ValueError, match="^my.json cannot be used: ") as error:
            JsonTokenizer(text, "my.json")
        assert "\n" not in str(error.value)


def test_a_text_without_tokens_is_refused_in_one_line():
    words = tokenizers.Tokenizer(models.WordLevel({"a": 0}))
    ours = JsonTokenizer(words.to_str())
    assert encode(ours, "a").tolist() == [0]
    with pytest.raises(ValueError, match="no tokens for a text: .*UNK"):
        encode(ours, "b")


def test_more_ids_than_a_shard_can_hold_are_refused_in_one_line(theirs, tmp_path):
    parts = json.loads(theirs["gpt2"].to_str())
    parts["model"]["vocab"]["\u0100\u0100"] = 2**16
    (tmp_path / "tokenizer.json").write_text(json.dumps(parts), encoding="utf-8")
    assert tokenizer(str(tmp_path)).n_vocab == 2**16 + 1
    with pytest.raises(ValueError, match="has 65,537 ids; shards hold 16-bit tokens"):
        tokenizer_for_shards(str(tmp_path))


def test_a_missing_library_is_named(theirs, monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ImportError, match="my.json needs tokenizers: pip install"):
        JsonTokenizer(theirs["gpt2"].to_str(), "my.json")
    assert encode(tokenizer("bytes"), "a").tolist() == [97]  # which needs no such library


def test_a_panic_of_tiktoken_becomes_one_line():
    letters = tiktoken.Encoding("letters", pat_str=r"\S", mergeable_ranks={b"a": 0, b"b": 1},
                                special_tokens={})
    assert encode(letters, "abba").tolist() == [0, 1, 1, 0]
    with pytest.raises(ValueError, match="tiktoken cannot encode a text") as error:
        encode(letters, "abc")
    assert "\n" not in str(error.value)


# Datasets and runs


@pytest.mark.parametrize("name", ENDS)
def test_prepared_documents_come_back(theirs, name, tmp_path):
    (tmp_path / "tokenizer.json").write_text(theirs[name].to_str(), encoding="utf-8")
    documents = [made_up_text(random.Random(i), 60).strip() for i in range(40)]
    (tmp_path / "t.txt").write_text("\n<|endoftext|>\n".join(documents), encoding="utf-8")
    prepare(tmp_path / "data", str(tmp_path / "tokenizer.json"), tmp_path / "t.txt")
    data, ours = Dataset(tmp_path / "data", "val", 1), JsonTokenizer(theirs[name].to_str())
    assert data.meta["vocab_size"] == ours.n_vocab and data.meta["tokenizer"] == "tokenizer.json"
    ids = open_shard(tmp_path / "data/val_000000.bin").tolist()
    starts = [i for i, token in enumerate(ids) if token == separator(ours)] + [len(ids)]
    bos = data.meta.get("beginning", [])
    assert bos == ([theirs[name].token_to_id("<|begin_of_text|>")] if name == "llama3" else [])
    parts = [ids[a + 1 : b] for a, b in zip(starts, starts[1:])]
    assert all(part[: len(bos)] == bos for part in parts)
    read = [ours.decode(part[len(bos) :]) for part in parts]
    if name == "t5":  # a Metaspace that splits: other kinds of blanks are tokens too
        assert read == [ours.decode(encode(ours, text)) for text in documents[19::20]]
    else:
        assert read == documents[19::20]


@pytest.fixture(scope="module")
def json_dataset(theirs, tmp_path_factory):
    """A dataset of made-up text, tokenized with the SmolLM-like tokenizer.json."""
    folder = tmp_path_factory.mktemp("json")
    (folder / "tokenizer.json").write_text(theirs["smollm"].to_str(), encoding="utf-8")
    (folder / "text.txt").write_text(made_up_text(random.Random(5), 6000), encoding="utf-8")
    prepare(folder / "data", str(folder / "tokenizer.json"), folder / "text.txt")
    return folder / "data"


def test_a_dataset_carries_its_tokenizer_json(json_dataset, theirs):
    meta = read_meta(json_dataset)
    assert meta["tokenizer"] == "tokenizer.json"
    assert meta["tokenizer_json"] == theirs["smollm"].to_str()
    a, b = (encode(encoding, "abc 12").tolist()
            for encoding in (tokenizer(str(json_dataset)), tokenizer_of(meta)))
    assert a == b
    window = Dataset(json_dataset, "val", 30).windows([0])[0]
    assert window[0] == separator(tokenizer_of(meta)) == 0
    assert len(tokenizer_of(meta).decode(window[1:])) > 20


def test_a_dataset_without_its_tokenizer_json_is_refused(json_dataset, tmp_path):
    for file in json_dataset.glob("*.*"):
        if file.name != "tokenizer.json":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    with pytest.raises(OSError, match="tokenizer.json"):
        read_meta(tmp_path)
    with pytest.raises(ValueError, match="tokenizer.json cannot be read"):
        tokenizer(str(tmp_path))
    with pytest.raises(ValueError, match="nowhere.*path of a tokenizer.json"):
        tokenizer(str(tmp_path / "nowhere"))
    (tmp_path / "tokenizer.json").write_bytes(b"\xff\xfe{")
    with pytest.raises(ValueError, match="tokenizer.json cannot be read: not UTF-8"):
        tokenizer(str(tmp_path))


def test_checkpoints_and_four_bit_files_carry_the_tokenizer(json_dataset, tmp_path):
    shape = "--preset tiny --n-layer 1 --n-head 2 --n-embd 32 --seq-len 16 --batch-size 8"
    run, four = tmp_path / "run", tmp_path / "four.pt"
    argv = f"{shape} --device cpu --steps 2 --osp".split()
    train.main([*argv, "--data", str(json_dataset), "--out", str(run)])
    export.main([str(run), "--method", "had", "--out", str(four), "--device", "cpu"])
    expected = encode(tokenizer_of(read_meta(json_dataset)), "abc 12").tolist()
    for path in (run, four):
        assert encode(load(path).encoding, "abc 12").tolist() == expected
        evaluate.main([str(path), "--device", "cpu", "--prompt", "abc", "--tokens", "3"])
