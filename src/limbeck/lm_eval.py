"""The stock ``lm_eval`` command with students known to it: ``python -m limbeck.lm_eval run --model hf …``.

Everything is the harness's own, from its options to its files; the import of limbeck makes ``pretrained=`` take our
folders. For tables of several models, and scores that are kept, see ``limbeck evaluate --tasks``.
"""

import sys

from limbeck.errors import LimbeckError
from limbeck.evaluation.tasks import harness


def main() -> None:
    """Run the command; without the extra, end with exit code 2."""
    try:
        harness()
    except LimbeckError as error:
        print(f"limbeck: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()


if __name__ == "__main__":
    main()
