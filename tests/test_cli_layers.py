"""`limbeck score-layers`, `limbeck inspect` and ``convert --keep-attention auto:1``."""

import json

import pytest

import limbeck
from limbeck.students import load_config

SHORT = ("--sequence-length", 32, "--samples", 4, "--device", "cpu")


def test_layers_are_scored(command, teacher_folder, student_folder, text_file):
    code, out, err = command("score-layers", teacher_folder, student_folder, "--data", text_file, *SHORT, "--json")
    assert code == 0, err
    layers = json.loads(out)["layers"]
    assert [set(layer) for layer in layers] == [{"layer", "gain", "kl"}] * 2
    assert layers[0]["gain"] >= layers[1]["gain"]
    code, out, _ = command("score-layers", teacher_folder, student_folder, "--data", text_file, *SHORT)
    assert code == 0
    assert out.splitlines()[1].split() == ["layer", "gain", "KL", "left"]
    assert [int(line.split()[0]) for line in out.splitlines()[2:]] == [layer["layer"] for layer in layers]


def test_the_best_layers_keep_attention(command, teacher_folder, student_folder, tmp_path_factory, tmp_path):
    text = tmp_path_factory.mktemp("long") / "long.txt"
    text.write_text("what is poured in at the top comes out clearer at the side " * 200)
    code, out, _ = command("score-layers", teacher_folder, student_folder, "--data", text, "--json", "--device", "cpu")
    best = json.loads(out)["layers"][0]["layer"]
    for name, extra in (("fresh", ()), ("scored", ("--scored-by", student_folder))):
        folder = tmp_path / name
        given = ("--keep-attention", "auto:1", "--data", text, *extra, "--json")
        code, out, err = command("convert", teacher_folder, folder, *given)
        assert code == 0, err
        assert json.loads(out)["kept_attention"] == [best]
        assert load_config(folder).swapped_layers == [1 - best]
        assert ("has learned nothing" in err) == (name == "fresh")


def test_what_auto_refuses(command, teacher_folder, student_folder, text_file, tmp_path):
    def refused(*arguments, destination=tmp_path / "new"):
        code, out, err = command("convert", teacher_folder, destination, *arguments)
        assert (code, out) == (2, "")
        assert not (tmp_path / "new").exists()
        return err

    assert "without text to score" in refused("--keep-attention", "auto:1")
    assert "auto:4" in refused("--keep-attention", "auto", "--data", text_file)
    assert "--data without scores" in refused("--data", text_file)
    assert "--scored-by without scores" in refused("--scored-by", student_folder, "--keep-attention", "1")
    assert "attention kept" not in refused("--keep-attention", "auto:3", "--data", text_file)
    hybrid = tmp_path / "hybrid"
    limbeck.convert_folder(teacher_folder, hybrid, keep_attention=[0])
    assert "has layers with attention" in refused(
        "--keep-attention", "auto:1", "--data", text_file, "--scored-by", hybrid
    )
    assert "holds something" in refused("--keep-attention", "auto:1", "--data", text_file, destination=hybrid)


@pytest.mark.slow
def test_an_inspection(command, teacher_folder, student_folder, tmp_path):
    (tmp_path / "run").mkdir()
    given = ("--teacher", teacher_folder, "--text", "the old word", "--device", "cpu")
    places = ("--output", tmp_path / "pictures", "--save-to", tmp_path / "run")
    code, out, err = command("inspect", student_folder, *given, *places, "--json")
    assert code == 0, err
    found = json.loads(out)
    assert "".join(found["tokens"]) == "the old word"
    saved = tmp_path / "run" / "evaluation" / "inspect.json"
    assert found.pop("files") == [*(str(tmp_path / "pictures" / f"layer-0{n}.png") for n in (0, 1)), str(saved)]
    assert json.loads(saved.read_text()) == found
    code, out, _ = command("inspect", student_folder, *given, "--layers", 1)
    assert code == 0
    assert [line.split()[:2] for line in out.splitlines()[1:]] == [["1", "2"]]


def test_mixers_without_a_matrix(command, teacher_folder, tmp_path):
    limbeck.convert_folder(teacher_folder, tmp_path / "mamba", mixer="mamba", init="random")
    code, out, _ = command("inspect", tmp_path / "mamba", "--teacher", teacher_folder, "--text", "still")
    assert code == 0
    assert "note: Mamba has no mixing matrix per head: no distance" in out


def test_what_an_inspection_refuses(command, teacher_folder, student_folder, tmp_path):
    def refused(*arguments):
        code, out, err = command("inspect", student_folder, "--teacher", teacher_folder, *arguments)
        assert (code, out) == (2, "")
        return err

    assert "neither a text nor data" in refused()
    assert "--layers 'a'" in refused("--text", "still", "--layers", "a")
    assert "png, svg" in refused("--text", "still", "--output", tmp_path, "--format", "jpeg")
    assert "no folder" in refused("--text", "still", "--save-to", tmp_path / "none")
