"""The chart of bench: every line is named at its end, no two names touch, nothing lies outside the picture."""

import importlib.util
import json
import xml.etree.ElementTree as ET

import pytest
from made_runs import make_run

from limbeck.errors import LimbeckError
from limbeck.report import write_report
from limbeck.report.bench import bench_chart, binary, duration, in_words, model_labels, save_bench_chart, where


def points(cache, step, batches=(1,)):
    return [
        {"context": context, "batch": batch, "cache_bytes": cache(context) * batch, "step_seconds": step(context)}
        for batch in batches
        for context in (128, 1024, 16384)
    ]


def made(*models, batches=(1,)):
    found = []
    for name, role in models:
        attends = role != "student"
        cache = (lambda context: 2304 * context) if attends else (lambda context: 47232)
        step = (lambda context: 6e-4 + 4e-7 * context) if attends else (lambda context: 9e-4)
        mine = points(cache, step, batches)
        found.append({"name": name, "role": role, "device": "cpu", "dtype": "float32", "points": mine})
    return {"models": found}


PAIR = made(("demo/teacher", "teacher"), ("demo/student", "student"))
MANY = made(("a/teacher", "teacher"), ("b/x/student", "student"), ("b/y/student", "student"), batches=(1, 8))
FLAT = made(("demo/student", "student"))
ONE_CONTEXT = {"models": [PAIR["models"][0] | {"points": PAIR["models"][0]["points"][:1]}]}


def texts_of(axes):
    return [text for text in axes.texts if text.get_text()]


@pytest.mark.parametrize("bench", [PAIR, MANY, FLAT, ONE_CONTEXT], ids=["pair", "many", "flat", "one context"])
def test_letters_are_inside_and_apart(bench):
    figure = bench_chart(bench)
    figure.draw_without_rendering()
    boxes = []
    for axes in figure.axes:
        ticks = [label for label in (*axes.get_xticklabels(), *axes.get_yticklabels()) if label.get_text()]
        low, high = sorted(axes.get_ylim())
        shown = [label for label in ticks if label in axes.get_xticklabels() or low <= label.get_position()[1] <= high]
        assert len(axes.get_yticks()) >= 1
        boxes += [(text.get_text(), text.get_window_extent()) for text in [*texts_of(axes), axes.xaxis.label, *shown]]
    for number, (text, box) in enumerate(boxes):
        assert figure.bbox.x0 <= box.x0, text
        assert box.x1 <= figure.bbox.x1, text
        assert figure.bbox.y0 <= box.y0, text
        assert box.y1 <= figure.bbox.y1, text
        for other, other_box in boxes[:number]:
            assert not box.overlaps(other_box), (text, other)


def test_lines_hold_the_figures():
    memory, time = bench_chart(PAIR).axes
    assert [list(line.get_ydata()) for line in memory.lines] == [
        [2304 * 128, 2304 * 1024, 2304 * 16384],
        [47232, 47232, 47232],
    ]
    assert list(time.lines[1].get_ydata()) == [9e-4] * 3
    assert (memory.get_xscale(), memory.get_yscale(), time.get_yscale()) == ("log", "log", "log")
    assert {text.get_text() for text in texts_of(memory)} >= {"teacher", "36 MiB", "student", "46.1 KiB"}
    low, high = time.get_ylim()
    assert high / low >= 8


def test_ground_is_see_through():
    figure = bench_chart(PAIR)
    assert figure.get_facecolor()[3] == 0
    assert all(axes.get_facecolor()[3] == 0 for axes in figure.axes)


@pytest.mark.parametrize("ending", [".svg", ".png", ".pdf"])
def test_files_are_the_same_every_time(tmp_path, ending):
    for name in ("one", "two"):
        save_bench_chart(PAIR, tmp_path / f"{name}{ending}")
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"one{ending}", f"two{ending}"]
    if ending != ".pdf":  # a pdf carries its date
        assert (tmp_path / f"one{ending}").read_bytes() == (tmp_path / f"two{ending}").read_bytes()


def test_svg_is_small_and_its_letters_are_letters(tmp_path):
    save_bench_chart(PAIR, tmp_path / "chart.svg")
    text = (tmp_path / "chart.svg").read_text(encoding="utf-8")
    assert len(text) < 40_000
    words = [element.text for element in ET.fromstring(text).iter("{http://www.w3.org/2000/svg}text")]
    assert {"teacher", "student", "Memory of the cache", "tokens of context", "16k"} <= set(words)
    assert in_words(PAIR) in text


def test_a_run_has_it_as_a_picture(tmp_path):
    names = {file.name for file in write_report(make_run(tmp_path / "mine"), pictures=tmp_path / "pictures")}
    assert {"bench.svg", "bench.png"} <= names


def test_a_report_bears_a_bench_that_fitted_nowhere(tmp_path):
    folder = make_run(tmp_path / "mine")
    (folder / "evaluation" / "bench.json").write_text(json.dumps({"models": [FLAT["models"][0] | {"points": []}]}))
    names = {file.name for file in write_report(folder, pictures=tmp_path / "pictures")}
    assert "curves.svg" in names
    assert "bench.svg" not in names


def test_each_models_place_is_told_where_they_differ():
    assert where(PAIR) == "float32, cpu"
    other = {"models": [PAIR["models"][0] | {"dtype": "bfloat16"}, PAIR["models"][1]]}
    assert where(other) == "teacher bfloat16, cpu; student float32, cpu"


def test_in_words():
    assert in_words(FLAT) == (
        "student, cache: 46.1 KiB at 128 tokens, 46.1 KiB at 16384 tokens; "
        "student, step: 0.9 ms at 128 tokens, 0.9 ms at 16384 tokens."
    )


def test_names_tell_models_apart():
    assert model_labels(PAIR) == ["teacher", "student"]
    assert model_labels(MANY) == ["teacher", "x/student", "y/student"]
    assert model_labels(made(("runs/pythia", "model"), ("runs/phi", "model"))) == ["pythia", "phi"]
    assert model_labels(made(("phi", "model"), ("runs/phi", "model"))) == ["phi", "runs/phi"]
    assert model_labels(made(("phi", "model"), ("phi", "model"))) == ["phi (1)", "phi (2)"]


def test_amounts():
    assert [binary(count) for count in (0, 1023, 47232, 1023 << 10, 3 << 20, 80 << 30)] == [
        "0 B",
        "1023 B",
        "46.1 KiB",
        "1023 KiB",
        "3 MiB",
        "80 GiB",
    ]
    assert [duration(seconds) for seconds in (2e-5, 8.61e-4, 5e-3, 2.5)] == ["20 µs", "0.861 ms", "5 ms", "2.5 s"]


def test_mistakes(tmp_path, monkeypatch):
    with pytest.raises(LimbeckError, match=r"a file ending in \.svg"):
        save_bench_chart(PAIR, tmp_path / "chart.gif")
    with pytest.raises(LimbeckError, match="there is no folder"):
        save_bench_chart(PAIR, tmp_path / "nowhere" / "chart.svg")
    with pytest.raises(LimbeckError, match="nothing was measured"):
        bench_chart({"models": [FLAT["models"][0] | {"points": []}]})
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(LimbeckError, match=r"limbeck\[report\]"):
        bench_chart(PAIR)
    assert not list(tmp_path.iterdir())
