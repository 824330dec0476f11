"""Where corpus.py's documents come from: files of text, JSON lines and parquet, here or on the Hugging Face hub. (No
command of its own.)

A file goes through memory in blocks of about a megabyte, each of whole documents, so its size does not matter. One
process cuts the blocks, which is cheap and must be done in order; the others turn them into documents and tokens.
"""

import gzip
import hashlib
import json
import os
import re
import signal
import threading
import time
import zlib
from collections import deque
from concurrent.futures import ProcessPoolExecutor
from itertools import islice
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import NamedTuple

import numpy as np

from nanoosp.cli import extra
from data.dataset import encode, separator, tokenizer

KINDS = (".parquet", ".jsonl", ".jsonl.gz", ".txt", ".md", ".py")
LINE = b"\n<|endoftext|>"  # how a line between two documents of a text file begins
BLOCK = 2**20  # bytes that are read at a time; a document of a text file is at most about twice as long
ROWS = 256  # of a parquet file at a time: about as much text
ATTEMPTS = 5  # at a download


# ---------------------------------------------------------------------------------------------------------------------
# Files: which there are, and how they come from the hub


class File(NamedTuple):
    name: str  # within its folder or repository
    size: int
    path: Path | None = None  # None: still on the hub
    repo: str = ""
    revision: str = ""


def local_files(name: str) -> list[File]:
    """All files of a folder that can be read, by name, or the one file. Raises ValueError if there is none."""
    root = Path(name)
    if root.is_dir():
        paths = sorted((p for p in root.rglob("*") if p.name.endswith(KINDS) and p.is_file()), key=lambda p: p.parts)
    else:
        paths = [root] if root.name.endswith(KINDS) and root.is_file() else []
    if not paths:
        raise ValueError(f"{name}: no {', '.join(KINDS)} file" + ("s in it" if root.is_dir() else ""))
    return [File(p.relative_to(root).as_posix() if root.is_dir() else p.name, p.stat().st_size, p) for p in paths]


def with_retries(function, what: str):
    """function(), tried again after network errors. Raises ConnectionError when that does not help."""
    for attempt in range(ATTEMPTS):
        try:
            return function()
        except Exception as error:  # every layer below has its own kinds of network errors
            reason = f"{type(error).__name__}: {(str(error).strip().splitlines() or ['?'])[0]}"
            if getattr(getattr(error, "response", None), "status_code", 0) in (401, 403, 404):
                break  # no such dataset, or none for us
            time.sleep(2**attempt if attempt < ATTEMPTS - 1 else 0)
    raise ConnectionError(f"{what} could not be fetched ({reason}); the same command tries again")


def hub_files(name: str, revision: str | None) -> list[File]:
    """The files of NAME or NAME:FOLDER on the hub, at `revision` or, if that is None, at the newest one."""
    hub = extra("huggingface_hub", "--hub")
    repo, _, folder = name.partition(":")
    info = with_retries(lambda: hub.HfApi().dataset_info(repo, revision=revision, files_metadata=True), repo)
    known = sorted((f.rfilename, f.size) for f in info.siblings if f.rfilename.endswith(KINDS[:3]))
    start = f"{folder.rstrip('/')}/" if folder else ""
    files = [File(n, size, None, repo, info.sha) for n, size in known if n.startswith(start)]
    if not files:
        folders = sorted({n.rpartition("/")[0] for n, _ in known})
        raise ValueError(f"{name}: no parquet or jsonl files there; folders of {repo} with such files: {folders[:20]}")
    return files


def download(repo: str, name: str, revision: str, folder: Path | None = None) -> Path:
    """A file of a dataset on the hub, in `folder` or else in huggingface_hub's cache; a half-downloaded one lies under
    another name. Raises ConnectionError if it cannot be had, ImportError without huggingface_hub."""
    hub = extra("huggingface_hub", "--hub")
    where = dict(repo_type="dataset", revision=revision, local_dir=folder)
    return Path(with_retries(lambda: hub.hf_hub_download(repo, name, **where), f"{repo}/{name}"))


def fetch(file: File, folder: Path) -> Path:
    """Download a file of the hub into `folder`."""
    path = download(file.repo, file.name, file.revision, folder / file.repo.replace("/", "--"))
    if path.stat().st_size != file.size:
        path.unlink()
        raise ConnectionError(f"{file.repo}/{file.name} came with the wrong size; the same command tries again")
    return path


# ---------------------------------------------------------------------------------------------------------------------
# Blocks: one process reads each file once, never as a whole, and hands it on in pieces of whole documents


def end_of_documents(data: bytes) -> int:
    """Where the last separator line in `data` begins; 0 if there is none, unless the document grows too long."""
    at = complete = data.rfind(b"\n") + 1  # what follows may be half a separator
    while (at := data.rfind(LINE, 0, at)) >= 0:
        behind = at + len(LINE)
        if not data[behind : data.find(b"\n", behind)].strip():  # blanks may follow, but a word makes it text
            return at + 1
    if len(data) <= BLOCK:
        return 0  # the document may end in the next block
    if cut := complete or data.rfind(b" ") + 1:  # it is too long: cut it behind a whole line, or else behind a word
        return cut
    return next(i for i in range(len(data) - 1, -1, -1) if data[i] & 0xC0 != 0x80)  # where a UTF-8 character begins


def read_blocks(path: Path, key: str):
    """Yield (offset, block): bytes of text and where they begin, lines or parquet rows and the first one's number."""
    if path.name.endswith(".parquet"):
        with extra("pyarrow.parquet", path.name).ParquetFile(path, buffer_size=BLOCK, pre_buffer=False) as file:
            if key not in file.schema_arrow.names:
                raise ValueError(f"it has no column {key!r} but {file.schema_arrow.names}: name one with --key")
            if str(file.schema_arrow.field(key).type) not in ("string", "large_string"):
                raise ValueError(f"its column {key!r} is {file.schema_arrow.field(key).type}, not text")
            row = 1
            for batch in file.iter_batches(ROWS, columns=[key]):
                yield row, batch.column(0)
                row += len(batch)
        return
    text = not path.name.endswith((".jsonl", ".jsonl.gz"))
    rest, offset = b"", 0 if text else 1
    with gzip.open(path) if path.name.endswith(".gz") else open(path, "rb") as file:
        while data := file.read(BLOCK):
            rest += data
            if cut := end_of_documents(rest) if text else rest.rfind(b"\n") + 1:
                yield offset, rest[:cut]
                offset += cut if text else rest.count(b"\n", 0, cut)
                rest = rest[cut:]
    if rest:
        yield offset, rest


def documents(name: str, offset: int, block, key: str) -> list[str]:
    """The documents of a block. Raises ValueError with the number of a line or byte that cannot be read."""
    if not isinstance(block, bytes):
        return [text for text in block.to_pylist() if text and not text.isspace()]
    if not name.endswith((".jsonl", ".jsonl.gz")):
        try:
            text = block.decode("utf-8-sig" if offset == 0 else "utf-8")  # some editors put a mark in front
        except UnicodeDecodeError as error:
            raise ValueError(f"not UTF-8 text (byte {offset + error.start} cannot be read)") from error
        # Like prepare.py's pattern, but it begins with fixed characters: twice as fast
        parts = re.split(r"\n<\|endoftext\|>[^\S\n]*(?=\n|\Z)", "\n" + text)
        return [d for part in parts if (d := part.strip())]
    texts = []
    for number, line in enumerate(block.split(b"\n"), offset):
        if line.strip():
            try:
                text = json.loads(line)[key]
            except (ValueError, TypeError, KeyError, RecursionError) as error:
                raise ValueError(f"line {number}: no JSON object with the key {key!r} ({error})") from error
            if not isinstance(text, str):
                raise ValueError(f"line {number}: {key!r} is {type(text).__name__}, not text")
            texts += [text] if text and not text.isspace() else []
    return texts


# ---------------------------------------------------------------------------------------------------------------------
# Workers: a block in, its documents' tokens out


def start_worker(tokenizer_name: str, text_key: str):
    global encoding, key
    encoding, key = tokenizer(tokenizer_name), text_key
    if parent := parent_process():
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes; the parent decides
        threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()  # never outlive it


def encode_block(name: str, offset: int, block) -> list[tuple[np.ndarray, int]]:
    """(uint16 separator and tokens, bytes of text) of each document."""
    result = []
    for text in documents(name, offset, block, key):
        raw = text.encode("utf-8", "replace")  # JSON can hold half of a surrogate pair
        ids = encode(encoding, raw.decode("utf-8"))
        tokens = np.empty(1 + len(ids), np.uint16)
        tokens[0], tokens[1:] = separator(encoding), ids
        result.append((tokens, len(raw)))
    return result


def worker_pool(processes: int, *args):
    return ProcessPoolExecutor(processes, get_context("spawn"), start_worker, args)


# ---------------------------------------------------------------------------------------------------------------------
# Sources: documents in order, tokenized ahead


class Source:
    """The documents of some files, one after the other, and how far they have been taken."""

    def __init__(self, name: str, weight: float, files: list[File], key: str):
        self.name, self.weight, self.files, self.key = name, weight, files, key
        # What the manifest keeps. The position is the next document's: file, block in the file, document in the block
        self.state = {"name": name, "position": [0, 0, 0], "documents": 0, "tokens": 0}

    def fingerprint(self) -> str:
        return hashlib.sha256(repr([(f.name, f.size, f.revision) for f in self.files]).encode()).hexdigest()

    def start(self, pool, ahead: int, downloads: Path):
        """Begin at the position, `ahead` blocks in advance. Which process tokenizes what makes no difference."""
        self.blocks, self.ahead, self.pending = self.read(pool, downloads), ahead, deque()
        self.ready, self.skip = iter(()), self.state["position"][2]

    def read(self, pool, downloads: Path):
        """Yield (file, block, its future tokens) from the position on."""
        first_file, first_block, _ = self.state["position"]
        for f, file in list(enumerate(self.files))[first_file:]:
            path = file.path or fetch(file, downloads)
            try:
                for b, (offset, block) in enumerate(read_blocks(path, self.key)):
                    if f > first_file or b >= first_block:
                        yield f, b, pool.submit(encode_block, file.name, offset, block)
            except (OSError, EOFError, ValueError, zlib.error) as error:
                raise ValueError(f"{path} cannot be read: {error or 'it ends too early'}") from error
            if file.path is None:
                path.unlink()

    def take(self) -> tuple[np.ndarray, int] | None:
        """(tokens, bytes of text) of the next document; None after the last one."""
        while (document := next(self.ready, None)) is None:
            self.pending.extend(islice(self.blocks, self.ahead - len(self.pending)))
            if not self.pending:
                return None
            f, b, block = self.pending.popleft()
            try:
                block = block.result()
            except ValueError as error:
                raise ValueError(f"{self.files[f].path or self.files[f].name}, {error}") from error
            self.ready, self.state["position"], self.skip = iter(block[self.skip :]), [f, b, self.skip], 0
        self.state["position"][2] += 1
        self.state["documents"] += 1
        self.state["tokens"] += len(document[0])
        return document


def open_sources(specs, key: str, revisions: dict) -> list[Source]:
    """The sources of (name, weight or None, on the hub?). `revisions` pins datasets of the hub, and is added to."""
    sources = []
    for name, weight, on_hub in specs:
        files = hub_files(name, revisions.get(name)) if on_hub else local_files(name)
        if on_hub:
            revisions[name] = files[0].revision
        if weight is None and sources:  # without weights: one after the other
            sources[0] = Source(f"{sources[0].name} {name}", 1.0, sources[0].files + files, key)
        else:
            sources.append(Source(name, weight or 1.0, files, key))
    return sources
