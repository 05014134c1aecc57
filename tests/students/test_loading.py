"""Loading: complete, or an error that names the file or the parameter."""

import json
import pickle

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from limbeck import LimbeckError, load_model, load_tokenizer
from limbeck.students import check_files, load_config, swapped_layers
from limbeck.students.activations import fuse_activations


@pytest.fixture
def sharded(make_student, tmp_path):
    make_student("gpt_neox", (1,)).save_pretrained(tmp_path, max_shard_size="30KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    return tmp_path


def test_sharded_folders_load(sharded, tokens):
    model = load_model(sharded)
    assert not model.training
    assert swapped_layers(model) == (0, 2)
    assert len(check_files(sharded)) > 2
    assert torch.equal(model(tokens).logits, AutoModelForCausalLM.from_pretrained(str(sharded))(tokens).logits)


def test_dtype_and_device(sharded):
    assert load_model(sharded).dtype == torch.float32
    model = load_model(sharded, dtype=torch.bfloat16, device="cpu")
    assert model.dtype == torch.bfloat16
    assert next(iter(model.parameters())).device.type == "cpu"


def test_teachers_load_too(make_teacher, family, tokens, tmp_path):
    teacher = make_teacher(family)
    teacher.save_pretrained(tmp_path)
    fuse_activations(teacher)
    assert torch.equal(load_model(tmp_path)(tokens).logits, teacher(tokens).logits)


def test_a_missing_shard_is_named(sharded):
    victim = sorted(sharded.glob("*.safetensors"))[1]
    victim.unlink()
    with pytest.raises(LimbeckError, match=f"{victim.name} is missing"):
        load_model(sharded)


@pytest.mark.parametrize("keep", [0.0, 0.0001, 0.01, 0.5, 0.999])
def test_a_truncated_shard_is_named(sharded, keep):
    victim = sorted(sharded.glob("*.safetensors"))[1]
    content = victim.read_bytes()
    victim.write_bytes(content[: int(len(content) * keep)])
    with pytest.raises(LimbeckError, match=f"{victim.name} is damaged or cut short"):
        load_model(sharded)


def test_a_file_that_is_no_safetensors(sharded):
    victim = sorted(sharded.glob("*.safetensors"))[0]
    victim.write_bytes((4).to_bytes(8, "little") + b"oops")
    with pytest.raises(LimbeckError, match="no safetensors header"):
        load_model(sharded)


def test_a_broken_index(sharded):
    (sharded / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(LimbeckError, match="not an index"):
        load_model(sharded)


def test_folders_that_are_no_checkpoints(tmp_path, sharded):
    with pytest.raises(LimbeckError, match="cannot load a configuration from 'nowhere'"):
        load_model("nowhere")
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(LimbeckError, match=r"no config\.json"):
        load_model(empty)
    (empty / "config.json").write_text((sharded / "config.json").read_text())
    with pytest.raises(LimbeckError, match="no weights"):
        load_model(empty)
    (empty / "config.json").write_text('{"model_type": "never_heard_of"}')
    with pytest.raises(LimbeckError, match="never_heard_of"):
        load_config(empty)
    with pytest.raises(LimbeckError, match="no tokenizer in"):
        load_tokenizer(empty)
    (empty / "config.json").write_text((sharded / "config.json").read_text())
    with pytest.raises(LimbeckError, match="no tokenizer in"):  # transformers would make an empty one
        load_tokenizer(empty)
    with pytest.raises(LimbeckError, match="cannot load a tokenizer from 'nowhere'"):
        load_tokenizer("nowhere")


# --- keys -------------------------------------------------------------------------------------------------------------


def edited(folder, change):
    file = folder / "model.safetensors"
    weights = load_file(file)
    change(weights)
    save_file(weights, file, metadata={"format": "pt"})


@pytest.fixture
def whole(make_student, tmp_path):
    make_student("gpt_neox", (1,)).save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.parametrize("load", [load_model, AutoModelForCausalLM.from_pretrained])
@pytest.mark.parametrize(
    "key",
    [
        "gpt_neox.layers.0.attention.mixer.D",
        "gpt_neox.layers.1.attention.dense.weight",
        "gpt_neox.layers.2.mlp.dense_h_to_4h.bias",
    ],
)
def test_a_missing_parameter_is_named(whole, key, load):
    edited(whole, lambda weights: weights.pop(key))
    with pytest.raises(LimbeckError, match=f"1 missing \\({key}\\)"):
        load(whole)


def test_a_missing_head_is_an_error_not_a_warning(whole):
    (head,) = {"embed_out.weight", "lm_head.weight"} & set(load_file(whole / "model.safetensors"))
    edited(whole, lambda weights: weights.pop(head))
    with pytest.raises(LimbeckError, match=r"lm_head\.weight"):
        load_model(whole)


def test_a_whole_mixer_missing_from_a_student_is_an_error(whole):
    def drop(weights):
        for key in [key for key in weights if "layers.0.attention.mixer." in key]:
            weights.pop(key)

    edited(whole, drop)
    with pytest.raises(LimbeckError, match=r"missing \(gpt_neox\.layers\.0\.attention\.mixer"):
        load_model(whole)


def test_a_parameter_left_over_is_named(whole):
    edited(whole, lambda weights: weights.update({"gpt_neox.layers.1.mlp.extra": torch.zeros(1)}))
    with pytest.raises(LimbeckError, match=r"1 left over \(gpt_neox\.layers\.1\.mlp\.extra\)"):
        load_model(whole)


def test_a_teacher_with_a_missing_parameter(make_teacher, tmp_path):
    make_teacher("llama").save_pretrained(tmp_path)
    edited(tmp_path, lambda weights: weights.pop("model.norm.weight"))
    with pytest.raises(LimbeckError, match=r"missing \(model\.norm\.weight\)"):
        load_model(tmp_path)


# --- .bin -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def binary(whole):
    weights = load_file(whole / "model.safetensors")
    torch.save(weights, whole / "pytorch_model.bin")
    (whole / "model.safetensors").unlink()
    return whole


def test_bin_files_load(binary):
    assert swapped_layers(load_model(binary)) == (0, 2)
    assert [path.name for path in check_files(binary)] == ["pytorch_model.bin"]


def test_a_truncated_bin_file_is_named(binary):
    file = binary / "pytorch_model.bin"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(LimbeckError, match=r"pytorch_model\.bin is damaged or cut short"):
        load_model(binary)


def test_code_in_a_bin_file_does_not_run(binary, tmp_path):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    torch.save({"x": Evil()}, binary / "pytorch_model.bin")
    with pytest.raises((LimbeckError, pickle.UnpicklingError)):
        load_model(binary)
    assert not (tmp_path / "ran").exists()


def test_configuration_errors_stay_readable(whole):
    config = json.loads((whole / "config.json").read_text())
    (whole / "config.json").write_text(json.dumps(config | {"mixer": "discrete-mamba"}))
    with pytest.raises(LimbeckError, match="unknown mixer"):
        load_model(whole)
