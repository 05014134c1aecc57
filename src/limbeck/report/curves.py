"""Pictures of how a run learned: the loss of every stage, and what the held-out text said after it."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from markupsafe import Markup

from limbeck.errors import LimbeckError
from limbeck.files import replacing
from limbeck.report.read import RunFigures, StageFigures
from limbeck.report.svg import Axis, Gate, Line, bar_chart, line_chart, short

FORMATS = ("png", "svg")
MEANINGS = {
    "matrix_per_layer": "distance of the matrices, per layer",
    "hidden_per_layer": "distance of the block outputs, per layer",
    "kl": "KL to the teacher, nats per token",
    "loss": "loss",
}
SPANS = 60  # means that a smooth curve is made of
ROWS = 24  # of a table that stands for a curve


@dataclass(frozen=True)
class Table:
    """Numbers in rows; the first column names the row."""

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Figure:
    """One picture of the report, with the numbers behind it.

    Attributes:
        title: What it shows, in a few words.
        picture: SVG, or a heat map as a table.
        table: The numbers behind it; None where the picture is a table itself.
        note: One line below.
        legend: Names and CSS classes of what is in the picture.
    """

    title: str
    picture: Markup
    table: Table | None = None
    note: str = ""
    legend: Sequence[tuple[str, str]] = field(default=())


def loss_figures(run: RunFigures) -> list[Figure]:
    """One curve a stage that has begun."""
    return [_loss_figure(stage) for stage in run.stages if stage.updates]


def _loss_figure(stage: StageFigures) -> Figure:
    name = stage.figure
    points = [(line["step"], line.get(name)) for line in stage.updates]
    gates, words = _gates(stage)
    lines, legend = curve_lines(points), [("one update", "student")]
    if len(lines) > 1:
        legend = [("mean of updates", "student"), ("single updates", "faint")]
    if gates:
        legend = [*legend, ("expected", "gate")]
    values = [y for _, y in points if y is not None and y > 0]
    log = bool(values) and max(values) > 8 * min(values)
    first, last = points[0][1], points[-1][1]
    what = f"{MEANINGS[name]}: {short(first)} at update {points[0][0]}, {short(last)} at update {points[-1][0]}"
    chart = line_chart(
        lines,
        Axis("update"),
        Axis(name, log=log, from_zero=not log),
        gates=gates,
        title=f"Loss of stage {stage.name}. {what}",
    )
    every = _thinned(stage.updates)
    extra = [key for key in ("ce", "kl", "grad_norm", "lr") if key != name and key in stage.updates[0]]
    rows = [[str(line["step"]), *(short(line.get(key), 4) for key in (name, *extra))] for line in every]
    left_out = "" if len(every) == len(stage.updates) else " All updates are in metrics.jsonl."
    note = f"{what}.{words}{left_out}"
    return Figure(stage.name, chart, Table(["update", name, *extra], rows), note[0].upper() + note[1:], legend)


def curve_lines(points: Sequence[tuple[float, float | None]]) -> list[Line]:
    """A curve as it is where it is short; behind a smooth one where it is long."""
    if len(points) <= 2 * SPANS:
        return [Line("one update", points)]
    return [
        Line("single updates", means(points, 6 * SPANS), "faint"),
        Line("mean of updates", means(points, SPANS)),
    ]


def means(points: Sequence[tuple[float, float | None]], count: int) -> list[tuple[float, float | None]]:
    """At most `count` points, each the mean of as many neighbours."""
    size = -(-len(points) // count)
    found = []
    for start in range(0, len(points), size):
        part = [(x, y) for x, y in points[start : start + size] if y is not None]
        if part:
            found.append((statistics.fmean(x for x, _ in part), statistics.fmean(y for _, y in part)))
    return found


def _gates(stage: StageFigures) -> tuple[list[Gate], str]:
    """The recipe's expected ranges, where it has them, and the same in words."""
    expect, gates, words = stage.settings.get("expect", {}), [], []
    total = stage.settings["tokens"] // stage.settings["tokens_per_step"]
    for name, x, when in (("start", 1, "first"), ("end", total, "last")):
        if expect.get(name) and (name == "start" or stage.updates[-1]["step"] == total):
            low, high = expect[name]
            gates.append(Gate(x, low, high))
            words.append(f"{short(low)} to {short(high)} at the {when}")
    return gates, f" The recipe expects {' and '.join(words)}." if words else ""


def _thinned(lines: Sequence[Any]) -> list[Any]:
    """At most `ROWS` lines, evenly spread, the first and the last among them."""
    if len(lines) <= ROWS:
        return list(lines)
    return [lines[round(i * (len(lines) - 1) / (ROWS - 1))] for i in range(ROWS)]


def held_out(run: RunFigures) -> list[tuple[str, dict[str, float]]]:
    """What the held-out text said of each stage's student, the student before the first stage included.

    Of a stage whose best weights were kept, it is the evaluation of those.
    """
    rows = []
    for stage in run.stages:
        if not rows and stage.evaluations and stage.evaluations[0]["step"] == 0:
            rows.append(("converted", stage.evaluations[0]))
        after = [line for line in stage.evaluations if line["step"]]
        kept = [line for line in after if line["step"] == stage.seal.get("weights_of_step")]
        if after:
            rows.append((f"after {stage.name}", (kept or after)[-1]))
    return rows


def held_out_figures(run: RunFigures) -> list[Figure]:
    """Perplexity and agreement per stage, and the perplexity over all updates."""
    rows, figures = held_out(run), []
    for key, title, form in (
        ("eval_perplexity", "Perplexity", "{}"),
        ("eval_kl", "KL to the teacher", "{} nats"),
        ("eval_top1", "Same top token", "{} %"),
    ):
        scale = 100 if key == "eval_top1" else 1
        found = [(name, line[key] * scale) for name, line in rows if line.get(key) is not None]
        if found:
            bars = [(name, [value], "student") for name, value in found]
            words = ", ".join(f"{name} {form.format(short(value))}" for name, value in found)
            chart = bar_chart(bars, title=f"{title} on held-out text: {words}", form=form)
            figures.append(Figure(title, chart, Table(["student", title], [[n, short(v, 4)] for n, v in found])))
    return figures


def curves_picture(run: RunFigures) -> Any:
    """The loss curves of all stages side by side, as a matplotlib Figure.

    Raises:
        LimbeckError: matplotlib is not installed, or the run has no updates.
    """
    try:
        from matplotlib.figure import Figure as Picture
    except ModuleNotFoundError:
        raise LimbeckError(
            "pictures need matplotlib, which is not installed", hint="pip install 'limbeck[report]'"
        ) from None
    stages = [stage for stage in run.stages if stage.updates]
    if not stages:
        raise LimbeckError(f"{run.path} has no updates yet", expected="a run that has begun to learn")
    picture = Picture(figsize=(4.2 * len(stages), 3.2), layout="constrained")
    for axes, stage in zip(picture.subplots(1, len(stages), squeeze=False)[0], stages, strict=True):
        points = [(line["step"], line.get(stage.figure)) for line in stage.updates]
        for line in curve_lines(points):
            drawn = [(x, y) for x, y in line.points if y is not None]
            colour, width = ("#e5c5ae", 0.8) if line.kind == "faint" else ("#a9531f", 1.8)
            axes.plot(*zip(*drawn, strict=True), color=colour, linewidth=width)
        for gate in _gates(stage)[0]:
            axes.plot([gate.x, gate.x], [gate.low, gate.high], color="#3f6b4f", alpha=0.3, linewidth=9)
        axes.set_title(stage.name, loc="left", fontsize=11)
        axes.set_xlabel("update", fontsize=9)
        axes.set_ylabel(MEANINGS[stage.figure], fontsize=9)
        axes.tick_params(labelsize=8)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="#e6e4df", linewidth=0.8)
    return picture


def save_pictures(pictures: Mapping[str, Any], folder: Path) -> list[Path]:
    """Write matplotlib Figures as PNG and SVG.

    Args:
        pictures: By name, without an ending.
        folder: Made where it is not there.

    Returns:
        The files.
    """
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for name, picture in pictures.items():
        for form in FORMATS:
            path = folder / f"{name}.{form}"
            with replacing(path) as temporary:
                picture.savefig(temporary, dpi=200)
            files.append(path)
    return files
