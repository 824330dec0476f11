"""Where corpus.py's documents come from: files of text, JSON lines and parquet, on this machine or
on the Hugging Face hub. This is no script.

A file goes through memory in blocks of about a megabyte, so its size does not matter. Each block
holds whole documents. One process cuts the blocks, in order, which is cheap. The others turn them
into documents and tokens.
"""

import contextlib
import hashlib
import json
import os
import signal
import sys
import threading
import time
from bisect import bisect_right
from collections import Counter, deque
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from itertools import accumulate, islice
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from data.tokenizer import (HoldsSeparator, document_bytes, encode_document, has_borders,
                            split_documents, tokenizer)
from nanoosp.files import OPENERS, READ_ERRORS, decoded, named, opened, read_text, require

TABLES = (".parquet", ".jsonl")  # kinds of files that hold a document a row
NOT_TEXT = (".json", ".ndjson", ".csv", ".tsv")  # text among other things: refused
ENDINGS = (*TABLES, ".txt", ".md", ".py")
GROWTH = {".gz": 3.5, ".xz": 4, ".parquet": 1.8}  # bytes of text in a byte of file, roughly
LINE = b"\n<|endoftext|>"  # begins a line between two documents of a text file
BLOCK = 2**20  # bytes read at a time; no document of a text file is much longer than twice that
ROWS = 256  # of a parquet file read at a time: about as much text
SAMPLES = 8  # files of a source that are looked at to estimate its tokens
ATTEMPTS = 5  # at each download


# Files, here and on the hub


class File(NamedTuple):
    name: str  # in its folder or repository
    size: int
    path: Path | None = None  # None while it is only on the hub
    repo: str = ""
    revision: str = ""
    found: bool = False  # in a folder, not named by the user: it may be left out


def text_size(file: File) -> int:
    """About how many bytes of text a file holds."""
    return int(file.size * GROWTH.get(Path(file.name).suffix.lower(), 1))


def has_ending(name: str, endings) -> bool:
    """Has a file's name one of these endings, also in capitals? Behind all but .parquet, .gz or .xz
    may follow."""
    compressed = [e + packing for e in endings if e != ".parquet" for packing in OPENERS]
    return name.lower().endswith(tuple(e.lower() for e in (*endings, *compressed)))


def describe_left_out(names) -> str:
    """Files by their endings: "120 files: 80 .c, 30 .h, 10 others"."""
    common = Counter(filter(None, (Path(name).suffix for name in names))).most_common(8)
    others = len(names) - sum(n for _, n in common)
    listed = [f"{n:,} {ending}" for ending, n in common]
    listed += [f"{others:,} other{'s' * (others != 1)}"] if others else []
    return f"{len(names):,} file{'s' * (len(names) != 1)}: {', '.join(listed)}"


def files_in(root: Path) -> tuple[list[Path], list[str], list[str]]:
    """(the files of a folder and its subfolders, by name; the folders that are links; what is
    hidden, as .git and .venv are). Links are followed, but no folder is read twice: so a link to a
    folder above makes no circle. What is hidden is not read."""
    files, links, hidden, seen = [], [], [], set()

    def enter(folder: Path):
        if (real := folder.resolve()) in seen:
            return
        seen.add(real)
        for path in sorted(folder.iterdir()):
            if path.name.startswith("."):
                hidden.append(path.relative_to(root).as_posix())
            elif path.is_dir():
                if path.is_symlink():
                    links.append(path.relative_to(root).as_posix())
                enter(path)
            elif path.is_file():
                files.append(path)

    enter(root)
    return sorted(files, key=lambda path: path.parts), links, hidden


def some(names: list[str]) -> str:
    """"3: a, b, c", and of many the first few."""
    return f"{len(names):,}: {', '.join(names[:5])}" + ", ..." * (len(names) > 5)


def local_files(name: str, endings=ENDINGS) -> tuple[list[File], list[str]]:
    """(the file of this name or, by name, the files of this folder and its subfolders; lines on what
    was left out, and which links were followed). Raises ValueError if there is nothing to read."""
    root = Path(name)
    is_folder = root.is_dir()
    if not root.exists():
        raise FileNotFoundError(f"{name}: no such file or folder")
    paths, links, hidden = files_in(root) if is_folder else ([root], [], [])
    names = [path.relative_to(root).as_posix() if is_folder else path.name for path in paths]
    files = [File(name, path.stat().st_size, path, found=is_folder)
             for name, path in zip(names, paths) if has_ending(name, endings)]
    if not files:
        found = describe_left_out(names) if names else "nothing"
        what = f"holds {found}; none ends in" if is_folder else "ends in none of"
        raise ValueError(f"{name} {what} {' '.join(endings)} (--endings reads others as text; .gz "
                         "or .xz may follow)")
    others = [name for name in names if not has_ending(name, endings)]
    notes = [f"left out {describe_left_out(others)}"] if others else []
    notes += [f"left out what is hidden, {some(hidden)}"] if hidden else []
    notes += [f"followed links to folders, {some(links)}"] if links else []
    return files, notes


def with_retries(function, target: str):
    """function(), called again after network errors. Raises ConnectionError after the last."""
    for attempt in range(ATTEMPTS):
        try:
            return function()
        except Exception as error:  # every library in between has its own network errors
            reason = f"{type(error).__name__}: {(str(error).strip().splitlines() or ['?'])[0]}"
            response = getattr(error, "response", None)
            if getattr(response, "status_code", 0) in (401, 403, 404):
                hint = "there is no such dataset, or it wants a login: hf auth login"
                break
            hint = "the same command tries again"
            time.sleep(2**attempt if attempt < ATTEMPTS - 1 else 0)
    raise ConnectionError(f"{target} could not be fetched ({reason}); {hint}")


def hub_files(name: str, revision: str | None) -> tuple[list[File], list[str]]:
    """(the files of NAME or NAME:FOLDER on the hub, a line on those that are not read, if any).
    revision: None means the newest one. Raises ValueError if there is nothing to read."""
    hub = require("huggingface_hub", "--hub")
    repo, _, folder = name.partition(":")
    query = dict(revision=revision, files_metadata=True)
    info = with_retries(lambda: hub.HfApi().dataset_info(repo, **query), repo)
    listed = sorted((f.rfilename, f.size) for f in info.siblings)
    start = f"{folder.rstrip('/')}/" if folder else ""
    files = [File(n, size, None, repo, info.sha) for n, size in listed
             if n.startswith(start) and has_ending(n, TABLES)]
    if not files:
        folders = sorted({n.rpartition("/")[0] for n, _ in listed if has_ending(n, TABLES)})
        raise ValueError(f"{name}: no parquet or jsonl files there; folders of {repo} with such "
                         f"files: {folders[:20]}")
    others = [n for n, _ in listed if n.startswith(start) and not has_ending(n, TABLES)]
    return files, [f"left out {describe_left_out(others)}"] if others else []


def download(repo: str, name: str, revision: str, folder: Path | None = None) -> Path:
    """Download a file of a dataset on the hub, into `folder` or else into huggingface_hub's cache.
    The library gives it another name until it is whole. Raises ConnectionError if it cannot be
    fetched, ImportError without huggingface_hub."""
    hub = require("huggingface_hub", "--hub")
    where = dict(repo_type="dataset", revision=revision, local_dir=folder)
    path = with_retries(lambda: hub.hf_hub_download(repo, name, **where), f"{repo}/{name}")
    return Path(path)


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
    if has_ending(path.name, [".parquet"]):
        parquet = require("pyarrow.parquet", path.name)
        with parquet.ParquetFile(path, buffer_size=BLOCK, pre_buffer=False) as file:
            schema = file.schema_arrow
            if key not in schema.names:
                raise ValueError(f"it has no column {key!r} but {schema.names}: data/corpus.py "
                                 "--key NAME reads another one")
            if str(schema.field(key).type) not in ("string", "large_string"):
                raise ValueError(f"its column {key!r} is {schema.field(key).type}, not text")
            row = 1
            for batch in file.iter_batches(ROWS, columns=[key]):
                yield row, batch.column(0)
                row += len(batch)
        return
    text = not has_ending(path.name, TABLES)
    rest, offset = b"", 0 if text else 1
    with opened(path) as file:
        while data := file.read(BLOCK):
            rest += data
            if cut := end_of_documents(rest) if text else rest.rfind(b"\n") + 1:
                yield offset, rest[:cut]
                offset += cut if text else rest.count(b"\n", 0, cut)
                rest = rest[cut:]
    if rest:
        yield offset, rest


def first_block(file: File, key: str):
    """What read_blocks yields first: (offset, block, how many of the file's bytes that is)."""
    offset, block = next(read_blocks(file.path, key))
    if has_ending(file.name, [".parquet"]):
        rows = require("pyarrow.parquet", file.name).read_metadata(file.path).num_rows
        return offset, block, file.size * len(block) / rows
    with open(file.path, "rb") as packed:
        text = OPENERS.get(file.path.suffix.lower(), lambda file: file)(packed).read(BLOCK)
        return offset, block, packed.tell() * len(block) / len(text)


def documents(name: str, offset: int, block, key: str) -> list[str]:
    """The documents of a block. Raises ValueError with the line or byte that cannot be read."""
    if not isinstance(block, bytes):
        return [text for text in block.to_pylist() if text and not text.isspace()]
    if not has_ending(name, TABLES):
        return split_documents(decoded(block, offset))
    texts = []
    for number, line in enumerate(block.split(b"\n"), offset):
        if line.strip():
            try:
                text = json.loads(line)[key]
            except (ValueError, TypeError, KeyError, RecursionError) as error:
                raise ValueError(f"line {number}: no JSON object with the key {key!r} "
                                 f"({error})") from error
            if not isinstance(text, str | None):  # null is no document, as in parquet
                raise ValueError(f"line {number}: {key!r} is {type(text).__name__}, not text")
            texts += [text] if text and not text.isspace() else []
    return texts


def read_documents(path: Path) -> tuple[list[str], bool]:
    """(the documents of a file, whether anything separates them), for a file that fits in memory. A
    text without border lines is one document, as it stands. Raises OSError, ValueError, and
    ImportError for a .parquet without pyarrow."""
    if has_ending(path.name, NOT_TEXT):
        raise ValueError(f"{path} is neither plain text nor {' or '.join(TABLES)}: write its "
                         'documents to a .jsonl file, an object {"text": ...} a line')
    if not has_ending(path.name, TABLES):
        text = read_text(path)
        return (split_documents(text), True) if has_borders(text) else ([text], False)
    with named(path):
        blocks = [documents(path.name, *found, "text") for found in read_blocks(path, "text")]
    return [text for block in blocks for text in block], True


# Workers: a block in, its documents' tokens out


def start_worker(tokenizer_name: str, text_key: str):
    global encoding, key
    encoding, key = tokenizer(tokenizer_name), text_key
    if parent := parent_process():
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent to handle
        # A worker ends with its parent, even if that is killed
        threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def encode_block(name: str, offset: int, block) -> list[tuple[np.ndarray, int] | None]:
    """(uint16 separator and tokens, document_bytes) of each document; None for one that holds what
    separates documents."""
    result = []
    for text in documents(name, offset, block, key):
        try:
            ids = encode_document(encoding, text).astype(np.uint16)
            result.append((ids, document_bytes(text)))
        except HoldsSeparator:
            result.append(None)
    return result


def worker_pool(processes: int, *args):
    return ProcessPoolExecutor(processes, get_context("spawn"), start_worker, args)


# Sources: documents in order, tokenized ahead


class Source:
    """The documents of some files, one after the other, and how far they have been taken."""

    def __init__(self, name: str, weight: float, files: list[File], key: str, ends=()):
        """ends: of several sources put together, the number of files up to the end of each."""
        self.name, self.weight, self.files, self.key = name, weight, files, key
        self.ends, sizes = ends or [len(files)], [0, *accumulate(map(text_size, files))]
        self.shares = [sizes[end] / max(sizes[-1], 1) for end in self.ends]
        # What the manifest keeps. The position of the next document is file, block of the file,
        # document of the block. Where something was left out, "left_out" says how much.
        self.state = {"name": name, "position": [0, 0, 0], "documents": 0, "tokens": 0}

    def fingerprint(self) -> str:
        """Of what its files hold, for another file may have the same date and length. A revision of
        the hub is a hash already. What cannot be read is told in its turn."""
        def content(file):
            sha256 = hashlib.sha256(file.revision.encode())
            with contextlib.suppress(OSError, TypeError), open(file.path, "rb") as stream:
                while data := stream.read(BLOCK):
                    sha256.update(data)
            return file.name, sha256.hexdigest()

        with ThreadPoolExecutor() as pool:
            bar = dict(total=len(self.files), disable=None, leave=False)
            listing = repr([*tqdm(pool.map(content, self.files), f"look at {self.name}", **bar)])
        listing += repr(self.ends) * (len(self.ends) > 1)
        return hashlib.sha256(listing.encode()).hexdigest()

    def start(self, pool, ahead: int, downloads: Path):
        """Begin at the position, with `ahead` blocks being tokenized in advance."""
        self.blocks, self.ahead, self.pending = self.read(pool, downloads), ahead, deque()
        self.ready, self.skip, self.given_up = iter(()), self.state["position"][2], None

    def estimate(self, pool, rough: float) -> float:
        """About how many tokens its files have. The first blocks of some files are tokenized for
        that; where none can be, as on the hub, a byte of text makes `rough` tokens."""
        tokens = n_bytes = 0
        local = [file for file in self.files if file.path]
        for file in local[:: -(-len(local) // SAMPLES) or 1]:
            with contextlib.suppress(*READ_ERRORS, StopIteration):
                offset, block, size = first_block(file, self.key)
                found = pool.submit(encode_block, file.name, offset, block).result()
                tokens += sum(len(document[0]) for document in found if document)
                n_bytes += size
        if not n_bytes:
            return rough * sum(map(text_size, self.files))
        return tokens / n_bytes * sum(file.size for file in self.files)

    def read(self, pool, downloads: Path):
        """Yield (file number, block number, future of encode_block) from the position on."""
        first_file, first_block, _ = self.state["position"]
        for f, file in list(enumerate(self.files))[first_file:]:
            path = file.path or download(file.repo, file.name, file.revision,
                                         downloads / file.repo.replace("/", "--"))
            try:
                for b, (offset, block) in enumerate(read_blocks(path, self.key)):
                    if f == self.given_up:
                        break
                    if f > first_file or b >= first_block:
                        yield f, b, pool.submit(encode_block, file.name, offset, block)
            except READ_ERRORS as error:
                failure = Future()  # its turn comes after those of the blocks before it
                reason = f"cannot be read: {error or 'it ends too early'}"
                failure.set_exception(ValueError(reason))
                yield f, -1, failure
            if file.path is None:
                path.unlink()

    def take(self) -> tuple[np.ndarray, int] | None:
        """(tokens, document_bytes) of the next document; None after the last one. Raises ValueError
        for a file that cannot be read, unless it was only found in a folder: that is left out from
        there on."""
        while True:
            for document in self.ready:
                self.state["position"][2] += 1
                if document is None:
                    in_file = self.path(self.state["position"][0])
                    self.leave_out("documents with the character NUL left out", f"in {in_file}")
                    continue
                self.state["documents"] += 1
                self.state["tokens"] += len(document[0])
                return document
            self.pending.extend(islice(self.blocks, self.ahead - len(self.pending)))
            if not self.pending:
                return None
            f, b, block = self.pending.popleft()
            if f == self.given_up:
                continue
            try:
                block = block.result()
            except ValueError as error:
                reason = f"{self.path(f)}: {error}"
                if not self.files[f].found:
                    raise ValueError(reason) from error
                self.leave_out("files read only up to an error", reason)
                self.given_up, self.state["position"], self.skip = f, [f + 1, 0, 0], 0
                continue
            self.ready, self.state["position"] = iter(block[self.skip :]), [f, b, self.skip]
            self.skip = 0

    def path(self, f: int) -> str:
        return str(self.files[f].path or self.files[f].name)

    def share(self) -> float:
        """Of sources put together: the part of all their text that is read once the current one
        ends. 1 for a single source."""
        return self.shares[bisect_right(self.ends, self.state["position"][0])]

    def leave_out(self, what: str, first: str):
        """Count one more of `what`. Of the first one the manifest keeps what is told here."""
        n, first = self.state.setdefault("left_out", {}).get(what, [0, first])
        self.state["left_out"][what] = [n + 1, first]

    def left_out(self) -> list[str]:
        """A line for each kind of thing that was left out."""
        return [f"{self.name}: {n:,} {what}; the first: {first}"
                for what, (n, first) in self.state.get("left_out", {}).items()]


def open_sources(specs, key: str, revisions: dict, endings=ENDINGS) -> list[Source]:
    """The sources of (name, weight or None, whether it is on the hub); without weights, one that is
    put together from all. `revisions` pins datasets of the hub; those that it lacks are added."""
    sources = []
    for name, weight, on_hub in specs:
        files, notes = (hub_files(name, revisions.get(name)) if on_hub
                        else local_files(name, endings))
        for note in notes:
            print(f"{name}: {note}", file=sys.stderr)
        if on_hub:
            revisions[name] = files[0].revision
        sources.append(Source(name, weight or 1.0, files, key))
    if len(sources) > 1 and specs[0][1] is None:
        name, files = " ".join(s.name for s in sources), [f for s in sources for f in s.files]
        ends = [*accumulate(len(s.files) for s in sources)]
        sources = [Source(name, 1.0, files, key, ends)]
    return sources
