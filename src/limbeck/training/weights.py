"""What of a model goes into a checkpoint, and how it comes back."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn

from limbeck.errors import LimbeckError
from limbeck.training.update import learns


def learned_tensors(module: nn.Module) -> dict[str, torch.Tensor]:
    """Return what a checkpoint must hold, on the CPU: parameters that learn (tied ones once), persistent buffers."""
    return tensors_of(module, learns)


def tensors_of(
    module: nn.Module, wanted: Callable[[torch.Tensor], bool] = lambda parameter: True
) -> dict[str, torch.Tensor]:
    """Return parameters (tied ones once; all, or those wanted) and persistent buffers, on the CPU."""
    tensors = {name: parameter for name, parameter in module.named_parameters() if wanted(parameter)}
    persistent = module.state_dict(keep_vars=True)
    tensors |= {name: buffer for name, buffer in module.named_buffers() if name in persistent}
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


def load_learned(module: nn.Module, path: str | os.PathLike[str]) -> None:
    """Copy a checkpoint's weights into `module`, bit for bit; also what loads the best weights.

    Args:
        module: The step module, with the same parameters learning as when it was written.
        path: A ``step-…`` or ``best-…`` folder.

    Raises:
        LimbeckError: A name, shape or dtype differs.
    """
    load_tensors(Path(path), "weights.safetensors", module, learned_tensors(module))


def load_tensors(path: Path, name: str, module: nn.Module, expected: dict[str, torch.Tensor]) -> None:
    """Copy the tensors of a checkpoint's file into `module`; they must be those expected."""
    if not (path / name).is_file():
        raise LimbeckError(
            f"the checkpoint {path} has no {name}",
            expected="a checkpoint of a run in which the same models learned",
            hint="start without it, or from a checkpoint that has one",
        )
    saved = load_file(path / name)
    own = dict(module.named_parameters()) | dict(module.named_buffers())
    wrong = sorted(saved.keys() ^ expected.keys())
    wrong += [
        name
        for name in sorted(saved.keys() & expected.keys())
        if (saved[name].shape, saved[name].dtype) != (expected[name].shape, expected[name].dtype)
    ]
    if wrong:
        raise LimbeckError(
            f"the checkpoint {path} does not fit the model: {', '.join(wrong[:5])}{' …' if len(wrong) > 5 else ''}",
            expected="the same names, shapes and dtypes",
            hint="the model or what learns was changed since: start a new output folder",
        )
    with torch.no_grad():
        for name, tensor in saved.items():
            own[name].copy_(tensor)


def load_optimizer(file: Path, optimizer: torch.optim.Optimizer) -> None:
    """Load an optimiser's state; refuse one over other parameters, which torch itself matches by position alone."""
    saved = torch.load(file, map_location="cpu", weights_only=True)

    def names(groups: list[dict[str, Any]]) -> list[Any]:
        return [group.get("param_names", len(group["params"])) for group in groups]

    if names(saved["param_groups"]) != names(optimizer.param_groups):
        raise LimbeckError(
            f"the optimiser of the checkpoint {file.parent} learns other parameters",
            expected="the same parameters in the same groups",
            hint="the optimiser's groups were changed since: start a new output folder",
        )
    optimizer.load_state_dict(saved)
