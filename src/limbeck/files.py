"""Files that are there whole or not at all: written under a temporary name, brought to the disk, renamed."""

import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def write_text(path: Path, text: str) -> None:
    """Write a text file whole or not at all; one that stood there is replaced."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path for a file that becomes `path` when the block ends well, and is removed when it does not.

    The temporary name keeps the ending of `path`, since some writers go by it.
    """
    temporary = path.with_name(f".writing-{path.name}")
    try:
        yield temporary
        sync(temporary)
        temporary.replace(path)
        sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def replacing_folder(path: Path) -> Iterator[Path]:
    """Yield a new folder that becomes `path` when the block ends well, and is removed when it does not.

    A folder that stood at `path` is replaced. What a killed process left under a temporary name is removed first.
    """
    temporary, old = path.with_name(f".writing-{path.name}"), path.with_name(f".old-{path.name}")
    if old.exists() and not path.exists():  # killed between the two renames below
        old.rename(path)
    for leftover in (temporary, old):
        if leftover.exists():
            shutil.rmtree(leftover)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        for file in temporary.rglob("*"):
            sync(file)
        sync(temporary)
        if path.exists():
            path.rename(old)
        temporary.rename(path)
        sync(path.parent)
    finally:
        for leftover in (temporary, old):
            if leftover.exists():
                shutil.rmtree(leftover)


def sha256(path: Path) -> str:
    """The sha256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync(path: Path) -> None:
    """Bring a file, or a folder's list of names, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
