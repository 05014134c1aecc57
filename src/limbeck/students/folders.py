"""A checkpoint goes in, a student's checkpoint comes out: file by file, never the whole model in memory."""

import json
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
from transformers.initialization import no_init_weights

from limbeck.errors import LimbeckError
from limbeck.files import replacing_folder
from limbeck.mixers import Mixer, get_mixer
from limbeck.students.convert import student_config
from limbeck.students.families import attention_of, blocks, family_of
from limbeck.students.initialise import Init, start_mixers
from limbeck.students.loading import check_files, check_keys, has_tokenizer, load_config
from limbeck.students.modeling import student_class
from limbeck.students.shards import SafetensorsFile, Spec, Weights
from limbeck.students.sources import carried_files, checkpoint_folder


@dataclass(frozen=True)
class Conversion:
    """What a conversion did; saved as `conversion.json` beside the student.

    Attributes:
        family: The teacher's family.
        mixer: The mixer's name.
        mixer_kwargs: Its options.
        init: How the mixers started.
        seed: Of the mixers' random numbers.
        dtype: The student's dtype, such as "bfloat16".
        swapped_layers: The layers that got a mixer.
        kept_attention: The layers that kept their attention.
        copied: Parameters taken from the teacher, by name.
        made: Parameters that are new, by name.
        left_out: The teacher's parameters that the student has no use for, by name.
        carried: Files that were copied as they are.
        notes: What could not be carried over.
    """

    family: str
    mixer: str
    mixer_kwargs: dict[str, Any]
    init: str
    seed: int
    dtype: str
    swapped_layers: list[int]
    kept_attention: list[int]
    copied: list[str]
    made: list[str]
    left_out: list[str]
    carried: list[str]
    notes: list[str]

    def summary(self) -> str:
        """A few lines for people."""
        lines = [
            f"{len(self.swapped_layers)} of {len(self.swapped_layers) + len(self.kept_attention)} layers "
            f"of a {self.family} model swapped for {self.mixer} (init {self.init}, {self.dtype})",
            f"{len(self.copied)} tensors copied, {len(self.made)} made, {len(self.left_out)} left out",
            *([f"copied as they are: {', '.join(self.carried)}"] if self.carried else []),
            *(f"note: {note}" for note in self.notes),
        ]
        return "\n".join(lines)


def convert_folder(
    source: str | Path,
    destination: str | Path,
    mixer: str = "discrete-mamba2",
    keep_attention: Iterable[int] = (),
    init: Init = "attention",
    mixer_kwargs: Mapping[str, Any] | None = None,
    seed: int = 0,
) -> Conversion:
    """Convert a checkpoint on disk: the student that `convert` would make, at any size.

    Tensors that stay the teacher's are copied from file to file, in their dtype, into shards that mirror the source's;
    of what is made, one layer is in memory at a time. Tokenizer, chat templates, generation settings and licence are
    copied byte for byte. The destination appears whole or not at all.

    Args:
        source: A folder or a hub id.
        destination: A folder that does not exist, or is empty.
        mixer: As in `convert`.
        keep_attention: As in `convert`.
        init: As in `convert`.
        mixer_kwargs: As in `convert`.
        seed: As in `convert`.

    Returns:
        What was done; also written to `conversion.json` in the destination.

    Raises:
        LimbeckError: When the destination holds something, a file is missing or cut short, the weights do not fit
            their configuration, and for all that `convert` refuses.
    """
    target = Path(destination)
    check_destination(target)
    teacher_config = load_config(source)
    config = student_config(teacher_config, mixer, keep_attention, init, mixer_kwargs)  # errors before weights
    folder = checkpoint_folder(source)
    weights = Weights(check_files(folder))
    plan = _Plan(teacher_config, config, weights, str(source))
    with replacing_folder(target) as work:
        notes = plan.write(work, init, seed)
        config.save_pretrained(work)
        carried = carried_files(folder)
        for path in carried:
            (work / path).parent.mkdir(exist_ok=True)
            shutil.copyfile(folder / path, work / path)
        if not has_tokenizer(folder):
            notes.append(f"no tokenizer in {source}")
        conversion = Conversion(
            family=family_of(config).name,
            mixer=mixer,
            mixer_kwargs=config.mixer_kwargs,
            init=init,
            seed=seed,
            dtype=str(config.dtype).removeprefix("torch."),
            swapped_layers=config.swapped_layers,
            kept_attention=sorted(set(range(config.num_hidden_layers)) - set(config.swapped_layers)),
            copied=sorted(plan.copied.values()),
            made=sorted(plan.made.values()),
            left_out=sorted(plan.left_out),
            carried=[path.as_posix() for path in carried],
            notes=notes,
        )
        report = json.dumps(asdict(conversion), indent=2, ensure_ascii=False)
        (work / "conversion.json").write_text(report + "\n", encoding="utf-8")
    return conversion


def check_destination(folder: Path) -> None:
    """Refuse a folder that holds something.

    Args:
        folder: Where a student is to be written.

    Raises:
        LimbeckError: It exists and is not empty, or is no folder.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise LimbeckError(
            f"{folder} holds something already",
            expected="a folder that does not exist or is empty",
            hint="another name",
        )


class _Plan:
    """Which tensor of a student comes from where, and into which file it goes.

    Attributes:
        copied: The student's names of the tensors that are copied, by their keys in the source, which they keep.
        made: The student's names of the mixers' tensors, by the keys they get.
        left_out: Keys of the source that the student has no use for.
    """

    def __init__(self, teacher_config: Any, config: Any, weights: Weights, source: str):
        family = family_of(teacher_config)
        self.teacher_config, self.config, self.weights = teacher_config, config, weights
        config.dtype = _dtype(teacher_config, weights)
        config.architectures = [student_class(family).__name__]
        self.teacher = _without_weights(family.causal_lm_class, teacher_config, config.dtype)
        student = _without_weights(student_class(family), config, config.dtype)
        own = student.state_dict()
        self.names = _loaded_names(self.teacher, weights.specs)
        _check_fit(self.teacher, self.names, weights, source)

        self.copied = {key: name for key, name in self.names.items() if name in own}
        for key in _tied_twice(self.teacher, self.names, weights):
            self.copied.pop(key)
        self.made, self.files = {}, {key: weights.file_of[key] for key in self.copied}
        self.specs = {key: weights.specs[key] for key in self.copied}
        for index in config.swapped_layers:
            site = self._site(index)
            prefix, file = _place(site, self.names, weights)
            for name in own:
                if name.startswith(f"{site}mixer."):
                    key = prefix + name.removeprefix(site)
                    self.made[key], self.files[key] = name, file
                    self.specs[key] = Spec(own[name].dtype, tuple(own[name].shape))
        self.left_out = set(weights.specs) - set(self.copied)
        written = _loaded_names(student, self.files)
        missing, _ = _unfilled(student, written)
        assert not missing, f"written under a key that does not load: {sorted(missing)[:4]}"

    def _site(self, index: int) -> str:
        """The prefix of a layer's attention in names, with the dot."""
        attention = attention_of(blocks(self.teacher)[index])
        return next(name for name, module in self.teacher.named_modules() if module is attention) + "."

    def write(self, folder: Path, init: Init, seed: int) -> list[str]:
        """Write the student's weight files.

        Returns:
            Notes on what could not be carried over from attention.
        """
        shards = {file: _shard_name(file) for file in dict.fromkeys(self.files.values())}
        with ExitStack() as stack:
            writers = {
                file: stack.enter_context(
                    SafetensorsFile(
                        folder / name, {key: self.specs[key] for key in self.files if self.files[key] == file}
                    )
                )
                for file, name in shards.items()
            }
            for key in self.copied:
                writers[self.files[key]].put_from(key, self.weights, key)
            notes = start_mixers(self._layers(writers, init), self.teacher_config, init, seed)
        if set(shards.values()) != {"model.safetensors"}:
            index = {
                "metadata": {"total_size": sum(spec.bytes for spec in self.specs.values())},
                "weight_map": {key: shards[file] for key, file in sorted(self.files.items())},
            }
            (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
        return notes

    def _layers(self, writers: Mapping[Path, SafetensorsFile], init: Init) -> Iterator[tuple[int, Mixer, nn.Module]]:
        """For every swapped layer its new mixer and its attention; when the mixer has been started, it is written."""
        keys = {name: key for key, name in self.made.items()}
        for index in self.config.swapped_layers:
            site, attention = self._site(index), attention_of(blocks(self.teacher)[index])
            if init == "attention":
                self._fill(attention, site)
            mixer = _new_mixer(self.config)
            yield index, mixer, attention
            attention.to("meta")
            for name, tensor in mixer.state_dict().items():
                key = keys[f"{site}mixer.{name}"]
                writers[self.files[key]].put(key, tensor)

    def _fill(self, attention: nn.Module, site: str) -> None:
        """Put a layer's weights into its attention, in the dtype that the teacher would have them in."""
        own = attention.state_dict()
        found = {name.removeprefix(site): key for key, name in self.names.items()}
        tensors = {name: self.weights.read(found[name]).to(own[name].dtype) for name in own}
        attention.load_state_dict(tensors, assign=True)


# --- what is where ----------------------------------------------------------------------------------------------------


def _dtype(config: Any, weights: Weights) -> torch.dtype:
    """The dtype a checkpoint is in: what its configuration says, or else that of its first floating-point tensor."""
    if config.dtype is not None:
        return config.dtype
    return next((spec.dtype for spec in weights.specs.values() if spec.dtype.is_floating_point), torch.float32)


def _without_weights(cls: Any, config: PretrainedConfig, dtype: torch.dtype) -> Any:
    with torch.device("meta"), no_init_weights():
        return cls._from_config(config, dtype=dtype)


def _new_mixer(config: Any) -> Mixer:
    """A mixer in a student's dtype, whose values are still to come."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(config.dtype)
    try:
        with torch.random.fork_rng(devices=[]), no_init_weights():
            return get_mixer(config.mixer)(config.hidden_size, **config.mixer_kwargs)
    finally:
        torch.set_default_dtype(before)


def _loaded_names(model: PreTrainedModel, keys: Iterable[str]) -> dict[str, str]:
    """Under which name `from_pretrained` would load each key; keys of an older layout are renamed there.

    Raises:
        LimbeckError: When weights would have to be rearranged, not only renamed.
    """
    state = model.state_dict()
    transforms = get_model_conversion_mapping(model)
    renamings: Any = [transform for transform in transforms if isinstance(transform, WeightRenaming)]
    converters: Any = [transform for transform in transforms if isinstance(transform, WeightConverter)]
    names = {}
    for key in keys:
        name, rearranged = rename_source_key(key, renamings, converters, model.base_model_prefix, state)
        if name not in state and key in state:  # it is not of the older layout
            name, rearranged = key, None
        if rearranged is not None:
            raise LimbeckError(
                f"{key} is in a layout that is rearranged on loading",
                expected="weights that are at most renamed",
                hint="from_pretrained(…), then save_pretrained(…, save_original_format=False), and convert that",
            )
        names[key] = name
    return names


def _unfilled(model: PreTrainedModel, names: Mapping[str, str]) -> tuple[set[str], set[str]]:
    """What weights with these names leave unfilled in a model, and what of them the model has no place for."""
    state, given = set(model.state_dict()), set(names.values())
    found: Any = SimpleNamespace(missing_keys=state - given, unexpected_keys=given - state)
    model._adjust_missing_and_unexpected_keys(found)  # such as the masks that older checkpoints hold
    tied: Any = model.all_tied_weights_keys
    filled = {name for pair in tied.items() if given & set(pair) for name in pair}
    return found.missing_keys - filled, found.unexpected_keys


def _check_fit(teacher: PreTrainedModel, names: Mapping[str, str], weights: Weights, source: str) -> None:
    missing, unexpected = _unfilled(teacher, names)
    check_keys(missing, unexpected, source)
    state = teacher.state_dict()
    for key, name in names.items():
        if name in state and weights.specs[key].shape != tuple(state[name].shape):
            raise LimbeckError(
                f"{key} in {weights.file_of[key]} has shape {weights.specs[key].shape}",
                expected=f"{tuple(state[name].shape)}, by its configuration",
                hint="check that config.json and the weights belong together",
            )


def _tied_twice(teacher: PreTrainedModel, names: Mapping[str, str], weights: Weights) -> list[str]:
    """Keys of tied tensors that a `.bin` file lists a second time."""
    keys = {name: key for key, name in names.items()}
    tied: Any = teacher.all_tied_weights_keys
    pairs = [(keys[a], keys[b]) for a, b in tied.items() if a in keys and b in keys]
    return [first for first, second in pairs if weights.share_memory(first, second)]


def _place(site: str, names: Mapping[str, str], weights: Weights) -> tuple[str, Path]:
    """The prefix that a layer's attention has in the source's keys, and the file where it begins."""
    for key, name in names.items():
        if name.startswith(site) and key.endswith(part := name.removeprefix(site)):
            return key.removesuffix(part), weights.file_of[key]
    return site, next(iter(weights.file_of.values()))


def _shard_name(file: Path) -> str:
    """A shard's name, as safetensors: pytorch_model-00001-of-00002.bin is model-00001-of-00002.safetensors."""
    return f"{file.stem.removeprefix('pytorch_')}.safetensors"
