"""Hugging Face LLaMA directories, in and out: what OSP trains is a plain LLaMA, and this is where that shows.

    load_llama(directory)              any LLaMA checkpoint as our Transformer; then eval.py and quantize.py take it
    save_llama(model, directory, ...)  any model of ours as transformers, vLLM and llama.cpp's converter read it

No command of its own: `python quantize.py TARGET --hf DIR` saves, and wherever a TARGET is asked for, DIR is loaded.

A directory holds config.json (the shape), *.safetensors (the weights, in one file or in several with an index beside
them), tokenizer.json, tokenizer_config.json. The weights need no arithmetic: our RoPE turns the same pairs of channels
as Hugging Face's, so tensors only change their names. What our model cannot be is refused by name.
"""

import json
import os
import shutil
from pathlib import Path

import torch

from nanoosp.cli import extra, read_log, write_whole
from data.bpe import encoding_from_json, json_from_encoding
from data.dataset import TOKENIZER_JSON, read_tokenizer_json, separator, tokenizer_of
from model import Config, Transformer

try:
    import safetensors.torch
except ImportError:  # optional: only who loads or saves such a directory needs it, and extra() says so there
    safetensors = None

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
DTYPES = ("F32", "BF16")  # safetensors' names of float32 and bfloat16
SHARD_BYTES = 5 * 10**9  # of a file of weights, about
SEQ_LEN = 2048  # to measure on, where a model from elsewhere could read longer texts
KEPT = ("max_position_embeddings", "bos_token_id", "eos_token_id")  # of a config.json that is read and written again

# Our name of a tensor becomes Hugging Face's by these replacements, in this order: "norm.gain", the final norm's, comes
# after those of the blocks, since "attn_norm.gain" ends in it.
RENAME = {
    "embed.": "model.embed_tokens.",
    "blocks.": "model.layers.",
    ".attn_norm.gain": ".input_layernorm.weight",
    ".attn.": ".self_attn.",
    ".ffn_norm.gain": ".post_attention_layernorm.weight",
    ".ffn.": ".mlp.",
    "norm.gain": "model.norm.weight",
    "head.": "lm_head.",
}


def their_name(name: str) -> str:
    for ours, theirs in RENAME.items():
        name = name.replace(ours, theirs)
    return name


# ---------------------------------------------------------------------------------------------------------------------
# In


def is_llama(path: Path) -> bool:
    """Is `path` a Hugging Face directory? (A run has a config.json too, and beside it what such a directory lacks.)"""
    ours = any((path / name).exists() for name in ("ckpt.pt", "log.jsonl"))
    return (path / "config.json").is_file() and not ours


def read_json(path: Path) -> dict:
    """Raises FileNotFoundError, and ValueError unless there is a JSON object in the file."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged: it is not JSON ({error})") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} is damaged: it holds no JSON object")
    return content


def our_config(theirs: dict, path) -> Config:
    """The Config for the contents of a config.json. Raises ValueError, naming `path`, for what we cannot represent."""

    def refuse(what):
        raise ValueError(f"{path}: {what}; only LLaMA in its plain form can be read")

    if theirs.get("model_type") != "llama":
        refuse(f"model_type {theirs.get('model_type')!r}")
    if theirs.get("architectures") not in (None, ["LlamaForCausalLM"]):
        refuse(f"architectures {theirs['architectures']}")
    plain = dict(attention_bias=False, mlp_bias=False, hidden_act="silu", pretraining_tp=1, quantization_config=None)
    for name, value in plain.items():
        if theirs.get(name) not in (None, value):
            refuse(f"{name} {json.dumps(theirs[name])[:80]}")
    if theirs.get("tie_word_embeddings") not in (None, False, True):
        refuse(f"tie_word_embeddings {json.dumps(theirs['tie_word_embeddings'])[:80]}")
    rope = theirs.get("rope_parameters") or {}  # transformers 5; before, rope_theta and rope_scaling
    scaling = theirs.get("rope_scaling") or rope
    if not isinstance(rope, dict) or not isinstance(scaling, dict):
        refuse("rope_parameters that are no object")
    if scaling.get("rope_type", scaling.get("type", "default")) != "default" or "factor" in scaling:
        refuse(f"rope_scaling {json.dumps(scaling)[:80]}")
    if any(part.get("partial_rotary_factor") not in (None, 1, 1.0) for part in (theirs, rope, scaling)):
        refuse("partial_rotary_factor other than 1")

    def number(name, default=None, kinds=(int,), where=theirs):
        value = default if where.get(name) is None else where[name]
        if type(value) not in kinds or not 0 < value < 2**53:
            refuse(f"{name} {'is missing' if value is None else json.dumps(value)[:80]}")
        return value

    n_head, theta = number("num_attention_heads"), scaling if "rope_theta" in scaling else theirs
    shape = dict(
        n_layer=number("num_hidden_layers"),
        n_head=n_head,
        n_embd=number("hidden_size"),
        vocab_size=number("vocab_size"),
        n_kv_head=number("num_key_value_heads", n_head),
        head_dim=number("head_dim", max(1, number("hidden_size") // n_head)),
        n_ffn=number("intermediate_size"),
        rope_theta=float(number("rope_theta", 10000.0, (int, float), theta)),
        norm_eps=float(number("rms_norm_eps", 1e-6, (int, float))),
        tie_embeddings=theirs.get("tie_word_embeddings") is True,
    )
    try:
        return Config(**shape)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def weight_files(directory: Path) -> dict[str, Path]:
    """Where each tensor lies. Raises FileNotFoundError and ValueError for a directory that is not whole."""
    files, index = {}, directory / INDEX
    if index.exists():
        listed = read_json(index).get("weight_map")
        if not isinstance(listed, dict) or not all(isinstance(n, str) and Path(n).name == n for n in listed.values()):
            raise ValueError(f"{index} is damaged: its weight_map does not give each tensor a file beside it")
        paths = [directory / name for name in sorted(set(listed.values()))]
    else:
        listed, paths = None, [directory / WEIGHTS]
    for path in paths:
        if not path.is_file():
            why = f"and there is no {INDEX} either" if listed is None else f"but {INDEX} lists it"
            raise FileNotFoundError(f"{path} is missing, {why}")
        try:
            with safetensors.safe_open(path, "pt") as file:
                files |= {name: path for name in file.keys()}
        except (OSError, safetensors.SafetensorError) as error:
            raise ValueError(f"{path} is damaged: {error}") from error
    lost = next((name for name in listed or {} if name not in files), None)
    if lost is not None:
        raise ValueError(f"{directory / listed[lost]} lacks the tensor {lost}, which the index lists")
    return files


def load_weights(model: Transformer, directory: Path, device):
    """Give a model on the meta device the tensors of a Hugging Face LLaMA directory, in the precision they have. On a
    CPU they stay in the files, which are mapped into memory: one copy. Raises FileNotFoundError and ValueError."""
    tied = model.config.tie_embeddings
    wanted = {their_name(name): (name, W.shape) for name, W in model.state_dict().items()}
    files = {name: path for name, path in weight_files(directory).items() if not name.endswith("rotary_emb.inv_freq")}
    head = None
    if tied:  # the embedding is the head; some directories hold it twice
        wanted.pop("lm_head.weight")
        head = files.pop("lm_head.weight", None)
    lost, unknown = wanted.keys() - files, files.keys() - wanted
    if lost or unknown:
        problem = "lacks the tensor" if lost else "has a tensor that config.json does not account for:"
        raise ValueError(f"{directory} {problem} {min(lost or unknown)} ({len(lost or unknown)} in all)")
    weights, dtypes = {}, set()
    for path in sorted(set(files.values())):
        with safetensors.safe_open(path, "pt") as file:
            for name in (name for name in files if files[name] == path):
                (ours, shape), found = wanted[name], file.get_slice(name)
                dtypes.add(found.get_dtype())
                if found.get_dtype() not in DTYPES or len(dtypes) > 1:
                    raise ValueError(f"{path}: {name} is {found.get_dtype()}; all tensors must be F32, or all BF16")
                if found.get_shape() != list(shape):
                    raise ValueError(f"{path}: {name} is {found.get_shape()}, but config.json makes it {list(shape)}")
                weights[ours] = file.get_tensor(name).to(device)
    if head:
        with safetensors.safe_open(head, "pt") as file:
            if not torch.equal(file.get_tensor("lm_head.weight").to(weights["embed.weight"]), weights["embed.weight"]):
                raise ValueError(f"{head}: lm_head.weight is not the embedding, but config.json ties the two")
    if tied:
        weights["head.weight"] = weights["embed.weight"]
    model.load_state_dict(weights, assign=True)
    if tied:
        model.head.weight = model.embed.weight


def load_llama(directory, device="cpu"):
    """(model, options, data) of a Hugging Face LLaMA directory; the latter two as in a checkpoint of train.py, as far
    as they can be known: tokenizer_of(data) is its tokenizer.

    Raises FileNotFoundError and ValueError for a directory that cannot be used, ImportError without safetensors.
    """
    extra("safetensors.torch", "a Hugging Face directory")
    directory = Path(directory)
    theirs = read_json(directory / "config.json")
    config = our_config(theirs, directory / "config.json")
    kept = {name: theirs[name] for name in KEPT if name in theirs}
    longest = SEQ_LEN if kept.get("max_position_embeddings") is None else kept["max_position_embeddings"]
    if type(longest) is not int or longest < 2:
        raise ValueError(f"{directory / 'config.json'}: max_position_embeddings cannot be {json.dumps(longest)[:80]}")
    with torch.device("meta"):  # a skeleton without memory, which then takes over the tensors
        model = Transformer(config)
    load_weights(model, directory, device)
    if not (directory / TOKENIZER_JSON).is_file():
        raise FileNotFoundError(f"{directory} has no {TOKENIZER_JSON}, so its tokenizer is not known")
    data = {"tokenizer": TOKENIZER_JSON, "tokenizer_json": read_tokenizer_json(directory)}
    encoding, n = encoding_from_json(data["tokenizer_json"], directory / TOKENIZER_JSON), config.vocab_size
    if encoding.n_vocab > n:
        raise ValueError(f"{directory}: the tokenizer has {encoding.n_vocab:,} ids, but the model has only {n:,}")
    options = {"imported": directory.resolve().name, "seq_len": min(longest, SEQ_LEN), "hf_config": kept}
    return model.eval(), options, data


# ---------------------------------------------------------------------------------------------------------------------
# Out


def as_json(content: dict) -> str:
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"


def their_config(config: Config, seq_len: int, dtype, endoftext: int) -> dict:
    """The contents of config.json, in the spelling that old and new versions of transformers understand."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": config.vocab_size,
        "hidden_size": config.n_embd,
        "intermediate_size": config.n_ffn,
        "num_hidden_layers": config.n_layer,
        "num_attention_heads": config.n_head,
        "num_key_value_heads": config.n_kv_head,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": seq_len,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "rope_scaling": None,
        "attention_bias": False,
        "mlp_bias": False,
        "attention_dropout": 0.0,
        "tie_word_embeddings": config.tie_embeddings,
        "bos_token_id": endoftext,  # stands before every document, and so also where one ends
        "eos_token_id": endoftext,
        "torch_dtype": str(dtype).removeprefix("torch."),
        "use_cache": True,
    }


def write_weights(model, directory: Path, shard_bytes: int):
    """model.safetensors or, if that would be larger than shard_bytes, several files and their index."""
    shards, size = [{}], 0
    for name, W in model.state_dict().items():
        if name == "head.weight" and model.config.tie_embeddings:
            continue
        size += W.nbytes
        if size > shard_bytes and shards[-1]:
            shards.append({})
            size = W.nbytes
        shards[-1][their_name(name)] = W.contiguous()
    names = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    for name, shard in zip(names if len(shards) > 1 else [WEIGHTS], shards):
        safetensors.torch.save_file({n: W.cpu() for n, W in shard.items()}, directory / name, metadata={"format": "pt"})
    if len(shards) > 1:
        total = sum(W.nbytes for shard in shards for W in shard.values())
        weight_map = {n: name for name, shard in zip(names, shards) for n in shard}
        write_whole(directory / INDEX, as_json({"metadata": {"total_size": total}, "weight_map": weight_map}))


def write_tokenizer(directory: Path, data: dict, seq_len: int):
    """tokenizer.json, as it was or made from tiktoken's Encoding, and what AutoTokenizer needs beside it."""
    encoding = tokenizer_of(data)
    text = data["tokenizer_json"] if encoding.name == TOKENIZER_JSON else json_from_encoding(encoding)
    write_whole(directory / TOKENIZER_JSON, text)
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": seq_len}
    config |= {"clean_up_tokenization_spaces": False}
    if "<|endoftext|>" in encoding.special_tokens_set:  # bytes have none: their separator 0 is no text
        config |= {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"}
    write_whole(directory / "tokenizer_config.json", as_json(config))


CARD = """---
library_name: transformers
pipeline_tag: text-generation
tags:
- llama
- nanoosp
---

# {name}

A LLaMA of {n:,} parameters: {shape}. Exported by nanoOSP, which reimplements Outlier-Safe Pre-Training (Park et al.,
ACL 2025, arXiv 2506.19697).

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model, tokenizer = AutoModelForCausalLM.from_pretrained("{name}"), AutoTokenizer.from_pretrained("{name}")
```

{training}
"""


def model_card(name: str, model, options: dict, data: dict, evaluation: dict | None) -> str:
    """The contents of README.md. `evaluation` is a record of log.jsonl, if there is one."""
    config = model.config
    shape = f"{config.n_layer} layers x {config.n_embd}, {config.n_head} heads, vocabulary {config.vocab_size:,}, "
    shape += f"sequences of {options['seq_len']:,} tokens, tokenizer {data['tokenizer']}"
    if "imported" in options:
        training = f"nanoOSP did not train it: it was read from a Hugging Face directory called {options['imported']}."
    else:
        values = dict(sorted(options.items()), data=Path(str(options["data"])).name)  # not where it lay
        training = "## Training\n\n| option of train.py | value |\n| --- | --- |\n"
        training += "\n".join(f"| {option} | {value} |" for option, value in values.items())
    if evaluation:
        bits = evaluation.get("bits_per_byte")
        training += (
            f"\n\nMeasured on validation text after {evaluation['tokens']:,} training tokens: loss "
            f"{evaluation['val_loss']:.4f} nats per token" + (f", {bits:.4f} bits per byte" if bits else "")
            + f"; excess kurtosis of the residual stream {evaluation['kurtosis']:.3f}, where perfectly Gaussian "
            f"activations of this width have {evaluation['kurtosis_floor']:.3f}. (Far above that is hard to quantize.)"
        )
    return CARD.format(name=name, n=sum(p.numel() for p in model.parameters()), shape=shape, training=training)


def last_evaluation(log: Path, step: int) -> dict | None:
    """The last record with a validation loss in a run's log.jsonl up to `step`; None if there is no such."""
    return next((r for r in reversed(read_log(log)) if "val_loss" in r and r["step"] <= step), None)


def save_llama(model, directory, options: dict, data: dict, evaluation=None, shard_bytes: int = SHARD_BYTES):
    """Write `model` as a Hugging Face LLaMA directory, whole or not at all; a model with OSP's parts is folded first.

    `options` and `data` are those of the checkpoint it comes from, `evaluation` a record of its log.
    Raises FileExistsError if `directory` is there, OSError if it cannot be written, ValueError for a quantized model or
    a tokenizer that Hugging Face's library cannot have, ImportError without safetensors.
    """
    extra("safetensors.torch", "a Hugging Face directory")
    directory = Path(directory)
    if directory.exists() or directory.is_symlink():
        raise FileExistsError(f"{directory} exists; remove it, or name another place")
    if hasattr(model, "quantization"):
        raise ValueError("a quantized model is no plain LLaMA: export the model it was made from")
    if model.config.norm != "rms" or model.config.embproj:
        model = model.fold()
    temporary = directory.with_name(f"{directory.name}.tmp-{os.getpid()}")
    try:
        temporary.mkdir()
        write_tokenizer(temporary, data, options["seq_len"])
        endoftext, dtype = separator(tokenizer_of(data)), model.embed.weight.dtype
        config = their_config(model.config, options["seq_len"], dtype, endoftext)
        write_whole(temporary / "config.json", as_json(config | options.get("hf_config", {})))
        write_whole(temporary / "README.md", model_card(directory.name, model, options, data, evaluation))
        write_weights(model, temporary, shard_bytes)
        os.rename(temporary, directory)
    except (OSError, safetensors.SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise OSError(f"could not write {directory}: {reason}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
