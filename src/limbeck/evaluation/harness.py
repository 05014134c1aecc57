"""Tasks of lm-evaluation-harness: several models in one call, every score kept, the teacher beside.

The harness is an extra, ``pip install 'limbeck[eval]'``, and is imported when a task runs.
"""

from collections.abc import Sequence
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from limbeck.devices import choose_device, choose_dtype
from limbeck.errors import LimbeckError
from limbeck.evaluation.perplexity import evaluating
from limbeck.evaluation.results import ModelScores, ResultsCache, Score, TaskResults
from limbeck.evaluation.subjects import Subject, find_models
from limbeck.evaluation.tasks import Asked, Tasks, harness, quiet
from limbeck.evaluation.tokens import check_tokenizers
from limbeck.progress import make_progress

NO_FIGURES = ("alias", "name", "sample_len", "samples", "sample_count")


def evaluate_tasks(
    models: str | Path | PreTrainedModel | Sequence[str | Path | PreTrainedModel],
    tasks: str | Sequence[str],
    *,
    teacher: str | Path | PreTrainedModel | None = None,
    tokenizer: Any = None,
    include_path: str | Path | None = None,
    num_fewshot: int | None = None,
    limit: int | float | None = None,
    batch_size: int = 8,
    device: str | None = None,
    dtype: str | None = None,
    cached_only: bool = False,
    cache: str | Path | None = None,
) -> TaskResults:
    """Score models on tasks of lm-evaluation-harness.

    What is measured is kept, so that a call that was cut off goes on where it stood, and another model or task costs
    only itself. A score is taken from there when the model's files, its tokenizer, the task, the examples shown, the
    limit, the number format and the harness are the same. Models that are passed as objects are always measured.

    Args:
        models: Folders of models or runs, patterns such as ``"runs/*"``, hub ids, or models in memory.
        tasks: Names the harness knows, or ``"mohawk"``, ``"cald"``; ``"arc_easy:acc_norm"`` names the metric too.
        teacher: The model whose scores are the measure; it must read the same tokens.
        tokenizer: A tokenizer, or the folder or hub id of one, for all models; by default each model's own.
        include_path: A folder of the user's own tasks (YAML), which take precedence.
        num_fewshot: Examples shown before each question; by default the task's own number.
        limit: Documents of each task at most, or a share of them when below 1.
        batch_size: Requests in a forward pass; it changes no result beyond rounding.
        device: Where to run; by default a GPU if there is one.
        dtype: Number format; by default the checkpoint's.
        cached_only: Run nothing; give what was measured before.
        cache: Folder of the scores; see `limbeck.evaluation.results.default_cache`.

    Returns:
        The scores; the teacher's first.

    Raises:
        LimbeckError: The extra is missing, a task or a model is not there, or tokenizers differ.
    """
    _check_numbers(batch_size=(batch_size, 1), num_fewshot=(num_fewshot, 0))
    if limit is not None and limit <= 0:
        raise LimbeckError(f"limit = {limit}", expected="a number of documents, or a share between 0 and 1")
    place, number_format = choose_device(device), choose_dtype(dtype)
    sources = [(source, "model" if teacher is None else "student") for source in find_models(models)]
    if teacher is not None:
        measure = find_models([teacher])[0]
        sources = [(measure, "teacher"), *((source, role) for source, role in sources if source != measure)]
    known = Tasks(include_path)
    asked = known.resolve([tasks] if isinstance(tasks, str) else tasks)
    subjects = [Subject(source, role, tokenizer, place, number_format) for source, role in sources]
    if teacher is not None and tokenizer is None and not cached_only:
        for subject in subjects[1:]:
            check_tokenizers(subject.tokenizer, subjects[0].tokenizer, subject.name, subjects[0].name)

    common = {"num_fewshot": num_fewshot, "limit": limit, "dtype": dtype, "harness": metadata.version("lm_eval")}
    run = None if cached_only else {"num_fewshot": num_fewshot, "limit": limit, "batch_size": batch_size}
    names = list(dict.fromkeys(one.task for one in asked))
    store = ResultsCache(cache)
    measured: list[dict[str, Any]] = []
    with make_progress("evaluate", len(subjects) * len(names)) as progress:
        for subject in subjects:
            measured.append({})
            for task in names:
                progress.update(sum(map(len, measured)), {"model": subject.name, "task": task})
                identity = common | {"task": task, "own_tasks": known.identity(task)}
                measured[-1][task] = _measure(subject, task, identity, store, known, run)
            subject.release()
        progress.update(len(subjects) * len(names))
    return _table(asked, subjects, measured)


def _check_numbers(**given: tuple[int | None, int]) -> None:
    for name, (value, least) in given.items():
        if value is not None and value < least:
            raise LimbeckError(f"{name} = {value}", expected=f"{least} or more")


def _measure(
    subject: Subject,
    task: str,
    identity: dict[str, Any],
    store: ResultsCache,
    known: Tasks,
    run: dict[str, Any] | None,
) -> Any:
    """A task's figures for one model, from the store where they are there; None where they are not and may not run."""
    own = subject.identity
    if own is not None:
        identity = identity | own
        if (kept := store.get(identity)) is not None:
            return kept
    if run is None:
        return None
    figures = _run(subject, task, known, **run)
    if own is not None:
        store.put(identity, figures)
    return figures


def _run(subject: Subject, task: str, known: Tasks, *, batch_size: int, **options: Any) -> dict[str, Any]:
    """Run one task, or all that a group's or a tag's name stands for; all of its figures."""
    lm_eval = harness()
    from lm_eval.models.huggingface import HFLM

    with quiet(), evaluating(subject.model):
        model_class: Any = HFLM  # its arguments are hidden from type checkers
        lm = model_class(pretrained=subject.model, tokenizer=subject.tokenizer, backend="causal", batch_size=batch_size)
        try:
            found = lm_eval.simple_evaluate(lm, tasks=[task], task_manager=known.manager, log_samples=False, **options)
        except (OSError, ValueError) as error:
            if isinstance(error, ValueError) and "Couldn't find cache" not in str(error):
                raise
            raise LimbeckError(
                f"the data of task {task!r} cannot be read: {error}",
                expected="data on this machine, or a hub that can be reached",
                hint="run it once where there is a network; HF_HUB_OFFLINE must not be set there",
            ) from error
    assert found is not None
    figures = {name: _entry(found, name) for name in found["results"]}
    chosen = {task: figures[task]} if figures.get(task, {}).get("figures") else figures  # a group's mean, or its parts
    return {name: entry for name, entry in chosen.items() if entry["figures"]}


def _entry(found: Any, name: str) -> dict[str, Any]:
    """What is kept of a task: its figures by ``metric,filter`` in its own order, and what is said of them."""
    figures = {key: value for key, value in found["results"][name].items() if isinstance(value, int | float)}
    listed = [metric["metric"] for metric in found["configs"].get(name, {}).get("metric_list") or ()]
    order = [str(metric) for metric in listed]
    figures = {key: value for key, value in figures.items() if key not in NO_FIGURES}
    figures = dict(sorted(figures.items(), key=lambda item: _place(item[0].partition(",")[0], order)))
    samples = found.get("n-samples", {}).get(name, {}).get("effective")
    return {"figures": figures, "higher_is_better": found["higher_is_better"].get(name, {}), "samples": samples}


def _place(metric: str, order: list[str]) -> int:
    return order.index(metric) if metric in order else len(order)


def _table(asked: list[Asked], subjects: list[Subject], measured: list[dict[str, Any]]) -> TaskResults:
    """One column for each task and metric; where a name stands for several tasks, one for each of them."""
    columns: dict[str, tuple[str, Asked]] = {}
    for one in asked:
        parts = next((found[one.task] for found in measured if found[one.task]), {one.task: None})
        for part in parts:
            label = part if part not in columns else f"{part}:{one.metric or 'first'}"
            columns[label] = (part, one)
    rows = []
    for subject, found in zip(subjects, measured, strict=True):
        scores = {}
        for label, (part, one) in columns.items():
            if found[one.task]:
                scores[label] = replace(_score(part, found[one.task][part], one.metric), task=label)
        rows.append(ModelScores(subject.name, subject.role, scores))
    return TaskResults(tuple(columns), tuple(rows))


def _score(task: str, entry: dict[str, Any], metric: str | None) -> Score:
    figures = {key: value for key, value in entry["figures"].items() if "_stderr," not in key}
    better = entry["higher_is_better"]
    fit = [key for key in figures if metric is None or key.partition(",")[0] == metric]
    key = next((key for key in fit if better.get(key.partition(",")[0])), fit[0] if fit else None)
    if key is None:
        names = dict.fromkeys(name.partition(",")[0] for name in figures)
        raise LimbeckError(f"task {task!r} has no metric {metric!r}", expected=f"one of {', '.join(names)}")
    name, _, kind = key.partition(",")
    stderr = entry["figures"].get(f"{name}_stderr,{kind}")
    return Score(task, name, figures[key], stderr, entry["samples"], higher_is_better=better.get(name) is not False)
