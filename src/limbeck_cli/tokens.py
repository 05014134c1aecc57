"""The command that prepares: text into token files, and what a teacher predicts on them."""

from pathlib import Path
from typing import Annotated, Any

import typer

from limbeck_cli.options import Device, Json, app, print_json


@app.command()
def prepare(
    sources: Annotated[
        list[str], typer.Argument(help="Text files and folders, .parquet, saved datasets, hub:NAME of a dataset.")
    ],
    output: Annotated[
        Path | None,
        typer.Option(
            help="Name of the .idx and .bin files, or the teacher cache's folder; give it again to go on after an "
            "interruption."
        ),
    ] = None,
    tokenizer: Annotated[str | None, typer.Option(help="A folder or a hub id, such as the teacher's.")] = None,
    workers: Annotated[int, typer.Option(help="Processes that encode.")] = 1,
    field: Annotated[str, typer.Option(help="Key or column of .jsonl and datasets that holds the text.")] = "text",
    split: Annotated[str, typer.Option(help="Split of a dataset.")] = "train",
    config: Annotated[str | None, typer.Option(help="Configuration of a dataset on the hub.")] = None,
    streaming: Annotated[
        bool, typer.Option("--streaming", help="Read a dataset of the hub as it arrives, and keep none of it.")
    ] = False,
    info: Annotated[
        bool, typer.Option("--info", help="Describe, and check, the token file or teacher cache SOURCES instead.")
    ] = False,
    teacher: Annotated[
        str | None, typer.Option(help="Run this model over the samples of SOURCES, and keep what it predicts.")
    ] = None,
    sequence_length: Annotated[int, typer.Option(help="With --teacher: tokens in a sample, as in the recipe.")] = 2048,
    top_k: Annotated[int, typer.Option(help="With --teacher: how many likeliest tokens are kept.")] = 64,
    temperature: Annotated[float, typer.Option(help="With --teacher: the temperature of the stage.")] = 1.0,
    stored: Annotated[str, typer.Option(help="With --teacher: log-probabilities in float16 or float32.")] = "float16",
    hidden_states: Annotated[
        str | None,
        typer.Option(help="With --teacher: keep hidden states too, for a stage 'hidden' of target block or mixer."),
    ] = None,
    hidden_stored: Annotated[str, typer.Option(help="With --hidden-states: in bfloat16 or float32.")] = "bfloat16",
    samples: Annotated[int | None, typer.Option(help="With --teacher: the first samples only.  [default: all]")] = None,
    batch_size: Annotated[int, typer.Option(help="With --teacher: samples in a forward pass.")] = 8,
    device: Device = None,
    dtype: Annotated[
        str | None,
        typer.Option(help="With --teacher: what it computes in.  [default: bfloat16 on a GPU, else float32]"),
    ] = None,
    as_json: Json = False,
) -> None:
    """Turn text into a token file (Megatron's .idx and .bin); with --teacher, keep what a model predicts on one.

    What --teacher keeps, stages read with teacher_cache = "FOLDER" (docs/teacher-cache.md). --info describes either.
    """
    if info:
        figures = _info(sources)
    elif teacher is not None:
        keeping = {"top_k": top_k, "temperature": temperature, "stored": stored}
        keeping |= {"hidden": hidden_states, "hidden_stored": hidden_stored}
        reading = (tokenizer, sequence_length, samples)
        figures = _prepare_teacher(sources, output, teacher, reading, keeping, batch_size, device, dtype)
    else:
        figures = _prepare(sources, output, tokenizer, workers, (field, split, config, streaming))
    if as_json:
        print_json(figures)
    else:
        for name, value in figures.items():
            print(f"{name:<16} {', '.join(value) if isinstance(value, list | dict) else value}")


def _info(paths: list[str]) -> dict[str, Any]:
    """Describe the one token file, or teacher cache, that was named."""
    from limbeck.data import describe
    from limbeck.errors import LimbeckError

    if len(paths) != 1:
        raise LimbeckError(f"--info with {len(paths)} files", expected="one", hint="limbeck prepare --info corpus.idx")
    if Path(paths[0]).is_dir():
        from limbeck.distill import TeacherCache

        cache = TeacherCache(paths[0])
        cache.verify()
        return cache.manifest
    return describe(paths[0])


def _prepare_teacher(
    sources: list[str],
    output: Path | None,
    teacher: str,
    reading: tuple[str | None, int, int | None],
    keeping: dict[str, Any],
    batch_size: int,
    device: str | None,
    dtype: str | None,
) -> dict[str, Any]:
    """Run a teacher over the samples of one source; a bar shows how far it is."""
    from limbeck import LimbeckError
    from limbeck.distill import Keeping
    from limbeck.recipes.cached import cache_teacher

    if output is None or len(sources) != 1:
        raise LimbeckError(
            "no --output" if output is None else f"{len(sources)} sources",
            expected="a new folder" if output is None else "one, as data.source of the recipe",
            hint="limbeck prepare corpus --teacher teacher/ --output cache/",
        )
    tokenizer, sequence_length, samples = reading
    return cache_teacher(
        output,
        teacher,
        sources[0],
        sequence_length=sequence_length,
        tokenizer=tokenizer,
        samples=samples,
        keeping=Keeping(**keeping),
        batch_size=batch_size,
        device=device,
        dtype=dtype,
    ).manifest


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
