"""From text to token ids and back.

    encoding = tokenizer("r50k_base")     "bytes", a name that tiktoken knows, or a tokenizer.json
    ids = encode_whole(encoding, "text")  int64 [n], BOS first if it has one; no other special token
    text = encoding.decode(ids)
    separator(encoding)                   the token before every document
    split_documents(text)                 what lies between lines that read <|endoftext|>
    encode_document(encoding, document)   separator and tokens, as they lie in a dataset
    json_from_encoding(encoding)          as the tokenizer.json that Hugging Face's libraries read

An encoding is a tiktoken.Encoding or, for a Hugging Face model's tokenizer.json, a JsonTokenizer.
Both also have .name and .n_vocab, which is the largest id + 1.

A tokenizer.json may want a token at the start of every text (BOS), as Llama's does. encode_whole()
puts it there: before prompts, questions, texts to measure and documents. In a dataset it follows
the separator, unless the two are the same token.
"""

import contextlib
import functools
import json
import re
from itertools import pairwise
from pathlib import Path

import numpy as np
import tiktoken

from data.dataset import TOKENIZER_JSON
from nanoosp.files import read_text, require

# What ends a document for GPT-2, Llama 3, Llama 2, Gemma and DeepSeek
END_TOKENS = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>",
              "<\uff5cend\u2581of\u2581sentence\uff5c>")
BYTES = {f"<0x{byte:02X}>" for byte in range(256)}  # words of sentencepiece; sorted, in order
# "bytes" in a tokenizer.json
BYTE_WORDS = {word: byte for byte, word in enumerate(sorted(BYTES)) if byte not in (0, 32)} | {
    "<|endoftext|>": 0, "\u2581": 32}


def tokenizer(name: str):
    """The encoding called `name`: "bytes" (256 ids, no download), one that tiktoken knows, such as
    "r50k_base" (GPT-2's), or the path of a tokenizer.json or of a directory that holds one. Raises
    ValueError for an unknown name, one that cannot be fetched, or a file that cannot be used, and
    ImportError if a file needs a package that is missing."""
    if name == "bytes":  # without merges; the pattern only keeps the pieces short
        ranks = {bytes([i]): i for i in range(256)}
        return tiktoken.Encoding(
            "bytes", pat_str=r"\S+|\s+", mergeable_ranks=ranks, special_tokens={})
    names = tiktoken.list_encoding_names()
    if name not in names:
        if not Path(name).exists():
            raise ValueError(f"unknown tokenizer {name!r}: use one of bytes, {', '.join(names)}, "
                             f"or the path of a {TOKENIZER_JSON}")
        path = Path(name) / TOKENIZER_JSON if Path(name).is_dir() else Path(name)
        try:
            return tokenizer_from_json(read_text(path), name)
        except OSError as error:
            raise ValueError(f"{path} cannot be read ({error.strerror})") from error
    try:
        return tiktoken.get_encoding(name)
    except Exception as error:  # it downloads its table on first use, with many kinds of errors
        raise ValueError(f"tokenizer {name!r} could not be fetched ({type(error).__name__}); set "
                         "TIKTOKEN_CACHE_DIR to a folder where tiktoken has stored it before, or, "
                         "for new data, use --tokenizer bytes") from error


def tokenizer_for_shards(name: str):
    """tokenizer(name). Raises ValueError also if its ids do not fit the 16 bits of a shard, or if
    it also ends every text with a token."""
    encoding = tokenizer(name)
    beginning(encoding)  # raises if it does
    if encoding.n_vocab > 2**16:
        raise ValueError(f"tokenizer {name!r} has {encoding.n_vocab:,} ids; shards hold 16-bit "
                         "tokens")
    return encoding


def tokenizer_of(meta: dict):
    """The encoding of a dataset, or of a model trained on it, from what read_meta returns."""
    if meta["tokenizer"] != TOKENIZER_JSON:
        return tokenizer(meta["tokenizer"])
    text = meta["tokenizer_json"]
    if "source" in meta and not meta.get("beginning"):  # a dataset, whose documents begin without
        with contextlib.suppress(ValueError, TypeError):  # JsonTokenizer says what is wrong with it
            text = json.dumps(json.loads(text) | {"post_processor": None}, ensure_ascii=False)
    return tokenizer_from_json(text)


def tokenizer_from_json(text: str, source=TOKENIZER_JSON):
    """The encoding in a tokenizer.json. That of BYTE_WORDS is "bytes" again. Raises what
    JsonTokenizer does."""
    encoding = JsonTokenizer(text, source)
    is_bytes = encoding.inner.get_vocab(with_added_tokens=True) == BYTE_WORDS
    return tokenizer("bytes") if is_bytes else encoding


def encode(encoding, text: str) -> np.ndarray:
    """Token ids of a text, int64 [n]. Raises ValueError for what the encoding has no tokens for."""
    text = text.encode("utf-8", "replace").decode("utf-8")  # JSON can hold half a surrogate pair
    if isinstance(encoding, JsonTokenizer):
        return np.array(encoding.encode(text), np.int64)
    try:
        with rust_errors("tiktoken cannot encode a text"):
            return encoding.encode_to_numpy(text, disallowed_special=()).astype(np.int64)
    except ValueError:  # its regex gives up on long pieces, such as a million blanks
        if len(text) < 2:
            raise
        half = len(text) // 2
        return np.concatenate([encode(encoding, text[:half]), encode(encoding, text[half:])])


class HoldsSeparator(ValueError):
    """A text has the character NUL, and the byte 0 separates documents."""


def beginning(encoding) -> list[int]:
    """The ids that every text begins with: BOS, for a tokenizer.json that says so, or none. Raises
    ValueError if it wants something after a text too, where a model is to go on writing."""
    return encoding.beginning if isinstance(encoding, JsonTokenizer) else []


def encode_whole(encoding, text: str) -> np.ndarray:
    """Token ids of a text that is not the middle of another one, BOS first. Raises what encode()
    and beginning() do, and HoldsSeparator: a NUL would end the text for a model."""
    ids = encode(encoding, text)
    if "\0" in text and separator(encoding) in ids:
        raise HoldsSeparator("the text holds the character NUL, which separates documents in "
                             f"tokens of {encoding.name!r}: remove it, or use another tokenizer")
    return np.concatenate([np.array(beginning(encoding), np.int64), ids])


def encode_document(encoding, document: str) -> np.ndarray:
    """What stands in a dataset for a document: the separator and the ids of encode_whole."""
    ids, end = encode_whole(encoding, document), separator(encoding)
    return ids if beginning(encoding)[:1] == [end] else np.concatenate([[end], ids])


def document_bytes(document: str) -> int:
    """What bits per byte are counted by: bytes in UTF-8, and one for the end of the document, since
    the separator costs bits too. (JSON can hold half a surrogate pair, which is read as "?".)"""
    return len(document.encode("utf-8", "replace")) + 1


BORDER = re.compile(r"\n<\|endoftext\|>[^\S\n]*(?=\n|\Z)")  # found from its fixed characters: fast


def has_borders(text: str) -> bool:
    """Has it lines that read <|endoftext|>?"""
    return bool(BORDER.search("\n" + text))


def split_documents(text: str) -> list[str]:
    """The documents of a text: what lies between lines that read <|endoftext|>, without the spaces
    and line breaks around it."""
    parts = BORDER.split("\n" + text)
    return [part.strip() for part in parts if part.strip()]


def separator(encoding) -> int:
    """The token before every document: <|endoftext|> or its like, or else the byte 0, which
    encode_whole refuses within a text. Raises ValueError if there is neither."""
    if isinstance(encoding, JsonTokenizer):
        return encoding.separator()
    if "<|endoftext|>" in encoding.special_tokens_set:
        return encoding.eot_token
    return encoding.encode_single_token(b"\0")


@functools.lru_cache
def without_token(encoding, n: int) -> list[int]:
    """The ids below n that stand for no token: gaps in a vocabulary, and rows that pad a model."""
    if isinstance(encoding, JsonTokenizer):
        known = encoding.inner.get_vocab(with_added_tokens=True).values()
    else:
        words = [*encoding.token_byte_values(), *encoding.special_tokens_set]
        known = map(encoding.encode_single_token, words)
    return sorted(set(range(n)).difference(known))


class JsonTokenizer:
    """The tokenizer in a tokenizer.json, by Hugging Face's library `tokenizers`. It never makes a
    special token from text, cuts or pads nothing, and gives a text the same ids every time. Raises
    ValueError, with one line that begins with `source`, for a file that cannot be used, and
    ImportError without the library."""

    name = TOKENIZER_JSON

    def __init__(self, text: str, source=TOKENIZER_JSON):
        self.text, tokenizers = text, require("tokenizers", source)
        with rust_errors(f"{source} cannot be used"):
            self.inner = inner = tokenizers.Tokenizer.from_str(text)
            self.n_vocab = 1 + max(inner.get_vocab(with_added_tokens=True).values(), default=-1)
            if not self.n_vocab:
                raise ValueError("it has no tokens")
        inner.no_truncation()
        inner.no_padding()
        inner.encode_special_tokens = True  # which means: as ordinary text
        added = inner.get_added_tokens_decoder().items()
        self.special = {token.content: i for i, token in added if token.special}
        self.byte_ids = None
        known = inner.get_vocab(with_added_tokens=False)
        if self.special.keys() & known.keys() or type(inner.model).__name__ == "Unigram":
            content = json.loads(text)
            self.hide_words(content["model"], known)
            inner.model = tokenizers.Tokenizer.from_str(json.dumps(content)).model
        if getattr(inner.model, "dropout", None):  # it skips merges at random
            inner.model.dropout = None

    def __reduce__(self):
        return JsonTokenizer, (self.text,)

    @functools.cached_property
    def beginning(self) -> list[int]:
        """See beginning() above. Found by framing one placeholder, an id that no token has."""
        with rust_errors("the tokenizer cannot frame a text"):
            empty = self.inner.encode("", add_special_tokens=False)
            empty.truncate(0)
            empty.pad(1, pad_id=self.n_vocab)
            framed = self.inner.post_process(empty, add_special_tokens=True).ids
        if framed[-1] != self.n_vocab:
            raise ValueError("the post_processor of this tokenizer.json appends tokens to every "
                             "text, so a model could not continue it")
        return framed[:-1]

    def hide_words(self, model: dict, known: dict[str, int]):
        """Change a model, with the words `known`, so that it makes no special token from text. A
        Unigram model also knows special tokens and bytes as words, and some BPE models have merges
        that make the former; sentencepiece, where the words come from, never looks for them."""
        words, self.unknown = set(self.special), model.get("unk_id")
        if isinstance(model["vocab"], list):  # Unigram: [word, log p], where a place is an id
            if self.unknown is not None:
                words.add(model["vocab"][self.unknown][0])
            if self.unknown is not None and model.get("byte_fallback") and known.keys() >= BYTES:
                model["byte_fallback"] = False  # encode() does it
                self.byte_ids = [known[word] for word in sorted(BYTES)]
                words |= BYTES
            self.inner.add_special_tokens(sorted(words))  # for decode()
            model["vocab"] = [["" if word in words else word, p] for word, p in model["vocab"]]
            return
        needed = BYTES | {model.get("unk_token")}
        model["vocab"] = {word: i for word, i in known.items() if word not in words - needed}
        if "merges" in model:
            prefix = model.get("continuing_subword_prefix") or ""
            pairs = [pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]]
            model["merges"] = [(a, b) for a, b in pairs
                               if words.isdisjoint([a, b, a + b.removeprefix(prefix)])]

    def encode(self, text: str) -> list[int]:
        # Unlike encode, both release Python's lock, and the first counts no offsets, keeps no words
        encode = self.inner.encode_batch if self.byte_ids else self.inner.encode_batch_fast
        with rust_errors("the tokenizer has no tokens for a text"):
            found = encode([text], add_special_tokens=False)[0]
        if not self.byte_ids:
            return found.ids
        spelled = [[self.byte_ids[byte] for byte in word.encode()] if i == self.unknown else [i]
                   for i, word in zip(found.ids, found.tokens)]
        return [i for ids in spelled for i in ids]

    def decode(self, ids) -> str:
        return self.inner.decode(ids, skip_special_tokens=False)

    def separator(self) -> int:
        for word in END_TOKENS:
            if word in self.special:
                return self.special[word]
        for word in ("\u0100", "<0x00>"):  # the byte 0 in GPT-2's alphabet, and in sentencepiece's
            i = self.inner.token_to_id(word)
            if i is not None and self.decode([i]) == "\0":
                return i
        raise ValueError(f"the tokenizer has neither {' nor '.join(END_TOKENS)} nor a byte 0 to "
                         "separate documents with")


@contextlib.contextmanager
def rust_errors(message: str):
    """Turn what the libraries raise into a ValueError of one line. Both are written in Rust, whose
    panics arrive as PanicException. That is not an Exception, and can only be told by its name."""
    try:
        yield
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{message}: {reason}") from error


# The other way: an encoding of tiktoken as a tokenizer.json


def json_from_encoding(encoding: tiktoken.Encoding) -> str:
    """A tokenizer.json with the ids of "bytes" or of GPT-2. Raises ValueError for other ones.

    Byte-level BPE cuts a text into pieces, and merges neighbours within a piece until no merge is
    left. A tokenizer.json lists the merges. tiktoken has none: it merges whatever makes a token,
    the lowest id first. So the merge that makes each token has to be found again from the ids.
    """
    from tokenizers import Tokenizer, decoders, models
    from tokenizers.pre_tokenizers import ByteLevel

    if encoding.name == "bytes":
        return json_of_bytes()
    if encoding.name not in ("gpt2", "r50k_base"):  # the others cut text differently
        raise ValueError(f"tokenizer {encoding.name!r} cannot be written as a tokenizer.json: only "
                         "bytes and r50k_base can")
    ids = {token: encoding.encode_single_token(token) for token in encoding.token_byte_values()}
    special = {word: encoding.encode_single_token(word) for word in encoding.special_tokens_set}
    alphabet = sorted(ByteLevel.alphabet())  # a letter for each byte: its own if it can be printed
    order = sorted(range(256), key=lambda byte: chr(byte) not in alphabet)
    letters = dict(zip(order, alphabet))

    def spell(token: bytes) -> str:
        return "".join(letters[byte] for byte in token)

    merged = sorted((token for token in ids if len(token) > 1), key=ids.get)
    merges = [tuple(map(spell, halves(token, ids))) for token in merged]
    vocab = {spell(token): i for token, i in ids.items()} | special
    tokenizer = Tokenizer(models.BPE(vocab, merges))
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)  # cuts a text as GPT-2 does
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(special))
    return tokenizer.to_str()


def json_of_bytes() -> str:
    """The tokenizer.json of "bytes": every character falls back to its bytes, <0x01> to <0xFF>.

    This is what is left of a sentencepiece vocabulary without words: llama.cpp and other readers of
    LLaMAs know that form, and no other one that has single bytes only. The byte 0, which stands
    between documents, is a special token. A space is spelled as a lower block, U+2581: llama.cpp
    turns spaces into that before it looks for tokens, and back. So a lower block in a text becomes
    a space. (Not where this project reads it: see tokenizer_from_json.)
    """
    from tokenizers import Tokenizer, decoders, models, normalizers

    tokenizer = Tokenizer(models.BPE(BYTE_WORDS, [], byte_fallback=True))
    tokenizer.normalizer = normalizers.Replace(" ", "\u2581")
    blanks = decoders.Replace("\u2581", " ")
    tokenizer.decoder = decoders.Sequence([blanks, decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens(["<|endoftext|>"])
    return tokenizer.to_str()


def halves(token: bytes, ids: dict[bytes, int]) -> list[bytes]:
    """The two parts that are merged into `token`: what all merges before its own make of it."""
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 2:
        found = [ids.get(a + b, len(ids)) for a, b in pairwise(parts)]
        i = found.index(min(found))
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return parts
