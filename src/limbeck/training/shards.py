"""Tensors on disk, in one file for each process: written without waiting for the others, read by any number of them.

Each process writes its own parts into ``00000-of-00004.safetensors`` and so on; whole tensors that all of them have are
dealt out. The header tells where in the whole a part begins, in the way of torch.distributed.checkpoint
(``DCP_SHARDING_INFO``), whose reader puts together what a process needs. The writer is our own, since torch's plans
among all processes while it writes, which a save in the background must not, and holds the file in memory twice.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.checkpoint import DefaultLoadPlanner
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.tensor import DTensor, Replicate

from limbeck.errors import LimbeckError
from limbeck.files import sha256, sync
from limbeck.training.distributed import World


class Shard(NamedTuple):
    """A part of a tensor, on the host.

    Attributes:
        offsets: Where in the whole it begins, a number for each dimension.
        values: The part.
    """

    offsets: list[int]
    values: Tensor


def own_shards(tensors: Mapping[str, Tensor], world: World, *, copy: bool) -> dict[str, Shard]:
    """Return what this process is to write, such that each value is written by exactly one.

    Args:
        tensors: The same names, in the same order, in every process; whole or sharded.
        world: The processes.
        copy: Whether the parts must not change any more when training goes on.
    """
    dealt = [0] * world.size
    shards = {}
    for number, (name, tensor) in enumerate(tensors.items()):
        if isinstance(tensor, DTensor):
            part, offsets = tensor.to_local(), _offsets(tensor, number)
        else:
            rank = dealt.index(min(dealt))
            dealt[rank] += tensor.nbytes
            part, offsets = tensor, [0] * tensor.ndim if rank == world.rank else None
        if offsets is not None:
            on_host = part.detach().to("cpu", copy=copy).contiguous()
            shards[name] = Shard(offsets, on_host)
    return shards


def _offsets(tensor: DTensor, number: int) -> list[int] | None:
    """Where this process's part begins; None where it has none, or another process with the same part writes it."""
    coordinate = tensor.device_mesh.get_coordinate()
    assert coordinate is not None, "a parameter of other processes"
    for dimension, placement in enumerate(tensor.placements):
        if isinstance(placement, Replicate) and coordinate[dimension] != number % tensor.device_mesh.size(dimension):
            return None
    if not tensor.to_local().numel():
        return None
    (chunk,) = tensor.__create_chunk_list__()
    return list(chunk.offsets)


def write_shards(folder: Path, shards: Mapping[str, Shard], rank: int, size: int) -> dict[str, dict[str, int | str]]:
    """Write one process's file and bring it to the disk.

    Returns:
        Its entry in the manifest: the name, with size and sha256.
    """
    path = folder / f"{rank:05d}-of-{size:05d}.safetensors"
    places = {name: {"saved_offsets": shard.offsets} for name, shard in shards.items()}
    save_file(
        {name: shard.values for name, shard in shards.items()}, path, metadata={"DCP_SHARDING_INFO": json.dumps(places)}
    )
    sync(path)
    return {path.name: {"size": path.stat().st_size, "sha256": sha256(path)}}


class SavedTensors:
    """The tensors in a folder of such files.

    Args:
        folder: The folder.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self._reader = HuggingFaceStorageReader(str(folder))
        self._metadata = self._reader.read_metadata()
        self.specs: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
            name: (tuple(entry.size), entry.properties.dtype)
            for name, entry in self._metadata.state_dict_metadata.items()
            if isinstance(entry, TensorStorageMetadata)
        }

    def names(self, prefix: str) -> list[str]:
        """The names that begin with `prefix`, without it, in order."""
        return sorted(name.removeprefix(prefix) for name in self.specs if name.startswith(prefix))

    def read(self, targets: Mapping[str, Tensor]) -> None:
        """Fill `targets`, whole or sharded, each from the saved tensor of its name, bit for bit.

        Raises:
            LimbeckError: A name is missing, or a shape or dtype differs.
        """
        self.check(targets)
        planner = DefaultLoadPlanner()
        planner.set_up_planner({name: tensor.detach() for name, tensor in targets.items()}, self._metadata, True)
        self._reader.set_up_storage_reader(self._metadata, True)
        plan = self._reader.prepare_local_plan(planner.create_local_plan())
        self._reader.read_data(planner.finish_plan(plan), planner).wait()

    def check(self, targets: Mapping[str, Tensor]) -> None:
        """Refuse targets that were not saved, or otherwise."""
        wrong = [
            name for name, tensor in targets.items() if self.specs.get(name) != (tuple(tensor.shape), tensor.dtype)
        ]
        if wrong:
            raise misfit(self.folder, wrong)


def misfit(folder: Path, names: list[str]) -> LimbeckError:
    """The error for a checkpoint whose tensors are not those of the model."""
    shown = [name.partition("/")[2] for name in sorted(names)[:5]]
    return LimbeckError(
        f"the checkpoint {folder} does not fit the model: {', '.join(shown)}{' …' if len(names) > 5 else ''}",
        expected="the same names, shapes and dtypes",
        hint="the model or what learns was changed since: start a new output folder",
    )
