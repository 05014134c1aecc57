import io
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from limbeck import progress as display
from limbeck.progress import LiveProgress, PlainProgress, duration, make_progress


@pytest.fixture
def clock(monkeypatch):
    """A clock that the test moves."""
    now = [100.0]
    monkeypatch.setattr(display.time, "monotonic", lambda: now[0])
    return now


def test_plain_lines_are_rare_and_go_to_standard_error(clock, capsys):
    with make_progress("matrix", 100, every=10) as progress:
        assert type(progress) is PlainProgress
        progress.begin(0)
        for done in range(1, 101):
            clock[0] += 1
            progress.update(done, {"loss": 1 / 3, "data": "text"})
    out, err = capsys.readouterr()
    assert out == ""
    lines = err.splitlines()
    assert lines[0] == "matrix 1/100  loss 0.3333  data text  1m39s left"
    assert lines[1].startswith("matrix 11/100")
    assert lines[-1] == "matrix 100/100  loss 0.3333  data text"
    assert len(lines) == 11


def test_a_resumed_job_judges_the_time_by_what_it_did_itself(clock, capsys):
    progress = PlainProgress("logits", 100)
    progress.begin(90)
    clock[0] += 10
    progress.update(95)
    progress.note("saved")
    assert capsys.readouterr().err == "logits 95/100  10s left\nsaved\n"


def test_a_job_whose_end_nobody_knows_counts(clock, capsys):
    progress = PlainProgress("preparing", None)
    for done in (1, 2, 3):
        progress.update(done, {"tokens": "12"})
        clock[0] += 6
    assert capsys.readouterr().err == "preparing 1  tokens 12\npreparing 3  tokens 12\n"


def test_live_on_a_terminal(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")
    with make_progress("hidden", 10) as progress:
        assert type(progress) is LiveProgress
        progress.begin(2)
        progress.update(5, {"loss": 2.0})
        progress.note("checkpoint [written]")
        progress.update(10, {"loss": 1.5})
    text = terminal.getvalue()
    assert "hidden" in text
    assert "checkpoint [written]" in text
    assert "10/10" in text
    assert "loss 1.5" in text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0s"), (59.4, "59s"), (59.6, "1m00s"), (185, "3m05s"), (3599.9, "1h00m"), (7800, "2h10m"), (273600, "3d04h")],
)
def test_durations_as_people_say_them(seconds, text):
    assert duration(seconds) == text


@given(st.floats(0, 1e7))
def test_durations_are_short(seconds):
    assert len(duration(seconds)) <= 7
