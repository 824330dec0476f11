"""Write an encoding of tiktoken as the tokenizer.json that Hugging Face's libraries read.

Byte-level BPE cuts a text into pieces, and merges neighbours within a piece until no merge is left.
A tokenizer.json lists the merges. tiktoken has none: it merges whatever makes a token, the lowest
id first. So the merge that makes each token has to be found again from the ids.

"bytes" has no merges. It is written as what is left of a sentencepiece vocabulary without words:
llama.cpp and other readers of LLaMAs know that form, and no other one that has single bytes only.
"""

from itertools import pairwise

import tiktoken

from data.tokenizer import BYTE_WORDS


def json_from_encoding(encoding: tiktoken.Encoding) -> str:
    """A tokenizer.json with the ids of "bytes" or of GPT-2. Raises ValueError for other ones."""
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

    The byte 0, which stands between documents, is a special token. A space is spelled as a lower
    block, U+2581: llama.cpp turns spaces into that before it looks for tokens, and back. So a lower
    block in a text becomes a space. (Not where this project reads it: see tokenizer_from_json.)
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
