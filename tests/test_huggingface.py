"""Hugging Face directories and tokenizers, against the transformers and tokenizers libraries themselves."""

import copy
import glob
import json
import pickle
import random
import sys
from pathlib import Path

import pytest
import tiktoken
import torch

import eval as evaluation
from tools import huggingface
import quantize as Q
import train
from data.bpe import LETTER_OF, encoding_from_json, json_from_encoding, merges_of
from data.prepare import prepare
from data.dataset import Dataset, read_meta, separator, tokenizer, tokenizer_of
from eval import generate
from tools.huggingface import load_llama, save_llama
from model import load_checkpoint

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")
safetensors = pytest.importorskip("safetensors.torch")
load_file, save_file = safetensors.load_file, safetensors.save_file

DATA = {"tokenizer": "bytes"}
OPTIONS = {"imported": "test", "seq_len": 64}

# ---------------------------------------------------------------------------------------------------------------------
# Tokenizers


def made_up_text(rng, n):
    words = ["".join(rng.choices("abcdefghijéß—", k=rng.randint(1, 7))) for _ in range(60)]
    between = [" ", "  ", "\n", "\n\n", ", ", ". ", "'s ", "'ll ", "1 ", "23", " 4567 ", "\t"]
    return "".join(rng.choice(words) + rng.choice(between) for _ in range(n))


def trained(kind, alphabet=None):
    """A tokenizer of the `tokenizers` library as GPT-2's or SmolLM's, trained on made-up text."""
    t = tokenizers.Tokenizer(tokenizers.models.BPE())
    byte_level = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    digits = tokenizers.pre_tokenizers.Digits(individual_digits=True)
    t.pre_tokenizer = byte_level if kind == "gpt2" else tokenizers.pre_tokenizers.Sequence([digits, byte_level])
    t.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet() if alphabet is None else alphabet
    special = ["<|endoftext|>", "<|im_start|>"]
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=600, special_tokens=special, initial_alphabet=alphabet, show_progress=False)
    t.train_from_iterator([made_up_text(random.Random(1), 4000)], trainer)
    return t


@pytest.fixture(scope="module")
def theirs():
    """gpt2: all bytes. smollm: all but the bytes that SmolLM lacks. gaps: only the bytes of the training text."""
    full = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    lacking = {LETTER_OF[b] for b in (4, 6, 0x13, 0x14, 0x16, 0x1D, 0xC0, 0xC1, 0xF1, 0xF2, *range(0xF5, 0x100))}
    return {"gpt2": trained("gpt2"), "smollm": trained("smollm", [c for c in full if c not in lacking]),
            "gaps": trained("smollm", [])}


def random_strings(n):
    """Strings of blanks, digits of many scripts, letters, signs, control characters and contractions."""
    rng = random.Random(0)
    pools = [range(0x20, 0x7F), range(0x20), range(0x80, 0x250), range(0x250, 0xD800), range(0xE000, 0x10000),
             range(0x10000, 0x20000), [0x20, 0xA0, 0x2003, 0x3000, 9, 10, 13, 0x85, 0x2028],
             [0x30, 0x664, 0xBD, 0xB2, 0x2167], [4, 6, 0x13, 0x14, 0x16, 0x1D]]
    ends = ["'s", "'ll", "'t", " 1", "<|endoftext", "  ", ""]
    for _ in range(n):
        pool = rng.choices(pools, k=3)
        yield "".join(chr(rng.choice(rng.choice(pool))) for _ in range(rng.randint(0, 20))) + rng.choice(ends)


def differences(ours, theirs, texts):
    texts = list(texts)
    expected = [e.ids for e in theirs.encode_batch(texts, add_special_tokens=False)]
    return [text for text, a, b in zip(texts, ours.encode_ordinary_batch(texts), expected) if a != b]


def test_a_tokenizer_json_gives_the_ids_of_the_tokenizers_library(theirs):
    paths = sorted(glob.glob(torch.__path__[0] + "/nn/modules/*.py"))
    texts = [made_up_text(random.Random(2), 3000), *(Path(path).read_text(encoding="utf-8") for path in paths)]
    assert sum(map(len, texts)) > 500_000
    for name in ("gpt2", "smollm", "gaps"):
        ours = encoding_from_json(theirs[name].to_str())
        assert ours.n_vocab == theirs[name].get_vocab_size()
        assert differences(ours, theirs[name], texts) == []


def test_ids_agree_on_random_unicode_also_where_bytes_are_missing(theirs):
    for name, n in (("gpt2", 20000), ("smollm", 20000), ("gaps", 3000)):
        ours = encoding_from_json(theirs[name].to_str())
        assert differences(ours, theirs[name], random_strings(n)) == []
    assert len(ours.missing) > 100


def test_dropped_bytes_join_their_neighbours_but_no_pieces(theirs):
    smollm = encoding_from_json(theirs["smollm"].to_str())
    assert bytes([4]) in bytes(smollm.missing)
    cases = ["ab\x04cd", ", \x04. ", "\x04", "", "  \x04  a", "1\x042", "'\x04s", "\U00040000", "a\U00080000b"]
    assert differences(smollm, theirs["smollm"], cases) == []
    half_a_pair = "ab\x04cd \ud800"  # as text can come out of JSON
    assert smollm.encode_ordinary(half_a_pair) == smollm.encode_ordinary("ab\x04cd ?")


def test_a_tokenizer_survives_pickling_as_processes_need_it(theirs):
    ours = encoding_from_json(theirs["smollm"].to_str())
    again = pickle.loads(pickle.dumps(ours))
    assert again.encode_ordinary("hi\x04 12") == ours.encode_ordinary("hi\x04 12") and again.missing == ours.missing


def test_special_tokens_are_ids_but_never_come_out_of_text(theirs):
    ours = encoding_from_json(theirs["gpt2"].to_str())
    assert separator(ours) == ours.encode_single_token("<|endoftext|>") == 0
    assert 0 not in ours.encode_ordinary("<|endoftext|>") and ours.decode([0]) == "<|endoftext|>"


def test_the_older_spelling_of_merges_is_read_too(theirs):
    parts = json.loads(theirs["gpt2"].to_str())
    parts["model"]["merges"] = [" ".join(m) if isinstance(m, list) else m for m in parts["model"]["merges"]]
    del parts["model"]["type"]  # GPT-2's own file is that old
    assert differences(encoding_from_json(json.dumps(parts)), theirs["gpt2"], ["hello abc, def's 12"]) == []


def test_bytes_can_be_written_as_a_tokenizer_json():
    text = json_from_encoding(tokenizer("bytes"))
    theirs = tokenizers.Tokenizer.from_str(text)
    sample = [*random_strings(500), "a\0bÿĀ", made_up_text(random.Random(3), 200)]
    for ours in (tokenizer("bytes"), encoding_from_json(text)):
        assert differences(ours, theirs, sample) == []
    assert separator(encoding_from_json(text)) == 0 and theirs.decode(list("Zoë — 1".encode())) == "Zoë — 1"


def test_merges_are_found_again_from_ids_alone(theirs):
    listed = json.loads(theirs["gpt2"].to_str())["model"]["merges"]
    ours = encoding_from_json(theirs["gpt2"].to_str())
    ranks = {token: ours.encode_single_token(token) for token in ours.token_byte_values()}
    assert len(merges_of(ranks)) == len(listed) > 150
    parts = dict(pat_str=ours._pat_str, mergeable_ranks=ranks, special_tokens={"<|endoftext|>": 0})
    again = tokenizers.Tokenizer.from_str(json_from_encoding(tiktoken.Encoding("r50k_base", **parts)))
    assert differences(ours, again, [made_up_text(random.Random(4), 500), *random_strings(200)]) == []
    with pytest.raises(ValueError, match="p50k"):
        json_from_encoding(tiktoken.Encoding("p50k", **parts))


def changed(parts, path, value):
    parts = copy.deepcopy(parts)
    where = parts
    for key in path[:-1]:
        where = where[key]
    where[path[-1]] = value
    return json.dumps(parts)


def test_a_tokenizer_that_tiktoken_cannot_be_is_refused_in_one_line(theirs):
    parts = json.loads(theirs["smollm"].to_str())
    merges = parts["model"]["merges"]
    swapped = [merges[1], merges[0], *merges[2:]]
    common = [dict(parts["added_tokens"][0], content="  ", special=False, id=9999)]
    byte_level = {"type": "ByteLevel", "add_prefix_space": True, "use_regex": True}
    cases = [(("model", "type"), "Unigram", "Unigram, not BPE"), (("model", "vocab", "▁the"), 700, "'▁the'"),
             (("model", "byte_fallback"), True, "byte-level"), (("model", "merges"), swapped, "order"),
             (("model", "merges"), merges[:-1], "order"), (("model", "vocab", "Q"), 5, "different"),
             (("model", "vocab", "Q"), -1, "whole"), (("model", "vocab", "Q"), "1", "whole"),
             (("model", "end_of_word_suffix"), "</w>", "end_of_word_suffix"), (("model", "dropout"), 0.1, "dropout"),
             (("model", "unk_token"), "<unk>", "unknown"), (("normalizer",), {"type": "NFC"}, "NFC"),
             (("added_tokens",), common, "not special"), (("pre_tokenizer",), None, "pre-tokenizer"),
             (("pre_tokenizer",), {"type": "Metaspace"}, "Metaspace"),
             (("pre_tokenizer",), {"type": "Sequence", "pretokenizers": []}, "its pre-tokenizer is Sequence"),
             (("added_tokens", 0, "id"), 60000, "has the id 60000, but 0 in vocab"),
             (("pre_tokenizer",), byte_level, "add_prefix_space"),
             (("pre_tokenizer", "pretokenizers", 0, "individual_digits"), False, "Digits"),
             (("model", "vocab"), [["a", 1]], "not a tokenizer.json"), (("model",), {}, "not a tokenizer.json"),
             (("model", "merges"), [["a"]], "order")]
    for path, value, words in cases:
        with pytest.raises(ValueError, match="^my.json cannot be used: ") as error:
            encoding_from_json(changed(parts, path, value), "my.json")
        assert words in str(error.value) and "\n" not in str(error.value)
    for text in ("", "{", "[]", "3", "null", "[" * 100000):
        with pytest.raises(ValueError, match="cannot be used"):
            encoding_from_json(text)


# ---------------------------------------------------------------------------------------------------------------------
# Datasets and runs made with a tokenizer.json


@pytest.fixture(scope="module")
def json_dataset(theirs, tmp_path_factory):
    """A dataset of made-up text, tokenized with the SmolLM-like tokenizer.json."""
    folder = tmp_path_factory.mktemp("json")
    (folder / "tokenizer.json").write_text(theirs["smollm"].to_str(), encoding="utf-8")
    (folder / "text.txt").write_text(made_up_text(random.Random(5), 6000), encoding="utf-8")
    prepare(folder / "data", str(folder / "tokenizer.json"), folder / "text.txt")
    return folder / "data"


def trained_run(data, out, *options):
    shape = "--preset tiny --n-layer 2 --n-head 2 --n-embd 32 --seq-len 16 --batch-size 8 --device cpu --steps 8"
    train.main([*shape.split(), "--data", str(data), "--out", str(out), *options])
    return out


@pytest.fixture(scope="module")
def runs(json_dataset, dataset_dir, tmp_path_factory):
    """Runs, by name: OSP and plain Adam, on bytes and on a tokenizer.json."""
    folder = tmp_path_factory.mktemp("runs")
    return {"osp": trained_run(dataset_dir, folder / "osp", "--osp", "--lr", "0.03"),
            "adam": trained_run(dataset_dir, folder / "adam", "--lr", "0.01"),
            "json": trained_run(json_dataset, folder / "json", "--osp", "--lr", "0.03")}


def test_a_dataset_carries_its_tokenizer_json(json_dataset, theirs):
    meta = read_meta(json_dataset)
    assert meta["tokenizer"] == "tokenizer.json" and meta["tokenizer_json"] == theirs["smollm"].to_str()
    assert tokenizer(str(json_dataset)).encode_ordinary("abc 12") == tokenizer_of(meta).encode_ordinary("abc 12")
    window = Dataset(json_dataset, "val", 30).windows([0])[0]
    assert window[0] == separator(tokenizer_of(meta)) == 0 and len(tokenizer_of(meta).decode(window[1:])) > 20


def test_a_dataset_without_its_tokenizer_json_is_refused(json_dataset, tmp_path):
    for file in json_dataset.glob("*.*"):
        if file.name != "tokenizer.json":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    with pytest.raises(ValueError, match="tokenizer.json cannot be read"):
        read_meta(tmp_path)
    with pytest.raises(ValueError, match="cannot be read"):
        tokenizer(str(tmp_path))
    with pytest.raises(ValueError, match="nowhere.*path of a tokenizer.json"):
        tokenizer(str(tmp_path / "nowhere"))


def test_checkpoints_and_four_bit_files_carry_the_tokenizer(runs, json_dataset, tmp_path, capsys):
    Q.main([str(runs["json"]), "--method", "had", "--out", str(tmp_path / "four.pt"), "--device", "cpu"])
    expected = tokenizer_of(read_meta(json_dataset)).encode_ordinary("abc 12")
    for path in (runs["json"], tmp_path / "four.pt"):
        target = evaluation.load_target(path, "cpu")
        assert target.encoding.encode_ordinary("abc 12") == expected
        evaluation.main([str(path), "--device", "cpu", "--prompt", "abc", "--tokens", "3"])


# ---------------------------------------------------------------------------------------------------------------------
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
    """A random LlamaForCausalLM, saved in `directory` with a tokenizer for bytes. Gains differ from 1."""
    torch.manual_seed(0)
    shape = dict(vocab_size=256, hidden_size=64, intermediate_size=112, num_hidden_layers=3, num_attention_heads=4,
                 max_position_embeddings=128, initializer_range=0.08)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape | changes)).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "norm" in name:
                p.uniform_(0.5, 2)
    model.to(dtype).save_pretrained(directory, max_shard_size=max_shard_size)
    Path(directory, "tokenizer.json").write_text(json_from_encoding(tokenizer("bytes")), encoding="utf-8")
    return model


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
    assert same_logits(ours, theirs) and ours.config.tie_embeddings == theirs.config.tie_word_embeddings
    prompt = some_tokens(256, 20)[0].tolist()
    assert list(generate(ours, prompt, 30, 100, temperature=0)) == greedy(theirs, prompt, 30)


def test_long_texts_agree_too(tmp_path):
    theirs = hf_model(tmp_path / "m", max_position_embeddings=2048, num_hidden_layers=1)
    assert same_logits(load_llama(tmp_path / "m")[0], theirs, T=2000)


def test_sharded_files_are_read(tmp_path):
    theirs = hf_model(tmp_path / "m", max_shard_size="100KB", num_key_value_heads=2)
    assert len(list((tmp_path / "m").glob("*.safetensors"))) > 3
    assert same_logits(load_llama(tmp_path / "m")[0], theirs)


def test_the_older_spelling_of_config_json_is_read(tmp_path):
    theirs = hf_model(tmp_path / "m", **MODELS["theta 500000"])
    old = json.loads((tmp_path / "m/config.json").read_text())
    del old["rope_parameters"], old["dtype"]
    old |= {"rope_theta": 500000.0, "rope_scaling": None, "torch_dtype": "float32", "head_dim": None}
    (tmp_path / "m/config.json").write_text(json.dumps(old))
    assert same_logits(load_llama(tmp_path / "m")[0], theirs)
    for name in ("num_key_value_heads", "head_dim", "architectures", "mlp_bias", "attention_bias", "pretraining_tp"):
        old.pop(name, None)  # as the first LLaMA's
    (tmp_path / "m/config.json").write_text(json.dumps(old))
    assert same_logits(load_llama(tmp_path / "m")[0], theirs)


def test_theta_may_stand_in_rope_scaling(tmp_path):
    hf_model(tmp_path / "m", max_position_embeddings=128)
    config = json.loads((tmp_path / "m/config.json").read_text())
    config.pop("rope_parameters")
    config |= {"rope_scaling": {"rope_type": "default", "rope_theta": 500.0}, "rope_theta": 7000.0}
    (tmp_path / "m/config.json").write_text(json.dumps(config))
    ours, theirs = load_llama(tmp_path / "m")[0], transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    assert ours.config.rope_theta == 500 and same_logits(ours, theirs.eval())


def test_bfloat16_stays_bfloat16(tmp_path):
    hf_model(tmp_path / "m", dtype=torch.bfloat16)
    ours = load_llama(tmp_path / "m")[0]
    assert {p.dtype for p in ours.parameters()} == {torch.bfloat16}
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "m", dtype=torch.float32).eval()
    assert same_logits(ours.float(), theirs)


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="only Linux lists what is mapped")
def test_loading_copies_no_weights(tmp_path):
    hf_model(tmp_path / "m")
    model = load_llama(tmp_path / "m")[0]
    lines = [line.split()[0] for line in Path("/proc/self/maps").read_text().splitlines() if str(tmp_path) in line]
    mapped = [range(*(int(end, 16) for end in line.split("-"))) for line in lines]
    assert all(any(p.data_ptr() in span for span in mapped) for p in model.parameters())


@pytest.mark.parametrize("change, words", [
    ({"model_type": "mistral"}, "mistral"), ({"model_type": None}, "model_type"),
    ({"architectures": ["LlamaForSequenceClassification"]}, "SequenceClassification"),
    ({"attention_bias": True}, "attention_bias"), ({"mlp_bias": True}, "mlp_bias"), ({"hidden_act": "gelu"}, "gelu"),
    ({"pretraining_tp": 2}, "pretraining_tp"), ({"quantization_config": {"quant_method": "awq"}}, "awq"),
    ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "linear"),
    ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "llama3"),
    ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}}, "yarn"),
    ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}}, "partial_rotary"),
    ({"max_position_embeddings": "x"}, 'max_position_embeddings cannot be "x"'),
    ({"max_position_embeddings": 1}, "max_position_embeddings cannot be 1"),
    ({"rope_parameters": [1]}, "rope_parameters"), ({"head_dim": 15}, "odd"),
    ({"hidden_size": "64"}, "hidden_size"), ({"hidden_size": None}, "hidden_size"),
    ({"num_attention_heads": 0}, "num_attention_heads"), ({"num_key_value_heads": 3}, "divisible"),
    ({"rms_norm_eps": -1.0}, "rms_norm_eps"), ({"num_hidden_layers": True}, "num_hidden_layers"),
    ({"num_hidden_layers": 2}, "layers.2"), ({"num_hidden_layers": 4}, "lacks the tensor model.layers.3"),
    ({"vocab_size": 257}, r"\[257, 64\]"), ({"tie_word_embeddings": "yes"}, "tie_word_embeddings"),
])
def test_what_our_model_cannot_be_is_refused_by_name(change, words, tmp_path):
    hf_model(tmp_path / "m")
    config = json.loads((tmp_path / "m/config.json").read_text())
    (tmp_path / "m/config.json").write_text(json.dumps(config | change))
    with pytest.raises(ValueError, match=words) as error:
        load_llama(tmp_path / "m")[0]
    assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)


def test_damaged_directories_are_refused_in_one_line(tmp_path):
    def check(words, damage, kind=(ValueError, FileNotFoundError), **changes):
        m = tmp_path / f"m{len(list(tmp_path.iterdir()))}"
        hf_model(m, **changes)
        damage(m)
        with pytest.raises(kind, match=words) as error:
            load_llama(m)
        assert str(m) in str(error.value) and "\n" not in str(error.value)

    def rewrite(**tensors):
        def damage(m):
            save_file({n: t for n, t in (load_file(m / "model.safetensors") | tensors).items() if t is not None},
                      m / "model.safetensors", metadata={"format": "pt"})
        return damage

    def index(**entries):
        def damage(m):
            path = m / "model.safetensors.index.json"
            content = json.loads(path.read_text())
            content["weight_map"] |= entries
            path.write_text(json.dumps(content))
        return damage

    sharded = dict(max_shard_size="100KB")
    weight = torch.zeros(256, 64)
    check("missing", lambda m: (m / "model.safetensors").unlink())
    check("00002-of.*missing.*index", lambda m: next(m.glob("*00002*")).unlink(), **sharded)
    check("lacks the tensor lm_moon", index(lm_moon="model-00001-of-00007.safetensors"), **sharded)
    check("weight_map", index(a="../secret.safetensors"), **sharded)
    check("not JSON", lambda m: (m / "model.safetensors.index.json").write_text("{"), **sharded)
    check("not JSON", lambda m: (m / "config.json").write_text("{"))
    check("not JSON", lambda m: (m / "config.json").write_bytes(b"\xff\xfe{"))
    check("JSON object", lambda m: (m / "config.json").write_text("[]"))
    check("damaged", lambda m: (m / "model.safetensors").write_bytes((m / "model.safetensors").read_bytes()[:-10]))
    check("damaged", lambda m: (m / "model.safetensors").write_bytes(b""))
    check("damaged", lambda m: (m / "model.safetensors").write_bytes(b"\xff" * 100))
    check("lacks the tensor model.norm.weight", rewrite(**{"model.norm.weight": None}))
    check("q_proj.bias", rewrite(**{"model.layers.0.self_attn.q_proj.bias": torch.zeros(64)}))
    check(r"\[256, 65\]", rewrite(**{"lm_head.weight": torch.zeros(256, 65)}))
    check("I64", rewrite(**{"lm_head.weight": weight.long()}))
    check("F16", rewrite(**{"lm_head.weight": weight.half()}))
    check("all F32, or all BF16|all BF16", rewrite(**{"lm_head.weight": weight.bfloat16()}))
    check("F16", lambda m: None, dtype=torch.float16)
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
    tensors["lm_head.weight"][3, 5] += 1  # a head of its own, so config.json does not tell the truth
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="model.safetensors: lm_head.weight is not the embedding"):
        load_llama(tmp_path / "m")


# ---------------------------------------------------------------------------------------------------------------------
# Out


def exported(run, directory):
    Q.main([str(run), "--hf", str(directory), "--device", "cpu"])
    return transformers.AutoModelForCausalLM.from_pretrained(directory, dtype="auto").eval()


@pytest.mark.parametrize("name", ["osp", "adam", "json"])
def test_an_exported_run_is_the_same_model_in_transformers(name, runs, tmp_path):
    theirs = exported(runs[name], tmp_path / "m")
    target = evaluation.load_target(runs[name], "cpu")
    assert type(theirs).__name__ == "LlamaForCausalLM" and theirs.dtype == torch.float32
    assert theirs.config.eos_token_id == separator(target.encoding)
    assert same_logits(target.model, theirs)
    theirs_too = transformers.AutoTokenizer.from_pretrained(tmp_path / "m")
    texts = [made_up_text(random.Random(6), 100), "Ünï\x04code\0 — 12 345's", *random_strings(300)]
    for text in texts:
        if "<|endoftext|>" not in text:
            ids = target.encoding.encode_ordinary(text)
            assert theirs_too(text, add_special_tokens=False)["input_ids"] == ids
            assert theirs_too.decode(ids) == target.encoding.decode(ids)
    prompt = target.encoding.encode_ordinary("abc def")
    assert list(generate(target.model, prompt, 8, 16, temperature=0)) == greedy(theirs, prompt, 8)


def test_ss_norm_is_exported_as_a_constant_vector(runs, tmp_path):
    exported(runs["osp"], tmp_path / "m")
    tensors = load_file(tmp_path / "m/model.safetensors")
    gains = {name: t for name, t in tensors.items() if "norm" in name}
    assert len(gains) == 5 and all(t.shape == (32,) and (t == t[0]).all() for t in gains.values())
    assert not any("embproj" in name for name in tensors)


def test_the_round_trip_is_exact(runs, tmp_path):
    exported(runs["osp"], tmp_path / "a")
    first, options, data = load_llama(tmp_path / "a")
    folded = evaluation.load_target(runs["osp"], "cpu").model.fold()
    for name, W in folded.state_dict().items():
        assert torch.equal(W, first.state_dict()[name]), name
    Q.main([str(tmp_path / "a"), "--hf", str(tmp_path / "b"), "--device", "cpu"])
    for file in ("model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes(), file


@pytest.mark.parametrize(
    "changes", [dict(tie_word_embeddings=True), dict(max_position_embeddings=9999, dtype=torch.bfloat16)])
def test_what_comes_in_goes_out_with_the_same_tensors(changes, tmp_path):
    hf_model(tmp_path / "m", **changes)
    model, options, data = load_llama(tmp_path / "m")
    save_llama(model, tmp_path / "out", options, data)
    before, after = load_file(tmp_path / "m/model.safetensors"), load_file(tmp_path / "out/model.safetensors")
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    first, second = (json.loads((tmp_path / d / "config.json").read_text()) for d in ("m", "out"))
    for name in ("max_position_embeddings", "bos_token_id", "eos_token_id", "tie_word_embeddings", "head_dim"):
        assert first[name] == second[name]


def test_large_models_are_written_in_several_files(tmp_path):
    theirs = hf_model(tmp_path / "m")
    model, options, data = load_llama(tmp_path / "m")
    save_llama(model, tmp_path / "out", options, data, shard_bytes=200_000)
    assert len(list((tmp_path / "out").glob("model-*-of-00004.safetensors"))) == 4
    assert same_logits(load_llama(tmp_path / "out")[0], theirs)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert same_logits(model, again)


def test_the_model_card_says_how_it_was_trained_and_its_kurtosis(runs, tmp_path):
    exported(runs["osp"], tmp_path / "m")
    card = (tmp_path / "m/README.md").read_text(encoding="utf-8")
    last = [json.loads(line) for line in (runs["osp"] / "log.jsonl").read_text().splitlines()][-1]
    for words in ("| optimizer | muon |", "| norm | ss |", "| steps | 8 |", f"{last['val_loss']:.4f} nats",
                  f"{last['kurtosis']:.3f}", f"{last['kurtosis_floor']:.3f}", "library_name: transformers"):
        assert words in card
    data = Path(load_checkpoint(runs["osp"])["options"]["data"])
    assert str(data.parent) not in card and f"| data | {data.name} |" in card  # but not whose disk it was


def test_an_export_is_whole_or_not_there(runs, tmp_path, monkeypatch):
    (tmp_path / "there").mkdir()
    model, options, data = evaluation.load_target(runs["osp"], "cpu").model, OPTIONS, DATA
    with pytest.raises(FileExistsError, match="there exists"):
        save_llama(model, tmp_path / "there", options, data)
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(FileExistsError, match="link exists"):
        save_llama(model, tmp_path / "link", options, data)
    with pytest.raises(OSError, match="could not write .*No such file"):
        save_llama(model, tmp_path / "no/m", options, data)
    with pytest.raises(ValueError, match="quantized"):
        save_llama(Q.quantize(model, "4-4-4"), tmp_path / "q", options, data)

    def full(*args, **kwargs):
        raise huggingface.safetensors.SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(huggingface.safetensors.torch, "save_file", full)
    with pytest.raises(OSError, match="could not write .*No space left"):
        save_llama(model, tmp_path / "full", options, data)
    assert {path.name for path in tmp_path.iterdir()} == {"there", "link"}


def test_without_safetensors_one_line_says_what_to_install(runs, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(SystemExit, match="safetensors: pip install -r requirements-extra.txt"):
        Q.main([str(runs["osp"]), "--hf", str(tmp_path / "m"), "--device", "cpu"])


def test_options_of_export_that_cannot_be_are_exit_code_2(runs, tmp_path, capsys):
    run, m = str(runs["osp"]), str(tmp_path / "m")
    for argv, words in [([], "--out --hf"), (["--hf", m, "--out", m], "not allowed"), (["--hf", str(tmp_path)], "exists"),
                        (["--hf", m, "--method", "rtn"], "--method goes with --out"),
                        (["--hf", m, "--no-clip"], "--no-clip"), (["--hf", str(tmp_path / "a/b")], "exists")]:
        with pytest.raises(SystemExit) as error:
            Q.main([run, *argv])
        assert error.value.code == 2 and words in capsys.readouterr().err.splitlines()[-1]
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------------------------------------------------------------
# As a TARGET


def test_eval_and_quantize_take_a_hugging_face_directory(tmp_path, capsys):
    hf_model(tmp_path / "m", max_position_embeddings=32)
    (tmp_path / "text.txt").write_text(made_up_text(random.Random(7), 400), encoding="utf-8")
    text = ["--text", str(tmp_path / "text.txt"), "--device", "cpu"]
    calibration = ["--method", "gptq", "--calib", str(tmp_path / "text.txt")]
    Q.main([str(tmp_path / "m"), *calibration, "--out", str(tmp_path / "q.pt"), "--device", "cpu"])
    capsys.readouterr()
    evaluation.main([str(tmp_path / "m"), str(tmp_path / "q.pt"), *text, "--json"])
    exact, four = json.loads(capsys.readouterr().out)
    assert exact["target"] == "m" and exact["label"] == "LLaMA" and four["label"] == "LLaMA, gptq 4-4-4"
    assert exact["val_loss"] != four["val_loss"]
    ids = torch.tensor(list((tmp_path / "text.txt").read_bytes()))
    blocks = ids[: len(ids) // 32 * 32].view(-1, 32)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    with torch.no_grad():
        loss = theirs(blocks, labels=blocks).loss.item()
    assert exact["val_loss"] == pytest.approx(loss, abs=1e-5)
    evaluation.main([str(tmp_path / "m"), "--prompt", "abc", "--tokens", "5", "--device", "cpu"])
    evaluation.main([str(tmp_path / "m"), *text, "--bits", "4-4-4", "--methods", "had", "--json"])
    assert json.loads(capsys.readouterr().out.splitlines()[-1])[0]["quantized"]["4-4-4"]["had"]["added"] != 0


def test_a_model_without_data_of_its_own_asks_for_text(tmp_path):
    hf_model(tmp_path / "m")
    with pytest.raises(SystemExit, match="--text FILE"):
        evaluation.main([str(tmp_path / "m"), "--device", "cpu"])
    with pytest.raises(SystemExit, match="--calib FILE"):
        Q.main([str(tmp_path / "m"), "--out", str(tmp_path / "q.pt"), "--device", "cpu"])
    (tmp_path / "m/config.json").write_text("{}")
    with pytest.raises(SystemExit, match="model_type"):
        evaluation.main([str(tmp_path / "m"), "--device", "cpu"])
