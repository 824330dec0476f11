"""How tokens lie on disk, and how a batch is found there from (seed, step) alone.

A dataset is a directory:
    train_000000.bin ...  shards as llm.c has them: 256 int32 (magic, version, n, zeros), n uint16
    val_000000.bin ...    text that is in no training shard
    meta.json             tokenizer, vocab_size, tokens and document_bytes() of each split, sha256,
                          "beginning": the ids that documents begin with, if the tokenizer has any
    tokenizer.json        a copy of Hugging Face's file, if that is the tokenizer
Shards from elsewhere work too: those of llm.c, under any name with "train" or "val" in it, and
nanoGPT's train.bin and val.bin, which have no header. Without meta.json they are GPT-2 tokens,
unless a meta.pkl says otherwise: nanoGPT's for characters, refused, since a pickle can run code.

A batch is a pure function of (dataset, seed, step). A resumed run reads what the uninterrupted one
would have read, for any number of ranks, and evaluating in between changes nothing.
"""

import hashlib
import json
import math
import re
from pathlib import Path

import numpy as np

from nanoosp.files import as_json, read_text, write_text

HERE = Path(__file__).resolve().parent
TOKENIZER_JSON = "tokenizer.json"  # in meta.json too, where such a file is the tokenizer
MAGIC, VERSION, HEADER = 20240520, 1, 256  # llm.c's; HEADER counts int32


class Dataset:
    """One split of a dataset, in windows of seq_len + 1 tokens: inputs and their next tokens.
    Raises FileNotFoundError without shards, ValueError for a damaged file or too little text."""

    def __init__(self, directory, split: str, seq_len: int, seed: int = 0):
        self.directory, self.split, self.seq_len, self.seed = Path(directory), split, seq_len, seed
        self.meta = read_meta(self.directory)
        paths = [path for path in sorted(self.directory.glob("*.bin"))
                 if split in re.split("[^a-z]+", path.stem.lower())]  # fineweb_train_000001.bin
        if not paths:
            raise FileNotFoundError(f"no {split} shards (like {split}_000000.bin) in {directory}: "
                                    "see python data/prepare.py --help")
        self.shards = [open_shard(path) for path in paths]
        self.n_tokens = sum(map(len, self.shards))
        promised = self.meta["tokens"].get(split, self.n_tokens)
        if promised != self.n_tokens:
            raise ValueError(f"{directory} has {self.n_tokens:,} {split} tokens, but meta.json "
                             f"promises {promised:,}")
        per_shard = [len(shard) // (seq_len + 1) for shard in self.shards]  # none crosses shards
        self.first_window = np.concatenate([[0], np.cumsum(per_shard)])  # [shards + 1]
        self.n_windows = int(self.first_window[-1])
        if not self.n_windows:
            raise ValueError(f"{directory}: {self.n_tokens:,} {split} tokens are too few for "
                             f"--seq-len {seq_len} (+ 1)")
        self.windows(self.evaluation_windows(8))  # finds a foreign file before a run begins
        self.fingerprint = fingerprint(json.dumps([self.meta, split], sort_keys=True))

    def batch(self, step: int, batch_size: int, rank: int = 0, world: int = 1) -> np.ndarray:
        """This rank's rows of the batch of `step` (0, 1, ...), int64 [batch_size / world, T + 1].

        Rows are numbered through all steps. Row number g is window permute(g mod n) of epoch
        g div n, where n is the number of windows.
        """
        rows = np.arange(rank * batch_size // world, (rank + 1) * batch_size // world)
        epoch, index = np.divmod(step * batch_size + rows, self.n_windows)
        for e in np.unique(epoch):
            index[epoch == e] = permute(index[epoch == e], self.n_windows, self.seed, int(e))
        return self.windows(index)

    def windows(self, index) -> np.ndarray:
        """The windows with these numbers, int64 [n, T + 1]. ValueError for impossible ids."""
        T = self.seq_len + 1
        shard = np.searchsorted(self.first_window, index, side="right") - 1
        start = (np.asarray(index) - self.first_window[shard]) * T
        out = np.stack([self.shards[s][i : i + T] for s, i in zip(shard, start)]).astype(np.int64)
        if out.max() >= self.meta["vocab_size"]:
            raise ValueError(f"{self.directory}: a {self.split} shard holds token {out.max()}, but "
                             f"{self.meta['tokenizer']!r} has {self.meta['vocab_size']:,} ids: not "
                             "a token file, or made with another tokenizer")
        return out

    def evaluation_windows(self, n: int) -> np.ndarray:
        """The numbers of at most n windows from all over the split, always the same ones."""
        return evenly_spaced(n, self.n_windows)


class TextBlocks:
    """A text for evaluation, as WikiText-2 perplexity is measured: in blocks that do not overlap,
    each scored on all its tokens but the first. The tail that fills no block is dropped. `n_bytes`
    are the text's by document_bytes(); `text` it is known by, whatever made tokens of it. Raises
    ValueError if the tokens `ids` fill no block."""

    def __init__(self, ids: np.ndarray, block: int, n_bytes: int, text: str = ""):
        self.seq_len = block - 1
        self.n_windows = len(ids) // block
        if not self.n_windows:
            raise ValueError(f"the text has {len(ids):,} tokens, fewer than one block of {block:,}")
        self.blocks = ids[: self.n_windows * block].reshape(self.n_windows, block)
        self.meta = {"bytes_per_token": n_bytes / len(ids)}
        self.fingerprint = fingerprint(text)

    def windows(self, index) -> np.ndarray:
        return self.blocks[index]

    def evaluation_windows(self, n: int) -> np.ndarray:
        return evenly_spaced(n, self.n_windows)


def fingerprint(content: str) -> str:
    """What tells the data of two numbers apart, whatever they are called."""
    return hashlib.sha256(content.encode()).hexdigest()[:16]


# Which windows, in which order


def permute(index: np.ndarray, n: int, seed: int, epoch: int) -> np.ndarray:
    """Where a seeded permutation of 0 ... n - 1 sends each `index`.

    A shuffled list of all windows of a large corpus would take gigabytes in every process. So the
    permutation is computed, by a Feistel network: eight rounds of (L, R) -> (R, L xor f(R)). Each
    can be undone, whatever f is, so they permute 0 ... 4^half_bits - 1, which includes 0 ... n - 1.
    A result of n or more goes through again until it is below n, and the map stays one-to-one.
    """
    half_bits = max(1, (max(n - 1, 1).bit_length() + 1) // 2)
    half, mask = np.uint64(half_bits), np.uint64(2**half_bits - 1)
    keys = np.random.SeedSequence([seed, epoch]).generate_state(8, np.uint64)  # one a round

    def network(x):
        left, right = x >> half, x & mask
        for key in keys:  # f multiplies and folds, as splitmix64 does; overflow is intended
            mixed = (right ^ key) * np.uint64(0x9E3779B97F4A7C15)
            mixed = (mixed ^ (mixed >> np.uint64(29))) * np.uint64(0xBF58476D1CE4E5B9)
            left, right = right, left ^ ((mixed ^ (mixed >> np.uint64(32))) & mask)
        return (left << half) | right

    out = network(np.asarray(index, dtype=np.uint64))
    while (outside := out >= n).any():
        out[outside] = network(out[outside])
    return out.astype(np.int64)


def evenly_spaced(n: int, total: int) -> np.ndarray:
    """At most n of the numbers 0 ... total - 1, evenly spaced, from 0 on."""
    return np.arange(min(n, total)) * total // min(n, total)


# Shards


def write_shard(path: Path, tokens: np.ndarray):
    """Write one shard. Raises ValueError if a token does not fit 16 bits, or their number 31."""
    if len(tokens) and tokens.max() >= 2**16:
        raise ValueError(f"token {tokens.max()} does not fit the 16 bits of a shard")
    if len(tokens) >= 2**31:
        raise ValueError(f"{len(tokens):,} tokens are too many for one shard")
    header = np.zeros(HEADER, dtype=np.int32)
    header[:3] = MAGIC, VERSION, len(tokens)
    with open(path, "wb") as file:
        file.write(header.tobytes())
        file.write(np.ascontiguousarray(tokens, np.uint16))  # uint16 without a copy in memory


def open_shard(path: Path) -> np.memmap:
    """The tokens of a shard, uint16, read when they are used. ValueError for a damaged file."""
    size = path.stat().st_size
    start = np.fromfile(path, dtype=np.int32, count=3)
    if len(start) and start[0] != MAGIC and start[0] // 10_000 == MAGIC // 10_000:  # all are dates
        raise ValueError(f"{path} is a file of llm.c with the magic number {start[0]}, not "
                         f"{MAGIC}: only 16-bit tokens are read (those of Llama 3 have 32): "
                         "prepare the text with data/prepare.py or data/corpus.py")
    if len(start) == 3 and start[0] == MAGIC:
        expected = HEADER * 4 + int(start[2]) * 2
        if start[1] != VERSION:
            raise ValueError(f"{path} is a shard of version {start[1]}, not {VERSION}")
        if size != expected:
            raise ValueError(f"{path} is damaged: it has {size:,} bytes, not {expected:,} "
                             f"({start[2]:,} tokens)")
        return np.memmap(path, dtype=np.uint16, mode="r", offset=HEADER * 4)
    if size == 0 or size % 2:
        raise ValueError(f"{path} is no token file: {size:,} bytes, no header, no 16-bit tokens")
    tokens = np.memmap(path, dtype=np.uint16, mode="r")  # nanoGPT's
    if len(tokens) >= 100 and max(tokens[1:2000:2]) < 8:  # the upper halves of small numbers
        raise ValueError(f"{path} holds numbers of 32 bits or more, not 16-bit tokens: prepare the "
                         "text with data/prepare.py or data/corpus.py")
    return tokens


# What is known of a dataset


def find_dataset(name: str) -> Path:
    """`name` as a path, or else as a dataset prepared beside this file ("shakespeare")."""
    path = Path(name)
    return path if path.exists() or len(path.parts) > 1 else HERE / name


def write_meta(directory: Path, encoding, tokens: dict, n_bytes: dict, source: str) -> dict:
    """Write meta.json, the last of a dataset's files, and return its content."""
    ratio = n_bytes["val"] / tokens["val"]  # turns loss into bits per byte
    meta = dict(tokenizer=encoding.name, vocab_size=encoding.n_vocab, bytes_per_token=ratio,
                tokens=tokens, bytes=n_bytes, source=source)
    if encoding.name == TOKENIZER_JSON:
        meta |= dict(beginning=encoding.beginning) if encoding.beginning else {}
        write_text(directory / TOKENIZER_JSON, encoding.text)
    write_text(directory / "meta.json", as_json(meta))
    return meta


def read_meta(directory: Path) -> dict:
    """The content of meta.json and, as "tokenizer_json", of a tokenizer.json that belongs to it.

    Without meta.json: GPT-2's tokenizer and a fingerprint of the shards. Raises ValueError for a
    damaged meta.json or nanoGPT's meta.pkl, and OSError for a missing tokenizer.json.
    """
    path = directory / "meta.json"
    if not path.exists() and (directory / "manifest.json").exists():
        raise ValueError(f"{directory} is unfinished: repeat the data/corpus.py command for it")
    if not path.exists() and (directory / "meta.pkl").exists():
        raise ValueError(f"{directory} has a vocabulary of its own in nanoGPT's meta.pkl, a "
                         "pickle, which is never opened: prepare the text with python "
                         "data/prepare.py --text FILE")
    if not path.exists():
        source = hashlib.sha256()
        for shard in sorted(directory.glob("*.bin")):
            with open(shard, "rb") as file:
                source.update(f"{shard.name} {shard.stat().st_size} ".encode() + file.read(2**16))
        gpt2 = dict(tokenizer="r50k_base", vocab_size=50257, bytes_per_token=None, tokens={})
        return gpt2 | {"source": source.hexdigest()}
    try:
        meta = json.loads(read_text(path))
        ratio, counts = meta["bytes_per_token"], [meta["vocab_size"], *meta["tokens"].values()]
        if not all(type(n) is int and n > 0 for n in counts):
            raise ValueError(f"not all of {counts} are counts")
        if not (ratio is None or 0 < float(ratio) < math.inf) or type(meta["tokenizer"]) is not str:
            raise ValueError(f"bytes_per_token {ratio}, tokenizer {meta['tokenizer']!r}")
    except (ValueError, TypeError, AttributeError, KeyError, RecursionError) as error:
        raise ValueError(f"{path} cannot be used ({type(error).__name__}: {error}): prepare the "
                         "data again") from error
    if meta["tokenizer"] == TOKENIZER_JSON:
        meta["tokenizer_json"] = read_text(directory / TOKENIZER_JSON)
    return meta
