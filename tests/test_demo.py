"""The demo's pieces, and all of it with sizes that mean nothing but run in seconds."""

import json
import math

import pytest
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM

from limbeck import LimbeckError, demo, load_recipe, student_config
from limbeck.data import standard_library_files
from limbeck.demo import NoMixer, corpus, teacher, teacher_config, train_tokenizer
from limbeck.demo.corpus import END_OF_TEXT
from limbeck.students import mixers


def test_the_tokenizer_brings_any_text_back():
    tokenizer = train_tokenizer(["def still(self):\n\treturn 'Öl'\n"] * 3, vocabulary=280)
    assert len(tokenizer) <= 280
    assert tokenizer.eos_token_id == tokenizer.convert_tokens_to_ids(END_OF_TEXT) == 0
    for text in ("def still(self):\n", "naïve ☃ \x00 \t", "completely new"):
        assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert len(tokenizer("return").input_ids) < len("return")


def test_the_floor_is_the_network_without_any_mixing():
    model = AutoModelForCausalLM.from_config(student_config(teacher_config(), mixer="none", init="random")).eval()
    assert [type(mixer) for mixer in mixers(model).values()] == [NoMixer] * model.config.num_hidden_layers
    assert not any(list(mixer.parameters()) for mixer in mixers(model).values())
    input_ids = torch.randint(1, 100, (2, 9))
    other = input_ids.clone()
    other[:, :5] = 7
    assert torch.equal(model(input_ids).logits[:, 5:], model(other).logits[:, 5:])
    assert model.generate(input_ids[:, :3], max_new_tokens=3, do_sample=False, pad_token_id=0).shape[1] <= 6
    mixer = NoMixer(8)
    output, state = mixer(torch.randn(2, 5, 8), return_state=True)
    assert not output.any()
    assert not mixer.step(torch.randn(2, 8), state)[0].any()


def test_a_folder_holds_one_demo(tmp_path):
    (tmp_path / "run.json").write_text(json.dumps({"demo": {}, "seed": 0}))
    with pytest.raises(LimbeckError, match=r"(?s)holds another run:.*seed was 0, now 1"):
        demo.demo(tmp_path, seed=1)
    with pytest.raises(LimbeckError, match="0 seeds"):
        demo.demo(tmp_path / "none", seeds=0)
    assert not (tmp_path / "none").exists()


def test_the_control_spends_the_same_tokens():
    recipe = load_recipe("demo")
    mohawk, control = demo.way_of(recipe, "mohawk", 3), demo.way_of(recipe, "logits-only", 3)
    assert mohawk.tokens == control.tokens == recipe.tokens
    assert list(control.stages) == ["logits"]
    assert mohawk.data.seed == control.data.seed == control.student.seed == 3


class OneProcess:
    """Stands in for the pool of workers: the sizes that the test sets hold in this process alone."""

    def __init__(self, *_):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def run(self, _title, tasks, **_):
        return [task(*arguments) for task, *arguments in tasks]


@pytest.mark.slow
def test_the_whole_demo(tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "Workers", OneProcess)
    monkeypatch.setattr(teacher, "TEACHER_STEPS", 6)
    monkeypatch.setattr(corpus, "standard_library_files", lambda: standard_library_files()[:40])

    small = load_recipe("demo", ["data.sequence_length=64", "evaluation.samples=16"])
    small = small.scaled_to(sum(stage.tokens_per_step * 2 for stage in small.stages.values()) * 2)
    for module in (demo, teacher):
        monkeypatch.setattr(module, "load_recipe", lambda _: small)

    result = demo.demo(tmp_path / "demo", seeds=2, workers=1)
    assert "student, after hidden" in (tmp_path / "demo" / "report.html").read_text()
    rows = result.perplexity
    assert list(rows)[:4] == ["unigram", "without attention", "teacher", "student, converted"]
    assert list(rows)[4:] == [*(f"student, after {name}" for name in small.stages), "control, logits only"]
    assert [len(values) for values in rows.values()] == [1, 1, 1, *[2] * 5]
    assert all(math.isfinite(value) and value > 1 for values in rows.values() for value in values)
    assert set(result.gap_closed) == set(list(rows)[3:])
    console = Console(width=120, record=True, quiet=True)
    console.print(result.report())
    saved = json.loads((tmp_path / "demo/results.json").read_text())
    assert saved == json.loads(json.dumps(result.as_json()))
    assert {"corpus", "teacher", "without-attention", "seed-0", "seed-1", "run.json"} <= {
        path.name for path in (tmp_path / "demo").iterdir()
    }

    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "demo").rglob("*.safetensors")}
    again = demo.demo(tmp_path / "demo", seeds=2, workers=1)
    assert again.perplexity == rows
    assert {path: path.stat().st_mtime_ns for path in before} == before
