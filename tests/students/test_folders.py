"""Conversion on disk: the student that is made in memory, file by file; whole or not at all."""

import json
import re
import shutil

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedModel

import limbeck
from limbeck import LimbeckError, convert, convert_folder
from limbeck.students import FAMILIES, folders
from limbeck.students.shards import SafetensorsFile, Spec, Weights
from tiny import tiny_teacher

INITS = ("attention", "identity", "random")


def assert_same(first, second):
    first, second = first.state_dict(), second.state_dict()
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert tensor.dtype == second[name].dtype, name
        assert torch.equal(tensor, second[name]), name


def files_of(folder):
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def as_bin(folder):
    """Write a folder's weights as torch.save does, tied tensors twice."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    for path in folder.glob("model*"):
        path.unlink()
    names = list(model.state_dict())
    parts = {"pytorch_model-00001-of-00002.bin": names[::2], "pytorch_model-00002-of-00002.bin": names[1::2]}
    if model.config.tie_word_embeddings:
        parts = {"pytorch_model-00001-of-00001.bin": names}
    for file, part in parts.items():
        torch.save({name: model.state_dict()[name] for name in part}, folder / file)
    weight_map = {name: file for file, part in parts.items() for name in part}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


# --- the student that is made in memory ---------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("init", INITS)
def test_every_family_is_converted_as_in_memory(family, init, tmp_path):
    dtype = torch.bfloat16 if init == "random" else torch.float32
    tiny_teacher(family, dtype=dtype).save_pretrained(tmp_path / "teacher", max_shard_size="20KB")
    assert len(list((tmp_path / "teacher").glob("*.safetensors"))) > 2
    options = {"keep_attention": [1], "init": init, "seed": 3}
    conversion = convert_folder(tmp_path / "teacher", tmp_path / "streamed", **options)
    student = convert(AutoModelForCausalLM.from_pretrained(tmp_path / "teacher"), **options)
    streamed, info = AutoModelForCausalLM.from_pretrained(tmp_path / "streamed", output_loading_info=True)
    assert not any(info.values()), info
    assert_same(streamed, student)
    assert streamed.dtype == dtype

    student.save_pretrained(tmp_path / "saved")
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert streamed.config.to_dict() == {**saved.config.to_dict(), "_name_or_path": streamed.config._name_or_path}
    assert streamed.generation_config.to_dict() == saved.generation_config.to_dict()
    assert set(conversion.copied) | set(conversion.made) == {
        name for name in saved.state_dict() if name not in saved.all_tied_weights_keys
    }


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", ["gpt_neox", "llama", "gpt2"])
def test_bin_files(family, tied, tmp_path):
    tiny_teacher(family, tie_word_embeddings=tied).save_pretrained(tmp_path / "teacher")
    as_bin(tmp_path / "teacher")
    convert_folder(tmp_path / "teacher", tmp_path / "student", keep_attention=[2])
    student = AutoModelForCausalLM.from_pretrained(tmp_path / "student")
    assert_same(student, convert(AutoModelForCausalLM.from_pretrained(tmp_path / "teacher"), keep_attention=[2]))
    names = sorted(path.name for path in (tmp_path / "student").glob("model*"))
    parts = ["model-00001-of-00001.safetensors"] if tied else [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    assert names == [*parts, "model.safetensors.index.json"]
    assert (student.get_output_embeddings().weight is student.get_input_embeddings().weight) == tied
    keys = [key for name in parts for key in load_file(tmp_path / "student" / name)]
    assert sum("embed" in key or "wte" in key or "lm_head" in key for key in keys) == (1 if tied else 2)


def test_shards_mirror_the_sources(tmp_path):
    tiny_teacher("phi").save_pretrained(tmp_path / "teacher", max_shard_size="30KB")
    conversion = convert_folder(tmp_path / "teacher", tmp_path / "student", keep_attention=[0, 2])
    old, new = (
        {path.name: load_file(path) for path in (tmp_path / name).glob("*.safetensors")}
        for name in ("teacher", "student")
    )
    assert new.keys() == old.keys()
    attention = "model.layers.1.self_attn."
    for file, tensors in old.items():
        kept = {key for key in tensors if not key.startswith(attention)}
        assert {key for key in new[file] if ".mixer." not in key} == kept
    index = json.loads((tmp_path / "student" / "model.safetensors.index.json").read_text())
    assert index["weight_map"] == {key: file for file, tensors in new.items() for key in tensors}
    assert index["metadata"]["total_size"] == sum(t.nbytes for tensors in new.values() for t in tensors.values())
    assert len({index["weight_map"][key] for key in conversion.made}) == 1
    with safe_open(tmp_path / "student" / next(iter(new)), "pt") as file:
        assert file.metadata() == {"format": "pt"}


def rewritten(folder, change, file="model.safetensors"):
    weights = load_file(folder / file)
    save_file(change(weights), folder / file, metadata={"format": "pt"})


@pytest.mark.parametrize("family", ["gpt_neox", "gpt2", "llama"])
def test_older_keys(family, tmp_path):
    """A backbone's own keys, without its prefix, the head under its older name, and masks that were once saved."""
    folder = tmp_path / "teacher"
    tiny_teacher(family).save_pretrained(folder)
    prefix = {"gpt_neox": "gpt_neox.", "gpt2": "transformer.", "llama": "model."}[family]
    site = {"gpt_neox": "layers.{}.attention.", "gpt2": "h.{}.attn.", "llama": "layers.{}.self_attn."}[family]
    extra = {"gpt_neox": "bias", "gpt2": "bias", "llama": "rotary_emb.inv_freq"}[family]

    def older(weights):
        weights = {
            re.sub(r"^lm_head", "embed_out", key) if family == "gpt_neox" else key: tensor
            for key, tensor in weights.items()
        }
        weights |= {prefix + site.format(layer) + extra: torch.ones(2) for layer in range(3)}
        return {key.removeprefix(prefix): tensor for key, tensor in weights.items()}

    rewritten(folder, older)
    conversion = convert_folder(folder, tmp_path / "student", keep_attention=[1])
    student = AutoModelForCausalLM.from_pretrained(tmp_path / "student")
    assert_same(student, convert(AutoModelForCausalLM.from_pretrained(folder), keep_attention=[1]))
    keys = load_file(tmp_path / "student" / "model.safetensors").keys()
    assert not any(key.startswith(prefix) for key in keys)
    assert {site.format(layer) + extra for layer in range(3)} <= set(conversion.left_out)
    assert all(key in keys for key in conversion.copied if key.removeprefix(prefix) == key and family != "gpt_neox")


def test_dtypes_stay_and_loading_decides(tmp_path):
    """A checkpoint in float32 whose configuration says float16: copies stay, mixers start as if it were loaded."""
    folder = tmp_path / "teacher"
    tiny_teacher("llama").save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"dtype": "float16"}))
    conversion = convert_folder(folder, tmp_path / "student")
    assert conversion.dtype == "float16"
    weights = load_file(tmp_path / "student" / "model.safetensors")
    assert weights["model.layers.0.mlp.up_proj.weight"].dtype == torch.float32
    assert weights["model.layers.0.self_attn.mixer.in_proj.weight"].dtype == torch.float16
    assert weights["model.layers.0.self_attn.mixer.D"].dtype == torch.float32
    assert_same(AutoModelForCausalLM.from_pretrained(tmp_path / "student"), convert(folder))


def test_a_configuration_without_a_dtype(tmp_path):
    folder = tmp_path / "teacher"
    tiny_teacher("llama", dtype=torch.bfloat16).save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    config.pop("dtype")
    (folder / "config.json").write_text(json.dumps(config))
    assert convert_folder(folder, tmp_path / "student").dtype == "bfloat16"
    assert_same(AutoModelForCausalLM.from_pretrained(tmp_path / "student"), convert(folder))


# --- what goes along ------------------------------------------------------------------------------------------------


@pytest.fixture
def teacher(tmp_path):
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    folder = tmp_path / "teacher"
    model = tiny_teacher("gpt_neox")
    model.generation_config = GenerationConfig(eos_token_id=7, top_k=3, do_sample=True)
    model.save_pretrained(folder)
    words = Tokenizer(models.WordLevel({"<unk>": 0, "a": 3}, unk_token="<unk>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>")
    tokenizer.chat_template = {"default": "{{ messages }}", "tool_use": "{{ tools }}"}
    tokenizer.save_pretrained(folder)
    return folder


def test_files_go_along_byte_for_byte(teacher, tmp_path):
    (teacher / "generation_config.json").write_text(
        '{ "eos_token_id":   7, "temperature": 0.5, "top_k": 3 }'
    )  # would not be saved so
    for name in ("LICENSE.md", "special_tokens_map.json", "training_args.bin", "modeling_own.py", ".hidden"):
        (teacher / name).write_text("{}")
    conversion = convert_folder(teacher, tmp_path / "student", keep_attention=[1])
    carried = {
        "LICENSE.md",
        "additional_chat_templates/tool_use.jinja",
        "chat_template.jinja",
        "generation_config.json",
        "special_tokens_map.json",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert set(conversion.carried) == carried
    assert files_of(tmp_path / "student") == carried | {"config.json", "conversion.json", "model.safetensors"}
    for name in carried:
        assert (tmp_path / "student" / name).read_bytes() == (teacher / name).read_bytes()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "student")
    assert tokenizer("a")["input_ids"] == [3]
    assert tokenizer.chat_template["tool_use"] == "{{ tools }}"
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "student").generation_config.top_k == 3


def test_the_report(teacher, tmp_path):
    target = tmp_path / "deep" / "student"
    conversion = convert_folder(teacher, target, keep_attention=[1], seed=3)
    report = json.loads((target / "conversion.json").read_text())
    assert report["swapped_layers"] == conversion.swapped_layers == [0, 2]
    assert report["kept_attention"] == [1]
    assert report["seed"] == 3
    names = set(AutoModelForCausalLM.from_pretrained(target).state_dict())
    assert set(report["copied"]) | set(report["made"]) == names
    assert all(".mixer." in name for name in report["made"])
    assert len(report["left_out"]) == 8
    assert all("query_key_value" in name or "dense" in name for name in report["left_out"])
    assert any("output bias" in note for note in report["notes"])
    assert "2 of 3 layers of a gpt_neox model" in conversion.summary()
    assert "tokenizer.json" in conversion.summary()
    assert [path.name for path in target.parent.iterdir()] == ["student"]


def test_a_folder_without_a_tokenizer_says_so(tmp_path):
    tiny_teacher("llama").save_pretrained(tmp_path / "teacher")
    conversion = convert_folder(tmp_path / "teacher", tmp_path / "student")
    assert any("no tokenizer" in note for note in conversion.notes)


@pytest.mark.parametrize("first", ["model.safetensors", "model.safetensors.index.json", "pytorch_model.bin.index.json"])
def test_a_hub_id_is_fetched_file_by_file(teacher, tmp_path, monkeypatch, first):
    """Of the formats a repository offers, the one that transformers would take and no other."""
    if first != "model.safetensors":
        AutoModelForCausalLM.from_pretrained(teacher).save_pretrained(teacher, max_shard_size="30KB")
        (teacher / "model.safetensors").unlink(missing_ok=True)
    hub, cache, fetched = tmp_path / "hub", tmp_path / "cache", []
    shutil.copytree(teacher, hub)
    if first.startswith("pytorch"):
        as_bin(hub)
    else:
        (hub / "pytorch_model.bin").write_text("never fetched")
    cache.mkdir()

    def snapshot_download(source, allow_patterns):
        assert source == "someone/teacher"
        for path in {path for pattern in allow_patterns for path in hub.glob(pattern) if path.is_file()}:
            (cache / path.relative_to(hub)).parent.mkdir(exist_ok=True)
            shutil.copyfile(path, cache / path.relative_to(hub))
            fetched.append(path.name)
        return str(cache)

    monkeypatch.setattr("limbeck.students.sources.snapshot_download", snapshot_download)
    monkeypatch.setattr(folders, "load_config", lambda source: limbeck.students.load_config(teacher))
    conversion = convert_folder("someone/teacher", tmp_path / "student", keep_attention=[0])
    assert "pytorch_model.bin" not in fetched
    assert "tokenizer.json" in conversion.carried
    assert_same(AutoModelForCausalLM.from_pretrained(tmp_path / "student"), convert(teacher, keep_attention=[0]))


def test_a_hub_id_from_the_cache(teacher, tmp_path, monkeypatch):
    """What huggingface_hub has in its cache is used with no network."""
    from huggingface_hub import constants

    repository = tmp_path / "cache" / "models--someone--teacher"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    shutil.copytree(teacher, repository / "snapshots" / ("0" * 40))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(folders, "load_config", lambda source: limbeck.students.load_config(teacher))
    convert_folder("someone/teacher", tmp_path / "student")
    assert_same(AutoModelForCausalLM.from_pretrained(tmp_path / "student"), convert(teacher))


def test_a_hub_id_that_is_not_there(tmp_path, teacher, monkeypatch):
    with pytest.raises(LimbeckError, match="cannot load a configuration from 'someone/nothing'"):
        convert_folder("someone/nothing", tmp_path / "student")
    monkeypatch.setattr(folders, "load_config", lambda source: limbeck.students.load_config(teacher))
    with pytest.raises(LimbeckError, match="cannot load a model from 'someone/nothing'"):
        convert_folder("someone/nothing", tmp_path / "student")
    assert [path.name for path in tmp_path.iterdir()] == ["teacher"]


# --- what is refused, and what is left behind -----------------------------------------------------------------------


def test_a_destination_that_holds_something_is_refused(teacher, tmp_path):
    target = tmp_path / "student"
    target.mkdir()
    (target / "precious").touch()
    for taken in (target, target / "precious"):
        with pytest.raises(LimbeckError, match="holds something already"):
            convert_folder(teacher, taken)
    assert [path.name for path in target.iterdir()] == ["precious"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("where", ["copy", "write", "tokenizer"])
def test_a_failed_conversion_leaves_nothing(teacher, tmp_path, monkeypatch, where, error):
    def fail(*args, **kwargs):
        raise error("no further")

    target, name = {
        "copy": (Weights, "copy"),
        "write": (SafetensorsFile, "put"),
        "tokenizer": (folders.shutil, "copyfile"),
    }[where]
    monkeypatch.setattr(target, name, fail)
    with pytest.raises(error, match="no further"):
        convert_folder(teacher, tmp_path / "student")
    assert [path.name for path in tmp_path.iterdir()] == ["teacher"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda weights: weights.pop("gpt_neox.layers.0.mlp.dense_h_to_4h.bias"),
            r"1 missing \(gpt_neox\.layers\.0\.mlp",
        ),
        (
            lambda weights: weights.pop("gpt_neox.layers.0.attention.dense.bias"),
            r"1 missing \(gpt_neox\.layers\.0\.att",
        ),
        (lambda weights: weights.update(stray=torch.zeros(1)), r"1 left over \(stray\)"),
        (
            lambda weights: weights.update({"gpt_neox.final_layer_norm.bias": torch.zeros(5)}),
            r"final_layer_norm\.bias in .*model\.safetensors has shape \(5,\)[\s\S]*\(32,\)",
        ),
    ],
)
def test_weights_that_do_not_fit_are_refused(teacher, tmp_path, change, message):
    rewritten(teacher, lambda weights: (change(weights), weights)[1])
    with pytest.raises(LimbeckError, match=message):
        convert_folder(teacher, tmp_path / "student")
    assert [path.name for path in tmp_path.iterdir()] == ["teacher"]


def test_a_missing_head_is_refused(teacher, tmp_path):
    rewritten(
        teacher, lambda weights: {k: v for k, v in weights.items() if k not in ("lm_head.weight", "embed_out.weight")}
    )
    with pytest.raises(LimbeckError, match=r"missing \(lm_head\.weight\)"):
        convert_folder(teacher, tmp_path / "student")


def test_quantised_checkpoints_are_refused(teacher, tmp_path):
    config = json.loads((teacher / "config.json").read_text())
    quantised = config | {"quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True}}
    (teacher / "config.json").write_text(json.dumps(quantised))
    with pytest.raises(LimbeckError, match="quantised"):
        convert_folder(teacher, tmp_path / "student")


def test_weights_that_would_be_rearranged_are_refused(teacher, tmp_path, monkeypatch):
    from transformers.core_model_loading import Chunk, WeightConverter

    halves = WeightConverter("embed_in.weight", ["first.weight", "second.weight"], operations=[Chunk(dim=0)])
    rewritten(teacher, lambda weights: {k.replace("gpt_neox.embed_in", "old.embed_in"): v for k, v in weights.items()})
    monkeypatch.setattr(folders, "get_model_conversion_mapping", lambda model: [halves])
    with pytest.raises(LimbeckError, match=r"old\.embed_in\.weight is in a layout that is rearranged"):
        convert_folder(teacher, tmp_path / "student")


def test_code_in_a_bin_file_does_not_run(teacher, tmp_path):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    (teacher / "model.safetensors").unlink()
    torch.save({"x": Evil()}, teacher / "pytorch_model.bin")
    with pytest.raises(LimbeckError, match=r"pytorch_model\.bin"):
        convert_folder(teacher, tmp_path / "student")
    torch.save({"epoch": 3}, teacher / "pytorch_model.bin")
    with pytest.raises(LimbeckError, match="something else than weights"):
        convert_folder(teacher, tmp_path / "student")
    assert [path.name for path in tmp_path.iterdir()] == ["teacher"]


def test_hooks_into_transformers_are_where_they_were():
    """Names that are not part of transformers' public interface and that this conversion rests on."""
    assert hasattr(PreTrainedModel, "_adjust_missing_and_unexpected_keys"), "see students/folders.py: _unfilled"
    model = tiny_teacher("gpt_neox", tie_word_embeddings=True)
    assert set(model.all_tied_weights_keys) == {"lm_head.weight"}, "see students/folders.py: _tied_twice"
    names = folders._loaded_names(model, ["embed_out.weight", "layers.0.mlp.dense_h_to_4h.bias"])
    assert list(names.values()) == ["lm_head.weight", "gpt_neox.layers.0.mlp.dense_h_to_4h.bias"]


# --- files ----------------------------------------------------------------------------------------------------------


def test_a_file_of_every_dtype(tmp_path):
    tensors = {
        "empty": torch.zeros(0, 3),
        "flag": torch.tensor([True, False, True]),
        "half": torch.randn(3, dtype=torch.float16),
        "number": torch.tensor(3.5, dtype=torch.float64),
        "short": torch.arange(5, dtype=torch.int16),
        "transposed": torch.randn(4, 3).T,
        "wide": torch.randn(3, dtype=torch.bfloat16),
    }
    specs = {key: Spec(tensor.dtype, tuple(tensor.shape)) for key, tensor in tensors.items()}
    with SafetensorsFile(tmp_path / "made.safetensors", specs) as file:
        for key in reversed(tensors):
            file.put(key, tensors[key])
    read = load_file(tmp_path / "made.safetensors")
    assert all(torch.equal(read[key], tensor) for key, tensor in tensors.items())
    weights = Weights([tmp_path / "made.safetensors"])
    assert weights.specs == specs
    with SafetensorsFile(tmp_path / "again.safetensors", specs) as file:
        for key in tensors:
            file.put_from(key, weights, key)
    assert (tmp_path / "again.safetensors").read_bytes() == (tmp_path / "made.safetensors").read_bytes()
    with pytest.raises(AssertionError, match="never written"), SafetensorsFile(tmp_path / "short", specs):
        pass
