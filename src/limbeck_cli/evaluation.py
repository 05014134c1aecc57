"""Commands that measure models."""

from pathlib import Path
from typing import Annotated

import typer

from limbeck_cli.options import Device, Dtype, Json, Teacher, app, print_json


@app.command()
def evaluate(
    model: Annotated[str, typer.Argument(help="A student or a teacher: a folder or a hub id.")],
    data: Annotated[Path, typer.Option(help="Text: a .txt, .md, .py or .jsonl file, or a folder of them.")],
    teacher: Teacher = None,
    tokenizer: Annotated[str | None, typer.Option(help="A folder or a hub id.  [default: the model's]")] = None,
    sequence_length: Annotated[int, typer.Option(help="Tokens in a sample.")] = 1024,
    samples: Annotated[int | None, typer.Option(help="Samples to read at most.  [default: all]")] = None,
    batch_size: Annotated[int, typer.Option(help="Samples in a forward pass.")] = 8,
    device: Device = None,
    dtype: Dtype = None,
    as_json: Json = False,
) -> None:
    """Measure perplexity on a text and, with --teacher, agreement with the teacher (top-1 match, KL per token)."""
    from limbeck.evaluation import evaluate_on_text

    figures = evaluate_on_text(
        model,
        data,
        teacher=teacher,
        tokenizer=tokenizer,
        sequence_length=sequence_length,
        samples=samples,
        batch_size=batch_size,
        device=device,
        dtype=dtype,
    )
    if as_json:
        print_json(figures)
    else:
        for name, value in figures.items():
            print(f"{name:<20} {value:.4g}" if isinstance(value, float) else f"{name:<20} {value}")
