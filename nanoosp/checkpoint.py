"""Checkpoints: what Run.save writes, and how a run or anything else takes it up again. Only data is read, never code."""

from dataclasses import fields
from pathlib import Path

from nanoosp.files import read_archive


def load_checkpoint(path) -> dict:
    """Read what Run.save wrote. `path` is the file or its run directory.

    Raises what read_archive does, and ValueError for a foreign file.
    """
    path = Path(path)
    path = path / "ckpt.pt" if path.is_dir() else path
    return check_checkpoint(read_archive(path), path)


def check_checkpoint(state, path) -> dict:
    """`state` as it is. Raises ValueError, naming `path`, unless it is what Run.save writes."""
    kinds = {"step": int, "config": dict, "model": dict, "optimizers": list, "options": dict, "data": dict}
    if not isinstance(state, dict) or not all(isinstance(state.get(name), kind) for name, kind in kinds.items()):
        if isinstance(state, dict) and "packing" in state:
            raise ValueError(f"{path} is a quantized model (quantize.py made it): only eval.py reads these")
        raise ValueError(f"{path} is a torch file, but not a checkpoint of train.py")
    return state


def model_from_checkpoint(state: dict, device="cpu"):
    """The model of a checkpoint, in the precision it was saved in."""
    from model import Config, Transformer  # only here: torch takes seconds to import

    unknown = set(state["config"]) - {field.name for field in fields(Config)}
    if unknown:
        raise ValueError(f"the checkpoint's config has unknown entries {sorted(unknown)}: made by a newer version?")
    try:
        return Transformer.from_weights(Config(**state["config"]), state["model"]).to(device)
    except (RuntimeError, ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"the checkpoint's weights do not fit its config: {last_line(error)}") from error


def check_data(trained_on: dict, data):
    """Raise ValueError unless a run was trained on this Dataset. `trained_on`: what its checkpoint says of its data."""
    if trained_on != data.meta:
        raise ValueError(f"{data.directory} is other data than this run was trained on (tokenizer, size or source)")


def restore(state: dict, model, optimizers, data):
    """Put a checkpoint into a fresh model and its optimizers. Raises ValueError if they differ."""
    check_data(state["data"], data)
    try:
        model.load_state_dict(state["model"])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
    except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"the checkpoint does not fit this model: {last_line(error)}") from error


def last_line(error: Exception) -> str:
    """Where torch says what is wrong with a checkpoint."""
    return str(error).splitlines()[-1].strip()
