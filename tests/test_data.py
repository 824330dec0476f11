import gzip
import json
import lzma
import pickle
import struct

import numpy as np
import pytest
import tiktoken
import torch

from data.dataset import (HEADER, MAGIC, Dataset, TextBlocks, evenly_spaced, open_shard, permute,
                          write_shard)
from data.prepare import divide, plain_text, prepare
from data.tokenizer import encode, encode_document, separator, tokenizer
from nanoosp.files import read_text
from quantize import Recipe
from tools.loading import Loaded


def test_the_permutation_is_one_to_one_for_any_size():
    for n in (1, 2, 3, 17, 64, 1000, 65537):
        assert np.array_equal(np.sort(permute(np.arange(n), n, seed=1, epoch=2)), np.arange(n))


def test_the_permutation_changes_with_seed_and_epoch_and_shuffles_well():
    n = 10_000
    orders = [permute(np.arange(n), n, seed, epoch) for seed, epoch in ((0, 0), (0, 1), (1, 0))]
    for i, a in enumerate(orders):
        assert abs(np.corrcoef(np.arange(n), a)[0, 1]) < 0.05  # no trend: standard error 0.01
        assert (np.abs(np.diff(a)) == 1).mean() < 0.01  # neighbours are not neighbours any more
        for b in orders[:i]:
            assert (a == b).mean() < 0.01


def test_an_epoch_reads_every_window_once_over_many_shards(tmp_path):
    sizes, T = (1000, 37, 500, 2), 9
    token = iter(range(10_000))
    for i, size in enumerate(sizes):
        write_shard(tmp_path / f"x_train_{i}.bin", np.array([next(token) for _ in range(size)]))
    data = Dataset(tmp_path, "train", seq_len=T - 1)
    assert data.n_windows == sum(size // T for size in sizes)
    epoch = np.concatenate([data.batch(step, 1) for step in range(data.n_windows)])
    assert len(np.unique(epoch)) == epoch.size  # all tokens differ, so each window came once
    assert (np.diff(epoch, axis=1) == 1).all()  # and is a run of neighbours within one shard
    starts = {0, 1000, 1037, 1537}
    assert not any(set(row[1:]) & starts for row in epoch.tolist())


def test_a_batch_is_a_pure_function_of_seed_and_step_and_ranks_divide_it(dataset_dir):
    a, b = (Dataset(dataset_dir, "train", 16, seed=3) for _ in range(2))
    b.batch(7, 8), b.windows(b.evaluation_windows(5))  # reading elsewhere changes nothing
    for step in (0, 5, 10**6):
        whole = a.batch(step, 8)
        assert np.array_equal(whole, b.batch(step, 8))
        for world in (2, 4):
            parts = [b.batch(step, 8, rank, world) for rank in range(world)]
            assert np.array_equal(whole, np.concatenate(parts))
    assert not np.array_equal(a.batch(0, 8), Dataset(dataset_dir, "train", 16, seed=4).batch(0, 8))


def test_a_batch_size_larger_than_an_epoch_works(dataset_dir):
    data = Dataset(dataset_dir, "val", 512)
    assert data.batch(0, 3 * data.n_windows).shape == (3 * data.n_windows, 513)


def test_shards_survive_a_round_trip_and_have_the_layout_of_llm_c(tmp_path):
    tokens = np.array([0, 1, 65535, 7])
    write_shard(tmp_path / "a.bin", tokens)
    assert np.array_equal(open_shard(tmp_path / "a.bin"), tokens)
    raw = (tmp_path / "a.bin").read_bytes()
    assert len(raw) == 4 * HEADER + 2 * 4
    assert np.frombuffer(raw[:12], np.int32).tolist() == [MAGIC, 1, 4]


def test_numbers_are_evenly_spaced_and_always_the_same():
    assert evenly_spaced(4, 10).tolist() == [0, 2, 5, 7]
    assert evenly_spaced(9, 3).tolist() == [0, 1, 2]


def test_text_blocks_do_not_overlap_and_drop_the_tail():
    blocks = TextBlocks(np.arange(103), 25, n_bytes=206)
    assert blocks.n_windows == 4 and blocks.meta == {"bytes_per_token": 2.0}
    assert blocks.windows(np.arange(4)).reshape(-1).tolist() == list(range(100))
    assert blocks.evaluation_windows(2).tolist() == [0, 2]
    with pytest.raises(ValueError, match="103 tokens, fewer than one block of 104"):
        TextBlocks(np.arange(103), 104, n_bytes=206)


def test_raw_nanogpt_files_are_read(tmp_path):
    for split in ("train", "val"):
        np.arange(100, dtype=np.uint16).tofile(tmp_path / f"{split}.bin")
    data = Dataset(tmp_path, "train", 9)
    assert data.n_windows == 10 and data.meta["tokenizer"] == "r50k_base"
    assert sorted(data.batch(0, 10)[:, 0]) == list(range(0, 100, 10))


def test_bytes_tokenizer_is_utf8():
    encoding, text = tokenizer("bytes"), "Ünïcode  and\n\n blanks\t—\0\U0001f600"
    assert encoding.n_vocab == 256 and separator(encoding) == 0
    assert encode(encoding, text).tolist() == list(text.encode())
    assert encoding.decode(encode(encoding, text).tolist()) == text


def test_prepared_text_comes_back_document_by_document(tmp_path):
    documents = [f"Document {i}, naïve.\n\n{'End ' * 30}stop" for i in range(40)]
    (tmp_path / "t.txt").write_text("\n\n<|endoftext|>\n\n".join(documents))
    meta = prepare(tmp_path / "out", "bytes", tmp_path / "t.txt")
    decode = tokenizer("bytes").decode
    read = {}
    for split in ("train", "val"):
        tokens = open_shard(tmp_path / f"out/{split}_000000.bin").tolist()
        read[split] = decode(tokens).split("\0")[1:]
    assert read["val"] == documents[19::20]
    assert read["train"] == [d for i, d in enumerate(documents) if i % 20 != 19]
    assert meta["bytes"]["val"] == sum(len(d.encode()) + 1 for d in documents[19::20])
    assert meta["bytes_per_token"] == meta["bytes"]["val"] / meta["tokens"]["val"]


def test_a_single_document_is_split_without_losing_or_sharing_text():
    lines = [f"line {i}" for i in range(1000)]
    train, val = divide(["\n".join(lines)])
    assert "\n".join(train + val) == "\n".join(lines)
    assert 0.03 < len(val[0]) / len("\n".join(lines)) < 0.11


def test_few_documents_are_never_cut_and_a_mark_at_the_start_is_dropped(tmp_path):
    assert divide(["a", "b", "c"]) == (["a", "b"], ["c"])
    (tmp_path / "t.txt").write_text("\ufeff" + "<|endoftext|>\n" + "text " * 900, encoding="utf-8")
    prepare(tmp_path / "out", "bytes", tmp_path / "t.txt")
    assert open_shard(tmp_path / "out/train_000000.bin")[:5].tolist() == [0, *b"text"]


LINE_ENDS = "one\r\ntwo\rthree\n\r\nfour\x85five\u2028six\r\n"


def bytes_model(seq_len):
    loaded = Loaded(None, None, {"seq_len": seq_len}, {"tokenizer": "bytes"}, None)
    return lambda file: loaded.text_blocks(file, seq_len + 1)


def test_every_character_of_a_text_reaches_the_model(tmp_path):
    text = LINE_ENDS * 60 + "end"
    (tmp_path / "t.txt").write_bytes(b"\xef\xbb\xbf" + text.encode())  # with a byte order mark
    prepare(tmp_path / "out", "bytes", tmp_path / "t.txt")
    parts = [open_shard(tmp_path / f"out/{split}_000000.bin")[1:] for split in ("train", "val")]
    kept = b"".join(bytes(part.astype(np.uint8)) for part in parts)
    cut = len(parts[0])  # blanks around it are dropped
    assert text.encode().startswith(kept[:cut]) and text.encode().endswith(kept[cut:])
    assert len(text.encode()) - len(kept) <= 2
    blocks = bytes_model(6)(tmp_path / "t.txt")
    ids = blocks.windows(np.arange(blocks.n_windows)).ravel()
    assert bytes(ids.astype(np.uint8)) == text.encode()[: len(ids)]


def test_a_text_without_borders_is_measured_as_it_stands(tmp_path):
    """As WikiText-2 is: its first character is a blank, and no separator stands before it."""
    text = " \n = Robert <unk> = \n \n Robert said <|endoftext|> once . \n" * 9 + " \n"
    (tmp_path / "t.txt").write_text(text)
    blocks = bytes_model(len(text) - 1)(tmp_path / "t.txt")
    assert blocks.windows(np.arange(1)).ravel().tolist() == list(text.encode())
    assert blocks.meta == {"bytes_per_token": 1.0}


def test_a_text_with_borders_is_measured_as_it_would_be_prepared(tmp_path):
    for ends, name in (("\n", "unix"), ("\r\n", "windows")):
        texts = [f"document {i}{ends}é " + "ab " * i + "." for i in range(40)]
        border = f"{ends}{ends}<|endoftext|> {ends}{ends}"
        (tmp_path / name).write_bytes((border.join(texts) + border).encode())
        meta = prepare(tmp_path / f"out-{name}", "bytes", tmp_path / name)
        by_prepare = open_shard(tmp_path / f"out-{name}/val_000000.bin").tolist()
        wanted = [b for text in texts for b in (0, *text.encode())]
        blocks = bytes_model(len(wanted) - 1)(tmp_path / name)
        assert blocks.windows(np.arange(1)).ravel().tolist() == wanted
        assert blocks.meta["bytes_per_token"] == 1  # a separator is a byte, too
        (tmp_path / "val").write_bytes(border.join(texts[19::20]).encode())
        blocks = bytes_model(len(by_prepare) - 1)(tmp_path / "val")
        assert blocks.windows(np.arange(1)).ravel().tolist() == by_prepare
        assert blocks.meta["bytes_per_token"] == meta["bytes_per_token"]


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "JSONL", "parquet"])
def test_rows_of_documents_are_read_as_documents_everywhere(tmp_path, kind):
    texts = [f'Document {i}:\n "naïve" \\ ' + "ab " * i for i in range(40)] + ["", " \n"]
    file = tmp_path / f"books.{kind}"
    if kind == "parquet":
        pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        pq.write_table(pa.table({"text": texts}), file)
    else:
        lines = "".join(json.dumps({"text": text, "url": "https://"}) + "\n" for text in texts)
        opened = gzip.open if kind.endswith("gz") else open
        with opened(file, "wt") as out:
            out.write(lines)
    prepare(tmp_path / "out", "bytes", file)
    wanted = {"train": [t for i, t in enumerate(texts[:40]) if i % 20 != 19], "val": texts[19:40:20]}
    for split, documents in wanted.items():
        tokens = open_shard(tmp_path / f"out/{split}_000000.bin").tolist()
        assert bytes(tokens) == b"".join(b"\0" + d.encode() for d in documents)
    together = b"".join(b"\0" + text.encode() for text in texts[:40])
    blocks = bytes_model(len(together) - 1)(file)  # what --text and --calib read
    assert bytes(blocks.windows(np.arange(1)).ravel().tolist()) == together


@pytest.mark.parametrize("name", ["books.json", "books.csv", "books.tsv", "books.ndjson",
                                  "books.csv.gz", "Books.CSV"])
def test_structured_text_that_cannot_be_read_is_refused_by_name(tmp_path, name):
    with (gzip.open if name.endswith("gz") else open)(tmp_path / name, "wt") as file:
        file.write('[{"text": "abc, def"}]\n' * 300)
    for read in (lambda file: prepare(tmp_path / "out", "bytes", file), bytes_model(6)):
        with pytest.raises(ValueError, match=f"{name} is neither plain text nor .parquet or .jsonl"):
            read(tmp_path / name)
    (tmp_path / "rows.jsonl").write_text('{"content": "abc"}\n')
    (tmp_path / "broken.parquet").write_bytes(b"PAR1" * 9)
    for name, words in (("rows", "line 1: no JSON object with the key 'text'"), ("broken", "")):
        [file] = tmp_path.glob(f"{name}.*")
        for read in (lambda file: prepare(tmp_path / "out", "bytes", file), bytes_model(6)):
            with pytest.raises(ValueError, match=f"{file} cannot be read: {words}"):
                read(file)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("border", ["", "\n<|endoftext|>\n"])
def test_a_nul_would_end_a_document_and_is_refused_by_name(tmp_path, border, gpt2_like):
    (tmp_path / "t.txt").write_text("some text\n" * 30 + border + "a\0b " * 60)
    for use in (lambda: prepare(tmp_path / "out", "bytes", tmp_path / "t.txt"),
                lambda: bytes_model(8)(tmp_path / "t.txt")):
        with pytest.raises(ValueError, match="t.txt: .*NUL.*'bytes'"):
            use()
    assert [p.name for p in tmp_path.iterdir()] == ["t.txt"]
    assert 0 in encode_document(gpt2_like, "a\0b")  # here it is a token like any other


def test_compressed_texts_are_read_and_damaged_ones_named(tmp_path):
    text = "line of text\r\n" * 99
    for name, packed in (("a.txt", text.encode()), ("a.txt.gz", gzip.compress(text.encode())),
                         ("a.txt.xz", lzma.compress(text.encode()))):
        (tmp_path / name).write_bytes(packed)
        assert read_text(tmp_path / name) == text
        if name != "a.txt":
            for damaged in (packed[:-9], b"no such format", packed[:40] + b"x" * 40):
                (tmp_path / name).write_bytes(damaged)
                with pytest.raises(ValueError, match=f"{name} cannot be read") as error:
                    read_text(tmp_path / name)
                assert "\n" not in str(error.value)
    (tmp_path / "b.txt").write_bytes(b"\xef\xbb\xbfcaf\xe9")
    with pytest.raises(ValueError, match="b.txt cannot be read: not UTF-8 text .byte 6 "):
        read_text(tmp_path / "b.txt")
    with pytest.raises(FileNotFoundError):
        read_text(tmp_path / "c.txt")


# Datasets of other programs


def refused(folder, *words):
    with pytest.raises(ValueError) as error:
        Dataset(folder, "train", 9)
    message = str(error.value)
    assert "\n" not in message and all(word in message for word in words), message


def test_nanogpts_characters_are_not_taken_for_gpt2_tokens(tmp_path):
    letters = sorted(set("to be or not"))
    for split in ("train", "val"):
        np.arange(200, dtype=np.uint16).tofile(tmp_path / f"{split}.bin")
    vocabulary = dict(vocab_size=len(letters), itos=dict(enumerate(letters)), stoi={})
    (tmp_path / "meta.pkl").write_bytes(pickle.dumps(vocabulary))
    refused(tmp_path, "meta.pkl", "never opened", "python data/prepare.py --text FILE")
    (tmp_path / "meta.pkl").write_bytes(b"not even a pickle")
    refused(tmp_path, "meta.pkl")


def test_shards_of_32_bits_and_other_files_of_llm_c_are_refused(tmp_path):
    ids = np.random.default_rng(0).integers(128256, size=5000).astype(np.uint32)
    path = tmp_path / "train_0.bin"
    for magic, version in ((20240801, 7), (20240326, 3), (20240522, 1)):  # tokens, model, questions
        path.write_bytes(struct.pack("<256i", magic, version, len(ids), *[0] * 253) + ids.tobytes())
        refused(tmp_path, "train_0.bin", str(magic), "16-bit tokens", "data/prepare.py")
    for dtype in (np.uint32, np.int64):  # without a header
        ids.astype(dtype).tofile(path)
        refused(tmp_path, "train_0.bin", "32 bits or more", "data/prepare.py")
    gpt2 = np.random.default_rng(0).integers(50257, size=5000).astype(np.uint16)
    gpt2.tofile(path)
    assert Dataset(tmp_path, "train", 9).meta["bytes_per_token"] is None


def test_a_shard_has_a_header_that_can_count_its_tokens(tmp_path):
    class Huge:
        def __len__(self):
            return 2**31

        def max(self):
            return 0

    with pytest.raises(ValueError, match="2,147,483,648 tokens are too many"):
        write_shard(tmp_path / "a.bin", Huge())


def test_a_shard_belongs_to_the_split_that_its_name_says(tmp_path):
    for name in ("retrieval_train_0", "retrieval_val_0"):
        write_shard(tmp_path / f"{name}.bin", np.arange(100))
    assert len(Dataset(tmp_path, "val", 9).shards) == len(Dataset(tmp_path, "train", 9).shards) == 1


def test_plays_lose_their_markdown():
    markdown = ("# Macbeth\n\n### SCENE I. A heath.\n\n**FIRST WITCH**  \nWhen shall we  \n"
                "meet\u2014again\\.\n\n\n_Exeunt_\n")
    assert plain_text(markdown) == ("Macbeth\n\nSCENE I. A heath.\n\nFIRST WITCH:\nWhen shall we\n"
                                    "meet--again.\n\nExeunt\n")


@pytest.fixture
def gpt2_like():
    """Bytes, with a pattern that as GPT-2's gives up on long runs of blanks."""
    ranks, pattern = {bytes([i]): i for i in range(256)}, r" ?\p{L}+|[^\s\p{L}]+|\s+(?!\S)|\s+"
    return tiktoken.Encoding("r50k_base", pat_str=pattern, mergeable_ranks=ranks,
                             special_tokens={"<|endoftext|>": 256})


BLANKS = "a" + " " * 1_000_000 + "b"


def test_what_is_too_much_for_tiktokens_regex_is_halved(gpt2_like):
    with pytest.raises(ValueError, match="stack"):
        gpt2_like.encode_to_numpy(BLANKS)
    assert gpt2_like.decode(encode(gpt2_like, BLANKS).tolist()) == BLANKS
    assert encode(gpt2_like, "a \ud800").tolist() == [97, 32, 63]
    assert encode(gpt2_like, "").tolist() == []


def test_a_million_blanks_are_prepared_measured_and_calibrated_on(gpt2_like, tmp_path, monkeypatch):
    monkeypatch.setattr("data.prepare.tokenizer_for_shards", lambda name: gpt2_like)
    (tmp_path / "t.txt").write_text(f"{BLANKS}\n<|endoftext|>\n" + "c" * 200)
    meta = prepare(tmp_path / "out", "r50k_base", tmp_path / "t.txt")
    assert meta["tokens"]["train"] == 1 + len(BLANKS)
    assert TextBlocks(encode(gpt2_like, BLANKS), 100, len(BLANKS)).n_windows == len(BLANKS) // 100
    loaded = Loaded(tmp_path, None, {"seq_len": 99}, {}, None)
    loaded.__dict__["encoding"] = gpt2_like
    windows = loaded.calibration(Recipe("4-4-4", "gptq"), file=tmp_path / "t.txt")
    assert windows.shape[1] == 100 and windows.dtype == torch.int64


def test_a_failed_preparation_leaves_nothing(tmp_path, monkeypatch):
    (tmp_path / "t.txt").write_text("some text\n" * 50)

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("data.prepare.write_shard", full)
    with pytest.raises(OSError):
        prepare(tmp_path / "out", "bytes", tmp_path / "t.txt")
    assert [p.name for p in tmp_path.iterdir()] == ["t.txt"]
