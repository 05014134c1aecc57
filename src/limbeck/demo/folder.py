"""Where the parts of a demo lie."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from limbeck.data import load_tokens


@dataclass(frozen=True)
class Folder:
    """Where the demo's parts lie."""

    path: Path

    @property
    def teacher(self) -> Path:
        """The teacher, a Hugging Face folder."""
        return self.path / "teacher"

    def corpus(self, part: Literal["training", "held-out"]) -> Path:
        """The text of a part, one file a line."""
        return self.path / "corpus" / f"{part}.jsonl"

    def run(self, way: str, seed: int) -> Path:
        """The run of one student."""
        return self.path / f"seed-{seed}" / way

    def tokens(self, part: Literal["training", "held-out"]) -> np.ndarray:
        """The tokens of a part."""
        return load_tokens(self.path / "corpus" / f"{part}.npy")

    def updates(self, pattern: str) -> int:
        """Updates that the runs under a pattern have done so far."""
        return sum(path.read_bytes().count(b'"grad_norm"') for path in self.path.glob(pattern))
