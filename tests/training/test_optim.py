import io

import pytest
import torch
from rich.console import Console
from torch import nn

from limbeck.errors import LimbeckError
from limbeck.training import learning_summary, learning_table, make_adamw, parameter_groups
from limbeck.training.optim import is_exempt


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(4)
        self.mlp = nn.Linear(4, 4)
        self.mixer = nn.Module()
        self.mixer.in_proj = nn.Linear(4, 8, bias=False)
        self.mixer.conv1d = nn.Conv1d(8, 8, 4, groups=8)
        self.mixer.dt_proj = nn.Linear(4, 4)
        self.mixer.D = nn.Parameter(torch.ones(4))
        self.mixer.A_log = nn.Parameter(torch.ones(4, 2))
        self.mixer.z_bias = nn.Parameter(torch.ones(4))
        self.mixer.dt_bias = nn.Parameter(torch.ones(4))


def names_by_group(groups):
    return {group["name"]: {name for name, _ in group["params"]} for group in groups}


def groups_of(model, **options):
    mixers = {name for name, _ in model.named_parameters() if ".mixer." in f".{name}"}
    return parameter_groups(model.named_parameters(), **({"mixer_parameters": mixers, "lr": 1e-4} | options))


def test_default_groups_and_exemptions():
    groups = groups_of(Block(), weight_decay=0.1, mixer_lr=3e-4)
    assert names_by_group(groups) == {
        "mixers": {"mixer.in_proj.weight", "mixer.dt_proj.weight"},
        "mixers, no decay": {
            "mixer.conv1d.weight",
            "mixer.conv1d.bias",
            "mixer.dt_proj.bias",
            "mixer.D",
            "mixer.A_log",
            "mixer.z_bias",
            "mixer.dt_bias",
        },
        "teacher-born": {"mlp.weight"},
        "teacher-born, no decay": {"norm.weight", "norm.bias", "mlp.bias"},
    }
    assert [(group["lr"], group["weight_decay"]) for group in groups] == [
        (3e-4, 0.1),
        (3e-4, 0.0),
        (1e-4, 0.1),
        (1e-4, 0),
    ]
    assert [group["lr_scale"] for group in groups] == [3e-4 / 1e-4, 3e-4 / 1e-4, 1.0, 1.0]


def test_the_groups_of_cald():
    """Weight decay on every mixer parameter except two biases, none on teacher-born weights (METHODS 3)."""
    groups = groups_of(Block(), weight_decay=0.0, mixer_weight_decay=0.1, no_decay=["conv1d.bias", "dt_proj.bias"])
    decayed = {name for group in groups if group["weight_decay"] == 0.1 for name, _ in group["params"]}
    assert decayed == {
        f"mixer.{name}"
        for name in ("in_proj.weight", "conv1d.weight", "dt_proj.weight", "D", "A_log", "z_bias", "dt_bias")
    }
    assert sum(len(group["params"]) for group in groups) == len(list(Block().parameters()))


def test_patterns_match_whole_parts_of_names():
    matrix = torch.zeros(2, 2)
    assert is_exempt("layers.0.mixer.D", matrix)
    assert not is_exempt("layers.0.mixer.fooD", matrix)
    assert is_exempt("layers.0.mixer.dt_proj.bias", matrix, ["dt_proj.bias"])
    assert not is_exempt("layers.0.mixer.xdt_proj.bias", matrix, ["dt_proj.bias"])
    assert not is_exempt("norm.weight", torch.zeros(2), [])


def test_frozen_and_tied_parameters():
    model = Block()
    model.mlp.requires_grad_(False)
    model.head = nn.Linear(4, 4, bias=False)
    model.head.weight = model.mixer.in_proj.weight
    groups = groups_of(model)
    assert "teacher-born" not in names_by_group(groups)
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters())) - 2


def test_adamw_keeps_names_and_leaves_the_groups_alone():
    groups = groups_of(Block())
    optimizer = make_adamw(groups, betas=(0.9, 0.999))
    assert [set(group["param_names"]) for group in optimizer.param_groups] == list(names_by_group(groups).values())
    assert optimizer.param_groups[0]["betas"] == (0.9, 0.999)
    assert isinstance(groups[0]["params"][0], tuple)


def test_weight_decay_reaches_only_what_it_should():
    model = Block()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer = make_adamw(groups_of(model, weight_decay=0.5, lr=0.1))
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    changed = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert changed == {"mixer.in_proj.weight", "mixer.dt_proj.weight", "mlp.weight"}
    torch.testing.assert_close(model.mlp.weight, before["mlp.weight"] * (1 - 0.1 * 0.5))


@pytest.mark.parametrize(
    ("prepare", "options", "words"),
    [
        (lambda model: model.requires_grad_(False), {}, "no parameter learns"),
        (lambda model: model.mlp.bfloat16(), {}, r"mlp\.weight learns and is bfloat16"),
        (lambda model: model, {"lr": 0.0}, "numbers above 0"),
        (lambda model: model, {"mixer_lr": -1.0}, "numbers above 0"),
    ],
)
def test_clear_errors(prepare, options, words):
    model = Block()
    prepare(model)
    with pytest.raises(LimbeckError, match=words):
        groups_of(model, **options)


def test_what_learns_and_what_is_frozen():
    model = Block()
    model.mlp.requires_grad_(False)
    groups = groups_of(model, mixer_lr=3e-4)
    rows = {row.name: row for row in learning_summary(model, groups)}
    assert (rows["frozen"].tensors, rows["frozen"].parameters, rows["frozen"].lr) == (2, 20, None)
    assert (rows["mixers"].tensors, rows["mixers"].parameters, rows["mixers"].lr) == (2, 48, 3e-4)
    assert sum(row.parameters for row in rows.values()) == sum(parameter.numel() for parameter in model.parameters())
    # the optimiser's own groups give the same rows
    assert learning_summary(model, make_adamw(groups).param_groups) == list(rows.values())

    text = io.StringIO()
    Console(file=text, width=100).print(learning_table(list(rows.values())))
    assert "mixers, no decay" in text.getvalue()
    assert "0.0003" in text.getvalue()
    assert "frozen" in text.getvalue()
