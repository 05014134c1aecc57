"""AdamW over four groups: mixers and teacher-born weights, each with and without weight decay.

Signatures the stages are driven with:

- ``parameter_groups(named_parameters, mixer_parameters=…, lr=…, mixer_lr=None, weight_decay=0.1,
  mixer_weight_decay=None, no_decay=None, exempt=(), freeze_steps=0) -> list[dict]``
- ``make_adamw(groups, betas=(0.9, 0.95), eps=1e-8) -> AdamW``
- ``learning_summary(model, groups) -> list[GroupSummary]`` and ``learning_table(summary) -> rich.table.Table``
"""

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from rich.table import Table
from torch import nn

from limbeck.errors import LimbeckError

NO_DECAY = ("A_log", "D", "dt_bias", "*bias", "conv1d.*")
"""Names, or ends of dotted names, exempt from weight decay by default; so is what has one dimension (norms)."""


def parameter_groups(
    named_parameters: Iterable[tuple[str, nn.Parameter]],
    *,
    mixer_parameters: Collection[str],
    lr: float,
    mixer_lr: float | None = None,
    weight_decay: float = 0.1,
    mixer_weight_decay: float | None = None,
    no_decay: Sequence[str] | None = None,
    exempt: Collection[str] = (),
    freeze_steps: int = 0,
) -> list[dict[str, Any]]:
    """Sort what learns into the optimiser's groups; frozen parameters are left out, empty groups too.

    Every group has, beside torch's own keys, ``name`` for people and ``lr_scale``: its learning rate is the schedule's
    times this (1.0 exactly where the group learns at `lr`).

    Args:
        named_parameters: Such as ``step_module.named_parameters()``; order decides the order in the groups.
        mixer_parameters: Names that belong to mixers; all others are teacher-born.
        lr: Peak learning rate.
        mixer_lr: Peak learning rate of the mixers, where it differs.
        weight_decay: Of the matrices.
        mixer_weight_decay: Of the mixers' matrices, where it differs (CALD: 0.1, and 0 for the rest).
        no_decay: Ends of dotted names exempt from decay, with ``*`` as in file names. Default: `NO_DECAY` and every
            one-dimensional parameter. A list given here is the whole rule.
        exempt: Names, in full, that are exempt whatever the rule says: those a mixer asks for.
        freeze_steps: Updates at the start in which the mixers learn alone: the other groups get ``learns_from``.

    Raises:
        LimbeckError: Nothing learns, or a rate that is not positive, or a trained parameter below float32.
    """
    if not lr > 0 or (mixer_lr is not None and not mixer_lr > 0):
        raise LimbeckError(f"learning rates lr = {lr}, mixer_lr = {mixer_lr}", expected="numbers above 0")
    members: dict[tuple[bool, bool], list[tuple[str, nn.Parameter]]] = {}
    for name, parameter in named_parameters:
        if not parameter.requires_grad:
            continue
        if parameter.dtype not in (torch.float32, torch.float64):
            raise LimbeckError(
                f"{name} learns and is {str(parameter.dtype).removeprefix('torch.')}",
                expected="float32 weights (autocast computes in bfloat16, the weights stay float32)",
                hint="load the student with dtype=torch.float32",
            )
        decays = name not in exempt and not is_exempt(name, parameter, no_decay)
        key = (name in mixer_parameters, decays)
        members.setdefault(key, []).append((name, parameter))
    if not members:
        raise LimbeckError("no parameter learns", expected="at least one parameter with requires_grad")

    groups = []
    for (mixers, decays), parameters in sorted(members.items(), reverse=True):
        group_lr = mixer_lr if mixers and mixer_lr is not None else lr
        decay = mixer_weight_decay if mixers and mixer_weight_decay is not None else weight_decay
        groups.append(
            {
                "name": ("mixers" if mixers else "teacher-born") + ("" if decays else ", no decay"),
                "params": parameters,  # torch keeps the names in "param_names"
                "lr": group_lr,
                "lr_scale": group_lr / lr,
                "weight_decay": decay if decays else 0.0,
                "learns_from": 0 if mixers else freeze_steps,
            }
        )
    return groups


def is_exempt(name: str, parameter: torch.Tensor, no_decay: Sequence[str] | None = None) -> bool:
    """Whether weight decay passes `parameter` by; see `parameter_groups` for `no_decay`."""
    patterns = NO_DECAY if no_decay is None else no_decay
    if no_decay is None and parameter.ndim < 2:
        return True
    return any(fnmatchcase(name, pattern) or fnmatchcase(name, f"*.{pattern}") for pattern in patterns)


def make_adamw(
    groups: list[dict[str, Any]], *, betas: tuple[float, float] = (0.9, 0.95), eps: float = 1e-8
) -> torch.optim.AdamW:
    """Build AdamW over `parameter_groups`, in the fused form, which CPU and CUDA both have."""
    return torch.optim.AdamW([dict(group) for group in groups], betas=betas, eps=eps, fused=True)


@dataclass(frozen=True)
class GroupSummary:
    """One row of "what learns, what is frozen"; a frozen row has neither learning rate nor decay."""

    name: str
    tensors: int
    parameters: int
    lr: float | None = None
    weight_decay: float | None = None


def learning_summary(model: nn.Module, groups: list[dict[str, Any]]) -> list[GroupSummary]:
    """Count what learns, by group, and what of `model` is frozen (tied weights count once)."""
    rows, learning = [], set()
    for group in groups:
        tensors = [entry[1] if isinstance(entry, tuple) else entry for entry in group["params"]]
        learning.update(map(id, tensors))
        count = sum(tensor.numel() for tensor in tensors)
        rows.append(GroupSummary(group["name"], len(tensors), count, group["lr"], group["weight_decay"]))
    frozen = [parameter for parameter in model.parameters() if id(parameter) not in learning]
    return [*rows, GroupSummary("frozen", len(frozen), sum(parameter.numel() for parameter in frozen))]


def learning_table(summary: list[GroupSummary], title: str = "what learns, what is frozen") -> Table:
    """Lay a `learning_summary` out as a table."""
    table = Table(title=title, title_justify="left")
    table.add_column("group")
    for column in ("tensors", "parameters", "peak lr", "weight decay"):
        table.add_column(column, justify="right")
    for row in summary:
        lr = "" if row.lr is None else f"{row.lr:.3g}"
        decay = "" if row.weight_decay is None else f"{row.weight_decay:g}"
        table.add_row(row.name, f"{row.tensors:,}", f"{row.parameters:,}", lr, decay)
    return table
