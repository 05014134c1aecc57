"""The report's pictures of what was measured on finished models: comparison, positions, recall, matrices, speed."""

import base64
import math
import statistics
import struct
import zlib
from collections.abc import Sequence
from typing import Any

from markupsafe import Markup, escape

from limbeck.report.curves import Figure, Table
from limbeck.report.svg import Axis, Line, bar_chart, line_chart, short

TASKS = {
    "mqar": "Associative recall",
    "copy": "Copying",
    "needle": "Needle in a haystack",
    "repeat": "Repetition in context",
}
HEADS = 6  # of a layer that are shown, those furthest from the teacher


def comparison(results: dict[str, Any]) -> tuple[Figure, Table]:
    """The demo's comparison: the perplexity of every model as bars, and with the share of the gap as a table."""
    rows, table = [], []
    teacher = results["perplexity"]["teacher"][0]
    for name, values in results["perplexity"].items():
        kind = "teacher" if name == "teacher" else "student" if name.startswith("student") else "faint"
        rows.append((name, values, kind))
        closed = [f"{100 * value:.0f}" for value in results.get("gap_closed", {}).get(name, [])]
        ratios = [f"{value / teacher:.3f}" for value in values]
        table.append([name, *(_range(found) for found in ([f"{v:.1f}" for v in values], ratios, closed))])
    words = ", ".join(f"{name} {short(statistics.fmean(values))}" for name, values, _ in rows)
    many = max(len(values) for _, values, _ in rows) > 1
    figure = Figure(
        "Perplexity on held-out files",
        bar_chart(rows, title=f"Perplexity on held-out files: {words}"),
        note="Lower is better." + (" Whiskers go from the best to the worst seed." if many else ""),
    )
    return figure, Table(["model", "perplexity", "× teacher", "gap closed, %"], table)


def position_figures(text: dict[str, Any]) -> list[Figure]:
    """How near the student is to the teacher, over the position in the sample."""
    parts, figures = text.get("by_position") or [], []
    for key, title, unit in (
        ("kl", "KL by position", "nats"),
        ("top1", "Same top token by position", "%"),
        ("nll", "Surprise by position", "nats"),
    ):
        scale = 100 if key == "top1" else 1
        points = [((p["from"] + p["to"]) / 2, p[key] * scale) for p in parts if p.get(key) is not None]
        if len(points) > 1:
            what = f"{short(points[0][1])} {unit} at the start of a sample, {short(points[-1][1])} {unit} at its end"
            chart = line_chart(
                [Line(title, points, dots=True)],
                Axis("position in the sample", log=points[-1][0] > 30 * points[0][0], form=tokens),
                Axis(unit, from_zero=key != "top1", form=lambda v: short(v)),
                title=f"{title}: {what}",
            )
            rows = [[f"{p['from']}–{p['to']}", short(p[key] * scale, 4)] for p in parts if p.get(key) is not None]
            figures.append(Figure(title, chart, Table(["positions", unit], rows), f"{what}."))
    return figures


def recall_figures(recall: dict[str, Any]) -> list[Figure]:
    """A card a task with a heat map a model: exact answers over length, and over depth where the task has one."""
    figures = []
    for task, title in TASKS.items():
        maps, found = [], []
        for model, kind in zip(recall["models"], model_kinds(recall["models"]), strict=True):
            mine = [result for result in model["results"] if result["task"] == task]
            found += mine
            if mine:
                maps.append(_heat_map(mine, title, model["name"], kind))
        if found:
            chance = statistics.fmean(result["chance"] for result in found)
            guess = f"{short(100 * chance)} %" if chance >= 1e-4 else "less than 0.01 %"
            counts = sorted({result["count"] for result in found})
            questions = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
            note = f"Exact answers in %, {questions} questions a cell, over the length in tokens. "
            figures.append(Figure(title, Markup("").join(maps), None, note + f"By chance: {guess}."))
    return figures


def _heat_map(results: Sequence[dict[str, Any]], title: str, model: str, kind: str) -> Markup:
    lengths = sorted({result["length"] for result in results})
    depths = sorted({result["depth"] for result in results if result["depth"] is not None}) or [None]
    cells = {(result["depth"], result["length"]): result for result in results}
    head = "".join(f'<th scope="col">{tokens(length)}</th>' for length in lengths)
    rows = []
    for depth in depths:
        name = "" if depth is None else f"{depth:.0%}"
        row = [f'<th scope="row">{name}</th>']
        for length in lengths:
            cell = cells.get((depth, length))
            if cell is None or not cell["count"]:
                row.append("<td>–</td>")
            else:
                share = cell["correct"] / cell["count"]
                row.append(f'<td style="--share:{100 * share:.0f}%">{100 * share:.0f}</td>')
        rows.append(f"<tr>{''.join(row)}</tr>")
    corner = "depth" if depths != [None] else ""
    caption = f'<caption class="{kind}">{escape(model)}</caption>'
    table = f'<thead><tr><th scope="col">{corner}</th>{head}</tr></thead><tbody>{"".join(rows)}</tbody>'
    return Markup(f'<table class="heat" aria-label="{escape(title)}, {escape(model)}">{caption}{table}</table>')


def bench_figures(bench: dict[str, Any]) -> list[Figure]:
    """Speed and memory of every model against the context, at the smallest batch that was measured."""
    figures = []
    batch = min((point["batch"] for model in bench["models"] for point in model["points"]), default=0)
    kinds = model_kinds(bench["models"])
    for key, title, unit, scale in (
        ("step_seconds", "Time of one step", "ms", 1e3),
        ("cache_bytes", "Memory of the state", "MiB", 2**-20),
        ("prefill_tokens_per_second", "Reading a prompt", "tokens/s", 1),
        ("first_token_seconds", "Time to the first token", "ms", 1e3),
        ("decode_tokens_per_second", "Writing", "tokens/s", 1),
        ("peak_bytes", "Peak memory", "MiB", 2**-20),
    ):
        lines = []
        for model, kind in zip(bench["models"], kinds, strict=True):
            mine = sorted((p for p in model["points"] if p["batch"] == batch), key=lambda point: point["context"])
            points = [(p["context"], p[key] * scale) for p in mine if p.get(key) is not None]
            if points:
                lines.append(Line(model["name"], points, kind, dots=True))
        if lines:
            figures.append(_bench_figure(lines, title, unit, batch))
    return figures


def _bench_figure(lines: list[Line], title: str, unit: str, batch: int) -> Figure:
    contexts = sorted({x for line in lines for x, _ in line.points})
    values = [y for line in lines for _, y in line.points if y]
    log = bool(values) and max(values) > 20 * min(values)
    words = "; ".join(
        f"{line.name} {short(line.points[0][1])} at {tokens(line.points[0][0])}, {short(line.points[-1][1])} at "
        f"{tokens(line.points[-1][0])}"
        for line in lines
    )
    chart = line_chart(
        lines,
        Axis("tokens of context", log=True, ticks=contexts, form=tokens),
        Axis(unit, log=log, from_zero=True),
        title=f"{title} in {unit}, batch {batch}: {words}",
    )
    found = [dict(line.points) for line in lines]
    rows = [[tokens(x), *(short(points.get(x), 4) for points in found)] for x in contexts]
    table = Table(["context", *(line.name for line in lines)], rows)
    legend = [(line.name, line.kind) for line in lines]
    return Figure(f"{title}, {unit}", chart, table, f"Batch {batch}.", legend)


def model_kinds(models: Sequence[dict[str, Any]]) -> list[str]:
    """A CSS class for every model: the teacher's, the first student's, and others'."""
    kinds, others = [], 0
    for model in models:
        role = model.get("role")
        if role in ("teacher", "student") and role not in kinds:
            kinds.append(role)
        else:
            others += 1
            kinds.append(f"other-{min(others, 3)}")
    return kinds


def matrix_layers(inspection: dict[str, Any]) -> list[dict[str, Any]]:
    """Every layer with its heads: two pictures a head for those furthest apart, numbers for all."""
    layers = []
    for layer in inspection["layers"]:
        heads = [head for head in layer["heads"] if head["teacher"] or head["student"]]
        heads.sort(key=lambda head: -1.0 if head["distance"] is None else head["distance"], reverse=True)
        shown = sorted(heads[:HEADS], key=lambda head: head["head"])
        pairs = [
            {
                "head": head["head"],
                "distance": short(head["distance"]),
                "sides": [(side, matrix_png(head[side])) for side in ("teacher", "student") if head[side] is not None],
            }
            for head in shown
        ]
        rows = [
            [str(head["head"]), short(head["distance"]), short(head.get("decay_length"))] for head in layer["heads"]
        ]
        left_out = len(heads) - len(shown)
        notes = [f"The {len(shown)} heads furthest from the teacher, of {len(heads)}."] if left_out else []
        notes += [layer["note"]] if layer.get("note") else []
        table = Table(["head", "distance", "decay length"], rows)
        layers.append({"layer": layer["layer"], "pairs": pairs, "table": table, "note": " ".join(notes)})
    return layers


def matrix_png(matrix: Sequence[Sequence[float]]) -> str:
    """A matrix as a PNG in a data address: copper above zero, blue below, clearer the nearer to zero.

    What is see-through lets the page's own ground shine, so that one picture suits light and dark.
    """
    greatest = max((abs(value) for row in matrix for value in row), default=0.0) or 1.0
    pixels = bytearray()
    for row in matrix:
        pixels.append(0)  # no filter
        for value in row:
            depth = round(255 * math.sqrt(min(abs(value) / greatest, 1.0)))
            pixels += bytes((196, 98, 45, depth) if value >= 0 else (74, 122, 178, depth))
    size = struct.pack(">IIBBBBB", len(matrix[0]), len(matrix), 8, 6, 0, 0, 0)
    body = _chunk(b"IHDR", size) + _chunk(b"IDAT", zlib.compress(bytes(pixels), 9)) + _chunk(b"IEND", b"")
    return "data:image/png;base64," + base64.b64encode(b"\x89PNG\r\n\x1a\n" + body).decode()


def _chunk(name: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def tokens(count: float) -> str:
    """A number of tokens: 512, 2k, 16k."""
    whole = round(count)
    return f"{whole // 1024}k" if whole >= 1024 and whole % 1024 == 0 else short(count)


def _range(values: Sequence[str]) -> str:
    """One value, or the least and the greatest."""
    found = sorted(set(values), key=float)
    return " to ".join(found[:1] + found[1:][-1:]).replace("-", "\N{MINUS SIGN}")
