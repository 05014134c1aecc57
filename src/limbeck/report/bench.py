"""The chart of `limbeck bench`: what the cache holds and what a step takes, against the context, as SVG or PNG."""

import importlib.util
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from limbeck.errors import LimbeckError
from limbeck.files import replacing

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

ENDINGS = (".svg", ".png", ".pdf")
INK, GRID = "#767a81", "#767a8140"  # as clear on white as on black
TEACHER, STUDENT, OTHERS = "#3f84c8", "#c9652f", ("#8a7bc8", "#3a9a76", "#a58a2a")
MARKS, DASHES = "osD^v", ((0, ()), (0, (5, 2)), (0, (1.5, 1.5)), (0, (6, 2, 1.5, 2)))
LETTER = 9.5
APART = 26.0  # points between two labels at the end of lines
MARGIN, PANEL, BELOW, ABOVE = 0.68, 3.15, 0.58, 0.68  # inches: left of a panel, its width, below it, above it


@dataclass(frozen=True)
class Series:
    """One line of a panel: contexts, values, and how it looks."""

    label: str
    contexts: list[int]
    values: list[float]
    colour: str
    mark: str
    dash: Any


def check_chart_path(path: Path) -> None:
    """Refuse a chart before anything is measured.

    Raises:
        LimbeckError: The ending is no picture's, the folder is not there, or matplotlib is missing.
    """
    if path.suffix.lower() not in ENDINGS:
        raise LimbeckError(f"--chart {path}", expected=f"a file ending in {', '.join(ENDINGS)}")
    if not path.parent.is_dir():
        raise LimbeckError(f"--chart {path}: there is no folder {path.parent}", expected="a folder that exists")
    if importlib.util.find_spec("matplotlib") is None:
        raise LimbeckError("a chart needs matplotlib, which is not installed", hint="pip install 'limbeck[report]'")


def save_bench_chart(bench: dict[str, Any], path: Path) -> None:
    """Draw the chart and write it; see-through, so that it suits light and dark pages.

    Args:
        bench: As `limbeck.evaluation.Bench.as_json` gives it.
        path: A .svg, .png or .pdf file, written whole or not at all.

    Raises:
        LimbeckError: As for `check_chart_path`, or nothing was measured.
    """
    check_chart_path(path)
    import matplotlib

    figure = bench_chart(bench)
    about: dict[str, Any] = {"Title": "Cache memory and time of a decode step against context"}
    if path.suffix.lower() == ".svg":
        about |= {"Date": None, "Description": in_words(bench)}
    # Letters stay letters in an SVG: smaller, sharper, and readers for the blind can read them.
    with replacing(path) as temporary, matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "limbeck"}):
        figure.savefig(temporary, dpi=200, metadata=about)


def bench_chart(bench: dict[str, Any]) -> "Figure":
    """Draw cache memory and decode step time against context, both logarithmic, one line a model and batch.

    Args:
        bench: As `limbeck.evaluation.Bench.as_json` gives it.

    Returns:
        A figure of two panels on a see-through ground; each line carries its name and its last value at its end.

    Raises:
        LimbeckError: Nothing was measured, or matplotlib is missing.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise LimbeckError("a chart needs matplotlib, which is not installed", hint="pip install 'limbeck[report]'")
    from matplotlib.figure import Figure

    if not any(model["points"] for model in bench["models"]):
        raise LimbeckError("nothing was measured", expected="at least one point of one model")
    lines = _series(bench, "cache_bytes")
    names = max(0.95, 0.35 + 0.085 * max(len(line.label) for line in lines))  # inches for what stands at the ends
    tall = max(2.45, (APART * len(lines) + 8) / 72)
    width, height = 2 * (MARGIN + PANEL + names), tall + BELOW + ABOVE
    figure = Figure(figsize=(width, height), facecolor="none")
    left, right = (
        figure.add_axes((start / width, BELOW / height, PANEL / width, tall / height))
        for start in (MARGIN, 2 * MARGIN + PANEL + names)
    )
    _panel(left, lines, "Memory of the cache", binary, base=2)
    _panel(right, _series(bench, "step_seconds"), "Time of one decode step", duration, base=10)
    batches = sorted({point["batch"] for model in bench["models"] for point in model["points"]})
    words = f"batch {batches[0]}, " if len(batches) == 1 else ""
    for axes in (left, right):
        _text(axes, (0, 1), (-34, 15), words + where(bench), INK, LETTER, "normal")
    return figure


def in_words(bench: dict[str, Any]) -> str:
    """What the chart shows, for those who do not see it."""
    parts = []
    for key, form in (("cache_bytes", binary), ("step_seconds", duration)):
        for line in _series(bench, key):
            ends = ", ".join(f"{form(line.values[at])} at {line.contexts[at]} tokens" for at in (0, -1))
            parts.append(f"{line.label}, {'cache' if key == 'cache_bytes' else 'step'}: {ends}")
    return "; ".join(parts) + "."


def where(bench: dict[str, Any]) -> str:
    """Number format and device; of each model where they differ."""
    found = [f"{model['dtype']}, {model['device']}" for model in bench["models"]]
    if len(set(found)) == 1:
        return found[0]
    return "; ".join(f"{label} {words}" for label, words in zip(model_labels(bench), found, strict=True))


def model_labels(bench: dict[str, Any]) -> list[str]:
    """A short name for each model: its role where only it has that role, else the end of its path that tells it apart.

    Two models with the same path are numbered.
    """
    models = bench["models"]
    roles, paths = [model["role"] for model in models], [Path(model["name"]).parts for model in models]
    labels = []
    for role, path in zip(roles, paths, strict=True):
        label = role
        if role == "model" or roles.count(role) > 1:
            others = [other for other in paths if other != path]
            lengths = range(1, len(path) + 1)
            length = next((n for n in lengths if all(other[-n:] != path[-n:] for other in others)), len(path))
            label = "/".join(path[-length:])
        labels.append(label)
    return [
        f"{label} ({labels[: at + 1].count(label)})" if labels.count(label) > 1 else label
        for at, label in enumerate(labels)
    ]


def binary(count: float) -> str:
    """Bytes as people write them: 96 KiB, 1.5 MiB."""
    for size, unit in ((2**40, "TiB"), (2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if count >= size:
            return f"{count / size:.3g} {unit}" if count < 999.5 * size else f"{count / size:.0f} {unit}"
    return f"{count:.0f} B"


def duration(seconds: float) -> str:
    """A time as people write it: 85 µs, 0.86 ms, 3 s."""
    for least, size, unit in ((1.0, 1.0, "s"), (1e-4, 1e-3, "ms")):
        if seconds >= least * (1 - 1e-9):
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds * 1e6:.3g} µs"


# --- drawing --------------------------------------------------------------------------------------------------------


def _series(bench: dict[str, Any], key: str) -> list[Series]:
    """One line for each model and batch; a colour and a mark for a model, a dash for a batch."""
    labels, others = model_labels(bench), 0
    batches = sorted({point["batch"] for model in bench["models"] for point in model["points"]})
    roles = [model["role"] for model in bench["models"]]
    found = []
    for number, (label, model) in enumerate(zip(labels, bench["models"], strict=True)):
        if model["role"] in ("teacher", "student") and model["role"] not in roles[:number]:
            colour = TEACHER if model["role"] == "teacher" else STUDENT
        else:
            colour, others = OTHERS[others % len(OTHERS)], others + 1
        for place, batch in enumerate(batches):
            points = sorted((p["context"], p[key]) for p in model["points"] if p["batch"] == batch and p[key] > 0)
            name = label if len(batches) == 1 else f"{label}, batch {batch}"
            if points:
                contexts, values = [x for x, _ in points], [y for _, y in points]
                found.append(
                    Series(name, contexts, values, colour, MARKS[number % len(MARKS)], DASHES[place % len(DASHES)])
                )
    return found


def _panel(axes: "Axes", lines: Sequence[Series], title: str, form: Callable[[float], str], base: int) -> None:
    from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator

    from limbeck.report.charts import tokens

    axes.set_facecolor("none")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=base)
    for line in lines:
        axes.plot(
            line.contexts,
            line.values,
            color=line.colour,
            linewidth=2.2,
            linestyle=line.dash,
            marker=line.mark,
            markersize=5,
            solid_capstyle="round",
            clip_on=False,
        )
    contexts = sorted({x for line in lines for x in line.contexts})
    axes.xaxis.set_major_locator(FixedLocator(contexts[:: -(-len(contexts) // 9)]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: tokens(x)))
    _limits(axes, contexts, [y for line in lines for y in line.values])
    axes.yaxis.set_major_locator(LogLocator(base, subs=(1.0,) if base == 2 else (1.0, 2.0, 5.0), numticks=7))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: form(y)))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_minor_locator(NullLocator())
    axes.tick_params(colors=INK, labelsize=LETTER, length=0, pad=6)
    axes.grid(axis="y", color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    for side, spine in axes.spines.items():
        spine.set_visible(side == "bottom")
        spine.set_color(INK)
    axes.set_xlabel("tokens of context", color=INK, fontsize=LETTER, labelpad=6)
    _text(axes, (0, 1), (-34, 31), title, INK, 12.5, "bold")
    _label_ends(axes, lines, form)


def _limits(axes: "Axes", contexts: Sequence[int], values: Sequence[float]) -> None:
    """At least a factor of 8 upwards, so that noise in a flat line looks as small as it is."""
    low, high = min(values), max(values)
    room = max(1.35, (high / low) ** 0.1, (8 * low / high) ** 0.5)
    axes.set_ylim(low / room, high * room)
    if len(contexts) == 1:
        axes.set_xlim(contexts[0] / 2, contexts[0] * 2)
    else:
        axes.set_xlim(contexts[0] / 1.15, contexts[-1])


def _label_ends(axes: "Axes", lines: Sequence[Series], form: Callable[[float], str]) -> None:
    """Write each line's name and last value beside its end, moved apart where two would touch."""
    height = axes.get_window_extent().height * 72 / axes.figure.dpi  # in points
    bottom, top = (float(edge) for edge in axes.get_ylim())

    def place(line: Series) -> float:
        return height * math.log(line.values[-1] / bottom) / math.log(top / bottom)

    ordered = sorted(lines, key=place)
    places: list[float] = []
    for line in ordered:
        places.append(max(place(line), places[-1] + APART) if places else place(line))
    ceiling = height
    for number in reversed(range(len(places))):  # back down from the top, as far as is needed
        places[number] = min(places[number], ceiling)
        ceiling = places[number] - APART
    for line, at in zip(ordered, places, strict=True):
        _text(axes, (1, 0), (10, at + 5), line.label, line.colour, LETTER + 0.5, "bold")
        _text(axes, (1, 0), (10, at - 7.5), form(line.values[-1]), line.colour, LETTER, "normal")


def _text(
    axes: "Axes",
    corner: tuple[float, float],
    shift: tuple[float, float],
    text: str,
    colour: str,
    size: float,
    weight: str,
) -> None:
    axes.annotate(
        text,
        corner,
        xycoords="axes fraction",
        xytext=shift,
        textcoords="offset points",
        color=colour,
        fontsize=size,
        fontweight=weight,
        va="center",
    )
