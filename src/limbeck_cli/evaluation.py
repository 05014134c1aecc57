"""Commands that measure models."""

from pathlib import Path
from typing import Annotated, Any

import typer

from limbeck_cli.options import Device, Dtype, Json, Teacher, app, check_run, print_json, save_evaluation


@app.command()
def evaluate(
    models: Annotated[
        list[str], typer.Argument(metavar="MODEL…", help="Models or runs: folders, patterns such as 'runs/*', hub ids.")
    ],
    data: Annotated[
        Path | None, typer.Option(help="Text: a .txt, .md, .py or .jsonl file, or a folder of them; or tokens.")
    ] = None,
    tasks: Annotated[
        str | None, typer.Option(help="Tasks of lm-evaluation-harness, or a paper's: mohawk, cald; with commas.")
    ] = None,
    teacher: Teacher = None,
    tokenizer: Annotated[str | None, typer.Option(help="A folder or a hub id.  [default: each model's]")] = None,
    sequence_length: Annotated[int, typer.Option(help="Tokens in a sample of --data.")] = 1024,
    samples: Annotated[int | None, typer.Option(help="Samples of --data to read at most.  [default: all]")] = None,
    stride: Annotated[
        int | None, typer.Option(help="Perplexity by windows so far apart.  [default: side by side]")
    ] = None,
    details: Annotated[
        bool, typer.Option("--details", help="With --data: bits per byte, and all by position.")
    ] = False,
    num_fewshot: Annotated[int | None, typer.Option(help="Examples before a question.  [default: the task's]")] = None,
    limit: Annotated[float | None, typer.Option(help="Documents of a task at most; below 1, a share.")] = None,
    include_path: Annotated[Path | None, typer.Option(help="A folder of your own tasks.")] = None,
    cached_only: Annotated[bool, typer.Option("--cached-only", help="Run no task; show what was measured.")] = False,
    cache: Annotated[Path | None, typer.Option(help="Where scores are kept.  [default: ~/.cache/limbeck]")] = None,
    batch_size: Annotated[int, typer.Option(help="Samples in a forward pass.")] = 8,
    device: Device = None,
    dtype: Dtype = None,
    save_to: Annotated[Path | None, typer.Option(help="A run whose report gets the figures of --data.")] = None,
    form: Annotated[str, typer.Option("--format", help="Of the tasks' table: text, markdown, csv, json.")] = "text",
    as_json: Json = False,
) -> None:
    """Measure perplexity on a text (--data) and scores on tasks (--tasks); with --teacher, how close to the teacher."""
    from limbeck.errors import LimbeckError, unknown
    from limbeck.evaluation import evaluate_on_text, evaluate_tasks, show_results
    from limbeck.evaluation.results import FORMATS
    from limbeck.evaluation.subjects import find_models

    form = "json" if as_json else form
    if form not in FORMATS:
        raise unknown("format", form, FORMATS)
    if data is None and not tasks:
        raise LimbeckError("nothing to evaluate on", expected="--data with text, --tasks with names of tasks, or both")
    if save_to is not None and data is None:
        raise LimbeckError("--save-to without figures to save", expected="it beside --data")
    common: dict[str, Any] = {
        "teacher": teacher,
        "tokenizer": tokenizer,
        "batch_size": batch_size,
        "device": device,
        "dtype": dtype,
    }
    texts, results = [], None
    if data is not None:
        reading = {"sequence_length": sequence_length, "samples": samples, "stride": stride}
        details = details or save_to is not None
        found = find_models(models)
        check_run(save_to)
        if save_to is not None and len(found) != 1:
            raise LimbeckError(f"--save-to with {len(found)} models", expected="one model")
        texts = [evaluate_on_text(model, data, details=details, **reading, **common) for model in found]
        if save_to is not None:
            save_evaluation(save_to, "text", texts[0])
    if tasks:
        amounts = {"num_fewshot": num_fewshot, "limit": _whole(limit)}
        kept = {"cached_only": cached_only, "cache": cache}
        results = evaluate_tasks(models, tasks, include_path=include_path, **amounts, **kept, **common)
    if form == "json":
        text = texts[0] if len(texts) == 1 else {"models": texts}
        scores = None if results is None else results.as_json()
        print_json(text if scores is None else {**scores, "text": texts} if texts else scores)
        return
    for figures in texts:
        _print_figures(figures)
    if results is not None:
        print(show_results(results, form))


def _whole(limit: float | None) -> int | float | None:
    """A limit of 1 or more counts documents."""
    return limit if limit is None or limit < 1 else int(limit)


def _print_figures(figures: dict[str, Any]) -> None:
    for name, value in figures.items():
        if name == "by_position":
            for part in value:
                close = "".join(f"  {key} {part[key]:.4g}" for key in ("nll", "kl", "top1") if part[key] is not None)
                print(f"{part['from']:>9} … {part['to']:<8}{close}")
        else:
            print(f"{name:<20} {value:.4g}" if isinstance(value, float) else f"{name:<20} {value}")
