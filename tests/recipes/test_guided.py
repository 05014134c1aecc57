"""CALD's modes through whole runs: who is followed when, killed and resumed, and branched."""

import json
import shutil
import signal
import weakref

import killable
import pytest
import torch
from safetensors.torch import load_file

from limbeck import LimbeckError, distill, load_model, load_recipe, load_tokenizer
from limbeck.recipes import driver, teachers
from limbeck.recipes.branch import find_origin
from limbeck.recipes.folder import digests
from limbeck.training import TIME_FIELDS, read_metrics

RECIPE = """
name = "guided"
[student]
init = "random"
[data]
sequence_length = 16
eval_fraction = 0.05
shuffle = false
[evaluation]
every = 3
samples = 4
batch_size = 4
[stages.layerwise]
objective = "layerwise"
tokens = 640
tokens_per_step = 64
micro_batch = 2
lr = 3e-3
schedule = "cosine"
decay = 12
min_lr = 3e-4
weight_decay = 0.0
mixer_weight_decay = 0.1
checkpoint_every = 2
"""
STEPS = 10
MODES = {
    "none": ["guidance=none", "alpha_layer=0.0"],
    "target": [],
    "hybrid": ["guidance_until=5"],
    "trajectory": ["guidance=trajectory", "teacher_lr=1e-2", "teacher_update_every=2", "guidance_until=7"],
    "waypoint": ["guidance=waypoint", "guidance_until=0.9"],
    "frozen": ["freeze_steps=5", "guidance_until_tokens=320"],
    "float16": ["guidance_until=6"],
}


@pytest.fixture(scope="module")
def guided(tmp_path_factory):
    path = tmp_path_factory.mktemp("recipe") / "guided.toml"
    path.write_text(RECIPE)
    return path


@pytest.fixture(scope="module")
def waypoints(teacher_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("waypoints")
    for number in (2, 10, 9):  # in this order on the disk, to be walked through as 2, 9, 10
        model = load_model(teacher_folder)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1 + number / 100)
        model.save_pretrained(folder / f"step-{number}")
    return folder


@pytest.fixture(scope="module")
def settings(waypoints):
    def settings(mode):
        more = [f"waypoints={waypoints}"] if mode == "waypoint" else []
        top = ["precision=float16"] if mode == "float16" else []
        return [f"stages.layerwise.{setting}" for setting in MODES[mode] + more] + top

    return settings


@pytest.fixture(scope="module")
def run(guided, settings, teacher_folder, text_file):
    def run(mode, output, *changes, **options):
        recipe = load_recipe(guided, [*settings(mode), *changes])
        given = {"teacher": teacher_folder, "data": text_file, "device": "cpu"} | options
        return distill(recipe, output=output, **given)

    return run


@pytest.fixture(scope="module")
def command(guided, settings, teacher_folder, text_file):
    def command(mode, output, *more):
        changes = [part for setting in [*settings(mode), *more] for part in ("--set", setting)]
        given = ["--teacher", teacher_folder, "--data", text_file, "--output", output, "--device", "cpu"]
        return ["distill", guided, *given, *changes]

    return command


@pytest.fixture(scope="module")
def finished(command, tmp_path_factory):
    """Runs of each mode, made when they are asked for, each in a process of its own as those that are killed."""
    made = {}

    def finished(mode):
        if mode not in made:
            made[mode] = tmp_path_factory.mktemp(mode)
            code = killable.run(command(mode, made[mode] / "run"), made[mode] / "log")
            assert code == 0, (made[mode] / "log").read_text()
        return made[mode] / "run"

    return finished


def lines_of(output):
    lines = read_metrics(output / "metrics.jsonl")
    return [{key: value for key, value in line.items() if key not in TIME_FIELDS} for line in lines]


def updates_of(output):
    return [line for line in lines_of(output) if "loss" in line]


def weights_of(output):
    return {path.relative_to(output).as_posix(): path.read_bytes() for path in output.rglob("model.safetensors")}


def checkpoints_of(output):
    found = (output / "stages/1-layerwise/checkpoints").glob("step-*")
    return sorted(int(path.name.removeprefix("step-")) for path in found)


# --- who is followed when -------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mode", "until"), [("none", 0), ("target", 10), ("hybrid", 5), ("trajectory", 7), ("waypoint", 9), ("frozen", 5)]
)
def test_each_mode_follows_until_its_time_is_over(finished, mode, until):
    output = finished(mode)
    assert [line["step"] for line in updates_of(output) if "layer" in line] == list(range(1, until + 1))
    assert all("ce" in line for line in updates_of(output))
    switch = {until} & set(range(1, STEPS))
    assert checkpoints_of(output) == sorted({*sorted({8, 10} | switch)[-2:], *switch})
    evaluated = {line["step"]: "eval_kl" in line for line in lines_of(output) if "eval_loss" in line}
    assert evaluated == {step: step < until or step == until == STEPS for step in (0, 3, 6, 9, 10)}
    losses = [line["ce"] for line in updates_of(output)]
    assert losses[-1] < losses[0]


@pytest.mark.slow
def test_a_trajectory_learns_beside_the_student_and_is_in_the_checkpoints(finished):
    lines = updates_of(finished("trajectory"))
    assert [line["step"] for line in lines if "teacher_loss" in line] == [2, 4, 6]
    assert all("teacher_grad_norm" in line for line in lines if "teacher_loss" in line)
    folders = finished("trajectory") / "stages/1-layerwise/checkpoints"
    assert not (folders / "step-00000007/companion.safetensors").exists()


@pytest.mark.slow
def test_the_student_follows_the_teacher_as_it_was_before_its_update(finished, run, tmp_path):
    """With a teacher that is never updated in time, the first updates are those of target guidance."""
    first = [line | {"lr": 0} for line in updates_of(finished("trajectory"))[:2]]
    target = [line | {"lr": 0} for line in updates_of(finished("target"))[:2]]
    assert {key: first[0][key] for key in target[0]} == target[0]
    assert {key: first[1][key] for key in target[1]} == target[1]
    assert updates_of(finished("trajectory"))[2]["layer"] != updates_of(finished("target"))[2]["layer"]


@pytest.mark.slow
def test_the_teacher_is_freed_at_the_switch(run, tmp_path, monkeypatch):
    held = []

    def load(*arguments, **options):
        model = load_model(*arguments, **options)
        held.append(weakref.ref(model))
        return model

    alive = []
    step_of = driver.GuidedStep.forward

    def forward(self, batch):
        alive.append(sum(model() is not None for model in held))
        return step_of(self, batch)

    monkeypatch.setattr(teachers, "load_model", load)
    monkeypatch.setattr(driver.GuidedStep, "forward", forward)
    for mode, until in (("hybrid", 5), ("trajectory", 7)):
        held.clear()
        alive.clear()
        run(mode, tmp_path / mode)
        assert alive == [1] * 2 * until + [0] * 2 * (STEPS - until), mode


@pytest.mark.slow
def test_waypoints_are_walked_through_by_their_numbers(finished, waypoints, guided):
    stage = load_recipe(
        guided, ["stages.layerwise.guidance=waypoint", f"stages.layerwise.waypoints={waypoints}"]
    ).stages["layerwise"]
    assert [path.rpartition("/")[2] for path in teachers.waypoints(stage)] == ["step-2", "step-9", "step-10"]
    identity = json.loads((finished("waypoint") / "run.json").read_text())
    assert [entry["source"].rpartition("/")[2] for entry in identity["further_teachers"]] == [
        "step-2",
        "step-9",
        "step-10",
    ]


def test_mixers_learn_alone_before_the_release(finished):
    """The checkpoint at the release holds teacher-born weights as they were."""
    output = finished("frozen")
    before = load_file(output / "stages/0-converted/student/model.safetensors")
    for step, moved in ((5, False), (10, True)):
        saved = load_file(output / f"stages/1-layerwise/checkpoints/step-{step:08d}/00000-of-00001.safetensors")
        weights = {
            name.removeprefix("model/student."): tensor for name, tensor in saved.items()
        }  # the head goes by two names
        changed = {n for n, old in before.items() if n in weights and not torch.equal(weights[n], old)}
        assert any(".mixer." in name for name in changed)
        assert any(".mixer." not in name for name in changed) == moved


# --- killed and resumed ---------------------------------------------------------------------------------------------


MOMENTS = [
    ("trajectory", "os.rename checkpoints/step-00000004"),
    pytest.param(
        "hybrid", "os.rename checkpoints/step-00000005", marks=pytest.mark.slow
    ),  # at the switch: not yet saved
    pytest.param("waypoint", "os.rename checkpoints/step-00000006", marks=pytest.mark.slow),
    *(
        pytest.param(mode, f"os.rename checkpoints/step-{step:08d}", marks=pytest.mark.slow)
        for mode, step in [
            *(("trajectory", step) for step in (2, 6, 7, 8, 10)),
            *(("hybrid", step) for step in (4, 6, 10)),
            *(("frozen", step) for step in (2, 5, 6)),
            *(("float16", step) for step in (4, 6, 8)),
            *(("waypoint", step) for step in (4, 9, 10)),
            *(("target", step) for step in (4, 10)),
            ("none", 6),
        ]
    ),
]


@pytest.mark.parametrize(("mode", "moment"), MOMENTS)
def test_killed_and_resumed_equals_uninterrupted(mode, moment, command, finished, tmp_path):
    assert killable.run(command(mode, tmp_path / "run"), tmp_path / "log", moment) == -signal.SIGKILL
    assert killable.run(command(mode, tmp_path / "run"), tmp_path / "log") == 0, (tmp_path / "log").read_text()
    assert lines_of(tmp_path / "run") == lines_of(finished(mode))
    assert weights_of(tmp_path / "run") == weights_of(finished(mode))
    assert checkpoints_of(tmp_path / "run") == checkpoints_of(finished(mode))


# --- branching ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def kept(command, tmp_path_factory):
    """A target guided run that keeps every checkpoint."""
    folder = tmp_path_factory.mktemp("kept")
    assert killable.run(command("target", folder / "run", "stages.layerwise.keep_every=1"), folder / "log") == 0
    return folder / "run"


def test_keep_every(kept):
    assert checkpoints_of(kept) == list(range(1, 11))


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["", "layerwise:"])
def test_a_branch_without_the_teacher_is_the_hybrid_mode(kept, finished, command, tmp_path, stage):
    output, log = tmp_path / "branch", tmp_path / "log"
    arguments = [*command("none", output), "--from", f"{kept}@{stage}5"]
    assert killable.run(arguments, log) == 0, log.read_text()
    assert digests(output / "student") == digests(finished("hybrid") / "student")
    assert lines_of(output) == lines_of(finished("hybrid"))  # those before the branch came along
    before = {path: path.stat().st_mtime_ns for path in output.rglob("*.safetensors")}
    assert killable.run(arguments, log) == 0, log.read_text()  # given again, it is finished
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert json.loads((output / "run.json").read_text())["from"]["step"] == 5


def test_a_branch_resumes(kept, finished, command, tmp_path):
    arguments = [*command("none", tmp_path / "run"), "--from", f"{kept}@5"]
    for moment in ("os.rename 1-layerwise/checkpoints", "os.rename checkpoints/step-00000008"):
        assert killable.run(arguments, tmp_path / "log", moment) == -signal.SIGKILL, (tmp_path / "log").read_text()
    assert killable.run(arguments, tmp_path / "log") == 0, (tmp_path / "log").read_text()
    assert lines_of(tmp_path / "run") == lines_of(finished("hybrid"))


def test_branches_that_are_refused(kept, run, guided, teacher_folder, tmp_path):
    for origin, found in (
        ("nowhere", "--from nowhere"),
        ("nowhere@5", "nowhere holds no run"),
        (f"{kept}@11", "no checkpoints of step 11"),
        (f"{kept}@matrix:5", "no checkpoints of step 5"),
    ):
        with pytest.raises(LimbeckError, match=found):
            run("none", tmp_path / "branch", origin=origin)
    for change, found in (
        ("stages.layerwise.lr=1e-3", r"stages.layerwise.lr was 0.003, now 0.001"),
        ("data.seed=3", r"data.seed was 0, now 3"),
        ("mixer.d_state=4", r"recipe.student.mixer_kwargs"),
        ("stages.layerwise.tokens=1280", r"tokens was 640, now 1280"),
    ):
        with pytest.raises(LimbeckError, match=f"a branch of .* in which .*{found}"):
            run("none", tmp_path / "branch", change, origin=f"{kept}@5")
    with pytest.raises(LimbeckError, match="--student together with --from"):
        run("none", tmp_path / "branch", origin=f"{kept}@5", student=kept / "student")
    damaged = shutil.copytree(kept, tmp_path / "damaged")
    weights = damaged / "stages/1-layerwise/checkpoints/step-00000005/00000-of-00001.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(LimbeckError, match=r"cannot be used: .*safetensors has"):
        run("none", tmp_path / "branch", origin=f"{damaged}@5")
    assert not (tmp_path / "branch").exists()
    assert find_origin(f"{kept}@5").stage == "layerwise"


# --- the recipe's other keys ----------------------------------------------------------------------------------------


def test_a_stages_own_teacher_may_be_padded_further(run, teacher_folder, tmp_path):
    wide = load_model(teacher_folder)
    wide.resize_token_embeddings(290)
    wide.save_pretrained(tmp_path / "wide")
    load_tokenizer(teacher_folder).save_pretrained(tmp_path / "wide")
    output = run(
        "target", tmp_path / "run", f"stages.layerwise.teacher={tmp_path / 'wide'}", "stages.layerwise.alpha_logits=1.0"
    ).output
    assert "kl" in updates_of(output)[0]


def test_waypoints_that_are_refused(run, tmp_path):
    guided = "stages.layerwise.guidance=waypoint"
    with pytest.raises(LimbeckError, match="no waypoints for a stage"):
        run("target", tmp_path / "run", guided)
    with pytest.raises(LimbeckError, match="no checkpoints in nowhere"):
        run("target", tmp_path / "run", guided, "stages.layerwise.waypoints=nowhere")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        (["alpha_layer=0.0"], "with alpha_layer and alpha_logits 0"),
        (["alpha_ce=0.0", "guidance_until=0.5"], "alpha_ce = 0 in updates without a teacher"),
        (["guidance=trajectory"], "teacher_lr is missing"),
        (["guidance=trajectory", "teacher_lr=1e-3", "teacher_update_every=11"], "teacher_update_every = 11 in 10"),
        (["guidance_until=0"], "for 0 of 10 updates"),
        (["guidance_until=5", "guidance_until_tokens=64"], "are both given"),
        (["waypoints=somewhere"], "waypoints with guidance = 'target'"),
        (["guidance=follow"], "guidance = 'follow'"),
    ],
)
def test_guidance_that_cannot_be(guided, changes, found):
    with pytest.raises(LimbeckError, match=found):
        load_recipe(guided, [f"stages.layerwise.{change}" for change in changes])


def test_samples_come_in_file_order_for_as_many_epochs_as_the_tokens_ask(run, tmp_path, monkeypatch):
    read = []
    made = driver.micro_batches

    def micro_batches(dataset, sampler, micro_batch, **share):
        batches = made(dataset, sampler, micro_batch, **share)
        read.extend(int(index) for step in range(STEPS) for index in sampler[step])
        return batches

    monkeypatch.setattr(driver, "micro_batches", micro_batches)
    run("none", tmp_path / "run", "data.samples=20")
    assert read == [*range(20), *range(20)]
