"""What is timed is what generate does, the cache is counted exactly, and mistakes end before anything is measured."""

import json
import re
import sys
from functools import partial

import pytest
import torch

import limbeck
from limbeck.errors import LimbeckError
from limbeck.evaluation import bench as measure
from limbeck.evaluation.bench import _forward, measure_point
from limbeck_cli.bench import _tables
from limbeck_cli.options import print_table
from tiny import HEADS, WIDTH, WINDOW, tiny_teacher

QUICK = {"new_tokens": 3, "seconds": 0.0, "device": "cpu"}


@pytest.fixture(scope="module")
def teacher():
    return tiny_teacher("gpt_neox")


@pytest.fixture(scope="module")
def student(teacher):
    return limbeck.convert(teacher)


@pytest.fixture(scope="module")
def folders(teacher_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("bench") / "student"
    limbeck.convert_folder(teacher_folder, folder)
    return str(teacher_folder), str(folder)


@pytest.fixture
def command(command):
    """``limbeck bench ARGUMENTS``."""
    return partial(command, "bench")


# --- figures --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_keys_and_values_grow_and_the_state_does_not(teacher, student):
    found = measure(student, teacher=teacher, contexts=(96, 16, 16), batches=(1, 3), **QUICK)  # 96: beyond its 64
    assert [(model.role, model.dtype, model.device) for model in found.models] == [
        ("teacher", "float32", "cpu"),
        ("student", "float32", "cpu"),
    ]
    for model in found.models:
        cells = [(point.context, point.batch) for point in model.points]
        assert cells == [(16, 1), (96, 1), (16, 3), (96, 3)]
        assert model.left_out == []
    for point in found.models[0].points:  # keys and values of three layers, four bytes a number; the step is one more
        assert point.cache_bytes == 2 * 3 * point.batch * (point.context + 1) * WIDTH * 4
    for point in found.models[1].points:
        states = [mixer.init_state(point.batch) for mixer in limbeck.students.mixers(student).values()]
        assert point.cache_bytes == sum(tensor.nbytes for state in states for tensor in state)


def test_a_window_is_counted_as_a_window():
    point = measure_point(tiny_teacher("mistral", 2, num_key_value_heads=HEADS, head_dim=8), 32, 1, new_tokens=2)
    assert point.cache_bytes <= 2 * 2 * WINDOW * WIDTH * 4


def test_rates_agree_with_times(student):
    point = measure_point(student, 24, 2, new_tokens=2, seconds=0.05)
    assert point.decode_tokens_per_second == pytest.approx(2 / point.step_seconds)
    assert point.first_token_seconds >= 2 * 24 / point.prefill_tokens_per_second
    assert point.peak_bytes is None


@pytest.mark.parametrize("which", ["teacher", "student"])
@torch.no_grad()
def test_steps_are_those_of_generate(which, request):
    model = request.getfixturevalue(which)
    prompt = torch.randint(3, 61, (2, 9))
    logits, cache = _forward(model, prompt, None)
    tokens = [logits[:, -1:].argmax(-1)]
    for _ in range(4):
        logits, cache = _forward(model, tokens[-1], cache)
        tokens.append(logits[:, -1:].argmax(-1))
    generated = model.generate(prompt, max_new_tokens=5, do_sample=False, eos_token_id=None)
    assert torch.equal(torch.cat(tokens, 1), generated[:, 9:])


def test_time_is_bounded_and_the_first_pass_warms_up(student, monkeypatch):
    clock, module = [0.0], sys.modules["limbeck.evaluation.bench"]

    def forward(model, ids, cache):
        clock[0] += 5.0 if forward.first else 1.0
        forward.first = False
        return _forward(model, ids, cache)

    forward.first = True
    monkeypatch.setattr(module, "_forward", forward)
    monkeypatch.setattr(module, "_now", lambda device: clock[0])
    monkeypatch.setattr(module.time, "monotonic", lambda: clock[0])
    point = measure_point(student, 8, 1, new_tokens=1, seconds=9.0)
    assert clock[0] == 10.0  # 6 s, then two passes of 2 s
    assert (point.prefill_tokens_per_second, point.step_seconds) == (8.0, 1.0)


def test_a_model_keeps_its_mode(student):
    student.train()
    measure(student, contexts=(4,), **QUICK)
    assert student.training
    student.eval()


@pytest.mark.slow
def test_what_does_not_fit_is_left_out_and_told(student, monkeypatch, capsys):
    module = sys.modules["limbeck.evaluation.bench"]

    def point(model, context, batch, **options):
        if context > 8:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return measure_point(model, context, batch, **options)

    monkeypatch.setattr(module, "measure_point", point)
    (model,) = measure(student, contexts=(8, 16), **QUICK).models
    assert [point.context for point in model.points] == [8]
    assert [(point.context, point.reason) for point in model.left_out] == [(16, "out of memory")]
    assert "context 16, batch 1: out of memory, left out" in capsys.readouterr().err


def test_another_error_is_no_lack_of_memory(student, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr(sys.modules["limbeck.evaluation.bench"], "measure_point", fail)
    with pytest.raises(RuntimeError, match="shapes"):
        measure(student, contexts=(8,), **QUICK)


# --- mistakes -------------------------------------------------------------------------------------------------------


def test_learned_positions_end():
    gpt2 = tiny_teacher("gpt2")
    with pytest.raises(LimbeckError, match="context 62 and 3 new tokens, but its learned positions end at 64"):
        measure(gpt2, contexts=(8, 62), **QUICK)
    with pytest.raises(LimbeckError, match="learned positions end at 64"):
        measure(limbeck.convert(gpt2), contexts=(62,), **QUICK)
    assert measure(gpt2, contexts=(61,), **QUICK).models[0].points


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"contexts": ()}, "contexts = "),
        ({"contexts": (0, 8)}, "contexts = "),
        ({"batches": (-1,)}, "batches = "),
        ({"new_tokens": 0}, "new_tokens = 0"),
        ({"seconds": -1.0}, "seconds = -1"),
        ({"seconds": float("nan")}, "seconds = nan"),
        ({"device": "abacus"}, "device 'abacus'"),
        ({"dtype": "float31"}, "unknown dtype 'float31'"),
    ],
)
def test_numbers_out_of_range(student, options, message):
    with pytest.raises(LimbeckError, match=message):
        measure(student, **QUICK | options)


def test_no_model_and_no_such_model(teacher, tmp_path):
    with pytest.raises(LimbeckError, match="no model to measure"):
        measure([], **QUICK)
    with pytest.raises(LimbeckError, match=r"no config\.json"):
        measure([teacher, tmp_path], **QUICK)


# --- the command ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_command(command, folders, tmp_path):
    teacher, student = folders
    options = ("--contexts", "8,24", "--batches", "1,2", "--new-tokens", "2", "--seconds", "0", "--device", "cpu")
    files = ("--save-to", tmp_path, "--chart", tmp_path / "chart.svg")
    code, out, err = command(student, "--teacher", teacher, *options, *files, "--json")
    assert code == 0, err
    found = json.loads(out)
    assert found == json.loads((tmp_path / "evaluation" / "bench.json").read_text(encoding="utf-8"))
    assert [(model["name"], model["role"]) for model in found["models"]] == [(teacher, "teacher"), (student, "student")]
    assert [len(model["points"]) for model in found["models"]] == [4, 4]
    assert found["new_tokens"] == 2
    assert ">student, batch 2</text>" in (tmp_path / "chart.svg").read_text(encoding="utf-8")
    code, out, err = command(student, *options, "--dtype", "bfloat16")
    assert code == 0, err
    assert "batch 1, bfloat16, cpu, 2 new tokens" in out
    assert "batch 2, bfloat16, cpu, 2 new tokens" in out
    assert len(re.findall(r"^ +(?:8|24)  student .* KiB", out, re.M)) == 4, out


def test_a_table_shows_what_was_left_out(capsys):
    point = {"context": 8, "batch": 1, "cache_bytes": 80 << 30, "step_seconds": 1e-3, "first_token_seconds": 2.0}
    point |= {"prefill_tokens_per_second": 1e6, "decode_tokens_per_second": 1e3, "peak_bytes": 90 << 30}
    model = {"name": "a/teacher", "role": "teacher", "device": "cuda:0", "dtype": "bfloat16", "points": [point]}
    missing = [{"context": 16, "batch": 1, "reason": "out of memory"}]
    (table,) = _tables({"models": [model | {"left_out": missing}], "new_tokens": 4})
    print_table(table)
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    assert any(re.search(r"8 +teacher +1,000,000 +2 s +1,000 +1 ms +80 GiB +90 GiB", line) for line in lines), lines
    assert any(re.search(r"16 +teacher( +–){6}", line) for line in lines), lines


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--contexts", "8,many"), "--contexts '8,many'"),
        (("--contexts", ""), "contexts = []"),
        (("--save-to", "nowhere"), "no folder nowhere"),
        (("--chart", "chart.jpeg"), "--chart chart.jpeg"),
        (("--chart", "nowhere/chart.svg"), "there is no folder nowhere"),
        (("--teacher", "nowhere"), "cannot load a configuration from 'nowhere'"),
    ],
)
def test_mistakes_end_with_code_2(command, folders, options, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, err = command(folders[1], *options)
    assert (code, out) == (2, "")
    assert message in err
    assert not list(tmp_path.iterdir())
