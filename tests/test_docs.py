"""The documents tell the truth: their code runs, their recipes parse, their commands exist, their links lead somewhere.

What is checked in docs/*.md and README.md, and what a comment on the line before a block changes:

- ```python: all blocks of a page run in order, in one namespace, as a reader would type them.
  `<!-- no-run: reason -->` leaves one out.
- ```toml: a recipe. `<!-- part -->`: a part of one, put on top of the recipe `mohawk`. `<!-- refused: words -->`: such
  a part, which must be refused with these words.
- ```console, ```sh, ```bash: lines that begin with `limbeck` must parse; `limbeck recipes` runs too.
  `<!-- run -->` runs all lines of a block.
- Relative links in any *.md lead to a file, and to a heading where they name one; paths in backticks that begin with
  src/, tests/, docs/, examples/ or benchmarks/ exist.
- `<!-- keys: Model -->` … `<!-- end -->`: the keys of a recipe's table, which `python tests/test_docs.py` writes anew.

Code and commands find `teacher/` (a tiny GPT-NeoX with its tokenizer), `text/` (a folder of text) and
`runs/phi/student` (a student of that teacher) in their working directory.
"""

import os
import re
import shlex
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import typer
from transformers import AutoModelForCausalLM, GPTNeoXConfig

import limbeck
import limbeck_cli
from limbeck.demo import train_tokenizer
from limbeck.mixers import registry
from limbeck.recipes import load_recipe, schema
from limbeck.students import FAMILIES

ROOT = Path(__file__).parents[1]
PAGES = [page for page in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))] if page.is_file()]
MARKDOWN = [*PAGES, *(ROOT / name for name in ("CONTRIBUTING.md", "CHANGELOG.md"))]
FENCE = re.compile(r"(?:<!-- (?P<mark>[^\n]*?) -->\n+)?^```(?P<language>\w+)\n(?P<code>.*?)^```$", re.M | re.S)
KEYS = re.compile(r"(<!-- keys: (\w+) -->\n).*?(<!-- end -->)", re.S)


@dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    page: Path
    line: int
    mark: str
    code: str

    def __str__(self) -> str:
        return f"{named(self.page)}:{self.line}"


def named(page):
    return str(page.relative_to(ROOT))


def blocks(page, *languages):
    text = page.read_text(encoding="utf-8")
    for found in FENCE.finditer(text):
        if found["language"] in languages:
            line = text.count("\n", 0, found.start("code"))
            yield Block(page, line, found["mark"] or "", found["code"])


def all_blocks(*languages):
    return [pytest.param(block, id=str(block)) for page in PAGES for block in blocks(page, *languages)]


def commands(block):
    """The `limbeck` lines of a block as lists of arguments, continued lines joined."""
    for line in block.code.replace("\\\n", " ").splitlines():
        line = line.removeprefix("$ ")
        if line.startswith("limbeck "):
            yield shlex.split(line, comments=True)[1:]


@pytest.fixture(scope="session")
def surroundings(tmp_path_factory):
    """What the documents take for granted: a teacher, text, a student."""
    folder = tmp_path_factory.mktemp("docs")
    (folder / "text").mkdir()
    for page in PAGES[:4]:
        shutil.copy(page, folder / "text")
    tokenizer = train_tokenizer((page.read_text(encoding="utf-8") for page in PAGES), vocabulary=300)
    torch.manual_seed(0)
    config = GPTNeoXConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=512,
        bos_token_id=0,
        eos_token_id=0,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder / "teacher")
    tokenizer.save_pretrained(folder / "teacher")
    limbeck.convert_folder(folder / "teacher", folder / "runs/phi/student")
    return folder


@pytest.fixture
def page_folder(surroundings, tmp_path, monkeypatch):
    """A working directory of its own; mixers and families that a page registers are forgotten afterwards."""
    shutil.copytree(surroundings, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(registry, "_MIXERS", dict(registry._MIXERS))
    known = dict(FAMILIES)
    yield tmp_path
    FAMILIES.clear()
    FAMILIES.update(known)


# --- code -------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=named)
def test_python_blocks_run(page, page_folder):
    namespace = {"__name__": "__main__"}
    for block in blocks(page, "python"):
        if not block.mark.startswith("no-run: "):
            code = compile("\n" * block.line + block.code, str(block.page), "exec", dont_inherit=True)
            exec(code, namespace)


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_no_block_escapes(page):
    meant = {
        "python": r"no-run: .+",
        "toml": r"part|refused: .+",
        "console": "run",
        "sh": "run",
        "bash": "run",
        "text": "",
    }
    found = {language: list(blocks(page, language)) for language in meant}
    for language, marks in meant.items():
        for block in found[language]:
            assert re.fullmatch(f"(?:{marks})?", block.mark), f"{block}: {block.mark}"
    fences = len(re.findall(r"^\s*(?:```|~~~)", page.read_text(encoding="utf-8"), re.M))
    assert fences == 2 * sum(map(len, found.values())), f"a block in {page.name} is indented or in no known language"


@pytest.mark.parametrize("block", all_blocks("toml"))
def test_toml_blocks_are_recipes(block, tmp_path):
    file = tmp_path / "recipe.toml"
    file.write_text(('extends = "mohawk"\n' if block.mark else "") + block.code, encoding="utf-8")
    if not block.mark.startswith("refused: "):
        load_recipe(file)
        return
    with pytest.raises(limbeck.LimbeckError) as refusal:
        load_recipe(file)
    assert block.mark.removeprefix("refused: ") in str(refusal.value)


@pytest.mark.parametrize("block", all_blocks("console", "sh", "bash"))
def test_commands_parse_and_the_small_ones_run(block, page_folder):
    group = typer.main.get_command(limbeck_cli.app)
    for arguments in commands(block):
        if arguments[0].startswith("-"):
            assert arguments == ["--help"], arguments
            continue
        assert arguments[0] in group.commands, f"{block}: no command {arguments[0]!r}"
        if "--help" in arguments:
            continue
        group.commands[arguments[0]].make_context(arguments[0], list(arguments[1:]))
        if block.mark == "run" or arguments[0] == "recipes":
            group.main(list(arguments), standalone_mode=False)


# --- words ------------------------------------------------------------------------------------------------------------


def prose(page):
    """A page without its blocks."""
    return re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)


def anchors(page):
    """What links to headings of a page may say, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", prose(page), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", MARKDOWN, ids=named)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if "://" in target or target.startswith("mailto:"):
            continue
        path, _, anchor = target.partition("#")
        file = page.parent / path if path else page
        assert file.exists(), f"{page.name} links to {target}"
        if anchor:
            assert anchor in anchors(file), f"{page.name} links to {target}; headings: {sorted(anchors(file))}"


@pytest.mark.parametrize("page", MARKDOWN, ids=named)
def test_files_that_are_named_exist(page):
    for path in re.findall(r"`((?:src|tests|docs|examples|benchmarks)/[\w./-]+)`", prose(page)):
        assert (ROOT / path).exists(), f"{page.name} names {path}"


def test_every_page_is_reached_from_the_first():
    first = ROOT / "docs" / "README.md"
    linked = {(first.parent / path).name for path in re.findall(r"\]\((\w[\w-]*\.md)\)", prose(first))}
    assert linked == {page.name for page in first.parent.glob("*.md")} - {first.name}


# --- tables written from the schema -----------------------------------------------------------------------------------


def described(model):
    """What the docstrings of a recipe's table say of each key."""
    found = {}
    for cls in reversed(model.__mro__):
        section = (cls.__doc__ or "").partition("Attributes:\n")[2]
        for name, text in re.findall(r"^ {4,8}(\w+): (.+?)(?=^ {4,8}\w+: |\Z)", section, re.M | re.S):
            found[name] = " ".join(text.split()).replace("``", "`")
    return found


def kind(annotation):
    """A type as TOML's reader would call it."""
    text = str(annotation)
    if "Literal" in text:
        values = re.findall(r"'([^']+)'", text)
        return ("array of " if "as_tuple" in text else "") + " ".join(f"`{value}`" for value in values)
    for sign, words in (
        ("PlainValidator", "amount"),
        ("as_tuple", "array"),
        ("as_names", "array"),
        ("dict", "table"),
        ("Expect", "table"),
        ("bool", "true, false"),
        ("whole", "integer"),
        ("int |", "amount"),
        ("tuple", "array"),
        ("float", "number"),
        ("int", "integer"),
        ("str", "string"),
    ):
        if sign in text:
            return words
    raise AssertionError(text)


def default(field):
    if field.is_required():
        return "needed"
    if field.default is None or field.default == "":
        return ""
    value = list(field.default) if isinstance(field.default, tuple) else field.default
    return f"`{str(value).lower() if isinstance(value, bool) else str(value).replace(chr(39), chr(34))}`"


def table_of_keys(name):
    model = getattr(schema, name)
    words = described(model)
    lines = ["| key | value | left out | what it says |", "|---|---|---|---|"]
    shared = {} if name in ("Stage", "Recipe") else schema.Stage.model_fields
    for key, field in model.model_fields.items():
        nested = isinstance(field.annotation, type) and issubclass(field.annotation, schema.Table)
        if key in shared or key in ("objective", "stages") or nested:
            continue
        annotation = [field.annotation, *field.metadata]
        lines.append(f"| `{key}` | {kind(annotation)} | {default(field)} | {words[key]} |")
    return "\n".join(lines) + "\n"


def with_tables(text):
    return KEYS.sub(lambda found: found[1] + table_of_keys(found[2]) + found[3], text)


def test_tables_of_keys_are_the_schemas():
    text = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
    assert {name for _, name, _ in KEYS.findall(text)} == {
        "Recipe",
        "StudentTable",
        "DataTable",
        "EvaluationTable",
        "EngineTable",
        "TrackingTable",
        "Stage",
        "HiddenStage",
        "LogitsStage",
        "LayerwiseStage",
    }
    assert text == with_tables(text), "run `python tests/test_docs.py`"


def test_every_recipe_is_listed():
    text = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
    assert all(f"`{name}`" in text for name in limbeck.recipes.recipe_names())


if __name__ == "__main__":
    os.chdir(ROOT)
    page = Path("docs/recipes.md")
    page.write_text(with_tables(page.read_text(encoding="utf-8")), encoding="utf-8")
