"""Hugging Face LLaMA directories, in and out. A model trained with OSP is a plain LLaMA in the end.

    load_llama(directory)              any LLaMA as our Transformer, for eval.py and quantize.py
    save_llama(model, directory, ...)  any model of ours, for transformers, vLLM and llama.cpp; with
                                       a portable Recipe its weights take four bits (four_bit.py)

`python quantize.py TARGET --hf DIR` saves. Wherever a TARGET is asked for, such a DIR can be given.

A directory holds config.json (the shape), model.safetensors (the weights) or an index of several
such files, tokenizer.json and what else goes with the model (CARRIED). The weights need no
arithmetic: our RoPE turns the same pairs of channels as Hugging Face's, so tensors only change
their names. What our model cannot be is refused by name.
"""

import contextlib
import json
import os
from dataclasses import replace
from pathlib import Path

import torch

from data.dataset import TOKENIZER_JSON
from data.tokenizer import JsonTokenizer, beginning, json_from_encoding, separator, tokenizer_of
from model import Config, Transformer
from nanoosp.files import as_json, read_log, read_text, require, whole, write_text
from quantize import Recipe, attach_rounding
from tools.four_bit import packed_tensors, quantization_config, recipe_of, unpack_tensors
from tools.packed import check_weights

PURPOSE = "a Hugging Face directory"
SEQ_LEN = 2048  # to measure on, where a model from elsewhere can read longer texts
CARRIED = ["tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
           "chat_template.jinja", "additional_chat_templates/*.jinja", "generation_config.json"]

TENSORS = [  # (ours, theirs), replaced in this order: "attn_norm.gain" ends in "norm.gain"
    ("embed.", "model.embed_tokens."),
    ("blocks.", "model.layers."),
    (".attn_norm.gain", ".input_layernorm.weight"),
    (".attn.", ".self_attn."),
    (".ffn_norm.gain", ".post_attention_layernorm.weight"),
    (".ffn.", ".mlp."),
    ("norm.gain", "model.norm.weight"),
    ("head.", "lm_head."),
]
SHAPE = {  # fields of our Config, and what they are called in config.json
    "n_layer": "num_hidden_layers",
    "n_head": "num_attention_heads",
    "n_kv_head": "num_key_value_heads",
    "head_dim": "head_dim",
    "n_embd": "hidden_size",
    "n_ffn": "intermediate_size",
    "vocab_size": "vocab_size",
    "norm_eps": "rms_norm_eps",
    "tie_embeddings": "tie_word_embeddings",
}
PLAIN = {  # what a plain LLaMA's config.json may say of other things; None is "nothing"
    "model_type": ["llama"],
    "architectures": [None, ["LlamaForCausalLM"]],
    "attention_bias": [None, False],
    "mlp_bias": [None, False],
    "hidden_act": [None, "silu"],
    "pretraining_tp": [None, 1],
}
PRECISIONS = {torch.float32, torch.bfloat16}
PLAIN_ROPE = {"rope_type": ["default"], "type": ["default"], "partial_rotary_factor": [None, 1]}


def our_names(text: str) -> str:
    for ours, theirs in TENSORS:
        text = text.replace(theirs, ours)
    return text


def their_names(text: str) -> str:
    for ours, theirs in TENSORS:
        text = text.replace(ours, theirs)
    return text


# In


def is_llama(path: Path) -> bool:
    """Is this a Hugging Face directory? A run has a config.json too, and one of these files."""
    is_run = any((path / name).exists() for name in ("ckpt.pt", "log.jsonl"))
    return (path / "config.json").is_file() and not is_run


def load_llama(directory, device="cpu"):
    """(model, options, data) of a Hugging Face directory. The latter two are as in a checkpoint of
    train.py, as far as they can be known: tokenizer_of(data) is the model's tokenizer. Raises
    FileNotFoundError and ValueError for a directory that cannot be used, and ImportError without
    transformers."""
    directory = Path(directory)
    theirs, config, recipe = read_config(directory / "config.json")
    model = load_weights(config, directory, theirs.dtype, recipe).to(device)
    if not (directory / TOKENIZER_JSON).is_file():
        raise FileNotFoundError(f"{directory} has no {TOKENIZER_JSON}, so its tokenizer is unknown")
    data = {"tokenizer": TOKENIZER_JSON, "tokenizer_json": read_text(directory / TOKENIZER_JSON)}
    encoding = JsonTokenizer(data["tokenizer_json"], directory / TOKENIZER_JSON)
    if encoding.n_vocab > config.vocab_size:
        raise ValueError(f"{directory}: the tokenizer has {encoding.n_vocab:,} ids, but the model "
                         f"has only {config.vocab_size:,}")
    ids = [name for name in vars(theirs) if "token_id" in name]  # of BOS, padding, the unknown, ...
    carried = sorted(path for name in CARRIED for path in directory.glob(name))
    options = {
        "imported": directory.resolve().name,
        "seq_len": min(theirs.max_position_embeddings, SEQ_LEN),
        "hf_config": {name: getattr(theirs, name) for name in ("max_position_embeddings", *ids)},
        "hf_files": {path.relative_to(directory).as_posix(): read_text(path) for path in carried},
        "end_ids": end_ids(directory, encoding, config.vocab_size),
    }
    return model.eval(), options, data


def end_ids(directory: Path, encoding, vocab_size: int) -> list[int]:
    """All ids that the files of a model name as the end of a text, or else its separator. Each file
    may name its own: that of a document, or of a turn in a chat. Raises ValueError."""
    named = []
    for file in ("config.json", "generation_config.json"):
        ids = read_object(directory / file).get("eos_token_id")
        named += ids if isinstance(ids, list) else [ids]
    for file in ("tokenizer_config.json", "special_tokens_map.json"):
        word = read_object(directory / file).get("eos_token")
        word = word.get("content") if isinstance(word, dict) else word
        named += [encoding.inner.token_to_id(word)] if isinstance(word, str) else []
    found = {i for i in named if type(i) is int and 0 <= i < vocab_size}
    with contextlib.suppress(ValueError):  # some tokenizers have no separator either
        found = found or {separator(encoding)}
    return sorted(found)


def ends_of(options: dict, encoding) -> list[int]:
    """The ids that end a text: those that a model from elsewhere names, perhaps none, or what
    train.py puts between documents."""
    named = options.get("end_ids")
    return [separator(encoding)] if named is None else named


def read_object(path: Path) -> dict:
    """The object in a JSON file, empty if there is no such file. Raises ValueError."""
    try:
        content = json.loads(read_text(path)) if path.is_file() else {}
        if not isinstance(content, dict):
            raise ValueError("not a JSON object")
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} cannot be used: {error}") from error
    return content


def read_config(path: Path):
    """(transformers' LlamaConfig, our Config, the Recipe of a model in four bits or None) of a
    config.json. Raises ValueError."""
    LlamaConfig = require("transformers", PURPOSE).LlamaConfig
    try:
        content = json.loads(read_text(path))
        theirs = LlamaConfig.from_dict(content)  # it knows the defaults, and all spellings of RoPE
        rope = dict(theirs.rope_parameters)
        theta = float(rope.pop("rope_theta"))
        strange = {name: content.get(name) for name, values in PLAIN.items()
                   if content.get(name) not in values}
        strange |= {name: value for name, value in rope.items()
                    if value not in PLAIN_ROPE.get(name, [None])}
        if strange:
            raise ValueError("only plain LLaMAs can be read, but it says "
                             f"{json.dumps(strange)[:160]}")
        if theirs.max_position_embeddings < 2:
            raise ValueError(f"max_position_embeddings is {theirs.max_position_embeddings}")
        shape = {ours: getattr(theirs, name) for ours, name in SHAPE.items()}
        recipe = recipe_of(content.get("quantization_config"))
        return theirs, Config(rope_theta=theta, **shape), recipe
    except Exception as error:  # LlamaConfig's own checks raise many kinds, some with many lines
        raise ValueError(f"{path} cannot be used: {' '.join(str(error).split())}") from error


def load_weights(config: Config, directory: Path, dtype=None, recipe=None) -> Transformer:
    """A model of the tensors in `directory`, in their own precision, mapped into memory. If that is
    fp32 for some and bf16 for others, all get `dtype`, or else the first one's. recipe: a Recipe, if
    they are in four bits.

    Which files are read, and which of two tensors counts, LlamaForCausalLM.from_pretrained decides
    in the same way. It maps them too, but fills in tensors that are missing, without an error.
    """
    from safetensors.torch import load_file

    index, indexed = directory / "model.safetensors.index.json", {}
    files = [directory / "model.safetensors"]
    if not files[0].is_file() and index.is_file():
        indexed = read_object(index).get("weight_map")
        if not isinstance(indexed, dict):
            raise ValueError(f"{index} has no weight_map")
        files = [directory / name for name in sorted(set(map(str, indexed.values())))]
    weights = {}
    for path in files:
        try:
            weights |= sorted(load_file(path).items())
        except Exception as error:  # safetensors has its own kind
            raise ValueError(f"{path} is missing or damaged: {error}") from error
    try:
        needed = {}
        if indexed and config.n_layer <= len(weights):
            with torch.device("meta"):
                needed = Transformer(config).state_dict()
        weights = {our_names(name): W for name, W in weights.items()
                   if (not indexed or name in indexed or our_names(name) in needed)
                   and not name.endswith("rotary_emb.inv_freq")}  # computed here
        scales = unpack_tensors(weights, recipe) if recipe else {}
        dtypes = {W.dtype for W in weights.values()}
        if len(dtypes) > 1 and dtypes <= PRECISIONS:
            dtypes = {dtype or next(iter(weights.values())).dtype}
            weights = {name: W.to(*dtypes) for name, W in weights.items()}
        if not dtypes <= PRECISIONS:
            names = sorted(str(dtype).removeprefix("torch.") for dtype in dtypes)
            raise ValueError(f"{directory} holds tensors of {' and '.join(names)}: only float32 "
                             "and bfloat16 can be read")
        if config.tie_embeddings and "embed.weight" in weights:
            embed = weights["embed.weight"]
            head = weights.setdefault("head.weight", embed)  # some hold it twice
            if not torch.equal(head, embed):
                raise ValueError(f"{directory}: lm_head.weight is not the embedding, but "
                                 "config.json ties the two")
        model = Transformer.from_weights(config, weights)
    except RuntimeError as error:  # PyTorch names the tensors in the lines after the first
        problem = their_names(str(error).splitlines()[-1].strip())[:200]
        raise ValueError(f"{directory}: its safetensors do not hold what config.json describes: "
                         f"{problem}") from error
    if recipe:
        model.recipe = recipe
        model.scales = scales
        attach_rounding(model, recipe)
    return model


# Out


def save_llama(model, directory, options: dict, data: dict, evaluation=None, shard_size="5GB",
               input_scales=None):
    """Write a model as a Hugging Face directory, whole or not at all. OSP's parts are folded first.
    A model that load_llama() has read gets back all CARRIED files. Of a model of quantize() with a
    portable Recipe the codes are written; `input_scales` are those of four_bit.py.

    `options` and `data` are those of its checkpoint, `evaluation` is a record of its log. Raises
    FileExistsError if `directory` exists, OSError if it cannot be written, ArithmeticError for
    weights that are not finite, ValueError for another quantized model or a tokenizer without
    tokenizer.json, and ImportError without transformers.
    """
    directory = Path(directory)
    if directory.exists() or directory.is_symlink():
        raise FileExistsError(f"{directory} exists; remove it, or name another place")
    recipe = getattr(model, "recipe", None)
    if recipe and not recipe.portable:
        raise ValueError("a quantized model is no plain LLaMA: export the model it was made from")
    if model.config.norm != "rms" or model.config.embproj:
        model = model.fold()
    check_weights(model.state_dict(), directory)
    tensors = packed_tensors(model, input_scales) if recipe else model.state_dict()
    if recipe and torch.equal(tensors["head.weight"], tensors["embed.weight"]):  # tied until folded
        config = replace(model.config, tie_embeddings=True)
        model = Transformer.from_weights(config, model.state_dict())
        del tensors["head.weight"]
    encoding = tokenizer_of(data)
    end_ids = ends_of(options, encoding)
    theirs = their_model(model, options, end_ids[:1], first_ids(encoding) or end_ids[:1])
    known = getattr(encoding, "text", data.get("tokenizer_json"))
    files = {
        "README.md": model_card(directory.name, model, options, data, evaluation, recipe),
        **options.get("hf_files", {}),
        TOKENIZER_JSON: known or json_from_encoding(encoding),
        "tokenizer_config.json": tokenizer_config(encoding, options, end_ids),
    }
    try:
        with whole(directory, f".tmp-{os.getpid()}") as temporary:
            temporary.mkdir()
            theirs.save_pretrained(temporary, max_shard_size=shard_size, state_dict={
                their_names(name): tensor for name, tensor in tensors.items()})
            config = json.loads(read_text(temporary / "config.json"))
            config |= dict(quantization_config=quantization_config(recipe)) if recipe else {}
            config["torch_dtype"] = config["dtype"]  # its name for older readers
            for name, text in (files | {"config.json": as_json(config)}).items():
                (temporary / name).parent.mkdir(exist_ok=True)
                write_text(temporary / name, text)
            mode = (temporary / "config.json").stat().st_mode
            for path in temporary.glob("*.safetensors"):
                path.chmod(mode)  # the library lets only the owner read them, whatever the umask
    except (OSError, require("safetensors", PURPOSE).SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise OSError(f"could not write {directory}: {reason}") from error


def their_model(model: Transformer, options: dict, end: list[int], first: list[int]):
    """transformers' LlamaForCausalLM with the tensors of `model`."""
    transformers, config = require("transformers", PURPOSE), model.config
    read_before = options.get("hf_config", {})  # by load_llama
    theirs = transformers.LlamaConfig(**{
        **{name: getattr(config, ours) for ours, name in SHAPE.items()},
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "max_position_embeddings": options["seq_len"],
        "bos_token_id": first[0] if first else None,
        "eos_token_id": end[0] if end else None,
        "dtype": model.embed.weight.dtype,
    } | read_before)
    theirs.rope_theta = config.rope_theta  # where older readers look for it
    with torch.device("meta"):
        llama = transformers.LlamaForCausalLM(theirs)
    weights = {their_names(name): W for name, W in model.state_dict().items()}
    llama.load_state_dict(weights, assign=True)
    return llama


def first_ids(encoding) -> list[int]:
    """The ids that texts begin with; none where it ends them too: no text is encoded."""
    with contextlib.suppress(ValueError):
        return beginning(encoding)
    return []


def tokenizer_config(encoding, options: dict, end_ids: list) -> str:
    """tokenizer_config.json, which AutoTokenizer needs: the one that came with the model, or ours.
    Where no token is named to pad batches with, the end of text becomes that."""
    files = options.get("hf_files", {})
    words = json.loads(files.get("special_tokens_map.json", "{}"))
    if "tokenizer_config.json" in files:
        config = json.loads(files["tokenizer_config.json"])
    else:
        config = {"tokenizer_class": "PreTrainedTokenizerFast",
                  "clean_up_tokenization_spaces": False, "model_max_length": own_length(options),
                  "padding_side": "left",  # text goes on right
                  "add_bos_token": False, "add_prefix_space": False}  # llama.cpp would add both
        special = getattr(encoding, "special", None)
        if special is None:  # tiktoken's
            special = {"<|endoftext|>": end_ids[0]}
        if ends := [word for word, i in special.items() if i in end_ids]:
            config |= {"bos_token": ends[0], "eos_token": ends[0]}
        if first := first_ids(encoding):
            config |= {"bos_token": encoding.inner.id_to_token(first[0]), "add_bos_token": True}
        config |= words
    end = config.get("eos_token") or words.get("eos_token")
    if end and not (config.get("pad_token") or words.get("pad_token")):
        return as_json(config | {"pad_token": end})
    return files.get("tokenizer_config.json") or as_json(config)


CARD = """---
library_name: transformers
pipeline_tag: text-generation
tags:
- llama
- nanoosp
---

# {name}

A LLaMA of {n:,} parameters: {config.n_layer} layers x {config.n_embd}, {config.n_head} heads,
vocabulary {config.vocab_size:,}, sequences of {seq_len:,} tokens, tokenizer {tokenizer}. Exported
by nanoOSP, which reimplements Outlier-Safe Pre-Training (Park et al., ACL 2025, arXiv 2506.19697).

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{name}")
tokenizer = AutoTokenizer.from_pretrained("{name}")
```

"""
QUANTIZED = """The matrices in its layers have four bits ({recipe}: method, bits of weights, activations, keys and
values), in the form of compressed-tensors, which transformers needs to load them. Numbers below are
of the model before.

"""
MEASURED = """
Measured on validation text after {tokens:,} training tokens: loss {val_loss:.4f} nats per token,
excess kurtosis of the residual stream {kurtosis:.3f}, where perfectly Gaussian activations of this
width have {kurtosis_floor:.3f}. (Far above that is hard to quantize.)
"""


def model_card(name: str, model, options: dict, data: dict, evaluation: dict | None,
               recipe: Recipe | None) -> str:
    """The text of README.md. `evaluation` is a record of log.jsonl, if there is one."""
    text = CARD.format(name=name, n=sum(p.numel() for p in model.parameters()), config=model.config,
                       seq_len=own_length(options), tokenizer=data["tokenizer"])
    text += QUANTIZED.format(recipe=recipe) if recipe else ""
    if "imported" in options:
        return (f"{text}nanoOSP did not train it: it was read from a Hugging Face directory called "
                f"{options['imported']}.\n")
    values = dict(sorted(options.items()), data=Path(str(options["data"])).name)  # not its path
    rows = [f"| {option} | {value} |\n" for option, value in values.items()]
    text += "## Training\n\n| option of train.py | value |\n| --- | --- |\n" + "".join(rows)
    if evaluation:
        text += MEASURED.format(**evaluation)
        if evaluation.get("bits_per_byte"):
            text += f"The same loss in bits per byte is {evaluation['bits_per_byte']:.4f}.\n"
    return text


def own_length(options: dict) -> int:
    """Most tokens that a model can read at once, from the options that come with it."""
    return options.get("hf_config", {}).get("max_position_embeddings", options["seq_len"])


def last_evaluation(log: Path, step: int) -> dict | None:
    """The last record with a validation loss in log.jsonl up to `step`; None if there is none."""
    records = [r for r in read_log(log) if "val_loss" in r and r["step"] <= step]
    return records[-1] if records else None
