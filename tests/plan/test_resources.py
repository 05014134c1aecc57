"""What a recipe takes, as `limbeck plan` works it out without a GPU and without a network."""

import json
import math

import pytest
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, GPTNeoXConfig, LlamaConfig, PretrainedConfig

from limbeck import LimbeckError, load_recipe
from limbeck.distill import Keeping, StageStep, make_objective, write_teacher_cache
from limbeck.plan import CARDS, MeasuredCard, estimate, plan_table
from limbeck.plan.cached import cached_signals, manifest_of
from limbeck.plan.shapes import SHAPES, config_of, student_of_shape, teacher_of_shape
from limbeck.recipes.placement import copies_of
from limbeck.recipes.schema import Recipe
from limbeck.students import blocks, student_config

PUBLISHED = {  # parameters, tied ones once
    "microsoft/phi-1_5": 1_418_270_720,
    "EleutherAI/pythia-160m": 162_322_944,
    "EleutherAI/pythia-410m": 405_334_016,
    "EleutherAI/pythia-1b": 1_011_781_632,
    "meta-llama/Llama-3.2-1B": 1_235_814_400,
}
MEMORY = ["student", "teacher", "gradients", "optimizer", "gathered", "activations", "workspace", "total"]
STAGE = [
    *("parameters", "micro_batch", "accumulation", "memory", "fits", "flops_per_token", "flops", "launches"),
    *("tokens_per_second", "hours", "cost"),
]


def small(name: str = "mohawk", *settings: str) -> Recipe:
    sizes = [
        f"stages.{stage}.{size}"
        for stage in ("matrix", "hidden", "logits")
        for size in ("tokens=8192", "tokens_per_step=1024", "micro_batch=4")
    ]
    return load_recipe(name, ["data.sequence_length=64", *sizes, *settings])


@pytest.fixture
def teacher(tmp_path) -> str:
    config = GPTNeoXConfig(
        vocab_size=320, hidden_size=64, num_hidden_layers=3, num_attention_heads=4, intermediate_size=96
    )
    config.save_pretrained(tmp_path)
    return str(tmp_path)


@pytest.mark.parametrize("source", PUBLISHED)
def test_the_recipes_teachers_are_known_without_network(source, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert PUBLISHED.keys() == SHAPES.keys()
    assert teacher_of_shape(config_of(source), torch.bfloat16).num_parameters() == PUBLISHED[source]


def test_parameters_are_those_of_models_that_are_built(teacher):
    recipe = small("mohawk", "student.keep_attention=[1]")
    config = config_of(teacher)
    made = student_config(config, recipe.student.mixer, [1], recipe.student.init)
    student = AutoModelForCausalLM.from_config(made)
    built = AutoModelForCausalLM.from_config(config)
    for name, stage in estimate(recipe, teacher=teacher)["stages"].items():
        step = StageStep(student.train(), make_objective(name), built)
        assert stage["parameters"] == {
            "student": sum(parameter.numel() for parameter in student.parameters()),
            "learning": sum(parameter.numel() for parameter in step.parameters() if parameter.requires_grad),
            "teacher": sum(parameter.numel() for parameter in built.parameters()),
        }
        learning = stage["parameters"]["learning"]
        assert stage["memory"]["student"] == 4 * stage["parameters"]["student"]
        assert stage["memory"]["teacher"] == 2 * stage["parameters"]["teacher"]
        assert stage["memory"]["optimizer"] == 2 * 4 * learning


def test_sums_add_up_and_json_is_stable(teacher):
    found = estimate(small(), teacher=teacher, gpu="H200", price_per_hour=2.0)
    assert list(json.loads(json.dumps(found))) == [
        *("gpu", "gpus", "parallel", "stages", "flops", "hours", "cost", "unknown")
    ]
    assert (found["parallel"], found["unknown"]) == ("none", [])
    for name, stage in found["stages"].items():
        memory = stage["memory"]
        assert (list(stage), list(memory)) == (STAGE, MEMORY)
        assert memory["total"] == sum(memory[part] for part in MEMORY[:-1])
        assert (stage["micro_batch"], stage["accumulation"], stage["fits"]) == (4, 4, True)
        assert stage["flops"] == pytest.approx(stage["flops_per_token"] * 8192)
        assert stage["hours"] == pytest.approx(8192 / stage["tokens_per_second"] / 3600)
        assert stage["cost"] == pytest.approx(2.0 * stage["hours"]), name
    for key in ("flops", "hours", "cost"):
        assert found[key] == pytest.approx(sum(stage[key] for stage in found["stages"].values()))


@pytest.mark.slow
def test_sharing_divides_what_is_shared(teacher):
    copies, shared = (estimate(small(), teacher=teacher, gpu="H200", gpus=4, parallel=way) for way in ("ddp", "fsdp"))
    assert (copies["parallel"], shared["parallel"]) == ("ddp", "fsdp")
    for name in copies["stages"]:
        one, four = copies["stages"][name]["memory"], shared["stages"][name]["memory"]
        for part in ("student", "teacher", "optimizer"):
            assert four[part] == one[part] // 4
        assert one["gathered"] == 0 < four["gathered"]
        assert (one["activations"], one["workspace"]) == (four["activations"], four["workspace"])
        assert copies["stages"][name]["accumulation"] == 1
    half = estimate(small("mohawk", "engine.shard_size=2"), teacher=teacher, gpus=4, parallel="fsdp")
    assert half["stages"]["logits"]["memory"]["student"] == copies["stages"]["logits"]["memory"]["student"] // 2


@pytest.mark.slow
def test_layers_of_an_offloaded_teacher_are_not_there(teacher):
    """But for two of them, where each GPU has a copy of the rest as where they share one."""
    model = teacher_of_shape(config_of(teacher), torch.bfloat16)
    sizes = [2 * sum(parameter.numel() for parameter in block.parameters()) for block in blocks(model)]
    for options in ({}, {"gpus": 2, "parallel": "fsdp"}):
        there, away = (
            estimate(small("mohawk", f"engine.offload_teacher={on}"), teacher=teacher, **options)["stages"]
            for on in ("false", "true")
        )
        shards = options.get("gpus", 1)
        for name, stage in there.items():
            before, after = stage["memory"], away[name]["memory"]
            assert before["teacher"] - after["teacher"] == sum(sizes) // shards
            assert after["gathered"] - before["gathered"] == (2 * max(sizes) if shards == 1 else 0)
            assert {part: before[part] for part in MEMORY[3:4] + MEMORY[5:7]} == {
                part: after[part] for part in MEMORY[3:4] + MEMORY[5:7]
            }


SPARED = {
    "hidden": ["hidden", "stages.hidden.teacher_cache={}"],
    "logits": ["logits", "stages.logits.teacher_cache={}"],
}


@pytest.mark.slow
@pytest.mark.parametrize("name", SPARED)
def test_a_cache_spares_the_teacher(name, teacher, tmp_path):
    stage, setting = SPARED[name]
    live = estimate(small(), teacher=teacher, gpu="H200")
    cached = estimate(small("mohawk", setting.format(tmp_path / "later")), teacher=teacher, gpu="H200")
    assert live["unknown"] == []
    assert cached["unknown"] == [
        f"the teacher cache of stages.{stage}: it is not there, and planned as prepare makes one by default"
    ]
    for other in live["stages"].keys() - {stage}:
        assert cached["stages"][other] == live["stages"][other]
    before, after = live["stages"][stage], cached["stages"][stage]
    assert before["memory"]["teacher"] > after["memory"]["teacher"] == after["parameters"]["teacher"] == 0
    assert {part: before["memory"][part] for part in ("student", "optimizer")} == {
        part: after["memory"][part] for part in ("student", "optimizer")
    }
    # The teacher's forward pass: two operations for each weight of a product; the student's update has six.
    model = teacher_of_shape(config_of(teacher), torch.float32)
    parts = blocks(model) if stage == "hidden" else model
    products = sum(module.weight.numel() for module in parts.modules() if isinstance(module, torch.nn.Linear))
    assert 0.9 < (before["flops_per_token"] - after["flops_per_token"]) / (2 * products) < 2.0
    assert after["tokens_per_second"] > 0


@pytest.mark.slow
def test_what_a_cache_says_is_what_a_batch_carries(teacher, tmp_path):
    """A finished cache is planned as it is, not as a default one."""
    model = AutoModelForCausalLM.from_config(config_of(teacher)).eval()
    ids = torch.randint(0, 320, (2, 65))

    def batch_of(numbers):
        return {"input_ids": ids[list(numbers), :-1], "labels": ids[list(numbers), 1:]}

    def planned(k):
        folder = tmp_path / f"k-{k}"
        keeping = Keeping(k, hidden="block", hidden_stored="float32")
        about = {"teacher": "", "fingerprint": {}, "data": ""}
        cache = write_teacher_cache(folder, model, batch_of, samples=2, about=about, keeping=keeping)
        recipe = small("mohawk", *(f"stages.{name}.teacher_cache={folder}" for name in SPARED))
        for name, read in (("hidden", cache.states), ("logits", cache.rows)):
            stage = recipe.stages[name]
            expected = read([0, 1], batch_of([0, 1]))
            found = cached_signals(stage, manifest_of(stage, config_of(teacher)), 2, 64)
            assert {key: (value.shape, value.dtype) for key, value in found.items()} == {
                key: (value.shape, value.dtype) for key, value in expected.items()
            }
        estimated = estimate(recipe, teacher=teacher, gpu="H200")
        assert estimated["unknown"] == []
        return estimated["stages"]["logits"]["memory"]["activations"]

    assert planned(128) - planned(8) == 4 * 64 * 120 * (4 + 4)


@pytest.mark.slow
def test_a_cache_without_what_a_stage_reads_is_refused(teacher, tmp_path):
    model = AutoModelForCausalLM.from_config(config_of(teacher)).eval()
    batch = {"input_ids": torch.randint(0, 320, (1, 64)), "labels": torch.randint(0, 320, (1, 64))}
    about = {"teacher": "", "fingerprint": {}, "data": ""}
    write_teacher_cache(tmp_path / "cache", model, lambda numbers: batch, samples=1, about=about)
    recipe = small("mohawk", f"stages.hidden.teacher_cache={tmp_path / 'cache'}")
    with pytest.raises(LimbeckError, match="--hidden-states None"):
        estimate(recipe, teacher=teacher, gpu="H200")


def test_copies_are_of_what_is_held(teacher):
    config = config_of(teacher)
    recipe, bf16 = small(), torch.bfloat16.itemsize
    student, model = student_of_shape(config, recipe), teacher_of_shape(config, torch.float32)
    learning = 16 * student.num_parameters()
    assert copies_of(recipe, student, model, bf16) == learning + bf16 * model.num_parameters()
    outside = model.num_parameters() - sum(parameter.numel() for parameter in blocks(model).parameters())
    offloaded = small("mohawk", "engine.offload_teacher=true")
    assert copies_of(offloaded, student, model, bf16) == learning + bf16 * outside
    alone = load_recipe("logits-only", ["stages.logits.teacher_cache=cache", "evaluation.every=0.1"])
    assert copies_of(alone, student, model, bf16) == learning
    text = ["stages.logits.kl_weight=0.0", "stages.logits.ce_weight=1.0"]
    for every, stays in (("0", 0), ("0.1", model.num_parameters())):
        recipe = load_recipe("logits-only", [*text, f"evaluation.every={every}"])
        assert copies_of(recipe, student, model, bf16) == learning + bf16 * stays


@pytest.mark.slow
def test_several_gpus_choose_as_a_run_does(teacher, monkeypatch):
    assert estimate(small(), teacher=teacher, gpu="H200", gpus=2)["parallel"] == "ddp"
    tight = CARDS["H200"]
    tight = MeasuredCard(2_000_000, tight.matmul_rate, tight.copy_bandwidth, tight.kernels, tight.efficiency)
    monkeypatch.setattr("limbeck.plan.resources.card_named", lambda _name: tight)
    found = estimate(small(), teacher=teacher, gpu="H200", gpus=2)
    assert found["parallel"] == "fsdp"
    assert not any(stage["fits"] for stage in found["stages"].values())


@pytest.mark.slow
def test_activations_follow_the_objective(teacher):
    def held(*settings: str) -> list[int]:
        stages = estimate(small("mohawk", *settings), teacher=teacher)["stages"]
        return [stage["memory"]["activations"] for stage in stages.values()]

    once, twice = held(), held(*(f"stages.{stage}.micro_batch=8" for stage in ("matrix", "hidden", "logits")))
    assert all(1.8 < more / less < 2.05 for less, more in zip(once, twice, strict=True))
    assert once[0] < once[1]


@pytest.mark.slow
def test_a_teacher_that_learns_has_gradients_and_momenta(teacher):
    def memory(mode: str, *settings: str) -> dict[str, int]:
        sizes = ("tokens_per_step=1024", "micro_batch=4", "steps=40", "decay=40")
        given = ["data.sequence_length=64", "student.mixer_kwargs.d_inner=128", "student.mixer_kwargs.dt_rank=4"]
        recipe = load_recipe(f"cald-{mode}", [*given, *(f"stages.layerwise.{size}" for size in sizes), *settings])
        return estimate(recipe, teacher=teacher)["stages"]["layerwise"]["memory"]

    alone, target, trajectory = memory("unguided"), memory("target-guided"), memory("trajectory-guided")
    count = teacher_of_shape(config_of(teacher), torch.float32).num_parameters()
    assert (alone["teacher"], target["teacher"], trajectory["teacher"]) == (0, 2 * count, 4 * count)
    assert trajectory["optimizer"] - target["optimizer"] == 8 * count
    assert alone["activations"] < target["activations"] < trajectory["activations"]
    waiting = memory("trajectory-guided", "stages.layerwise.teacher_update_every=4")
    assert waiting["optimizer"] == trajectory["optimizer"]


@pytest.mark.parametrize(
    "config",
    [
        LlamaConfig(
            vocab_size=320, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
            intermediate_size=96, tie_word_embeddings=True,
        ),
        GPTNeoXConfig(vocab_size=320, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=96),
    ],
    ids=lambda config: config.model_type,
)  # fmt: skip
def test_arithmetic_of_a_student_without_teacher(config: PretrainedConfig, tmp_path):
    """Six operations for each weight of a product and token, and little beside."""
    config.save_pretrained(tmp_path)
    recipe = load_recipe(
        "logits-only",
        [
            *("data.sequence_length=64", "stages.logits.tokens_per_step=1024", "stages.logits.micro_batch=4"),
            *("stages.logits.kl_weight=0.0", "stages.logits.ce_weight=1.0"),
        ],
    )
    found = estimate(recipe, teacher=tmp_path)["stages"]["logits"]
    student = student_of_shape(config_of(tmp_path), recipe)
    products = sum(module.weight.numel() for module in student.modules() if isinstance(module, torch.nn.Linear))
    assert found["memory"]["teacher"] == 0
    assert 1.0 < found["flops_per_token"] / (6 * products) < 1.5


@pytest.mark.slow
def test_what_is_not_known_is_said(teacher, monkeypatch):
    for found, words in (
        (estimate(small()), "names no teacher"),
        (estimate(small(), teacher="somebody/unheard-of"), "somebody/unheard-of"),
    ):
        assert (found["stages"], found["hours"]) == ({}, None)
        assert words in found["unknown"][0]
    found = estimate(small(), teacher=teacher)
    assert found["hours"] is found["stages"]["logits"]["fits"] is None
    assert found["stages"]["logits"]["memory"]["total"] > 0
    assert "no card is named" in found["unknown"][0]
    full = estimate(small("mohawk", "precision=float32"), teacher=teacher, gpu="H200")
    assert full["hours"] is None
    assert "float32" in full["unknown"][0]
    monkeypatch.setattr("limbeck.plan.resources.has_triton", lambda: False)
    found = estimate(small(), teacher=teacher, gpu="H200")
    memory = found["stages"]["hidden"]["memory"]
    assert memory["activations"] is memory["total"] is found["flops"] is found["hours"] is None
    assert memory["optimizer"] == 2 * memory["gradients"] > 0
    Console(quiet=True).print(plan_table(small(), found))


def test_wrong_arguments_name_the_right_ones(teacher):
    with pytest.raises(LimbeckError, match="A9000") as error:
        estimate(small(), teacher=teacher, gpu="A9000")
    assert all(name in error.value.expected for name in CARDS)
    for options in ({"gpus": 0}, {"gpus": 3}, {"parallel": "pipeline"}):
        with pytest.raises(LimbeckError):
            estimate(small(), teacher=teacher, **options)


def test_efficiency_between_and_beyond_the_measured_sizes():
    card = MeasuredCard(1, 10.0, 2.0, {"slow": 0.5}, {"logits": ((1e14, 0.8), (1e12, 0.4))})
    assert [card.efficiency_at("logits", flops) for flops in (1e10, 1e12, 1e14, 1e16)] == [0.4, 0.4, 0.8, 0.8]
    assert math.isclose(card.efficiency_at("logits", 1e13), 0.6)
    assert (card.seconds("a", 30.0, 4.0), card.seconds("a", 10.0, 4.0), card.seconds("slow", 10.0, 4.0)) == (3, 2, 4)
    for measured in CARDS.values():
        assert measured.efficiency.keys() == {"matrix", "hidden", "logits", "layerwise"}
