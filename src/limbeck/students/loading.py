"""The one way to load models and tokenizers: complete, or an error that names what is missing."""

import json
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PretrainedConfig, PreTrainedModel

from limbeck.errors import LimbeckError
from limbeck.students.activations import fuse_activations
from limbeck.students.families import family_of
from limbeck.students.shards import cut_short, read_header

WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
"""Where weights may begin, in the order transformers looks for them."""


def load_config(source: str | Path) -> PretrainedConfig:
    """Load a model's configuration from a folder or a hub id.

    Raises:
        LimbeckError: When there is none, or transformers does not know it.
    """
    path = Path(source)
    if path.is_dir() and not (path / "config.json").is_file():
        raise LimbeckError(f"no config.json in {path}", expected="a folder with a Hugging Face checkpoint")
    try:
        return AutoConfig.from_pretrained(source)
    except LimbeckError:
        raise
    except (OSError, ValueError, KeyError) as error:
        raise not_loaded("configuration", source, error) from error


def load_model(
    source: str | Path, *, dtype: torch.dtype | str | None = None, device: torch.device | str | None = None
) -> PreTrainedModel:
    """Load a causal language model, teacher or student, in eval mode.

    Args:
        source: A folder or a hub id.
        dtype: What to load as; by default what the checkpoint is in.
        device: Where to put it; by default on the CPU.

    Raises:
        LimbeckError: When a file is missing or cut short, or the checkpoint leaves a parameter unfilled.
    """
    config = load_config(source)
    if Path(source).is_dir():
        check_files(Path(source))
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            source, config=config, dtype=dtype or "auto", output_loading_info=True
        )
        model, info = loaded
    except LimbeckError:
        raise
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise not_loaded("model", source, error) from error
    check_keys(info["missing_keys"], info["unexpected_keys"], str(source))
    fuse_activations(model)
    return model.to(device) if device is not None else model


def load_tokenizer(source: str | Path) -> Any:
    """Load the tokenizer of a folder or a hub id.

    Raises:
        LimbeckError: When there is none.
    """
    folder = Path(source)
    if folder.is_dir() and not has_tokenizer(folder):  # transformers would make an empty one
        raise LimbeckError(f"no tokenizer in {folder}", expected="tokenizer.json, or the files of another tokenizer")
    try:
        return AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise not_loaded("tokenizer", source, error) from error


def has_tokenizer(folder: Path) -> bool:
    """Whether a folder holds a tokenizer's files."""
    return any(any(folder.glob(pattern)) for pattern in ("tokenizer*", "vocab*", "*.model", "*.tiktoken"))


def not_loaded(what: str, source: str | Path, error: Exception) -> LimbeckError:
    """The error for what transformers or the hub could not load."""
    local = Path(source).is_dir()
    kind = "folder" if local else "hub id, and no folder of that name is here,"
    return LimbeckError(
        f"cannot load a {what} from {str(source)!r}: {str(error).strip() or type(error).__name__}",
        expected=f"a {what} that transformers can load without remote code; this is a {kind} it cannot load from",
        hint="" if local else f"the right name, a network, or a folder: `hf download {source}` where there is one",
    )


# --- nothing missing, nothing left over -----------------------------------------------------------------------------


def check_loaded(model: PreTrainedModel, info: Mapping[str, Any]) -> None:
    """Make sure that a load filled a student completely.

    Each swapped layer must either be there whole, or be new whole: all of the mixer missing and the attention it
    replaces unused. Beyond that nothing may be missing or left over.

    Args:
        model: The student.
        info: `missing_keys` and `unexpected_keys` of the load.

    Raises:
        LimbeckError: When it is otherwise.
    """
    missing, unexpected = set(info["missing_keys"]), set(info["unexpected_keys"])
    family = family_of(model.config)
    for index in model.config.swapped_layers:
        site = f"{family.blocks}.{index}.{family.attention}."
        mixer = {key for key in model.state_dict() if f"{site}mixer." in key}
        attention = {key for key in unexpected if site in key and f"{site}mixer." not in key}
        if mixer <= missing and attention:
            missing, unexpected = missing - mixer, unexpected - attention
    if not hasattr(model, model.base_model_prefix):  # a backbone leaves the head of a language model alone
        parts = {name for name, _ in model.named_children()} | {model.base_model_prefix}
        unexpected = {key for key in unexpected if key.split(".")[0] in parts}
    check_keys(missing, unexpected, model.name_or_path or "these weights")


def check_keys(missing: Iterable[str], unexpected: Iterable[str], source: str) -> None:
    """Refuse weights that leave a parameter unfilled, or that have no place.

    Raises:
        LimbeckError: When there is any of either; the message names them.
    """
    found = [
        f"{len(keys)} {what} ({', '.join(keys[:4])}{', …' if len(keys) > 4 else ''})"
        for what, keys in (("missing", sorted(missing)), ("left over", sorted(unexpected)))
        if keys
    ]
    if found:
        raise LimbeckError(
            f"the weights in {source} do not fit their configuration: {'; '.join(found)}",
            expected="every parameter filled and none left over (mixers may be new, all of a layer at once)",
            hint="check that config.json and the weights belong together",
        )


# --- files ----------------------------------------------------------------------------------------------------------


def check_files(folder: Path) -> list[Path]:
    """Make sure that a checkpoint's weight files are all there and whole, without reading the weights.

    Args:
        folder: With config.json and weights.

    Returns:
        The weight files.

    Raises:
        LimbeckError: When one is missing or cut short; the message names it.
    """
    start = next((folder / name for name in WEIGHT_FILES if (folder / name).is_file()), None)
    if start is None:
        raise LimbeckError(f"no weights in {folder}", expected=f"one of {', '.join(WEIGHT_FILES)}")
    files = indexed(start) if start.suffix == ".json" else [start]
    for file in files:
        if not file.is_file():
            raise LimbeckError(f"{file} is missing", expected=f"every file that {start.name} lists")
        check = read_header if file.suffix == ".safetensors" else _check_bin
        check(file)
    return files


def indexed(index: Path) -> list[Path]:
    """The files that an index of weights lists."""
    try:
        names = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
    except (ValueError, KeyError, AttributeError) as error:
        raise LimbeckError(f"{index} is not an index of weights", expected="JSON with a weight_map") from error
    return [index.parent / name for name in sorted(set(names))]


def _check_bin(file: Path) -> None:
    """A torch file is a zip archive, whose list of contents comes last."""
    if not zipfile.is_zipfile(file):
        raise cut_short(file, file.stat().st_size, "a whole file as torch.save writes it")
