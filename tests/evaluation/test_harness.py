"""Tasks of lm-evaluation-harness on a folder of local tasks: every kind of request, by name and by Python, kept."""

import json
import sys

import pytest

from limbeck import LimbeckError, load_model, load_tokenizer
from limbeck.evaluation import TASK_SETS, evaluate_tasks
from limbeck.evaluation.subjects import find_models
from limbeck.evaluation.tasks import Tasks

pytest.importorskip("lm_eval")
pytestmark = [
    # datasets leaves the JSON file of a task to the garbage collector; the harness holds the whole data set
    pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning"),
]
NAMES = ["still_choice", "still_rolling", "still_generate"]
HEAD = """task: {name}
dataset_path: json
dataset_kwargs:
  data_files: {{"test": "{file}", "train": "{file}"}}
test_split: test
fewshot_split: train
"""
BODIES = {
    "still_choice": """output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_target: answer
doc_to_choice: choices
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
  - {metric: acc_norm, aggregation: mean, higher_is_better: true}
""",
    "still_rolling": """output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{question}}"
metric_list:
  - {metric: bits_per_byte}
  - {metric: word_perplexity}
""",
    "still_generate": """output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{choices[0]}}"
generation_kwargs: {until: ["\\n"], max_gen_toks: 6, do_sample: false}
metric_list:
  - {metric: exact_match, aggregation: mean, higher_is_better: true}
""",
}


@pytest.fixture(scope="module")
def local_tasks(tmp_path_factory):
    """A folder of three tasks, one for each kind of request, and what `datasets` keeps of them beside it."""
    import datasets

    folder = tmp_path_factory.mktemp("tasks")
    questions = ["the old word for a", "a vessel to distil", "what is poured in", "slowly, drop", "copper"]
    rows = [
        {"question": text * (1 + i % 3), "choices": [" still", " glass vessel", " a"], "answer": i % 3}
        for i, text in enumerate([*questions, *questions, "the fire", "glass"])
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, body in BODIES.items():
        (folder / f"{name}.yaml").write_text(HEAD.format(name=name, file=folder / "rows.jsonl") + body)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))
        yield folder


@pytest.fixture
def score(local_tasks, tmp_path):
    def score(models, tasks=NAMES, **options):
        given = {"include_path": local_tasks, "cache": tmp_path / "scores", "device": "cpu"} | options
        return evaluate_tasks(models, tasks, **given)

    return score


def figures(results):
    return [{task: score.value for task, score in model.scores.items()} for model in results.models]


@pytest.mark.slow
def test_by_name_by_python_and_the_harness_itself(score, local_tasks, teacher_folder, student_folder):
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    by_name = score(student_folder, teacher=teacher_folder)
    student, teacher = load_model(student_folder).train(), load_model(teacher_folder)
    tokenizer = load_tokenizer(teacher_folder)
    by_python = score(student, teacher=teacher, tokenizer=tokenizer)
    assert [model.role for model in by_name.models] == ["teacher", "student"]
    assert figures(by_python) == figures(by_name)
    assert student.training
    assert tokenizer.pad_token is None  # the harness works with a copy

    manager = TaskManager(include_path=str(local_tasks), include_defaults=False)
    for model, found in zip((teacher, student.eval()), by_name.models, strict=True):
        lm = HFLM(pretrained=model, tokenizer=load_tokenizer(teacher_folder), backend="causal", batch_size=8)
        expected = simple_evaluate(lm, tasks=NAMES, task_manager=manager)["results"]
        assert {task: (one.metric, one.value, one.samples) for task, one in found.scores.items()} == {
            "still_choice": ("acc", expected["still_choice"]["acc,none"], 12),
            "still_rolling": ("bits_per_byte", expected["still_rolling"]["bits_per_byte,none"], 12),
            "still_generate": ("exact_match", expected["still_generate"]["exact_match,none"], 12),
        }
        assert found.scores["still_choice"].stderr == pytest.approx(expected["still_choice"]["acc_stderr,none"])


@pytest.mark.slow
def test_the_size_of_a_batch_changes_nothing(score, teacher_folder, student_folder, tmp_path):
    asked = ["still_choice:acc", "still_choice:acc_norm", *NAMES[1:]]
    one, eight = (
        score([teacher_folder, student_folder], asked, batch_size=size, cache=tmp_path / str(size)) for size in (1, 8)
    )
    assert one.tasks == ("still_choice", "still_choice:acc_norm", "still_rolling", "still_generate")
    for ours, theirs in zip(figures(one), figures(eight), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)


@pytest.mark.slow
def test_scores_are_kept_until_something_changes(score, teacher_folder, student_folder, monkeypatch, tmp_path):
    import lm_eval

    ran = []
    plain = lm_eval.simple_evaluate
    monkeypatch.setattr(lm_eval, "simple_evaluate", lambda lm, **options: ran.append(options) or plain(lm, **options))
    first = score([teacher_folder, student_folder], "still_choice")
    assert len(ran) == 2
    assert score([teacher_folder, student_folder], "still_choice:acc", batch_size=3) == first
    assert len(ran) == 2
    for options in ({"limit": 3}, {"num_fewshot": 1}, {"dtype": "float64"}):
        ran.clear()
        score(teacher_folder, "still_choice", **options)
        assert len(ran) == 1, options
    ran.clear()
    more = score([teacher_folder, student_folder], ["still_choice", "still_rolling"], cached_only=True)
    assert (ran, more.tasks) == ([], ("still_choice", "still_rolling"))
    assert figures(more) == figures(first)
    assert more.mean(more.models[0]) is None


@pytest.mark.slow
def test_a_call_that_was_cut_off_goes_on(score, teacher_folder, monkeypatch):
    import lm_eval

    plain = lm_eval.simple_evaluate

    def killed(lm, tasks, **options):
        if tasks == ["still_rolling"]:
            raise KeyboardInterrupt
        return plain(lm, tasks=tasks, **options)

    monkeypatch.setattr(lm_eval, "simple_evaluate", killed)
    with pytest.raises(KeyboardInterrupt):
        score(teacher_folder, NAMES[:2])
    ran = []
    counted = lambda lm, tasks, **given: ran.append(tasks) or plain(lm, tasks=tasks, **given)  # noqa: E731
    monkeypatch.setattr(lm_eval, "simple_evaluate", counted)
    score(teacher_folder, NAMES[:2])
    assert ran == [["still_rolling"]]


def test_other_weights_are_another_model(score, student_folder, teacher_folder, tmp_path):
    model = load_model(teacher_folder)
    model.save_pretrained(tmp_path / "model")
    load_tokenizer(teacher_folder).save_pretrained(tmp_path / "model")
    before = score(tmp_path / "model", "still_rolling")
    for parameter in model.parameters():
        parameter.data *= 0.5
    model.save_pretrained(tmp_path / "model")
    missing = score(tmp_path / "model", "still_rolling", cached_only=True)
    assert missing.models[0].scores == {}
    assert figures(score(tmp_path / "model", "still_rolling")) != figures(before)


def test_changed_tasks_run_again(score, local_tasks, teacher_folder):
    score(teacher_folder, "still_choice", limit=2)
    (local_tasks / "note.yaml").write_text("# new\n")
    assert score(teacher_folder, "still_choice", limit=2, cached_only=True).models[0].scores == {}
    (local_tasks / "note.yaml").unlink()
    assert score(teacher_folder, "still_choice", limit=2, cached_only=True).models[0].scores


@pytest.mark.slow
def test_a_tag_is_one_column_a_task(score, local_tasks, teacher_folder):
    marked = local_tasks / "marked"
    marked.mkdir(exist_ok=True)
    for name in NAMES[:2]:
        head = HEAD.format(name=f"marked_{name}", file=local_tasks / "rows.jsonl")
        (marked / f"{name}.yaml").write_text(f"tag: marked\n{head}{BODIES[name]}")
    found = score(teacher_folder, "marked", include_path=marked, limit=2)
    assert sorted(found.tasks) == ["marked_still_choice", "marked_still_rolling"]
    assert found.mean(found.models[0]) == found.models[0].scores["marked_still_choice"].value


def test_patterns_and_runs(student_folder, tmp_path):
    for name in ("a", "b", "unfinished"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "run.json").write_text("{}")
    for name in ("a", "b"):
        (tmp_path / name / "student").symlink_to(student_folder)
    expected = [str(tmp_path / name / "student") for name in ("a", "b")]
    assert find_models(str(tmp_path / "*")) == expected
    assert find_models([tmp_path / "b", student_folder, tmp_path / "b"]) == [expected[1], str(student_folder)]
    with pytest.raises(LimbeckError, match="is a run without a student yet"):
        find_models(tmp_path / "unfinished")
    with pytest.raises(LimbeckError, match="no model matches"):
        find_models(str(tmp_path / "c*"))


@pytest.mark.slow
def test_the_sets_of_the_papers_exist_and_their_metrics_are_pinned():
    tasks = Tasks(None)
    asked = {(one.task, one.metric) for one in tasks.resolve(["mohawk,cald"])}
    assert {("hellaswag", "acc_norm"), ("arc_challenge", "acc_norm"), ("arc_challenge", "acc")} <= asked
    assert [len(tasks) for tasks in TASK_SETS.values()] == [6, 8]
    assert {metric for _, metric in asked} == {"acc", "acc_norm"}
    with pytest.raises(LimbeckError, match="unknown task 'hellaswg'") as refusal:
        tasks.resolve(["hellaswg"])
    assert "did you mean 'hellaswag'" in str(refusal.value)


def test_mistakes(score, local_tasks, teacher_folder, tmp_path):
    with pytest.raises(LimbeckError, match="no metric 'f1'\nexpected: one of acc, acc_norm"):
        score(teacher_folder, "still_choice:f1", limit=1)
    with pytest.raises(LimbeckError, match="limit = 0"):
        score(teacher_folder, limit=0)
    with pytest.raises(LimbeckError, match="batch_size = 0"):
        score(teacher_folder, batch_size=0)
    with pytest.raises(LimbeckError, match=r"no folder .*nowhere"):
        score(teacher_folder, include_path=tmp_path / "nowhere")
    with pytest.raises(LimbeckError, match="no tasks"):
        score(teacher_folder, [])
    lost = tmp_path / "lost"
    lost.mkdir()
    (lost / "gone.yaml").write_text(HEAD.format(name="gone", file=lost / "gone.jsonl") + BODIES["still_choice"])
    with pytest.raises(LimbeckError, match="the data of task 'gone' cannot be read"):
        score(teacher_folder, "gone", include_path=lost)


def test_a_teacher_that_reads_other_tokens(score, teacher_folder, student_folder, tmp_path):
    other_tokenizer(teacher_folder, tmp_path / "other")
    with pytest.raises(LimbeckError, match=r"the tokenizers of .* differ: token .* is \d+ for one") as refusal:
        score(student_folder, teacher=tmp_path / "other")
    assert "--tokenizer" in str(refusal.value)
    found = score(student_folder, "still_choice", teacher=tmp_path / "other", tokenizer=teacher_folder, limit=2)
    assert found.mean_recovery(found.models[1]) is None or found.mean_recovery(found.models[1]) >= 0


def other_tokenizer(source, folder):
    """The same model with two letters' tokens exchanged."""
    load_model(source).save_pretrained(folder)
    load_tokenizer(source).save_pretrained(folder)
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())
    words = content["model"]["vocab"]
    words["a"], words["b"] = words["b"], words["a"]
    path.write_text(json.dumps(content))


def test_without_the_extra(score, teacher_folder, monkeypatch, capsys):
    from limbeck import lm_eval

    monkeypatch.setitem(sys.modules, "lm_eval.models.huggingface", None)
    with pytest.raises(LimbeckError, match="tasks need lm-evaluation-harness") as refusal:
        score(teacher_folder)
    assert "pip install 'limbeck[eval]'" in str(refusal.value)
    with pytest.raises(SystemExit) as end:
        lm_eval.main()
    assert end.value.code == 2
    assert "limbeck[eval]" in capsys.readouterr().err


@pytest.mark.slow
def test_the_stock_command_knows_students(local_tasks, student_folder, monkeypatch, tmp_path, capsys):
    from limbeck import lm_eval

    model = f"pretrained={student_folder},dtype=float32"
    options = ["--include_path", local_tasks, "--tasks", "still_choice", "--limit", "2", "--device", "cpu"]
    arguments = ["run", "--model", "hf", "--model_args", model, *options, "--output_path", tmp_path]
    monkeypatch.setattr(sys, "argv", ["lm_eval", *map(str, arguments)])
    lm_eval.main()
    assert "still_choice" in capsys.readouterr().out
    (written,) = tmp_path.rglob("results_*.json")
    assert json.loads(written.read_text())["results"]["still_choice"]["sample_len"] == 2
