"""A teacher's predictions on disk: run once over the samples, read by every stage and every run after that.

A cache is a folder. Each ``shard-00000.npy`` holds a row for every sample, one behind the other, so that a sample is
one stretch of the file, which is mapped and never read whole:

    tokens     uint64             a digest of the sample's tokens, by which a row knows what it belongs to
    log_rest   float32 (l,)       logarithm of the mass of all tokens that are not among the k
    ids        uint16/32 (l, k)   the k likeliest tokens
    log_probs  float16/32 (l, k)  their log-probabilities over the whole vocabulary
    states     bfloat16/float32   hidden states (n, l, d), where they were asked for; see `teacher_states.py`

``plan.json`` says what is being made and is there from the start; ``manifest.json`` is that and the shards with their
sizes and sha256, and is there from the end. A shard appears whole or not at all, and what it holds depends on the plan
alone: after a kill the same call goes on, and leaves the bytes of a call without one.
"""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from limbeck.distill.base import Batch
from limbeck.distill.teacher_states import STATES, states_field, states_tensor
from limbeck.errors import LimbeckError
from limbeck.files import sha256
from limbeck.ops.linear_top_k_kl import TopK
from limbeck.students import check_files, load_config

FORMAT = "limbeck-teacher-cache-1"
MANIFEST, PLAN = "manifest.json", "plan.json"
KEYS = ("teacher_ids", "teacher_log_probs", "teacher_log_rest")
AGAIN = "limbeck prepare --teacher makes another, in a folder of its own"


class TeacherCache:
    """A finished cache.

    Args:
        folder: Of `write_teacher_cache`.

    Attributes:
        manifest: What it says of itself.

    Raises:
        LimbeckError: It is none, is not finished, or a file is missing or of another size.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        path = self.folder / MANIFEST
        if not path.is_file():
            begun = (self.folder / PLAN).is_file()
            raise LimbeckError(
                f"{folder} is {'an unfinished' if begun else 'no'} teacher cache",
                expected=f"a folder with {MANIFEST}",
                hint="limbeck prepare --teacher, which goes on where it stopped"
                if begun
                else "limbeck prepare --teacher",
            )
        self.manifest: dict[str, Any] = json.loads(path.read_text())
        if self.manifest.get("format") != FORMAT:
            raise LimbeckError(f"{path} is of format {self.manifest.get('format')!r}", expected=FORMAT, hint=AGAIN)
        for name, about in self.manifest["files"].items():
            size = (self.folder / name).stat().st_size if (self.folder / name).is_file() else None
            if size != about["bytes"]:
                raise LimbeckError(
                    f"{self.folder / name} " + ("is missing" if size is None else f"has {size} bytes"),
                    expected=f"{about['bytes']} bytes",
                    hint=f"copy it again; or remove it and {MANIFEST}, and the same limbeck prepare makes it anew",
                )
        self.vocabulary: int = self.manifest["vocabulary"]
        self._shards: dict[int, np.ndarray] = {}

    def __len__(self) -> int:
        """Count the samples."""
        return self.manifest["samples"]

    def verify(self) -> None:
        """Read everything and compare the hashes.

        Raises:
            LimbeckError: A file has other bytes than were written.
        """
        for name, about in self.manifest["files"].items():
            if (found := sha256(self.folder / name)) != about["sha256"]:
                raise LimbeckError(
                    f"{self.folder / name} has sha256 {found}", expected=about["sha256"], hint="copy it again"
                )

    def rows(self, indices: Iterable[int], batch: Batch) -> dict[str, Tensor]:
        """What the teacher predicted for a batch.

        Args:
            indices: The samples of the batch, by their numbers.
            batch: Their tokens, which are compared with those that the teacher saw.

        Returns:
            ``teacher_ids`` (b, l, k) int32, ``teacher_log_probs`` (b, l, k) and ``teacher_log_rest`` (b, l) float32,
            for `target_of`. What float16 has cost is evened out: the k and the rest make 1.

        Raises:
            LimbeckError: A sample is not here, or had other tokens.
        """
        rows = self.compare(indices, batch)
        found = {name: np.stack([row[name] for row in rows]) for name in ("ids", "log_probs", "log_rest")}
        log_probs, log_rest = (torch.from_numpy(found[name].astype(np.float32)) for name in ("log_probs", "log_rest"))
        mass = torch.log(-torch.expm1(log_rest)).unsqueeze(-1)
        log_probs = log_probs.log_softmax(dim=-1) + mass
        return dict(zip(KEYS, (torch.from_numpy(found["ids"].astype(np.int32)), log_probs, log_rest), strict=True))

    def states(self, indices: Iterable[int], batch: Batch) -> dict[str, Tensor]:
        """What the teacher's layers took in and put out for a batch.

        Args:
            indices: The samples of the batch, by their numbers.
            batch: Their tokens, which are compared with those that the teacher saw.

        Returns:
            ``teacher_states`` (b, n, l, d), as they are stored, for `HiddenObjective`.

        Raises:
            LimbeckError: The cache has none, a sample is not here, or had other tokens.
        """
        hidden = self.manifest.get("hidden")
        if hidden is None:
            raise LimbeckError(
                f"{self.folder} holds no hidden states",
                expected="a cache that was made with them",
                hint="limbeck prepare --teacher … --hidden-states block, in a folder of its own",
            )
        rows = self.compare(indices, batch)
        return {STATES: states_tensor([row["states"] for row in rows], hidden["stored"])}

    def compare(self, indices: Iterable[int], batch: Batch) -> list[Any]:
        """Find the rows of a batch, of which nothing is read but their digests.

        Raises:
            LimbeckError: A sample is not here, or had other tokens.
        """
        rows = []
        for index, seen in zip(indices, token_digests(batch), strict=True):
            rows.append(self._row(int(index)))
            if rows[-1]["tokens"] != seen:
                raise LimbeckError(
                    f"sample {index} has other tokens than {self.folder} was made from",
                    expected=f"the data it was made from, {self.manifest['data']}, and its tokenizer",
                    hint=AGAIN,
                )
        return rows

    def _row(self, index: int) -> Any:
        if not 0 <= index < len(self):
            raise LimbeckError(f"sample {index} is not in {self.folder}", expected=f"one of {len(self)}", hint=AGAIN)
        number, place = divmod(index, self.manifest["shard_samples"])
        if number not in self._shards:
            path = self.folder / f"shard-{number:05d}.npy"
            shard = np.load(path, mmap_mode="r", allow_pickle=False)
            if shard.dtype != row_of(self.manifest):
                raise LimbeckError(f"{path} has rows of {shard.dtype}", expected=str(row_of(self.manifest)))
            self._shards[number] = shard
        return self._shards[number][place]


def target_of(batch: Batch, vocabulary: int) -> TopK | None:
    """What a batch carries of a teacher's predictions, over so many tokens; None where it carries none."""
    if KEYS[0] not in batch:
        return None
    ids, log_probs, log_rest = (batch[key] for key in KEYS)
    return TopK(ids, log_probs, log_rest, vocabulary)


def token_digests(batch: Batch) -> np.ndarray:
    """A digest (b,) uint64 of each sample's inputs and of where they are padded."""
    parts = [batch[name].cpu().numpy().astype("<i8") for name in ("input_ids", "attention_mask") if name in batch]
    digests = [
        hashlib.blake2b(b"".join(row.tobytes() for row in rows), digest_size=8) for rows in zip(*parts, strict=True)
    ]
    return np.array([int.from_bytes(digest.digest(), "little") for digest in digests], np.uint64)


def row_dtype(length: int, k: int, vocabulary: int, stored: str, hidden: dict[str, Any] | None = None) -> np.dtype:
    """The type of a sample's row; `hidden` is of `describe_states`, where there are hidden states."""
    ids = "<u2" if vocabulary <= 2**16 else "<u4"
    log_probs = {"float16": "<f2", "float32": "<f4"}[stored]
    return np.dtype(
        [
            ("tokens", "<u8"),
            ("log_rest", "<f4", (length,)),
            ("ids", ids, (length, k)),
            ("log_probs", log_probs, (length, k)),
            *([] if hidden is None else [states_field(hidden, length)]),
        ]
    )


def row_of(plan: dict[str, Any]) -> np.dtype:
    """The type of a row, by what a plan or a manifest says."""
    sizes = plan["sequence_length"], plan["top_k"], plan["vocabulary"]
    return row_dtype(*sizes, plan["stored"], plan.get("hidden"))


def teacher_fingerprint(source: str | Path) -> dict[str, Any]:
    """What tells a teacher from any other: for a folder the hashes of its weights and configuration, wherever it lies.

    For a hub id it is the id and the commit.
    """
    folder = Path(source)
    if not folder.is_dir():
        return {"source": str(source), "commit": getattr(load_config(source), "_commit_hash", None)}
    return {"files": {file.name: sha256(file) for file in sorted([*check_files(folder), folder / "config.json"])}}
