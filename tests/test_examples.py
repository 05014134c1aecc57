"""The examples run as they stand, and their loss falls."""

import runpy
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


def losses_of(example, capsys, monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", [example, *map(str, arguments)])
    runpy.run_path(str(EXAMPLES / example), run_name="__main__")
    return [float(line.split()[-1]) for line in capsys.readouterr().out.splitlines()]


@pytest.mark.parametrize("example", ["mohawk_stage1.py", "mohawk_stage2.py"])
def test_on_a_random_teacher(example, capsys, monkeypatch):
    losses = losses_of(example, capsys, monkeypatch)
    assert len(losses) == 20
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])


@pytest.mark.parametrize("example", ["mohawk_stage1.py", "mohawk_stage2.py"])
def test_on_a_teacher_and_a_text_of_ones_own(example, teacher_folder, text_file, capsys, monkeypatch):
    losses = losses_of(example, capsys, monkeypatch, teacher_folder, text_file)
    assert sum(losses[-5:]) < sum(losses[:5])
