"""Recipes: the published numbers, the rules of the schema, and errors that name key, file and remedy."""

import tomllib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from limbeck.errors import LimbeckError
from limbeck.recipes import LogitsStage, Recipe, load_recipe, parse_override, recipe_names, to_toml

MINIMAL = """
name = "mine"
[data]
sequence_length = 64
[stages.logits]
objective = "logits"
tokens = 102_400
tokens_per_step = 1024
"""


@pytest.fixture
def write(tmp_path):
    def write(text, name="mine.toml"):
        path = tmp_path / name
        path.write_text(text, encoding="utf-8")
        return path

    return write


def test_every_recipe_of_the_package_loads_under_its_own_name():
    assert set(recipe_names()) >= {"logits-only", "mohawk", "mohawk-hybrid-phi-mamba", "mohawk-phi-mamba"}
    for name in recipe_names():
        assert load_recipe(name).name == name
        assert load_recipe(name).description


def test_phi_mamba_has_the_published_numbers():
    recipe = load_recipe("mohawk-phi-mamba")
    assert [(name, stage.steps) for name, stage in recipe.stages.items()] == [
        ("matrix", 2441),
        ("hidden", 4882),
        ("logits", 5264),
    ]
    assert [stage.tokens_per_step for stage in recipe.stages.values()] == [2**15, 2**15, 2**19]
    assert recipe.tokens == 3_000_000_000
    assert (recipe.student.mixer, recipe.student.init) == ("discrete-mamba2", "identity")
    assert recipe.data.sequence_length == 2048
    for stage in recipe.stages.values():
        assert (stage.lr, stage.betas, stage.weight_decay, stage.clip) == (1e-4, (0.9, 0.95), 0.1, 1.0)
        assert stage.schedule == "wsd"
        assert stage.warmup_steps == stage.decay_steps == stage.steps // 10


def test_the_hybrid_says_only_what_differs():
    base, hybrid = load_recipe("mohawk-phi-mamba"), load_recipe("mohawk-hybrid-phi-mamba")
    assert hybrid.student.keep_attention == (4, 10, 16, 22)
    assert hybrid.tokens == 5_000_000_000
    assert list(hybrid.stages) == list(base.stages)
    assert hybrid.stages["hidden"] == base.stages["hidden"]


def test_the_control_spends_what_mohawk_spends():
    mohawk, control = load_recipe("mohawk"), load_recipe("logits-only")
    assert list(control.stages) == ["logits"]
    assert control.tokens == mohawk.tokens
    assert control.stages["logits"].lr == mohawk.stages["logits"].lr
    assert (control.student, control.data) == (mohawk.student, mohawk.data)


def test_a_recipe_written_as_toml_reads_back_as_itself(write):
    for name in recipe_names():
        recipe = load_recipe(name, ['mixer.note="quote \\" and 漢字"', "mixer.deep.er=[1, 2.5, true]"])
        assert load_recipe(write(to_toml(recipe))) == recipe


@given(
    st.dictionaries(
        st.text(min_size=1, max_size=5),
        st.one_of(st.text(), st.integers(-(2**62), 2**62), st.floats(allow_nan=False), st.booleans()),
        max_size=5,
    )
)
def test_any_mixer_option_survives_writing(options):
    values = load_recipe("mohawk").model_dump()
    values["student"]["mixer_kwargs"] = options
    recipe = Recipe.model_validate(values)
    again = Recipe.model_validate(tomllib.loads(to_toml(recipe)))
    assert again == recipe
    assert [type(value) for value in again.student.mixer_kwargs.values()] == [type(v) for v in options.values()]


@pytest.mark.parametrize(
    ("text", "key", "value"),
    [
        ("stages.matrix.lr=1e-4", ("stages", "matrix", "lr"), 1e-4),
        ("data.source=/some/folder", ("data", "source"), "/some/folder"),
        ("data.source=1\nb=2", ("data", "source"), "1\nb=2"),
        ("student.keep_attention=[1, 2]", ("student", "keep_attention"), [1, 2]),
        ("mixer.d_state=128", ("student", "mixer_kwargs", "d_state"), 128),
        ("mixer.bias=true", ("student", "mixer_kwargs", "bias"), True),
        ("precision = float32", ("precision",), "float32"),
        ("data.source=a=b", ("data", "source"), "a=b"),
    ],
)
def test_overrides_are_read_as_toml_or_else_as_text(text, key, value):
    assert parse_override(text) == (key, value)
    assert type(parse_override(text)[1]) is type(value)


def test_overrides_apply_in_order():
    recipe = load_recipe("mohawk", ["stages.matrix.lr=1e-3", "mixer.d_state=128", "stages.matrix.lr=2e-3"])
    assert recipe.stages["matrix"].lr == 2e-3
    assert recipe.student.mixer_kwargs == {"d_state": 128}
    assert load_recipe("mohawk", ["stages.logits.tokens=70e6"]).stages["logits"].tokens == 70_000_000


def test_amounts_are_updates_or_parts(write):
    stage = load_recipe(write(MINIMAL + "warmup = 7\ndecay = 0.29\ncheckpoint_every = 0.001\n")).stages["logits"]
    assert isinstance(stage, LogitsStage)
    assert (stage.steps, stage.warmup_steps, stage.decay_steps, stage.checkpoint_steps) == (100, 7, 29, 1)
    assert (stage.samples_per_step(64), stage.accumulation(64)) == (16, 2)
    assert load_recipe(write(MINIMAL + 'schedule = "cosine"')).stages["logits"].decay_steps == 100
    assert load_recipe(write(MINIMAL + 'schedule = "constant"')).stages["logits"].decay_steps == 0
    assert load_recipe(write(MINIMAL + "checkpoint_every = 0")).stages["logits"].checkpoint_steps == 0


@given(st.integers(1_300_000, 10**10))
def test_scaling_keeps_proportions_and_never_overruns(tokens):
    recipe = load_recipe("mohawk-phi-mamba")
    scaled = recipe.scaled_to(tokens)
    assert tokens - len(recipe.stages) < scaled.tokens <= tokens
    for name, stage in recipe.stages.items():
        assert abs(scaled.stages[name].tokens / tokens - stage.tokens / recipe.tokens) < 1e-5
    assert recipe.scaled_to(recipe.tokens) == recipe


def test_scaling_takes_counts_of_updates_along(write):
    recipe = load_recipe(write(MINIMAL + "warmup = 8\ndecay = 20\ncheckpoint_every = 10\n"))
    stage = recipe.scaled_to(51_200).stages["logits"]
    assert (stage.steps, stage.warmup, stage.decay, stage.checkpoint_every) == (50, 4, 10, 5)


def test_scaling_below_one_update_names_the_least():
    recipe = load_recipe("mohawk-phi-mamba")
    with pytest.raises(LimbeckError, match="at least 1228800 tokens"):
        recipe.scaled_to(1_228_799)
    assert min(stage.steps for stage in recipe.scaled_to(1_228_800).stages.values()) == 1


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("stages.matrix.lrr=1", ["unknown key stages.matrix.lrr", "did you mean stages.matrix.lr?"]),
        ("keep_attention=[1]", ["unknown key keep_attention", "did you mean student.keep_attention?"]),
        ("mixer=mamba", ["unknown key mixer", "did you mean student.mixer?"]),
        ("stages.matrix.temperature=2.0", ["stages.matrix.temperature", "did you mean stages.logits.temperature?"]),
        ("evaluation.evry=3", ["evaluation.evry", "did you mean evaluation.every?"]),
        ("stages.matric.lr=1", ["stages.matric.objective is missing", "did you mean stages.matrix?"]),
        ("stages.matrix.objective=matrx", ["stages.matrix.objective = 'matrx'", "did you mean 'matrix'?"]),
        ("stages.matrix.lr=fast", ["stages.matrix.lr = 'fast'", "expected: a number"]),
        ("stages.matrix.lr=nan", ["stages.matrix.lr = nan", "a finite number"]),
        ("stages.matrix.tokens=true", ["stages.matrix.tokens = True", "an integer"]),
        ("stages.matrix.tokens=1.5", ["stages.matrix.tokens = 1.5", "an integer"]),
        ("stages.matrix.warmup=1.5", ["stages.matrix.warmup = 1.5", "a part of the stage"]),
        ("stages.matrix.betas=[0.9]", ["stages.matrix.betas = [0.9]", "a longer array"]),
        ("stages.matrix=3", ["stages.matrix = 3", "a table"]),
        ("stages=3", ["stages = 3", "a table"]),
        ("student.init=warm", ["student.init = 'warm'", "'attention', 'identity' or 'random'"]),
        ("student.keep_attention=[1, 1]", ["student.keep_attention = [1, 1]", "layer numbers that differ"]),
        ("data.seed=-1", ["data.seed = -1", "greater than or equal to 0"]),
        ("stages.matrix.lr.x=3", ["stages.matrix.lr is a value, not a table"]),
        ("stages.logits.kl_weight=0", ["kl_weight and ce_weight are both 0"]),
        ("stages.matrix.min_lr=1.0", ["min_lr = 1.0 is above lr"]),
        ("stages.matrix.decay=0.95", ["overrun the 610 updates"]),
        ("stages.matrix.tokens=100", ["tokens = 100 is less than one update"]),
        ("stages.matrix.objective=logits", ["a scope that never shrinks: matrix → hidden → logits"]),
        ("data.sequence_length=1000", ["no whole number of micro-batches", "= 8000"]),
        ("lr", ["--set 'lr' is no setting", "KEY=VALUE"]),
        ("a..b=1", ["is no setting"]),
    ],
)
def test_a_wrong_setting_is_explained(override, parts):
    with pytest.raises(LimbeckError) as caught:
        load_recipe("mohawk", [override])
    for part in parts:
        assert part in str(caught.value)
    assert override in str(caught.value) or "mohawk.toml" in str(caught.value)


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("nam = 'x'\n" + MINIMAL, ["unknown key nam", "did you mean name?"]),
        (MINIMAL.replace('objective = "logits"\n', ""), ["stages.logits.objective is missing"]),
        (MINIMAL.replace("tokens = 102_400\n", ""), ["stages.logits.tokens is missing"]),
        (MINIMAL.replace('"mine"', '"../mine"'), ["name = '../mine'"]),
        ('name = "mine"', ["stages is missing"]),
        ('name = "mine"\nstages = {}', ["stages = {}", "at least 1 item"]),
        ("name = =", ["is no TOML", "line 1"]),
        ("extends = 3", ["extends = 3"]),
        ('extends = "mine.toml"', ["in a circle"]),
        ('extends = "mohawk"\nname = "x"\n[stages.logits]\nlr = "high"', ["stages.logits.lr = 'high'"]),
    ],
)
def test_a_wrong_file_is_explained_and_named(write, text, parts):
    path = write(text)
    with pytest.raises(LimbeckError) as caught:
        load_recipe(path)
    for part in [*parts, str(path)]:
        assert part in str(caught.value)


def test_an_error_in_an_extended_file_names_that_file(write):
    write(MINIMAL + "lr = 'high'\n", "base.toml")
    with pytest.raises(LimbeckError, match=r"base\.toml"):
        load_recipe(write('extends = "base.toml"\nname = "child"\n'))


def test_a_file_that_is_no_text_or_is_not_there(tmp_path):
    (tmp_path / "binary.toml").write_bytes(b"name = '\xff'")
    with pytest.raises(LimbeckError, match="no UTF-8 text: byte 8"):
        load_recipe(tmp_path / "binary.toml")
    with pytest.raises(LimbeckError, match="no recipe file"):
        load_recipe(tmp_path / "absent.toml")
    with pytest.raises(LimbeckError, match="did you mean 'mohawk'"):
        load_recipe("mohawc")


def test_recipes_cannot_be_changed():
    recipe = load_recipe("mohawk")
    with pytest.raises(ValueError, match="frozen"):
        recipe.name = "other"  # pyright: ignore[reportAttributeAccessIssue]
