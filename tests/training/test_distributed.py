"""Processes that meet, agree and compute as one."""

import os
import socket
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import pytest
import torch

from limbeck import LimbeckError
from limbeck.training import OutOfMemory, World
from limbeck.training.distributed import TORCHRUN, process_seed
from limbeck.training.update import agree

HERE = Path(__file__).parent


@pytest.fixture
def environment(monkeypatch):
    """Set what a launcher sets, and nothing else."""
    for name in TORCHRUN:
        monkeypatch.delenv(name, raising=False)

    def environment(**variables):
        for name, value in variables.items():
            monkeypatch.setenv(name, str(value))

    return environment


@pytest.fixture
def port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def test_without_torchrun_a_process_is_alone(environment):
    environment(SLURM_STEP_NUM_TASKS=1)
    with World.join("cpu") as world:
        assert (world.rank, world.size, world.main, world.device) == (0, 1, True, torch.device("cpu"))
        assert world.agree([3, -1]) == [3, -1]
        assert world.gather("a") == ["a"]
        assert world.first(lambda: 5) == world.in_turn(lambda: 5) == world.share(5) == 5


@pytest.mark.parametrize("variable", ["SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE"])
def test_another_launcher_is_refused(variable, environment):
    environment(**{variable: 4})
    with pytest.raises(LimbeckError, match=f"a launcher started 4 processes .{variable}.(?s:.*)torchrun"):
        World.join("cpu")


def test_half_of_torchruns_variables_are_refused(environment):
    environment(RANK=0, WORLD_SIZE=2)
    with pytest.raises(LimbeckError, match="has RANK, WORLD_SIZE and not LOCAL_RANK, MASTER_ADDR, MASTER_PORT"):
        World.join("cpu")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*socket:ResourceWarning")
@pytest.mark.parametrize("rank", [0, 1])
def test_a_process_that_others_do_not_join_fails_within_seconds(rank, environment, port):
    environment(RANK=rank, WORLD_SIZE=2, LOCAL_RANK=rank, MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    with pytest.raises(LimbeckError, match=f"rank {rank} does not find the others at 127.0.0.1:{port}"):
        World.join("cpu", meet=timedelta(seconds=2))


@pytest.mark.parametrize(
    ("everywhere", "expected"),
    [
        ([(0, 0, 5), (15, 0, 5)], 15),
        ([(0, 1, 5), (0, 1, 5)], OutOfMemory),
        ([(0, 1, 5), (0, 0, 5)], LimbeckError),
        ([(0, 1, 5), (0, 1, 4)], LimbeckError),
        ([(0, 0, 5), (0, 0, 4)], 0),
    ],
    ids=["signal", "all lack memory", "one lacks memory", "at other places", "one is ahead"],
)
def test_what_processes_agree_on(everywhere, expected):
    """Of each: its signal, whether it lacks memory, and how many exchanges it has begun."""

    def outcome(own):
        class Stub:
            def exchanges(self):
                return [own[2]]

            def agree(self, values):
                assert values == row(own)
                return [max(column) for column in zip(*map(row, everywhere), strict=True)]

        return agree(Stub(), [own[0]] if own[0] else [], bool(own[1]), step=7)

    def row(process):
        signal, lacking, count = process
        return [signal, lacking, -lacking, count, -count]

    for own in everywhere:
        if isinstance(expected, int):
            assert outcome(own) == expected
        else:
            with pytest.raises(expected, match="out of memory"):
                outcome(own)


def test_each_process_draws_its_own_numbers():
    seeds = [process_seed(seed, rank) for seed in range(3) for rank in range(50)]
    assert len(set(seeds)) == len(seeds)
    assert [process_seed(seed, 0) for seed in range(3)] == [0, 1, 2]


@pytest.mark.slow
def test_two_processes_compute_as_one():
    """Everything in one call of torchrun, which takes seconds to start: see `checked_together`."""
    checks = ["words", "gradients", "precision", "what_is_not_finite", "kept_batch", "export"]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    variables = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE.parent)}
    done = subprocess.run(
        [*launcher, HERE / "checked_together.py", *checks],
        env=variables,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.split(" is well\n") == [*checks, ""]
