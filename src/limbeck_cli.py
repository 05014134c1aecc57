"""The `limbeck` command.

It imports limbeck inside each command, so that `--help` needs no torch. Results go to standard output, everything else
to standard error; a mistake in what was given ends with exit code 2 and one message.
"""

import json
import math
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer(
    name="limbeck",
    help="Distil a pretrained Transformer into a linear-time state-space model.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    rich_markup_mode=None,
)

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


def main() -> None:
    """Run the command line; mistakes of the user end with exit code 2."""
    try:
        app()
    except ValueError as error:
        from limbeck.errors import LimbeckError

        if not isinstance(error, LimbeckError):
            raise
        print(f"limbeck: {error}", file=sys.stderr)
        raise SystemExit(2) from None


@app.command()
def demo(
    output: Annotated[Path, typer.Option(help="Everything lies under this folder.")] = Path("runs/demo"),
    seed: Annotated[int, typer.Option(help="Seed of the corpus split, the teacher and the first student.")] = 0,
    seeds: Annotated[int, typer.Option(help="Students of each kind, to show the spread.")] = 3,
    as_json: Json = False,
) -> None:
    """Train a small teacher on this machine, distil it, compare; a few minutes on two cores, no network."""
    from limbeck.demo import demo as run_demo

    result = run_demo(output, seed=seed, seeds=seeds)
    if as_json:
        _print_json(result.as_json())
    else:
        _print_table(result.report())


@app.command()
def convert(
    source: Annotated[str, typer.Argument(help="The teacher: a folder or a hub id.")],
    destination: Annotated[Path, typer.Argument(help="Folder for the student; must be new or empty.")],
    mixer: Annotated[str, typer.Option(help="What takes the place of attention.")] = "discrete-mamba2",
    keep_attention: Annotated[str, typer.Option(help="Layers that keep attention, from 0, such as 4,10,16,22.")] = "",
    init: Annotated[str, typer.Option(help="How mixers start: attention, identity or random.")] = "attention",
    settings: Settings = None,
    seed: Annotated[int, typer.Option(help="Seed of the mixers' random numbers.")] = 0,
    as_json: Json = False,
) -> None:
    """Swap a Transformer's attention for mixers; all other weights are the teacher's.

    Options of the mixer: --set mixer.d_state=128.
    """
    from limbeck import convert_folder

    options = _mixer_options(settings or [])
    report = convert_folder(source, destination, mixer, _layers(keep_attention), init, options, seed)  # type: ignore[arg-type]
    if as_json:
        _print_json({"destination": str(destination), **asdict(report)})
    else:
        print(report.summary())
        print(f"student in {destination}")


@app.command("import")
def import_(
    source: Annotated[str, typer.Argument(help="A published checkpoint: a folder or a hub id.")],
    destination: Annotated[Path, typer.Argument(help="Folder for the student; must be new or empty.")],
    tokenizer: Annotated[
        str | None, typer.Option(help="A folder or a hub id.  [default: the source's, if it has one]")
    ] = None,
    as_json: Json = False,
) -> None:
    """Turn a published checkpoint (Phi-Mamba, Hybrid-Phi-Mamba, CALD's GPT-NeoX with Mamba) into a student."""
    from limbeck import import_checkpoint

    report = import_checkpoint(source, destination, tokenizer)
    if as_json:
        _print_json({"destination": str(destination), **asdict(report)})
    else:
        print(report.summary())
        print(f"student in {destination}")


@app.command()
def distill(
    recipe: Annotated[str, typer.Argument(help="A recipe's name (`limbeck recipes`) or a .toml file.")],
    output: Annotated[Path, typer.Option(help="The run's folder; give it again to resume.")],
    teacher: Teacher = None,
    student: Annotated[str | None, typer.Option(help="A folder that `convert` wrote, to start from.")] = None,
    tokenizer: Annotated[str | None, typer.Option(help="A folder or a hub id.  [default: the teacher's]")] = None,
    data: Data = None,
    tokens: Annotated[int | None, typer.Option(help="Tokens of all stages together; they keep their shares.")] = None,
    origin: Annotated[
        str | None, typer.Option("--from", metavar="RUN@STEP", help="Branch off another run, under changed losses.")
    ] = None,
    settings: Settings = None,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Run a recipe from teacher to student, stage by stage; resumes by itself after any interruption.

    Settings by name: --set stages.matrix.lr=1e-4.
    """
    from limbeck.recipes import distill as run_recipe
    from limbeck.recipes import load_recipe

    result = run_recipe(
        load_recipe(recipe, settings or []),
        output=output,
        teacher=teacher,
        student=student,
        tokenizer=tokenizer,
        data=data,
        tokens=tokens,
        device=device,
        origin=origin,
    )
    if as_json:
        stages = {name: str(folder) for name, folder in result.stages.items()}
        _print_json({"output": str(result.output), "student": str(result.student), "stages": stages})
    else:
        print(f"student in {result.student}")


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
        _print_json(figures)
    else:
        for name, value in figures.items():
            print(f"{name:<16} {', '.join(value) if isinstance(value, list) else value}")


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
        _print_json(figures)
    else:
        for name, value in figures.items():
            print(f"{name:<20} {value:.4g}" if isinstance(value, float) else f"{name:<20} {value}")


@app.command()
def generate(
    model: Annotated[str, typer.Argument(help="A student or a teacher: a folder or a hub id.")],
    prompts: Annotated[list[str], typer.Argument(help="One prompt or more; they run as one batch.")],
    max_new_tokens: Annotated[int, typer.Option(help="Tokens to add at most.")] = 64,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token every time.")] = 0.0,
    top_k: Annotated[int | None, typer.Option(help="Draw among so many likeliest tokens only.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Draw among the likeliest with this probability.")] = None,
    min_p: Annotated[float | None, typer.Option(help="Draw among tokens at least so likely as the likeliest.")] = None,
    repetition_penalty: Annotated[float, typer.Option(help="Above 1, repeated tokens become less likely.")] = 1.0,
    seed: Annotated[int | None, typer.Option(help="Makes drawing repeatable.")] = None,
    device: Device = None,
    dtype: Dtype = None,
    as_json: Json = False,
) -> None:
    """Continue a text."""
    import limbeck
    from limbeck.devices import choose_device, choose_dtype

    place, number_format = choose_device(device), choose_dtype(dtype)
    texts = limbeck.generate(
        limbeck.load_model(model, dtype=number_format, device=place),
        limbeck.load_tokenizer(model),
        prompts,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        seed=seed,
    )
    if as_json:
        _print_json(
            {"model": model, "continuations": [{"prompt": p, "text": t} for p, t in zip(prompts, texts, strict=True)]}
        )
    else:
        print("\n\n".join(prompt + text for prompt, text in zip(prompts, texts, strict=True)))


@app.command()
def recipes(
    name: Annotated[str | None, typer.Argument(help="Print this recipe as TOML, defaults filled in.")] = None,
    settings: Settings = None,
    as_json: Json = False,
) -> None:
    """List the recipes, or print one."""
    from limbeck.recipes import load_recipe, recipe_names, to_toml

    if name is not None:
        recipe = load_recipe(name, settings or [])
        if as_json:
            _print_json(recipe.model_dump(mode="json"))
        else:
            print(to_toml(recipe), end="")
        return
    found = {name: load_recipe(name).description for name in recipe_names()}
    if as_json:
        _print_json(found)
    else:
        width = max(map(len, found))
        print("\n".join(f"{name:<{width}}  {description}" for name, description in found.items()))


@app.command()
def plan(
    recipe: Annotated[str, typer.Argument(help="A recipe's name (`limbeck recipes`) or a .toml file.")],
    settings: Settings = None,
    tokens: Annotated[int | None, typer.Option(help="Tokens of all stages together; they keep their shares.")] = None,
    as_json: Json = False,
) -> None:
    """Show what a recipe will do, stage by stage, before any of it is spent; needs no network and no data."""
    from limbeck.plan import plan as plan_of
    from limbeck.plan import plan_table
    from limbeck.recipes import load_recipe

    chosen = load_recipe(recipe, settings or [])
    if tokens is not None:
        chosen = chosen.scaled_to(tokens)
    if as_json:
        _print_json(plan_of(chosen))
    else:
        _print_table(plan_table(chosen))


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


def _mixer_options(settings: list[str]) -> dict[str, Any]:
    """Read ``mixer.d_state=128``; `convert` has no other settings."""
    from limbeck.errors import LimbeckError
    from limbeck.recipes import parse_override

    options = {}
    for text in settings:
        key, value = parse_override(text)
        if key[:2] != ("student", "mixer_kwargs") or len(key) != 3:
            raise LimbeckError(f"--set {text}", expected="an option of the mixer", hint="--set mixer.d_state=128")
        options[key[2]] = value
    return options


def _layers(text: str) -> list[int]:
    """Read ``4,10,16,22``."""
    from limbeck.errors import LimbeckError

    try:
        return [int(part) for part in text.split(",") if part.strip()]
    except ValueError:
        raise LimbeckError(
            f"--keep-attention {text!r}", expected="layer numbers with commas", hint="--keep-attention 4,10,16,22"
        ) from None


def _print_json(value: dict[str, Any]) -> None:
    print(json.dumps(_plain(value), ensure_ascii=False, allow_nan=False))


def _plain(value: Any) -> Any:
    """JSON has no NaN and no infinity: they become null."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _print_table(renderable: Any) -> None:
    from rich.console import Console

    Console().print(renderable)


if __name__ == "__main__":
    main()
