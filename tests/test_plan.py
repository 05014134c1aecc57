"""The published numbers, as `limbeck plan` works them out."""

import io
import json

import pytest
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, GPTNeoXConfig

import limbeck
from limbeck import LimbeckError, load_recipe
from limbeck.distill import LayerwiseObjective, StageStep
from limbeck.plan import plan, plan_table
from limbeck.recipes import recipe_names
from limbeck.recipes.driver import optimizer_of
from limbeck.students import mixers

PUBLISHED = [  # proportion, samples, updates, switch of the hybrid mode, DECAY_STEPS, warm-up, checkpoints
    (0.005, 732_160, 11_440, 4_576, 12_000, 360, 114),
    (0.01, 1_464_320, 22_880, 9_120, 24_000, 720, 228),
    (0.02, 2_928_640, 45_760, 18_280, 24_000, 720, 457),
]
KEYS = [
    "name",
    "objective",
    "steps",
    "tokens",
    "tokens_per_step",
    "lr",
    "min_lr",
    "warmup_steps",
    "decay_steps",
    "checkpoint_every",
    "switch_step",
]


@pytest.fixture
def command(command):
    """What ``limbeck ARGUMENTS`` prints."""

    def printed(*arguments):
        code, out, _ = command(*arguments)
        assert not code
        return out

    return printed


@pytest.mark.parametrize(("proportion", "samples", "steps", "switch", "decay", "warmup", "every"), PUBLISHED)
def test_the_table_of_cald(proportion, samples, steps, switch, decay, warmup, every):
    recipe = load_recipe("cald-hybrid", [f"data.proportion={proportion}"])
    planned = plan(recipe)
    assert planned == {
        "stages": [
            {
                "name": "layerwise",
                "objective": "layerwise",
                "steps": steps,
                "tokens": steps * 262_144,
                "tokens_per_step": 262_144,
                "lr": {"start": 3e-5, "peak": 3e-4, "end": 3e-5},
                "min_lr": 3e-5,
                "warmup_steps": warmup,
                "decay_steps": decay,
                "checkpoint_every": every,
                "switch_step": switch,
            }
        ],
        "total_steps": steps,
    }
    assert recipe.data.samples == samples
    assert samples * 2 == steps * recipe.stages["layerwise"].samples_per_step(2048)  # two epochs
    for other in ("unguided", "target-guided", "trajectory-guided", "waypoint-guided"):
        stage = plan(load_recipe(f"cald-{other}", [f"data.proportion={proportion}"]))["stages"][0]
        assert stage == planned["stages"][0] | {"switch_step": None}


def test_the_floor_of_cald_holds_from_update_9616_on():
    rate = load_recipe("cald-unguided").stages["layerwise"].learning_rate
    assert rate(0) == rate(36) == 3e-5  # in warm-up too
    assert rate(37) > 3e-5
    assert rate(360) == 3e-4
    assert rate(9615) > 3e-5
    assert {rate(step) for step in range(9616, 12_000)} == {3e-5}


def test_phi_mamba():
    stages = plan(load_recipe("mohawk-phi-mamba"))["stages"]
    assert [stage["steps"] for stage in stages] == [2441, 4882, 5264]
    assert [stage["warmup_steps"] for stage in stages] == [244, 488, 526]
    assert [list(stage) for stage in stages] == [KEYS] * 3
    assert {stage["switch_step"] for stage in stages} == {None}
    assert stages[0]["lr"]["start"] == 0.0
    assert stages[0]["lr"]["peak"] == 1e-4
    assert stages[0]["lr"]["end"] == pytest.approx(1e-4 / 244)


@pytest.mark.parametrize("name", recipe_names())
def test_a_table_for_people(name):
    console = Console(file=io.StringIO(), width=200)
    console.print(plan_table(load_recipe(name)))
    shown = console.file.getvalue()
    for stage in plan(load_recipe(name))["stages"]:
        assert stage["name"] in shown
        assert f"{stage['steps']:,}" in shown


def test_fewer_tokens(command):
    arguments = ("--tokens", "300000000", "--teacher", "a/teacher-not-here", "--json")
    planned = json.loads(command("plan", "cald-hybrid", *arguments))["stages"][0]
    assert (planned["steps"], planned["switch_step"], planned["decay_steps"]) == (1144, 457, 1200)
    assert load_recipe("cald-hybrid").scaled_to(300_000_000).data.samples == 73_242


# --- proportions ----------------------------------------------------------------------------------------------------


def test_another_proportion_needs_its_own_numbers():
    with pytest.raises(LimbeckError, match=r"data.proportion = 0.03 is not among") as error:
        load_recipe("cald-hybrid", ["data.proportion=0.03"])
    assert error.value.expected == "one of 0.005, 0.01, 0.02"
    needed = ["data.samples", "stages.layerwise.decay", "stages.layerwise.guidance_until", "stages.layerwise.steps"]
    assert error.value.hint == f"give {', '.join(needed)} with --set as well"
    given = [f"{key}={value}" for key, value in zip(needed, (4000, 300, 100, 250), strict=True)]
    stage = load_recipe("cald-hybrid", ["data.proportion=0.03", *given]).stages["layerwise"]
    assert (stage.steps, stage.switch_step, stage.decay_steps) == (250, 100, 300)


def test_what_is_said_comes_before_the_table(tmp_path):
    assert load_recipe("cald-hybrid", ["stages.layerwise.steps=5000"]).stages["layerwise"].steps == 5000
    assert load_recipe("cald-hybrid", ["stages.layerwise.tokens=26214400"]).stages["layerwise"].steps == 100
    file = tmp_path / "mine.toml"
    file.write_text('extends = "cald-hybrid"\nname = "mine"\n[stages.layerwise]\nsteps = 9000\n')
    stage = load_recipe(file).stages["layerwise"]
    assert (stage.steps, stage.switch_step) == (9000, 4576)


def test_a_recipe_without_proportions_has_none():
    with pytest.raises(LimbeckError, match="without"):
        load_recipe("mohawk", ["data.proportion=0.01"])


def test_updates_in_place_of_tokens(tmp_path):
    assert load_recipe("mohawk", ["stages.matrix.steps=7"]).stages["matrix"].tokens == 7 * 16_384
    for text in ("steps = 0", "steps = 1.5"):
        file = tmp_path / "mine.toml"
        file.write_text(
            f'name = "mine"\n[stages.a]\nobjective = "logits"\ntokens_per_step = 16_384\n{text}\n', encoding="utf-8"
        )
        with pytest.raises(LimbeckError, match="steps = "):
            load_recipe(file)


def test_the_optimisers_groups_of_cald():
    """Weight decay 0.1 on every mixer parameter except conv1d.bias and dt_proj.bias, none on teacher-born weights."""
    config = GPTNeoXConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48
    )
    recipe = load_recipe("cald-unguided")
    stage, options = recipe.stages["layerwise"], recipe.student
    assert options.mixer_kwargs == {"d_inner": 5120, "dt_rank": 160, "d_state": 16, "d_conv": 4}
    with torch.device("meta"):
        student = AutoModelForCausalLM.from_config(
            limbeck.student_config(config, options.mixer, init=options.init, mixer_kwargs=options.mixer_kwargs)
        )
    assert mixers(student)[0].in_proj.weight.shape == (2 * 5120, 32)
    step = StageStep(student, LayerwiseObjective())
    optimizer = optimizer_of(step, stage)
    decays = {
        name.removeprefix("student."): group["weight_decay"]
        for group in optimizer.param_groups
        for name in group["param_names"]
    }
    assert decays.keys() == {name for name, _ in student.named_parameters()}  # everything learns
    for name, decay in decays.items():
        born = ".mixer." not in name
        assert decay == (0.0 if born or name.endswith(("conv1d.bias", "dt_proj.bias")) else 0.1), name
    assert {name.rpartition("mixer.")[2] for name, decay in decays.items() if decay} == {
        *("A_log", "D", "in_proj.weight", "conv1d.weight", "x_proj.weight", "dt_proj.weight", "out_proj.weight")
    }
    assert all(group["betas"] == (0.9, 0.999) for group in optimizer.param_groups)
    assert (stage.clip, stage.schedule, stage.accumulation(2048)) == (1.0, "cosine", 16)
    assert (recipe.precision, recipe.tf32, recipe.data.shuffle) == ("float16", True, False)
