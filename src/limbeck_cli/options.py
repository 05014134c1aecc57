"""What the commands share: the application, options that several have, and how results are printed."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

app = typer.Typer(
    name="limbeck",
    help="Distil a pretrained Transformer into a linear-time state-space model.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    rich_markup_mode=None,
)

Number = TypeVar("Number", int, float)
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on standard output.")]
Settings = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change one setting; may be repeated.")
]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, mps.  [default: a GPU if there is one]")]
Dtype = Annotated[str | None, typer.Option(help="float32, bfloat16, float16.  [default: the checkpoint's]")]
Data = Annotated[
    Path | None,
    typer.Option(help="Text or tasks (.txt, .md, .py, .jsonl, a folder), or a token file that `prepare` made."),
]
Teacher = Annotated[str | None, typer.Option(help="The teacher: a folder or a hub id.")]


def print_json(value: dict[str, Any]) -> None:
    """Print one JSON object on standard output."""
    print(json.dumps(plain(value), ensure_ascii=False, allow_nan=False))


def plain(value: Any) -> Any:
    """JSON has no NaN and no infinity: they become null."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def print_table(renderable: Any) -> None:
    """Print something of rich's, such as a table, on standard output."""
    from rich.console import Console

    Console().print(renderable)


def numbers(option: str, text: str, kind: Callable[[str], Number], example: str) -> list[Number]:
    """Read numbers with commas between them.

    Raises:
        LimbeckError: Something in between is none.
    """
    from limbeck.errors import LimbeckError

    try:
        return [kind(part) for part in text.split(",") if part.strip()]
    except ValueError:
        whole = "whole numbers" if kind is int else "numbers"
        raise LimbeckError(f"{option} {text!r}", expected=f"{whole} with commas", hint=f"{option} {example}") from None


def check_run(run: Path | None) -> None:
    """Refuse a folder for results that is not there, before any are made.

    Raises:
        LimbeckError: It is not there.
    """
    from limbeck.errors import LimbeckError

    if run is not None and not run.is_dir():
        raise LimbeckError(f"no folder {run}", expected="a run's folder", hint="--save-to runs/mine")


def save_evaluation(run: Path, name: str, figures: dict[str, Any]) -> Path:
    """Put figures where `limbeck report` looks for them: RUN/evaluation/NAME.json."""
    from limbeck.files import write_text

    file = run / "evaluation" / f"{name}.json"
    file.parent.mkdir(exist_ok=True)
    write_text(file, json.dumps(plain(figures), indent=2, ensure_ascii=False, allow_nan=False) + "\n")
    return file
