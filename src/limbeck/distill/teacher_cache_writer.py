"""Making a teacher cache: the teacher runs once over the samples, a shard at a time; see `teacher_cache.py`."""

import hashlib
import json
import shutil
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock, Timeout
from transformers import PreTrainedModel

from limbeck.distill.base import Batch, in_own_dtype
from limbeck.distill.head import Predictions, inputs_of, predict
from limbeck.distill.observe import recording
from limbeck.distill.teacher_cache import FORMAT, MANIFEST, PLAN, TeacherCache, row_dtype, row_of, token_digests
from limbeck.distill.teacher_states import describe_states, states_of
from limbeck.errors import LimbeckError
from limbeck.files import replacing, sha256, write_text
from limbeck.ops.linear_top_k_kl import TopK, head_top_k, top_k_of_logits

SHARD_BYTES, LEAST_SAMPLES = 256 << 20, 8


@dataclass(frozen=True)
class Keeping:
    """What is kept of a teacher's predictions.

    Attributes:
        top_k: k, how many tokens.
        temperature: Divides the logits, as it does in the stage that reads them.
        stored: ``"float16"`` or ``"float32"``, of the log-probabilities.
        shard_samples: Samples in a shard; by default as many as make 256 MiB, and at least 8.
        hidden: ``"block"`` or ``"mixer"`` for the hidden states that a `HiddenObjective` of this target reads.
        hidden_stored: ``"bfloat16"`` or ``"float32"``, of the hidden states.
    """

    top_k: int = 64
    temperature: float = 1.0
    stored: str = "float16"
    shard_samples: int | None = None
    hidden: str | None = None
    hidden_stored: str = "bfloat16"


LIKELIEST = Keeping()


def write_teacher_cache(
    folder: str | Path,
    teacher: PreTrainedModel,
    batch_of: Callable[[range], Batch],
    *,
    samples: int,
    about: dict[str, Any],
    keeping: Keeping = LIKELIEST,
    batch_size: int = 8,
    report: Callable[[int], None] = lambda samples: None,
    note: Callable[[str], None] = lambda sentence: None,
) -> "TeacherCache":
    """Run a teacher over samples and keep its likeliest tokens, and its hidden states, or go on with it.

    Args:
        folder: Where; it may be what a killed call has left.
        teacher: In eval mode, in the number type it is to compute in.
        batch_of: Samples by their numbers → ``input_ids`` (b, l), ``attention_mask`` where there is padding.
        samples: How many there are.
        about: Plain values that tell this teacher and these samples from others, for the manifest: ``teacher`` and
            ``fingerprint`` (see `teacher_fingerprint`), ``data``.
        keeping: What is kept.
        batch_size: Samples in a forward pass.
        report: Called with the samples done.
        note: Called with a sentence that says how large it gets, before anything is written.

    Returns:
        The cache.

    Raises:
        LimbeckError: Another cache lies there, another process is at work, k does not suit the vocabulary, the disk
            has not the room, or the teacher's predictions are not finite.
    """
    folder = Path(folder)
    plan = _plan(teacher, batch_of, samples, about, keeping)
    _check_room(folder, plan, note)
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / ".lock", blocking=False)
    try:
        lock.acquire()
    except Timeout:
        raise LimbeckError(f"another process is preparing {folder}", expected="one at a time") from None
    with lock:
        _begin(folder, plan)
        if not (folder / MANIFEST).is_file():
            _fill(folder, plan, teacher, batch_of, batch_size, report)
    return TeacherCache(folder)


def _plan(
    teacher: PreTrainedModel, batch_of: Callable[[range], Batch], samples: int, about: dict[str, Any], keeping: Keeping
) -> dict[str, Any]:
    config: Any = teacher.config
    vocabulary = config.vocab_size
    if keeping.stored not in ("float16", "float32"):
        raise LimbeckError(f"log-probabilities stored in {keeping.stored}", expected="float16 or float32")
    if not 1 <= keeping.top_k <= vocabulary:
        raise LimbeckError(f"top_k = {keeping.top_k}", expected=f"1 … {vocabulary}, the teacher's vocabulary")
    if not keeping.temperature > 0:
        raise LimbeckError(f"temperature = {keeping.temperature}", expected="a number above 0")
    first = batch_of(range(1))
    length = first["input_ids"].shape[1]
    hidden = None if keeping.hidden is None else describe_states(teacher, keeping.hidden, keeping.hidden_stored)
    row = row_dtype(length, keeping.top_k, vocabulary, keeping.stored, hidden).itemsize
    return {
        "format": FORMAT,
        **about,
        "first_sample": int(token_digests(first)[0]),
        "last_sample": int(token_digests(batch_of(range(samples - 1, samples)))[0]),
        "samples": samples,
        "sequence_length": length,
        "vocabulary": vocabulary,
        "top_k": keeping.top_k,
        "temperature": float(keeping.temperature),
        "stored": keeping.stored,
        "hidden": hidden,
        "computed": str(teacher.dtype).removeprefix("torch."),
        "shard_samples": keeping.shard_samples or max(LEAST_SAMPLES, SHARD_BYTES // row),
    }


def _check_room(folder: Path, plan: dict[str, Any], note: Callable[[str], None]) -> None:
    """Say how large the cache gets, and refuse where what is still to be written does not fit on the disk."""
    row, written = row_of(plan).itemsize, sum(path.stat().st_size for path in folder.glob("shard-*.npy"))
    whole, each = plan["samples"] * row, row / plan["sequence_length"]
    disk = next(place for place in (folder.absolute(), *folder.absolute().parents) if place.is_dir())
    left, free = max(0, whole - written), shutil.disk_usage(disk).free
    note(
        f"teacher cache: {each:,.0f} bytes a token, {each / 1e3:.3g} GB for a million tokens; "
        f"{whole / 1e9:.3g} GB in all, {left / 1e9:.3g} GB to be written, {free / 1e9:.3g} GB free"
    )
    if left > free:
        raise LimbeckError(
            f"{free / 1e9:.3g} GB free at {disk}",
            expected=f"{left / 1e9:.3g} GB for {plan['samples']:,} samples",
            hint="fewer --samples, a lower --top-k, no --hidden-states, or another disk",
        )


def _begin(folder: Path, plan: dict[str, Any]) -> None:
    """Refuse to go on with what was begun as another cache."""
    begun = next((folder / name for name in (MANIFEST, PLAN) if (folder / name).is_file()), None)
    if begun is None:
        if other := [path.name for path in folder.glob("[!.]*")]:
            raise LimbeckError(f"{folder} holds {other[0]}", expected="a new folder", hint="another --output")
        write_text(folder / PLAN, _json(plan))
        return
    found = json.loads(begun.read_text())
    for key, value in json.loads(_json(plan)).items():
        if found.get(key) != value:
            raise LimbeckError(
                f"{folder} was begun with {key} = {_short(found.get(key))}",
                expected=f"{_short(value)}, as now",
                hint="the teacher, samples and options it was begun with; another --output; or remove it",
            )


def _fill(
    folder: Path,
    plan: dict[str, Any],
    teacher: PreTrainedModel,
    batch_of: Callable[[range], Batch],
    batch_size: int,
    report: Callable[[int], None],
) -> None:
    """Write the shards that are missing, then the manifest."""
    each, files, tokens = plan["shard_samples"], {}, hashlib.sha256()
    for number, start in enumerate(range(0, plan["samples"], each)):
        path, stop = folder / f"shard-{number:05d}.npy", min(start + each, plan["samples"])
        if not path.is_file():
            rows = np.zeros(stop - start, row_of(plan))
            for first in range(start, stop, batch_size):
                numbers = range(first, min(first + batch_size, stop))
                _predicted(rows[numbers.start - start : numbers.stop - start], teacher, batch_of(numbers), plan)
                report(numbers.stop)
            with replacing(path) as temporary:
                np.save(temporary, rows)
        report(stop)
        tokens.update(np.load(path, mmap_mode="r", allow_pickle=False)["tokens"].tobytes())
        files[path.name] = {"bytes": path.stat().st_size, "sha256": sha256(path)}
    write_text(folder / MANIFEST, _json({**plan, "tokens_sha256": tokens.hexdigest(), "files": files}))


@torch.no_grad()
def _predicted(rows: np.ndarray, teacher: PreTrainedModel, batch: Batch, plan: dict[str, Any]) -> None:
    """Fill the rows of a batch."""
    rows["tokens"] = token_digests(batch)
    batch = {name: tensor.to(teacher.device) for name, tensor in batch.items()}

    def kept(found: Predictions) -> TopK:
        if found.head is None:
            return top_k_of_logits(found.states, plan["top_k"], plan["temperature"])
        return head_top_k(found.states, found.head, plan["top_k"], plan["temperature"])

    hidden = plan["hidden"]
    with in_own_dtype(teacher), ExitStack() as stack:
        signals = {} if hidden is None else stack.enter_context(recording(teacher, batch.get("attention_mask")))
        top = predict(teacher, inputs_of(batch), kept)
    if not top.log_probs.isfinite().all():
        raise LimbeckError(
            "the teacher's predictions are not finite",
            expected="logits that are",
            hint="--dtype float32 or bfloat16, if it computes in float16",
        )
    if hidden is not None:
        rows["states"] = states_of(signals, hidden)
    rows["ids"], rows["log_probs"] = top.ids.cpu().numpy(), top.log_probs.float().cpu().numpy()
    rows["log_rest"] = top.log_rest.float().cpu().numpy()


def _json(value: dict[str, Any]) -> str:
    return json.dumps(value, indent=1) + "\n"


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) < 80 else text[:77] + "…"
