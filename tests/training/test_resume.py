"""Killed at any moment and started again, a run ends with the bits of an uninterrupted one."""

import contextlib
import multiprocessing
import random
import shutil
import signal
import subprocess
import time

import pytest
import toy_stage

from limbeck.training import TIME_FIELDS, Checkpoints, read_metrics

MOMENTS = [
    "batch matrix 0",  # nothing saved yet, one evaluation written
    "batch matrix 5",
    "batch logits 0",  # between the stages
    "batch logits 5",
    "update 3",
    "update 9",
    "metrics 1",
    "metrics 6",
    "write step-00000002",
    "write step-00000006",
    "write best-00000003",
    "rename step-00000006",
    "rename best-00000003",
    "renamed step-00000006",
    "renamed best-00000003",
    "renamed step-00000007",  # the stage is done and saved, what it no longer wants is still there
    "prune step-00000002",
    "rename matrix.safetensors",
    "renamed matrix.safetensors",
]


def start(directory, kill="", asynchronous=False):
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["limbeck.training", "torch._dynamo"])  # the optimiser imports it at its first use
    directory.mkdir(exist_ok=True)
    process = context.Process(target=toy_stage.run, args=(directory, kill, asynchronous))
    process.start()
    return process


def run(directory, kill="", asynchronous=False):
    process = start(directory, kill, asynchronous)
    process.join(120)
    return process.exitcode


def outcome(directory):
    lines = [
        {key: value for key, value in line.items() if key not in TIME_FIELDS}
        for line in read_metrics(directory / "metrics.jsonl")
    ]
    weights = {stage: (directory / f"{stage}.safetensors").read_bytes() for stage in toy_stage.STAGES}
    folders = sorted(path.relative_to(directory).as_posix() for path in directory.glob("*/*"))
    return lines, weights, folders


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    directory = tmp_path_factory.mktemp("uninterrupted")
    assert run(directory) == 0
    return outcome(directory)


def test_the_uninterrupted_run_is_as_expected(uninterrupted, tmp_path):
    lines, _, folders = uninterrupted
    trained = [(line["stage"], line["step"]) for line in lines if "loss" in line]
    assert trained == [(stage, step + 1) for stage, total in toy_stage.STAGES.items() for step in range(total)]
    evaluated = [(line["stage"], line["step"]) for line in lines if "eval_loss" in line]
    assert evaluated == [("matrix", n) for n in (0, 3, 6, 7)] + [("logits", n) for n in (0, 3, 6)]
    assert [folder for folder in folders if "step" in folder] == [
        "logits/step-00000004",
        "logits/step-00000006",
        "matrix/step-00000006",
        "matrix/step-00000007",
    ]
    assert run(tmp_path) == 0
    assert outcome(tmp_path) == uninterrupted


@pytest.mark.parametrize("moment", MOMENTS)
def test_killed_and_resumed_equals_uninterrupted(moment, uninterrupted, tmp_path):
    assert run(tmp_path, moment) == -signal.SIGKILL
    assert run(tmp_path) == 0
    assert outcome(tmp_path) == uninterrupted
    assert not list(tmp_path.glob("*/.*"))


@pytest.mark.slow
def test_killed_again_and_again(uninterrupted, tmp_path):
    for moment in MOMENTS:
        run(tmp_path, moment)
    assert run(tmp_path) == 0
    assert outcome(tmp_path) == uninterrupted


@pytest.mark.slow
@pytest.mark.parametrize("asynchronous", [False, True], ids=["in step", "in the background"])
def test_torture(asynchronous, uninterrupted, tmp_path):
    """Fifty runs killed at random moments, some more than once; every one ends with the same bits, losing nothing."""
    begun = time.monotonic()
    assert run(tmp_path / "whole", asynchronous=asynchronous) == 0
    duration = time.monotonic() - begun
    assert outcome(tmp_path / "whole") == uninterrupted
    times = random.Random(3)
    for number in range(50):
        directory = tmp_path / str(number)
        kills = times.choice((1, 1, 3))
        while kills:
            process = start(directory, asynchronous=asynchronous)
            time.sleep(times.uniform(0.02, 1.0) * duration)
            process.kill()
            process.join()
            kills -= process.exitcode == -signal.SIGKILL
            if process.exitcode == 0:  # it was faster
                duration *= 0.9
                shutil.rmtree(directory)
            for stage in toy_stage.STAGES:  # whatever has its final name is whole
                store = Checkpoints(directory / stage, stage=stage, fingerprint="toy")
                assert not any(store.problem(path) for path in (directory / stage).glob("[sb]*-*"))
        assert run(directory, asynchronous=asynchronous) == 0
        assert outcome(directory) == uninterrupted
        assert not list(directory.glob("*/.*"))


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 1 MiB, where the machine lets us mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("may not mount a file system")
    yield folder
    subprocess.run(["umount", folder], check=True)


@pytest.mark.slow
@pytest.mark.parametrize("asynchronous", [False, True], ids=["in step", "in the background"])
def test_a_full_disk_costs_no_checkpoint(asynchronous, uninterrupted, small_disk):
    assert run(small_disk, "batch matrix 5", asynchronous) == -signal.SIGKILL
    before = sorted(path.name for path in (small_disk / "matrix").glob("step-*"))
    filler = small_disk / "filler"
    with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))
    assert run(small_disk, asynchronous=asynchronous) == 1
    store = Checkpoints(small_disk / "matrix", stage="matrix", fingerprint="toy")
    assert sorted(path.name for path in (small_disk / "matrix").glob("step-*")) == before
    assert not any(store.problem(small_disk / "matrix" / name) for name in before)
    filler.unlink()
    assert run(small_disk, asynchronous=asynchronous) == 0
    assert outcome(small_disk) == uninterrupted


@pytest.mark.parametrize(("name", "code"), [("SIGTERM", 143), ("SIGINT", 130)])
def test_a_signal_saves_at_the_next_step_and_exits(name, code, uninterrupted, tmp_path):
    assert run(tmp_path, f"{name} 4 1") == code
    assert (tmp_path / "matrix" / "step-00000005").is_dir()
    assert run(tmp_path) == 0
    lines, weights, _ = outcome(tmp_path)
    assert (lines, weights) == uninterrupted[:2]


def test_a_signal_in_the_last_step_stops_before_the_next_stage(uninterrupted, tmp_path):
    assert run(tmp_path, "SIGTERM 6 1") == 143
    assert not (tmp_path / "logits").exists()
    assert run(tmp_path) == 0
    assert outcome(tmp_path) == uninterrupted


@pytest.mark.parametrize(("name", "code"), [("SIGTERM", -signal.SIGTERM), ("SIGINT", 1)])
def test_a_second_signal_acts_at_once(name, code, uninterrupted, tmp_path):
    assert run(tmp_path, f"{name} 4 2") == code
    assert not (tmp_path / "matrix" / "step-00000005").exists()
    assert run(tmp_path) == 0
    assert outcome(tmp_path) == uninterrupted


@pytest.mark.parametrize("damage", ["truncate", "flip", "no manifest", "no weights", "no folder"])
def test_a_damaged_checkpoint_costs_only_itself(damage, uninterrupted, tmp_path):
    assert run(tmp_path, "batch matrix 5") == -signal.SIGKILL
    newest = tmp_path / "matrix" / "step-00000004"
    weights = newest / "00000-of-00001.safetensors"
    match damage:
        case "truncate":
            weights.write_bytes(weights.read_bytes()[:-1])
        case "flip":
            content = bytearray(weights.read_bytes())
            content[len(content) // 2] ^= 1
            weights.write_bytes(content)
        case "no manifest":
            (newest / "manifest.json").unlink()
        case "no weights":
            weights.unlink()
        case "no folder":
            shutil.rmtree(newest)
    assert run(tmp_path) == 0
    assert outcome(tmp_path) == uninterrupted
