"""Any amount of text in, token shards out. It can be stopped and continued at any time. For one
text that fits in memory there is prepare.py.

    python data/corpus.py --text books/ more.jsonl.gz --out DIR     files and folders, in this order
    python data/corpus.py --text web/=0.7 code/=0.3 --out DIR       70 % of the tokens from web/
    python data/corpus.py --hub HuggingFaceFW/fineweb-edu:sample/10BT --out DIR     downloaded

It reads .parquet and .jsonl, with a document a row, and .txt, .md and .py, where lines that read
<|endoftext|> separate documents; --endings .c .h reads text files with these endings instead. All
but parquet may be compressed, as .gz or .xz. A text of more than 1 MiB without such lines is cut,
at a line break if there is one. Links to folders are followed. Other files of a folder, and all
that is hidden, as .git is, are left out and counted at the start; a file that cannot be read is
left out from the error on, and counted at the end.

Of each source, the first of every --val-every documents becomes validation text, until there are
--val-tokens of it. A mixture takes its next document from the source that is furthest behind its
weight, counted in tokens. Without weights, sources are read one after the other, and each may
fill its share of --val-tokens, in proportion to its size. The result depends on the sources alone:
the same command makes the same bytes, for any number of processes and after any interruption.

DIR/manifest.json says how much is done. It is written every few seconds, after the tokens that it
counts. Later tokens are cut off when the work continues. So nothing is lost or repeated, however a
process ends (Ctrl-C, kill -9, a full disk): repeat the command, and it goes on. meta.json comes
last. Without it, train.py refuses the folder as unfinished.
"""

import argparse
import contextlib
import decimal
import hashlib
import json
import math
import os
import shutil
import signal
import sys
import time
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # to run from any directory

import numpy as np
from tqdm import tqdm

from data.dataset import HEADER, TOKENIZER_JSON, open_shard, write_meta, write_shard
from data.prepare import SHARD_TOKENS
from data.sources import ENDINGS, Source, open_sources, worker_pool
from data.tokenizer import tokenizer_for_shards
from nanoosp.files import whole, write_text
from nanoosp.options import command, fail, flag, option, parse

try:
    import fcntl  # not on Windows
except ImportError:
    fcntl = None

# Options that a corpus keeps until it is finished
FIXED = ("key", "shard_tokens", "val_every", "val_tokens", "tokenizer")
CORES = os.cpu_count() or 1
COMMIT_SECONDS = 5  # between two manifests: the work that a kill -9 costs


# The directory: shards, and a manifest that is never ahead of them


class Split:
    """The tokens of a split: finished shards, then the next shard's tokens in a .part file, then
    tokens that are not written yet."""

    def __init__(self, name: str, out: Path, shard_tokens: int):
        self.name, self.out, self.shard_tokens, self.pending = name, out, shard_tokens, []
        self.state = {"documents": 0, "tokens": 0, "bytes": 0, "in_part": 0, "shards": []}

    def part(self) -> Path:
        return self.out / f"{self.name}_{len(self.state['shards']):06d}.part"

    def go_back_to(self, state: dict):
        """Cut what is on the disk to what the manifest counts. The rest will be made again."""
        self.state = state
        sizes = {self.out / shard["name"]: HEADER * 4 + shard["tokens"] * 2
                 for shard in state["shards"]}
        if state["in_part"]:
            sizes[self.part()] = state["in_part"] * 2
        for path, size in sizes.items():
            if not path.exists() or path.stat().st_size < size:
                raise ValueError(f"{path} is missing or damaged: remove {self.out} and begin again")
            os.truncate(path, size)
        for path in set(self.out.glob(f"{self.name}_*.part")) - sizes.keys():
            path.unlink()

    def add(self, tokens: np.ndarray, n_bytes: int):
        self.pending.append(tokens)
        for name, n in (("documents", 1), ("tokens", len(tokens)), ("bytes", n_bytes)):
            self.state[name] += n

    def write(self, finish: bool):
        """Write what is pending. finish: this ends the last shard, even if it is short."""
        tokens, self.pending = np.concatenate([np.empty(0, np.uint16), *self.pending]), []
        while len(tokens) or (finish and self.state["in_part"]):
            fitting, tokens = np.split(tokens, [self.shard_tokens - self.state["in_part"]])
            with open(self.part(), "ab") as file:
                file.write(fitting.tobytes())
            self.state["in_part"] += len(fitting)
            if self.state["in_part"] == self.shard_tokens or (finish and not len(tokens)):
                path = self.part().with_suffix(".bin")
                with whole(path) as temporary:
                    write_shard(temporary, np.memmap(self.part(), np.uint16, "r"))
                sha256 = hashlib.sha256(np.memmap(path, np.uint8, "r")).hexdigest()
                shard = dict(name=path.name, tokens=self.state["in_part"], sha256=sha256)
                self.state["shards"].append(shard)
                self.state["in_part"] = 0


def commit(out: Path, manifest: dict, splits: list[Split], finish=False):
    """Write first the tokens, then the manifest that counts them. Then remove .part files that are
    in a shard now."""
    for split in splits:
        split.write(finish)
    manifest = manifest | {"splits": {split.name: split.state for split in splits}}
    write_text(out / "manifest.json", json.dumps(manifest, indent=1) + "\n")
    for path in set(out.glob("*.part")) - {split.part() for split in splits}:
        path.unlink()


def read_manifest(out: Path) -> dict | None:
    """The content of manifest.json; None if there is none. Raises ValueError for one that commit()
    cannot have written."""
    path = out / "manifest.json"
    if not path.exists():
        return None
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        begun_with = manifest["begun_with"]
        counts = [len(source["name"]) for source in manifest["sources"]]
        for source, (_, _) in zip(manifest["sources"], begun_with["sources"], strict=True):
            file, block, document = source["position"]
            counts += [file, block, document, source["documents"], source["tokens"]]
            counts += [n for n, _ in source.get("left_out", {}).values()]
        for name in ("train", "val"):
            split = manifest["splits"][name]
            counts += [split[n] for n in ("documents", "tokens", "bytes", "in_part")]
            counts += [shard["tokens"] for shard in split["shards"]]
            names = [f"{name}_{i:06d}.bin" for i in range(len(split["shards"]))]
            if [shard["name"] for shard in split["shards"]] != names:  # files that will be cut
                raise ValueError
        if not (all(type(n) is int and n >= 0 for n in counts)
                and isinstance(manifest["revisions"], dict) and set(FIXED) <= begun_with.keys()):
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
    downloads = sum(max((file.size for file in source.files if file.path is None), default=0)
                    for source in sources)
    # A shard is written while its .part file still exists
    need = 2 * tokens + 4 * min(shard_tokens, tokens) + downloads
    free = shutil.disk_usage(out).free
    if need > free:
        raise OSError(f"{out} needs about {size(need)}, but {size(free)} are free there: use "
                      "--max-tokens or another --out")


@contextlib.contextmanager
def locked(out: Path):
    """Lets only one process at a time write to `out`. If that fails before the first token is
    written, nothing of it stays. Raises FileExistsError and BlockingIOError."""
    if out.exists() and not out.is_dir():
        raise FileExistsError(f"{out} is a file; name another place with --out")
    new_folders = [folder for folder in (out, *out.parents) if not os.path.lexists(folder)]
    out.mkdir(parents=True, exist_ok=True)
    handle = os.open(out, os.O_RDONLY) if fcntl else None
    try:
        if fcntl:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(handle)
        raise BlockingIOError(f"{out}: another process is writing there") from error
    was_empty = not any(out.iterdir())  # then all that will be in it is ours
    try:
        yield
    finally:
        with contextlib.suppress(OSError, ValueError):  # show the error that led here instead
            if was_empty and not n_written(out):
                for path in list(out.iterdir()):
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
                for folder in new_folders:
                    folder.rmdir()
        if fcntl:
            os.close(handle)


def mix(sources: list[Source], train: Split, val: Split, opt, bar):
    """Deal the documents out to the splits. Yields after each, when all counts are right."""
    left = list(sources)
    while left and train.state["tokens"] < opt.max_tokens:
        source = min(left, key=lambda s: s.state["tokens"] / s.weight)  # the first of equals
        number, document = source.state["documents"], source.take()
        if document is not None:
            for_val = (number % opt.val_every == 0
                       and val.state["tokens"] < opt.val_tokens * source.share())
            (val if for_val else train).add(*document)
            bar.update(len(document[0]))
            yield
            continue
        left.remove(source)
        if not source.state["documents"]:
            raise ValueError("; ".join([f"{source.name}: no documents in it", *source.left_out()]))
        if left:
            n = source.state["tokens"]
            bar.write(f"{source.name} ran out after {n:,} tokens; the others go on", sys.stderr)


def build(out: Path, specs: list[tuple], opt) -> dict:
    """Write or continue the dataset directory `out`. Returns its meta.json. Raises OSError and
    ValueError, each with one line. What the manifest counts is never lost."""
    with locked(out):  # first of all: without it, another process may change what is read here
        if (out / "meta.json").exists():
            raise FileExistsError(f"{out} is finished; remove it, or name another place with --out")
        old = read_manifest(out)
        if old is None and any(out.iterdir()):
            raise FileExistsError(f"{out} exists and is no unfinished corpus; remove it, or name "
                                  "another --out")
        revisions = old["revisions"] if old else {}
        sources = open_sources(specs, opt.key, revisions, opt.endings or ENDINGS)
        encoding = tokenizer_for_shards(opt.tokenizer)
        begun_with = {name: getattr(opt, name) for name in FIXED}
        begun_with["tokenizer"] = encoding.name
        if encoding.name == TOKENIZER_JSON:  # its content counts, not its place
            content = encoding.text + "".join(f" {i}" for i in encoding.beginning)
            begun_with["tokenizer"] = hashlib.sha256(content.encode()).hexdigest()
        begun_with["sources"] = [[source.weight, source.fingerprint()] for source in sources]
        if old:
            check_begun_with(out, old, begun_with)
        splits = [Split(name, out, opt.shard_tokens) for name in ("train", "val")]
        if old:
            for split in splits:
                split.go_back_to(old["splits"][split.name])
            for source, state in zip(sources, old["sources"]):
                source.state = state
        manifest = dict(begun_with=begun_with, revisions=revisions,
                        sources=[source.state for source in sources])
        try:
            return convert(out, encoding, sources, splits, manifest, opt)
        except BrokenProcessPool as error:
            raise OSError(f"a process was killed (out of memory?){advice(out)}") from error
        except OSError as error:  # for a full disk, Python does not name the file
            nameless = error.errno and not error.filename
            reason = f"{out}: {error.strerror}" if nameless else error
            raise OSError(f"{reason}{advice(out)}") from error
        except ValueError as error:
            again = "; put that right, and begin again in a new --out" if n_written(out) else ""
            raise ValueError(f"{error}{again}") from error


def advice(out: Path) -> str:
    return "; what is done is kept, and the same command continues" if n_written(out) else ""


def check_begun_with(out: Path, old: dict, begun_with: dict):
    """Raise ValueError if this command is not the one that began `out`."""
    for name, value in begun_with.items():
        before, difference = old["begun_with"][name], f"another {flag(name)}"
        if before == value:
            continue
        if name == "sources":
            difference, names = "other files or weights", [s["name"] for s in old["sources"]]
            before = " ".join(f"{n}={weight}" for n, (weight, _) in zip(names, before))
        elif name == "tokenizer" and len(str(before)) == 64:  # a sha256
            before = f"a {TOKENIZER_JSON} with other contents"
        raise ValueError(f"{out} was begun with {difference}: {before}; use that again, or remove "
                         f"{out} (an older version may have begun it: that cannot be continued)")


def convert(out: Path, encoding, sources: list[Source], splits: list[Split], manifest: dict,
            opt) -> dict:
    """Go from where the sources and splits are to the end. Returns meta.json."""
    done = sum(split.state["tokens"] for split in splits)
    processes = min(opt.processes, CORES)  # more would only take memory
    pool = worker_pool(processes, opt.tokenizer, opt.key)
    bar = tqdm(initial=done, unit=" tokens", unit_scale=True, disable=None, leave=False)
    try:
        rough = 1 if opt.tokenizer == "bytes" else 0.25  # tokens in a byte
        estimate = min(sum(source.estimate(pool, rough) for source in sources),
                       opt.max_tokens + opt.val_tokens)
        check_disk(out, sources, max(estimate - done, 0), opt.shard_tokens)
        commit(out, manifest, splits)
        bar.total = int(estimate)
        for source in sources:
            source.start(pool, 2 * processes + 2, out / "download")
        committed = time.monotonic()
        for _ in mix(sources, *splits, opt, bar):
            if time.monotonic() - committed > COMMIT_SECONDS:
                commit(out, manifest, splits)
                committed = time.monotonic()
        for split in splits:
            if split.state["tokens"] < 100:
                raise ValueError(f"too little text: {split.state['tokens']} {split.name} tokens "
                                 f"(--val-every {opt.val_every}); for a single short text use "
                                 "data/prepare.py")
        commit(out, manifest, splits, finish=True)
    finally:
        bar.close()
        pool.shutdown(cancel_futures=True)
    for source in sources:
        for line in source.left_out():
            print(line, file=sys.stderr)

    for path in out.glob("*.bin"):
        open_shard(path)  # raises if it is not whole
    shutil.rmtree(out / "download", ignore_errors=True)
    shards = [shard["sha256"] for split in splits for shard in split.state["shards"]]
    tokens = {split.name: split.state["tokens"] for split in splits}
    n_bytes = {split.name: split.state["bytes"] for split in splits}
    source = hashlib.sha256("".join(shards).encode()).hexdigest()
    return write_meta(out, encoding, tokens, n_bytes, source)


# The command line


def count(text: str) -> int:
    """A positive whole number, also as 100e9."""
    with contextlib.suppress(ValueError, decimal.InvalidOperation):
        number = decimal.Decimal(text)  # unlike a float, exact
        if 1 <= number < 2**63 and number == int(number):
            return int(number)
    raise argparse.ArgumentTypeError(f"{text!r} must be a positive whole number, like 100e9, below "
                                     "2^63")


def parse_spec(text: str, on_hub: bool) -> tuple[str, float | None, bool]:
    """(name, weight, on_hub) of NAME or NAME=WEIGHT. Ends the program for an impossible weight."""
    name, equals, weight = text.rpartition("=")
    if not equals or Path(text).exists():
        return text, None, on_hub
    if not name:
        fail(f"{text}: there is no name before the weight")
    with contextlib.suppress(ValueError):
        if 0 < float(weight) < math.inf:
            return name, float(weight), on_hub
    fail(f"{text}: the weight {weight!r} is no positive number")


@dataclass
class Options:
    text: str = option(None, "files to read, or folders to read with all their subfolders. A "
                       "weight is a source's share of the tokens; they need not sum to 1. Without "
                       "weights, one is read after the other", many=True, metavar="PATH[=WEIGHT]")
    hub: str = option(None, "datasets of the Hugging Face hub to read, or one folder of each, "
                      "weighted in the same way", many=True, metavar="NAME[:FOLDER][=WEIGHT]")
    endings: str = option(None, "read only files whose names end so, instead of the default; all "
                          f"but .parquet and .jsonl are text (default: {' '.join(ENDINGS)})",
                          many=True, metavar=".ENDING")
    out: Path = option(None, "where to write, or to continue", metavar="DIR", required=True)
    tokenizer: str = option("r50k_base", "'r50k_base' (GPT-2's; the default), 'bytes', or the path "
                            "of a Hugging Face tokenizer.json", metavar="NAME")
    key: str = option("text", "the key, in JSON lines, or column, in parquet, that holds the text "
                      "(default: text)", metavar="NAME")
    max_tokens: count = option(2**63, "stop after the document with which there are N training "
                               "tokens, as 100e9 (default: read everything)", high=2**64,
                               metavar="N")
    val_every: count = option(100, "take the first of every N documents for validation instead of "
                              "training (default: 100)", high=2**64, metavar="N")
    val_tokens: count = option(10_000_000, "stop doing so when there are N validation tokens; all "
                               "later documents train (default: 10e6)", high=2**64, metavar="N")
    shard_tokens: count = option(SHARD_TOKENS, "tokens in a file of the dataset, 2 bytes each "
                                 "(default: 100e6)", high=2**31, metavar="N")
    processes: count = option(CORES, "how many processes tokenize at the same time, at most one "
                              "per core; the result is the same for any (default: one per core)",
                              high=2**64, metavar="N")


@command
def main(argv=None):
    opt = parse(Options, __doc__, argv)
    specs = [parse_spec(text, False) for text in opt.text or []]
    specs += [parse_spec(name, True) for name in opt.hub or []]
    if not specs:
        fail("name what to read, with --text or --hub")
    if opt.endings and not opt.text:
        fail("--endings is for --text: of the hub, parquet and JSON lines are read")
    for ending in opt.endings or []:
        if len(ending) < 2 or not ending.startswith("."):
            fail(f"--endings {ending}: an ending begins with a dot, like .c")
    if len({weight is None for _, weight, _ in specs}) > 1:
        fail("give every source a weight (NAME=0.7), or none")
    previous = signal.signal(signal.SIGTERM, signal.default_int_handler)  # stop as at Ctrl-C
    try:
        meta = build(opt.out, specs, opt)
    except KeyboardInterrupt:
        sys.exit("interrupted; the same command continues")
    finally:
        signal.signal(signal.SIGTERM, previous)
    print(f"{opt.out}: {meta['tokens']['train']:,} training and {meta['tokens']['val']:,} "
          f"validation tokens of {meta['tokenizer']!r}")
    print(f"train on it: python train.py --osp --data {opt.out}")


if __name__ == "__main__":
    main()
