"""Commands that run recipes, and say what they would do."""

from pathlib import Path
from typing import Annotated

import typer

from limbeck_cli.options import Data, Device, Json, Settings, Teacher, app, print_json, print_table


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
        print_json(result.as_json())
    else:
        print_table(result.report())


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
    accept_changes: Annotated[
        bool, typer.Option("--accept-changes", help="Resume under a changed recipe, if finished stages stay valid.")
    ] = False,
    settings: Settings = None,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Run a recipe from teacher to student, stage by stage; resumes by itself after any interruption.

    Settings by name: --set stages.matrix.lr=1e-4. On several GPUs: torchrun --nproc-per-node N -m limbeck distill ….
    """
    from limbeck.recipes import distill as run_recipe
    from limbeck.recipes import load_recipe
    from limbeck.training import World

    with World.join(device) as world:
        result = run_recipe(
            load_recipe(recipe, settings or []),
            output=output,
            teacher=teacher,
            student=student,
            tokenizer=tokenizer,
            data=data,
            tokens=tokens,
            origin=origin,
            accept_changes=accept_changes,
            world=world,
        )
    if not world.main:
        return
    if as_json:
        stages = {name: str(folder) for name, folder in result.stages.items()}
        print_json({"output": str(result.output), "student": str(result.student), "stages": stages})
    else:
        print(f"student in {result.student}")


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
            print_json(recipe.model_dump(mode="json"))
        else:
            print(to_toml(recipe), end="")
        return
    found = {name: load_recipe(name).description for name in recipe_names()}
    if as_json:
        print_json(found)
    else:
        width = max(map(len, found))
        print("\n".join(f"{name:<{width}}  {description}" for name, description in found.items()))


@app.command()
def plan(
    recipe: Annotated[str, typer.Argument(help="A recipe's name (`limbeck recipes`) or a .toml file.")],
    teacher: Teacher = None,
    gpu: Annotated[str | None, typer.Option(help="A card that was measured, such as H200: for hours and fit.")] = None,
    gpus: Annotated[int, typer.Option(help="How many of them.")] = 1,
    parallel: Annotated[
        str | None, typer.Option(help="auto, ddp or fsdp: whether each has a copy.  [default: the recipe's]")
    ] = None,
    price_per_hour: Annotated[float | None, typer.Option(help="Of one GPU, in any currency.")] = None,
    settings: Settings = None,
    tokens: Annotated[int | None, typer.Option(help="Tokens of all stages together; they keep their shares.")] = None,
    as_json: Json = False,
) -> None:
    """Show what a recipe will do and take, stage by stage, before any of it is spent; needs no network and no data."""
    from limbeck.plan import estimate, plan_table
    from limbeck.plan import plan as plan_of
    from limbeck.recipes import load_recipe

    chosen = load_recipe(recipe, settings or [])
    if tokens is not None:
        chosen = chosen.scaled_to(tokens)
    estimated = estimate(chosen, teacher=teacher, gpu=gpu, gpus=gpus, parallel=parallel, price_per_hour=price_per_hour)
    if as_json:
        print_json(plan_of(chosen) | {"estimate": estimated})
    else:
        print_table(plan_table(chosen, estimated))
