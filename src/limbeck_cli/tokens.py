"""The command that turns text into token files."""

from pathlib import Path
from typing import Annotated, Any

import typer

from limbeck_cli.options import Json, app, print_json


@app.command()
def prepare(
    sources: Annotated[
        list[str], typer.Argument(help="Text files and folders, .parquet, saved datasets, hub:NAME of a dataset.")
    ],
    output: Annotated[
        Path | None, typer.Option(help="Name of the .idx and .bin files; give it again to go on after an interruption.")
    ] = None,
    tokenizer: Annotated[str | None, typer.Option(help="A folder or a hub id, such as the teacher's.")] = None,
    workers: Annotated[int, typer.Option(help="Processes that encode.")] = 1,
    field: Annotated[str, typer.Option(help="Key or column of .jsonl and datasets that holds the text.")] = "text",
    split: Annotated[str, typer.Option(help="Split of a dataset.")] = "train",
    config: Annotated[str | None, typer.Option(help="Configuration of a dataset on the hub.")] = None,
    streaming: Annotated[
        bool, typer.Option("--streaming", help="Read a dataset of the hub as it arrives, and keep none of it.")
    ] = False,
    info: Annotated[bool, typer.Option("--info", help="Describe the token file SOURCES instead.")] = False,
    as_json: Json = False,
) -> None:
    """Turn text of any kind into a token file (Megatron's .idx and .bin), or describe one with --info."""
    if info:
        figures = _token_file_info(sources)
    else:
        figures = _prepare(sources, output, tokenizer, workers, (field, split, config, streaming))
    if as_json:
        print_json(figures)
    else:
        for name, value in figures.items():
            print(f"{name:<16} {', '.join(value) if isinstance(value, list) else value}")


def _token_file_info(paths: list[str]) -> dict[str, Any]:
    """Describe the one token file that was named."""
    from limbeck.data import describe
    from limbeck.errors import LimbeckError

    if len(paths) != 1:
        raise LimbeckError(f"--info with {len(paths)} files", expected="one", hint="limbeck prepare --info corpus.idx")
    return describe(paths[0])


def _prepare(
    sources: list[str],
    output: Path | None,
    tokenizer: str | None,
    workers: int,
    reading: tuple[str, str, str | None, bool],
) -> dict[str, Any]:
    """Make a token file and describe it; a bar shows how far it is."""
    from limbeck import LimbeckError, load_tokenizer
    from limbeck.data import Corpus, Reading, describe
    from limbeck.data import prepare as prepare_tokens
    from limbeck.progress import make_progress

    if output is None or tokenizer is None:
        raise LimbeckError(
            "no --output" if output is None else "no --tokenizer",
            hint="limbeck prepare text/ --tokenizer teacher/ --output corpus",
        )
    corpus = Corpus(sources, Reading(*reading))
    encoder = load_tokenizer(tokenizer)
    with make_progress("preparing", total=corpus.work()) as progress:
        prefix = prepare_tokens(
            corpus,
            encoder,
            output,
            eos_token_id=encoder.eos_token_id,
            workers=workers,
            report=lambda done, tokens: progress.update(done, {"tokens": f"{tokens:,}"}),
        )
    return describe(prefix)
