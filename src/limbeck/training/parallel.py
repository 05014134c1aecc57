"""How several processes hold one model: each a copy (DDP), or each a part (FSDP2).

In both the step module of a stage is what is called, so that every use of a parameter is seen. Weights stay in the
precision they are learned in: what is computed in less is autocast's business, and decays reach the forward pass in
float32.
"""

import warnings
from collections.abc import Collection, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import pairwise

from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from transformers import PreTrainedModel

from limbeck.distill import StageStep
from limbeck.students import backbone, blocks
from limbeck.training.distributed import World

# Nobody changes in place what a part of a model returns, be it a view or not.
warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")

FORWARD_METHODS = ("matrix_factors", "mixing_matrix")
"""Methods that a part may be called by instead of its forward."""


def shard(
    model: nn.Module,
    units: Sequence[nn.Module],
    mesh: DeviceMesh,
    *,
    stay_gathered: Collection[nn.Module] = (),
    offloaded: Collection[nn.Module] = (),
) -> None:
    """Spread a model's parameters over the processes of a mesh, in place; do it before its optimiser is made.

    Args:
        model: A student or a teacher, on any device; each part is brought to the mesh's when its turn comes.
        units: Parts that are gathered as one while they compute, from the inside out. If `model` is the last of them,
            it must be called before any part of it; if it is not, units must not lie within each other and may be
            called by themselves. What is in no unit is spread in pieces of its own.
        mesh: See `World.mesh`.
        stay_gathered: Units whose parameters somebody still reads after their forward; those that are called by
            a method are such, since it may return a parameter, as a mixer does its D.
        offloaded: Units whose part stays in the host's memory, and comes to the device when it is gathered.
    """
    host = CPUOffloadPolicy(pin_memory=mesh.device_type == "cuda")
    for unit in units:
        methods = [name for name in FORWARD_METHODS if hasattr(unit, name)]
        stays = bool(methods) or unit is model or unit in stay_gathered
        policy = host if unit in offloaded else OffloadPolicy()
        fully_shard(unit, mesh=mesh, reshard_after_forward=not stays, offload_policy=policy)
        for name in methods:
            register_fsdp_forward_method(unit, name)
    if model not in units:
        tied = tied_parameters(model)
        for piece in _pieces(model, set(units)):
            if tied.isdisjoint(map(id, piece.parameters())):
                fully_shard(piece, mesh=mesh, reshard_after_forward=True)
        for tensor in (*model.parameters(), *model.buffers()):
            if not isinstance(tensor, DTensor):  # what is tied stays whole
                tensor.data = tensor.data.to(mesh.device_type)


def shard_teacher(teacher: PreTrainedModel, mesh: DeviceMesh, *, offload: bool = False) -> None:
    """Spread a frozen teacher, in place; only its backbone and its head are called as such, so they stay gathered.

    Args:
        teacher: On any device.
        mesh: See `World.mesh`.
        offload: Whether each process's part of its layers stays in the host's memory.
    """
    layers, outer = list(blocks(teacher)), [backbone(teacher), teacher.get_output_embeddings()]
    shard(teacher, [*layers, *outer], mesh, stay_gathered=outer, offloaded=layers if offload else ())


def shard_step(step: StageStep, mesh: DeviceMesh) -> None:
    """Spread what a stage trains, with the step module as the one root of all its parts, in place.

    Parts with a common root gather on one stream: the next while this one computes. Parts that are roots of their own,
    as mixers that a matrix stage calls by themselves, would each wait for all of its exchange.

    Args:
        step: The step module, on any device; its teacher is another's business.
        mesh: See `World.mesh`.
    """
    units = step.objective.units(step.student)
    shard(step.student, units, mesh)
    inner = [unit for unit in units if unit is not step.student]
    for unit, following in pairwise(inner):  # the host of a small model is not ahead of its GPU: say it what comes
        unit.set_modules_to_forward_prefetch([following])  # type: ignore[operator]  # fully_shard made it an FSDPModule
    whole = {parameter for parameter in step.parameters() if not isinstance(parameter, DTensor)}
    fully_shard(step, mesh=mesh, ignored_params=whole)
    # A held-out evaluation may call the student before the first update calls the root.
    step._get_fsdp_state()._lazy_init()  # type: ignore[operator]


def is_sharded(module: nn.Module) -> bool:
    """Whether a module's parameters, or some of them, are spread over processes."""
    return any(isinstance(parameter, DTensor) for parameter in module.parameters()) or any(_sharded_parts(module))


def settle(module: nn.Module) -> None:
    """Give back what an evaluation has left gathered, so that a module's parameters are those that learn."""
    for part in _sharded_parts(module):
        part.reshard()


def whole_weights(module: nn.Module) -> dict[str, Tensor]:
    """Gather a sharded module's state on the host of rank 0; all processes take part, the others get nothing."""
    state = get_model_state_dict(module, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    return {name: value for name, value in state.items() if isinstance(value, Tensor)}


class Replicas:
    """The step module as the loop calls it: in DDP where every process has a copy, else as it is.

    Args:
        module: The step module.
        world: The processes.
    """

    def __init__(self, module: nn.Module, world: World):
        self.module, self.called = module, module
        self._copies = world.size > 1 and not is_sharded(module)
        self._learning: frozenset[str] | None = None

    def prepare(self) -> None:
        """Wrap the module anew when other parameters learn than before: DDP waits for a gradient of each."""
        if not self._copies:
            return
        learning = frozenset(name for name, parameter in self.module.named_parameters() if parameter.requires_grad)
        if learning != self._learning:
            self.called = self.module  # the old wrapper goes, and its hooks, before the new one comes
            self.called = DistributedDataParallel(self.module, gradient_as_bucket_view=True, init_sync=False)
            self._learning = learning

    def sync(self, last: bool) -> AbstractContextManager[None]:
        """What an update's micro-batch runs in: copies exchange gradients in the last one only."""
        if isinstance(self.called, DistributedDataParallel) and not last:
            return self.called.no_sync()
        return nullcontext()


def tied_parameters(model: nn.Module) -> set[int]:
    """Parameters, by their ids, that more than one module has."""
    seen: set[int] = set()
    tied: set[int] = set()
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            (tied if id(parameter) in seen else seen).add(id(parameter))
    return tied


def _sharded_parts(module: nn.Module) -> Iterator[FSDPModule]:
    return (part for part in module.modules() if isinstance(part, FSDPModule))


def _pieces(module: nn.Module, units: set[nn.Module]) -> Iterator[nn.Module]:
    """The greatest parts with parameters that are no unit and hold none."""
    if module in units:
        return
    if units.isdisjoint(module.modules()):
        if any(True for _ in module.parameters()) and not isinstance(module, nn.ModuleList):
            yield module
        return
    for child in module.children():
        yield from _pieces(child, units)
