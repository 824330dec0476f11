"""Where corpus.py's documents come from: files of text, JSON lines and parquet, on this machine or
on the Hugging Face hub. This is no script.

A file goes through memory in blocks of about a megabyte, so its size does not matter. Each block
holds whole documents. One process cuts the blocks, in order, which is cheap. The others turn them
into documents and tokens.
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

from data.tokenizer import encode, separator, tokenizer
from nanoosp.files import require

KINDS = (".parquet", ".jsonl", ".jsonl.gz", ".txt", ".md", ".py")
LINE = b"\n<|endoftext|>"  # begins a line between two documents of a text file
BLOCK = 2**20  # bytes read at a time; no document of a text file is much longer than twice that
ROWS = 256  # of a parquet file read at a time: about as much text
ATTEMPTS = 5  # at each download


# Files, here and on the hub


class File(NamedTuple):
    name: str  # in its folder or repository
    size: int
    path: Path | None = None  # None while it is only on the hub
    repo: str = ""
    revision: str = ""


def local_files(name: str) -> list[File]:
    """The file of this name or, by name, the files of this folder and its subfolders. Raises
    ValueError if none of them can be read."""
    root = Path(name)
    is_folder = root.is_dir()
    paths = sorted(root.rglob("*"), key=lambda path: path.parts) if is_folder else [root]
    paths = [path for path in paths if path.name.endswith(KINDS) and path.is_file()]
    if not paths:
        raise ValueError(f"{name}: no {', '.join(KINDS)} file" + ("s in it" if is_folder else ""))
    names = [path.relative_to(root).as_posix() if is_folder else path.name for path in paths]
    return [File(name, path.stat().st_size, path) for name, path in zip(names, paths)]


def with_retries(function, target: str):
    """function(), called again after network errors. Raises ConnectionError after the last."""
    for attempt in range(ATTEMPTS):
        try:
            return function()
        except Exception as error:  # every library in between has its own network errors
            reason = f"{type(error).__name__}: {(str(error).strip().splitlines() or ['?'])[0]}"
            response = getattr(error, "response", None)
            if getattr(response, "status_code", 0) in (401, 403, 404):
                break  # there is no such dataset, or no permission to read it
            time.sleep(2**attempt if attempt < ATTEMPTS - 1 else 0)
    raise ConnectionError(f"{target} could not be fetched ({reason}); the same command tries again")


def hub_files(name: str, revision: str | None) -> list[File]:
    """The files of NAME or NAME:FOLDER on the hub. revision: None means the newest one."""
    hub = require("huggingface_hub", "--hub")
    repo, _, folder = name.partition(":")
    query = dict(revision=revision, files_metadata=True)
    info = with_retries(lambda: hub.HfApi().dataset_info(repo, **query), repo)
    listed = sorted((f.rfilename, f.size) for f in info.siblings if f.rfilename.endswith(KINDS[:3]))
    start = f"{folder.rstrip('/')}/" if folder else ""
    files = [File(n, size, None, repo, info.sha) for n, size in listed if n.startswith(start)]
    if not files:
        folders = sorted({n.rpartition("/")[0] for n, _ in listed})
        raise ValueError(f"{name}: no parquet or jsonl files there; folders of {repo} with such "
                         f"files: {folders[:20]}")
    return files


def download(repo: str, name: str, revision: str, folder: Path | None = None) -> Path:
    """Download a file of a dataset on the hub, into `folder` or else into huggingface_hub's cache.
    The file has another name until it is whole.

    Raises ConnectionError if it cannot be fetched, ImportError without huggingface_hub.
    """
    hub = require("huggingface_hub", "--hub")
    where = dict(repo_type="dataset", revision=revision, local_dir=folder)
    path = with_retries(lambda: hub.hf_hub_download(repo, name, **where), f"{repo}/{name}")
    return Path(path)


def fetch(file: File, folder: Path) -> Path:
    """Download a file of the hub into `folder`."""
    path = download(file.repo, file.name, file.revision, folder / file.repo.replace("/", "--"))
    if path.stat().st_size != file.size:
        path.unlink()
        raise ConnectionError(f"{file.repo}/{file.name} came with the wrong size; the same command "
                              "tries again")
    return path


# Blocks: one process reads each file once, and hands it on in pieces of whole documents


def end_of_documents(data: bytes) -> int:
    """Where to cut `data`: where its last separator line begins. Without one 0, which means to read
    on, unless the document grows too long."""
    at = last_line = data.rfind(b"\n") + 1  # what follows may be half a separator
    while (at := data.rfind(LINE, 0, at)) >= 0:
        behind = at + len(LINE)
        if not data[behind : data.find(b"\n", behind)].strip():  # a word behind it makes it text
            return at + 1
    if len(data) <= BLOCK:
        return 0
    if cut := last_line or data.rfind(b" ") + 1:
        return cut
    # There is neither a line break nor a blank: cut where the last UTF-8 character begins
    return next(i for i in range(len(data) - 1, -1, -1) if data[i] & 0xC0 != 0x80)


def read_blocks(path: Path, key: str):
    """Yield (offset, block): text as bytes and the number of its first byte, or JSON lines or
    parquet rows and the number of the first."""
    if path.name.endswith(".parquet"):
        parquet = require("pyarrow.parquet", path.name)
        with parquet.ParquetFile(path, buffer_size=BLOCK, pre_buffer=False) as file:
            schema = file.schema_arrow
            if key not in schema.names:
                raise ValueError(f"it has no column {key!r} but {schema.names}: name one with "
                                 "--key")
            if str(schema.field(key).type) not in ("string", "large_string"):
                raise ValueError(f"its column {key!r} is {schema.field(key).type}, not text")
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
    """The documents of a block. Raises ValueError with the line or byte that cannot be read."""
    if not isinstance(block, bytes):
        return [text for text in block.to_pylist() if text and not text.isspace()]
    if not name.endswith((".jsonl", ".jsonl.gz")):
        try:
            # Some editors put a mark in front of a text
            text = block.decode("utf-8-sig" if offset == 0 else "utf-8")
        except UnicodeDecodeError as error:
            byte = offset + error.start
            raise ValueError(f"not UTF-8 text (byte {byte} cannot be read)") from error
        # This finds what prepare.py's pattern finds. It begins with fixed characters: twice as fast
        parts = re.split(r"\n<\|endoftext\|>[^\S\n]*(?=\n|\Z)", "\n" + text)
        return [part.strip() for part in parts if part.strip()]
    texts = []
    for number, line in enumerate(block.split(b"\n"), offset):
        if line.strip():
            try:
                text = json.loads(line)[key]
            except (ValueError, TypeError, KeyError, RecursionError) as error:
                raise ValueError(f"line {number}: no JSON object with the key {key!r} "
                                 f"({error})") from error
            if not isinstance(text, str):
                raise ValueError(f"line {number}: {key!r} is {type(text).__name__}, not text")
            texts += [text] if text and not text.isspace() else []
    return texts


# Workers: a block in, its documents' tokens out


def start_worker(tokenizer_name: str, text_key: str):
    global encoding, key
    encoding, key = tokenizer(tokenizer_name), text_key
    if parent := parent_process():
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent to handle
        # A worker ends with its parent, even if that is killed
        threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


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


# Sources: documents in order, tokenized ahead


class Source:
    """The documents of some files, one after the other, and how far they have been taken."""

    def __init__(self, name: str, weight: float, files: list[File], key: str):
        self.name, self.weight, self.files, self.key = name, weight, files, key
        # What the manifest keeps. The position of the next document is file, block of the file,
        # document of the block.
        self.state = {"name": name, "position": [0, 0, 0], "documents": 0, "tokens": 0}

    def fingerprint(self) -> str:
        listing = repr([(file.name, file.size, file.revision) for file in self.files])
        return hashlib.sha256(listing.encode()).hexdigest()

    def start(self, pool, ahead: int, downloads: Path):
        """Begin at the position, with `ahead` blocks being tokenized in advance."""
        self.blocks, self.ahead, self.pending = self.read(pool, downloads), ahead, deque()
        self.ready, self.skip = iter(()), self.state["position"][2]

    def read(self, pool, downloads: Path):
        """Yield (file number, block number, future of encode_block) from the position on."""
        first_file, first_block, _ = self.state["position"]
        for f, file in list(enumerate(self.files))[first_file:]:
            path = file.path or fetch(file, downloads)
            try:
                for b, (offset, block) in enumerate(read_blocks(path, self.key)):
                    if f > first_file or b >= first_block:
                        yield f, b, pool.submit(encode_block, file.name, offset, block)
            except (OSError, EOFError, ValueError, zlib.error) as error:
                reason = error if str(error) else "it ends too early"
                raise ValueError(f"{path} cannot be read: {reason}") from error
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
                path = self.files[f].path or self.files[f].name
                raise ValueError(f"{path}, {error}") from error
            self.ready, self.state["position"] = iter(block[self.skip :]), [f, b, self.skip]
            self.skip = 0
        self.state["position"][2] += 1
        self.state["documents"] += 1
        self.state["tokens"] += len(document[0])
        return document


def open_sources(specs, key: str, revisions: dict) -> list[Source]:
    """The sources of (name, weight or None, whether it is on the hub). `revisions` pins datasets of
    the hub; those that it lacks are added."""
    sources = []
    for name, weight, on_hub in specs:
        files = hub_files(name, revisions.get(name)) if on_hub else local_files(name)
        if on_hub:
            revisions[name] = files[0].revision
        if weight is None and sources:  # without weights, all are one source
            all_names = f"{sources[0].name} {name}"
            sources[0] = Source(all_names, 1.0, sources[0].files + files, key)
        else:
            sources.append(Source(name, weight or 1.0, files, key))
    return sources
