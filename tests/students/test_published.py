"""Published checkpoints become students: what they compute, against plain torch written out here; what is refused.

The folders are written as METHODS 4 describes the published ones, at tiny sizes.
"""

import json
import math

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GPTNeoXConfig, MambaConfig

import limbeck
from limbeck.errors import LimbeckError
from limbeck.students import StudentCausalLM

WIDTH, VOCABULARY, LAYERS = 128, 53, 4
CLOSE = {"rtol": 1e-5, "atol": 1e-5}

# --- tiny checkpoints as they are published ---------------------------------------------------------------------------


def phi_mamba_config(blocks=((LAYERS, "mamba"),)):
    """A config.json with these blocks: how many layers, and of what."""
    mamba = {
        "CoreType": "modules.mixers.discrete_mamba2",
        "core_input": {
            "d_state": 8,
            "n_v_heads": 4,
            "n_qk_heads": 2,
            "d_conv": 4,
            "conv_bias": True,
            "expand": 1,
            "chunk_size": 16,
            "activation": "identity",
            "bias": False,
        },
    }
    attention = {"CoreType": "modules.mixers.phi_attention", "core_input": {"attn_type": "eager"}}
    around = {"BlockType": "modules.phi_block", "block_input": {"resid_dropout": 0.0}}
    return {
        "LanguageModel": {"input": {"vocab_size": VOCABULARY, "pad_vocab_size_multiple": 8}},
        "MixerModel": {"input": {"d_model": WIDTH, "n_layer": LAYERS, "lm_head_prenorm": "layer"}},
        **{
            f"Block{i}": {"n_layers": count, **around, **(mamba if kind == "mamba" else attention)}
            for i, (count, kind) in enumerate(blocks, start=1)
        },
    }


HYBRID = ((1, "mamba"), (1, "attention"), (2, "mamba"))


def phi_mamba_weights(blocks=((LAYERS, "mamba"),)):
    heads, groups, state, padded = 4, 2, 8, 56
    channels = WIDTH + 2 * groups * state
    weights = {
        "backbone.embedding.weight": torch.randn(padded, WIDTH),
        **linear("lm_head", WIDTH, padded),
        **norm("backbone.final_layernorm"),
    }
    kinds = [kind for count, kind in blocks for _ in range(count)]
    for i, kind in enumerate(kinds):
        layer = f"backbone.layers.{i}"
        weights |= norm(f"{layer}.input_layernorm")
        weights |= linear(f"{layer}.mlp.fc1", WIDTH, 4 * WIDTH) | linear(f"{layer}.mlp.fc2", 4 * WIDTH, WIDTH)
        if kind == "attention":
            for name in ("q_proj", "k_proj", "v_proj", "dense"):
                weights |= linear(f"{layer}.mixer.self_attn.{name}", WIDTH, WIDTH)
            continue
        weights |= linear(f"{layer}.mixer.in_proj", WIDTH, channels + WIDTH + heads, bias=False)
        weights |= linear(f"{layer}.mixer.out_proj", WIDTH, WIDTH, bias=False)
        weights |= {
            f"{layer}.mixer.z_bias": torch.randn(WIDTH),
            f"{layer}.mixer.conv1d.weight": torch.randn(channels, 1, 4),
            f"{layer}.mixer.conv1d.bias": torch.randn(channels),
            f"{layer}.mixer.D": torch.randn(heads),
        }
    return weights


CALD_WIDTH, INNER, STATE, RANK = 32, 40, 4, 3


def cald_config(parallel=True, **changes):
    """A MambaConfig with fields of its GPT-NeoX put on top, as build_gpt_neox_mamba_model does."""
    neox = GPTNeoXConfig(
        vocab_size=VOCABULARY,
        hidden_size=CALD_WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        use_parallel_residual=parallel,
        layer_norm_eps=1e-3,
    ).to_dict()
    outer = {
        "architectures": ["HybridMambaForCausalLM"],
        "model_type": "mamba",
        "hidden_size": CALD_WIDTH,
        "intermediate_size": INNER,
        "time_step_rank": RANK,
        "state_size": STATE,
        "num_hidden_layers": 2,
        "n_layers": 2,
        "vocab_size": VOCABULARY,
        "use_parallel_residual": parallel,
        "layer_norm_eps": 1e-3,
        "hidden_dropout": 0.0,
        "use_mamba": True,
        "rms_norm": False,
        "residual_in_fp32": True,
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
        "gpt_neox_config": neox | {"torch_dtype": "float16", "top_k": 50, "rotary_pct": 0.25},
    }
    assert set(outer) - set(MambaConfig().to_dict()) < {*outer}, "it is a Mamba configuration with more in it"
    return outer | changes


def cald_weights():
    weights = {
        "gpt_neox.embed_in.weight": torch.randn(VOCABULARY, CALD_WIDTH),
        **norm("gpt_neox.final_layer_norm", CALD_WIDTH),
        **linear("embed_out", CALD_WIDTH, VOCABULARY, bias=False),
    }
    for i in range(2):
        layer = f"gpt_neox.layers.{i}"
        mamba = f"{layer}.attention.mamba"
        weights |= norm(f"{layer}.input_layernorm", CALD_WIDTH) | norm(f"{layer}.post_attention_layernorm", CALD_WIDTH)
        weights |= linear(f"{layer}.mlp.dense_h_to_4h", CALD_WIDTH, 48)
        weights |= linear(f"{layer}.mlp.dense_4h_to_h", 48, CALD_WIDTH)
        weights |= linear(f"{mamba}.in_proj", CALD_WIDTH, 2 * INNER, bias=False)
        weights |= linear(f"{mamba}.out_proj", INNER, CALD_WIDTH, bias=False)
        weights |= linear(f"{mamba}.x_proj", INNER, RANK + 2 * STATE, bias=False)
        weights |= linear(f"{mamba}.dt_proj", RANK, INNER)
        weights |= {
            f"{mamba}.conv1d.weight": torch.randn(INNER, 1, 4),
            f"{mamba}.conv1d.bias": torch.randn(INNER),
            f"{mamba}.A_log": torch.rand(INNER, STATE),
            f"{mamba}.D": torch.randn(INNER),
        }
    return weights


def linear(name, inputs, outputs, bias=True):
    found = {f"{name}.weight": torch.randn(outputs, inputs) / math.sqrt(inputs)}
    return found | ({f"{name}.bias": 0.3 * torch.randn(outputs)} if bias else {})


def norm(name, width=WIDTH):
    return {f"{name}.weight": 1 + 0.3 * torch.randn(width), f"{name}.bias": 0.3 * torch.randn(width)}


CHECKPOINTS = {
    "Phi-Mamba": lambda: (phi_mamba_config(), phi_mamba_weights()),
    "Hybrid-Phi-Mamba": lambda: (phi_mamba_config(HYBRID), phi_mamba_weights(HYBRID)),
    "CALD GPT-NeoX Mamba": lambda: (cald_config(), cald_weights()),
}


def write(folder, config, weights, kind="safetensors"):
    """Write a checkpoint, whole or in two shards, as `.safetensors` or as `.bin`."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    suffix = kind.removesuffix(" shards")
    stem, save = ("model", save_file) if suffix == "safetensors" else ("pytorch_model", torch.save)
    if suffix == kind:
        save(weights, folder / f"{stem}.{suffix}")
        return folder
    names = sorted(weights)
    parts = {f"{stem}-0000{i + 1}-of-00002.{suffix}": names[i::2] for i in range(2)}
    for file, keys in parts.items():
        save({key: weights[key] for key in keys}, folder / file)
    index = {"weight_map": {key: file for file, keys in parts.items() for key in keys}}
    (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps(index))
    return folder


# --- the same models in plain torch -----------------------------------------------------------------------------------


class Named:
    """Weights under a prefix, and the two operations that read them."""

    def __init__(self, weights, prefix="", eps=1e-5):
        self.weights, self.prefix, self.eps = weights, prefix, eps

    def __getitem__(self, name):
        return self.weights[self.prefix + name]

    def at(self, prefix):
        return Named(self.weights, f"{self.prefix}{prefix}.", self.eps)

    def linear(self, name, x):
        return F.linear(x, self[f"{name}.weight"], self.weights.get(f"{self.prefix}{name}.bias"))

    def norm(self, name, x):
        return F.layer_norm(x, x.shape[-1:], self[f"{name}.weight"], self[f"{name}.bias"], self.eps)

    def conv(self, x):
        weight = self["conv1d.weight"]
        return F.conv1d(F.pad(x.mT, (weight.shape[-1] - 1, 0)), weight, self["conv1d.bias"], groups=len(weight)).mT


def phi_mamba_logits(config, weights, ids):
    model = Named(weights)
    x = model["backbone.embedding.weight"][ids]
    kinds = [block["CoreType"] for key, block in config.items() if "Block" in key for _ in range(block["n_layers"])]
    for i, kind in enumerate(kinds):
        layer = model.at(f"backbone.layers.{i}")
        u = layer.norm("input_layernorm", x)
        mixed = phi_attention(layer.at("mixer.self_attn"), u) if "attention" in kind else discrete(layer.at("mixer"), u)
        x = x + mixed + layer.linear("mlp.fc2", F.gelu(layer.linear("mlp.fc1", u), approximate="tanh"))
    return model.linear("lm_head", model.at("backbone").norm("final_layernorm", x))


def discrete(mixer, u):
    """METHODS 1.2, token by token: S ← exp(−softplus(A_log)) S + x ⊗ B, y = S·C + D·x, gate, projection."""
    heads, groups, state = 4, 2, 8
    channels = WIDTH + 2 * groups * state
    xBC, z, A_log = mixer.linear("in_proj", u).split([channels, WIDTH, heads], dim=-1)
    x, B, C = mixer.conv(xBC).split([WIDTH, groups * state, groups * state], dim=-1)
    x = x.unflatten(-1, (heads, -1))
    B, C = (t.unflatten(-1, (groups, state)).repeat_interleave(heads // groups, dim=2) for t in (B, C))
    S, outputs = torch.zeros(len(u), heads, WIDTH // heads, state), []
    for t in range(u.shape[1]):
        decay = torch.exp(-F.softplus(A_log[:, t]))[..., None, None]
        S = decay * S + x[:, t, :, :, None] * B[:, t, :, None]
        outputs.append((S * C[:, t, :, None]).sum(-1) + mixer["D"][:, None] * x[:, t])
    return mixer.linear("out_proj", torch.stack(outputs, dim=1).flatten(-2) * F.silu(z + mixer["z_bias"]))


def phi_attention(attention, u):
    """32 heads, rotary embedding (θ 10000) on the first half of each."""
    width, length = WIDTH // 32, u.shape[1]
    q, k, v = (attention.linear(f"{n}_proj", u).unflatten(-1, (32, width)).transpose(1, 2) for n in "qkv")
    rotated = width // 2
    angles = torch.arange(length)[:, None] * 10000 ** (-torch.arange(0, rotated, 2) / rotated)  # (l, rotated/2)

    def rotate(x):
        first, second, rest = x[..., : rotated // 2], x[..., rotated // 2 : rotated], x[..., rotated:]
        cos, sin = angles.cos(), angles.sin()
        return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], dim=-1)

    scores = rotate(q) @ rotate(k).mT / math.sqrt(width)
    scores = scores.masked_fill(torch.ones(length, length).triu(1).bool(), -torch.inf)
    return attention.linear("dense", (scores.softmax(-1) @ v).transpose(1, 2).flatten(-2))


def cald_logits(config, weights, ids):
    model = Named(weights, eps=config["layer_norm_eps"])
    x = model["gpt_neox.embed_in.weight"][ids]
    for i in range(2):
        layer = model.at(f"gpt_neox.layers.{i}")
        mixed = mamba(layer.at("attention.mamba"), layer.norm("input_layernorm", x))
        inner = x if config["use_parallel_residual"] else x + mixed
        inner = F.gelu(layer.linear("mlp.dense_h_to_4h", layer.norm("post_attention_layernorm", inner)))
        x = x + mixed + layer.linear("mlp.dense_4h_to_h", inner)
    return model.linear("embed_out", model.at("gpt_neox").norm("final_layer_norm", x))


def mamba(mixer, u):
    """METHODS 1.3, token by token."""
    x, z = mixer.linear("in_proj", u).chunk(2, dim=-1)
    x = F.silu(mixer.conv(x))
    low, B, C = mixer.linear("x_proj", x).split([RANK, STATE, STATE], dim=-1)
    delta, A = F.softplus(mixer.linear("dt_proj", low)), -mixer["A_log"].exp()
    S, outputs = torch.zeros(len(u), INNER, STATE), []
    for t in range(u.shape[1]):
        S = torch.exp(delta[:, t, :, None] * A) * S + (delta[:, t] * x[:, t])[..., None] * B[:, t, None]
        outputs.append((S * C[:, t, None]).sum(-1) + mixer["D"] * x[:, t])
    return mixer.linear("out_proj", torch.stack(outputs, dim=1) * F.silu(z))


# --- what comes of them -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["safetensors", "bin", "safetensors shards", "bin shards"])
@pytest.mark.parametrize("name", CHECKPOINTS)
@torch.no_grad()
def test_logits_are_those_of_plain_torch(tmp_path, name, kind):
    config, weights = CHECKPOINTS[name]()
    report = limbeck.import_checkpoint(write(tmp_path / "published", config, weights, kind), tmp_path / "student")
    ids = torch.randint(0, VOCABULARY, (2, 21))
    expected = (cald_logits if "CALD" in name else phi_mamba_logits)(config, weights, ids)

    student = AutoModelForCausalLM.from_pretrained(tmp_path / "student")
    assert isinstance(student, StudentCausalLM)
    torch.testing.assert_close(student(ids).logits, expected, **CLOSE)
    assert (report.layout, report.tensors) == (name, len(weights))
    assert report.kept_attention == ([1] if "Hybrid" in name else [])
    assert json.loads((tmp_path / "student" / "import.json").read_text())["layout"] == name

    output = student.generate(ids[:1, :5], max_new_tokens=6, do_sample=False, pad_token_id=0, eos_token_id=None)
    sequence = ids[:1, :5]
    for _ in range(6):
        step = (cald_logits if "CALD" in name else phi_mamba_logits)(config, weights, sequence)[:, -1:].argmax(-1)
        sequence = torch.cat([sequence, step], dim=1)
    assert torch.equal(output, sequence)


@torch.no_grad()
def test_a_block_of_cald_may_be_sequential(tmp_path):
    config, weights = cald_config(parallel=False), cald_weights()
    limbeck.import_checkpoint(write(tmp_path / "published", config, weights), tmp_path / "student")
    ids = torch.randint(0, VOCABULARY, (1, 9))
    student = limbeck.load_model(tmp_path / "student")
    torch.testing.assert_close(student(ids).logits, cald_logits(config, weights, ids), **CLOSE)


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_a_round_trip_keeps_every_value(tmp_path, name):
    """Imported, loaded, saved, loaded: every tensor is bit for bit what was published."""
    config, weights = CHECKPOINTS[name]()
    limbeck.import_checkpoint(write(tmp_path / "published", config, weights), tmp_path / "student")
    student = limbeck.load_model(tmp_path / "student")
    student.save_pretrained(tmp_path / "again")
    again = limbeck.load_model(tmp_path / "again").state_dict()
    published = sorted(tuple(tensor.flatten().tolist()) for tensor in weights.values())
    assert published == sorted(tuple(tensor.flatten().tolist()) for tensor in again.values())


def test_keys_are_those_that_saving_gives(tmp_path):
    """So that releases of transformers before and after a renaming load it alike."""
    for name, make in CHECKPOINTS.items():
        folder = tmp_path / name
        limbeck.import_checkpoint(write(tmp_path / f"{name} published", *make()), folder)
        limbeck.load_model(folder).save_pretrained(tmp_path / "again")
        assert set(load_file(folder / "model.safetensors")) == set(load_file(tmp_path / "again" / "model.safetensors"))


def test_the_dtype_is_kept(tmp_path):
    weights = {name: tensor.bfloat16() for name, tensor in phi_mamba_weights().items()}
    weights["backbone.layers.0.mixer.D"] = torch.randn(4)  # published in float32, and kept so
    weights["backbone.layers.1.mixer.z_bias"] = torch.randn(WIDTH)  # the same, but narrowed: told
    report = limbeck.import_checkpoint(write(tmp_path / "published", phi_mamba_config(), weights), tmp_path / "student")
    assert report.dtype == "bfloat16"
    assert report.notes[0] == "1 tensors became bfloat16, as the embedding is: backbone.layers.1.mixer.z_bias"
    saved = load_file(tmp_path / "student" / "model.safetensors")
    assert torch.equal(saved["model.layers.0.self_attn.mixer.D"], weights["backbone.layers.0.mixer.D"])
    student = limbeck.load_model(tmp_path / "student")
    assert student.dtype == torch.bfloat16
    assert {name.split(".")[-1] for name, t in student.state_dict().items() if t.dtype == torch.float32} == {"D"}


def test_an_earlier_config_is_understood(tmp_path):
    """What the first published files say: one count of heads, short names, keys that change nothing."""
    config = phi_mamba_config()
    core = {"d_state": 8, "nheads": 4, "expand": 1, "chunk_size": 16, "use_ref_impl": False, "norm_cls": "none"}
    config["LanguageModel"]["input"]["tie_embeddings"] = False
    config["Block1"] |= {"BlockType": "phi_block", "CoreType": "DiscreteMamba2", "core_input": core}
    config["Block1"]["block_input"]["residual_in_fp32"] = True
    weights = phi_mamba_weights()
    for i in range(LAYERS):  # as many heads of B and C as of x
        mixer, rows = f"backbone.layers.{i}.mixer", WIDTH + 2 * 4 * 8
        weights[f"{mixer}.in_proj.weight"] = torch.randn(rows + WIDTH + 4, WIDTH)
        weights[f"{mixer}.conv1d.weight"] = torch.randn(rows, 1, 4)
        weights[f"{mixer}.conv1d.bias"] = torch.randn(rows)
    report = limbeck.import_checkpoint(write(tmp_path / "published", config, weights), tmp_path / "student")
    assert (report.mixer_kwargs["n_qk_heads"], report.mixer_kwargs["n_v_heads"]) == (4, 4)


def test_sizes_may_be_left_out_as_transformers_leaves_out_defaults(tmp_path):
    config, weights = cald_config(), cald_weights()
    for key in ("hidden_size", "num_hidden_layers", "n_layers", "vocab_size", "layer_norm_eps"):
        del config[key]
    report = limbeck.import_checkpoint(write(tmp_path / "published", config, weights), tmp_path / "student")
    assert report.mixer_kwargs == {
        "d_inner": INNER,
        "d_state": STATE,
        "d_conv": 4,
        "dt_rank": RANK,
        "bias": False,
        "conv_bias": True,
    }


def test_a_tokenizer_goes_along(tmp_path, teacher_folder):
    config, weights = cald_config(), cald_weights()
    published = write(tmp_path / "published", config, weights)
    with pytest.raises(LimbeckError, match=r"has 288 tokens\nexpected: 53 at most"):
        limbeck.import_checkpoint(published, tmp_path / "student", tokenizer=teacher_folder)
    assert not (tmp_path / "student").exists()

    config["vocab_size"] = config["gpt_neox_config"]["vocab_size"] = 300
    weights["gpt_neox.embed_in.weight"] = torch.randn(300, CALD_WIDTH)
    weights["embed_out.weight"] = torch.randn(300, CALD_WIDTH)
    report = limbeck.import_checkpoint(
        write(published, config, weights), tmp_path / "student", tokenizer=str(teacher_folder)
    )
    assert report.notes == []
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "student")
    student = limbeck.load_model(tmp_path / "student")
    assert student.generation_config.eos_token_id == tokenizer.eos_token_id
    assert limbeck.generate(student, tokenizer, ["the old word"], max_new_tokens=2)


# --- what is refused --------------------------------------------------------------------------------------------------


def changed(config, path, value):
    """A copy of a config.json with the value at a path of keys changed, or removed when the value is None."""
    config = json.loads(json.dumps(config))
    *where, last = path.split(".")
    table = config
    for key in where:
        table = table[key]
    if value is None:
        del table[last]
    else:
        table[last] = value
    return config


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("Blocks", {}, "unknown section of config.json in .*: 'Blocks'"),
        ("Optimizer", {}, "unknown section of config.json in .*: 'Optimizer'"),
        ("Block1.CoreType", "modules.mixers.hydra", "Block1.CoreType is 'modules.mixers.hydra'"),
        ("Block1.CoreType", None, "Block1.CoreType is missing"),
        ("Block1.BlockType", "modules.block", "Block1.BlockType is 'modules.block'"),
        ("Block1.n_layers", None, "Block1.n_layers is missing"),
        ("Block1.n_layers", 3, "has blocks of 3 layers\nexpected: MixerModel.input.n_layer = 4"),
        ("Block1.n_layers", "4", "Block1.n_layers is '4'"),
        ("Block1.core_input", None, "Block1.core_input is missing"),
        ("Block1.core_input.d_stat", 8, "unknown key in .*Block1.core_input: 'd_stat'"),
        ("Block1.core_input.activation", "relu", "core_input.activation is 'relu'"),
        ("Block1.core_input.bias", 1, "core_input.bias is 1"),
        ("LanguageModel", None, "LanguageModel is missing"),
        ("LanguageModel.input.vocab_size", None, "LanguageModel.input.vocab_size is missing"),
        ("LanguageModel.input.tie_embeddings", True, "tie_embeddings is True"),
        ("LanguageModel.output", {}, "unknown key in .*LanguageModel: 'output'"),
        ("MixerModel.input.d_model", "128", "d_model is '128'"),
        ("MixerModel.input.lm_head_prenorm", "rms", "lm_head_prenorm is 'rms'"),
    ],
)
def test_a_phi_mamba_config_that_is_not_understood(tmp_path, path, value, message):
    refused(tmp_path, changed(phi_mamba_config(), path, value), {"x": torch.zeros(1)}, message)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("Block2.core_input.num_attention_heads", 4, "num_attention_heads is 4\nexpected: 32"),
        ("Block2.core_input.rope", 1, "unknown key in .*Block2.core_input: 'rope'"),
        ("Block3.core_input.d_state", 16, "Block3.core_input differs from that of an earlier block"),
        ("MixerModel.input.d_model", 96, "d_model 96 with attention layers\nexpected: a multiple of 64"),
    ],
)
def test_a_hybrid_config_that_is_not_understood(tmp_path, path, value, message):
    refused(tmp_path, changed(phi_mamba_config(HYBRID), path, value), {"x": torch.zeros(1)}, message)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("hidden_size", 48, "hidden_size is 48, .*gpt_neox_config.hidden_size is 32\nexpected: the same"),
        ("hidden_act", "gelu", "hidden_act is 'gelu'"),
        ("time_step_rank", "3", "time_step_rank is '3'"),
        ("tie_word_embeddings", True, "tie_word_embeddings is True"),
        ("gpt_neox_config", "pythia", "gpt_neox_config is 'pythia'"),
    ],
)
def test_a_cald_config_that_is_not_understood(tmp_path, path, value, message):
    refused(tmp_path, changed(cald_config(), path, value), {"x": torch.zeros(1)}, message)


def refused(tmp_path, config, weights, message, **options):
    """An import that must fail with this message and leave nothing."""
    folder = write(tmp_path / "published", config, weights)
    with pytest.raises(LimbeckError, match=message):
        limbeck.import_checkpoint(folder, tmp_path / "student", **options)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["published"]


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_keys_must_fit_exactly(tmp_path, name):
    config, weights = CHECKPOINTS[name]()
    for key in weights:
        if key.endswith(("D", "lm_head.weight", "embed_out.weight", "z_bias", "q_proj.bias")):
            fewer = {other: tensor for other, tensor in weights.items() if other != key}
            refused(tmp_path, config, fewer, f"weights are missing in .*: {key}\n")
    refused(
        tmp_path,
        config,
        weights | {"backbone.extra.weight": torch.zeros(2)},
        r"unknown weights in .*: backbone\.extra\.weight\n",
    )
    key = next(iter(weights))
    refused(tmp_path, config, weights | {key: torch.zeros(3, 2)}, rf"{key} in .*model.safetensors has shape \(3, 2\)")
    refused(tmp_path, config, weights | {list(weights)[-1]: weights[list(weights)[-1]].long()}, "is in torch.int64")


@pytest.mark.parametrize("kind", ["safetensors", "bin", "safetensors shards", "bin shards"])
def test_a_truncated_or_missing_file_is_named(tmp_path, kind):
    folder = write(tmp_path / "published", cald_config(), cald_weights(), kind)
    file = sorted(path for path in folder.iterdir() if path.suffix in (".safetensors", ".bin"))[-1]
    content = file.read_bytes()
    for damage in (content[: len(content) // 2], b""):
        file.write_bytes(damage)
        with pytest.raises(LimbeckError, match=f"{file.name} is damaged or cut short"):
            limbeck.import_checkpoint(folder, tmp_path / "student")
    file.unlink()
    with pytest.raises(LimbeckError, match=f"{file.name} is missing" if "shards" in kind else "no weights in"):
        limbeck.import_checkpoint(folder, tmp_path / "student")
    assert not (tmp_path / "student").exists()


class Evil:
    def __reduce__(self):
        return (print, ("this must never run",))


def test_other_things_than_weights_are_refused(tmp_path, capsys):
    folder = write(tmp_path / "published", cald_config(), cald_weights(), "bin")
    for content, message in ((Evil(), "holds more than weights"), ({"a": 1}, "holds something else than weights")):
        torch.save(content, folder / "pytorch_model.bin")
        with pytest.raises(LimbeckError, match=message):
            limbeck.import_checkpoint(folder, tmp_path / "student")
    assert "never run" not in capsys.readouterr().out


def test_a_folder_that_is_no_published_checkpoint(tmp_path, teacher_folder):
    with pytest.raises(LimbeckError, match="of no published layout"):
        limbeck.import_checkpoint(teacher_folder, tmp_path / "student")
    (tmp_path / "empty").mkdir()
    with pytest.raises(LimbeckError, match=r"no config\.json"):
        limbeck.import_checkpoint(tmp_path / "empty", tmp_path / "student")
    (tmp_path / "empty" / "config.json").write_text("{")
    with pytest.raises(LimbeckError, match="is not JSON"):
        limbeck.import_checkpoint(tmp_path / "empty", tmp_path / "student")
    with pytest.raises(LimbeckError, match="holds something already"):
        limbeck.import_checkpoint(teacher_folder, tmp_path / "empty")
