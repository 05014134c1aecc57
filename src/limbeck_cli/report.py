"""The command that shows a run on one page."""

from pathlib import Path
from typing import Annotated

import typer

from limbeck_cli.options import Json, app, print_json


@app.command()
def report(
    run: Annotated[Path, typer.Argument(help="The folder of a run (`limbeck distill --output`), or of a demo.")],
    output: Annotated[Path | None, typer.Option(help="The HTML file.  [default: report.html in RUN]")] = None,
    pictures: Annotated[Path | None, typer.Option(help="A folder for the key pictures, as PNG and SVG.")] = None,
    as_json: Json = False,
) -> None:
    """Write all that a run left as one self-contained HTML file: curves, figures, matrices, recall, speed, recipe."""
    from limbeck.report import write_report

    files = write_report(run, output, pictures)
    if as_json:
        print_json({"report": str(files[0]), "pictures": [str(file) for file in files[1:]]})
    else:
        print(f"report in {files[0]}")
        for file in files[1:]:
            print(file)
