"""The command that measures recall."""

from pathlib import Path
from typing import Annotated

import typer

from limbeck_cli.options import (
    Device,
    Dtype,
    Json,
    Teacher,
    app,
    check_run,
    numbers,
    print_json,
    print_table,
    save_evaluation,
)


@app.command()
def recall(
    models: Annotated[list[str], typer.Argument(metavar="MODEL", help="Students or teachers: folders or hub ids.")],
    teacher: Teacher = None,
    tasks: Annotated[str, typer.Option(help="Some of mqar, copy, needle, repeat.")] = "mqar,copy,needle,repeat",
    lengths: Annotated[str, typer.Option(help="Tokens of prompt and answer.")] = "256,1024",
    depths: Annotated[str, typer.Option(help="Where needles are: 0 in front of the text, 1 behind it.")] = "0,0.5,1",
    count: Annotated[int, typer.Option(help="Questions of each kind.")] = 32,
    text: Annotated[
        Path | None,
        typer.Option(help="Text to hide needles in, files or a folder.  [default: Python's standard library]"),
    ] = None,
    token_range: Annotated[
        str | None,
        typer.Option(help="First token id and the one after the last, of mqar, copy, repeat.  [default: all]"),
    ] = None,
    tokenizer: Annotated[str | None, typer.Option(help="A folder or a hub id.  [default: the model's]")] = None,
    seed: Annotated[int, typer.Option(help="The same seed asks the same questions.")] = 0,
    batch_size: Annotated[int, typer.Option(help="Questions that are answered together.")] = 8,
    device: Device = None,
    dtype: Dtype = None,
    save_to: Annotated[
        Path | None, typer.Option(help="A run's folder; the results become RUN/evaluation/recall.json.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Ask models for what stands in their prompt: associative recall, copying, needles in a text, repetition.

    An answer counts when all of it is what greedy generation puts out; likelihood plays no part.
    """
    from limbeck.errors import LimbeckError
    from limbeck.evaluation import RecallSettings, recall_by_name

    bounds = None if token_range is None else numbers("--token-range", token_range, int, "100,200")
    if bounds is not None and len(bounds) != 2:
        raise LimbeckError(f"--token-range {token_range}", expected="two token ids", hint="--token-range 100,200")
    check_run(save_to)
    settings = RecallSettings(
        tasks=[task.strip() for task in tasks.split(",") if task.strip()],
        lengths=numbers("--lengths", lengths, int, "256,1024"),
        depths=numbers("--depths", depths, float, "0,0.5,1"),
        count=count,
        token_range=None if bounds is None else (bounds[0], bounds[1]),
        text=text,
        seed=seed,
        batch_size=batch_size,
    )
    found = recall_by_name(models, settings, teacher=teacher, tokenizer=tokenizer, device=device, dtype=dtype)
    if save_to is not None:
        save_evaluation(save_to, "recall", found.as_json())
    if as_json:
        print_json(found.as_json())
    else:
        print_table(found.table())
