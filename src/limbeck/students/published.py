"""Checkpoints that others have published become students: Phi-Mamba, Hybrid-Phi-Mamba, CALD's GPT-NeoX with Mamba."""

import json
import pickle
import shutil
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig
from transformers.initialization import no_init_weights

from limbeck.errors import LimbeckError
from limbeck.files import replacing_folder
from limbeck.students.families import family_of
from limbeck.students.loading import check_files, has_tokenizer, load_tokenizer
from limbeck.students.modeling import student_class
from limbeck.students.published_layouts import Layout, read_layout
from limbeck.students.shards import SafetensorsFile, Spec, Weights
from limbeck.students.sources import carried_files, checkpoint_folder


@dataclass(frozen=True)
class Import:
    """What an import did; saved as `import.json` beside the student.

    Attributes:
        source: The folder or hub id.
        layout: The layout it was in.
        family: The student's family.
        mixer: The mixer's name.
        mixer_kwargs: Its options.
        swapped_layers: The layers with a mixer.
        kept_attention: The layers with attention.
        dtype: The student's dtype, such as "bfloat16".
        tensors: How many tensors there are.
        notes: What is worth knowing.
    """

    source: str
    layout: str
    family: str
    mixer: str
    mixer_kwargs: dict[str, Any]
    swapped_layers: list[int]
    kept_attention: list[int]
    dtype: str
    tensors: int
    notes: list[str]

    def summary(self) -> str:
        """A few lines for people."""
        layers = f"{len(self.swapped_layers)} layers of {self.mixer}, {len(self.kept_attention)} of attention"
        lines = [
            f"{self.layout}: {layers}",
            f"{self.tensors} tensors in {self.dtype}; the student is of the family {self.family}",
            *(f"note: {note}" for note in self.notes),
        ]
        return "\n".join(lines)


def import_checkpoint(source: str | Path, destination: str | Path, tokenizer: str | Path | None = None) -> Import:
    """Turn a published checkpoint into a student's checkpoint, which loads as any other.

    The layout is read from its config.json. Every tensor must be there and have its shape, and none may be left over.
    Values and dtype are kept; one tensor is in memory at a time. The destination appears whole or not at all.

    Args:
        source: A folder, or a hub id such as ``"goombalab/Phi-Mamba"``, with `.safetensors` or `.bin` weights.
        destination: A folder that does not exist, or is empty.
        tokenizer: A folder or a hub id to take the tokenizer from, such as ``"microsoft/phi-1_5"``; by default the
            source's own, if it has one.

    Returns:
        What was done; also written to `import.json` in the destination.

    Raises:
        LimbeckError: When the destination holds something; when the layout, a section, a key or a tensor is unknown,
            missing or of another shape; when a file is missing or cut short; when the tokenizer has more tokens than
            the model.
    """
    target = Path(destination)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise LimbeckError(
            f"{target} holds something already",
            expected="a folder that does not exist or is empty",
            hint="another name",
        )
    folder = checkpoint_folder(source)
    layout = read_layout(_content(folder / "config.json"), str(source))
    weights = _open(folder)
    plan = _Plan(layout, weights, str(source))
    if tokenizer is None and has_tokenizer(folder):
        tokenizer = folder
    loaded = None if tokenizer is None else _fitting_tokenizer(tokenizer, layout.config.vocab_size)
    if loaded is None:
        plan.notes.append("no tokenizer: --tokenizer names a folder or a hub id to take one from")
    with replacing_folder(target) as work:
        plan.write(work)
        layout.config.save_pretrained(work)
        if loaded is not None:
            loaded.save_pretrained(work)
        for path in carried_files(folder):
            if not (work / path).exists() and path.name.startswith(("LICENSE", "NOTICE")):
                shutil.copyfile(folder / path, work / path)
        _generation_config(layout.config, loaded).save_pretrained(work)
        report = plan.report(source)
        text = json.dumps(asdict(report), indent=2, ensure_ascii=False)
        (work / "import.json").write_text(text + "\n", encoding="utf-8")
    return report


class _Plan:
    """Which tensor of the student is which of the checkpoint, and what they look like."""

    def __init__(self, layout: Layout, weights: Weights, source: str):
        self.layout, self.weights, config = layout, weights, layout.config
        if layout.embedding not in weights.specs:
            raise _missing([layout.embedding], source)
        config.dtype = weights.specs[layout.embedding].dtype
        config.architectures = [student_class(family_of(config)).__name__]
        with torch.device("meta"), no_init_weights():
            student = student_class(family_of(config))._from_config(config, dtype=config.dtype)
        self.specs = {name: Spec(t.dtype, tuple(t.shape)) for name, t in student.state_dict().items()}
        self.keys = {name: layout.published(name) for name in self.specs}
        self.notes: list[str] = []
        self._check(source)

    def _check(self, source: str) -> None:
        """Compare names, shapes and types; see `import_checkpoint`."""
        found, wanted = self.weights.specs, set(self.keys.values())
        if missing := sorted(wanted - set(found)):
            raise _missing(missing, source)
        if extra := sorted(set(found) - wanted):
            raise LimbeckError(
                f"unknown weights in {source}: {_listed(extra)}",
                expected=f"the {len(wanted)} weights that its config.json asks for",
                hint="check that config.json and the weights belong together",
            )
        narrowed = []
        for name, key in self.keys.items():
            if found[key].shape != self.specs[name].shape:
                raise LimbeckError(
                    f"{key} in {self.weights.file_of[key]} has shape {found[key].shape}",
                    expected=f"{self.specs[name].shape}, by its config.json",
                )
            if not found[key].dtype.is_floating_point:
                raise LimbeckError(f"{key} in {self.weights.file_of[key]} is in {found[key].dtype}", "floating point")
            if torch.finfo(found[key].dtype).bits > torch.finfo(self.specs[name].dtype).bits:
                narrowed.append(key)
        if narrowed:
            dtype = str(self.layout.config.dtype).removeprefix("torch.")
            self.notes.append(f"{len(narrowed)} tensors became {dtype}, as the embedding is: {', '.join(narrowed[:4])}")

    def write(self, folder: Path) -> None:
        """Write the student's weights, in as many files as the checkpoint has."""
        files = sorted({self.weights.file_of[key] for key in self.keys.values()})
        many = len(files) > 1
        names = {
            file: f"model-{i:05}-of-{len(files):05}.safetensors" if many else "model.safetensors"
            for i, file in enumerate(files, start=1)
        }
        place = {name: self.weights.file_of[key] for name, key in self.keys.items()}
        with ExitStack() as stack:
            for file in files:  # one after the other: a `.bin` file is mapped while it is read
                specs = {name: spec for name, spec in self.specs.items() if place[name] == file}
                saved = {self.layout.saved(name): spec for name, spec in specs.items()}
                writer = stack.enter_context(SafetensorsFile(folder / names[file], saved))
                for name, spec in specs.items():
                    writer.put(self.layout.saved(name), self.weights.read(self.keys[name]).to(spec.dtype))
        if many:
            index = {
                "metadata": {"total_size": sum(spec.bytes for spec in self.specs.values())},
                "weight_map": {self.layout.saved(name): names[file] for name, file in sorted(place.items())},
            }
            (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")

    def report(self, source: str | Path) -> Import:
        config = self.layout.config
        return Import(
            source=str(source),
            layout=self.layout.name,
            family=family_of(config).name,
            mixer=config.mixer,
            mixer_kwargs=config.mixer_kwargs,
            swapped_layers=config.swapped_layers,
            kept_attention=sorted(set(range(config.num_hidden_layers)) - set(config.swapped_layers)),
            dtype=str(config.dtype).removeprefix("torch."),
            tensors=len(self.specs),
            notes=self.notes,
        )


def _missing(keys: list[str], source: str) -> LimbeckError:
    return LimbeckError(
        f"weights are missing in {source}: {_listed(keys)}",
        expected="every weight that its config.json asks for",
        hint="check that config.json and the weights belong together",
    )


def _listed(keys: list[str]) -> str:
    return ", ".join(keys[:8]) + (f" and {len(keys) - 8} more" if len(keys) > 8 else "")


def _content(file: Path) -> Any:
    if not file.is_file():
        raise LimbeckError(f"no config.json in {file.parent}", expected="a folder with a published checkpoint")
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise LimbeckError(
            f"{file} is not JSON: {error}", expected="the config.json of a published checkpoint"
        ) from error


def _open(folder: Path) -> Weights:
    files = check_files(folder)
    try:
        return Weights(files)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise LimbeckError(
            f"the weights in {folder} cannot be read: {str(error).strip().splitlines()[0]}",
            expected="tensors by name, as torch.save writes them (read with weights_only=True)",
        ) from error


def _fitting_tokenizer(source: str | Path, vocabulary: int) -> Any:
    tokenizer = load_tokenizer(source)
    if len(tokenizer) > vocabulary:
        raise LimbeckError(
            f"the tokenizer of {source} has {len(tokenizer)} tokens",
            expected=f"{vocabulary} at most, the model's vocabulary",
            hint="the tokenizer of the model's teacher",
        )
    return tokenizer


def _generation_config(config: Any, tokenizer: Any) -> GenerationConfig:
    """Where to stop, from the tokenizer if there is one: the published configurations do not say it."""
    eos = config.eos_token_id if tokenizer is None else tokenizer.eos_token_id
    bos = config.bos_token_id if tokenizer is None else tokenizer.bos_token_id
    return GenerationConfig(bos_token_id=bos, eos_token_id=eos)
