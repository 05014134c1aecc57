"""What goes wrong while a run learns: numbers, data, trackers, the network. It goes on, or stops and can be resumed."""

import os
import sys
import types

import numpy as np
import pytest
import torch

import limbeck.training.loop as loop
from limbeck import LimbeckError, distill, load_recipe
from limbeck.data import MegatronWriter
from limbeck.recipes.folder import digests
from limbeck.training import TIME_FIELDS, read_metrics


@pytest.fixture
def recipe(recipe_file):
    """The last stage alone: six updates, a checkpoint after every second."""
    whole = load_recipe(recipe_file, ["evaluation.every=0", "engine.max_nonfinite=2"])
    return whole.model_copy(update={"stages": {"logits": whole.stages["logits"]}})


@pytest.fixture
def learn(recipe, teacher_folder):
    def learn(output, data, recipe=recipe):
        return distill(recipe, teacher=teacher_folder, data=data, output=output, device="cpu")

    return learn


@pytest.fixture(scope="module")
def tokens():
    return np.random.default_rng(3).integers(1, 288, 2000).astype(np.uint16)


@pytest.fixture
def before_update(monkeypatch):
    """Do something before an update, counted from 1, and once."""

    def before_update(number, act):
        accumulate, done = loop.accumulate, []

        def patched(*given):
            done.append(1)
            if len(done) == number:
                act()
            return accumulate(*given)

        monkeypatch.setattr(loop, "accumulate", patched)

    return before_update


def lines_of(output):
    lines = read_metrics(output / "metrics.jsonl")
    return [{key: value for key, value in line.items() if key not in TIME_FIELDS} for line in lines]


# --- numbers --------------------------------------------------------------------------------------------------------


def spoil(monkeypatch, *updates):
    """Make the loss of these updates, counted from 1, not a number."""
    accumulate, done = loop.accumulate, []

    def patched(replicas, *given):
        done.append(1)
        if len(done) not in updates:
            return accumulate(replicas, *given)
        called = replicas.called
        monkeypatch.setattr(replicas, "called", lambda batch: {n: v * torch.nan for n, v in called(batch).items()})
        try:
            return accumulate(replicas, *given)
        finally:
            monkeypatch.setattr(replicas, "called", called)

    monkeypatch.setattr(loop, "accumulate", patched)


def test_an_update_that_is_not_a_number_is_left_out(learn, text_file, monkeypatch, tmp_path):
    spoil(monkeypatch, 2, 4)
    output = learn(tmp_path / "run", text_file).output
    updates = [line for line in lines_of(output) if "loss" in line]
    assert [line["skipped"] for line in updates] == [0, 1, 0, 1, 0, 0]
    assert [line["loss"] is None for line in updates] == [False, True, False, True, False, False]


def test_too_many_stop_the_run_and_it_can_go_on(learn, text_file, monkeypatch, tmp_path):
    output = tmp_path / "run"
    with monkeypatch.context() as patched:
        spoil(patched, 3, 4)
        with pytest.raises(LimbeckError, match=r"nonfinite-logits-4\.safetensors"):
            learn(output, text_file)
    assert (output / "nonfinite-logits-4.safetensors").is_file()
    assert digests(learn(output, text_file).student) == digests(learn(tmp_path / "whole", text_file).student)
    assert lines_of(output) == lines_of(tmp_path / "whole")


# --- data -----------------------------------------------------------------------------------------------------------


def written(prefix, tokens):
    with MegatronWriter(prefix, dtype=np.uint16) as writer:
        for part in np.split(tokens, 10):
            writer.add(part)
    return prefix


@pytest.mark.parametrize("kind", ["npy", "shard"])
@pytest.mark.parametrize("fault", ["gone", "truncated"])
def test_data_that_is_lost_while_a_run_learns(kind, fault, learn, tokens, before_update, monkeypatch, tmp_path):
    """It stops cleanly, and put back, the run ends as if nothing had been."""
    if kind == "npy":
        data = file = tmp_path / "tokens.npy"
        np.save(file, tokens)
    else:
        data = written(tmp_path / "corpus", tokens)
        whole = data.with_name("corpus.bin")
        content = whole.read_bytes()
        whole.unlink()
        for number in range(2):
            half = content[number * len(content) // 2 : (number + 1) * len(content) // 2]
            data.with_name(f"corpus-{number:05d}-of-00002.bin").write_bytes(half)
        file = data.with_name("corpus-00000-of-00002.bin")
    expected = learn(tmp_path / "whole", data)
    content = file.read_bytes()
    before_update(4, file.unlink if fault == "gone" else lambda: os.truncate(file, len(content) // 2))
    found = "is gone" if fault == "gone" else f"shrank from {len(content)} bytes to"
    with pytest.raises(LimbeckError, match=f"{file.name} {found}") as error:
        learn(tmp_path / "run", data)
    assert "put it back" in error.value.hint
    del error  # its traceback holds the run's lock
    monkeypatch.undo()
    file.write_bytes(content)
    result = learn(tmp_path / "run", data)
    assert digests(result.student) == digests(expected.student)
    assert lines_of(result.output) == lines_of(expected.output)


def test_a_corrupt_sample_stops_the_run_and_it_can_go_on(learn, tokens, tmp_path):
    data = written(tmp_path / "corpus", tokens)
    expected = learn(tmp_path / "whole", data)
    file = data.with_name("corpus.bin")
    content = file.read_bytes()
    file.write_bytes(content[:2000] + b"\xff\xff" * 600 + content[3200:])
    with pytest.raises(LimbeckError, match=r"sample \d+ has token 65535 at place"):
        learn(tmp_path / "run", data)
    file.write_bytes(content)
    assert digests(learn(tmp_path / "run", data).student) == digests(expected.student)


# --- trackers and the network ---------------------------------------------------------------------------------------


def tracked(recipe, *names):
    return recipe.model_copy(update={"tracking": recipe.tracking.model_copy(update={"trackers": names})})


class DeadTracker(types.ModuleType):
    def init(self, **_):
        raise ConnectionError("the network is gone")


def test_a_tracker_without_a_network_changes_nothing(learn, recipe, text_file, monkeypatch, capsys, tmp_path):
    expected = learn(tmp_path / "plain", text_file)
    monkeypatch.setitem(sys.modules, "wandb", DeadTracker("wandb"))
    result = learn(tmp_path / "run", text_file, tracked(recipe, "wandb"))
    assert capsys.readouterr().err.count("tracker wandb is left out from now on: ConnectionError") == 1
    assert digests(result.student) == digests(expected.student)
    assert lines_of(result.output) == lines_of(expected.output)
    learn(result.output, text_file)  # the tracker is no part of what the run is


def test_a_tracker_that_is_not_installed_is_told_before_anything_is_done(
    learn, recipe, text_file, monkeypatch, tmp_path
):
    monkeypatch.setitem(sys.modules, "trackio", None)
    with pytest.raises(LimbeckError, match="tracker 'trackio' cannot be imported"):
        learn(tmp_path / "run", text_file, tracked(recipe, "trackio"))
    assert not (tmp_path / "run").exists()


def test_a_hub_that_cannot_be_reached(recipe, text_file, tmp_path):
    with pytest.raises(LimbeckError, match="nobody/has-this") as error:
        distill(recipe, teacher="nobody/has-this", data=text_file, output=tmp_path / "run", device="cpu")
    assert "hf download nobody/has-this" in error.value.hint
    assert not (tmp_path / "run").exists()
