"""`limbeck bench`: speed and memory of models against context length and batch."""

from pathlib import Path
from typing import Annotated, Any

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
def bench(
    models: Annotated[list[str], typer.Argument(metavar="MODEL...", help="Students or teachers: folders or hub ids.")],
    teacher: Teacher = None,
    contexts: Annotated[str, typer.Option(help="Lengths of the prompts, with commas.")] = "128,512,2048,8192",
    batches: Annotated[str, typer.Option(help="Numbers of prompts at once, with commas.")] = "1",
    new_tokens: Annotated[int, typer.Option(help="Decode steps after each prompt.")] = 32,
    seconds: Annotated[float, typer.Option(help="Time for each point; one pass is always made.")] = 2.0,
    save_to: Annotated[
        Path | None, typer.Option(metavar="RUN", help="Also write RUN/evaluation/bench.json, for the report.")
    ] = None,
    chart: Annotated[Path | None, typer.Option(help="Also draw a chart: a .svg, .png or .pdf file.")] = None,
    device: Device = None,
    dtype: Dtype = None,
    as_json: Json = False,
) -> None:
    """Measure prefill and decode speed, first-token time, cache and peak memory; with --teacher, beside the teacher."""
    from limbeck.evaluation import bench as measure
    from limbeck.report.bench import check_chart_path, save_bench_chart

    lengths, rows = numbers("--contexts", contexts, int, "128,512"), numbers("--batches", batches, int, "1,8")
    check_run(save_to)
    if chart is not None:
        check_chart_path(chart)
    found = measure(
        models,
        teacher=teacher,
        contexts=lengths,
        batches=rows,
        new_tokens=new_tokens,
        seconds=seconds,
        device=device,
        dtype=dtype,
    ).as_json()
    if save_to is not None:
        save_evaluation(save_to, "bench", found)
    if chart is not None:
        save_bench_chart(found, chart)
    if as_json:
        print_json(found)
    else:
        for table in _tables(found):
            print_table(table)


def _tables(found: dict[str, Any]) -> list[Any]:
    """A table for each batch, with one row for each model at each context, the models one below the other."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    from limbeck.report.bench import model_labels, where

    cells: dict[int, dict[int, list[tuple[str, dict[str, Any]]]]] = {}
    for label, model in zip(model_labels(found), found["models"], strict=True):
        for point in model["points"] + model["left_out"]:
            cells.setdefault(point["batch"], {}).setdefault(point["context"], []).append((label, point))
    points = [point for model in found["models"] for point in model["points"]]
    with_peak = any(point["peak_bytes"] is not None for point in points)
    measures = ["prefill\ntokens/s", "first\ntoken", "decode\ntokens/s", "step", "cache", *["peak"] * with_peak]
    tables = []
    for batch, rows in sorted(cells.items()):
        title = f"batch {batch}, {where(found)}, {found['new_tokens']} new tokens"
        table = Table(title=title, box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
        table.add_column("context", justify="right", no_wrap=True)
        table.add_column("model", min_width=7, overflow="fold")
        for name in measures:
            table.add_column(name, justify="right", no_wrap=True)
        for context, row in sorted(rows.items()):
            for number, (label, point) in enumerate(row):
                head = str(context) if number == 0 else ""
                table.add_row(head, label, *_figures(point, with_peak), end_section=number == len(row) - 1)
        tables.append(table)
    return tables


def _figures(point: dict[str, Any], with_peak: bool) -> list[str]:
    from limbeck.report.bench import binary, duration

    if "reason" in point:
        return ["–"] * (5 + with_peak)  # the reason was told when it happened, and is in the JSON
    figures = [
        f"{point['prefill_tokens_per_second']:,.0f}",
        duration(point["first_token_seconds"]),
        f"{point['decode_tokens_per_second']:,.0f}",
        duration(point["step_seconds"]),
        binary(point["cache_bytes"]),
    ]
    peak = point["peak_bytes"]
    return [*figures, "" if peak is None else binary(peak)] if with_peak else figures
