"""Reports: pictures and pages made of what evaluation has measured; plain dicts come in, no model is known here."""

import importlib.util
import os
from pathlib import Path

from limbeck.errors import LimbeckError


def write_report(
    folder: str | os.PathLike[str],
    output: str | os.PathLike[str] | None = None,
    pictures: str | os.PathLike[str] | None = None,
) -> list[Path]:
    """Write the report of a run, finished or not, or of a demo; see `limbeck.report.html.write_report`.

    Raises:
        LimbeckError: The folder holds neither a run nor a demo, or the extra `report` is not installed.
    """
    if not can_report():
        raise LimbeckError("a report needs jinja2, which is not installed", hint="pip install 'limbeck[report]'")
    from limbeck.report.html import write_report as write

    return write(folder, output, pictures)


def can_report() -> bool:
    """Whether the extra `report` is installed, as far as the HTML file needs it."""
    return importlib.util.find_spec("jinja2") is not None
