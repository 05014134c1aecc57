"""Errors that serve the reader: what was found, what was expected, what to try."""

import difflib
from collections.abc import Iterable


class LimbeckError(ValueError):
    """A mistake in what the user gave, told in three parts.

    The command line prints the message and exits with code 2.

    Args:
        found: What Limbeck met, with its path or value.
        expected: What would have been right.
        hint: What to try next.
    """

    def __init__(self, found: str, expected: str = "", hint: str = ""):
        self.found, self.expected, self.hint = found, expected, hint
        lines = [found]
        if expected:
            lines.append(f"expected: {expected}")
        if hint:
            lines.append(f"try: {hint}")
        super().__init__("\n".join(lines))


def unknown(kind: str, name: str, known: Iterable[str], hint: str = "") -> LimbeckError:
    """Build the error for a name that is not in a list: it shows the list, and the nearest name if one is near.

    Args:
        kind: What the name stands for, such as ``"mixer"``.
        name: The name that was given.
        known: The names that exist.
        hint: What to try, when no known name is near.
    """
    known = sorted(known)
    nearest = difflib.get_close_matches(name, known, n=1)
    return LimbeckError(
        f"unknown {kind} {name!r}",
        expected=f"one of {', '.join(known)}",
        hint=f"did you mean {nearest[0]!r}?" if nearest else hint,
    )
