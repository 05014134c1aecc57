"""Files of weights, read and written one tensor at a time."""

import json
import math
import pickle
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, Self

import torch
from safetensors import safe_open
from torch import Tensor

from limbeck.errors import LimbeckError

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "C64": torch.complex64,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_PIECE = 1 << 22
"""How many bytes are in memory while a tensor is copied from file to file."""


class Spec(NamedTuple):
    """What a tensor is, without its values.

    Attributes:
        dtype: Its type.
        shape: Its shape.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        """How many bytes its values take."""
        return math.prod(self.shape) * self.dtype.itemsize


class Weights:
    """The tensors of a checkpoint, wherever they lie in its files.

    Of safetensors a tensor is in memory while it is read. A `.bin` file is mapped, the one that was read last, so that
    no more than that one file is ever in memory.

    Args:
        files: The weight files, whole (see `check_files`).

    Attributes:
        specs: What each tensor is, by key.
        file_of: Where each tensor lies, by key.
    """

    def __init__(self, files: Iterable[Path]):
        self.specs: dict[str, Spec] = {}
        self.file_of: dict[str, Path] = {}
        self._offsets: dict[str, int] = {}
        self._mapped: tuple[Path, dict[str, Tensor]] | None = None
        for file in files:
            specs = self._safetensors_specs(file) if file.suffix == ".safetensors" else self._bin_specs(file)
            self.specs |= specs
            self.file_of |= dict.fromkeys(specs, file)

    def _safetensors_specs(self, file: Path) -> dict[str, Spec]:
        start, header = read_header(file)
        specs = {}
        for key, entry in header.items():
            if entry["dtype"] not in _DTYPES:
                raise LimbeckError(
                    f"{key} in {file} is of type {entry['dtype']}", expected=f"one of {', '.join(_DTYPES)}"
                )
            specs[key] = Spec(_DTYPES[entry["dtype"]], tuple(entry["shape"]))
            self._offsets[key] = start + entry["data_offsets"][0]
        return specs

    def _bin_specs(self, file: Path) -> dict[str, Spec]:
        return {key: Spec(tensor.dtype, tuple(tensor.shape)) for key, tensor in self._map(file).items()}

    def _map(self, file: Path) -> dict[str, Tensor]:
        if self._mapped is None or self._mapped[0] != file:
            self._mapped = None  # let go of the one before first
            try:
                content = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
            except pickle.UnpicklingError as error:
                raise LimbeckError(
                    f"{file} holds more than weights: reading it would run code",
                    expected="a file that torch.load(weights_only=True) reads",
                ) from error
            if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
                raise LimbeckError(f"{file} holds something else than weights", expected="tensors by name")
            self._mapped = (file, content)
        return self._mapped[1]

    def share_memory(self, first: str, second: str) -> bool:
        """Whether two keys are one tensor, as tied weights in a `.bin` file are."""
        file = self.file_of[first]
        if file != self.file_of[second] or file.suffix == ".safetensors" or self.specs[first] != self.specs[second]:
            return False
        content = self._map(file)
        return content[first].data_ptr() == content[second].data_ptr()

    def read(self, key: str) -> Tensor:
        """Read one tensor; of a `.bin` file it stays mapped, and must not be written to."""
        file = self.file_of[key]
        if file.suffix != ".safetensors":
            return self._map(file)[key].detach()
        with safe_open(file, framework="pt") as opened:
            return opened.get_tensor(key)

    def copy(self, key: str, target: BinaryIO) -> None:
        """Write the bytes of one tensor to where `target` stands."""
        file = self.file_of[key]
        if file.suffix != ".safetensors":
            _write(self.read(key), target)
            return
        left = self.specs[key].bytes
        with file.open("rb", buffering=0) as source:
            source.seek(self._offsets[key])
            while left:
                piece = source.read(min(left, _PIECE))
                if not piece:
                    raise LimbeckError(f"{file} became shorter while it was read", hint="fetch or copy it again")
                _write_all(memoryview(piece), target)
                left -= len(piece)


class SafetensorsFile:
    """A safetensors file that is filled tensor by tensor, in any order.

    A context manager; when its block ends well, every tensor must have been put.

    Args:
        path: The file to make.
        specs: The tensors it will hold, by key.
    """

    def __init__(self, path: Path, specs: Mapping[str, Spec]):
        # The widest types first, as safetensors itself does: then every tensor is aligned.
        order = sorted(specs, key=lambda key: (-specs[key].dtype.itemsize, key))
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        end = 0
        for key in order:
            dtype, shape = specs[key]
            begin, end = end, end + specs[key].bytes
            header[key] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self.specs, self._left = specs, set(specs)
        self._offsets = {key: 8 + len(text) + header[key]["data_offsets"][0] for key in order}
        self._stream = path.open("wb", buffering=0)
        self._stream.write(struct.pack("<Q", len(text)) + text)
        self._stream.truncate(8 + len(text) + end)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: Any, *_: Any) -> None:
        self._stream.close()
        assert kind is not None or not self._left, f"never written: {sorted(self._left)[:4]}"

    def put(self, key: str, tensor: Tensor) -> None:
        """Write a tensor's values."""
        assert Spec(tensor.dtype, tuple(tensor.shape)) == self.specs[key], key
        _write(tensor, self._at(key))

    def put_from(self, key: str, weights: Weights, source_key: str) -> None:
        """Copy a tensor's values from another file."""
        assert weights.specs[source_key] == self.specs[key], key
        weights.copy(source_key, self._at(key))

    def _at(self, key: str) -> BinaryIO:
        self._left.remove(key)
        self._stream.seek(self._offsets[key])
        return self._stream


def _write(tensor: Tensor, stream: BinaryIO) -> None:
    if not tensor.numel():
        return
    flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    for piece in flat.split(_PIECE):
        _write_all(piece.numpy().data, stream)


def _write_all(view: memoryview, stream: BinaryIO) -> None:
    while view:
        view = view[stream.write(view) :]


# --- are they whole? --------------------------------------------------------------------------------------------------


def read_header(file: Path) -> tuple[int, dict[str, Any]]:
    """Read a safetensors file's header, and compare the file's size with what the header promises.

    Returns:
        Where the tensors' bytes begin, and the header's entries by key, without the metadata.

    Raises:
        LimbeckError: When the file is cut short, or has no header.
    """
    size = file.stat().st_size
    with file.open("rb") as stream:
        prefix = stream.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else size
        if length > size - 8:
            raise cut_short(file, size, "a safetensors header")
        try:
            header = json.loads(stream.read(length))
            header.pop("__metadata__", None)
            end = max((entry["data_offsets"][1] for entry in header.values()), default=0)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise LimbeckError(f"{file} has no safetensors header", expected="a safetensors file") from error
    expected = 8 + length + end
    if size != expected:
        raise cut_short(file, size, f"{expected} bytes")
    return 8 + length, header


def cut_short(file: Path, size: int, expected: str) -> LimbeckError:
    """The error for a file that is not whole."""
    return LimbeckError(f"{file} is damaged or cut short: {size} bytes", expected, hint="fetch or copy it again")
