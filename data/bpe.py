"""Hugging Face's tokenizer.json, in and out, for byte-level BPE as GPT-2 and SmolLM use it.

Byte-level BPE cuts a text into pieces by a pattern, writes each piece as bytes, and merges neighbours for as long as a
list of merges allows, first the pair that comes first in it. tiktoken has no such list: it merges whatever neighbours
make a token, the lowest id first. The two agree where a token's id says when it was merged, and that is checked here.

Words used here: a *rank* is the id of a token that merging makes, a *special* token one that no text becomes.
"""

import functools
import json

import regex  # no requirement of ours, but one of tiktoken, so it is there
import tiktoken

# How each family cuts a text. SmolLM first cuts around every digit, then as GPT-2: so a digit stands alone, and blanks
# before it are one piece, as at the end of a text.
GPT2 = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
SMOLLM = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?=\p{N})|\s+(?!\S)|\s+"""

# GPT-2's alphabet, in which tokenizer.json writes bytes: printable ones as themselves, others as U+0100, U+0101, ...
_printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)]
_others = [byte for byte in range(256) if byte not in _printable]
LETTER_OF = {byte: chr(byte) for byte in _printable} | {byte: chr(256 + i) for i, byte in enumerate(_others)}
BYTE_OF = {letter: byte for byte, letter in LETTER_OF.items()}

# ---------------------------------------------------------------------------------------------------------------------
# In


def encoding_from_json(text: str, name: str = "tokenizer.json") -> tiktoken.Encoding:
    """The Encoding with the ids of the tokenizer.json whose contents are `text`.

    Raises ValueError, with one line that starts with `name`, for one that is not byte-level BPE as above.
    """
    try:
        return _encoding(json.loads(text))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        reason = error if type(error) is ValueError else f"not a tokenizer.json ({type(error).__name__}: {error})"
        raise ValueError(f"{name} cannot be used: {reason}") from error


def _encoding(parts: dict) -> tiktoken.Encoding:
    model, added = parts["model"], parts.get("added_tokens") or []
    if model.get("type", "BPE") != "BPE":
        raise ValueError(f"its model is {model['type']}, not BPE")
    special = {token["content"]: token["id"] for token in added}
    moved = next((token for token, i in special.items() if model["vocab"].get(token, i) != i), None)
    if moved is not None:
        raise ValueError(f"its added token {moved!r} has the id {special[moved]}, but {model['vocab'][moved]} in vocab")
    vocab = {token: rank for token, rank in model["vocab"].items() if token not in special}
    foreign = next((token for token in vocab if not set(token) <= BYTE_OF.keys()), None)
    if foreign is not None or model.get("byte_fallback"):
        raise ValueError(f"not byte-level BPE (its vocabulary has {foreign or 'byte_fallback'!r})")
    for option in ("continuing_subword_prefix", "end_of_word_suffix", "dropout"):
        if model.get(option):
            raise ValueError(f"it has {option} = {model[option]!r}, which tiktoken lacks")
    if parts.get("normalizer"):
        raise ValueError(f"it normalizes text ({parts['normalizer'].get('type')}), which tiktoken cannot do")
    common = next((token["content"] for token in added if not token.get("special")), None)
    if common is not None:
        raise ValueError(f"its added token {common!r} is not special: it would be cut out of ordinary text")
    pattern = _pattern(parts.get("pre_tokenizer"))
    ranks = {bytes(BYTE_OF[letter] for letter in token): rank for token, rank in vocab.items()}
    ids = [*ranks.values(), *special.values()]
    if not ranks or b"" in ranks or not all(type(i) is int and 0 <= i < 2**32 for i in ids) or len({*ids}) < len(ids):
        raise ValueError("its ids are not different whole numbers")
    merges = [merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"]]
    listed = [tuple(bytes(BYTE_OF[letter] for letter in part) for part in merge) for merge in merges]
    if listed != merges_of(ranks):
        raise ValueError("its merges do not stand in the order of their ids, as tiktoken needs them")
    encoding = ByteLevelBPE("tokenizer.json", pat_str=pattern, mergeable_ranks=ranks, special_tokens=special)
    if encoding.missing and model.get("unk_token") is not None:
        raise ValueError("it lacks bytes and has a token for unknown ones, which tiktoken cannot do")
    return encoding


def _pattern(pre_tokenizer) -> str:
    """The pattern of the pre-tokenizers we know. Raises ValueError for others."""
    steps = (pre_tokenizer or {}).get("pretokenizers") or [pre_tokenizer or {}]
    *before, last = steps
    by_bytes = last.get("type") == "ByteLevel" and last.get("use_regex", True)
    digits = [(step.get("type"), step.get("individual_digits")) for step in before]
    if not by_bytes or digits not in ([], [("Digits", True)]):
        kinds = " + ".join(str(step.get("type")) for step in steps)
        known = "GPT-2's (ByteLevel) and SmolLM's (single Digits + ByteLevel)"
        raise ValueError(f"its pre-tokenizer is {kinds}: only {known} are read")
    if last.get("add_prefix_space"):
        raise ValueError("it puts a blank before every text (add_prefix_space), which tiktoken cannot do")
    return SMOLLM if before else GPT2


# ---------------------------------------------------------------------------------------------------------------------
# Merges


def merges_of(ranks: dict[bytes, int]) -> list[tuple[bytes, ...]]:
    """The list of merges that tiktoken makes without having one, in its order."""
    return [tuple(last_merge(token, ranks)) for token in sorted(ranks, key=ranks.get) if len(token) > 1]


def last_merge(token: bytes, ranks: dict[bytes, int]) -> list[bytes]:
    """The parts that `token` consists of when all merges before its own have been made: two, if it can be made."""
    parts, own = [token[i : i + 1] for i in range(len(token))], ranks[token]
    while len(parts) > 2:
        found = [ranks.get(a + b, own) for a, b in zip(parts, parts[1:])]
        if min(found) >= own:
            break
        i = found.index(min(found))
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return parts


# ---------------------------------------------------------------------------------------------------------------------
# Out


def json_from_encoding(encoding: tiktoken.Encoding) -> str:
    """A tokenizer.json with the ids of "bytes" or of one of tiktoken's Encodings that cut text as GPT-2 does.

    Raises ValueError for other Encodings.
    """
    if encoding.name not in ("bytes", "gpt2", "r50k_base"):
        raise ValueError(f"tokenizer {encoding.name!r} cannot be written as a tokenizer.json: only bytes and r50k_base")
    ranks = {token: encoding.encode_single_token(token) for token in encoding.token_byte_values()}

    def spelled(token: bytes) -> str:
        return "".join(LETTER_OF[byte] for byte in token)

    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    special = {token: encoding.encode_single_token(token) for token in encoding.special_tokens_set}
    vocab = {spelled(token): rank for token, rank in sorted(ranks.items(), key=lambda item: item[1])} | special
    return json.dumps({
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": i, "content": token} | plain for token, i in special.items()],
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": byte_level | {"trim_offsets": False},
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": "",
            "end_of_word_suffix": "",
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": vocab,
            "merges": [f"{spelled(a)} {spelled(b)}" for a, b in merges_of(ranks)],
        },
    }, ensure_ascii=False)


# ---------------------------------------------------------------------------------------------------------------------
# Vocabularies that lack bytes


class ByteLevelBPE(tiktoken.Encoding):
    """An Encoding whose vocabulary may lack some bytes, as SmolLM's lacks six control characters.

    Hugging Face drops such a byte from the piece it stands in, where tiktoken would crash. encode_ordinary and
    encode_ordinary_batch do the same here; the other ways to encode a text are tiktoken's.
    """

    def __init__(self, name: str, **parts):
        super().__init__(name, **parts)
        self.missing = bytes(byte for byte in range(256) if bytes([byte]) not in parts["mergeable_ranks"])

    def encode_ordinary(self, text: str) -> list[int]:
        raw = text.encode("utf-8", "replace") if self.missing else b""
        if len(raw) == len(raw.translate(None, self.missing)):
            return super().encode_ordinary(text)
        pieces = (piece.encode("utf-8", "replace") for piece in cut(text, self._pat_str))
        kept = (piece.translate(None, self.missing) for piece in pieces)
        return [token for piece in kept if piece for token in self._encode_single_piece(piece)]


def cut(text: str, pattern: str) -> list[str]:
    """The pieces of `text`, which tiktoken makes but does not show. The regex package cuts alike, but may know another
    year's Unicode; so tiktoken says which characters are letters, digits and blanks, and one of each stands for all."""
    others = "".join({char for char in text if char > "\x7f"})
    kinds = dict.fromkeys(map(ord, others), "\xa1")  # a sign
    for kind, stand_in in ((r"\p{L}", "\xe9"), (r"\p{N}", "\xb2"), (r"\s", "\xa0")):
        encoding = characters(kind)
        kinds |= dict.fromkeys(map(ord, encoding.decode(encoding.encode_ordinary(others))), stand_in)
    return [text[match.start() : match.end()] for match in regex.finditer(pattern, text.translate(kinds))]


@functools.cache
def characters(kind: str) -> tiktoken.Encoding:
    """An Encoding that skips all characters that are not of this kind."""
    return tiktoken.Encoding("", pat_str=kind, mergeable_ranks={bytes([i]): i for i in range(256)}, special_tokens={})
