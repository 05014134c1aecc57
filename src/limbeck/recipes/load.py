"""Reading recipes: the ones in the package, the user's own files, and ``--set`` on top of either.

Every value remembers where it came from (a file, or a ``--set``), so that an error can name it.
"""

import copy
import difflib
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from limbeck.errors import LimbeckError, unknown
from limbeck.recipes.schema import (
    STAGES,
    DataTable,
    EngineTable,
    EvaluationTable,
    Recipe,
    StudentTable,
    Table,
    TrackingTable,
)

Key = tuple[str, ...]
LENGTHS = {"steps": "tokens", "tokens": "steps"}
ALIASES: Mapping[Key, Key] = {("mixer",): ("student", "mixer_kwargs")}
TABLES: Mapping[str, type[Table]] = {
    "": Recipe,
    "student": StudentTable,
    "data": DataTable,
    "evaluation": EvaluationTable,
    "engine": EngineTable,
    "tracking": TrackingTable,
    **{f"stages.{objective}": stage for objective, stage in STAGES.items()},
}
EXPECTED = {  # pydantic's kinds of error whose own words are not those of TOML
    "model_type": "a table",
    "dict_type": "a table",
    "union_tag_not_found": "a table",
    "union_tag_invalid": "a table",
    "model_attributes_type": "a table",
    "tuple_type": "an array",
    "missing": "a longer array",
    "too_long": "a shorter array",
    "int_type": "an integer",
    "float_type": "a number",
    "string_type": "a string",
    "bool_type": "true or false",
}


def recipe_names() -> list[str]:
    """List the recipes that come with Limbeck."""
    return sorted(entry.name.removesuffix(".toml") for entry in _folder().iterdir() if entry.name.endswith(".toml"))


def load_recipe(name_or_path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe and check all of it.

    A recipe may begin with ``extends = "another"`` (a name, or a path beside its own file): it then says only what
    differs. One with ``[[proportions]]`` has its sizes there, by ``data.proportion``.

    Args:
        name_or_path: One of `recipe_names`, or the path of a ``.toml`` file.
        overrides: Settings on top, such as ``"stages.matrix.lr=1e-4"``, the last one wins; ``mixer.X`` stands for
            ``student.mixer_kwargs.X``.

    Raises:
        LimbeckError: The recipe is not there, is no TOML, or has an unknown key or a wrong value.
    """
    document, origins = _read(name_or_path, Path(), ())
    settings = [(*parse_override(text), f"--set {text}") for text in overrides]
    _choose_proportion(document, origins, {key: value for key, value, _ in settings})
    for key, value, source in settings:
        _set(document, origins, key, value, source)
    try:
        return Recipe.model_validate(document)
    except ValidationError as error:
        raise _explain(error, document, origins) from None


def _choose_proportion(document: dict[str, Any], origins: dict[Key, str], settings: Mapping[Key, Any]) -> None:
    """Put the sizes of one of ``[[proportions]]`` into the document: the one with the wanted ``data.proportion``."""
    wanted_key = ("data", "proportion")
    if ("proportions",) not in origins:
        if wanted_key in settings:
            raise LimbeckError(
                f"--set data.proportion={settings[wanted_key]} for a recipe without [[proportions]]",
                expected="a recipe with sizes by proportion, such as cald-hybrid",
                hint="data.samples says how many samples are read",
            )
        return
    source = origins.pop(("proportions",))
    entries = [dict(_leaves(entry, ())) for entry in document.pop("proportions")]
    wanted = settings.get(wanted_key, document.get("data", {}).get("proportion"))
    chosen = next((entry for entry in entries if entry.get(wanted_key) == wanted), None)
    if chosen is None:
        said = {_spelled(key) for key in (*settings, *origins)}
        needed = sorted({_spelled(key) for entry in entries for key in entry} - said)
        if needed:
            known = ", ".join(str(entry.get(wanted_key)) for entry in entries)
            raise LimbeckError(
                f"data.proportion = {wanted} is not among the proportions of {source}",
                expected=f"one of {known}",
                hint=f"give {', '.join(needed)} with --set as well",
            )
        return
    said = {_spelled(key) for key in origins}
    for key, value in chosen.items():
        if _spelled(key) not in said:  # what a recipe says itself comes first
            _set(document, origins, key, value, source)


def _spelled(key: Key) -> str:
    """A key as the user writes it; the two ways to say how long a stage is count as one."""
    return ".".join((*key[:-1], "steps") if key[:1] == ("stages",) and key[-1] == "tokens" else key)


def parse_override(text: str) -> tuple[Key, Any]:
    """Split ``a.b=value``; the value is read as TOML, and as a plain string where it is none.

    Args:
        text: What the user gave to ``--set``.

    Returns:
        The key as a path, with the alias ``mixer`` resolved, and the value.
    """
    name, equals, raw = text.partition("=")
    key = tuple(part.strip() for part in name.split("."))
    if not equals or not all(key):
        raise LimbeckError(
            f"--set {text!r} is no setting", expected="KEY=VALUE", hint="for example --set stages.matrix.lr=1e-4"
        )
    for alias, path in ALIASES.items():
        if key[: len(alias)] == alias and len(key) > len(alias):
            key = path + key[len(alias) :]
    try:
        parsed = tomllib.loads(f"value = {raw}")
    except tomllib.TOMLDecodeError:
        parsed = {}
    return key, parsed["value"] if parsed.keys() == {"value"} else raw.strip()


def _folder() -> Traversable:
    return resources.files("limbeck.recipes")


def _locate(name_or_path: str | Path, beside: Path) -> Traversable:
    """Find the file of a recipe by name, or by path from the folder ``beside``."""
    text = str(name_or_path)
    path = beside / Path(text).expanduser()
    if path.is_file():
        return path
    if text in recipe_names():
        return _folder() / f"{text}.toml"
    if text.endswith(".toml") or len(Path(text).parts) > 1:
        raise LimbeckError(
            f"no recipe file {path}", expected="the path of a .toml file", hint="`limbeck recipes` lists the names"
        )
    raise unknown("recipe", text, recipe_names(), hint="or give the path of a .toml file")


def _read(name_or_path: str | Path, beside: Path, chain: tuple[str, ...]) -> tuple[dict[str, Any], dict[Key, str]]:
    """Read one file and what it extends; return the merged document and where each key came from."""
    file = _locate(name_or_path, beside)
    source = str(file)
    if source in chain:
        raise LimbeckError(f"recipes extend each other in a circle: {' → '.join((*chain, source))}")
    try:
        document = tomllib.loads(file.read_text(encoding="utf-8"))
    except tomllib.TOMLDecodeError as error:
        raise LimbeckError(f"{source} is no TOML: {error}", expected="a recipe in TOML") from None
    except UnicodeDecodeError as error:
        raise LimbeckError(f"{source} is no UTF-8 text: byte {error.start}", expected="a recipe in TOML") from None

    merged: dict[str, Any] = {}
    origins: dict[Key, str] = {}
    if "extends" in document:
        base = document.pop("extends")
        if not isinstance(base, str):
            raise LimbeckError(f"extends = {base!r} in {source}", expected="the name or path of a recipe")
        merged, origins = _read(base, Path(source).parent, (*chain, source))
    for key, value in _leaves(document, ()):
        _set(merged, origins, key, value, source)
    origins[()] = source
    return merged, origins


def _leaves(table: Mapping[str, Any], prefix: Key) -> Iterable[tuple[Key, Any]]:
    """Walk a document: every value that is not a filled table, with its path."""
    for name, value in table.items():
        if isinstance(value, dict) and value:
            yield from _leaves(value, (*prefix, name))
        else:
            yield (*prefix, name), value


def _set(document: dict[str, Any], origins: dict[Key, str], key: Key, value: Any, source: str) -> None:
    """Put a value at a path, making tables on the way, and remember its source."""
    table = document
    for depth, name in enumerate(key[:-1], start=1):
        table = table.setdefault(name, {})
        if not isinstance(table, dict):
            above = ".".join(key[:depth])
            raise LimbeckError(f"{'.'.join(key)} in {source}: {above} is a value, not a table", hint=f"{above} = …")
    table[key[-1]] = copy.deepcopy(value)
    replaced = [key]
    if key[:1] == ("stages",) and len(key) == 3 and key[2] in LENGTHS:  # the newest of the two says how long it is
        table.pop(LENGTHS[key[2]], None)
        replaced.append((*key[:2], LENGTHS[key[2]]))
    for old in [old for old in origins if any(old[: len(gone)] == gone for gone in replaced)]:
        del origins[old]
    origins[key] = source


def _source_of(key: Key, origins: Mapping[Key, str]) -> str:
    """Name where a value came from; for a table, its only source, or else the recipe's file."""
    for depth in range(len(key), 0, -1):
        if key[:depth] in origins:
            return origins[key[:depth]]
    below = {source for known, source in origins.items() if known and known[: len(key)] == key}
    return below.pop() if len(below) == 1 else origins[()]


def _explain(error: ValidationError, document: Mapping[str, Any], origins: Mapping[Key, str]) -> LimbeckError:
    """Turn pydantic's first complaint into ours: dotted path, source, what was expected, the nearest valid key."""
    problem = error.errors()[0]
    kind, value = problem["type"], problem["input"]
    key = tuple(str(part) for part in problem["loc"])
    if key[:1] == ("stages",) and len(key) > 2:
        key = (*key[:2], *key[3:])  # pydantic puts the objective between a stage's name and its key
    path, source = ".".join(key), _source_of(key, origins)
    cause = problem.get("ctx", {}).get("error")
    if isinstance(cause, LimbeckError):
        return LimbeckError(f"{path + ' in ' if path else ''}{source}: {cause.found}", cause.expected, cause.hint)
    if kind == "extra_forbidden":
        known = list(_table_at(document, key[:-1]).model_fields)
        return LimbeckError(
            f"unknown key {path} in {source}", expected=f"one of {', '.join(known)}", hint=_nearest(key, known)
        )
    if kind == "missing" and isinstance(value, dict):
        return LimbeckError(f"{path} is missing in {source}")
    if kind.startswith("union_tag") and isinstance(value, dict):
        return _explain_objective(path, value.get("objective"), document, _source_of((*key, "objective"), origins))
    if kind == "missing":  # an array that is too short
        path, value = ".".join(key[:-1]), list(value)
    expected = EXPECTED.get(kind) or str(cause or problem["msg"].removeprefix("Input should be "))
    return LimbeckError(f"{path} = {value!r} in {source}", expected=expected)


def _explain_objective(path: str, objective: object, document: Mapping[str, Any], source: str) -> LimbeckError:
    """Build the error for a stage without an objective (maybe a mistyped stage), or with an unknown one."""
    if objective is not None:
        wrong = unknown("objective", str(objective), STAGES)
        return LimbeckError(f"{path}.objective = {objective!r} in {source}", wrong.expected, wrong.hint)
    stages = [f"stages.{name}" for name in document["stages"]]
    near = difflib.get_close_matches(path, [name for name in stages if name != path], n=1)
    return LimbeckError(
        f"{path}.objective is missing in {source}",
        expected=f"one of {', '.join(STAGES)}",
        hint=f"did you mean {near[0]}?" if near else "",
    )


def _table_at(document: Mapping[str, Any], key: Key) -> type[Table]:
    """Find the model of a table of this document."""
    if key[:1] == ("stages",):
        return STAGES[document["stages"][key[1]]["objective"]]
    return TABLES[".".join(key)]


def _nearest(key: Key, known: Sequence[str]) -> str:
    """Suggest a key of the same table, or else one of the same name in another table."""
    if near := difflib.get_close_matches(key[-1], known, n=1):
        return f"did you mean {'.'.join((*key[:-1], near[0]))}?"
    elsewhere = [f"{table}.{key[-1]}" for table, model in TABLES.items() if table and key[-1] in model.model_fields]
    return f"did you mean {elsewhere[0]}?" if elsewhere else ""
