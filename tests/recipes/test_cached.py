"""A run on a teacher cache is the run on the teacher, and a cache of something else is refused before it begins."""

import gc
import shutil
import weakref

import pytest
import together
import torch

from limbeck import LimbeckError, distill, load_recipe
from limbeck.data import open_samples, write_tokens
from limbeck.distill import Keeping
from limbeck.recipes import driver, teachers
from limbeck.recipes.cached import cache_teacher
from limbeck.students import load_config, load_tokenizer
from limbeck.training import read_metrics


@pytest.fixture(scope="module")
def vocabulary(teacher_folder):
    return load_config(teacher_folder).vocab_size


@pytest.fixture(scope="module")
def cache(teacher_folder, text_file, vocabulary, tmp_path_factory):
    return cache_teacher(
        tmp_path_factory.mktemp("cache") / "all",
        teacher_folder,
        text_file,
        sequence_length=16,
        keeping=Keeping(vocabulary, stored="float32", shard_samples=50),
        batch_size=32,
        device="cpu",
    ).folder


@pytest.fixture
def run(recipe_file, teacher_folder, text_file, tmp_path):
    """A run of one stage, with changes; its recipe says nothing but what is common to all of these."""

    def run(name, *settings, layerwise=False, **changes):
        text = recipe_file.read_text()
        file = tmp_path / f"{name}.toml"
        file.write_text(text[: text.index("[stages.matrix]")] + text[text.index("[stages.logits]") :])
        if layerwise:
            file.write_text(file.read_text().replace('"logits"', '"layerwise"'))
        given = {"teacher": teacher_folder, "data": text_file, "device": "cpu"} | changes
        return distill(load_recipe(file, settings), output=tmp_path / name, **given)

    return run


def losses(result):
    return [line["kl"] for line in read_metrics(result.output / "metrics.jsonl") if "kl" in line and "lr" in line]


KL_ALONE = ("stages.logits.alpha_layer=0", "stages.logits.alpha_logits=1", "stages.logits.temperature=1")


@pytest.mark.slow
@pytest.mark.parametrize("layerwise", [False, True], ids=["logits", "layerwise"])
def test_a_run_on_a_cache_of_the_whole_vocabulary_is_the_run_on_the_teacher(layerwise, run, cache, monkeypatch):
    settings = ("stages.logits.guidance_until=4", *KL_ALONE) if layerwise else ()
    live = losses(run("live", *settings, layerwise=layerwise))

    def refuse(*_):
        raise AssertionError("the teacher is loaded")

    monkeypatch.setattr(teachers.Teachers, "_load", refuse)
    result = run("cached", *settings, f"stages.logits.teacher_cache={cache}", layerwise=layerwise)
    cached = losses(result)
    assert len(live) == len(cached) == (4 if layerwise else 6)
    torch.testing.assert_close(torch.tensor(cached), torch.tensor(live), rtol=1e-5, atol=1e-5)
    held_out = [line for line in read_metrics(result.output / "metrics.jsonl") if "eval_loss" in line]
    assert held_out
    assert not any("eval_kl" in line for line in held_out)


@pytest.fixture
def refused(run):
    def refused(words, *settings, **changes):
        with pytest.raises(LimbeckError, match=words):
            run("refused", *settings, **changes)

    return refused


def test_a_cache_of_something_else_is_refused(
    refused, run, cache, teacher_folder, text_file, vocabulary, tmp_path, monkeypatch
):
    def never(*_, **__):
        raise AssertionError("training begins")

    monkeypatch.setattr(driver.Driver, "run_stage", never)
    read = f"stages.logits.teacher_cache={cache}"
    refused("with temperature 1.0", read, "stages.logits.temperature=2")
    refused("with sequence_length 16", read, "data.sequence_length=8")
    refused("is no teacher cache", "stages.logits.teacher_cache=nowhere")

    other = shutil.copytree(teacher_folder, tmp_path / "other")
    weights = other / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4] + b"\0\0\0\0")
    refused("with teacher .*", read, teacher=other)
    with pytest.raises(AssertionError, match="training begins"):
        run("moved", read, teacher=shutil.copytree(teacher_folder, tmp_path / "elsewhere"))

    samples = open_samples(text_file, 16, vocab_size=vocabulary, tokenizer=lambda: load_tokenizer(teacher_folder))
    tokens = write_tokens(tmp_path / "other.npy", [samples.tokens[::-1].copy()])
    refused("sample 0 has other tokens", read, data=tmp_path / "other.npy")
    write_tokens(tmp_path / "longer.npy", [samples.tokens, tokens])
    refused(f"with samples {len(samples)}", read, data=tmp_path / "longer.npy")


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_processes_read_it_as_one_does(parallel, recipe_file, cache, teacher_folder, text_file, tmp_path):
    def losses_of(processes):
        output, log = tmp_path / str(processes), tmp_path / f"log-{processes}"
        given = ["--teacher", teacher_folder, "--data", text_file, "--output", output, "--device", "cpu"]
        settings = [
            f"stages.logits.teacher_cache={cache}",
            f"engine.parallel={parallel}",
            "stages.logits.freeze_steps=2",
        ]
        given += [part for setting in settings for part in ("--set", setting)]
        assert together.start(processes, "none", ["distill", recipe_file, *given], log) == 0, log.read_text()
        return [
            line["loss"]
            for line in read_metrics(output / "metrics.jsonl")
            if line["stage"] == "logits" and "lr" in line
        ]

    alone = losses_of(1)
    assert len(alone) == 6
    assert losses_of(2) == pytest.approx(alone, rel=1e-5)


@pytest.mark.slow
def test_the_teacher_of_an_earlier_stage_is_let_go(
    recipe_file, cache, teacher_folder, text_file, tmp_path, monkeypatch
):
    loaded, alive = [], {}
    load, train_stage = teachers.Teachers._load, driver.train_stage

    def watched_load(*arguments):
        teacher = load(*arguments)
        loaded.append(weakref.ref(teacher))
        return teacher

    def watched(*arguments, stage, **options):
        gc.collect()
        alive[stage] = [teacher() is not None for teacher in loaded]
        return train_stage(*arguments, stage=stage, **options)

    monkeypatch.setattr(teachers.Teachers, "_load", watched_load)
    monkeypatch.setattr(driver, "train_stage", watched)
    recipe = load_recipe(recipe_file, [f"stages.logits.teacher_cache={cache}"])
    distill(recipe, teacher=teacher_folder, data=text_file, output=tmp_path / "run", device="cpu")
    assert alive == {"matrix": [True], "hidden": [True], "logits": [False]}


def test_settings_that_cannot_be(refused, cache):
    read = f"stages.logits.teacher_cache={cache}"
    refused("teacher_cache with kl_weight 0", read, "stages.logits.kl_weight=0", "stages.logits.ce_weight=1")
    refused("layers are not read from it", read, layerwise=True)


def test_a_cache_is_part_of_what_a_run_is(cache, recipe_file):
    from limbeck.recipes.cached import cache_identities

    recipe = load_recipe(recipe_file, [f"stages.logits.teacher_cache={cache}"])
    assert list(cache_identities(recipe)) == ["logits"]
    assert cache_identities(load_recipe(recipe_file)) == {}
