"""Commands that make models and use them."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from limbeck_cli.options import Device, Dtype, Json, Settings, app, numbers, print_json


@app.command()
def convert(
    source: Annotated[str, typer.Argument(help="The teacher: a folder or a hub id.")],
    destination: Annotated[Path, typer.Argument(help="Folder for the student; must be new or empty.")],
    mixer: Annotated[str, typer.Option(help="What takes the place of attention.")] = "discrete-mamba2",
    keep_attention: Annotated[
        str, typer.Option(help="Layers that keep attention, from 0, such as 4,10,16,22; or auto:4, with --data.")
    ] = "",
    data: Annotated[Path | None, typer.Option(help="Text on which auto:4 scores the layers.")] = None,
    scored_by: Annotated[
        str | None, typer.Option(help="An aligned student that auto:4 scores.  [default: one that learned nothing]")
    ] = None,
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
    start = {"mixer": mixer, "init": init, "mixer_kwargs": options, "seed": seed}
    kept = _kept_layers(keep_attention, source, destination, data, scored_by, start)
    report = convert_folder(source, destination, keep_attention=kept, **start)
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
    stream: Annotated[bool, typer.Option("--stream", help="Print one prompt's text as it comes.")] = False,
    device: Device = None,
    dtype: Dtype = None,
    as_json: Json = False,
) -> None:
    """Continue a text."""
    from transformers import TextStreamer

    import limbeck
    from limbeck.devices import choose_device, choose_dtype

    if stream and (as_json or len(prompts) > 1):
        raise limbeck.LimbeckError(
            "--stream with " + ("--json" if as_json else f"{len(prompts)} prompts"), expected="one prompt, as text"
        )
    place, number_format = choose_device(device), choose_dtype(dtype)
    loaded = limbeck.load_model(model, dtype=number_format, device=place)
    tokenizer = limbeck.load_tokenizer(model)
    if stream:
        print(prompts[0], end="", flush=True)
    texts = limbeck.generate(
        loaded,
        tokenizer,
        prompts,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        seed=seed,
        streamer=TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True) if stream else None,
    )
    if as_json:
        print_json(
            {"model": model, "continuations": [{"prompt": p, "text": t} for p, t in zip(prompts, texts, strict=True)]}
        )
    elif not stream:
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


def _kept_layers(
    keep_attention: str, source: str, destination: Path, data: Path | None, scored_by: str | None, start: dict[str, Any]
) -> list[int]:
    """The layers that keep attention: given as numbers, or found by their scores."""
    from limbeck.errors import LimbeckError
    from limbeck.evaluation import auto_count, choose_layers, score_folder
    from limbeck.progress import say
    from limbeck.students import check_destination, load_config

    count = auto_count(keep_attention)
    if count is None:
        for name, value in (("--data", data), ("--scored-by", scored_by)):
            if value is not None:
                raise LimbeckError(f"{name} without scores to take", expected="it beside --keep-attention auto:4")
        return numbers("--keep-attention", keep_attention, int, "4,10,16,22")
    if data is None:
        raise LimbeckError(
            f"--keep-attention {keep_attention} without text to score the layers on",
            expected="--data with text (.txt, .md, .py, .jsonl, a folder) or a token file",
            hint="limbeck score-layers shows the scores alone",
        )
    check_destination(destination)
    if scored_by is None:
        say("layers are scored by a student that has learned nothing: --scored-by takes one that is aligned")
    elif getattr(config := load_config(scored_by), "swapped_layers", ()) != list(range(config.num_hidden_layers)):
        raise LimbeckError(f"{scored_by} has layers with attention", expected="a student with a mixer in every layer")
    scores = score_folder(source, scored_by, data, convert_options=start)
    say("\n".join(f"layer {score.layer}: KL falls by {score.gain:.4g} to {score.kl:.4g}" for score in scores))
    return choose_layers(scores, count)
