"""Several processes as one run: who they are, what they agree on, and what one of them does for all.

::

    torchrun --nproc-per-node 8 -m limbeck distill …

    with World.join("cuda") as world:           # one process without torchrun: a world of its own
        folder = world.first(make_the_folder)   # rank 0 does it, all get the result
        stop, = world.agree([stop])             # the greatest over all processes, on the host
"""

import os
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from types import TracebackType
from typing import Any, Self, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor
from transformers.utils import logging as transformers_logging

from limbeck.devices import choose_device
from limbeck.errors import LimbeckError
from limbeck.progress import silence

T = TypeVar("T")

TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
OTHER_LAUNCHERS = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE")
COMMAND = "torchrun --nproc-per-node N -m limbeck distill …"

MEET = timedelta(seconds=60)  # from the first process that is there to the last
PATIENCE = timedelta(hours=12)  # of all while rank 0 prepares, as it does when it tokenises a corpus
GRACE_SECONDS = 10.0  # from the failure of one process to the end of one that hangs in the middle of an exchange
FAILED = "limbeck/failed"


@dataclass(frozen=True)
class World:
    """The processes of a run, seen by one of them.

    Attributes:
        device: Where this process computes.
        rank: Which of them this is, counted from 0; rank 0 is the one that writes and speaks.
        local_rank: Which of those on this host.
        size: How many there are.
        control: A group over gloo for what the hosts agree on; None for a single process.
    """

    device: torch.device
    rank: int = 0
    local_rank: int = 0
    size: int = 1
    control: dist.ProcessGroup | None = field(default=None, repr=False)
    _groups: list[dist.ProcessGroup] = field(default_factory=list, repr=False)
    _store: dist.Store | None = field(default=None, repr=False)
    _left: threading.Event = field(default_factory=threading.Event, repr=False)
    _watch: list[threading.Thread] = field(default_factory=list, repr=False)

    @property
    def main(self) -> bool:
        """Whether this process writes and speaks for all."""
        return self.rank == 0

    @classmethod
    def alone(cls, device: torch.device | str = "cpu") -> Self:
        """A single process."""
        return cls(torch.device(device))

    @classmethod
    def join(cls, device: str | None = None, *, meet: timedelta = MEET) -> Self:
        """Meet the other processes that torchrun started; without torchrun, be alone.

        Args:
            device: As a user types it; by default a GPU if there is one. On GPUs every process of a host takes its own.
            meet: How long to wait for the others.

        Raises:
            LimbeckError: Another launcher started several processes; the others do not come; there are more processes
                than GPUs.
        """
        given = {name: os.environ[name] for name in TORCHRUN if name in os.environ}
        if "RANK" not in given and "WORLD_SIZE" not in given:
            _refuse_other_launchers()
            return cls(choose_device(device))
        if missing := [name for name in TORCHRUN if name not in given]:
            raise LimbeckError(
                f"the environment has {', '.join(given)} and not {', '.join(missing)}",
                expected="all that torchrun sets, or nothing",
                hint=COMMAND,
            )
        rank, size, local_rank = (int(given[name]) for name in TORCHRUN[:3])
        if size == 1:
            return cls(choose_device(device))
        place = _own_device(choose_device(device), local_rank)
        store = _meet(rank, size, meet)
        if place.type == "cuda":
            torch.cuda.set_device(place)
        dist.init_process_group(
            "nccl" if place.type == "cuda" else "gloo",
            store=dist.PrefixStore("limbeck/work", store),
            rank=rank,
            world_size=size,
            device_id=place if place.type == "cuda" else None,
        )
        control = dist.new_group(backend="gloo", timeout=PATIENCE)
        assert isinstance(control, dist.ProcessGroup)
        assert dist.group.WORLD is not None
        world = cls(place, rank, local_rank, size, control, [dist.group.WORLD], store)
        world._watch.append(threading.Thread(target=world._end_with_the_others, daemon=True))
        world._watch[0].start()
        if not world.main:
            silence()
            transformers_logging.set_verbosity_error()
            transformers_logging.disable_progress_bar()
        return world

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Part from the others. An error is told by the process that met it first; the others end without a word."""
        if self._store is None:
            return
        if error is None or isinstance(error, SystemExit):
            self._end_watch()
            self._groups.clear()
            dist.destroy_process_group()
            return
        first = self._is_first_to_fail()
        self._end_watch()
        if not first:
            raise SystemExit(1) from None

    def _end_watch(self) -> None:
        """End the thread before the interpreter does: it must not be caught in the store then."""
        self._left.set()
        for thread in self._watch:
            thread.join()

    def first(self, work: Callable[[], T]) -> T:
        """Let rank 0 work while the others wait; all get its result, plain values, or its LimbeckError."""
        if self.control is None:
            return work()
        outcome: list[Any] = [None, None]
        if self.main:
            try:
                outcome[0] = work()
            except LimbeckError as error:
                outcome[1] = (error.found, error.expected, error.hint)
        dist.broadcast_object_list(outcome, src=0, group=self.control)
        if outcome[1] is not None:
            raise LimbeckError(*outcome[1])
        return outcome[0]

    def in_turn(self, work: Callable[[], T]) -> T:
        """Let rank 0 work first, since it writes what the others then find; each has a result of its own."""
        results: list[T] = []
        self.first(lambda: results.append(work()))
        return results[0] if self.main else work()

    def share(self, value: T) -> T:
        """Return rank 0's value: what is computed by all and decided by one."""
        return self.first(lambda: value)

    def agree(self, values: Sequence[int]) -> list[int]:
        """Return the greatest of each value over all processes, without a look at any device."""
        if self.control is None:
            return list(values)
        tensor = torch.tensor(values, dtype=torch.int64)
        dist.all_reduce(tensor, dist.ReduceOp.MAX, group=self.control)
        return tensor.tolist()

    def gather(self, value: T) -> list[T]:
        """Return every process's value, plain ones or small tensors on the host, by rank."""
        if self.control is None:
            return [value]
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, value, group=self.control)
        return found

    def same(self, what: str, value: str) -> None:
        """Make sure that all processes have the same value.

        Raises:
            LimbeckError: They have not.
        """
        found = self.gather(value)
        if others := [rank for rank, other in enumerate(found) if other != found[0]]:
            raise LimbeckError(
                f"rank {others[0]} has another {what} than rank 0",
                expected=f"one {what} for all {self.size} processes",
                hint="start all of them with the same command, over a file system that all hosts share",
            )

    def mean(self, tensor: Tensor) -> Tensor:
        """Return the mean over all processes, which have tensors of one shape on their devices."""
        if self.size == 1:
            return tensor
        total = tensor.clone()
        dist.all_reduce(total)
        return total / self.size

    def average_gradients(self, parameters: Iterable[Tensor]) -> None:
        """Average gradients that no wrapper does, in place; those of sharded parameters are averaged already."""
        if self.size == 1:
            return
        gradients = [p.grad for p in parameters if p.grad is not None and not isinstance(p.grad, DTensor)]
        pending = [dist.all_reduce(gradient, async_op=True) for gradient in gradients]
        for work in filter(None, pending):
            work.wait()
        for gradient in gradients:
            gradient.div_(self.size)

    def mesh(self, shard_size: int | None = None) -> DeviceMesh:
        """The processes as FSDP sees them.

        Args:
            shard_size: Processes that share one copy of the parameters; by default all. With fewer there are several
                copies, and the mesh has two dimensions.

        Raises:
            LimbeckError: It does not divide the number of processes.
        """
        shard_size = shard_size or self.size
        if self.size % shard_size:
            raise LimbeckError(
                f"engine.shard_size = {shard_size} with {self.size} processes", expected=f"a divisor of {self.size}"
            )
        shape, names = (self.size,), ("shard",)
        if shard_size < self.size:
            shape, names = (self.size // shard_size, shard_size), ("copy", "shard")
        mesh = init_device_mesh(self.device.type, shape, mesh_dim_names=names)
        self._groups.extend(mesh.get_all_groups())
        return mesh

    def exchanges(self) -> list[int]:
        """How many exchanges this process has begun in each of its groups: where all are alike, none waits in vain."""
        return [group._get_sequence_number_for_group() for group in self._groups]  # pyright: ignore[reportAttributeAccessIssue]

    def _is_first_to_fail(self) -> bool:
        assert self._store is not None
        try:
            return self._store.compare_set(FAILED, "", str(self.rank)).decode() == str(self.rank)
        except RuntimeError:  # the one that kept the store is gone, and has told why
            return False

    def _end_with_the_others(self) -> None:
        """End a process that hangs in an exchange with one that failed: on a GPU nothing else would for minutes."""
        assert self._store is not None
        while not self._left.wait(1.0):
            try:
                failed = self._store.check([FAILED])
            except RuntimeError:
                failed = True
            if failed and not self._left.wait(GRACE_SECONDS):
                os._exit(1)


def _refuse_other_launchers() -> None:
    for name in OTHER_LAUNCHERS:
        count = os.environ.get(name, "")
        if count.isdigit() and int(count) > 1:
            raise LimbeckError(
                f"a launcher started {count} processes ({name}), and none of them knows the others",
                expected="processes that torchrun started",
                hint=f"{COMMAND}, once on every host (docs/distributed.md)",
            )


def _own_device(device: torch.device, local_rank: int) -> torch.device:
    """The device of one of a host's processes."""
    if device.type != "cuda":
        return device
    count = torch.cuda.device_count()
    if device.index is not None or local_rank >= count:
        raise LimbeckError(
            f"{device} for process {local_rank} of this host, which has {count} GPUs",
            expected="--device cuda, and at most as many processes as GPUs",
            hint=f"torchrun --nproc-per-node {count}",
        )
    return torch.device("cuda", local_rank)


def _meet(rank: int, size: int, timeout: timedelta) -> dist.Store:
    """Wait until every process has said that it is there; return where they said it."""
    store, missing = None, []
    try:
        store, _, _ = next(dist.rendezvous("env://", timeout=timeout))
        store.set_timeout(timeout)
        store.set(f"limbeck/here/{rank}", "")
        store.wait([f"limbeck/here/{other}" for other in range(size)], timeout)
        return store
    except (RuntimeError, ValueError) as error:  # torch's DistError is a RuntimeError
        if store is not None:
            missing = [other for other in range(size) if not store.check([f"limbeck/here/{other}"])]
        address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        who = f"rank {', '.join(map(str, missing))} did not come" if missing else str(error).splitlines()[0]
        raise LimbeckError(
            f"rank {rank} does not find the others at {address}: {who}",
            expected=f"{size} processes within {timeout.total_seconds():.0f} seconds",
            hint=f"start all of them, each by {COMMAND}; hosts need one --rdzv-endpoint they all reach",
        ) from error


def process_seed(seed: int, rank: int) -> int:
    """The seed of a process's random generators: each draws its own dropout, and rank 0 what one process would."""
    return seed if rank == 0 else int(np.random.SeedSequence((seed, rank)).generate_state(1, np.uint64)[0] >> 1)
