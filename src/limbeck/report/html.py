"""The report of a run, or of a demo: one HTML file that holds all it needs."""

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from limbeck.files import write_text
from limbeck.report.charts import (
    bench_figures,
    comparison,
    matrix_layers,
    position_figures,
    recall_figures,
)
from limbeck.report.curves import (
    Figure,
    Table,
    curves_picture,
    held_out,
    held_out_figures,
    loss_figures,
    save_pictures,
)
from limbeck.report.read import DemoFigures, RunFigures, read_folder
from limbeck.report.svg import short


@dataclass(frozen=True)
class Section:
    """One section of the report; what it has none of stays empty.

    Attributes:
        id: Its address in the page.
        title: Its heading.
        lead: A sentence or two below the heading.
        figures: Pictures, side by side where there is room.
        tables: Tables with their captions.
        layers: Layers with pairs of matrices; see `limbeck.report.charts.matrix_layers`.
        samples: Prompts with what the teacher and the student wrote.
        texts: Pieces set in a monospaced face, such as the tables of a recipe.
    """

    id: str
    title: str
    lead: str = ""
    figures: list[Figure] = field(default_factory=list)
    tables: list[tuple[str, Table]] = field(default_factory=list)
    layers: list[dict[str, Any]] = field(default_factory=list)
    samples: list[dict[str, str]] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)


def write_report(
    folder: str | os.PathLike[str],
    output: str | os.PathLike[str] | None = None,
    pictures: str | os.PathLike[str] | None = None,
) -> list[Path]:
    """Write the report of a run, finished or not, or of a demo.

    Args:
        folder: The run's folder, or the demo's.
        output: The HTML file; by default `report.html` in the folder.
        pictures: A folder for the key pictures as PNG and SVG; left out, there are none.

    Returns:
        The files that were written, the report first.

    Raises:
        LimbeckError: The folder holds neither a run nor a demo, or matplotlib is missing for the pictures.
    """
    found = read_folder(folder)
    path = Path(folder) / "report.html" if output is None else Path(output)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, report_html(found))
    return [path] if pictures is None else [path, *_save(found, Path(pictures))]


def report_html(found: RunFigures | DemoFigures) -> str:
    """The whole page."""
    demo = found if isinstance(found, DemoFigures) else None
    run = next(iter(demo.runs.values()), None) if demo else found
    assert run is None or isinstance(run, RunFigures)
    missing: list[tuple[str, str]] = []
    sections = [] if run is None else _run_sections(run, missing, in_demo=demo is not None)
    if demo:
        compared, written = _demo_sections(demo)
        sections = [compared, *sections[:1], written, *sections[1:]]
    name = "The demo" if demo else str(run and run.recipe.get("name", run.path.name))
    environment = Environment(
        loader=PackageLoader("limbeck.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("report.html.j2").render(
        title=name,
        subtitle=run.recipe.get("description", "") if run else "",
        folder=str(found.path),
        facts=_facts(run, demo),
        sections=sections,
        missing=missing,
    )


def _facts(run: RunFigures | None, demo: DemoFigures | None) -> list[tuple[str, str]]:
    """What stands at the head of the page: at most six figures."""
    facts = []
    if demo:
        results, teacher = demo.results, demo.results["perplexity"]["teacher"][0]
        last = [name for name in results["perplexity"] if name.startswith("student, after ")][-1]
        mean = {name: sum(values) / len(values) for name, values in results["agreement"].items()}
        student = sum(results["perplexity"][last]) / len(results["perplexity"][last])
        facts += [("perplexity, teacher", short(teacher)), ("perplexity, student", short(student))]
        facts += [("same top token", f"{short(100 * mean['top1'])} %"), ("KL, nats per token", short(mean["kl"]))]
    if run is None:
        return facts
    rows = held_out(run)
    if rows and not demo:
        last = rows[-1][1]
        facts.append(("held-out perplexity", short(last.get("eval_perplexity"))))
        if last.get("eval_top1") is not None:
            facts.append(("same top token", f"{short(100 * last['eval_top1'])} %"))
    swapped, kept = run.conversion.get("swapped_layers"), run.conversion.get("kept_attention", [])
    if swapped is not None:
        facts.append(("layers swapped", f"{len(swapped)} of {len(swapped) + len(kept)}"))
    done = [stage.updates[-1] for stage in run.stages if stage.updates]
    facts.append(("tokens learned from", short(sum(line["tokens"] for line in done))))
    if not demo and (ended := sum(bool(stage.seal) for stage in run.stages)) < len(run.stages):
        facts.append(("stages ended", f"{ended} of {len(run.stages)}"))
    return facts


def _demo_sections(demo: DemoFigures) -> tuple[Section, Section]:
    seeds = max(len(values) for values in demo.results["perplexity"].values())
    students = "One student each way" if seeds == 1 else f"{seeds} students each way, one seed apart"
    lead = (
        f"{students}. The same network without attention, trained on as many tokens, is the floor; the control spends "
        "all tokens on the last stage."
    )
    figure, table = comparison(demo.results)
    return (
        Section("comparison", "What was kept", lead, [figure], [("Every model", table)]),
        Section("samples", "What they write", "The same prompts, sampled.", samples=demo.results.get("samples", [])),
    )


def _run_sections(run: RunFigures, missing: list[tuple[str, str]], in_demo: bool) -> list[Section]:
    """Every section that the run has something for; the others become a line in `missing`."""
    lead = f"The loss of every stage of {run.path.name} in {run.path.parent.name}/." if in_demo else ""
    sections = [Section("learning", "How it learned", lead, loss_figures(run))]
    mixer = run.recipe.get("student", {}).get("mixer", "the mixer")
    matrices = (
        f"The teacher's attention beside the matrix of {mixer}. Copper is above zero, blue below; deeper is larger."
    )
    found = run.evaluation
    for section, hint in (
        (
            Section("held-out", "On held-out text", "Every stage's student.", held_out_figures(run)),
            "limbeck distill … --set evaluation.every=0.1",
        ),
        (
            Section("positions", "Along a sample", figures=position_figures(found.get("text", {}))),
            "limbeck evaluate … --save-to RUN",
        ),
        (
            Section("recall", "Recall", figures=recall_figures(found["recall"]) if "recall" in found else []),
            "limbeck recall … --save-to RUN",
        ),
        (
            Section("bench", "Speed and memory", figures=bench_figures(found["bench"]) if "bench" in found else []),
            "evaluation/bench.json is not there",
        ),
        (
            Section(
                "matrices",
                "The matrices",
                matrices,
                layers=matrix_layers(found["inspect"]) if "inspect" in found else [],
            ),
            "limbeck inspect … --save-to RUN",
        ),
        (
            Section("learns", "What learned, what was frozen", tables=_learns(run)),
            "the stages' stage.json says nothing of it",
        ),
    ):
        if section.figures or section.tables or section.layers:
            sections.append(section)
        else:
            missing.append((section.title, hint))
    if not sections[0].figures:
        missing.insert(0, (sections.pop(0).title, "metrics.jsonl holds no updates yet"))
    sections.append(Section("recipe", "Recipe", texts=run.recipe_text.strip().split("\n\n")))
    rows = [[name, value] for name, value in [*_sources(run), *run.environment.items()]]
    sections.append(Section("environment", "Environment", tables=[("Where it ran", Table(["what", "value"], rows))]))
    if not run.environment:
        missing.append(("Versions and device", "the stages' stage.json says nothing of them"))
    return sections


def _learns(run: RunFigures) -> list[tuple[str, Table]]:
    """What learned and what was frozen in every stage, as the stages recorded it."""
    rows = [
        [
            f"{stage.name}: {row['name']}",
            f"{row['tensors']:,}",
            f"{row['parameters']:,}",
            "" if row["lr"] is None else f"{row['lr']:.3g}",
            "" if row["weight_decay"] is None else f"{row['weight_decay']:g}",
        ]
        for stage in run.stages
        for row in stage.seal.get("learns", [])
    ]
    columns = ["stage and group", "tensors", "parameters", "peak lr", "weight decay"]
    return [("Stage by stage", Table(columns, rows))] if rows else []


def _sources(run: RunFigures) -> list[tuple[str, str]]:
    """Teacher, tokenizer and data, as run.json names them."""
    rows = []
    for name in ("teacher", "student", "tokenizer", "data"):
        value = run.identity.get(name)
        for item in value if isinstance(value, list) else [value]:
            path = item.get("path") or item.get("id") or item.get("name") if isinstance(item, dict) else item
            if path:
                rows.append((name, str(path)))
    return rows


def _save(found: RunFigures | DemoFigures, folder: Path) -> list[Path]:
    """The key pictures: curves always, speed and matrices where they were measured."""
    run = next(iter(found.runs.values())) if isinstance(found, DemoFigures) else found
    pictures = {"curves": curves_picture(run)}
    bench = run.evaluation.get("bench", {"models": []})
    if any(model["points"] for model in bench["models"]):
        from limbeck.report.bench import bench_chart

        pictures["bench"] = bench_chart(bench)
    if "inspect" in run.evaluation:
        from limbeck.report.matrices import matrices_picture

        inspection = run.evaluation["inspect"]
        for layer in inspection["layers"]:
            pictures[f"matrices-{layer['layer']}"] = matrices_picture(inspection, layer["layer"])
    return save_pictures(pictures, folder)
