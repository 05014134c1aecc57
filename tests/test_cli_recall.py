"""`limbeck recall`: a table or JSON on standard output, a file in a run, and mistakes with code 2."""

import json

import pytest

import limbeck


@pytest.fixture
def command(command):
    """``limbeck recall ARGUMENTS``."""
    return lambda *arguments: command("recall", *arguments, "--device", "cpu")


def test_recall_of_a_student_beside_its_teacher(command, teacher_folder, text_file, tmp_path):
    student, run = tmp_path / "student", tmp_path / "run"
    limbeck.convert_folder(teacher_folder, student)
    run.mkdir()
    asked = ["--lengths", "100,120", "--depths", "0,1", "--count", 2, "--text", text_file, "--seed", 3]
    asked += [student, "--teacher", teacher_folder]
    code, out, err = command(*asked, "--json", "--save-to", run)
    assert code == 0, err
    figures = json.loads(out)
    assert [model["role"] for model in figures["models"]] == ["student", "teacher"]
    kinds = [(result["task"], result["length"], result["depth"]) for result in figures["models"][0]["results"]]
    needles = [("needle", length, depth) for length in (100, 120) for depth in (0.0, 1.0)]
    tasks = {task: [(task, 100, None), (task, 120, None)] for task in ("mqar", "copy", "repeat")}
    assert kinds == [*tasks["mqar"], *tasks["copy"], *needles, *tasks["repeat"]]
    assert json.loads((run / "evaluation" / "recall.json").read_text()) == figures
    assert "recall of" in err
    code, out, _ = command(*asked, "--tasks", "mqar, needle")
    assert code == 0
    assert "mqar" in out
    assert "copy" not in out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--tasks", "mqra"], "did you mean 'mqar'?"),
        (["--lengths", "many"], "--lengths 'many'"),
        (["--depths", "2"], "depth 2.0"),
        (["--token-range", "5"], "two token ids"),
        (["--save-to", "nowhere"], "no folder nowhere"),
        (["--text", "nothing.txt", "--lengths", "120"], "no file or folder nothing.txt"),
    ],
)
def test_mistakes(command, teacher_folder, arguments, words):
    code, out, err = command(teacher_folder, *arguments)
    assert (code, out) == (2, "")
    assert words in err


def test_text_that_is_too_short(command, teacher_folder, tmp_path):
    (tmp_path / "short.txt").write_text("a word")
    code, _, err = command(teacher_folder, "--tasks", "needle", "--text", tmp_path / "short.txt", "--lengths", 120)
    assert code == 2
    assert "short.txt has" in err
    (tmp_path / "short.txt").write_text("")
    code, _, err = command(teacher_folder, "--tasks", "needle", "--text", tmp_path / "short.txt", "--lengths", 120)
    assert code == 2
    assert "no text in" in err
