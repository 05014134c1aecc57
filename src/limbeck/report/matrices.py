"""Matrices as pictures: for every head of a layer the teacher's attention above the student's mixing matrix."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from limbeck.errors import LimbeckError, unknown
from limbeck.files import replacing

ACROSS = 8
"""Heads in one band; a layer with more has several."""

FORMATS = ("png", "svg")
INK, QUIET, FRAME, FUTURE = "#22272e", "#5b6470", "#b9c0c9", "#eef0f2"
ABOVE = ("#ffffff", "#d8e6f2", "#9dc3e0", "#5597c8", "#1f66a5", "#08306b")
BELOW = ("#5c2503", "#a8480a", "#dd7a2a", "#f4b27b", "#fbe1ca", "#ffffff")
INCHES, GAP, WORDS = 1.45, 0.14, 0.56  # of a matrix, between two, under a pair
LEFT, RIGHT, TOP, BETWEEN = 0.45, 0.75, 0.78, 0.3
TOKENS = 0.42  # room for tokens that are written out
NARROWEST = 4.6  # so that the heading fits
LABELLED = 16  # tokens up to which they are written out
STEEPNESS = 0.5  # colours follow this power of a value, so that weak entries show


def matrices_picture(inspection: Mapping[str, Any], layer: int) -> Any:
    """Draw one layer of an inspection.

    A column a head: the teacher's attention, below it the student's matrix, below that how far apart they are and how
    long the head remembers. All share one scale of colours: white at zero, blue above; below zero, where attention
    cannot be, orange. What lies in the future is grey.

    Args:
        inspection: As `Inspection.as_json` gives it.
        layer: The layer's number.

    Returns:
        A matplotlib Figure; ``figure.savefig("layer.png", dpi=200)``.

    Raises:
        LimbeckError: The layer is not in the inspection, or matplotlib is not installed.
    """
    figure_class = _matplotlib()
    found = next((entry for entry in inspection["layers"] if entry["layer"] == layer), None)
    if found is None:
        there = ", ".join(str(entry["layer"]) for entry in inspection["layers"])
        raise LimbeckError(f"no layer {layer} in this inspection", expected=f"one of {there}")
    heads = found["heads"]
    across, bands = min(len(heads), ACROSS), math.ceil(len(heads) / ACROSS)
    band = 2 * INCHES + GAP + WORDS + BETWEEN
    margin = LEFT + (TOKENS if _written_out(inspection) else 0.0)
    right = margin + across * (INCHES + GAP) - GAP
    width = max(right + RIGHT, NARROWEST)
    height = TOP + bands * band - BETWEEN
    figure = figure_class(figsize=(width, height), facecolor="white")
    colours, norm, most, least = _colours(heads)
    image = None
    for place, head in enumerate(heads):
        left = margin + place % ACROSS * (INCHES + GAP)
        top = height - TOP - place // ACROSS * band
        first = place % ACROSS == 0
        for row, role in enumerate(("teacher", "student")):
            bottom = top - (row + 1) * INCHES - row * GAP
            axes = figure.add_axes((left / width, bottom / height, INCHES / width, INCHES / height))
            drawn = _matrix(axes, head[role], colours, norm)
            image = drawn if drawn is not None else image
            if first:
                place_of = ((LEFT - 0.2) / width, (bottom + INCHES / 2) / height)
                figure.text(*place_of, role, rotation=90, ha="center", va="center", color=INK, fontsize=9)
            if row == 0:
                axes.set_title(f"head {head['head']}", color=INK, fontsize=9, pad=4)
            if first and drawn is not None and _written_out(inspection):
                _name_tokens(axes, inspection["tokens"])
        middle = (left + INCHES / 2) / width
        bottom = top - 2 * INCHES - GAP
        for line, (words, ink) in enumerate(zip(_captions(head, found), (INK, QUIET), strict=True)):
            figure.text(middle, (bottom - 0.08 - 0.17 * line) / height, words, **_small(ink))
    _heading(figure, inspection, found, width, height)
    if image is not None:
        _scale(figure, image, right, (width, height), most, least)
    return figure


def write_matrices(inspection: Mapping[str, Any], folder: str | Path, form: str = "png", dpi: int = 200) -> list[Path]:
    """Draw every layer of an inspection into a folder: ``layer-00.png`` and so on.

    Args:
        inspection: As `Inspection.as_json` gives it.
        folder: Made where it is missing; pictures of the same name are replaced.
        form: ``"png"`` or ``"svg"``.
        dpi: Dots per inch of a PNG.

    Returns:
        The files.

    Raises:
        LimbeckError: The form is another, or matplotlib is not installed.
    """
    check_form(form)
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    files = []
    for entry in inspection["layers"]:
        figure = matrices_picture(inspection, entry["layer"])
        file = target / f"layer-{entry['layer']:02d}.{form}"
        with replacing(file) as temporary:
            figure.savefig(temporary, dpi=dpi)
        files.append(file)
    return files


def check_form(form: str) -> None:
    """Refuse pictures that cannot be made, before the work that they would show.

    Args:
        form: ``"png"`` or ``"svg"``.

    Raises:
        LimbeckError: It is another, or matplotlib is not installed.
    """
    if form not in FORMATS:
        raise unknown("format of pictures", form, FORMATS)
    _matplotlib()


# --- parts of a picture -----------------------------------------------------------------------------------------------


def _matplotlib() -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise LimbeckError(
            "pictures need matplotlib, which is not installed", hint="pip install 'limbeck[report]'"
        ) from None
    return Figure


def _colours(heads: list[Mapping[str, Any]]) -> tuple[Any, Any, float, float]:
    """One colour map and norm for all matrices of a layer, and the greatest and the least value."""
    from matplotlib.colors import FuncNorm, LinearSegmentedColormap

    arrays = [_array(head[role]) for head in heads for role in ("teacher", "student") if head[role] is not None]
    values = np.concatenate([array[np.isfinite(array)] for array in arrays]) if arrays else np.zeros(1)
    # The few entries beyond the 99.9th percentile do not make all others pale.
    most = max(float(np.quantile(values, 0.999)), 1e-6)
    least = min(float(np.quantile(values, 0.001)), 0.0)
    reach = max(most, -least)
    colours = LinearSegmentedColormap.from_list("limbeck", BELOW + ABOVE[1:], N=511).with_extremes(bad=FUTURE)

    def forward(value: Any) -> Any:
        return np.sign(value) * np.abs(value) ** STEEPNESS

    def backward(value: Any) -> Any:
        return np.sign(value) * np.abs(value) ** (1 / STEEPNESS)

    return colours, FuncNorm((forward, backward), vmin=-reach, vmax=reach), most, least


def _array(rows: list[list[float]]) -> np.ndarray:
    """A matrix without its future: (s, s), NaN above the diagonal."""
    matrix = np.array(rows, dtype=float)
    matrix[np.triu_indices(len(matrix), 1)] = np.nan
    return matrix


def _matrix(axes: Any, rows: list[list[float]] | None, colours: Any, norm: Any) -> Any:
    axes.set_xticks([])
    axes.set_yticks([])
    for side in axes.spines.values():
        side.set(color=FRAME, linewidth=0.6)
    if rows is None:
        axes.set_facecolor("white")
        axes.text(0.5, 0.5, "no matrix", transform=axes.transAxes, **_small(QUIET, "center"))
        return None
    return axes.imshow(_array(rows), cmap=colours, norm=norm, interpolation="nearest", aspect="auto")


def _small(ink: str, va: str = "top") -> dict[str, Any]:
    return {"ha": "center", "va": va, "fontsize": 7.5, "color": ink}


def _captions(head: Mapping[str, Any], layer: Mapping[str, Any]) -> tuple[str, str]:
    distance = "no distance" if head["distance"] is None else f"distance {head['distance']:.3g}"
    if head["decay_length"] is None:
        return distance, "" if layer.get("mixer") else "attention kept"
    return distance, f"fades in {_tokens(head['decay_length'])}"


def _tokens(length: float) -> str:
    return f"{length:.1f} tokens" if length < 10 else f"{length:,.0f} tokens"


def _written_out(inspection: Mapping[str, Any]) -> bool:
    return len(inspection["tokens"]) <= LABELLED


def _name_tokens(axes: Any, tokens: list[str]) -> None:
    axes.set_yticks(range(len(tokens)), [token.strip().replace("$", r"\$")[:5] for token in tokens])
    axes.tick_params(length=0, labelsize=5, labelcolor=QUIET, pad=2)


def _heading(figure: Any, inspection: Mapping[str, Any], layer: Mapping[str, Any], width: float, height: float) -> None:
    title = layer.get("mixer") or "attention kept"
    figure.text(
        LEFT / width,
        (height - 0.16) / height,
        f"Layer {layer['layer']}: {title}",
        ha="left",
        va="top",
        fontsize=11,
        fontweight="bold",
        color=INK,
    )
    count = len(inspection["tokens"])
    shown = max((len(head[r]) for head in layer["heads"] for r in ("teacher", "student") if head[r]), default=0)
    pooled = f", shown as {shown} × {shown}" if shown < count else ""
    words = f"{count} tokens{pooled}; rows are queries, from the top; columns are keys"
    if layer.get("note"):
        words = f"{count} tokens; {layer['note']}"
    figure.text(LEFT / width, (height - 0.38) / height, words, ha="left", va="top", fontsize=7.5, color=QUIET)


def _scale(figure: Any, image: Any, right: float, size: tuple[float, float], most: float, least: float) -> None:
    width, height = size
    left, tall = right + 0.2, 2 * INCHES + GAP
    axes = figure.add_axes((left / width, (height - TOP - tall) / height, 0.11 / width, tall / height))
    bar = figure.colorbar(image, cax=axes)
    axes.set_ylim(least, most)
    decades = [mantissa * 10.0**power for power in range(-6, 6) for mantissa in (1, 3)]
    ticks = [0.0, *(sign * value for sign in (-1, 1) for value in decades)]
    seen = [t for t in ticks if least <= t <= most and (not t or abs(t) > (most - least) / 60)]
    bar.set_ticks(seen, labels=[f"{tick:g}".replace("-", "−") for tick in seen])
    bar.outline.set(edgecolor=FRAME, linewidth=0.6)
    axes.tick_params(length=2, labelsize=7, labelcolor=QUIET, color=FRAME)
    axes.minorticks_off()
