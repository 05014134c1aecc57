"""What spares a run its teacher's memory or time leaves its losses as they are."""

import pytest
import together

from limbeck.training import read_metrics


@pytest.fixture
def losses(recipe_file, teacher_folder, text_file, tmp_path):
    """Every update's loss and every evaluation's, of a run under these settings."""

    def losses(name, processes=1, *settings):
        output, log = tmp_path / name, tmp_path / f"{name}.log"
        given = ["--teacher", teacher_folder, "--data", text_file, "--output", output, "--device", "cpu"]
        given += [part for setting in settings for part in ("--set", setting)]
        assert together.start(processes, "none", ["distill", recipe_file, *given], log) == 0, log.read_text()
        assert "Warning" not in log.read_text()
        figures = ("loss", "eval_loss", "eval_kl")
        lines = read_metrics(output / "metrics.jsonl")
        return [[line[name] for line in lines if name in line] for name in figures]

    return losses


@pytest.mark.slow
def test_a_teacher_in_the_hosts_memory(losses):
    expected = losses("resident")
    assert all(expected)
    assert losses("offloaded", 1, "engine.offload_teacher=true") == expected


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_a_teacher_in_the_memory_of_two_processes_hosts(parallel, losses):
    expected = losses("alone")
    found = losses(parallel, 2, "engine.offload_teacher=true", f"engine.parallel={parallel}")
    for ours, theirs in zip(found, expected, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5, abs=1e-6)
