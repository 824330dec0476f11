"""load(path): a model on disk and what is known of it, for everything that takes a TARGET."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePath

import numpy as np
import torch

from data.dataset import TOKENIZER_JSON, Dataset, TextBlocks, find_dataset
from data.sources import read_documents
from data.tokenizer import document_bytes, encode_document, encode_whole, tokenizer_of
from model import Transformer
from nanoosp.checkpoint import check_checkpoint, check_data, model_from_checkpoint
from nanoosp.files import read_archive
from nanoosp.methods import OPTIMIZERS, label
from nanoosp.rotations import SPIN_BATCH
from quantize import GPTQ_SAMPLES, Recipe
from tools.huggingface import ends_of, is_llama, load_llama, own_length
from tools.packed import packed_model


def short_name(path: Path) -> str:
    return path.resolve().name if path.is_dir() else path.stem


def names_of(paths: list[Path]) -> dict[Path, str]:
    """What to call each of several targets: as short as tells them apart."""
    names = {path: short_name(path) for path in paths}
    short = [*names.values()]
    return {path: name if short.count(name) == 1 else str(path) for path, name in names.items()}


@dataclass
class Loaded:
    path: Path
    model: Transformer
    options: dict  # how it was trained
    data: dict  # meta.json of the dataset it was trained on
    step: int | None  # of the checkpoint; None for other files
    shown: str = ""  # what it is called in tables; without it, as short_name() says

    @property
    def name(self) -> str:
        return self.shown or short_name(self.path)

    @property
    def recipe(self) -> Recipe | None:
        """How the model was quantized; None if it was not."""
        return getattr(self.model, "recipe", None)

    @property
    def label(self) -> str:
        """Its configuration: "Adam", "Muon + SSNorm", "OSP", "OSP, gptq 4-4-4", "LLaMA"."""
        return label(self.options) + (f", {self.recipe}" if self.recipe else "")

    @cached_property
    def encoding(self):
        return tokenizer_of(self.data)

    def spelled(self, token: int) -> str:
        """A token's text for the eye; its number where there is no tokenizer, as without a network,
        since nothing else about a dataset needs one."""
        try:
            return repr(self.encoding.decode([token]))
        except (ValueError, ImportError):
            return str(token)

    @property
    def end_ids(self) -> list[int]:
        """The ids that end a text."""
        return ends_of(self.options, self.encoding)

    @property
    def seq_len(self) -> int:
        """Tokens in a sequence to measure on."""
        return self.options["seq_len"]

    @property
    def window(self) -> int:
        """Most tokens that it can read at once. Of a model from elsewhere this may be more."""
        return own_length(self.options)

    def dataset(self, split: str = "val") -> Dataset:
        """The data it was trained on. Raises ValueError for a model from elsewhere, and for other
        data that has taken its place."""
        if "data" not in self.options:
            raise ValueError(f"{self.path} is a Hugging Face model, which brings no text: name one "
                             "with --text FILE, or one to calibrate on with --calib FILE")
        directory = find_dataset(self.options["data"])
        data = Dataset(directory, split, self.seq_len, self.options["seed"])
        check_data(self.data, data)
        return data

    def text_blocks(self, file, block: int) -> TextBlocks:
        """A text in blocks of `block` tokens. Raises OSError, and ValueError if too short.

        Documents are separated as in a dataset. A text without border lines is measured as it
        stands, with nothing in front: so WikiText-2's perplexity is published.
        """
        documents, separated = read_documents(Path(file))
        encode = encode_document if separated else encode_whole
        n_bytes = sum(map(document_bytes, documents)) - (not separated)  # then it has no end
        try:
            parts = [encode(self.encoding, document) for document in documents]
            ids = np.concatenate([np.empty(0, np.int64), *parts])
            return TextBlocks(ids, block, n_bytes, "\0".join(documents))
        except ValueError as error:
            raise ValueError(f"{file}: {error}") from error

    def calibration(self, recipe: Recipe, file=None) -> torch.Tensor | None:
        """What quantize() calibrates on, int64 [N, T + 1]; None for a recipe that does not.

        Random windows of the training split or, if there is a `file`, blocks spread evenly over its
        text. Raises what dataset() and text_blocks() do.
        """
        if not recipe.calibrates:
            return None
        n = GPTQ_SAMPLES
        if recipe.method == "spinquant":  # every step sees new text, if there is enough
            n = max(n, SPIN_BATCH * (recipe.steps + 1))
        if file is not None:
            blocks = self.text_blocks(file, self.seq_len + 1)
            return torch.from_numpy(blocks.windows(blocks.evaluation_windows(n)))
        data = self.dataset("train")
        return torch.from_numpy(data.batch(0, min(n, data.n_windows)))


def load(path, device: str = "cpu", int4: bool = False) -> Loaded:
    """A run directory, a checkpoint, a Hugging Face LLaMA directory or a four-bit file. int4: the
    weights of a four-bit file stay packed, which only CUDA can compute with. Raises
    FileNotFoundError, and ValueError for a file that is damaged or not one of ours."""
    path, step = Path(path), None
    if is_llama(path):
        model, options, data = load_llama(path, device)
    else:
        file = path / "ckpt.pt" if path.is_dir() else path
        state = read_archive(file)
        if isinstance(state, dict) and "packing" in state:
            model = packed_model(state, file, device, int4)
        else:
            model = model_from_checkpoint(check_checkpoint(state, file), device)
            step = state["step"]
        options, data = state["options"], state["data"]
    loaded = Loaded(path, model.requires_grad_(False).eval(), options, data, step)
    if int4 and (is_llama(path) or not loaded.recipe):
        raise ValueError(f"{path} is not quantized by quantize.py --out, which --int4 needs")
    check_known(options, data, path)
    return loaded


def check_known(options: dict, data: dict, path):
    """Raise ValueError unless a file says of its model what others need to know."""
    needed = {"optimizer", "norm", "embproj", "data", "seed"}
    needed = ({"imported"} if "imported" in options else needed) | {"seq_len"}
    missing = sorted(needed - options.keys() | {"tokenizer"} - data.keys())
    if missing:
        raise ValueError(f"{path} does not say {', '.join(missing)}: train.py or quantize.py would "
                         "have")
    kinds = dict(seq_len=int, data=str, seed=int, hf_config=dict, hf_files=dict, end_ids=list)
    possible = (
        all(type(options[name]) is kind for name, kind in kinds.items() if name in options)
        and all(type(n) is int and n > 0 for n in (options["seq_len"], own_length(options)))
        and options.get("optimizer", "adam") in OPTIMIZERS
        and all(type(i) is int for i in options.get("end_ids", []))
        and all(str(PurePath(name).parent) in (".", "additional_chat_templates")  # nowhere else
                and type(text) is str for name, text in options.get("hf_files", {}).items())
        and type(data["tokenizer"]) is str
        and (data["tokenizer"] != TOKENIZER_JSON or type(data.get("tokenizer_json")) is str)
    )
    if not possible:
        raise ValueError(f"{path} says impossible things of its training or its tokenizer: it is "
                         "damaged")
