"""data/corpus.py: what is in the shards, token by token; that no end of a process loses or repeats
any; its errors."""

import gzip
import hashlib
import json
import lzma
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tiktoken

from data import corpus, sources
from data.prepare import divide
from data.dataset import Dataset, open_shard
from data.tokenizer import split_documents, tokenizer

CORPUS = Path(corpus.__file__)
rng = random.Random(0)


@pytest.fixture(autouse=True)
def threads(monkeypatch):
    """Workers as threads: nothing to start. Tests of processes run the script itself."""
    def pool(processes, *args):
        return ThreadPoolExecutor(processes, initializer=sources.start_worker, initargs=args)

    monkeypatch.setattr(corpus, "worker_pool", pool)
    monkeypatch.setattr(sources.time, "sleep", lambda seconds: None)


def made_up(n, word="abc", longest=60):
    return [f"{word} {i} é\n" + word * rng.randint(1, longest) for i in range(n)]


def write_text(path, texts):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n<|endoftext|>\n".join(texts), encoding="utf-8")
    return path


def write_parquet(path, texts, column="text", rows=7):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.table({"id": list(range(len(texts))), column: texts})
    pq.write_table(table, path, row_group_size=rows)


def run(*argv, tok="bytes"):
    corpus.main([str(a) for a in argv] + ["--tokenizer", tok])


def read(out, split):
    """All documents of a split, decoded from its shards."""
    shards = sorted(out.glob(f"{split}_*.bin"))
    tokens = np.concatenate([open_shard(p) for p in shards])
    assert tokens[0] == 0
    return bytes(tokens[1:].astype(np.uint8)).decode().split("\0")


def contents(out):
    return {p.name: p.read_bytes() for p in out.iterdir()}


@pytest.fixture
def fails(capfd):
    def check(argv, *words, code=1):
        with pytest.raises(SystemExit) as error:
            run(*argv)
        message = error.value.code if isinstance(error.value.code, str) else capfd.readouterr().err
        assert (1 if isinstance(error.value.code, str) else error.value.code) == code
        line = message.strip().splitlines()[-1]
        assert "error: " in line and all(word in line for word in words), line
        if isinstance(error.value.code, str):
            assert "\n" not in message

    return check


# What is in the shards


def test_a_parquet_folder_comes_back_token_by_token(tmp_path):
    texts = made_up(50)
    write_parquet(tmp_path / "in/a.parquet", [*texts[:20], None, "", " \n"])
    write_parquet(tmp_path / "in/deeper/b.parquet", texts[20:])
    (tmp_path / "in/readme.pdf").write_bytes(b"not read")
    options = ["--val-every", 10, "--shard-tokens", 500]
    run("--text", tmp_path / "in", "--out", tmp_path / "out", *options)
    assert read(tmp_path / "out", "val") == texts[::10]
    assert read(tmp_path / "out", "train") == [t for i, t in enumerate(texts) if i % 10]
    sizes = [len(open_shard(p)) for p in sorted((tmp_path / "out").glob("train_*.bin"))]
    assert len(sizes) > 3 and set(sizes[:-1]) == {500} and 0 < sizes[-1] <= 500
    meta = json.loads((tmp_path / "out/meta.json").read_text())
    assert meta["bytes"]["val"] == sum(len(t.encode()) + 1 for t in texts[::10])
    assert meta["tokens"]["val"] == meta["bytes"]["val"]
    assert meta["tokens"]["train"] == sum(sizes)
    assert meta["bytes_per_token"] == meta["bytes"]["val"] / meta["tokens"]["val"]
    assert Dataset(tmp_path / "out", "train", 16).n_windows  # what train.py does with it


def test_all_kinds_of_files_give_the_same_documents(tmp_path):
    texts = made_up(30)
    lines = "".join(json.dumps({"text": t, "n": 1}) + "\n" for t in texts)
    write_text(tmp_path / "a.txt", texts)
    write_parquet(tmp_path / "a.parquet", texts)
    (tmp_path / "a.jsonl").write_text(lines.replace("\n", '\n\n{"text": null}\n', 1))  # no documents
    with gzip.open(tmp_path / "a.jsonl.gz", "wt") as file:
        file.write(lines)
    write_parquet(tmp_path / "a.PARQUET", texts)
    for kind in ("txt", "parquet", "jsonl", "jsonl.gz", "PARQUET"):
        run("--text", tmp_path / f"a.{kind}", "--out", tmp_path / kind, "--val-every", 10)
        for split in ("train", "val"):
            assert read(tmp_path / kind, split) == read(tmp_path / "txt", split)
        assert sources.read_documents(tmp_path / f"a.{kind}") == (texts, True)
    assert read(tmp_path / "txt", "val") == texts[::10]


@pytest.fixture
def bpe(monkeypatch):
    """A byte-pair encoding with GPT-2's pattern, under GPT-2's name: nothing to download."""
    ranks = {bytes([i]): i for i in range(256)} | {b"or": 256, b" w": 257, b" wor": 258, b"  ": 259}
    pattern = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
    encoding = tiktoken.Encoding("r50k_base", pat_str=pattern, mergeable_ranks=ranks,
                                 special_tokens={"<|endoftext|>": 300})
    monkeypatch.setattr(corpus, "tokenizer_for_shards", lambda name: encoding)
    monkeypatch.setattr(sources, "tokenizer", lambda name: encoding)
    return encoding


def test_the_ids_are_tiktokens(tmp_path, bpe):
    texts = [f"words {i} <|endoftext|> within a line is text like any other" for i in range(60)]
    write_text(tmp_path / "a.txt", texts)
    options = ["--out", tmp_path / "out", "--val-every", 20]
    run("--text", tmp_path / "a.txt", *options, tok="r50k_base")
    train = [t for i, t in enumerate(texts) if i % 20]
    for split, part in (("val", texts[::20]), ("train", train)):
        expected = [i for t in part for i in [300, *bpe.encode_ordinary(t)]]
        assert open_shard(tmp_path / f"out/{split}_000000.bin").tolist() == expected


def n_tokens(texts):
    """As bytes, each after a separator."""
    return sum(1 + len(text.encode()) for text in texts)


def deal(documents, weights, val_every):
    """Brute force: the mixture's rule on lists. Returns (train, val) documents."""
    taken, numbers, train, val = [0] * len(weights), [0] * len(weights), [], []
    while any(documents):
        lag = [taken[s] / weights[s] if documents[s] else float("inf") for s in range(len(weights))]
        s = lag.index(min(lag))
        text = documents[s].pop(0)
        (train if numbers[s] % val_every else val).append(text)
        taken[s] += 1 + len(text.encode())
        numbers[s] += 1
    return train, val


def test_a_weighted_mixture_of_two_folders_token_by_token(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sources, "BLOCK", 300)  # many blocks a file
    monkeypatch.setattr(sources, "ROWS", 3)
    web = [t.strip() for t in made_up(150, "web")]
    code = [t.strip() for t in made_up(90, "code", 20)]
    write_parquet(tmp_path / "web/0.parquet", web[:100])
    write_text(tmp_path / "web/1.txt", web[100:])
    write_text(tmp_path / "code/0.txt", code)
    specs = [f"{tmp_path}/web=0.7", f"{tmp_path}/code=0.3"]
    run("--text", *specs, "--out", tmp_path / "out", "--val-every", 9, "--processes", 2)
    train, val = deal([list(web), list(code)], [0.7, 0.3], 9)
    assert read(tmp_path / "out", "train") == train and read(tmp_path / "out", "val") == val
    assert sorted(train + val) == sorted(web + code) and not set(train) & set(val)
    assert "code ran out" in capsys.readouterr().err

    run("--text", *specs, "--out", tmp_path / "part", "--val-every", 9, "--max-tokens", "4e3")
    stopped = read(tmp_path / "part", "train")
    assert stopped == train[: len(stopped)]
    assert n_tokens(stopped[:-1]) < 4000 <= n_tokens(stopped)
    manifest = json.loads((tmp_path / "part/manifest.json").read_text())
    taken = [source["tokens"] for source in manifest["sources"]]
    assert abs(taken[0] / sum(taken) - 0.7) < 0.03


def test_without_weights_sources_follow_one_another(tmp_path):
    a, b = made_up(12), made_up(12, "xyz")
    paths = [write_text(tmp_path / "b.txt", a), write_text(tmp_path / "a.txt", b)]
    run("--text", *paths, "--out", tmp_path / "out", "--val-every", 8)
    assert read(tmp_path / "out", "train") == [t for i, t in enumerate(a + b) if i % 8]


def test_validation_text_ends_at_its_limit_and_begins_with_the_first_document(tmp_path):
    texts = made_up(40)
    path = write_text(tmp_path / "a.txt", texts)
    run("--text", path, "--out", tmp_path / "out", "--val-every", 2, "--val-tokens", 300)
    val = read(tmp_path / "out", "val")
    assert val == texts[: 2 * len(val) : 2]
    assert n_tokens(val[:-1]) < 300 <= n_tokens(val)
    assert read(tmp_path / "out", "train") == [t for t in texts if t not in val]


def test_blocks_of_any_size_give_the_documents_of_prepare(tmp_path, monkeypatch):
    pieces = ["<|endoftext|>", "<|endoftext|> \r", " <|endoftext|>", "<|endoftext|>x", "é", "",
              "ab c", "\u4e2d"]
    for trial in range(200):
        text = "\n".join(rng.choices(pieces, k=rng.randint(1, 40))) + rng.choice(["", "\n"])
        (tmp_path / "a.txt").write_bytes(text.encode())
        parts = re.split(r"(?m)^<\|endoftext\|>\s*$", text)
        expected = [part.strip() for part in parts if part.strip()]
        longest = max(len(part.encode()) for part in parts) + 20
        for size in (longest, longest + trial % 7, 2**20):
            monkeypatch.setattr(sources, "BLOCK", size)
            blocks = list(sources.read_blocks(tmp_path / "a.txt", "text"))
            found = [sources.documents("a.txt", *block, "text") for block in blocks]
            assert sum(found, []) == expected
    assert divide(split_documents("a\n<|endoftext|>\nb")) == (["a"], ["b"])


@pytest.mark.parametrize("unit", ["line of text\n", "word ", "\u4e2d", "x"])
def test_a_huge_text_without_separators_streams_and_loses_nothing(tmp_path, unit):
    (tmp_path / "a.txt").write_text(unit * (10_000_000 // len(unit.encode())), encoding="utf-8")
    rest, longest, n = 0, 0, 0
    for offset, block in sources.read_blocks(tmp_path / "a.txt", "text"):
        assert offset == rest
        rest, longest, n = rest + len(block), max(longest, len(block)), n + 1
        assert len(sources.documents("a.txt", offset, block, "text")) == 1  # cuts no character
    assert rest == (tmp_path / "a.txt").stat().st_size and longest <= 2 * sources.BLOCK and n >= 5


def test_a_text_that_is_too_much_for_tiktokens_regex_is_encoded_all_the_same(bpe):
    sources.start_worker("r50k_base", "text")
    text = "a" + " " * 1_000_000 + "b \ud800"
    with pytest.raises(ValueError, match="stack"):
        bpe.encode_to_numpy(text[:-1])
    [(tokens, n_bytes)] = sources.encode_block("a.jsonl", 1, json.dumps({"text": text}).encode())
    assert bpe.decode(tokens[1:].tolist()) == text[:-1] + "?" and n_bytes == len(text) + 1


def test_a_tokenizer_file_is_kept_with_the_data(tmp_path, fails):
    tokenizers = pytest.importorskip("tokenizers")
    letters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())  # GPT-2's, one for each byte
    bpe = tokenizers.models.BPE({letter: i for i, letter in enumerate(letters)}, [])
    theirs = tokenizers.Tokenizer(bpe)
    theirs.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    theirs.decoder = tokenizers.decoders.ByteLevel()
    text = theirs.to_str()
    (tmp_path / "tok").mkdir()
    (tmp_path / "tok/tokenizer.json").write_text(text, encoding="utf-8")
    write_text(tmp_path / "a.txt", made_up(20))
    for name, tok in (("out", str(tmp_path / "tok")), ("bytes", "bytes")):
        run("--text", tmp_path / "a.txt", "--out", tmp_path / name, "--val-every", 5, tok=tok)
    assert (tmp_path / "out/tokenizer.json").read_text(encoding="utf-8") == text
    assert json.loads((tmp_path / "out/meta.json").read_text())["tokenizer"] == "tokenizer.json"
    ours, expected = (open_shard(tmp_path / name / "train_000000.bin") for name in ("out", "bytes"))
    encoding = tokenizer(str(tmp_path / "out/tokenizer.json"))  # its ids are in another order
    assert encoding.decode(ours.tolist()) == tokenizer("bytes").decode(expected.tolist())
    (tmp_path / "out/meta.json").unlink()
    options = ["--out", tmp_path / "out", "--val-every", 5]  # but now in bytes
    fails(["--text", tmp_path / "a.txt", *options],
          "another --tokenizer: a tokenizer.json with other contents;")


# Interrupted and continued


@pytest.fixture
def mixture(tmp_path, monkeypatch):
    """(options of a mixture of several files and blocks, what an uninterrupted run writes)."""
    monkeypatch.setattr(sources, "BLOCK", 400)
    write_text(tmp_path / "web/0.txt", made_up(20, "web"))
    lines = [json.dumps({"text": text}) + "\n" for text in made_up(20, "web")]
    (tmp_path / "web/1.jsonl").write_text("".join(lines))
    write_text(tmp_path / "code.txt", made_up(25, "code", 20))
    argv = ["--text", f"{tmp_path}/web=2", f"{tmp_path}/code.txt=1", "--val-every", 6,
            "--shard-tokens", 700]
    run(*argv, "--out", tmp_path / "whole")
    return argv, contents(tmp_path / "whole")


class Crash(BaseException):
    pass


def test_a_crash_at_any_moment_is_continued_to_identical_bytes(mixture, tmp_path, monkeypatch):
    """Crash before each single operation on the disk in turn, and continue until it is done."""
    argv, whole = mixture
    monkeypatch.setattr(corpus, "COMMIT_SECONDS", 0)
    moments = 0

    def before(module, name):
        original = getattr(module, name)

        def operation(*args, **kwargs):
            nonlocal countdown
            countdown -= 1
            if countdown == 0:
                raise Crash
            return original(*args, **kwargs)

        monkeypatch.setattr(module, name, operation)

    countdown = 10**9
    for operation in ((corpus, "write_shard"), (os, "replace"), (Path, "unlink"),
                      (corpus, "write_text")):
        before(*operation)
    for n in (*range(1, 60, 2), 97, 151, 202):
        countdown, out = n, tmp_path / f"out{n}"
        for _ in range(3):  # the second crash comes after the same number of operations
            try:
                run(*argv, "--out", out)
                break
            except Crash:
                moments += 1
                countdown = n
        countdown = 10**9
        if not (out / "meta.json").exists():
            run(*argv, "--out", out)
        assert contents(out) == whole
    assert moments > 60


def script(*argv, commit_seconds=0.0, prelude=""):
    """data/corpus.py as a process of its own, which writes its manifest often."""
    code = f"""
import sys; sys.path.insert(0, {str(CORPUS.parent.parent)!r})
from data import corpus, sources
corpus.COMMIT_SECONDS, sources.BLOCK = {commit_seconds}, 4096
{prelude}
if __name__ == "__main__":
    corpus.main({[str(a) for a in argv] + ["--tokenizer", "bytes"]!r})
"""
    return subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE,
                            stdout=subprocess.PIPE, text=True)


def wait_for_tokens(out, process, n):
    while True:
        assert process.poll() is None, process.stderr.read()
        if (out / "manifest.json").exists():
            splits = json.loads((out / "manifest.json").read_text())["splits"]
            tokens = sum(split["tokens"] for split in splits.values())
            if tokens >= n:
                return tokens
        time.sleep(0.005)


def test_processes_that_are_killed_and_stopped_continue_to_identical_bytes(tmp_path, monkeypatch):
    monkeypatch.undo()  # real sleep
    write_text(tmp_path / "a.txt", made_up(3000))
    argv = ["--text", tmp_path / "a.txt", "--shard-tokens", 40_000]
    command = [sys.executable, CORPUS, *map(str, argv), "--tokenizer", "bytes",
               "--out", tmp_path / "whole"]
    undisturbed = subprocess.Popen([*command, "--processes", "1"], stderr=subprocess.PIPE, text=True)
    out = tmp_path / "out"
    process = script(*argv, "--out", out, "--processes", 2)
    killed_at = wait_for_tokens(out, process, 50_000)
    process.kill()
    process.communicate()  # returns when the workers have ended too, which hold its pipe
    with pytest.raises(ValueError, match="unfinished"):
        Dataset(out, "train", 16)
    process = script(*argv, "--out", out, "--processes", 3)
    stopped_at = wait_for_tokens(out, process, killed_at + 30_000)
    process.terminate()
    _, error = process.communicate()
    assert error.strip() == "interrupted; the same command continues" and process.returncode == 1
    process = script(*argv, "--out", out, "--processes", 1, commit_seconds=5)
    _, error = process.communicate()
    assert process.returncode == 0 and not error
    _, error = undisturbed.communicate()
    assert undisturbed.returncode == 0, error
    assert stopped_at < Dataset(out, "train", 16).n_tokens
    names = {p.name for p in out.iterdir()}
    assert names == {p.name for p in (tmp_path / "whole").iterdir()} and len(names) > 5
    for name in names:
        if name.endswith(".bin"):  # read in other blocks, by another number of processes
            assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_a_full_disk_keeps_what_is_done(mixture, tmp_path, monkeypatch, fails):
    """The limit on file size makes the kernel refuse a write half-way, as a full disk does."""
    argv, whole = mixture
    monkeypatch.setattr(corpus, "COMMIT_SECONDS", 0)
    out, before = tmp_path / "out", resource.getrlimit(resource.RLIMIT_FSIZE)
    previous = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1101, before[1]))
    try:
        fails([*argv, "--out", out], "File too large", "kept", "same command continues")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, previous)
    tokens = json.loads((out / "manifest.json").read_text())["splits"]["train"]["tokens"]
    assert tokens > 300
    run(*argv, "--out", out)
    assert contents(out) == whole


def test_too_small_a_disk_is_noticed_first(mixture, tmp_path, monkeypatch, fails):
    argv, _ = mixture
    monkeypatch.setattr(corpus.shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    fails([*argv, "--out", tmp_path / "out"], "needs about 0.0", " MB, ", "--max-tokens")
    assert not (tmp_path / "out").exists()


def test_another_command_does_not_continue(mixture, tmp_path, monkeypatch, fails):
    argv, whole = mixture
    out = tmp_path / "out"
    shutil.copytree(tmp_path / "whole", out)
    fails([*argv, "--out", out], "is finished")
    (out / "meta.json").unlink()
    fails([*argv[:-1], 800, "--out", out], "--shard-tokens", "700")
    fails([*argv, "--out", out, "--key", "body"], "--key", "text")
    fails([argv[0], argv[1][:-1] + "3", *argv[2:], "--out", out], "other files or weights",
          f"{tmp_path}/web=2.0")
    with corpus.locked(out):
        fails([*argv, "--out", out], "another process")
    (out / "train_000001.bin").write_bytes(b"short")
    fails([*argv, "--out", out], "train_000001.bin", "damaged")
    (out / "train_000001.bin").write_bytes(whole["train_000001.bin"])
    run(*argv, "--out", out)
    assert contents(out) == whole


def test_what_another_process_finishes_meanwhile_is_not_touched(mixture, tmp_path, monkeypatch,
                                                                fails):
    """Two commands begin together; the one that gets the lock late fails, and deletes nothing."""
    argv, whole = mixture
    lock = corpus.locked

    def late(out):
        shutil.copytree(tmp_path / "whole", out)
        return lock(out)

    monkeypatch.setattr(corpus, "locked", late)
    fails([*argv, "--out", tmp_path / "out"], "is finished")
    assert contents(tmp_path / "out") == whole


def test_a_failure_hides_no_error_and_leaves_a_folder_that_was_there(tmp_path, fails):
    (tmp_path / "bad.jsonl").write_text("broken")
    (tmp_path / "there").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "there")
    for out in ("there", "link"):
        fails(["--text", tmp_path / "bad.jsonl", "--out", tmp_path / out], "line 1")
        assert list((tmp_path / "there").iterdir()) == []
    fails(["--text", tmp_path / "bad.jsonl", "--out", tmp_path / "bad.jsonl"], "is a file")
    fails(["--text", tmp_path / "bad.jsonl", "--out", tmp_path / "new/deep/out"], "line 1")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("damage", ["", "{}", "[]", "3", "{", "begun_with", "splits", "sources",
                                    "revisions"])
def test_a_damaged_manifest_is_one_line(mixture, tmp_path, fails, damage):
    argv, _ = mixture
    out = tmp_path / "whole"
    (out / "meta.json").unlink()
    if damage.isalpha():
        manifest = json.loads((out / "manifest.json").read_text())
        damage = json.dumps(manifest | {damage: 5})
    (out / "manifest.json").write_text(damage)
    before = contents(out)
    fails([*argv, "--out", out], "manifest.json is damaged: remove", str(out))
    assert contents(out) == before


def test_a_manifest_cannot_name_files_elsewhere(mixture, tmp_path, fails):
    argv, _ = mixture
    path, mine = tmp_path / "whole/manifest.json", tmp_path / "mine.bin"
    mine.write_bytes(b"x" * 9999)
    (tmp_path / "whole/meta.json").unlink()
    path.write_text(path.read_text().replace("train_000000.bin", "../mine.bin"))
    fails([*argv, "--out", tmp_path / "whole"], "damaged")
    assert mine.stat().st_size == 9999


def test_bad_content_does_not_promise_that_the_same_command_continues(tmp_path, monkeypatch, fails):
    monkeypatch.setattr(corpus, "COMMIT_SECONDS", 0)
    good = write_text(tmp_path / "good.txt", made_up(40))
    (tmp_path / "bad.jsonl").write_text("broken")
    argv = ["--text", good, tmp_path / "bad.jsonl", "--out", tmp_path / "out", "--val-every", 5]
    fails(argv, "bad.jsonl: line 1", "put that right, and begin again in a new --out")
    assert (tmp_path / "out/manifest.json").exists()


def test_a_full_disk_is_named(mixture, tmp_path, monkeypatch, fails):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(corpus, "write_text", full)
    fails([*mixture[0], "--out", tmp_path / "out"], f"{tmp_path}/out: No space left")
    assert not (tmp_path / "out").exists()


# What is left out, and said so


def test_links_to_folders_are_followed_once_and_hidden_ones_left_out_and_both_are_named(tmp_path, capfd):
    """A link to the folder above makes no circle, and one to a folder beside reads nothing twice."""
    texts = {name: made_up(8, word) for name, word in (
        ("in/a.txt", "a"), ("elsewhere/deep/b.txt", "b"), ("in/.git/c.txt", "c"),
        ("in/sub/.venv/lib/d.txt", "d"), ("in/sub/e.txt", "e"))}
    for name, documents in texts.items():
        write_text(tmp_path / name, documents)
    (tmp_path / "in/link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "in/sub/up").symlink_to(tmp_path / "in")
    (tmp_path / "elsewhere/back").symlink_to(tmp_path / "in/sub")
    run("--text", tmp_path / "in", "--out", tmp_path / "out", "--val-every", 4)
    lines = capfd.readouterr().err.splitlines()
    assert f"{tmp_path}/in: left out what is hidden, 2: .git, " in lines[0] and ".venv" in lines[0]
    assert f"{tmp_path}/in: followed links to folders, 3: link, link/back, link/back/up" == lines[1]
    documents = read(tmp_path / "out", "train") + read(tmp_path / "out", "val")
    assert sorted(documents) == sorted([*texts["in/a.txt"], *texts["elsewhere/deep/b.txt"], *texts["in/sub/e.txt"]])


def test_files_of_other_kinds_are_counted_and_can_be_asked_for(tmp_path, capfd, fails):
    texts = {name: made_up(30, word) for name, word in (("a.txt", "t"), ("b.c", "c"), ("b.h", "h"))}
    for name, documents in texts.items():
        write_text(tmp_path / "in" / name, documents)
    for i in range(12):
        (tmp_path / f"in/e{i}.e{i}").write_text("x")
    for name in ("c1.c", "c2.c", "Makefile", "d.jsonl.zst"):
        (tmp_path / "in" / name).write_text("x")
    run("--text", tmp_path / "in", "--out", tmp_path / "out", "--val-every", 4)
    lines = capfd.readouterr().err.splitlines()
    assert f"{tmp_path}/in: left out 18 files: 3 .c, 1 .h, " in lines[0], lines
    assert lines[0].endswith(", 8 others")  # six kinds more than are named, and Makefile
    documents = read(tmp_path / "out", "train") + read(tmp_path / "out", "val")
    assert sorted(documents) == sorted(texts["a.txt"])
    options = ["--val-every", 4, "--endings", ".c", ".h"]
    run("--text", tmp_path / "in", "--out", tmp_path / "c", *options)
    documents = read(tmp_path / "c", "train") + read(tmp_path / "c", "val")
    assert sorted(documents) == sorted([*texts["b.c"], *texts["b.h"], "x", "x"])
    for wrong in ("c", "."):
        fails(["--text", tmp_path / "in", "--out", tmp_path / "o", "--endings", wrong],
              "begins with a dot", code=2)
    fails(["--text", tmp_path / "in", "--out", tmp_path / "o", "--endings", ".f90"],
          "none ends in .f90", "holds 19 files: ")
    fails(["--text", tmp_path / "in/d.jsonl.zst", "--out", tmp_path / "o"], "d.jsonl.zst",
          ".gz or .xz may follow")


def test_compressed_files_give_the_same_documents(tmp_path):
    texts = [text.strip() for text in made_up(30)]
    plain = "\n<|endoftext|>\n".join(texts).encode()
    lines = "".join(json.dumps({"text": t}) + "\n" for t in texts).encode()
    for kind, content in (("txt", plain), ("md", plain), ("py", plain), ("jsonl", lines)):
        (tmp_path / f"a.{kind}.gz").write_bytes(gzip.compress(content))
        (tmp_path / f"a.{kind}.xz").write_bytes(lzma.compress(content))
        for packing in ("gz", "xz"):
            out = tmp_path / f"{kind}-{packing}"
            run("--text", tmp_path / f"a.{kind}.{packing}", "--out", out, "--val-every", 10)
            assert read(out, "val") == texts[::10]
            assert read(out, "train") == [t for i, t in enumerate(texts) if i % 10]


@pytest.fixture
def mixed_folder(tmp_path, monkeypatch):
    """A folder with files that cannot be read, or only in part, and the documents that can."""
    monkeypatch.setattr(sources, "BLOCK", 400)
    texts = [text.strip() for text in made_up(60)]
    folder = tmp_path / "in"
    write_text(folder / "a.txt", texts[:20])
    (folder / "b.py").write_bytes(b"caf\xe9\n" * 300)
    border = b"\n<|endoftext|>\n"
    part = border.join(text.encode() for text in texts[20:30])
    rest = border.join(b"lost" * 20 for _ in range(60))
    (folder / "c.txt").write_bytes(part + border + b"\xff" + b"x" * 900 + border + rest)
    (folder / "d.txt.gz").write_bytes(b"no gzip")
    (folder / "e.parquet").write_bytes(b"PAR1 but not really")
    (folder / "f.jsonl").write_text("broken")
    write_text(folder / "g.txt", texts[30:])
    return folder, texts


def test_a_file_of_a_folder_that_cannot_be_read_does_not_end_the_work(mixed_folder, tmp_path,
                                                                      capfd, fails):
    folder, texts = mixed_folder
    for processes in (1, 3):
        out = tmp_path / f"out{processes}"
        run("--text", folder, "--out", out, "--val-every", 7, "--processes", processes)
        found = read(out, "train") + read(out, "val")
        assert sorted(found) == sorted(texts)
        lines = [line for line in capfd.readouterr().err.splitlines() if "up to an error" in line]
        assert len(lines) == 1
        assert f"{folder}: 5 files read only up to an error; " in lines[0]
        assert f"the first: {folder}/b.py: not UTF-8 text (byte 3 cannot be read)" in lines[0]
    assert contents(tmp_path / "out1") == contents(tmp_path / "out3")
    fails(["--text", folder / "b.py", "--out", tmp_path / "o"], "b.py", "not UTF-8")  # by its name
    only_bad = tmp_path / "bad"
    only_bad.mkdir()
    (only_bad / "b.py").write_bytes(b"caf\xe9")
    fails(["--text", only_bad, "--out", tmp_path / "o"], "no documents", "b.py", "byte 3")


def test_leaving_out_is_continued_to_identical_bytes(mixed_folder, tmp_path, monkeypatch, capfd):
    folder, _ = mixed_folder
    monkeypatch.setattr(corpus, "COMMIT_SECONDS", 0)
    write_text(folder / "h.txt", ["a\0b", "c", "d\0"])
    argv = ["--text", folder, "--val-every", 7, "--out"]
    run(*argv, tmp_path / "whole")
    take, shown = sources.Source.take, capfd.readouterr().err
    assert "2 documents with the character NUL left out; the first: in " in shown
    for n in range(1, 64, 3):
        calls = 0

        def crash(source):
            nonlocal calls
            calls += 1
            if calls == n:
                raise Crash
            return take(source)

        monkeypatch.setattr(sources.Source, "take", crash)
        with pytest.raises(Crash):
            run(*argv, tmp_path / f"out{n}")
        monkeypatch.setattr(sources.Source, "take", take)
        capfd.readouterr()
        run(*argv, tmp_path / f"out{n}")
        assert contents(tmp_path / f"out{n}") == contents(tmp_path / "whole")
        assert capfd.readouterr().err.replace(f"out{n}", "whole") == shown


@pytest.mark.parametrize("kind", ["txt", "jsonl", "parquet"])
def test_a_document_with_a_nul_is_left_out_where_nul_separates(tmp_path, kind, capfd, bpe,
                                                               monkeypatch):
    texts = [text.strip() for text in made_up(30)]
    all_texts = [*texts[:13], "a\0b", *texts[13:]]
    path = tmp_path / f"a.{kind}"
    if kind == "txt":
        write_text(path, all_texts)
    elif kind == "jsonl":
        path.write_text("".join(json.dumps({"text": t}) + "\n" for t in all_texts))
    else:
        write_parquet(path, all_texts)
    options = ["--text", path, "--val-every", 10]
    run(*options, "--out", tmp_path / "gpt2", tok="r50k_base")  # has <|endoftext|>: keeps it
    assert "left out" not in capfd.readouterr().err
    kept = np.concatenate([open_shard(p) for p in (tmp_path / "gpt2").glob("*.bin")])
    assert (kept == 0).sum() == 1
    for module, name in ((corpus, "tokenizer_for_shards"), (sources, "tokenizer")):
        monkeypatch.setattr(module, name, tokenizer)
    run(*options, "--out", tmp_path / "out")
    assert read(tmp_path / "out", "val") == texts[::10]
    assert read(tmp_path / "out", "train") == [t for i, t in enumerate(texts) if i % 10]
    shown = capfd.readouterr().err
    assert "1 documents with the character NUL left out; the first: in " in shown


# Validation text, and what stays as it was


def test_without_weights_validation_text_comes_from_all_sources(tmp_path):
    a, b = made_up(400, "first", 20), made_up(200, "second", 20)
    paths = [write_text(tmp_path / "a.txt", a), write_text(tmp_path / "b.txt", b)]
    options = ["--val-every", 2, "--val-tokens", 3000]
    run("--text", *paths, "--out", tmp_path / "out", *options)
    val, train = read(tmp_path / "out", "val"), read(tmp_path / "out", "train")
    assert [t for t in a + b if t not in val] == train  # still one after the other
    tokens = [n_tokens([t for t in val if t in part]) for part in (a, b)]
    sizes = [path.stat().st_size for path in paths]
    for n, size in zip(tokens, sizes):
        assert abs(n - 3000 * size / sum(sizes)) < 150  # a document more or less
    assert len(set(val)) == len(val) > 20


def made_to_be_published(folder):
    for name, n in (("web", 60), ("code", 40)):
        for part in range(3):
            write_text(folder / f"{name}/{part}.txt", [
                f"{name} {part} {i} é\n" + f"word{i} " * (7 * i % 31) for i in range(n)])
    lines = (json.dumps({"text": f"line {i}\n" + "x" * (i % 17)}) + "\n" for i in range(200))
    (folder / "web/3.jsonl").write_text("".join(lines))


@pytest.mark.parametrize("specs, sha256", [
    (["web/=0.7", "code/=0.3"], "2c126a4032bcb9082f698a912adcb72de34c3b5990493901d25cbf38fa7ed6c7"),
    (["web"], "dbdd8a4dcda385838b3123943b403dcf3afbdec36653569b828d0e4eb9b1ad2c")])
def test_mixtures_and_single_sources_have_the_bytes_of_older_versions(tmp_path, monkeypatch, specs,
                                                                      sha256):
    """The hashes are those of the shards that commit 411e307 makes."""
    monkeypatch.chdir(tmp_path)
    made_to_be_published(tmp_path)
    run("--text", *specs, "--out", "out", "--val-every", 7, "--val-tokens", 900,
        "--shard-tokens", 3000)
    found = hashlib.sha256()
    for name, content in sorted(contents(tmp_path / "out").items()):
        found.update(name.encode() + content if name.endswith(".bin") else b"")
    assert found.hexdigest() == sha256


@pytest.mark.parametrize("kind", ["txt", "txt.gz", "jsonl"])
def test_a_source_replaced_by_one_of_equal_length_and_date_is_noticed(tmp_path, kind, fails):
    """Otherwise the corpus would be half the old source, half the new one."""
    path, twin = tmp_path / f"in/a.{kind}", tmp_path / f"twin.{kind}"
    for file, letter in ((path, "a"), (twin, "b")):
        texts = [f"{letter} {i}\n" + letter * (i % 23) for i in range(400)]
        file.parent.mkdir(exist_ok=True)
        if kind == "jsonl":
            file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        elif kind == "txt":
            write_text(file, texts)
        else:
            with open(file, "wb") as raw, gzip.GzipFile("", "wb", 0, raw, mtime=0) as packed:
                packed.write("\n<|endoftext|>\n".join(texts).encode())  # stored: equal lengths
    before = path.stat()
    assert twin.stat().st_size == before.st_size and twin.read_bytes() != path.read_bytes()
    options = ["--out", tmp_path / "out", "--val-every", 5]
    run("--text", tmp_path / "in", *options)
    (tmp_path / "out/meta.json").unlink()  # as if it had been interrupted
    shards = contents(tmp_path / "out")
    path.write_bytes(twin.read_bytes())
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    fails(["--text", tmp_path / "in", *options], "other files or weights")
    assert contents(tmp_path / "out") == shards


def test_a_source_with_another_date_and_place_is_still_the_same(tmp_path, monkeypatch):
    folders = [tmp_path / "a", tmp_path / "b"]
    texts = made_up(60)
    for number, folder in enumerate(folders):
        write_text(folder / "in/a.txt", texts)
        os.utime(folder / "in/a.txt", (number * 1e9, number * 1e9))
    options = ["--out", tmp_path / "out", "--val-every", 5]
    monkeypatch.chdir(folders[0])
    run("--text", "in", *options)
    finished = contents(tmp_path / "out")
    (tmp_path / "out/meta.json").unlink()
    monkeypatch.chdir(folders[1])
    run("--text", "in", *options)
    assert contents(tmp_path / "out") == finished


def test_what_an_older_version_began_otherwise_is_refused(tmp_path, fails):
    """Several sources without weights were one, whose validation text came from its beginning."""
    paths = [write_text(tmp_path / f"{name}.txt", made_up(40, name)) for name in "ab"]
    options = ["--out", tmp_path / "out", "--val-every", 5]
    run("--text", *paths, *options)
    (tmp_path / "out/meta.json").unlink()
    manifest = json.loads((tmp_path / "out/manifest.json").read_text())
    listing = repr([(path.name, path.stat().st_size, "") for path in paths])
    [[weight, now]] = manifest["begun_with"]["sources"]
    before = hashlib.sha256(listing.encode()).hexdigest()  # as it was computed
    assert weight == 1 and now != before
    manifest["begun_with"]["sources"] = [[1.0, before]]
    (tmp_path / "out/manifest.json").write_text(json.dumps(manifest))
    fails(["--text", *paths, *options], "other files or weights", "an older version")


def test_the_estimate_is_near_the_truth_for_any_kind_of_text(tmp_path, bpe, monkeypatch):
    """Digits and signs make more tokens a byte than the words of most texts."""
    needs = []
    monkeypatch.setattr(corpus, "check_disk", lambda out, s, tokens, shard: needs.append(tokens))
    monkeypatch.setattr(sources, "BLOCK", 2**18)  # a file has several
    for name, letters in (("words", "wor  "), ("signs", "(1)[2]{3};")):
        texts = ["".join(rng.choices(letters, k=450)).strip() for i in range(1500)]
        folder = tmp_path / name
        write_text(folder / "a.txt", texts)
        (folder / "b.txt.xz").write_bytes(lzma.compress((folder / "a.txt").read_bytes()))
        write_parquet(folder / "c.parquet", texts, rows=1000)
        for path in folder.iterdir():
            out = tmp_path / f"{name}-{path.suffix}"
            run("--text", path, "--out", out, tok="r50k_base")
            tokens = json.loads((out / "meta.json").read_text())["tokens"]
            assert sum(tokens.values()) == pytest.approx(needs[-1], rel=0.1), path


# What can be wrong


def test_files_that_cannot_be_read_are_named(tmp_path, fails, monkeypatch):
    # A slow machine would commit what came before the error
    monkeypatch.setattr(corpus, "COMMIT_SECONDS", 600)
    good = write_text(tmp_path / "good.txt", made_up(20))

    def refuses(name, content, *words, options=()):
        path = tmp_path / name
        if content is not None:
            path.write_bytes(content)
        argv = ["--text", good, path, "--out", tmp_path / "out", "--val-every", 5, *options]
        fails(argv, name, *words)
        assert not (tmp_path / "out").exists()

    row = b'{"text": "some"}\n'
    refuses("a.jsonl", row * 4 + b'{"text": "broken\n' + row, "line 5", "'text'")
    refuses("b.jsonl", row * 2 + b'{"body": "x"}\n', "line 3", "'text'")
    refuses("c.jsonl", row * 2 + b"[1]\n", "line 3")
    refuses("d.jsonl", row + b'{"text": 7}\n', "line 2", "int")
    refuses("e.jsonl", row * 200_000 + b"{}\n", "line 200001")
    refuses("a.jsonl.gz", gzip.compress(row * 99)[:-9], "cannot be read")
    refuses("b.jsonl.gz", b"not gzip", "cannot be read")
    refuses("latin.txt", b"caf\xe9", "UTF-8", "byte 3")
    refuses("a.parquet", b"PAR1 but not really", "cannot be read")
    refuses("a.pdf", b"x", ".parquet", ".txt")
    refuses("missing.txt", None, "missing.txt", "no such file")
    refuses("c.txt.xz", lzma.compress(b"text " * 99)[:-9], "cannot be read")
    write_parquet(tmp_path / "b.parquet", ["x"], column="content")
    refuses("b.parquet", None, "no column 'text'", "content", "--key")
    refuses("b.parquet", None, "int64", options=["--key", "id"])


def test_nothing_to_read(tmp_path, fails):
    (tmp_path / "folder").mkdir()
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "blank.jsonl").write_text('\n{"text": " "}\n')
    (tmp_path / "short.txt").write_text("a\n<|endoftext|>\nb")
    for name, word in (
        ("folder", "none ends in .parquet"),
        ("empty.txt", "no documents"),
        ("blank.jsonl", "no documents"),
        ("short.txt", "use data/prepare.py"),
    ):
        fails(["--text", tmp_path / name, "--out", tmp_path / "out"], word)
        assert not (tmp_path / "out").exists()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/file").write_text("mine")
    text = write_text(tmp_path / "a.txt", made_up(9))
    fails(["--text", text, "--out", tmp_path / "mine"], "no unfinished corpus")
    assert contents(tmp_path / "mine") == {"file": b"mine"}


def test_bad_options(tmp_path, fails):
    out = ["--out", tmp_path / "out"]
    fails(out, "--text or --hub", code=2)
    fails(["--text", "a=0.5", "b", *out], "weight", code=2)
    for wrong in ("x", "0", "-1", "nan", "inf"):
        fails(["--text", f"a={wrong}", *out], wrong, code=2)
    for wrong in ("0", "x", "-3"):
        fails(["--text", "a", "--max-tokens", wrong, *out], "--max-tokens",
              "whole number, like 100e9", code=2)
    for name, largest in (("max-tokens", 2**63), ("val-every", 2**63), ("val-tokens", 2**63),
                          ("shard-tokens", 2**31), ("processes", 2**63)):
        for wrong in ("0", str(largest), "1e20", "inf", "nan", "2.5", "", "1_0x"):
            fails(["--text", "a", f"--{name}={wrong}", *out], f"--{name}", code=2)
    fails(["--text", "=0.5", *out], "no name before the weight", code=2)


def test_the_smallest_and_largest_numbers_work(tmp_path, fails, monkeypatch):
    path, ahead = write_text(tmp_path / "a.txt", [f"{'word ' * 9}{i}" for i in range(30)]), []
    start = sources.Source.start
    monkeypatch.setattr(sources.Source, "start",
                        lambda s, pool, n, folder: ahead.append(n) or start(s, pool, n, folder))
    huge = str(2**63 - 1)
    options = {"val-every": ("2", "5"), "val-tokens": ("200", huge), "max-tokens": ("6e2", huge),
               "shard-tokens": ("1", str(2**31 - 1)), "processes": ("1", huge)}
    for name, values in options.items():
        for value in values:
            out = tmp_path / f"{name}-{value}"
            run("--text", path, "--out", out, "--val-every", 5, f"--{name}", value)
            assert (out / "meta.json").exists()
    assert max(ahead) <= 2 * os.cpu_count() + 2  # blocks in memory
    for name, value in (("val-every", "1"), ("val-every", huge), ("val-tokens", "1"),
                        ("max-tokens", "1")):
        fails(["--text", path, "--out", tmp_path / "o", f"--{name}", value], "too little text")
        assert not (tmp_path / "o").exists()


# The hub, replaced at the two functions that we call


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A dataset with two folders on a hub that often fails. `hub.log` lists what was downloaded."""
    module = pytest.importorskip("huggingface_hub")
    store = tmp_path / "store"
    state = SimpleNamespace(log=[], fail=0, revisions=[], on_download=lambda name: None)
    state.texts = made_up(60, "hub")
    for i in range(3):
        write_parquet(store / f"web/train-{i}.parquet", state.texts[20 * i : 20 * i + 20])
    write_parquet(store / "other/train-0.parquet", made_up(5))
    (store / "README.md").write_text("about")

    class Api:
        def dataset_info(self, repo, revision=None, files_metadata=False):
            assert repo == "some/corpus" and files_metadata
            state.revisions.append(revision)
            names = [p.relative_to(store).as_posix() for p in store.rglob("*") if p.is_file()]
            files = [SimpleNamespace(rfilename=n, size=(store / n).stat().st_size) for n in names]
            return SimpleNamespace(sha=revision or "abc123", siblings=files)

    def download(repo, filename, repo_type, revision, local_dir):
        assert (repo, repo_type, revision) == ("some/corpus", "dataset", "abc123")
        state.fail -= 1
        if state.fail >= 0:
            raise ConnectionError("reset by peer")
        state.log.append(filename)
        state.on_download(filename)
        path = Path(local_dir) / filename
        path.parent.mkdir(parents=True, exist_ok=True)
        return str(shutil.copy(store / filename, path))

    monkeypatch.setattr(module, "HfApi", Api)
    monkeypatch.setattr(module, "hf_hub_download", download)
    return state


def test_a_folder_of_the_hub_is_read_file_by_file_and_leaves_no_downloads(hub, tmp_path):
    hub.fail = 3
    leftovers = []
    hub.on_download = lambda name: leftovers.append(list((tmp_path / "out").rglob("*.parquet")))
    run("--hub", "some/corpus:web", "--out", tmp_path / "out", "--val-every", 10)
    assert hub.log == [f"web/train-{i}.parquet" for i in range(3)]
    assert leftovers == [[], [], []]
    assert read(tmp_path / "out", "train") == [t for i, t in enumerate(hub.texts) if i % 10]
    assert {p.suffix for p in (tmp_path / "out").iterdir()} == {".bin", ".json"}


def test_an_interrupted_download_continues_at_the_same_revision(hub, tmp_path, monkeypatch, fails):
    run("--hub", "some/corpus:web=1", "--out", tmp_path / "whole", "--val-every", 10)
    monkeypatch.setattr(corpus, "COMMIT_SECONDS", 0)
    monkeypatch.setattr(sources, "ROWS", 5)

    def no_network(name):
        if name.endswith("2.parquet"):
            raise ConnectionError("no route to host")

    hub.on_download = no_network
    argv = ["--hub", "some/corpus:web=1", "--out", tmp_path / "out", "--val-every", 10,
            "--processes", 1]
    start = sources.Source.start
    monkeypatch.setattr(  # it reads little ahead
        sources.Source, "start", lambda s, pool, ahead, d: start(s, pool, 1, d))
    fails(argv, "web/train-2.parquet", "no route to host", "continues")
    hub.on_download = lambda name: None
    hub.log.clear(), hub.revisions.clear()
    run(*argv)
    assert hub.revisions == ["abc123"] and hub.log[0] != "web/train-0.parquet"
    for name in ("train_000000.bin", "val_000000.bin", "meta.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_a_hub_that_does_not_answer_or_has_no_such_folder(hub, tmp_path, monkeypatch, fails):
    fails(["--hub", "some/corpus:nothing", "--out", tmp_path / "out"], "nothing", "'other', 'web'")
    hub.fail = 10**6
    fails(["--hub", "some/corpus:web", "--out", tmp_path / "out"], "reset by peer")
    assert not (tmp_path / "out").exists()
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    fails(["--hub", "some/corpus", "--out", tmp_path / "out"], "huggingface_hub",
          "requirements-extra.txt")


def test_without_pyarrow_one_line_says_what_to_install(tmp_path, monkeypatch, fails):
    write_parquet(tmp_path / "a.parquet", made_up(5))
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    fails(["--text", tmp_path / "a.parquet", "--out", tmp_path / "out"],
          "a.parquet needs pyarrow: pip install")
    assert not (tmp_path / "out").exists()
