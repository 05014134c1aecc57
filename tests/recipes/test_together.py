"""The same recipe in one process and in several, copied or sharded: the same losses, the same student."""

import pytest
import together
from safetensors.torch import load_file

from limbeck.training import TIME_FIELDS, read_metrics

RECIPE = """
name = "together"
[data]
sequence_length = 16
eval_fraction = 0.05
[evaluation]
every = 2
samples = 8
batch_size = 4
"""
STAGE = """
[stages.{name}]
objective = "{objective}"
steps = {steps}
tokens_per_step = 128
micro_batch = 2
lr = 3e-3
checkpoint_every = 2
{more}
"""
STAGES = {
    "matrix": ("matrix", 4, ""),
    "hidden": ("hidden", 4, ""),
    "mixer": ("hidden", 2, 'target = "mixer"'),
    "logits": ("logits", 4, "mixer_lr = 6e-3\nfreeze_steps = 2"),
    "target": ("layerwise", 4, "guidance_until = 0.5"),
    "layers": ("layerwise", 2, "alpha_ce = 0.0"),
    "trajectory": ("layerwise", 6, 'guidance = "trajectory"\nteacher_lr = 1e-3\nteacher_update_every = 2'),
}


@pytest.fixture(scope="module")
def command(teacher_folder, text_file, tmp_path_factory):
    recipe = tmp_path_factory.mktemp("recipe") / "together.toml"
    stages = [STAGE.format(name=name, objective=o, steps=n, more=more) for name, (o, n, more) in STAGES.items()]
    recipe.write_text(RECIPE + "".join(stages))

    def command(output, *settings):
        given = ["--teacher", teacher_folder, "--data", text_file, "--output", output, "--device", "cpu"]
        return ["distill", recipe, *given, *(part for setting in settings for part in ("--set", setting))]

    return command


@pytest.fixture(scope="module")
def alone(command, tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone")
    assert together.start(1, "none", command(folder / "run"), folder / "log") == 0, (folder / "log").read_text()
    return folder / "run"


def assert_same(found, expected):
    """Every figure of every line to 1e-5, and the student of every stage."""
    lines = zip(read_metrics(found / "metrics.jsonl"), read_metrics(expected / "metrics.jsonl"), strict=True)
    for one, other in lines:
        assert (list(one), one["stage"]) == (list(other), other["stage"])
        for name in one.keys() - {"stage", *TIME_FIELDS}:
            assert one[name] == pytest.approx(other[name], rel=1e-5, abs=1e-6), (one["stage"], one["step"], name)
    for path in sorted(expected.rglob("student/model.safetensors")):
        one, other = load_file(found / path.relative_to(expected)), load_file(path)
        assert one.keys() == other.keys()
        for name, tensor in other.items():
            # As a whole: where a gradient is almost 0, Adam makes a step of the order of its sums.
            assert (one[name] - tensor).norm() <= 1e-4 * tensor.norm(), (path.parent.parent.name, name)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("processes", "settings"),
    [
        (2, ["engine.parallel=ddp"]),
        (2, ["engine.parallel=fsdp"]),
        (4, ["engine.parallel=fsdp", "engine.shard_size=2"]),
    ],
    ids=["ddp", "fsdp", "hsdp"],
)
def test_as_in_one_process(processes, settings, command, alone, tmp_path):
    code = together.start(processes, "none", command(tmp_path / "run", *settings), tmp_path / "log")
    assert code == 0, (tmp_path / "log").read_text()
    assert_same(tmp_path / "run", alone)
    said = (tmp_path / "log").read_text()
    assert said.count("converting") == 1  # one process speaks
    assert "Warning" not in said


@pytest.mark.slow
def test_interrupted_and_resumed_by_other_processes(command, alone, tmp_path):
    """Stopped by a signal to one process; taken up by another number, copied or sharded, short of memory or not."""
    for processes, mishap, parallel, code in (
        (2, "SIGTERM:matrix:2", "ddp", 1),
        (1, "SIGTERM:hidden:1", "auto", 143),
        (2, "SIGTERM:logits:2", "fsdp", 1),
        (2, "SIGTERM:trajectory:2", "ddp", 1),
        (2, "SIGTERM:trajectory:3", "fsdp", 1),
        (2, "memory:1", "ddp", 0),
    ):
        arguments = command(tmp_path / "run", f"engine.parallel={parallel}")
        assert together.start(processes, mishap, arguments, tmp_path / "log") == code, (tmp_path / "log").read_text()
    assert_same(tmp_path / "run", alone)
    said = (tmp_path / "log").read_text()
    for stopped in ("matrix: stopped and saved at step 3", "trajectory: stopped and saved at step 4"):
        assert said.count(stopped) == 1
    assert "trajectory: out of memory with micro-batches of 2 samples; going on with 1" in said


@pytest.mark.slow
def test_a_sharded_stage_short_of_memory_is_built_anew(command, alone, tmp_path):
    arguments = command(tmp_path / "run", "engine.parallel=fsdp")
    assert together.start(2, "memory:1", arguments, tmp_path / "log") == 0, (tmp_path / "log").read_text()
    assert_same(tmp_path / "run", alone)


@pytest.mark.slow
def test_a_mistake_in_one_process_ends_all_and_is_told_once(command, tmp_path):
    arguments = command(tmp_path / "run", "engine.parallel=ddp")
    assert together.start(2, "error:hidden:1", arguments, tmp_path / "log") == 1
    said = (tmp_path / "log").read_text()
    assert said.count("limbeck: a mistake that one process meets") == 1
    assert "Traceback" not in said.partition("torch/distributed/elastic")[0]
