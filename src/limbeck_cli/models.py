"""Commands that make models and use them."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from limbeck_cli.options import Device, Dtype, Json, Settings, app, print_json


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
        print_json({"destination": str(destination), **asdict(report)})
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
        print_json({"destination": str(destination), **asdict(report)})
    else:
        print(report.summary())
        print(f"student in {destination}")


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
        print_json(
            {"model": model, "continuations": [{"prompt": p, "text": t} for p, t in zip(prompts, texts, strict=True)]}
        )
    else:
        print("\n\n".join(prompt + text for prompt, text in zip(prompts, texts, strict=True)))


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
