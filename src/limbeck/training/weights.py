"""What of a model and its optimiser goes into a checkpoint, and how it comes back."""

import os
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from limbeck.errors import LimbeckError
from limbeck.training.shards import SavedTensors, misfit
from limbeck.training.update import learns

MODEL, OPTIMIZER = "model/", "optimizer/"


def learned_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Return what a checkpoint must hold of the step module: what learns (tied ones once), and persistent buffers."""
    return tensors_of(module, learns)


def tensors_of(module: nn.Module, wanted: Callable[[Tensor], bool] = lambda parameter: True) -> dict[str, Tensor]:
    """Return parameters (tied ones once; all, or those wanted) and persistent buffers, as they are: not copied."""
    tensors: dict[str, Tensor] = {name: tensor for name, tensor in module.named_parameters() if wanted(tensor)}
    persistent = module.state_dict(keep_vars=True)
    tensors |= {name: buffer for name, buffer in module.named_buffers() if name in persistent}
    return {name: tensor.detach() for name, tensor in tensors.items()}


def load_learned(module: nn.Module, path: str | os.PathLike[str]) -> None:
    """Copy a checkpoint's weights into `module`, bit for bit; also what loads the best weights.

    Args:
        module: The step module, with the same parameters learning as when it was written; whole or sharded.
        path: A ``step-…`` or ``best-…`` folder.

    Raises:
        LimbeckError: A name, shape or dtype differs.
    """
    load_tensors(SavedTensors(Path(path)), learned_tensors(module), MODEL)


def load_tensors(saved: SavedTensors, tensors: dict[str, Tensor], prefix: str) -> None:
    """Fill a model's tensors, in place; those saved under `prefix` must be the same."""
    others = set(saved.names(prefix)) ^ tensors.keys()
    if others:
        raise misfit(saved.folder, [prefix + name for name in others])
    saved.read({prefix + name: tensor for name, tensor in tensors.items()})


def optimizer_tensors(module: nn.Module, optimizer: torch.optim.Optimizer, prefix: str) -> dict[str, Tensor]:
    """Return an optimiser's state, as ``PREFIX/parameter/exp_avg``; not copied."""
    names = {parameter: name for name, parameter in module.named_parameters()}
    return {
        f"{prefix}{names[parameter]}/{kind}": value
        for group in optimizer.param_groups
        for parameter in group["params"]
        for kind, value in optimizer.state.get(parameter, {}).items()
    }


def group_names(module: nn.Module, optimizer: torch.optim.Optimizer) -> list[list[str]]:
    """Return which parameters an optimiser learns, group by group."""
    names = {parameter: name for name, parameter in module.named_parameters()}
    return [[names[parameter] for parameter in group["params"]] for group in optimizer.param_groups]


def load_optimizer(
    saved: SavedTensors, module: nn.Module, optimizer: torch.optim.Optimizer, prefix: str, groups: list[list[str]]
) -> None:
    """Load an optimiser's state; its rates and momenta's factors stay those it was made with.

    Args:
        saved: The checkpoint's tensors.
        module: The model whose parameters it learns.
        optimizer: The optimiser, over the same parameters in the same `groups` as when it was saved.
        prefix: What its tensors' names begin with.
        groups: The `group_names` it was saved with.

    Raises:
        LimbeckError: It learns other parameters, or a shape or dtype differs.
    """
    if groups != group_names(module, optimizer):
        raise LimbeckError(
            f"the optimiser of the checkpoint {saved.folder} learns other parameters",
            expected="the same parameters in the same groups",
            hint="the optimiser's groups were changed since: start a new output folder",
        )
    parameters = dict(module.named_parameters())
    state: dict[str, dict[str, Tensor]] = {}
    for entry in saved.names(prefix):
        name, _, kind = entry.rpartition("/")
        state.setdefault(name, {})[kind] = _room_for(saved, prefix + entry, parameters[name])
    saved.read({f"{prefix}{name}/{kind}": value for name, kinds in state.items() for kind, value in kinds.items()})
    order = [name for group in groups for name in group]
    numbered = {number: state[name] for number, name in enumerate(order) if name in state}
    optimizer.load_state_dict({"state": numbered, "param_groups": optimizer.state_dict()["param_groups"]})


def _room_for(saved: SavedTensors, key: str, parameter: Tensor) -> Tensor:
    """An empty tensor like a parameter, sharded as it is, for a momentum; a whole one for a count of steps."""
    shape, dtype = saved.specs[key]
    if shape == tuple(parameter.shape):
        return torch.empty_like(parameter, dtype=dtype, requires_grad=False)
    return torch.empty(shape, dtype=dtype)
