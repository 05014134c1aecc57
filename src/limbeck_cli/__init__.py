"""The `limbeck` command.

It imports limbeck inside each command, so that `--help` needs no torch. Results go to standard output, everything else
to standard error; a mistake in what was given ends with exit code 2 and one message.
"""

import sys

from limbeck_cli import bench, evaluation, layers, models, recall, report, runs, tokens
from limbeck_cli.options import app

__all__ = ["app", "bench", "evaluation", "layers", "main", "models", "recall", "report", "runs", "tokens"]


def main() -> None:
    """Run the command line; mistakes of the user end with exit code 2."""
    try:
        app()
    except ValueError as error:
        from limbeck.errors import LimbeckError

        if not isinstance(error, LimbeckError):
            raise
        print(f"limbeck: {error}", file=sys.stderr)
        raise SystemExit(2) from None
