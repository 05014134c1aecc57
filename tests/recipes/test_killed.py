"""``limbeck distill`` killed with -9 at any moment, and given again, ends with the bits of an uninterrupted run."""

import random
import signal
import time

import killable
import pytest

from limbeck.training import TIME_FIELDS, read_metrics

KILLED = -signal.SIGKILL


@pytest.fixture(scope="module")
def command(recipe_file, teacher_folder, text_file):
    def command(output):
        return ["distill", recipe_file, "--teacher", teacher_folder, "--data", text_file, "--output", output]

    return command


def outcome(output):
    lines = [
        {key: value for key, value in line.items() if key not in TIME_FIELDS}
        for line in read_metrics(output / "metrics.jsonl")
    ]
    weights = {path.relative_to(output).as_posix(): path.read_bytes() for path in output.rglob("model.safetensors")}
    files = sorted(path.relative_to(output).as_posix() for path in output.rglob("*"))
    return lines, weights, files


@pytest.fixture(scope="module")
def uninterrupted(command, tmp_path_factory):
    folder = tmp_path_factory.mktemp("uninterrupted")
    assert killable.run(command(folder / "run"), folder / "log") == 0, (folder / "log").read_text()
    return outcome(folder / "run")


def finish(command, folder, uninterrupted):
    assert killable.run(command(folder / "run"), folder / "log") == 0, (folder / "log").read_text()
    lines, weights, files = outcome(folder / "run")
    assert lines == uninterrupted[0]
    assert weights.keys() == uninterrupted[1].keys()
    assert all(weights[name] == content for name, content in uninterrupted[1].items())
    assert files == uninterrupted[2]


def test_the_uninterrupted_run_is_as_expected(uninterrupted):
    lines, weights, _ = uninterrupted
    trained = [(line["stage"], line["step"]) for line in lines if "loss" in line]
    assert trained == [
        (name, n + 1) for name, steps in (("matrix", 4), ("hidden", 3), ("logits", 6)) for n in range(steps)
    ]
    assert len(weights) == 5
    assert weights["student/model.safetensors"] == weights["stages/3-logits/student/model.safetensors"]


@pytest.mark.parametrize(
    "moment",
    [
        "open 2-hidden/checkpoints/.writing-step-00000002/state.json",  # during a save
        "os.rename 1-matrix/student",  # between two stages: trained, not yet published
        *(
            pytest.param(moment, marks=pytest.mark.slow)
            for moment in (
                "open .writing-run.json",
                "os.rename /run.json",
                "os.rename data/training.npy",
                "os.rename 0-converted/student",
                "os.mkdir 1-matrix/checkpoints",  # the first update of all
                "os.rename 1-matrix/checkpoints/best-00000000",
                "open 1-matrix/checkpoints/.writing-step-00000002/manifest.json",
                "os.rename 1-matrix/checkpoints/step-00000002",
                "os.rename 1-matrix/checkpoints/step-00000004",
                "os.mkdir 1-matrix/.writing-student",
                "open 1-matrix/.writing-student/stage.json",
                "os.mkdir 2-hidden/checkpoints",  # between two stages: published, the next not begun
                "shutil.rmtree 3-logits/checkpoints/.old-step-00000002",  # while an old checkpoint is removed
                "os.rename 3-logits/checkpoints/step-00000006",
                "os.rename 3-logits/student",
                "os.mkdir run/.writing-student",
                "os.rename run/student",
            )
        ),
    ],
)
def test_killed_at_a_file(moment, command, uninterrupted, tmp_path):
    assert killable.run(command(tmp_path / "run"), tmp_path / "log", moment) == KILLED
    finish(command, tmp_path, uninterrupted)


@pytest.mark.parametrize("lines", [2, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 3, 5, 6, 8, 11, 13, 16))])
def test_killed_from_outside_after_so_many_lines(lines, command, uninterrupted, tmp_path):
    run = tmp_path / "run"
    assert killable.run_until(command(run), tmp_path / "log", run / "metrics.jsonl", lines) == KILLED
    finish(command, tmp_path, uninterrupted)


@pytest.mark.slow
def test_killed_again_and_again(command, uninterrupted, tmp_path):
    times = random.Random(5)
    for _ in range(12):
        process = killable.start(command(tmp_path / "run"), tmp_path / "log")
        time.sleep(times.uniform(0.1, 0.8))
        process.kill()
        process.join()
    finish(command, tmp_path, uninterrupted)


@pytest.mark.slow
def test_killed_in_every_stage_of_one_run(command, uninterrupted, tmp_path):
    for moment in (
        "open 1-matrix/checkpoints/.writing-step-00000004/state.json",
        "os.rename 1-matrix/student",
        "os.rename 2-hidden/checkpoints/step-00000003",
        "os.mkdir 3-logits/checkpoints",
        "os.rename 3-logits/checkpoints/step-00000004",
        "os.rename run/student",
    ):
        assert killable.run(command(tmp_path / "run"), tmp_path / "log", moment) == KILLED
    finish(command, tmp_path, uninterrupted)


def test_a_finished_run_is_left_alone(command, uninterrupted, tmp_path):
    finish(command, tmp_path, uninterrupted)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*.safetensors")}
    finish(command, tmp_path, uninterrupted)
    assert {path: path.stat().st_mtime_ns for path in before} == before
