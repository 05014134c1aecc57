"""A corpus that every machine has: the source of Python's standard library, without its tests."""

import sysconfig
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from limbeck.errors import LimbeckError

LEFT_OUT = frozenset({"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"})


def standard_library_files() -> list[Path]:
    """List the standard library's source files, sorted by their path within it.

    Left out are tests, installed packages, empty files, and what the build wrote for this one machine.

    Raises:
        LimbeckError: This Python carries no source.
    """
    root = Path(sysconfig.get_path("stdlib"))
    names = sorted(path.relative_to(root).as_posix() for path in root.rglob("*.py"))
    files = [
        root / name for name in names if LEFT_OUT.isdisjoint(name.split("/")[:-1]) and "_sysconfigdata" not in name
    ]
    files = [file for file in files if file.is_file() and file.stat().st_size]
    if not files:
        raise LimbeckError(
            f"no source of the standard library in {root}",
            expected="a Python with its .py files",
            hint="--data with a folder of text",
        )
    return files


def split_by_file(files: Sequence[Path], held_out_fraction: float, seed: int) -> tuple[list[Path], list[Path]]:
    """Split a corpus by file, so that no held-out text is of a file that was trained on.

    Args:
        files: The files of the corpus.
        held_out_fraction: Part of the files to hold out, at least one.
        seed: It fixes which.

    Returns:
        The files to train on, and those held out, each in the order of ``files``.

    Raises:
        LimbeckError: One of the two parts would be empty.
    """
    count = max(1, round(len(files) * held_out_fraction))
    if not 0.0 < held_out_fraction < 1.0 or count >= len(files):
        raise LimbeckError(
            f"{held_out_fraction} of {len(files)} files to hold out",
            expected="at least one file to train on and one to hold out",
        )
    held_out = set(np.random.default_rng(seed).permutation(len(files))[:count].tolist())
    return (
        [file for index, file in enumerate(files) if index not in held_out],
        [file for index, file in enumerate(files) if index in held_out],
    )
