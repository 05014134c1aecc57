"""Writing a recipe back as TOML, so that a run's folder holds exactly what it ran."""

import json
from collections.abc import Mapping
from typing import Any

from limbeck.recipes.schema import Recipe


def to_toml(recipe: Recipe) -> str:
    """Write a whole recipe, defaults included, as TOML from which `load_recipe` makes the same recipe.

    Args:
        recipe: The recipe; what is left out in it (``None``) stays left out.
    """
    return "\n".join(_table("", recipe.model_dump())) + "\n"


def _table(path: str, table: Mapping[str, Any]) -> list[str]:
    """Write the values of a table, then its tables."""
    tables = {name: value for name, value in table.items() if isinstance(value, dict)}
    lines = [
        f"{_key(name)} = {_value(value)}" for name, value in table.items() if value is not None and name not in tables
    ]
    for name, value in tables.items():
        inner = f"{path}.{_key(name)}" if path else _key(name)
        lines += ["", f"[{inner}]", *_table(inner, value)]
    return lines


def _key(name: str) -> str:
    """Write a key, quoted where TOML asks for it."""
    return name if name.isascii() and name.replace("-", "").replace("_", "").isalnum() else _value(name)


def _value(value: Any) -> str:
    """Write one value; JSON's strings are TOML's, but for the delete character."""
    match value:
        case bool():
            return "true" if value else "false"
        case str():
            return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007F")
        case int() | float():
            return repr(value)
        case list() | tuple():
            return f"[{', '.join(_value(item) for item in value)}]"
        case dict():
            return f"{{{', '.join(f'{_key(name)} = {_value(item)}' for name, item in value.items())}}}"
    return str(value)  # dates and times, which TOML writes as Python does
