"""Every command: results on standard output, the rest on standard error, mistakes end with code 2 and leave nothing."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, OPTConfig

import limbeck
import limbeck_cli
from limbeck import load_model
from limbeck.recipes import recipe_names
from limbeck.students import swapped_layers

RECIPE = """
name = "small"

[data]
sequence_length = 16
eval_fraction = 0.0

[stages.matrix]
objective = "matrix"
tokens = 128
tokens_per_step = 64
micro_batch = 4

[stages.logits]
objective = "logits"
tokens = 128
tokens_per_step = 64
micro_batch = 4
"""


@pytest.fixture
def recipe(tmp_path_factory):
    path = tmp_path_factory.mktemp("recipe") / "small.toml"
    path.write_text(RECIPE)
    return path


@pytest.fixture
def good(command):
    """A command that ends well; its standard output."""

    def good(*arguments):
        code, out, err = command(*arguments)
        assert code == 0, err
        return out

    return good


@pytest.fixture
def good_json(good):
    """The same with ``--json``: standard output is one JSON object and nothing else."""

    def good_json(*arguments):
        def refuse(name):
            raise AssertionError(f"{name} is no JSON")

        value = json.loads(good(*arguments, "--json"), parse_constant=refuse)
        assert isinstance(value, dict)
        return value

    return good_json


# --- the commands ---------------------------------------------------------------------------------------------------


def test_convert(good, good_json, teacher_folder, tmp_path):
    out = good("convert", teacher_folder, tmp_path / "whole")
    assert "2 of 2 layers of a gpt_neox model swapped for discrete-mamba2" in out
    assert swapped_layers(load_model(tmp_path / "whole")) == (0, 1)
    options = ("--keep-attention", "0", "--init", "identity", "--set", "mixer.d_state=24", "--seed", "3")
    report = good_json("convert", teacher_folder, tmp_path / "hybrid", *options)
    assert (report["swapped_layers"], report["kept_attention"], report["init"]) == ([1], [0], "identity")
    assert report["mixer_kwargs"]["d_state"] == 24
    assert load_model(report["destination"]).config.mixer_kwargs["d_state"] == 24


def test_convert_to_other_mixers(good_json, refused, teacher_folder, tmp_path):
    for mixer in ("mamba", "mamba2"):
        message = refused("convert", teacher_folder, tmp_path / mixer, "--mixer", mixer)
        assert message.startswith(f"the mixer '{mixer}' cannot start from attention")
        assert "--init random" in message
        report = good_json("convert", teacher_folder, tmp_path / mixer, "--mixer", mixer, "--init", "random")
        assert (report["mixer"], report["init"]) == (mixer, "random")
        assert load_model(tmp_path / mixer).config.mixer == mixer


def test_import(good, good_json, refused, teacher_folder, tmp_path):
    config = {
        "LanguageModel": {"input": {"vocab_size": 300}},
        "MixerModel": {"input": {"d_model": 16}},
        "Block1": {
            "n_layers": 1,
            "BlockType": "modules.phi_block",
            "CoreType": "modules.mixers.discrete_mamba2",
            "core_input": {"d_state": 4, "n_v_heads": 2, "n_qk_heads": 2},
        },
    }
    shapes = {"embedding.weight": (300, 16), "final_layernorm.weight": (16,), "final_layernorm.bias": (16,)}
    shapes |= {f"layers.0.input_layernorm.{part}": (16,) for part in ("weight", "bias")}
    shapes |= {"layers.0.mlp.fc1.weight": (64, 16), "layers.0.mlp.fc1.bias": (64,)}
    shapes |= {"layers.0.mlp.fc2.weight": (16, 64), "layers.0.mlp.fc2.bias": (16,)}
    mixer = {"in_proj.weight": (50, 16), "z_bias": (16,), "conv1d.weight": (32, 1, 4), "conv1d.bias": (32,), "D": (2,)}
    shapes |= {f"layers.0.mixer.{name}": shape for name, shape in (mixer | {"out_proj.weight": (16, 16)}).items()}
    weights = {f"backbone.{name}": torch.randn(shape) for name, shape in shapes.items()}
    weights |= {"lm_head.weight": torch.randn(300, 16), "lm_head.bias": torch.randn(300)}
    published = tmp_path / "published"
    published.mkdir()
    (published / "config.json").write_text(json.dumps(config))
    torch.save(weights, published / "pytorch_model.bin")

    out = good("import", published, tmp_path / "student", "--tokenizer", teacher_folder)
    assert out.startswith("Phi-Mamba: 1 layers of discrete-mamba2, 0 of attention\n")
    assert good("generate", tmp_path / "student", "the old word", "--max-new-tokens", "2")
    report = good_json("import", published, tmp_path / "other")
    assert report["notes"] == ["no tokenizer: --tokenizer names a folder or a hub id to take one from"]
    torch.save(weights | {"backbone.spare": torch.zeros(1)}, published / "pytorch_model.bin")
    assert "unknown weights" in refused("import", published, tmp_path / "third")
    assert "of no published layout" in refused("import", teacher_folder, tmp_path / "third")


def test_distill(good, good_json, recipe, teacher_folder, student_folder, text_file, tmp_path):
    given = ("--teacher", teacher_folder, "--data", text_file, "--device", "cpu")
    out = good("distill", recipe, "--output", tmp_path / "run", *given, "--set", "stages.matrix.lr=1e-3")
    assert out == f"student in {tmp_path / 'run' / 'student'}\n"
    assert "lr = 0.001" in (tmp_path / "run/recipe.toml").read_text()
    more = ("--student", student_folder, "--tokenizer", teacher_folder, "--tokens", "512")
    result = good_json("distill", recipe, "--output", tmp_path / "other", *given, *more)
    assert result["student"] == str(tmp_path / "other/student")
    assert list(result["stages"]) == ["converted", "matrix", "logits"]
    assert swapped_layers(load_model(result["student"])) == (0, 1)
    assert json.loads((tmp_path / "other/stages/2-logits/student/stage.json").read_text())["steps"] == 4


def test_prepare(good, good_json, refused, recipe, teacher_folder, text_file, tmp_path):
    prefix = tmp_path / "tokens" / "corpus"
    given = ("prepare", text_file, "--tokenizer", teacher_folder, "--output", prefix)
    assert "dtype            uint16\n" in good(*given)
    made = good_json(*given)
    assert made == good_json("prepare", "--info", f"{prefix}.idx")
    assert made["documents"] == 1
    assert made["tokens"] == made["longest"] == (prefix.parent / "corpus.bin").stat().st_size // 2 > 1000
    found = good_json("distill", recipe, "--teacher", teacher_folder, "--data", prefix, "--output", tmp_path / "run")
    assert (tmp_path / "run" / "student" / "model.safetensors").is_file(), found


@pytest.mark.slow
def test_prepare_a_teacher(good, good_json, refused, recipe, teacher_folder, text_file, tmp_path):
    cache = tmp_path / "cache"
    given = ("prepare", text_file, "--teacher", teacher_folder, "--output", cache, "--device", "cpu", "--top-k", "8")
    given += ("--sequence-length", "16", "--batch-size", "64")
    assert "top_k            8\n" in good(*given)
    made = good_json(*given)
    assert made == good_json("prepare", "--info", cache)
    assert (made["sequence_length"], made["temperature"], made["stored"]) == (16, 1.0, "float16")
    run = (
        "distill",
        recipe,
        "--teacher",
        teacher_folder,
        "--data",
        text_file,
        "--set",
        f"stages.logits.teacher_cache={cache}",
    )
    good_json(*run, "--output", tmp_path / "run")
    assert "temperature 1.0" in refused(*run, "--output", tmp_path / "other", "--set", "stages.logits.temperature=3")
    assert "was begun with top_k = 8" in refused(*given[:-4], "--top-k", "9", *given[-4:])
    assert "no --output" in refused("prepare", text_file, "--teacher", teacher_folder)
    assert "2 sources" in refused("prepare", "a", "b", *given[2:])
    assert "batch_size = 0" in refused(*given, "--batch-size", "0")
    states = good_json(*given[:4], "--output", tmp_path / "states", *given[6:], "--hidden-states", "mixer")["hidden"]
    assert states == {"target": "mixer", "layers": 2, "width": 32, "stored": "bfloat16"}
    assert "hidden states 'all'" in refused(*given[:4], "--output", tmp_path / "x", "--hidden-states", "all")


def test_prepare_with_mistakes(refused, teacher_folder, text_file, tmp_path, tmp_path_factory):
    folder = tmp_path_factory.mktemp("lines")
    (folder / "bad.jsonl").write_text('{"text": "a"}\n{"text": \n')
    (folder / "short.idx").write_bytes(b"MMIDIDX")
    more = ("--tokenizer", teacher_folder, "--output", tmp_path / "corpus")
    assert "bad.jsonl:2 is no JSON" in refused("prepare", folder / "bad.jsonl", *more)
    assert 'no "body" that is a string' in refused("prepare", folder / "bad.jsonl", *more, "--field", "body")
    assert "no file or folder" in refused("prepare", folder / "nowhere", *more)
    assert "no kind of text" in refused("prepare", folder / "short.idx", *more)
    assert "workers = 0" in refused("prepare", text_file, *more, "--workers", "0")
    assert "no --output" in refused("prepare", text_file, "--tokenizer", teacher_folder)
    assert "no --tokenizer" in refused("prepare", text_file, "--output", tmp_path / "corpus")
    assert "cannot load a tokenizer" in refused("prepare", text_file, *more[2:], "--tokenizer", "no/where")
    assert "short.idx is truncated" in refused("prepare", "--info", folder / "short")
    assert "--info with 2 files" in refused("prepare", "--info", "a", "b")


def test_evaluate(good, good_json, teacher_folder, student_folder, text_file):
    options = ("--data", text_file, "--sequence-length", "32", "--samples", "4", "--device", "cpu")
    figures = good_json("evaluate", student_folder, "--teacher", teacher_folder, *options)
    assert figures["tokens"] == 128
    assert figures.keys() == {"model", "tokens", "nll", "perplexity", "teacher_perplexity", "kl", "top1"}
    same = good_json("evaluate", teacher_folder, "--teacher", teacher_folder, *options, "--batch-size", "3")
    assert (same["kl"], same["top1"], same["perplexity"]) == (0, 1, pytest.approx(figures["teacher_perplexity"]))
    out = good("evaluate", teacher_folder, "--tokenizer", teacher_folder, *options, "--dtype", "bfloat16")
    assert re.search(r"^perplexity +[\d.]+$", out, re.MULTILINE)


def test_evaluate_in_detail(good, good_json, teacher_folder, student_folder, text_file, tmp_path):
    options = ("--data", text_file, "--sequence-length", "32", "--samples", "4", "--device", "cpu")
    run = tmp_path / "run"
    run.mkdir()
    (run / "run.json").write_text("{}")
    more = ("--teacher", teacher_folder, "--stride", "16", "--save-to", run)
    figures = good_json("evaluate", student_folder, *more, *options)
    assert figures["bits_per_byte"] > 0
    assert [(part["from"], part["to"]) for part in figures["by_position"]] == [(0, 16), (16, 32)]
    assert json.loads((run / "evaluation" / "text.json").read_text()) == figures
    both = good_json("evaluate", student_folder, teacher_folder, *options)
    assert [one["model"] for one in both["models"]] == [str(student_folder), str(teacher_folder)]
    out = good("evaluate", student_folder, "--details", *options)
    assert re.search(r"^ +16 … 32 +nll [\d.]+$", out, re.MULTILINE)


def test_evaluate_on_tasks(good, good_json, teacher_folder, student_folder, text_file, tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    pytest.importorskip("lm_eval")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    (tmp_path / "tasks").mkdir()
    rows = [{"text": f"number {i} is", "choices": [" still", " glass"], "answer": i % 2} for i in range(6)]
    (tmp_path / "tasks" / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "tasks" / "pick.yaml").write_text(
        f"task: pick\ndataset_path: json\ntest_split: test\noutput_type: multiple_choice\n"
        f"dataset_kwargs:\n  data_files: {{test: {tmp_path}/tasks/rows.jsonl}}\n"
        "doc_to_text: text\ndoc_to_choice: choices\ndoc_to_target: answer\nmetric_list: [{metric: acc}]\n"
    )
    options = ["--tasks", "pick", "--teacher", teacher_folder, "--device", "cpu", "--cache", tmp_path / "scores"]
    options += ["--include-path", tmp_path / "tasks", "--limit", "4"]
    table = good("evaluate", student_folder, teacher_folder, *options)
    assert [line.split()[-1] for line in table.splitlines()[:2]] == ["mean", "acc"]
    assert len(table.splitlines()) in (4, 5)  # no recovery where the teacher's score is zero
    found = good_json("evaluate", student_folder, *options, "--cached-only")
    assert [(row["name"], row["role"]) for row in found["models"]] == [
        (str(teacher_folder), "teacher"),
        (str(student_folder), "student"),
    ]
    assert found["models"][1]["scores"]["pick"]["samples"] == 4
    assert good("evaluate", student_folder, *options, "--cached-only", "--format", "csv").startswith(
        "model,role,figure"
    )
    text = ("--data", text_file, "--sequence-length", "32", "--samples", "2")
    both = good_json("evaluate", student_folder, *options, *text)
    assert both["models"] == found["models"]
    assert [one["tokens"] for one in both["text"]] == [64]


def test_generate(good, good_json, student_folder):
    out = good("generate", student_folder, "the old word", "--max-new-tokens", "5")
    assert out.startswith("the old word")
    knobs = {
        "--max-new-tokens": 6,
        "--temperature": 0.9,
        "--top-k": 20,
        "--top-p": 0.9,
        "--min-p": 0.01,
        "--repetition-penalty": 1.1,
        "--seed": 4,
        "--device": "cpu",
        "--dtype": "float32",
    }
    drawn = [part for pair in knobs.items() for part in pair]
    first, second = (good_json("generate", student_folder, "a vessel", "slowly", *drawn) for _ in range(2))
    assert first == second
    assert [piece["prompt"] for piece in first["continuations"]] == ["a vessel", "slowly"]
    assert all(piece["text"] for piece in first["continuations"])
    streamed = good("generate", student_folder, "the old word", "--max-new-tokens", "5", "--stream")
    assert streamed == out


def test_recipes(good, good_json, recipe):
    assert set(good_json("recipes")) == set(recipe_names())
    assert [line.split()[0] for line in good("recipes").splitlines()] == recipe_names()
    whole = good("recipes", "mohawk", "--set", "stages.matrix.lr=0.5")
    assert "lr = 0.5" in whole
    assert good_json("recipes", recipe)["stages"]["matrix"]["tokens"] == 128


def test_figures_that_are_not_finite_are_null_in_json(capsys):
    limbeck_cli.options.print_json({"perplexity": float("inf"), "all": [float("nan"), 1.5, (2, None)], "name": "ü"})
    assert capsys.readouterr().out == '{"perplexity": null, "all": [null, 1.5, [2, null]], "name": "ü"}\n'


# --- mistakes -------------------------------------------------------------------------------------------------------


@pytest.fixture
def refused(command, tmp_path):
    """A command that is a mistake: code 2, one message, and nothing written; the message."""

    def refused(*arguments):
        before = sorted(tmp_path.rglob("*"))
        code, out, err = command(*arguments)
        assert code == 2, err
        assert out == ""
        assert "Traceback" not in err
        assert len(re.findall("^limbeck: ", err, re.MULTILINE)) == 1, err
        assert sorted(tmp_path.rglob("*")) == before
        return err.partition("limbeck: ")[2]

    return refused


@pytest.fixture
def distill(refused, recipe, teacher_folder, text_file, tmp_path):
    """A distillation with one thing wrong."""

    def distill(*more, recipe=recipe, teacher=teacher_folder, data=text_file):
        given = ("--teacher", teacher, "--data", data, "--output", tmp_path / "run")
        return refused("distill", recipe, *given, *more)

    return distill


def test_unknown_family(refused, distill, tmp_path, tmp_path_factory):
    folder = tmp_path_factory.mktemp("opt")
    sizes = {"hidden_size": 16, "word_embed_proj_dim": 16, "ffn_dim": 32}
    config = OPTConfig(vocab_size=288, num_hidden_layers=1, num_attention_heads=2, **sizes)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    for message in (
        refused("convert", folder, tmp_path / "student"),
        distill("--tokenizer", folder, teacher=folder),
    ):
        assert message.startswith("unknown family 'opt'\nexpected: one of gemma2")


def test_unknown_mixer_init_option_and_layer(refused, distill, teacher_folder, tmp_path):
    convert = ("convert", teacher_folder, tmp_path / "student")
    message = refused(*convert, "--mixer", "discrete-mamba3")
    assert message.startswith("unknown mixer 'discrete-mamba3'")
    assert "try: did you mean 'discrete-mamba2'?" in message
    assert "unknown mixer" in distill("--set", "student.mixer=mambo")
    assert "did you mean 'd_state'?" in refused(*convert, "--set", "mixer.d_sate=4")
    assert "did you mean 'd_state'?" in distill("--set", "mixer.d_sate=4")
    assert "--set lr=4" in refused(*convert, "--set", "lr=4")
    assert "KEY=VALUE" in refused(*convert, "--set", "mixer.d_state")
    assert "attension" in refused(*convert, "--init", "attension")
    assert "0 to 1" in refused(*convert, "--keep-attention", "2")
    assert "--keep-attention 4,10,16,22" in refused(*convert, "--keep-attention", "1-2")


def test_unknown_recipe_and_key(refused, distill):
    assert "did you mean 'mohawk'?" in refused("recipes", "mohwak")
    assert "unknown recipe 'mohwak'" in distill(recipe="mohwak")
    assert "no recipe file nowhere.toml" in distill(recipe="nowhere.toml")
    message = distill("--set", "stages.matrix.learning_rate=1")
    assert "unknown key stages.matrix.learning_rate in --set stages.matrix.learning_rate=1" in message
    assert "did you mean stages.matrix.lr?" in distill("--set", "stages.matrix.l=1")


def test_stage_order(distill, recipe):
    parts = recipe.read_text().split("[stages.")
    recipe.write_text(parts[0] + "[stages." + parts[2] + "\n[stages." + parts[1])
    message = distill(recipe=recipe)
    assert "stages.matrix (matrix) comes after stages.logits (logits)" in message
    assert "matrix → hidden → logits" in message


def test_a_checkpoint_with_a_missing_or_truncated_file(refused, distill, teacher_folder, tmp_path, tmp_path_factory):
    broken = shutil.copytree(teacher_folder, tmp_path_factory.mktemp("broken") / "teacher")
    weights = broken / "model.safetensors"

    def both():
        return refused("convert", broken, tmp_path / "student"), distill(teacher=broken)

    weights.write_bytes(weights.read_bytes()[:-10])
    assert all("model.safetensors is damaged or cut short" in message for message in both())
    weights.unlink()
    assert all("no weights in" in message for message in both())
    (broken / "config.json").unlink()
    assert all("no config.json in" in message for message in both())
    assert "no config.json in" in refused("generate", broken, "a")
    assert "nowhere" in refused("convert", tmp_path / "nowhere", tmp_path / "student")


def test_other_vocabulary(refused, distill, teacher_folder, student_folder, text_file, tmp_path_factory):
    folder = tmp_path_factory.mktemp("wide")
    config = load_model(teacher_folder).config
    config.vocab_size = 300
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    message = distill("--student", student_folder, teacher=folder)
    assert message.startswith("the student's vocabulary has 288 tokens\nexpected: the teacher's 300\ntry: ")
    assert "vocabulary has 288" in refused("evaluate", student_folder, "--teacher", folder, "--data", text_file)


def test_text_that_is_too_short_missing_or_no_text(refused, distill, teacher_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    short, empty, image = folder / "short.txt", folder / "empty.txt", folder / "image.png"
    short.write_text("a still")
    empty.write_text("")
    image.write_bytes(b"\x89PNG")
    assert "is shorter than one sample\nexpected: at least sequence_length + 1 = 17 tokens" in distill(data=short)
    assert "shorter than one sample" in refused("evaluate", teacher_folder, "--data", short)
    assert "no text in" in distill(data=empty)
    assert "is no kind of text" in distill(data=image)
    assert "no file or folder" in distill(data=folder / "nowhere")


def test_the_output_of_another_run(command, refused, recipe, teacher_folder, student_folder, text_file, tmp_path):
    given = ("--teacher", teacher_folder, "--data", text_file, "--output", tmp_path / "run")
    assert command("distill", recipe, *given)[0] == 0
    message = refused("distill", recipe, *given, "--set", "stages.logits.lr=1e-3")
    assert f"{tmp_path / 'run'} holds another run:\n  recipe.stages.logits.lr was 0.0001, now 0.001" in message
    assert "holds something already" in refused("convert", teacher_folder, tmp_path / "run")
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "one.tex").write_text("…")
    assert "holds no run" in refused("distill", recipe, *given[:-1], tmp_path / "thesis")


def test_values_out_of_range(refused, distill, student_folder, text_file):
    assert "device 'abacus'" in refused("generate", student_folder, "a", "--device", "abacus")
    assert "unknown dtype" in refused("generate", student_folder, "a", "--dtype", "float8")
    assert "temperature" in refused("generate", student_folder, "a", "--temperature", "-1")
    assert "batch_size" in refused("evaluate", student_folder, "--data", text_file, "--batch-size", "0")
    assert "nothing to evaluate on" in refused("evaluate", student_folder)
    assert "stride = 0" in refused("evaluate", student_folder, "--data", text_file, "--stride", "0")
    assert "unknown format" in refused("evaluate", student_folder, "--data", text_file, "--format", "html")
    assert "--save-to without" in refused("evaluate", student_folder, "--tasks", "piqa", "--save-to", "run")
    assert "no folder run" in refused(
        "evaluate", student_folder, "--data", text_file, "--sequence-length", "32", "--samples", "1", "--save-to", "run"
    )
    assert "without a single update" in distill("--tokens", "10")


@pytest.mark.parametrize(
    "arguments", [["distil"], ["convert", "a"], ["generate", "a", "b", "--top-k", "few"], ["--sed"]]
)
def test_mistakes_of_usage(command, arguments):
    code, out, err = command(*arguments)
    assert (code, out) == (2, "")
    assert "Usage" in err


# --- in a process of its own ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments", [["--help"], ["distill", "--help"], ["generate", "--help"]])
def test_help_needs_no_torch(arguments):
    program = (
        "import sys, limbeck_cli\n"
        "sys.argv[0] = 'limbeck'\n"
        "try: limbeck_cli.main()\n"
        "except SystemExit as end: print(end.code or 0, {'torch', 'transformers', 'numpy', 'limbeck'} & {*sys.modules})"
    )
    done = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "0 set()"
    assert "Usage: limbeck" in done.stdout


@pytest.mark.slow
def test_import_brings_in_nothing_that_is_optional(tmp_path):
    optional = {"datasets", "lm_eval", "matplotlib"}
    for name in optional:  # so that even an import inside `try` shows
        (tmp_path / f"{name}.py").write_text("__version__ = '99'")
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-c", "import limbeck"],
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
    )
    found = {line.rpartition("|")[2].strip().partition(".")[0] for line in done.stderr.splitlines()}
    assert {"limbeck", "torch"} <= found
    assert not found & optional


def test_triton_is_imported_in_kernels_alone():
    """Where it is installed torch itself imports it with transformers, so the source has to tell."""
    for file in Path(limbeck.__file__).parent.rglob("*.py"):
        if not file.name.endswith("_triton.py"):
            assert not re.search(r"^\s*(import|from) triton\b", file.read_text(), re.MULTILINE), file


@pytest.mark.slow
def test_the_installed_command(teacher_folder, text_file, recipe, tmp_path):
    limbeck_command = Path(sys.executable).with_name("limbeck")

    def run(*arguments):
        done = subprocess.run([limbeck_command, *map(str, arguments)], capture_output=True, text=True, check=False)
        return done.returncode, done.stdout, done.stderr

    given = ("--teacher", teacher_folder, "--data", text_file, "--output", tmp_path / "run")
    code, out, err = run("distill", recipe, *given, "--json")
    assert (code, json.loads(out)["student"]) == (0, str(tmp_path / "run/student"))
    assert "logits 2/2" in err
    code, out, _ = run("generate", tmp_path / "run/student", "a vessel", "--json", "--max-new-tokens", "3")
    assert (code, len(json.loads(out)["continuations"])) == (0, 1)
    code, out, err = run("convert", teacher_folder, tmp_path / "student", "--mixer", "mambo")
    assert (code, out, err.splitlines()[0]) == (2, "", "limbeck: unknown mixer 'mambo'")
    assert not (tmp_path / "student").exists()
