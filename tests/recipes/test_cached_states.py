"""A run whose stage `hidden` reads hidden states from a cache is the run on the teacher."""

import pytest
import together
import torch
from safetensors.torch import load_file

from limbeck import LimbeckError, distill, load_recipe
from limbeck.distill import Keeping
from limbeck.recipes import driver, teachers
from limbeck.recipes.cached import cache_teacher
from limbeck.training import read_metrics


@pytest.fixture(scope="module")
def cache_of(teacher_folder, text_file, tmp_path_factory):
    def cache_of(target, **options):
        keeping = Keeping(8, shard_samples=50, hidden=target, **options)
        given = {"sequence_length": 16, "keeping": keeping, "batch_size": 32, "device": "cpu"}
        return cache_teacher(tmp_path_factory.mktemp("cache") / "states", teacher_folder, text_file, **given).folder

    return cache_of


@pytest.fixture(scope="module")
def exact(cache_of):
    return cache_of("block", hidden_stored="float32")


@pytest.fixture
def hidden_alone(recipe_file, tmp_path):
    text = recipe_file.read_text()
    parts = text[: text.index("[stages.matrix]")], text[text.index("[stages.hidden]") : text.index("[stages.logits]")]
    file = tmp_path / "hidden.toml"
    file.write_text("".join(parts))
    return file


@pytest.fixture
def run(hidden_alone, teacher_folder, text_file, tmp_path):
    def run(name, *settings):
        recipe = load_recipe(hidden_alone, settings)
        return distill(recipe, output=tmp_path / name, teacher=teacher_folder, data=text_file, device="cpu")

    return run


def losses(output):
    return [line["loss"] for line in read_metrics(output / "metrics.jsonl") if "lr" in line]


@pytest.mark.slow
@pytest.mark.parametrize("target", ["block", "mixer"])
def test_in_float32_it_is_the_run_on_the_teacher(target, run, exact, cache_of, monkeypatch):
    live = run("live", f"stages.hidden.target={target}")
    cache = exact if target == "block" else cache_of(target, hidden_stored="float32")

    def refuse(*_):
        raise AssertionError("the teacher is loaded")

    monkeypatch.setattr(teachers.Teachers, "_load", refuse)
    cached = run("cached", f"stages.hidden.target={target}", f"stages.hidden.teacher_cache={cache}")
    assert len(losses(live.output)) == 3
    assert losses(cached.output) == pytest.approx(losses(live.output), rel=1e-5)
    ours, theirs = (load_file(result.student / "model.safetensors") for result in (cached, live))
    assert all(torch.allclose(ours[name], theirs[name], atol=1e-4) for name in theirs)
    assert any("eval_loss" in line for line in read_metrics(cached.output / "metrics.jsonl"))


@pytest.mark.slow
def test_in_bfloat16_it_is_so_but_for_the_rounding(run, cache_of):
    live = losses(run("live").output)
    cached = losses(run("cached", f"stages.hidden.teacher_cache={cache_of('block')}").output)
    assert cached == pytest.approx(live, rel=1e-2)
    assert cached != pytest.approx(live, rel=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_processes_read_it_as_one_does(parallel, hidden_alone, exact, teacher_folder, text_file, run, tmp_path):
    read = f"stages.hidden.teacher_cache={exact}"
    given = ["--teacher", teacher_folder, "--data", text_file, "--output", tmp_path / "two", "--device", "cpu"]
    given += ["--set", read, "--set", f"engine.parallel={parallel}"]
    log = tmp_path / "log"
    assert together.start(2, "none", ["distill", hidden_alone, *given], log) == 0, log.read_text()
    assert losses(tmp_path / "two") == pytest.approx(losses(run("one", read).output), rel=1e-5)


def test_a_cache_of_something_else_is_refused(run, exact, cache_of, monkeypatch):
    def never(*_, **__):
        raise AssertionError("training begins")

    monkeypatch.setattr(driver.Driver, "run_stage", never)
    with pytest.raises(LimbeckError, match="was made with --hidden-states block"):
        run("other", f"stages.hidden.teacher_cache={exact}", "stages.hidden.target=mixer")
    with pytest.raises(LimbeckError, match="was made with --hidden-states None"):
        run("none", f"stages.hidden.teacher_cache={cache_of(None)}")
    with pytest.raises(AssertionError, match="training begins"):
        run("right", f"stages.hidden.teacher_cache={exact}")
