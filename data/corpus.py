"""Any amount of text in, token shards out, by any number of processes, stopped and continued at any time. For one text
that fits in memory: prepare.py.

    python data/corpus.py --text books/ more.jsonl.gz --out DIR         files and folders, one after the other
    python data/corpus.py --text web/=0.7 code/=0.3 --out DIR           mixed: 70 % of the tokens from web/
    python data/corpus.py --hub HuggingFaceFW/fineweb-edu:sample/10BT --out DIR      downloaded file by file

Reads .parquet and .jsonl(.gz), a document a row, and .txt, .md, .py, where lines that read <|endoftext|> separate
documents. A text of more than 1 MiB without such lines is cut, at a line break if there is one.

Of each source the first of every --val-every documents becomes validation text, until there are --val-tokens of it.
A mixture takes the next document from the source that lags its weight the most, counted in tokens. All this depends on
the sources alone, not on the number of processes or on interruptions: the same command makes the same bytes.

DIR/manifest.json says how far the work has come. It is written every few seconds, after the tokens that it counts;
later ones are cut off when the work continues. So nothing is lost or repeated, however a process ends (Ctrl-C, kill -9,
a full disk): the same command goes on. meta.json comes last; without it train.py refuses the folder as unfinished.
"""

import argparse
import contextlib
import hashlib
import json
import math
import os
import shutil
import signal
import sys
import time
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # so that it runs as a script from any directory

import numpy as np
from tqdm import tqdm

from nanoosp.cli import Parser, run, write_whole
from data.prepare import SHARD_TOKENS
from data.sources import Source, open_sources, worker_pool
from data.dataset import (
    HEADER,
    TOKENIZER_JSON,
    open_shard,
    read_tokenizer_json,
    tokenizer_for_shards,
    write_meta,
    write_shard,
)

try:
    import fcntl  # not on Windows
except ImportError:
    fcntl = None

GROWTH = {".gz": 3.5, ".parquet": 1.8}  # bytes of text a byte of file: rough, for disk check and progress bar only
FIXED = ("key", "shard_tokens", "val_every", "val_tokens", "tokenizer")  # options that a corpus keeps until its end
COMMIT_SECONDS = 5  # between two manifests: the work that a kill -9 costs


# ---------------------------------------------------------------------------------------------------------------------
# The directory: shards, and a manifest that is never ahead of them


class Split:
    """The tokens of a split: finished shards, the next one's tokens in a .part file, and some not written yet."""

    def __init__(self, name: str, out: Path, shard_tokens: int):
        self.name, self.out, self.shard_tokens, self.pending = name, out, shard_tokens, []
        self.state = {"documents": 0, "tokens": 0, "bytes": 0, "in_part": 0, "shards": []}

    def part(self) -> Path:
        return self.out / f"{self.name}_{len(self.state['shards']):06d}.part"

    def go_back_to(self, state: dict):
        """To what the manifest knows of. What is on the disk beyond that will be made again."""
        self.state = state
        sizes = {self.out / shard["name"]: HEADER * 4 + shard["tokens"] * 2 for shard in state["shards"]}
        for path, size in [*sizes.items(), *([(self.part(), state["in_part"] * 2)] if state["in_part"] else [])]:
            if not path.exists() or path.stat().st_size < size:
                raise ValueError(f"{path} is missing or damaged: remove {self.out} and begin again")
            os.truncate(path, size)
        for path in set(self.out.glob(f"{self.name}_*.part")) - ({self.part()} if state["in_part"] else set()):
            path.unlink()

    def add(self, tokens: np.ndarray, n_bytes: int):
        self.pending.append(tokens)
        for name, n in (("documents", 1), ("tokens", len(tokens)), ("bytes", n_bytes)):
            self.state[name] += n

    def write(self, finish: bool):
        """Write what is pending; `finish` also ends the last shard."""
        tokens, self.pending = np.concatenate([np.empty(0, np.uint16), *self.pending]), []
        while len(tokens) or (finish and self.state["in_part"]):
            now, tokens = np.split(tokens, [self.shard_tokens - self.state["in_part"]])
            with open(self.part(), "ab") as file:
                file.write(now.tobytes())
            self.state["in_part"] += len(now)
            if self.state["in_part"] == self.shard_tokens or (finish and not len(tokens)):
                path = self.part().with_suffix(".bin")
                write_shard(path.with_suffix(".tmp"), np.memmap(self.part(), np.uint16, "r"))
                os.replace(path.with_suffix(".tmp"), path)
                sha256 = hashlib.sha256(np.memmap(path, np.uint8, "r")).hexdigest()
                self.state["shards"].append({"name": path.name, "tokens": self.state["in_part"], "sha256": sha256})
                self.state["in_part"] = 0


def commit(out: Path, manifest: dict, splits: list[Split], finish=False):
    """First the tokens, then the manifest that counts them, then away with what is no longer needed."""
    for split in splits:
        split.write(finish)
    manifest = manifest | {"splits": {split.name: split.state for split in splits}}
    write_whole(out / "manifest.json", json.dumps(manifest, indent=1) + "\n")
    for path in set(out.glob("*.part")) - {split.part() for split in splits}:
        path.unlink()


def read_manifest(out: Path) -> dict | None:
    """What is in manifest.json; None if there is none. Raises ValueError for one that commit() cannot have written."""
    path = out / "manifest.json"
    if not path.exists():
        return None
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        counts, begun_with = [], manifest["begun_with"]
        for source, (_, _) in zip(manifest["sources"], begun_with["sources"], strict=True):
            file, block, document = source["position"]
            counts += [file, block, document, source["documents"], source["tokens"], len(source["name"])]
        for name in ("train", "val"):
            split = manifest["splits"][name]
            counts += [split[n] for n in ("documents", "tokens", "bytes", "in_part")]
            counts += [shard["tokens"] for shard in split["shards"]]
            names = [f"{name}_{i:06d}.bin" for i in range(len(split["shards"]))]
            if [shard["name"] for shard in split["shards"]] != names:  # files of these names will be cut to their size
                raise ValueError
        sensible = all(type(n) is int and n >= 0 for n in counts) and isinstance(manifest["revisions"], dict)
        if not sensible or not set(FIXED) <= begun_with.keys():
            raise ValueError
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path} is damaged: remove {out} and begin again") from error
    return manifest


def n_written(out: Path) -> int:
    """Tokens that the manifest counts; 0 if there is none."""
    manifest = read_manifest(out)
    return sum(split["tokens"] for split in manifest["splits"].values()) if manifest else 0


def size(n: float) -> str:
    return f"{n / 1e9:.1f} GB" if n >= 1e9 else f"{n / 1e6:.2f} MB"


def check_disk(out: Path, sources: list[Source], tokens: float, shard_tokens: int):
    """Raises OSError if the disk is too small for `tokens` more tokens."""
    downloads = sum(max((f.size for f in source.files if f.path is None), default=0) for source in sources)
    need = 2 * tokens + 4 * min(shard_tokens, tokens) + downloads  # a shard is written while its .part still exists
    free = shutil.disk_usage(next(p for p in (out, *out.absolute().parents) if p.exists())).free
    if need > free:
        raise OSError(f"{out} needs about {size(need)}, {size(free)} are free there: use --max-tokens or another --out")


@contextlib.contextmanager
def locked(out: Path):
    """Only one process at a time writes to `out`, and where it fails before the first token, nothing of it stays.

    Raises FileExistsError and BlockingIOError.
    """
    if out.exists() and not out.is_dir():
        raise FileExistsError(f"{out} is a file; name another place with --out")
    made = [folder for folder in (out, *out.parents) if not os.path.lexists(folder)]
    out.mkdir(parents=True, exist_ok=True)
    handle = os.open(out, os.O_RDONLY) if fcntl else None
    try:
        if fcntl:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(handle)
        raise BlockingIOError(f"{out}: another process is writing there") from error
    empty = not any(out.iterdir())  # then all that will be in it is ours
    try:
        yield
    finally:
        with contextlib.suppress(OSError, ValueError):  # the error that led here counts, not that of tidying up
            if empty and not n_written(out):
                for path in list(out.iterdir()):
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
                for folder in made:
                    folder.rmdir()
        if fcntl:
            os.close(handle)


def mix(sources: list[Source], train: Split, val: Split, opt, bar):
    """Deal the documents out to the splits; yields after each, when everything is consistent."""
    left = list(sources)
    while left and train.state["tokens"] < opt.max_tokens:
        source = min(left, key=lambda s: s.state["tokens"] / s.weight)  # the first of equals
        for_val = source.state["documents"] % opt.val_every == 0 and val.state["tokens"] < opt.val_tokens
        document = source.take()
        if document is not None:
            (val if for_val else train).add(*document)
            bar.update(len(document[0]))
            yield
            continue
        left.remove(source)
        if not source.state["documents"]:
            raise ValueError(f"{source.name}: no documents in it")
        if left:
            bar.write(f"{source.name} ran out after {source.state['tokens']:,} tokens; the others go on", sys.stderr)


def build(out: Path, specs: list[tuple], opt) -> dict:
    """Write or continue the dataset directory `out`. Returns its meta.json.

    Raises OSError and ValueError, each with one line a person can act on; what the manifest counts is never lost.
    """
    with locked(out):  # first of all: what is read without the lock, another process may change
        if (out / "meta.json").exists():
            raise FileExistsError(f"{out} is finished; remove it, or name another place with --out")
        old = read_manifest(out)
        if old is None and any(out.iterdir()):
            raise FileExistsError(f"{out} exists and is no unfinished corpus; remove it, or name another --out")
        encoding, revisions = tokenizer_for_shards(opt.tokenizer), old["revisions"] if old else {}
        sources = open_sources(specs, opt.key, revisions)
        begun_with = {name: getattr(opt, name) for name in FIXED}
        begun_with["tokenizer"] = encoding.name
        if encoding.name == TOKENIZER_JSON:  # of a file, what is in it counts
            begun_with["tokenizer"] = hashlib.sha256(read_tokenizer_json(opt.tokenizer).encode()).hexdigest()
        begun_with["sources"] = [[source.weight, source.fingerprint()] for source in sources]
        if old:
            check_begun_with(out, old, begun_with)
        splits = [Split(name, out, opt.shard_tokens) for name in ("train", "val")]
        if old:
            for split in splits:
                split.go_back_to(old["splits"][split.name])
            for source, state in zip(sources, old["sources"]):
                source.state = state
        manifest = {"begun_with": begun_with, "revisions": revisions, "sources": [s.state for s in sources]}
        try:
            return fill(out, encoding, sources, splits, manifest, opt)
        except BrokenProcessPool as error:
            raise OSError(f"a process was killed (out of memory?){kept(out)}") from error
        except OSError as error:  # of a full disk, Python does not say where it is
            what = f"{out}: {error.strerror}" if error.errno and not error.filename else error
            raise OSError(f"{what}{kept(out)}") from error
        except ValueError as error:
            again = "; put that right, and begin again in a new --out" if n_written(out) else ""
            raise ValueError(f"{error}{again}") from error


def kept(out: Path) -> str:
    return "; what is done is kept, and the same command continues" if n_written(out) else ""


def check_begun_with(out: Path, old: dict, begun_with: dict):
    """Raise ValueError if this command is not the one that began `out`."""
    for name, value in begun_with.items():
        before, what = old["begun_with"][name], f"another --{name.replace('_', '-')}"
        if before != value:
            if name == "sources":
                what = "other files or weights"
                before = " ".join(f"{s['name']}={weight}" for s, (weight, _) in zip(old["sources"], before))
            elif name == "tokenizer" and len(str(before)) == 64:  # its sha256
                before = f"a {TOKENIZER_JSON} with other contents"
            raise ValueError(f"{out} was begun with {what}: {before}; use that again, or remove {out}")


def fill(out: Path, encoding, sources: list[Source], splits: list[Split], manifest: dict, opt) -> dict:
    """From wherever the sources and splits are, to the end. Returns meta.json."""
    text = sum(f.size * GROWTH.get(Path(f.name).suffix, 1) for source in sources for f in source.files)
    estimate = min(text / (1 if opt.tokenizer == "bytes" else 4), opt.max_tokens + opt.val_tokens)
    done = sum(split.state["tokens"] for split in splits)
    check_disk(out, sources, max(estimate - done, 0), opt.shard_tokens)
    commit(out, manifest, splits)
    pool = worker_pool(opt.processes, opt.tokenizer, opt.key)
    bar = tqdm(total=int(estimate), initial=done, unit=" tokens", unit_scale=True, disable=None, leave=False)
    try:
        for source in sources:
            source.start(pool, 2 * opt.processes + 2, out / "download")
        committed = time.monotonic()
        for _ in mix(sources, *splits, opt, bar):
            if time.monotonic() - committed > COMMIT_SECONDS:
                commit(out, manifest, splits)
                committed = time.monotonic()
        for split in splits:
            if split.state["tokens"] < 100:
                raise ValueError(f"too little text: {split.state['tokens']} {split.name} tokens (--val-every "
                                 f"{opt.val_every}); for a single short text use data/prepare.py")
        commit(out, manifest, splits, finish=True)
    finally:
        bar.close()
        pool.shutdown(cancel_futures=True)

    for path in out.glob("*.bin"):
        open_shard(path)  # raises if it is not whole
    shutil.rmtree(out / "download", ignore_errors=True)
    shards = [shard["sha256"] for split in splits for shard in split.state["shards"]]
    tokens = {split.name: split.state["tokens"] for split in splits}
    n_bytes = {split.name: split.state["bytes"] for split in splits}
    source = hashlib.sha256("".join(shards).encode()).hexdigest()
    return write_meta(out, opt.tokenizer, encoding, tokens, n_bytes, source)


# ---------------------------------------------------------------------------------------------------------------------
# The command line


def count(text: str) -> int:
    """A positive whole number, also as 100e9."""
    try:
        if 1 <= float(text) < 2**63:
            return int(float(text))
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"{text!r} must be a positive whole number, like 100e9")


def parse_spec(text: str, on_hub: bool) -> tuple[str, float | None, bool]:
    """NAME or NAME=WEIGHT. Raises ValueError."""
    name, equals, weight = text.rpartition("=")
    if not equals or Path(text).exists():
        return text, None, on_hub
    try:
        if 0 < float(weight) < math.inf:
            return name, float(weight), on_hub
    except ValueError:
        pass
    raise ValueError(f"{text}: the weight {weight!r} is no positive number")


def build_parser() -> Parser:
    p = Parser(__doc__)
    add = p.add_argument
    add("--text", nargs="+", default=[], metavar="PATH[=WEIGHT]",
        help="files to read, or folders to read with all their subfolders; a weight is a source's share of the tokens, "
        "of which all need not sum to 1. Without weights, one is read after the other")
    add("--hub", nargs="+", default=[], metavar="NAME[:FOLDER][=WEIGHT]",
        help="datasets of the Hugging Face hub to read, or one folder of each, weighted in the same way")
    add("--out", type=Path, required=True, metavar="DIR", help="where to write, or to continue")
    add("--tokenizer", default="r50k_base", metavar="NAME",
        help="'r50k_base' (GPT-2; the default), 'bytes', or the path of a Hugging Face tokenizer.json")
    add("--key", default="text", metavar="NAME",
        help="the key, in JSON lines, or column, in parquet, that holds the text (default: text)")
    add("--max-tokens", type=count, default=2**63, metavar="N",
        help="stop after the document with which there are N training tokens, as 100e9 (default: read everything)")
    add("--val-every", type=count, default=100, metavar="N",
        help="take the first of every N documents for validation instead of training (default: 100)")
    add("--val-tokens", type=count, default=10_000_000, metavar="N",
        help="stop doing so when there are N validation tokens; all later documents train (default: 10e6)")
    add("--shard-tokens", type=count, default=SHARD_TOKENS, metavar="N",
        help="tokens in a file of the dataset, 2 bytes each (default: 100e6)")
    add("--processes", type=count, default=os.cpu_count(), metavar="N",
        help="how many processes tokenize at the same time; the result is the same for any (default: one a core)")
    return p


def main(argv=None):
    parser = build_parser()
    opt = parser.parse(argv)
    try:
        specs = [parse_spec(s, False) for s in opt.text] + [parse_spec(s, True) for s in opt.hub]
    except ValueError as error:
        parser.error(str(error))
    if not specs:
        parser.error("name what to read, with --text or --hub")
    if len({weight is None for _, weight, _ in specs}) > 1:
        parser.error("give every source a weight (NAME=0.7), or none")
    previous = signal.signal(signal.SIGTERM, signal.default_int_handler)  # stop as at Ctrl-C
    try:
        meta = build(opt.out, specs, opt)
    except (OSError, ValueError, ImportError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("interrupted; the same command continues")
    finally:
        signal.signal(signal.SIGTERM, previous)
    tokens = meta["tokens"]
    print(f"{opt.out}: {tokens['train']:,} training and {tokens['val']:,} validation tokens of {meta['tokenizer']!r}")
    print(f"train on it: python train.py --osp --data {opt.out}")


if __name__ == "__main__":
    run(main)
