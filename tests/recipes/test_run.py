"""A whole run in miniature: what it leaves, what it starts from, and what it refuses."""

import hashlib
import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

import limbeck
from limbeck import LimbeckError, convert_folder, distill, load_model, load_recipe, load_tokenizer
from limbeck.recipes.folder import RunFolder, digests
from limbeck.students import swapped_layers
from limbeck.training import read_metrics


@pytest.fixture(scope="module")
def recipe(recipe_file):
    return load_recipe(recipe_file)


@pytest.fixture(scope="module")
def finished(recipe, teacher_folder, text_file, tmp_path_factory):
    torch.manual_seed(0)
    return distill(
        recipe, teacher=teacher_folder, data=text_file, output=tmp_path_factory.mktemp("run") / "tiny", device="cpu"
    )


@pytest.fixture
def copy(finished, tmp_path):
    """A finished run of one's own, to damage."""
    return shutil.copytree(finished.output, tmp_path / "copy")


@pytest.fixture
def again(recipe, teacher_folder, text_file):
    """Run into a folder, with changes."""

    def again(output, recipe=recipe, **changes):
        given = {"teacher": teacher_folder, "data": text_file, "device": "cpu"} | changes
        return distill(recipe, output=output, **given)

    return again


def stage_file(output, stage):
    return json.loads((output / "stages" / stage / "student" / "stage.json").read_text())


# --- what a run leaves ----------------------------------------------------------------------------------------------


def test_the_folder_of_a_run(finished, recipe, teacher_folder):
    output = finished.output
    assert sorted(path.name for path in output.glob("[!.]*")) == [
        "data",
        "metrics.jsonl",
        "recipe.toml",
        "run.json",
        "stages",
        "student",
    ]
    assert load_recipe(output / "recipe.toml") == recipe
    assert list(finished.stages) == ["converted", "matrix", "hidden", "logits"]
    assert finished.stages["matrix"] == output / "stages/1-matrix/student"
    assert finished.student == output / "student"
    assert not [path for path in output.rglob(".*") if path.name.startswith((".writing", ".old"))]
    identity = json.loads((output / "run.json").read_text())
    assert identity["recipe"]["name"] == "tiny"
    assert identity["teacher"]["source"] == str(teacher_folder)


def test_the_students_are_ordinary_checkpoints(finished, teacher_folder, text_file):
    for folder in (*finished.stages.values(), finished.student):
        model, plain = load_model(folder), AutoModelForCausalLM.from_pretrained(folder)
        assert swapped_layers(model) == (0, 1)
        assert plain.state_dict().keys() == model.state_dict().keys()
        tokenizer = load_tokenizer(folder)
        assert (
            tokenizer(text_file.read_text()).input_ids
            == load_tokenizer(teacher_folder)(text_file.read_text()).input_ids
        )
    assert limbeck.generate(model, tokenizer, ["the old"], max_new_tokens=4)[0]


def test_each_stage_changes_what_it_may_and_no_more(finished):
    states = {name: load_file(folder / "model.safetensors") for name, folder in finished.stages.items()}

    def changed(before, after):
        return {name for name, tensor in states[after].items() if not torch.equal(tensor, states[before][name])}

    matrix = changed("converted", "matrix")
    assert {name.split(".mixer.")[1] for name in matrix} == {"in_proj.weight", "conv1d.weight", "conv1d.bias", "D"}
    hidden = changed("matrix", "hidden")
    assert hidden
    assert all(".layers." in name for name in hidden)
    assert changed("hidden", "logits") > {"gpt_neox.embed_in.weight"}


def test_the_seals(finished):
    run_id = stage_file(finished.output, "0-converted")["run"]
    for index, (name, folder) in enumerate(finished.stages.items()):
        seal = json.loads((folder / "stage.json").read_text())
        assert (seal["run"], seal["stage"], seal["index"]) == (run_id, name, index)
        content = (folder / "model.safetensors").read_bytes()
        assert seal["weights"] == {"model.safetensors": hashlib.sha256(content).hexdigest()}
    assert stage_file(finished.output, "1-matrix")["steps"] == 4
    assert [row["name"] for row in stage_file(finished.output, "1-matrix")["learns"]][-1] == "frozen"
    assert stage_file(finished.output, "3-logits")["environment"]["device"].startswith("cpu")
    assert stage_file(finished.output, "3-logits")["tokens"] == 384
    assert digests(finished.student) == digests(finished.stages["logits"])


def test_the_metrics(finished):
    lines = read_metrics(finished.output / "metrics.jsonl")
    updates = [line for line in lines if "loss" in line]
    assert [(line["stage"], line["step"]) for line in updates][:5] == [
        *(("matrix", n) for n in (1, 2, 3, 4)),
        ("hidden", 1),
    ]
    assert {"matrix_per_layer", "lr", "grad_norm", "tokens", "time", "tokens_per_second"} <= updates[0].keys()
    assert "hidden_per_layer" in updates[4]
    assert "kl" in updates[-1]
    references = [line for line in lines if "reference_perfect" in line]
    assert [(line["stage"], line["step"], line["reference_perfect"]) for line in references] == [
        *(("matrix", 0, 0.0), ("hidden", 0, 0.0), ("logits", 0, 0.0)),
    ]
    assert references[0]["reference_untrained"] == updates[0]["loss"]
    evaluations = [line for line in lines if "eval_loss" in line]
    assert [(line["stage"], line["step"]) for line in evaluations] == [
        *(("matrix", n) for n in (0, 2, 4)),
        *(("hidden", n) for n in (0, 2, 3)),
        *(("logits", n) for n in (0, 2, 4, 6)),
    ]
    for line in evaluations:
        assert {"eval_perplexity", "eval_kl", "eval_top1"} <= line.keys()
        assert line["eval_perplexity"] == pytest.approx(np.exp(line["eval_loss"]))
    for stage in ("matrix", "hidden"):
        losses = [line["loss"] for line in updates if line["stage"] == stage]
        assert losses[-1] < losses[0]
    assert evaluations[-1]["eval_kl"] < evaluations[0]["eval_kl"]
    # A stage starts from the very weights that its predecessor left.
    assert evaluations[2]["eval_loss"] == evaluations[3]["eval_loss"]
    assert evaluations[5]["eval_loss"] == evaluations[6]["eval_loss"]


def test_a_perfect_student_has_its_teachers_loss_on_the_text(again, recipe_file, teacher_folder, tmp_path):
    """Where a stage reads the text, the reference is what a copy of the teacher has in the first update."""
    whole = load_recipe(recipe_file, ["stages.logits.ce_weight=0.5", "evaluation.every=0"])
    recipe = whole.model_copy(update={"stages": {"logits": whole.stages["logits"]}})
    lines = read_metrics(again(tmp_path / "run", recipe).output / "metrics.jsonl")
    assert lines[0]["reference_untrained"] == lines[1]["loss"]

    layers = list(range(load_model(teacher_folder).config.num_hidden_layers))
    copy = recipe.model_copy(update={"student": recipe.student.model_copy(update={"keep_attention": tuple(layers)})})
    same = read_metrics(again(tmp_path / "copy", copy).output / "metrics.jsonl")
    assert same[1]["loss"] == pytest.approx(same[0]["reference_perfect"], rel=1e-5)
    assert same[0]["reference_perfect"] == lines[0]["reference_perfect"] < lines[0]["reference_untrained"]

    alone = load_recipe(recipe_file, ["stages.logits.ce_weight=1.0", "stages.logits.kl_weight=0.0"])
    alone = alone.model_copy(update={"stages": {"logits": alone.stages["logits"]}})
    lines = read_metrics(again(tmp_path / "alone", alone).output / "metrics.jsonl")
    assert [line["reference_perfect"] for line in lines if "reference_perfect" in line] == [None]


def test_a_finished_run_is_finished(copy, again):
    before = {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()}
    assert again(copy).student == copy / "student"
    assert {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()} == before


# --- held-out evaluation --------------------------------------------------------------------------------------------


def test_the_best_student_is_kept(again, recipe_file, tmp_path):
    recipe = load_recipe(recipe_file, ["stages.logits.lr=0.7", "stages.logits.mixer_lr=0.7", "stages.logits.warmup=3"])
    output = again(tmp_path / "run", recipe).output
    losses = {
        line["step"]: line["eval_loss"]
        for line in read_metrics(output / "metrics.jsonl")
        if line["stage"] == "logits" and "eval_loss" in line
    }
    best = min(losses, key=losses.__getitem__)
    assert best != 6
    seal = stage_file(output, "3-logits")
    assert (seal["weights_of_step"], seal["held_out_loss"], seal["steps"]) == (best, losses[best], 6)
    kept = load_file(output / f"stages/3-logits/checkpoints/best-{best:08d}/00000-of-00001.safetensors")
    final = dict(load_model(output / "student").named_parameters())
    assert {f"model/student.{name}" for name in final} == {name for name in kept if name.startswith("model/")}
    assert all(torch.equal(tensor, kept[f"model/student.{name}"]) for name, tensor in final.items())
    assert stage_file(output, "1-matrix")["weights_of_step"] == 4  # a matrix is not judged by the whole model's loss


def test_a_part_of_a_short_stage_is_one_update_at_least(recipe_file):
    recipe = load_recipe(recipe_file, ["evaluation.every=0.1"])
    assert recipe.stages["matrix"].interval_of(recipe.evaluation.every) == 1
    assert recipe.stages["matrix"].interval_of(0.5) == 2
    assert recipe.stages["matrix"].interval_of(3) == 3
    assert recipe.stages["matrix"].interval_of(0) == recipe.stages["matrix"].interval_of(0.0) == 0


def test_held_out_text_of_its_own_or_none(again, recipe_file, text_file, tmp_path):
    one_stage = ["stages.logits.tokens=128", f"data.eval_source={text_file}", "evaluation.every=0.1"]
    recipe = load_recipe(recipe_file, one_stage)
    output = again(tmp_path / "own", recipe).output
    assert (output / "data/held-out.npy").is_file()
    lines = read_metrics(output / "metrics.jsonl")
    assert [line["step"] for line in lines if line["stage"] == "logits" and "eval_loss" in line] == [0, 1, 2]

    recipe = load_recipe(recipe_file, ["data.eval_fraction=0.0"])
    output = again(tmp_path / "none", recipe).output
    assert not any("eval_loss" in line for line in read_metrics(output / "metrics.jsonl"))


def test_a_resumed_stage_on_text_alone_measures_the_same(again, recipe_file, tmp_path):
    """No stage has loaded the teacher when the run goes on, and the evaluation still compares with it."""
    recipe = load_recipe(recipe_file, ["stages.logits.kl_weight=0.0", "stages.logits.ce_weight=1.0"])
    output = again(tmp_path / "run", recipe).output
    expected = [line for line in read_metrics(output / "metrics.jsonl") if "eval_loss" in line]
    for part in ("student", "stages/3-logits"):
        shutil.rmtree(output / part)
    again(output, recipe)
    found = [line for line in read_metrics(output / "metrics.jsonl") if "eval_loss" in line]
    assert [line | {"time": 0} for line in found] == [line | {"time": 0} for line in expected]


# --- where a run starts ---------------------------------------------------------------------------------------------


def test_a_student_to_start_from(again, teacher_folder, tmp_path):
    hybrid = tmp_path / "hybrid"
    convert_folder(teacher_folder, hybrid, keep_attention=[0], init="identity", mixer_kwargs={"d_state": 24})
    result = again(tmp_path / "run", student=hybrid)
    assert digests(result.stages["converted"]) == digests(hybrid)
    model = load_model(result.student)
    assert swapped_layers(model) == (1,)
    assert model.config.mixer_kwargs["d_state"] == 24
    assert load_tokenizer(result.student).eos_token == "<end>"


def test_starts_that_are_refused(again, recipe_file, teacher_folder, tmp_path):
    output = tmp_path / "run"
    with pytest.raises(LimbeckError, match="is a gpt_neox model") as error:
        again(output, student=teacher_folder)
    assert "a folder with a student" in error.value.expected
    other = AutoModelForCausalLM.from_config(changed_config(teacher_folder, vocab_size=300))
    limbeck.convert(other).save_pretrained(tmp_path / "other-vocabulary")
    with pytest.raises(LimbeckError, match="the student's vocabulary has 300 tokens"):
        again(output, student=tmp_path / "other-vocabulary")
    other = AutoModelForCausalLM.from_config(changed_config(teacher_folder, num_hidden_layers=3))
    limbeck.convert(other, init="identity").save_pretrained(tmp_path / "deeper")
    with pytest.raises(LimbeckError, match="gpt_neox, with 3 layers of width 32") as error:
        again(output, student=tmp_path / "deeper")
    assert "2 layers of width 32" in error.value.expected
    weights = tmp_path / "deeper" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    only_logits = load_recipe(recipe_file).model_copy(
        update={"stages": {"logits": load_recipe(recipe_file).stages["logits"]}}
    )
    with pytest.raises(LimbeckError, match=r"model.safetensors is damaged or cut short"):
        again(output, only_logits, student=tmp_path / "deeper")
    with pytest.raises(LimbeckError, match="nowhere"):
        again(output, student=tmp_path / "nowhere")
    assert not output.exists()


def changed_config(folder, **changes):
    config = load_model(folder).config
    for name, value in changes.items():
        setattr(config, name, value)
    return config


def test_a_student_of_another_shape_learns_from_the_logits(again, recipe_file, teacher_folder, tmp_path):
    other = AutoModelForCausalLM.from_config(changed_config(teacher_folder, num_hidden_layers=1))
    limbeck.convert(other).save_pretrained(tmp_path / "shallow")
    recipe = load_recipe(recipe_file)
    recipe = recipe.model_copy(update={"stages": {"logits": recipe.stages["logits"]}})
    result = again(tmp_path / "run", recipe, student=tmp_path / "shallow", tokenizer=teacher_folder)
    assert swapped_layers(load_model(result.student)) == (0,)
    assert load_tokenizer(result.student).eos_token == "<end>"  # the tokenizer that was named comes along


def test_tokens_scale_all_stages(again, recipe, tmp_path):
    output = again(tmp_path / "run", tokens=416).output
    steps = [stage_file(output, name)["steps"] for name in ("1-matrix", "2-hidden", "3-logits")]
    assert steps == [2, 1, 3]
    assert load_recipe(output / "recipe.toml") == recipe.scaled_to(416)
    with pytest.raises(LimbeckError, match="without a single update"):
        again(tmp_path / "too-few", tokens=100)
    assert not (tmp_path / "too-few").exists()


def test_tokens_in_a_file(again, finished, tmp_path):
    tokens = tmp_path / "tokens.npy"
    shutil.copy(finished.output / "data/training.npy", tokens)
    result = again(tmp_path / "run", data=tokens)
    assert not (result.output / "data").exists()
    assert digests(result.student) == digests(finished.student)  # the same tokens, the same bits


def test_a_slash_at_the_end_is_no_other_teacher(copy, again, teacher_folder):
    again(copy, teacher=f"{teacher_folder}/")


# --- refusals -------------------------------------------------------------------------------------------------------


def test_changed_weights_are_refused(copy, again):
    for part in ("student", "stages/2-hidden", "stages/3-logits"):
        shutil.rmtree(copy / part)
    weights = copy / "stages/1-matrix/student/model.safetensors"
    state = load_file(weights)
    state["gpt_neox.embed_in.weight"][0, 0] += 1
    save_file(state, weights, metadata={"format": "pt"})
    with pytest.raises(LimbeckError, match=r"model.safetensors in .*1-matrix/student is not what stage 'matrix' wrote"):
        again(copy)
    assert not (copy / "stages/2-hidden").exists()


def test_weights_of_another_run_or_stage_are_refused(copy, again, recipe_file, tmp_path):
    other = again(tmp_path / "other", load_recipe(recipe_file, ["stages.matrix.lr=1e-3"]))
    for part in ("student", "stages/2-hidden", "stages/3-logits", "stages/1-matrix/student"):
        shutil.rmtree(copy / part)
    for foreign in (other.stages["matrix"], copy / "stages/0-converted/student"):
        shutil.copytree(foreign, copy / "stages/1-matrix/student")
        with pytest.raises(LimbeckError, match="of another run or place"):
            again(copy)
        shutil.rmtree(copy / "stages/1-matrix/student")


def test_a_stage_that_lost_its_student_is_run_again(copy, again, finished):
    shutil.rmtree(copy / "student")
    assert digests(again(copy).student) == digests(finished.student)


def test_another_runs_folder_is_refused(copy, again, recipe_file, text_file, teacher_folder, tmp_path):
    before = sorted(copy.rglob("*"))
    for change, named in (
        (
            {"recipe": load_recipe(recipe_file, ["stages.hidden.lr=1e-3"])},
            r"recipe.stages.hidden.lr was 0.003, now 0.001",
        ),
        ({"tokens": 416}, r"recipe.stages.matrix.tokens was 256, now 128"),
        (
            {"teacher": shutil.copytree(teacher_folder, tmp_path / "twin")},
            r"teacher.source was .*teacher', now .*twin'",
        ),
        ({"data": text_file.parent}, r"data.source was .*still.txt', now"),
    ):
        with pytest.raises(LimbeckError, match=f"(?s)holds another run:.*{named}"):
            again(copy, **change)
    assert sorted(copy.rglob("*")) == before


def test_a_folder_of_other_things_is_refused(again, tmp_path):
    (tmp_path / "thesis.tex").write_text("all my work")
    with pytest.raises(LimbeckError, match="exists and holds no run"):
        again(tmp_path)
    with pytest.raises(LimbeckError, match="exists and holds no run"):
        again(tmp_path / "thesis.tex")
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_what_a_killed_start_left_is_no_obstacle(tmp_path):
    (tmp_path / ".writing-run.json").write_text("{")
    RunFolder(tmp_path, {"a": 1})
    assert [path.name for path in tmp_path.glob("[!.]*")] == ["run.json"]


def test_one_process_to_a_run(tmp_path, again, copy):
    identity = {"recipe": {"student": {}, "stages": {}}}
    held = RunFolder(tmp_path / "run", identity)
    with pytest.raises(LimbeckError, match="another process is working in"):
        RunFolder(tmp_path / "run", identity)
    del held
    RunFolder(tmp_path / "run", identity)
    again(copy)
    again(copy)  # a run that ended lets go


def test_a_text_that_is_too_short_leaves_nothing(again, text_file, tmp_path):
    short = tmp_path / "short.txt"
    short.write_text("a still")
    with pytest.raises(LimbeckError, match="is shorter than one sample"):
        again(tmp_path / "run", data=short)
    assert not (tmp_path / "run").exists()
    short.write_text(text_file.read_text())
    assert again(tmp_path / "run", data=short, tokens=416).student.is_dir()


def test_a_resumed_run_is_not_removed_by_a_mistake(copy, again, finished):
    for path in (copy / "data").iterdir():
        path.write_bytes(b"torn")
    with pytest.raises(LimbeckError, match="cannot be read"):
        again(copy)
    assert digests(copy / "student") == digests(finished.student)


def test_tokens_beyond_the_vocabulary(again, teacher_folder, tmp_path):
    tokens = tmp_path / "tokens.npy"
    np.save(tokens, np.arange(1000, dtype=np.uint16) % 289)
    with pytest.raises(LimbeckError, match="has token 288, beyond the vocabulary"):
        again(tmp_path / "run", data=tokens)
    bigger = load_tokenizer(teacher_folder)
    bigger.add_tokens(["limbeck"])
    bigger.save_pretrained(tmp_path / "bigger")
    with pytest.raises(LimbeckError, match=r"still.txt has token 288 \('limbeck'\), beyond the vocabulary"):
        again(tmp_path / "run", tokenizer=tmp_path / "bigger")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ({"teacher": None}, "no teacher"),
        ({"data": None}, "no data"),
        ({"data": "nowhere.txt"}, "no file or folder nowhere.txt"),
        ({"data": "nowhere.npy"}, "no file nowhere.npy"),
        ({"device": "abacus"}, "abacus"),
        ({"student": "nowhere"}, "nowhere"),
    ],
)
def test_missing_things(again, change, found, tmp_path):
    with pytest.raises(LimbeckError, match=found):
        again(tmp_path / "run", **change)
    assert not (tmp_path / "run").exists()


def test_a_mixer_that_cannot_be_is_refused_before_anything_is_left(again, recipe_file, tmp_path):
    for setting, found in (
        ("student.mixer=mambo", "unknown mixer 'mambo'"),
        ("mixer.d_sate=4", "d_sate"),
        ("student.keep_attention=[7]", "keep_attention"),
    ):
        with pytest.raises(LimbeckError, match=found):
            again(tmp_path / "run", load_recipe(recipe_file, [setting]))
        assert not (tmp_path / "run").exists()


# --- any family -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", ["phi", "llama"])
def test_a_hybrid_of_another_family(family, precision, again, recipe_file, teacher_folder, tmp_path):
    sizes = {
        "vocab_size": 288,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 48,
        "eos_token_id": 0,
        "bos_token_id": 0,
        "tie_word_embeddings": family == "llama",
    }
    config = AutoConfig.for_model(family, **sizes)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "teacher")
    load_tokenizer(teacher_folder).save_pretrained(tmp_path / "teacher")
    settings = ["student.keep_attention=[1]", f"precision={precision}", "stages.hidden.target=mixer"]
    result = again(tmp_path / "run", load_recipe(recipe_file, settings), teacher=tmp_path / "teacher")
    student = load_model(result.student)
    assert swapped_layers(student) == (0,)
    assert student.dtype == torch.float32  # what learns is float32, whatever it is computed in
    heads = (student.get_output_embeddings().weight, student.get_input_embeddings().weight)
    assert (heads[0] is heads[1]) == (family == "llama")
    lines = read_metrics(result.output / "metrics.jsonl")
    losses = [line["loss"] for line in lines if line["stage"] == "matrix" and "loss" in line]
    assert losses[-1] < losses[0]
    assert all(np.isfinite(line.get("loss", 0.0)) for line in lines)
