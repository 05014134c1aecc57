"""What a run learns from beside one text: a task's examples, and several sources by weight."""

import json
import signal

import killable
import pytest
import torch
import torch.nn.functional as F

from limbeck import LimbeckError, distill, load_model, load_recipe, load_tokenizer
from limbeck.data import TaskDataset, collate, read_tasks
from limbeck.recipes import run as run_module
from limbeck.training import TIME_FIELDS, read_metrics

RECIPE = """
name = "task"
[student]
init = "random"
[data]
sequence_length = 32
shuffle = false
eval_fraction = 0.1
[evaluation]
every = 3
samples = 4
batch_size = 4
[stages.layerwise]
objective = "layerwise"
mask = "labels"
tokens = 768
tokens_per_step = 128
micro_batch = 4
lr = 3e-3
checkpoint_every = 2
"""
MODES = {
    "unguided": ["guidance=none", "alpha_layer=0.0"],
    "target": [],
    "hybrid": ["guidance_until=3"],
    "trajectory": ["guidance=trajectory", "teacher_lr=1e-2"],
    "waypoint": ["guidance=waypoint"],
}
GUIDED = {"unguided": 0, "hybrid": 3}


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    path = tmp_path_factory.mktemp("tasks") / "tasks.jsonl"
    words = ["the", "old", "word", "for", "a", "still"]
    lines = [
        {"prompt": " ".join(words[: n % 4 + 1]), "completion": " " + " ".join(words[: n % 3 + 1])} for n in range(80)
    ]
    path.write_text("\n".join(map(json.dumps, lines)))
    return path


@pytest.fixture(scope="module")
def recipe_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("recipe") / "task.toml"
    path.write_text(RECIPE)
    return path


@pytest.fixture
def settings(teacher_folder):
    def settings(mode):
        more = [f'waypoints=["{teacher_folder}", "{teacher_folder}"]'] if mode == "waypoint" else []
        return [f"stages.layerwise.{setting}" for setting in MODES[mode] + more]

    return settings


def lines_of(output):
    lines = read_metrics(output / "metrics.jsonl")
    return [{key: value for key, value in line.items() if key not in TIME_FIELDS} for line in lines]


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_every_mode_learns_a_task(mode, settings, recipe_file, tasks, teacher_folder, tmp_path):
    run = distill(
        load_recipe(recipe_file, settings(mode)),
        output=tmp_path / "run",
        teacher=teacher_folder,
        data=tasks,
        device="cpu",
    )
    updates = [line for line in lines_of(run.output) if "loss" in line]
    assert [line["step"] for line in updates if "layer" in line] == list(range(1, GUIDED.get(mode, 6) + 1))
    assert updates[-1]["ce"] < updates[0]["ce"]

    # The first update's cross entropy, by hand: over the completions and their ends alone.
    student = load_model(run.stages["converted"])
    samples = TaskDataset(read_tasks(tasks), load_tokenizer(teacher_folder), 32, 0)
    batch = collate(samples, range(4))
    with torch.no_grad():
        logits = student(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    learned = batch["labels"] != -100
    assert 0 < learned.sum() < batch["attention_mask"].sum()
    expected = F.cross_entropy(logits[learned], batch["labels"][learned])
    assert updates[0]["ce"] == pytest.approx(expected.item(), rel=1e-4)
    everything = F.cross_entropy(logits[:, :-1].flatten(0, 1), batch["input_ids"][:, 1:].flatten())
    assert updates[0]["ce"] != pytest.approx(everything.item(), rel=1e-3)


@pytest.mark.slow
def test_a_task_killed_and_resumed_equals_uninterrupted(settings, recipe_file, tasks, teacher_folder, tmp_path):
    def command(output):
        given = ["--teacher", teacher_folder, "--data", tasks, "--output", output, "--device", "cpu"]
        return ["distill", recipe_file, *given, *(part for s in settings("trajectory") for part in ("--set", s))]

    for name, moments in (("whole", []), ("killed", ["os.rename checkpoints/step-00000004"])):
        for moment in moments:
            assert killable.run(command(tmp_path / name), tmp_path / "log", moment) == -signal.SIGKILL
        assert killable.run(command(tmp_path / name), tmp_path / "log") == 0, (tmp_path / "log").read_text()
    assert lines_of(tmp_path / "killed") == lines_of(tmp_path / "whole")
    weights = [(tmp_path / name / "student/model.safetensors").read_bytes() for name in ("killed", "whole")]
    assert weights[0] == weights[1]


@pytest.fixture
def mixed_run(recipe_file, teacher_folder, text_file, tmp_path, monkeypatch):
    """A run of several sources; what it learned from, and on what it was judged."""
    other = tmp_path / "other.txt"
    other.write_text("zzz " * 1500)
    seen = []
    original = run_module._samples

    def samples(*arguments):
        seen.append(original(*arguments))
        return seen[-1]

    monkeypatch.setattr(run_module, "_samples", samples)

    def mixed_run(weights, **options):
        sources = ", ".join(f'{{path = "{p}", weight = {w}}}' for p, w in zip((text_file, other), weights, strict=True))
        recipe = load_recipe(recipe_file, [f"data.sources=[{sources}]"])
        distill(recipe, output=tmp_path / "run", teacher=teacher_folder, device="cpu", **options)
        return seen[-1]

    return mixed_run


def test_several_sources_by_weight(mixed_run, teacher_folder, tmp_path):
    tokenizer = load_tokenizer(teacher_folder)
    samples = mixed_run([3, 1])
    for part in (samples.training, samples.held_out):  # each holds some of each
        count = min(len(part), 40)
        other = sum("zzz" in tokenizer.decode(part[index]) for index in range(count))
        assert other == pytest.approx(count / 4, abs=1), count
    identity = json.loads((tmp_path / "run/run.json").read_text())
    assert [entry["source"].rpartition("/")[2] for entry in identity["data"]] == ["still.txt", "other.txt"]


def test_the_commands_data_stands_in_for_all_sources(mixed_run, text_file, teacher_folder):
    tokenizer = load_tokenizer(teacher_folder)
    samples = mixed_run([3, 1], data=text_file)
    assert not any("zzz" in tokenizer.decode(samples.training[index]) for index in range(len(samples.training)))


def test_sources_that_cannot_be(recipe_file, text_file, teacher_folder, tmp_path):
    def run(settings):
        distill(load_recipe(recipe_file, settings), output=tmp_path / "run", teacher=teacher_folder, device="cpu")

    for settings, words in (
        ([f'data.sources=[{{path = "{text_file}"}}]', f"data.source={text_file}"], "together with data.sources"),
        ([f'data.sources=[{{path = "{text_file}", weight = 0}}]'], "weight"),
        (['data.sources=[{path = "nowhere"}, {path = "no"}]'], "no file or folder nowhere"),
    ):
        with pytest.raises(LimbeckError, match=words):
            run(settings)
        assert not (tmp_path / "run").exists()
