"""The table of scores in every form, its means and recoveries, and the folder in which scores are kept."""

import csv
import json
import os

import pytest

from limbeck import LimbeckError
from limbeck.evaluation.results import (
    ModelScores,
    ResultsCache,
    Score,
    TaskResults,
    default_cache,
    fingerprint,
    show_results,
)


def model(name, role, **values):
    scores = {
        task: Score(task, "ppl" if task == "text" else "acc", value, 0.01, 50, higher_is_better=task != "text")
        for task, value in values.items()
    }
    return ModelScores(name, role, scores)


@pytest.fixture
def results():
    models = (
        model("big", "teacher", arc=0.5, piqa=0.7, text=10.0),
        model("small", "student", arc=0.4, piqa=0.65, text=12.5),
        model("part|ial", "student", piqa=0.6),
    )
    return TaskResults(("arc", "piqa", "text"), models)


def test_means_and_recoveries(results):
    teacher, student, partial = results.models
    assert results.mean(teacher) == pytest.approx(0.6)  # the perplexity does not enter
    assert results.recovery(teacher) is None
    assert results.recovery(student) == {"arc": pytest.approx(0.8), "piqa": pytest.approx(0.65 / 0.7), "text": None}
    assert results.mean_recovery(student) == pytest.approx(0.525 / 0.6)
    assert (results.mean(partial), results.mean_recovery(partial)) == (None, None)
    assert results.recovery(partial)["arc"] is None
    alone = TaskResults(("arc",), (model("one", "model", arc=0.0),))
    assert (alone.teacher, alone.recovery(alone.models[0]), alone.mean(alone.models[0])) == (None, None, 0.0)
    zero = TaskResults(("arc",), (model("t", "teacher", arc=0.0), model("s", "student", arc=0.1)))
    assert zero.recovery(zero.models[1]) == {"arc": None}
    assert zero.mean_recovery(zero.models[1]) is None


def test_text(results):
    lines = show_results(results).splitlines()
    assert lines[0].split() == ["model", "arc", "piqa", "text", "mean"]
    assert lines[1].split() == ["acc", "acc", "ppl"]
    assert lines[2].split() == ["big", "(teacher)", "0.5000", "0.7000", "10", "0.6000"]
    assert lines[4].split() == ["part|ial", "–", "0.6000", "–", "–"]
    assert lines[5].split() == ["small:", "recovery", "80.0%", "92.9%", "–", "87.5%"]
    assert len({len(line) for line in lines}) == 1


def test_markdown(results):
    lines = show_results(results, "markdown").splitlines()
    assert lines[:2] == [
        "| model | arc (acc) | piqa (acc) | text (ppl) | mean |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    assert lines[4] == "| part\\|ial | – | 0.6000 | – | – |"


def test_csv(results):
    rows = list(csv.DictReader(show_results(results, "csv").splitlines()))
    assert [row["figure"] for row in rows] == ["score", "score", "recovery", "score", "recovery"]
    assert float(rows[1]["piqa:acc"]) == 0.65
    assert float(rows[2]["mean"]) == pytest.approx(0.875)
    assert rows[3]["mean"] == ""


def test_json(results):
    found = json.loads(show_results(results, "json"))
    assert found["tasks"][2] == {"name": "text", "metric": "ppl"}
    assert found["models"][1]["scores"]["arc"] == {"value": 0.4, "stderr": 0.01, "metric": "acc", "samples": 50}
    assert [row["role"] for row in found["models"]] == ["teacher", "student", "student"]
    with pytest.raises(LimbeckError, match="unknown format 'html'"):
        show_results(results, "html")


def test_the_cache_keeps_by_identity(tmp_path):
    cache = ResultsCache(tmp_path / "new" / "cache")
    assert cache.get({"task": "arc"}) is None
    cache.put({"task": "arc", "limit": None}, {"acc": 0.5})
    assert cache.get({"limit": None, "task": "arc"}) == {"acc": 0.5}
    assert cache.get({"task": "arc", "limit": 3}) is None
    (file,) = cache.folder.iterdir()
    file.write_text("{")
    with pytest.raises(LimbeckError, match="is damaged"):
        cache.get({"limit": None, "task": "arc"})


def test_where_the_cache_lies(monkeypatch, tmp_path):
    monkeypatch.setenv("LIMBECK_CACHE", str(tmp_path))
    assert ResultsCache().folder == tmp_path / "evaluation"
    monkeypatch.delenv("LIMBECK_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_cache() == tmp_path / "limbeck" / "evaluation"


def test_fingerprints_tell_files_apart_whatever_their_times(tmp_path):
    file = tmp_path / "weights.bin"

    def of(content):
        file.write_bytes(content)
        os.utime(file, ns=(1, 1))
        return fingerprint([file])

    small = bytearray(100_000)
    first = of(small)
    assert of(small) == first
    small[-1] = 1
    assert of(small) != first
    large = bytearray(5_000_000)
    first = of(large)
    large[:] = bytes([1]) * len(large)
    assert of(large) != first
    os.utime(file, ns=(2, 2))
    assert fingerprint([file]) != of(large)
