"""How tokens lie on disk, and how a batch is found there from (seed, step) alone.

A dataset is a directory:
    train_000000.bin ...   shards in llm.c's layout: 256 int32 (magic, version, token count, zeros), then uint16 tokens
    val_000000.bin ...     text that no train shard contains
    meta.json              tokenizer, vocab_size, tokens and bytes per split, sha256 of the source
    tokenizer.json         only where meta.json says that this file is the tokenizer: a copy of Hugging Face's
Shards from elsewhere work too: llm.c's GPT-2 shards (any name with "train" or "val" in it) and nanoGPT's raw train.bin
and val.bin, which have no header. Without meta.json they are taken for GPT-2 tokens.

A batch is a pure function of (dataset, seed, step). Nothing is stored between steps, so a resumed run reads what the
uninterrupted one would have, a batch is the same for any number of ranks, and evaluating never shifts what comes next.
"""

import hashlib
import json
import math
import re
from pathlib import Path

import numpy as np
import tiktoken

from nanoosp.cli import write_whole
from data.bpe import encoding_from_json

MAGIC, VERSION, HEADER = 20240520, 1, 256  # llm.c's; HEADER counts int32
HERE = Path(__file__).resolve().parent
TOKENIZER_JSON = "tokenizer.json"  # Hugging Face's name for the file; in meta.json, for a tokenizer that lies in one


def tokenizer(name: str) -> tiktoken.Encoding:
    """The Encoding called `name`: "bytes" (256 ids, no download), one that tiktoken knows, as "r50k_base" (GPT-2), or
    the path of a Hugging Face tokenizer.json of byte-level BPE (as SmolLM's), or of a directory that holds one.

    Raises ValueError for an unknown name, one that cannot be fetched, or a file that cannot be used.
    """
    if name == "bytes":
        ranks = {bytes([i]): i for i in range(256)}  # one id a byte, no merges; the pattern only keeps the pieces short
        return tiktoken.Encoding("bytes", pat_str=r"\S+|\s+", mergeable_ranks=ranks, special_tokens={})
    if name not in tiktoken.list_encoding_names():
        if not Path(name).exists():
            known = ", ".join(["bytes", *tiktoken.list_encoding_names()])
            raise ValueError(f"unknown tokenizer {name!r}: use one of {known}, or the path of a {TOKENIZER_JSON}")
        return encoding_from_json(read_tokenizer_json(name), name)
    try:
        return tiktoken.get_encoding(name)
    except Exception as error:  # it downloads the table of merges on first use: any kind of network error lands here
        raise ValueError(
            f"tokenizer {name!r} could not be fetched ({type(error).__name__}); use --tokenizer bytes, "
            "or set TIKTOKEN_CACHE_DIR to a folder where tiktoken has stored it before"
        ) from error


def read_tokenizer_json(path) -> str:
    """The contents of a tokenizer.json, or of the one in a directory. Raises ValueError if it cannot be read."""
    path = Path(path) / TOKENIZER_JSON if Path(path).is_dir() else Path(path)
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise ValueError(f"{path} cannot be read ({reason})") from error


def tokenizer_of(meta: dict) -> tiktoken.Encoding:
    """The tokenizer of a dataset, or of a model trained on it, from what read_meta returns. Raises ValueError."""
    if meta["tokenizer"] == TOKENIZER_JSON:
        return encoding_from_json(meta["tokenizer_json"])
    return tokenizer(meta["tokenizer"])


def separator(encoding: tiktoken.Encoding) -> int:
    """The token put before every document: <|endoftext|>, or where there is none the byte 0, which no text contains."""
    if "<|endoftext|>" in encoding.special_tokens_set:
        return encoding.eot_token
    try:
        return encoding.encode_single_token(b"\0")
    except KeyError:
        raise ValueError("the tokenizer has neither <|endoftext|> nor a byte 0 to separate documents with") from None


def encode(encoding: tiktoken.Encoding, text: str) -> np.ndarray:
    """Token ids of a text, int64 [n]. Where tiktoken's regex gives up, as at a million blanks in a row, it is halved.

    Raises ValueError for a character that the tokenizer has no token for.
    """
    try:
        if type(encoding) is tiktoken.Encoding:
            return encoding.encode_to_numpy(text, disallowed_special=()).astype(np.int64)  # a fifth faster
        return np.array(encoding.encode_ordinary(text), np.int64)  # Hugging Face's have rules of their own there
    except UnicodeEncodeError:  # JSON can hold half of a surrogate pair
        return encode(encoding, text.encode("utf-8", "replace").decode("utf-8"))
    except BaseException as error:  # encode_ordinary panics there, and a panic of Rust is no Exception
        if not isinstance(error, ValueError) and type(error).__name__ != "PanicException":
            raise
        if len(text) == 1:
            raise ValueError(f"the tokenizer has no token for {text!r}") from None
        half = len(text) // 2
        return np.concatenate([encode(encoding, text[:half]), encode(encoding, text[half:])])


def tokenizer_for_shards(name: str) -> tiktoken.Encoding:
    """tokenizer(name). Raises ValueError also if its ids do not fit the 16 bits of a shard."""
    encoding = tokenizer(name)
    if encoding.n_vocab > 2**16:
        raise ValueError(f"tokenizer {name!r} has {encoding.n_vocab:,} ids; shards hold 16-bit tokens")
    return encoding


def write_shard(path: Path, tokens: np.ndarray):
    """Write one shard. Raises ValueError if a token does not fit 16 bits."""
    if len(tokens) and tokens.max() >= 2**16:
        raise ValueError(f"token {tokens.max()} does not fit the 16 bits of a shard")
    header = np.zeros(HEADER, dtype=np.int32)
    header[:3] = MAGIC, VERSION, len(tokens)
    with open(path, "wb") as file:
        file.write(header.tobytes())
        file.write(tokens.astype(np.uint16).tobytes())


def open_shard(path: Path) -> np.memmap:
    """The tokens of a shard as a uint16 memory map; nothing is read yet. Raises ValueError for a damaged file."""
    size = path.stat().st_size
    start = np.fromfile(path, dtype=np.int32, count=3)
    if len(start) == 3 and start[0] == MAGIC:
        expected = HEADER * 4 + int(start[2]) * 2
        if start[1] != VERSION:
            raise ValueError(f"{path} is a shard of version {start[1]}; this code reads version {VERSION}")
        if size != expected:
            raise ValueError(
                f"{path} is damaged: it should have {expected:,} bytes ({start[2]:,} tokens), not {size:,}"
            )
        return np.memmap(path, dtype=np.uint16, mode="r", offset=HEADER * 4)
    if size == 0 or size % 2:
        raise ValueError(f"{path} is no token file: {size:,} bytes, and neither llm.c's header nor whole 16-bit tokens")
    return np.memmap(path, dtype=np.uint16, mode="r")  # nanoGPT: tokens from the first byte on


def permute(index: np.ndarray, n: int, seed: int, epoch: int) -> np.ndarray:
    """Where a seeded permutation of 0..n-1 sends each `index`.

    A shuffled list of all windows would grow with the corpus: 0.4 GB in every process for 100B tokens, 4 GB for 1T. An
    eight-round Feistel network is a permutation that is computed instead: whatever the round function f, the step
    (L, R) -> (R, L xor f(R)) can be undone. It permutes 0 .. 4^half_bits - 1, which includes 0 .. n - 1; a result
    outside 0 .. n - 1 is sent through again until it falls inside, which keeps the whole one-to-one.
    """
    half_bits = max(1, (max(n - 1, 1).bit_length() + 1) // 2)
    half, mask = np.uint64(half_bits), np.uint64(2**half_bits - 1)
    keys = np.random.SeedSequence([seed, epoch]).generate_state(8, np.uint64)

    def once(x):
        left, right = x >> half, x & mask
        for key in keys:
            mixed = (right ^ key) * np.uint64(0x9E3779B97F4A7C15)  # multiply and fold, as splitmix64; overflow is meant
            mixed = (mixed ^ (mixed >> np.uint64(29))) * np.uint64(0xBF58476D1CE4E5B9)
            left, right = right, left ^ ((mixed ^ (mixed >> np.uint64(32))) & mask)
        return (left << half) | right

    out = once(np.asarray(index, dtype=np.uint64))
    while (outside := out >= n).any():
        out[outside] = once(out[outside])
    return out.astype(np.int64)


def find_dataset(name: str) -> Path:
    """`name` as a path, or else as a dataset prepared beside this file ("shakespeare")."""
    path = Path(name)
    return path if path.exists() or len(path.parts) > 1 else HERE / name


def write_meta(directory: Path, tokenizer_name: str, encoding, tokens: dict, n_bytes: dict, source: str) -> dict:
    """Write meta.json, last of a dataset's files, after a copy of the tokenizer if that is a file; returns what is in
    it. `tokens` and `n_bytes` count per split, `source` is the sha256 of what the dataset was made from."""
    meta = {
        "tokenizer": encoding.name,  # of a file: tokenizer.json, which then lies beside this
        "vocab_size": encoding.n_vocab,
        "bytes_per_token": n_bytes["val"] / tokens["val"],  # turns validation loss into bits per byte
        "tokens": tokens,
        "bytes": n_bytes,
        "source": source,
    }
    if encoding.name == TOKENIZER_JSON:
        write_whole(directory / TOKENIZER_JSON, read_tokenizer_json(tokenizer_name))
    write_whole(directory / "meta.json", json.dumps(meta, indent=2) + "\n")
    return meta


def read_meta(directory: Path) -> dict:
    """meta.json of a dataset, with the contents of its tokenizer.json, if it has one, as "tokenizer_json". Where there
    is no meta.json, as for shards from llm.c and nanoGPT, GPT-2's tokenizer and a fingerprint of the files.

    Raises ValueError for a meta.json that says nothing sensible, or where the tokenizer.json is missing.
    """
    path = directory / "meta.json"
    if not path.exists() and (directory / "manifest.json").exists():
        raise ValueError(f"{directory} is unfinished: give the data/corpus.py command that began it again")
    if not path.exists():
        source = hashlib.sha256()
        for shard in sorted(directory.glob("*.bin")):
            with open(shard, "rb") as file:
                source.update(f"{shard.name} {shard.stat().st_size} ".encode() + file.read(2**16))
        return dict(tokenizer="r50k_base", vocab_size=50257, bytes_per_token=None, tokens={}, source=source.hexdigest())
    try:
        meta = json.loads(path.read_text(encoding="utf-8"))
        ratio = meta["bytes_per_token"]
        counts = [meta["vocab_size"], *meta["tokens"].values()]
        sensible = all(type(n) is int and n > 0 for n in counts) and (ratio is None or 0 < float(ratio) < math.inf)
        sensible = sensible and isinstance(meta["tokenizer"], str)
    except (ValueError, TypeError, AttributeError, KeyError, RecursionError) as error:
        raise ValueError(f"{path} cannot be used ({type(error).__name__}: {error}): prepare the data again") from error
    if not sensible:
        raise ValueError(f"{path} cannot be used (an impossible number or name in it): prepare the data again")
    if meta["tokenizer"] == TOKENIZER_JSON:
        meta["tokenizer_json"] = read_tokenizer_json(directory)
    return meta


def spread(n: int, total: int) -> np.ndarray:
    """At most n of the numbers 0 ... total - 1, evenly spread: always the same ones."""
    return np.arange(min(n, total)) * total // min(n, total)


class Dataset:
    """One split of a dataset, cut into non-overlapping windows of seq_len + 1 tokens (inputs and their next tokens).

    Raises FileNotFoundError if there are no shards, ValueError if a file is damaged or too short for one window.
    """

    def __init__(self, directory, split: str, seq_len: int, seed: int = 0):
        self.directory, self.split, self.seq_len, self.seed = Path(directory), split, seq_len, seed
        self.meta = read_meta(self.directory)
        # "fineweb_train_000001.bin" is a train shard: the split's name is one of the words of the file's
        paths = [p for p in sorted(self.directory.glob("*.bin")) if split in re.split("[^a-z]+", p.stem.lower())]
        if not paths:
            raise FileNotFoundError(
                f"no {split} shards (like {split}_000000.bin) in {directory}: see python data/prepare.py --help"
            )
        self.shards = [open_shard(path) for path in paths]
        self.n_tokens = sum(map(len, self.shards))
        promised = self.meta["tokens"].get(split, self.n_tokens)
        if promised != self.n_tokens:
            raise ValueError(
                f"{directory}: meta.json promises {promised:,} {split} tokens, there are {self.n_tokens:,}"
            )
        per_shard = [len(shard) // (seq_len + 1) for shard in self.shards]  # a window never crosses shards
        self.first_window = np.concatenate([[0], np.cumsum(per_shard)])  # [shards + 1]
        self.n_windows = int(self.first_window[-1])
        if not self.n_windows:
            raise ValueError(f"{directory}: {self.n_tokens:,} {split} tokens are too few for --seq-len {seq_len} (+ 1)")
        self.windows(self.evaluation_windows(8))  # a foreign file shows here, before a run begins

    def windows(self, index) -> np.ndarray:
        """The windows with the given numbers, int64 [n, seq_len + 1]. Raises ValueError for ids that cannot be."""
        T = self.seq_len + 1
        shard = np.searchsorted(self.first_window, index, side="right") - 1
        start = (np.asarray(index) - self.first_window[shard]) * T
        out = np.stack([self.shards[s][i : i + T] for s, i in zip(shard, start)]).astype(np.int64)
        if out.max() >= self.meta["vocab_size"]:
            raise ValueError(
                f"{self.directory}: a {self.split} shard holds token {out.max()}, but {self.meta['tokenizer']!r} "
                f"has {self.meta['vocab_size']:,} ids: not a token file, or made with another tokenizer"
            )
        return out

    def batch(self, step: int, batch_size: int, rank: int = 0, world: int = 1) -> np.ndarray:
        """This rank's rows of the batch of `step` (0, 1, ...), int64 [batch_size / world, seq_len + 1].

        Samples are numbered through all steps; number g is window permute(g mod n) of epoch g div n.
        """
        rows = np.arange(rank * batch_size // world, (rank + 1) * batch_size // world)
        epoch, index = np.divmod(step * batch_size + rows, self.n_windows)
        for e in np.unique(epoch):
            index[epoch == e] = permute(index[epoch == e], self.n_windows, self.seed, int(e))
        return self.windows(index)

    def evaluation_windows(self, n: int) -> np.ndarray:
        """Numbers of at most n windows spread evenly over the split: always the same ones."""
        return spread(n, self.n_windows)
