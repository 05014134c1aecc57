"""What spares a run its teacher's memory or time leaves its losses as they are."""

import pytest
import together
import torch

from limbeck import LimbeckError, load_recipe
from limbeck.recipes.schema import EngineTable
from limbeck.recipes.teachers import Teachers
from limbeck.students import blocks
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


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["none", "ddp", "fsdp"])
def test_a_compiled_teacher(parallel, losses):
    """Of one process offloaded as well: hooks and compiled parts do not mind one another."""
    more = ["engine.offload_teacher=true"] if parallel == "none" else [f"engine.parallel={parallel}"]
    expected = losses("as-it-is")
    found = losses("compiled", 1 if parallel == "none" else 2, "engine.compile_teacher=true", *more)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5, abs=1e-6)


@pytest.mark.slow  # torch.compile takes a second to be imported, and warns of itself
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method`:DeprecationWarning")
def test_frozen_teachers_are_as_the_engine_says(teacher_folder):
    def loaded(**engine):
        teacher = Teachers(str(teacher_folder), None, torch.device("cpu"), engine=EngineTable(**engine))._load(
            str(teacher_folder)
        )
        block = blocks(teacher)[0]
        return len(block._forward_pre_hooks), "forward" in vars(block.mlp)

    assert loaded() == (0, False)
    assert loaded(offload_teacher=True) == (1, False)
    assert loaded(compile_teacher=True) == (0, True)


@pytest.mark.parametrize("key", ["offload_teacher", "compile_teacher"])
def test_a_teacher_that_learns_stays_as_it_is(key):
    settings = [f"engine.{key}=true", "stages.layerwise.guidance=trajectory", "stages.layerwise.teacher_lr=1e-4"]
    with pytest.raises(LimbeckError, match=rf"engine.{key} with stages.layerwise.guidance"):
        load_recipe("cald-target-guided", settings)
    load_recipe("cald-target-guided", settings[:1])
