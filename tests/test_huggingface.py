"""Hugging Face directories, against the transformers and tokenizers libraries themselves."""

import json
import os
import random
import sys
from pathlib import Path

import pytest
import tiktoken
import torch

import quantize as Q
import train
from data.prepare import prepare
from data.tokenizer import (encode, halves, json_from_encoding, separator, tokenizer, tokenizer_of,
                            without_token)
from nanoosp.checkpoint import load_checkpoint
from tools import evaluate, export
from tools.huggingface import load_llama, our_names, save_llama
from tools.loading import load
from tools.writing import generate

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")
safetensors = pytest.importorskip("safetensors.torch")
load_file, save_file = safetensors.load_file, safetensors.save_file

DATA = {"tokenizer": "bytes"}
OPTIONS = {"imported": "test", "seq_len": 64}


def made_up_text(rng, n):
    words = ["".join(rng.choices("abcdefghijéß—", k=rng.randint(1, 7))) for _ in range(60)]
    between = [" ", "  ", "\n", "\n\n", ", ", ". ", "'s ", "'ll ", "1 ", "23", " 4567 ", "\t"]
    return "".join(rng.choice(words) + rng.choice(between) for _ in range(n))


def random_strings(n):
    """Strings of blanks, digits of many scripts, letters, signs, control characters."""
    rng = random.Random(0)
    pools = [range(0x20, 0x7F), range(0x20), range(0x80, 0x250), range(0x250, 0xD800),
             range(0xE000, 0x10000), range(0x10000, 0x20000),
             [0x20, 0xA0, 0x2003, 0x3000, 9, 10, 13, 0x85, 0x2028],
             [0x30, 0x664, 0xBD, 0xB2, 0x2167], [4, 6, 0x13, 0x14, 0x16, 0x1D]]
    ends = ["'s", "'ll", "'t", " 1", "<|endoftext", "  ", ""]
    for _ in range(n):
        pool = rng.choices(pools, k=3)
        letters = [chr(rng.choice(rng.choice(pool))) for _ in range(rng.randint(0, 20))]
        yield "".join(letters) + rng.choice(ends)


TEXTS = [made_up_text(random.Random(6), 100), "Ünï\x04code\0 — 12 345's", *random_strings(300)]

# Tokenizers


def trained_tokenizer(digits: bool):
    """A tokenizer of the `tokenizers` library, trained on made-up text. It cuts a text as GPT-2's
    does or, with `digits`, as SmolLM's."""
    t = tokenizers.Tokenizer(tokenizers.models.BPE())
    byte_level = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    cut_digits = tokenizers.pre_tokenizers.Digits(individual_digits=True)
    sequence = tokenizers.pre_tokenizers.Sequence([cut_digits, byte_level])
    t.pre_tokenizer = sequence if digits else byte_level
    t.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=600, special_tokens=["<|endoftext|>", "<|im_start|>"], show_progress=False,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet())
    t.train_from_iterator([made_up_text(random.Random(1), 4000)], trainer)
    return t


def same_ids(ours, theirs, texts):
    return all(encode(ours, text).tolist() == theirs.encode(text, add_special_tokens=False).ids
               for text in texts)


def texts_of_bytes():
    """All bytes but 0 that UTF-8 has, emoji, and random bytes that happen to be UTF-8."""
    rng = random.Random(0)
    yield from ("", " ", "  a  b\n\t", "Zoë — 1", "🙂👩‍👩‍👧 \U0010ffff", "<0x41> <0x00> <|endoftext")
    yield "".join(map(chr, [*range(1, 0x2581), *range(0x2582, 0xD800), *range(0x1F000, 0x1F700)]))
    for _ in range(300):
        text = bytes(rng.choices(range(1, 256), k=200)).decode("utf-8", "ignore")
        assert len(text) > 50
        yield text.replace("\u2581", "")
    yield from (text.replace("\0", "") for text in TEXTS)


def test_bytes_can_be_written_as_a_tokenizer_json():
    text = json_from_encoding(tokenizer("bytes"))
    theirs = tokenizers.Tokenizer.from_str(text)
    for sample in texts_of_bytes():
        ids = theirs.encode(sample).ids
        assert ids == list(sample.encode()) and theirs.decode(ids) == sample
    lower_block = theirs.encode("\u2581").ids  # the one letter that is lost, as llama.cpp loses it
    assert lower_block == [32]


def test_what_converters_of_llamas_ask_of_a_tokenizer_json_is_there():
    """llama.cpp: BPE with byte_fallback, a decoder of type Sequence, the bytes spelled <0x0A>, a
    blank spelled as U+2581, and a token for every id."""
    content = json.loads(json_from_encoding(tokenizer("bytes")))
    model, special = content["model"], content["added_tokens"]
    assert model["type"] == "BPE" and model["byte_fallback"] and not model["merges"]
    assert not model["ignore_merges"] and content["decoder"]["type"] == "Sequence"
    words = {i: word for word, i in model["vocab"].items()}
    assert words == {0: "<|endoftext|>", 32: "\u2581"} | {
        i: f"<0x{i:02X}>" for i in range(1, 256) if i != 32}
    assert [(token["id"], token["special"]) for token in special] == [(0, True)]


def test_the_vocabulary_class_of_llama_cpp_reads_an_exported_run(runs, tmp_path):
    gguf = pytest.importorskip("gguf")
    exported(runs["osp"], tmp_path / "m")
    words, _, types = zip(*gguf.LlamaHfVocab(tmp_path / "m").all_tokens())
    assert words[:2] == (b"<|endoftext|>", b"<0x01>") and words[32] == "\u2581".encode()
    kinds = {0: gguf.TokenType.CONTROL, 32: gguf.TokenType.NORMAL}
    assert list(types) == [kinds.get(i, gguf.TokenType.BYTE) for i in range(256)]
    special = gguf.SpecialVocab(tmp_path / "m")
    assert special.special_token_ids == dict(bos=0, eos=0, pad=0)
    assert special.add_special_token == dict(bos=False)


def test_our_own_reader_takes_that_form_for_bytes_without_any_loss():
    text = json_from_encoding(tokenizer("bytes"))
    again = tokenizer_of({"tokenizer": "tokenizer.json", "tokenizer_json": text})
    assert separator(again) == 0 and again.n_vocab == 256
    everything = "".join(map(chr, [*range(0xD800), *range(0xE000, 0x10000)]))
    for sample in [everything, "a\0bÿĀ", "\u2581\u2581", *TEXTS, *texts_of_bytes()]:
        ids = encode(again, sample).tolist()
        assert ids == list(sample.encode()) and again.decode(ids) == sample


def test_merges_are_found_again_from_ids_alone():
    theirs = trained_tokenizer(digits=False)
    model = json.loads(theirs.to_str())["model"]
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    order = sorted(range(256), key=lambda byte: chr(byte) not in alphabet)
    byte_of = dict(zip(alphabet, order))
    ranks = {bytes(byte_of[letter] for letter in word): i for word, i in model["vocab"].items()
             if not word.startswith("<|")}
    pattern = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"  # GPT-2's
    parts = dict(pat_str=pattern, mergeable_ranks=ranks, special_tokens={"<|endoftext|>": 0})
    ours = tiktoken.Encoding("r50k_base", **parts)
    written = json.loads(json_from_encoding(ours))["model"]
    assert [*map(tuple, written["merges"])] == [*map(tuple, model["merges"])]
    assert len(written["merges"]) > 150
    again = tokenizers.Tokenizer.from_str(json_from_encoding(ours))
    assert again.token_to_id("<|endoftext|>") == 0
    texts = [made_up_text(random.Random(4), 500), *TEXTS]
    assert same_ids(ours, again, texts) and same_ids(ours, theirs, texts)
    assert all(halves(a + b, ranks) == [a, b] for a, b in (
        [bytes(byte_of[letter] for letter in part) for part in merge] for merge in model["merges"]))
    with pytest.raises(ValueError, match="p50k"):
        json_from_encoding(tiktoken.Encoding("p50k", **parts))


# Runs


@pytest.fixture(scope="module")
def runs(dataset_dir, tmp_path_factory):
    """Runs, by name: OSP and plain Adam, on bytes and on a tokenizer.json."""
    folder = tmp_path_factory.mktemp("runs")
    trained_tokenizer(digits=True).save(str(folder / "tokenizer.json"))
    (folder / "text.txt").write_text(made_up_text(random.Random(5), 6000), encoding="utf-8")
    prepare(folder / "data", str(folder / "tokenizer.json"), folder / "text.txt")

    def trained_run(name, data, *options):
        shape = ("--preset tiny --n-layer 2 --n-head 2 --n-embd 32 --seq-len 16 --batch-size 8 "
                 "--device cpu --steps 8")
        train.main([*shape.split(), "--data", str(data), "--out", str(folder / name), *options])
        return folder / name

    return {"osp": trained_run("osp", dataset_dir, "--osp", "--lr", "0.03"),
            "adam": trained_run("adam", dataset_dir, "--lr", "0.01"),
            "json": trained_run("json", folder / "data", "--osp", "--lr", "0.03")}


def test_checkpoints_and_four_bit_files_carry_the_tokenizer(runs, tmp_path):
    four = str(tmp_path / "four.pt")
    export.main([str(runs["json"]), "--method", "had", "--out", four, "--device", "cpu"])
    expected = trained_tokenizer(digits=True)
    for path in (runs["json"], tmp_path / "four.pt"):
        assert same_ids(load(path).encoding, expected, TEXTS)
        evaluate.main([str(path), "--device", "cpu", "--prompt", "abc", "--tokens", "3"])


# In


MODELS = {
    "MHA": {},
    "GQA": dict(num_key_value_heads=2),
    "tied": dict(tie_word_embeddings=True),
    "theta 500000": dict(rope_parameters={"rope_theta": 500000.0, "rope_type": "default"}),
    "odd vocabulary": dict(vocab_size=577, rms_norm_eps=1e-5),
    "wide heads": dict(head_dim=24, num_key_value_heads=1, tie_word_embeddings=True),
}


def hf_model(directory, max_shard_size="5GB", dtype=torch.float32, **changes):
    """A random LlamaForCausalLM, saved with a tokenizer for bytes. Its gains differ from 1."""
    torch.manual_seed(0)
    shape = dict(vocab_size=256, hidden_size=64, intermediate_size=112, num_hidden_layers=3,
                 num_attention_heads=4, max_position_embeddings=128, initializer_range=0.08)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape | changes)).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "norm" in name:
                p.uniform_(0.5, 2)
    model.to(dtype).save_pretrained(directory, max_shard_size=max_shard_size)
    text = json_from_encoding(tokenizer("bytes"))
    Path(directory, "tokenizer.json").write_text(text, encoding="utf-8")
    return model


def from_transformers(directory, dtype=torch.float32):
    return transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=dtype).eval()


def change_config(directory, **changes):
    """Change entries of config.json; None removes one."""
    path = directory / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({name: v for name, v in config.items() if v is not None}))


def some_tokens(vocab_size, T=100):
    return torch.randint(vocab_size, (2, T), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def same_logits(ours, theirs, T=100, tolerance=1e-5):
    tokens = some_tokens(ours.config.vocab_size, T)
    a, b = ours(tokens), theirs(tokens).logits
    assert b.std() > 0.1  # not a model that says nothing
    return torch.allclose(a, b, rtol=0, atol=tolerance)


def greedy(theirs, prompt, n):
    options = dict(max_new_tokens=n, do_sample=False, eos_token_id=None, pad_token_id=0)
    return theirs.generate(torch.tensor([prompt]), **options)[0, len(prompt) :].tolist()


@pytest.mark.parametrize("name", MODELS)
def test_logits_equal_those_of_transformers(name, tmp_path):
    theirs = hf_model(tmp_path / "m", **MODELS[name])
    ours = load_llama(tmp_path / "m")[0]
    assert same_logits(ours, theirs)
    assert ours.config.tie_embeddings == theirs.config.tie_word_embeddings
    prompt = some_tokens(256, 20)[0].tolist()
    assert list(generate(ours, prompt, 30, 100, temperature=0)) == greedy(theirs, prompt, 30)


def test_long_texts_agree_too(tmp_path):
    theirs = hf_model(tmp_path / "m", max_position_embeddings=2048, num_hidden_layers=1)
    assert same_logits(load_llama(tmp_path / "m")[0], theirs, T=2000)


def test_sharded_files_are_read(tmp_path):
    theirs = hf_model(tmp_path / "m", max_shard_size="100KB", num_key_value_heads=2)
    assert len(list((tmp_path / "m").glob("*.safetensors"))) > 3
    assert same_logits(load_llama(tmp_path / "m")[0], theirs)


def beside_model(m, theirs, tensors):
    """One file, and beside it a variant and what another program left."""
    for name in ("model.fp16.safetensors", "model-00001-of-00009.safetensors"):
        save_file({name: W.half() for name, W in tensors.items()}, m / name)
    theirs.save_pretrained(m, variant="fp16", max_shard_size="100KB")


def beside_shards(m, theirs, tensors):
    (m / "model.safetensors").unlink()
    theirs.save_pretrained(m, max_shard_size="100KB")
    beside_model(m, theirs, tensors)


def stray_index(m, theirs, tensors):
    """transformers prefers the single file."""
    text = json.dumps({"metadata": {}, "weight_map": {name: "gone" for name in tensors}})
    (m / "model.safetensors.index.json").write_text(text)


def renamed(m, theirs, tensors, extra=None, unindexed=()):
    (m / "model.safetensors").unlink()
    files = [dict(list(tensors.items())[i::3]) for i in range(3)]
    names = [f"{letter}/weights.safetensors" for letter in "cab"]
    weight_map = {name: file for file, part in zip(names, files) for name in part}
    for file, part in zip(names, files):
        (m / file).parent.mkdir()
        save_file(part | (extra or {}), m / file, metadata={"format": "pt"})
    weight_map = {name: file for name, file in weight_map.items() if name not in unindexed}
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (m / "model.safetensors.index.json").write_text(json.dumps(index))


def unindexed(m, theirs, tensors):
    """The index leaves out a tensor of the model, and one that it does not have."""
    renamed(m, theirs, tensors, {"model.layers.0.self_attn.q_proj.bias": torch.ones(64)},
            unindexed=["model.norm.weight"])


def twice(m, theirs, tensors):
    """Of two the last file's counts: here that of c/, which is right."""
    wrong = {"model.norm.weight": torch.ones(64)}
    first = {"model.norm.weight": tensors.pop("model.norm.weight")}
    renamed(m, theirs, {**first, **tensors})
    for file in (m / "a/weights.safetensors", m / "b/weights.safetensors"):
        save_file(load_file(file) | wrong, file, metadata={"format": "pt"})


def mixed(m, theirs, tensors):
    """bf16, and norms in fp32, as some trainers write it."""
    tensors = {name: W if "norm" in name else W.bfloat16() for name, W in tensors.items()}
    save_file(tensors, m / "model.safetensors", metadata={"format": "pt"})
    change_config(m, dtype="bfloat16")


def mixed_without_a_word(m, theirs, tensors):
    mixed(m, theirs, tensors)
    change_config(m, dtype=None)


def wide_head(m, theirs, tensors):
    tensors = {name: W if "head" in name else W.bfloat16() for name, W in tensors.items()}
    save_file(tensors, m / "model.safetensors", metadata={"format": "pt"})
    change_config(m, dtype="float32")


@pytest.mark.parametrize("arrange", [beside_model, beside_shards, stray_index, renamed, unindexed,
                                     twice, mixed, mixed_without_a_word, wide_head])
def test_the_tensors_are_those_that_transformers_finds(arrange, tmp_path):
    theirs = hf_model(tmp_path / "m")
    arrange(tmp_path / "m", theirs, load_file(tmp_path / "m/model.safetensors"))
    wanted = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "m", dtype="auto")
    found = load_llama(tmp_path / "m")[0].state_dict()
    wanted = {our_names(name): W for name, W in wanted.state_dict().items()}
    assert found.keys() == wanted.keys()
    for name, W in found.items():
        assert W.dtype == wanted[name].dtype and torch.equal(W, wanted[name]), name


def test_the_older_spelling_of_config_json_is_read(tmp_path):
    theirs = hf_model(tmp_path / "m", **MODELS["theta 500000"])
    change_config(tmp_path / "m", rope_parameters=None, dtype=None)
    path = tmp_path / "m/config.json"
    old = json.loads(path.read_text()) | {"rope_theta": 500000.0, "torch_dtype": "float32"}
    path.write_text(json.dumps(old | {"rope_scaling": None, "head_dim": None}))
    assert same_logits(load_llama(tmp_path / "m")[0], theirs)
    for name in ("num_key_value_heads", "head_dim", "architectures", "mlp_bias", "attention_bias",
                 "pretraining_tp"):
        old.pop(name, None)  # as the first LLaMA's
    path.write_text(json.dumps(old))
    assert same_logits(load_llama(tmp_path / "m")[0], theirs)


def test_theta_may_stand_in_rope_scaling(tmp_path):
    hf_model(tmp_path / "m", max_position_embeddings=128)
    scaling = {"rope_type": "default", "rope_theta": 500.0}
    change_config(tmp_path / "m", rope_parameters=None, rope_scaling=scaling, rope_theta=7000.0)
    ours = load_llama(tmp_path / "m")[0]
    assert ours.config.rope_theta == 500 and same_logits(ours, from_transformers(tmp_path / "m"))


def test_bfloat16_stays_bfloat16(tmp_path):
    hf_model(tmp_path / "m", dtype=torch.bfloat16)
    ours = load_llama(tmp_path / "m")[0]
    assert {p.dtype for p in ours.parameters()} == {torch.bfloat16}
    assert same_logits(ours.float(), from_transformers(tmp_path / "m"))


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="only Linux lists what is mapped")
def test_loading_copies_no_weights(tmp_path):
    hf_model(tmp_path / "m", tie_word_embeddings=True)
    model = load_llama(tmp_path / "m")[0]
    lines = Path("/proc/self/maps").read_text().splitlines()
    ends = [line.split()[0].split("-") for line in lines if str(tmp_path) in line]
    mapped = [range(int(start, 16), int(end, 16)) for start, end in ends]
    assert all(any(p.data_ptr() in span for span in mapped) for p in model.parameters())


def rope(**changes):
    return {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4} | changes}


@pytest.mark.parametrize("change, words", [
    ({"model_type": "mistral"}, "mistral"), ({"model_type": None}, "model_type"),
    ({"architectures": ["LlamaForSequenceClassification"]}, "SequenceClassification"),
    ({"attention_bias": True}, "attention_bias"), ({"mlp_bias": True}, "mlp_bias"),
    ({"hidden_act": "gelu"}, "gelu"), ({"pretraining_tp": 2}, "pretraining_tp"),
    ({"quantization_config": {"quant_method": "awq"}}, "awq"),
    ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "linear"),
    ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "llama3"),
    (rope(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
          original_max_position_embeddings=64), "llama3"),
    (rope(rope_type="yarn", factor=4.0), "yarn"), (rope(factor=4.0), "factor"),
    (rope(partial_rotary_factor=0.5), "partial_rotary"), (rope(rope_theta="x"), "'x'"),
    (rope(rope_theta=-1), "rope_theta"), ({"rope_parameters": [1]}, "rope_parameters"),
    ({"max_position_embeddings": "x"}, "max_position_embeddings.*'x'"),
    ({"max_position_embeddings": 1}, "max_position_embeddings is 1"),
    ({"head_dim": 15}, "head_dim"),
    ({"hidden_size": "64"}, "hidden_size.*'64'"), ({"hidden_size": None}, "hidden_size"),
    ({"num_attention_heads": 0}, "zero"), ({"num_key_value_heads": 3}, "divisible"),
    ({"num_key_value_heads": -4}, "n_kv_head"), ({"head_dim": -16}, "negative dimension"),
    ({"rms_norm_eps": -1.0}, "norm_eps"), ({"num_hidden_layers": True}, "num_hidden_layers"),
    ({"num_hidden_layers": 2}, r"Unexpected key.*model\.layers\.2\.input_layernorm"),
    ({"num_hidden_layers": 4}, r"Missing key.*model\.layers\.3\.input_layernorm"),
    ({"num_hidden_layers": 10**8}, "100000000 layers of 30 tensors"),  # at once
    ({"vocab_size": 257}, r"lm_head.*\[257, 64\]"), ({"tie_word_embeddings": "yes"}, "'yes'"),
])
def test_what_our_model_cannot_be_is_refused_by_name(change, words, tmp_path):
    hf_model(tmp_path / "m")
    config = json.loads((tmp_path / "m/config.json").read_text())
    (tmp_path / "m/config.json").write_text(json.dumps(config | change))
    with pytest.raises(ValueError, match=words) as error:
        load_llama(tmp_path / "m")
    assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)


def test_damaged_directories_are_refused_in_one_line(tmp_path):
    def check(words, damage, **changes):
        m = tmp_path / f"m{len(list(tmp_path.iterdir()))}"
        hf_model(m, **changes)
        damage(m)
        with pytest.raises((ValueError, FileNotFoundError), match=words) as error:
            load_llama(m)
        assert str(m) in str(error.value) and "\n" not in str(error.value)

    def config(text):
        return lambda m: (m / "config.json").write_bytes(text)

    def weights(content):
        return lambda m: (m / "model.safetensors").write_bytes(content)

    def rewrite(**changes):
        def damage(m):
            tensors = load_file(m / "model.safetensors") | changes
            tensors = {name: W for name, W in tensors.items() if W is not None}
            save_file(tensors, m / "model.safetensors", metadata={"format": "pt"})
        return damage

    def cut_off(m):
        (m / "model.safetensors").write_bytes((m / "model.safetensors").read_bytes()[:-10])

    def index(content):
        return lambda m: (m / "model.safetensors.index.json").write_text(content)

    head = torch.zeros(256, 64)
    check("model.safetensors is missing or damaged: No such file", lambda m: (m / "model.safetensors").unlink())
    check(r"00002-of-.*is missing or damaged: No such file", lambda m: next(m.glob("*00002*")).unlink(),
          max_shard_size="100KB")
    check("index.json has no weight_map", index("{}"), max_shard_size="100KB")
    check("index.json cannot be used", index("[]"), max_shard_size="100KB")
    check("0 tensors", index('{"weight_map": {}}'), max_shard_size="100KB")
    check("config.json", config(b"{"))
    check("config.json.*not UTF-8", config(b"\xff\xfe{"))
    check("config.json", config(b"[]"))
    check("config.json", config(b"[" * 100000))
    check("damaged", cut_off)
    check("damaged", weights(b""))
    check("damaged", weights(b"\xff" * 100))
    check("Missing.*model.norm.weight", rewrite(**{"model.norm.weight": None}))
    bias = "model.layers.0.self_attn.q_proj.bias"
    check(f"Unexpected.*{bias}", rewrite(**{bias: torch.zeros(64)}))
    check(r"\[256, 65\]", rewrite(**{"lm_head.weight": torch.zeros(256, 65)}))
    check("float32 and int64", rewrite(**{"lm_head.weight": head.long()}))
    check("float16 and float32", rewrite(**{"lm_head.weight": head.half()}))
    check("float16: only float32", lambda m: None, dtype=torch.float16)
    check("no tokenizer.json", lambda m: (m / "tokenizer.json").unlink())
    check("tokenizer.json cannot be used", lambda m: (m / "tokenizer.json").write_text("{}"))
    check("256 ids.* only 250", lambda m: None, vocab_size=250)


def test_buffers_and_doubled_heads_of_old_checkpoints_are_ignored(tmp_path):
    theirs = hf_model(tmp_path / "m", tie_word_embeddings=True)
    path = tmp_path / "m/model.safetensors"
    tensors = load_file(path)
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(8)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, path, metadata={"format": "pt"})
    assert same_logits(load_llama(tmp_path / "m")[0], theirs)
    tensors["lm_head.weight"][3, 5] += 1  # a head of its own, which config.json denies
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="lm_head.weight is not the embedding"):
        load_llama(tmp_path / "m")


# Out


def exported(run, directory):
    export.main([str(run), "--hf", str(directory), "--device", "cpu"])
    return from_transformers(directory, dtype="auto")


@pytest.mark.parametrize("name", ["osp", "adam", "json"])
def test_an_exported_run_is_the_same_model_in_transformers(name, runs, tmp_path):
    theirs, run = exported(runs[name], tmp_path / "m"), load(runs[name])
    assert type(theirs).__name__ == "LlamaForCausalLM" and theirs.dtype == torch.float32
    assert theirs.config.eos_token_id == separator(run.encoding)
    assert same_logits(run.model, theirs)
    their_tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "m")
    assert their_tokenizer.eos_token == their_tokenizer.pad_token == "<|endoftext|>"
    for text in TEXTS:
        if "<|endoftext|>" not in text and "\0" not in text:
            ids = encode(run.encoding, text).tolist()
            assert their_tokenizer(text, add_special_tokens=False)["input_ids"] == ids
            assert their_tokenizer.decode(ids) == run.encoding.decode(ids)
    prompt = encode(run.encoding, "abc def").tolist()
    assert list(generate(run.model, prompt, 8, 16, temperature=0)) == greedy(theirs, prompt, 8)


def test_ss_norm_is_exported_as_a_constant_vector(runs, tmp_path):
    exported(runs["osp"], tmp_path / "m")
    tensors = load_file(tmp_path / "m/model.safetensors")
    gains = {name: t for name, t in tensors.items() if "norm" in name}
    assert len(gains) == 5
    assert all(t.shape == (32,) and (t == t[0]).all() for t in gains.values())
    assert not any("embproj" in name for name in tensors)


def test_the_round_trip_is_exact(runs, tmp_path):
    exported(runs["osp"], tmp_path / "a")
    read_back = load_llama(tmp_path / "a")[0].state_dict()
    assert load(tmp_path / "a").encoding.name == "bytes"
    for name, W in load(runs["osp"]).model.fold().state_dict().items():
        assert torch.equal(W, read_back[name]), name
    export.main([str(tmp_path / "a"), "--hf", str(tmp_path / "b"), "--device", "cpu"])
    for file in ("model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes(), file


@pytest.mark.parametrize("changes", [
    dict(tie_word_embeddings=True),
    dict(max_position_embeddings=9999, dtype=torch.bfloat16),
    dict(eos_token_id=[3, 4], bos_token_id=None, **rope(rope_theta=5e5)),
    dict(unk_token_id=5, pad_token_id=0, sep_token_id=7, decoder_start_token_id=2),
])
def test_what_comes_in_goes_out_with_the_same_tensors(changes, tmp_path):
    hf_model(tmp_path / "m", **changes)
    save_llama_to(tmp_path / "out", load_llama(tmp_path / "m"))
    before, after = (load_file(tmp_path / d / "model.safetensors") for d in ("m", "out"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    before, after = (json.loads((tmp_path / d / "config.json").read_text()) for d in ("m", "out"))
    for name in ("architectures", "max_position_embeddings", "bos_token_id", "eos_token_id",
                 "tie_word_embeddings", "head_dim", "rope_parameters", "dtype",
                 *(name for name in {**before, **after} if "token_id" in name)):
        assert before[name] == after[name]
    assert after["rope_theta"] == after["rope_parameters"]["rope_theta"]  # the older spelling


def save_llama_to(directory, loaded, **options):
    model, run_options, data = loaded
    save_llama(model, directory, run_options, data, **options)


CHAT = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<pad>{% endfor %}"


def chat_model(directory, chat_in_config=False, **changes):
    """A random model, with all that goes with a chat model, saved by transformers. Its tokenizer
    puts a token before a text and another one behind it."""
    inner = trained_tokenizer(digits=True)
    inner.add_special_tokens(["<|im_end|>", "<pad>"])
    ends = [(word, inner.token_to_id(word)) for word in ("<|im_start|>", "<|im_end|>")]
    inner.post_processor = tokenizers.processors.TemplateProcessing(
        single="<|im_start|> $A <|im_end|>", pair=None, special_tokens=ends)
    shape = dict(vocab_size=inner.get_vocab_size(), bos_token_id=ends[0][1], pad_token_id=5)
    theirs = hf_model(directory, **dict(shape, eos_token_id=[ends[1][1], 0]) | changes)
    theirs.generation_config.update(temperature=0.3, top_k=7, do_sample=True)
    theirs.generation_config.save_pretrained(directory)
    named = dict(bos_token="<|im_start|>", eos_token="<|im_end|>", unk_token="<|endoftext|>",
                 pad_token="<pad>", additional_special_tokens=["<|im_start|>"])
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, model_max_length=4321, padding_side="left", **named)
    fast.chat_template = CHAT
    fast.save_pretrained(directory)
    if chat_in_config:  # as until 2025
        path = directory / "tokenizer_config.json"
        (directory / "chat_template.jinja").unlink()
        path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": CHAT}))
        (directory / "special_tokens_map.json").write_text(json.dumps(named))
    return theirs


@pytest.mark.parametrize("chat_in_config", [False, True])
def test_all_that_goes_with_a_chat_model_comes_out_as_it_went_in(chat_in_config, tmp_path):
    chat_model(tmp_path / "m", chat_in_config, max_position_embeddings=4321)
    export.main([str(tmp_path / "m"), "--hf", str(tmp_path / "out"), "--device", "cpu"])
    names = {path.name for path in (tmp_path / "m").iterdir()}
    assert names | {"README.md"} == {path.name for path in (tmp_path / "out").iterdir()}
    for name in names - {"config.json", "model.safetensors"}:
        assert (tmp_path / "m" / name).read_bytes() == (tmp_path / "out" / name).read_bytes(), name
    pairs = [transformers.AutoTokenizer.from_pretrained(tmp_path / d) for d in ("m", "out")]
    for what in ("special_tokens_map", "model_max_length", "padding_side", "chat_template",
                 "pad_token_id", "eos_token_id", "bos_token_id", "unk_token_id"):
        before, after = (getattr(tokenizer, what) for tokenizer in pairs)
        assert before == after and after not in (None, {}), what
    batch = ["abc def", "ab", made_up_text(random.Random(2), 9)]
    before, after = (dict(tokenizer(batch, padding=True)) for tokenizer in pairs)
    assert before == after
    first, last = (pairs[0].convert_tokens_to_ids(w) for w in ("<|im_start|>", "<|im_end|>"))
    rows = [[i for i in row if i != pairs[0].pad_token_id] for row in after["input_ids"]]
    assert all((row[0], row[-1]) == (first, last) for row in rows)  # the post-processor is there
    chat = [{"role": "user", "content": "abc"}]
    before, after = (tokenizer.apply_chat_template(chat, tokenize=False) for tokenizer in pairs)
    assert before == after == "<|im_start|>user\nabc<pad>"
    models = [from_transformers(tmp_path / d) for d in ("m", "out")]
    a, b = (model.generation_config.to_dict() for model in models)
    assert a == b and (b["temperature"], b["eos_token_id"]) == (0.3, [last, 0])
    a, b = (model.config.to_dict() for model in models)
    assert {k for k in a if b[k] != a[k]} <= {"_name_or_path", "initializer_range"}
    assert "4,321 tokens" in (tmp_path / "out/README.md").read_text()


def test_files_that_a_checkpoint_carries_can_only_go_where_they_belong(runs, tmp_path):
    state = torch.load(runs["osp"] / "ckpt.pt", weights_only=True)
    wrong = [dict(hf_files=files) for files in (
        {"../evil": ""}, {"/tmp/evil": ""}, {"additional_chat_templates/../../x": ""},
        {"chat_template.jinja": 3}, ["chat_template.jinja"])]
    wrong += [dict(end_ids=["0"]), dict(end_ids=0), dict(hf_config=3),
              dict(hf_config=dict(max_position_embeddings="9"))]
    for change in wrong:
        torch.save(state | dict(options=state["options"] | change), tmp_path / "x.pt")
        with pytest.raises(ValueError, match="x.pt says impossible things"):
            load(tmp_path / "x.pt")


@pytest.mark.parametrize("name", ["osp", "json", "llama"])
def test_a_pad_token_is_named_so_that_batches_work(name, runs, tmp_path):
    """Also for a directory that has no other file than it must have, or names no pad token."""
    if name == "llama":
        chat_model(tmp_path / "in", eos_token_id=0)
        for path in ("generation_config.json", "chat_template.jinja"):
            (tmp_path / "in" / path).unlink()
        path = tmp_path / "in/tokenizer_config.json"
        config = {name: value for name, value in json.loads(path.read_text()).items()
                  if name not in ("pad_token", "padding_side")}
        path.write_text(json.dumps(config | {"padding_side": "left"}))
    theirs = exported(tmp_path / "in" if name == "llama" else runs[name], tmp_path / "m")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "m")
    assert tokenizer.pad_token == tokenizer.eos_token is not None
    assert tokenizer.model_max_length == 4321 if name == "llama" else 16
    texts, options = ["abc def", "ab", "a"], dict(max_new_tokens=8, do_sample=False)
    options |= dict(eos_token_id=[], pad_token_id=tokenizer.pad_token_id)
    batch = tokenizer(texts, padding=True, return_tensors="pt", add_special_tokens=False)
    together = theirs.generate(**{k: batch[k] for k in ("input_ids", "attention_mask")}, **options)
    for row, text in zip(together, texts):
        ids = tokenizer(text, return_tensors="pt", add_special_tokens=False)["input_ids"]
        alone = theirs.generate(ids, **options)[0]
        assert row[-len(alone) :].tolist() == alone.tolist()


def test_a_directory_with_nothing_but_its_tokenizer_json_gets_a_pad_token_too(tmp_path):
    hf_model(tmp_path / "m", max_position_embeddings=5000)
    exported(tmp_path / "m", tmp_path / "out")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer(["a", "abc"], padding=True)["input_ids"] == [[0, 0, 97], [97, 98, 99]]
    assert tokenizer.model_max_length == 5000 and tokenizer.pad_token == "<|endoftext|>"


@pytest.mark.skipif(sys.platform == "win32", reason="there is no umask")
@pytest.mark.parametrize("umask", [0o022, 0o027, 0o077])
def test_exported_files_follow_the_umask(umask, tmp_path):
    hf_model(tmp_path / "m")
    loaded, before = load_llama(tmp_path / "m"), os.umask(umask)
    try:
        save_llama_to(tmp_path / "out", loaded, shard_size="100KB")
        (tmp_path / "like").write_text("")
    finally:
        os.umask(before)
    modes = {path.name: path.stat().st_mode for path in (tmp_path / "out").iterdir()}
    assert sum(name.endswith(".safetensors") for name in modes) > 1
    assert set(modes.values()) == {(tmp_path / "like").stat().st_mode}


def test_large_models_are_written_in_several_files(tmp_path):
    theirs = hf_model(tmp_path / "m")
    loaded = load_llama(tmp_path / "m")
    save_llama_to(tmp_path / "out", loaded, shard_size="200KB")
    assert len(list((tmp_path / "out").glob("model-*-of-00004.safetensors"))) == 4
    assert same_logits(load_llama(tmp_path / "out")[0], theirs)
    assert same_logits(loaded[0], from_transformers(tmp_path / "out"))


def test_the_model_card_says_how_it_was_trained_and_its_kurtosis(runs, tmp_path):
    exported(runs["osp"], tmp_path / "m")
    card = (tmp_path / "m/README.md").read_text(encoding="utf-8")
    last = json.loads((runs["osp"] / "log.jsonl").read_text().splitlines()[-1])
    for words in ("| optimizer | muon |", "| norm | ss |", "| steps | 8 |",
                  f"{last['val_loss']:.4f} nats", f"{last['bits_per_byte']:.4f}.",
                  f"{last['kurtosis']:.3f}", f"{last['kurtosis_floor']:.3f}",
                  "library_name: transformers"):
        assert words in card
    data = Path(load_checkpoint(runs["osp"])["options"]["data"])
    assert f"| data | {data.name} |" in card and str(data.parent) not in card  # no private paths


def test_an_export_is_whole_or_not_there(runs, tmp_path, monkeypatch):
    (tmp_path / "there").mkdir()
    model = load(runs["osp"]).model
    with pytest.raises(FileExistsError, match="there exists"):
        save_llama(model, tmp_path / "there", OPTIONS, DATA)
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(FileExistsError, match="link exists"):
        save_llama(model, tmp_path / "link", OPTIONS, DATA)
    with pytest.raises(OSError, match="could not write .*No such file"):
        save_llama(model, tmp_path / "no/m", OPTIONS, DATA)
    with pytest.raises(ValueError, match="quantized"):
        save_llama(Q.quantize(model, Q.Recipe("4-4-4", "rtn")), tmp_path / "q", OPTIONS, DATA)

    def disk_full(*args, **kwargs):
        import safetensors
        message = "I/O error: No space left on device (os error 28)"
        raise safetensors.SafetensorError(message)

    monkeypatch.setattr(transformers.modeling_utils, "safe_save_file", disk_full)
    with pytest.raises(OSError, match="could not write .*No space left"):
        save_llama(model, tmp_path / "full", OPTIONS, DATA)
    assert {path.name for path in tmp_path.iterdir()} == {"there", "link"}


def test_without_transformers_one_line_says_what_to_install(runs, tmp_path, monkeypatch):
    exported(runs["osp"], tmp_path / "m")
    monkeypatch.setitem(sys.modules, "transformers", None)
    for target in (runs["osp"], tmp_path / "m"):
        with pytest.raises(SystemExit, match="transformers: pip install -r requirements-extra.txt"):
            export.main([str(target), "--hf", str(tmp_path / "out"), "--device", "cpu"])


def test_options_with_the_value_that_they_have_anyway_are_not_refused(runs, tmp_path):
    for argv in (["--seed", "0"], ["--bits", "4-16-16", "--method", "rtn", "--seed", "0"]):
        export.main([str(runs["osp"]), "--hf", str(tmp_path / f"m{len(argv)}"), *argv,
                     "--device", "cpu"])
    assert (tmp_path / "m2/config.json").exists() and (tmp_path / "m6/config.json").exists()


def test_options_of_export_that_cannot_be_are_exit_code_2(runs, tmp_path, capsys):
    run, m = str(runs["osp"]), str(tmp_path / "m")
    for argv, words in [
            ([], "--out --hf"), (["--hf", m, "--out", m], "not allowed"),
            (["--hf", str(tmp_path)], "exists"), (["--hf", str(tmp_path / "a/b")], "exists"),
            (["--hf", m, "--method", "rtn"], "--method goes with --out"),
            (["--hf", m, "--no-clip"], "--no-clip")]:
        with pytest.raises(SystemExit) as error:
            export.main([run, *argv])
        assert error.value.code == 2 and words in capsys.readouterr().err.splitlines()[-1]
    assert list(tmp_path.iterdir()) == []


# As a TARGET


def test_eval_and_quantize_take_a_hugging_face_directory(tmp_path, capsys):
    m, four, file = (str(tmp_path / name) for name in ("m", "q.pt", "text.txt"))
    hf_model(m, max_position_embeddings=32)
    Path(file).write_text(made_up_text(random.Random(7), 400), encoding="utf-8")
    text = ["--text", file, "--device", "cpu"]
    export.main([m, "--method", "gptq", "--calib", file, "--out", four, "--device", "cpu"])
    capsys.readouterr()
    evaluate.main([m, four, *text, "--json"])
    exact, rounded = json.loads(capsys.readouterr().out)
    assert exact["target"] == "m" and exact["label"] == "LLaMA"
    assert rounded["label"] == "LLaMA, gptq 4-4-4" and exact["val_loss"] != rounded["val_loss"]
    ids = torch.tensor(list(Path(file).read_bytes()))
    blocks = ids[: len(ids) // 32 * 32].view(-1, 32)
    with torch.no_grad():
        loss = from_transformers(m)(blocks, labels=blocks).loss.item()
    assert exact["val_loss"] == pytest.approx(loss, abs=1e-5)
    evaluate.main([m, "--prompt", "abc", "--tokens", "5", "--device", "cpu"])
    evaluate.main([m, *text, "--bits", "4-4-4", "--methods", "had", "--json"])
    row = json.loads(capsys.readouterr().out.splitlines()[-1])[0]
    assert row["quantized"]["4-4-4"]["had"]["added"] != 0


def name_ends(directory, config=None, generation=None, word=None, special=None):
    """Say in each of a model's files which ids, or which token, end a text."""
    change_config(directory, eos_token_id=config)
    for file, key, value in [("generation_config.json", "eos_token_id", generation),
                             ("tokenizer_config.json", "eos_token", word),
                             ("special_tokens_map.json", "eos_token", special)]:
        (directory / file).write_text(json.dumps({} if value is None else {key: value}))


def test_writing_ends_where_any_file_of_the_model_says_so(tmp_path, capsys):
    """Against generate() of transformers, which is told all the ids."""
    m, argv = str(tmp_path / "m"), ["--json", "--device", "cpu"]
    theirs, prompt = hf_model(m, initializer_range=0.3), list(b"abc")
    letters = [i for i in greedy(theirs, prompt, 60) if 32 < i < 127]
    a, b, c, d, *more = reversed(list(dict.fromkeys(letters))[:8])  # the last one comes first
    assert len(more) == 4
    cases = [(dict(config=a), [a]), (dict(config=[a, b, 300, -1]), [a, b]),
             (dict(config=a, generation=b), [a, b]), (dict(generation=[a, c]), [a, c]),
             (dict(config=a, generation=[a, b], word=f"<0x{d:02X}>"), [a, b, d]),
             (dict(config=a, special={"content": f"<0x{c:02X}>"}), [a, c])]
    for named, ids in cases:
        name_ends(tmp_path / "m", **named)
        options = dict(max_new_tokens=60, do_sample=False, eos_token_id=ids, pad_token_id=0)
        *want, last = theirs.generate(torch.tensor([prompt]), **options)[0].tolist()
        assert last in ids and len(want) < 60
        text = tokenizer("bytes").decode(want)
        writing = [m, "--prompt", "abc", "--tokens", "60", "--temperature", "0"]
        evaluate.main([*writing, *argv])
        assert json.loads(capsys.readouterr().out)[0]["text"] == text
        evaluate.main([*writing, "--device", "cpu"])
        out, err = capsys.readouterr()
        assert out == text + "\n" and err.startswith(f"{len(want) - 3} tokens")


def test_gaps_of_a_vocabulary_and_rows_beyond_it_are_never_drawn(tmp_path, capsys):
    m = str(tmp_path / "m")
    hf_model(m, vocab_size=300, initializer_range=0.3, eos_token_id=150)  # one of the gaps
    path = tmp_path / "m/tokenizer.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    vocab = content["model"]["vocab"]
    content["model"]["vocab"] = {word: i for word, i in vocab.items() if i == 0 or 32 < i < 123}
    path.write_text(json.dumps(content))
    words = tokenizers.Tokenizer.from_file(str(path))
    missing = [i for i in range(300) if words.id_to_token(i) is None]
    assert 150 in missing and len(missing) == 300 - 91
    loaded = load(m)
    assert without_token(loaded.encoding, 300) == missing
    drawn = list(generate(loaded.model, [97], 400, 100, temperature=5, never=missing))
    assert not set(drawn) & set(missing) and len(set(drawn)) > 60
    argv = [m, "--prompt", "a", "--tokens", "40", "--json", "--device", "cpu", "--temperature"]
    for temperature in ("0", "5"):
        evaluate.main([*argv, temperature])
        text = json.loads(capsys.readouterr().out)[0]["text"]
        assert len(text) == 41  # every step wrote a letter


def test_without_a_named_end_the_separator_ends_a_text_and_a_bad_file_is_named(tmp_path):
    hf_model(tmp_path / "m")
    name_ends(tmp_path / "m")
    loaded = load(tmp_path / "m")
    assert loaded.end_ids == [separator(loaded.encoding)]
    for content in ("[1]", "{", "[" * 100000):
        (tmp_path / "m/generation_config.json").write_text(content)
        with pytest.raises(ValueError, match="generation_config.json cannot be used"):
            load(tmp_path / "m")


def test_a_four_bit_file_remembers_where_text_ends(tmp_path):
    hf_model(tmp_path / "m", eos_token_id=[7, 5])
    argv = str(tmp_path / "m"), "--out", str(tmp_path / "q.pt"), "--device", "cpu"
    export.main([*argv, "--method", "rtn"])
    assert load(tmp_path / "q.pt").end_ids == load(tmp_path / "m").end_ids == [5, 7]


def test_a_prompt_has_the_length_that_the_model_itself_names(tmp_path, capsys):
    m = str(tmp_path / "m")
    theirs = hf_model(m, max_position_embeddings=3000, num_hidden_layers=1, eos_token_id=0)
    prompt = "".join(random.Random(3).choices("abcdefg ", k=2500))
    argv = [m, "--prompt", prompt, "--tokens", "20", "--temperature", "0", "--device", "cpu"]
    evaluate.main([*argv, "--json"])
    out, err = capsys.readouterr()
    want = greedy(theirs, list(prompt.encode()), 20)
    assert json.loads(out)[0]["text"] == prompt + tokenizer("bytes").decode(want)
    assert "forgot" not in err and load(m).seq_len == 2048  # to measure on
    evaluate.main([*argv, "--seq-len", "2500"])
    assert "exceed the window of 2,500: the oldest were forgotten" in capsys.readouterr().err


def test_a_model_without_data_of_its_own_asks_for_text(tmp_path):
    m = str(tmp_path / "m")
    hf_model(m)
    with pytest.raises(SystemExit, match="--text FILE"):
        evaluate.main([m, "--device", "cpu"])
    with pytest.raises(SystemExit, match="--calib FILE"):
        export.main([m, "--out", str(tmp_path / "q.pt"), "--device", "cpu"])
    (tmp_path / "m/config.json").write_text("{}")
    with pytest.raises(SystemExit, match="model_type"):
        evaluate.main([m, "--device", "cpu"])
