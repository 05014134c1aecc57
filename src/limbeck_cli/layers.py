"""Commands that look at a student's layers: which should keep attention, and what their matrices are."""

from pathlib import Path
from typing import Annotated, Any

import typer

from limbeck_cli.options import (
    Device,
    Dtype,
    Json,
    app,
    check_run,
    numbers,
    print_json,
    print_table,
    save_evaluation,
)

Text = Annotated[Path, typer.Option(help="Text (.txt, .md, .py, .jsonl, a folder), or a token file.")]


@app.command("score-layers")
def score_layers(
    teacher: Annotated[str, typer.Argument(help="The teacher: a folder or a hub id.")],
    student: Annotated[str, typer.Argument(help="Its student, best one that is aligned already.")],
    data: Text,
    sequence_length: Annotated[int, typer.Option(help="Tokens in a sample.")] = 512,
    samples: Annotated[int, typer.Option(help="Samples to read at most.")] = 32,
    batch_size: Annotated[int, typer.Option(help="Samples in a forward pass.")] = 4,
    device: Device = None,
    dtype: Dtype = None,
    as_json: Json = False,
) -> None:
    """Say which layers should keep their attention.

    Each layer gets its attention back, alone; the gain is by how much KL(teacher ‖ student) falls, nats per token.
    """
    from limbeck.evaluation import score_folder

    scores = score_folder(
        teacher,
        student,
        data,
        sequence_length=sequence_length,
        samples=samples,
        batch_size=batch_size,
        device=device,
        dtype=dtype,
    )
    if as_json:
        print_json({"teacher": teacher, "student": student, "layers": [score.as_json() for score in scores]})
        return
    print(f"KL of the student as it is: {scores[0].kl + scores[0].gain:.4g} nats per token")
    print(f"{'layer':>5}  {'gain':>10}  {'KL left':>10}")
    for score in scores:
        print(f"{score.layer:>5}  {score.gain:>10.4g}  {score.kl:>10.4g}")


@app.command()
def inspect(
    model: Annotated[str, typer.Argument(help="The student: a folder or a hub id.")],
    teacher: Annotated[str, typer.Option(help="Its teacher: a folder or a hub id.")],
    text: Annotated[str | None, typer.Option(help="The text to look at.")] = None,
    data: Annotated[Path | None, typer.Option(help="Or a file of text, of which the beginning is taken.")] = None,
    layers: Annotated[str, typer.Option(help="Which layers, such as 0,3.  [default: all]")] = "",
    max_tokens: Annotated[int, typer.Option(help="Tokens to look at.")] = 128,
    inputs: Annotated[str, typer.Option(help="Whose hidden states the student's layers get: student, teacher.")] = (
        "student"
    ),
    output: Annotated[Path | None, typer.Option(help="Folder for the pictures, one a layer.")] = None,
    form: Annotated[str, typer.Option("--format", help="Of the pictures: png, svg.")] = "png",
    save_to: Annotated[Path | None, typer.Option(help="A run, whose evaluation/inspect.json is written.")] = None,
    device: Device = None,
    dtype: Dtype = None,
    as_json: Json = False,
) -> None:
    """Lay a student's mixing matrices beside its teacher's attention: distances, decay lengths, pictures."""
    from limbeck.evaluation import inspect_folder
    from limbeck.report.matrices import check_form, write_matrices

    check_run(save_to)
    if output is not None:
        check_form(form)
    found = inspect_folder(
        model,
        teacher,
        text=text,
        data=data,
        max_tokens=max_tokens,
        layers=numbers("--layers", layers, int, "4,10") or None,
        inputs=inputs,  # type: ignore[arg-type]
        device=device,
        dtype=dtype,
    ).as_json()
    files = [] if output is None else write_matrices(found, output, form)
    if save_to is not None:
        files.append(save_evaluation(save_to, "inspect", found))
    if as_json:
        print_json({**found, "files": [str(file) for file in files]})
        return
    print_table(_table(found))
    for note in dict.fromkeys(layer["note"] for layer in found["layers"] if layer["note"]):
        print(f"note: {note}")
    for file in files:
        print(file)


def _table(inspection: dict[str, Any]) -> Any:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="")
    for name in ("layer", "heads", "distance", "lowest – highest", "fades in tokens"):
        table.add_column(name, justify="right", no_wrap=True)
    for layer in inspection["layers"]:
        distances = [head["distance"] for head in layer["heads"] if head["distance"] is not None]
        lengths = [head["decay_length"] for head in layer["heads"] if head["decay_length"] is not None]
        mean = f"{sum(distances) / len(distances):.3g}" if distances else "–"
        table.add_row(
            str(layer["layer"]),
            str(len(layer["heads"])),
            mean,
            _span(distances),
            _span(lengths) if layer["mixer"] else "attention kept",
        )
    return table


def _span(values: list[float]) -> str:
    return f"{min(values):.3g} – {max(values):.3g}" if values else "–"
