"""The layouts of published checkpoints (METHODS 4): what their config.json says, and what they call each tensor.

Each reads a config.json into a `Layout`: the configuration of an ordinary student, and the student's names in the
checkpoint's own words. Everything that is not understood is an error that names it.
"""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from transformers import GPTNeoXConfig

from limbeck.errors import LimbeckError, unknown
from limbeck.students.families import FAMILIES
from limbeck.students.modeling import student_config_class


@dataclass(frozen=True)
class Layout:
    """A published checkpoint, understood.

    Attributes:
        name: Of the layout, for people.
        config: The student's configuration.
        published: From a student's parameter name to the checkpoint's key.
        embedding: The checkpoint's key of the embedding, whose dtype is the checkpoint's.
        saved: From a student's parameter name to the key under which transformers saves it.
    """

    name: str
    config: Any
    published: Callable[[str], str]
    embedding: str
    saved: Callable[[str], str] = str


def read_layout(config: Any, source: str) -> Layout:
    """Understand a config.json.

    Args:
        config: Its content.
        source: Where it is from, for messages.

    Raises:
        LimbeckError: When it is of no published layout, or a part of it is missing, unknown or of another kind.
    """
    if isinstance(config, dict) and "gpt_neox_config" in config:
        return _read_cald(config, source)
    if isinstance(config, dict) and any(key in _SECTIONS or _BLOCK.fullmatch(key) for key in config):
        return _read_phi_mamba(config, source)
    raise LimbeckError(
        f"config.json in {source} is of no published layout that Limbeck knows",
        expected="Phi-Mamba's (sections LanguageModel, MixerModel, Block1, …) or CALD's (with a gpt_neox_config)",
        hint="`limbeck convert` for a Transformer; a student of Limbeck needs no import",
    )


_REQUIRED: Any = object()


class _Section:
    """A table of a config.json that is read key by key; what was not read in the end is an error."""

    def __init__(self, values: Any, path: str):
        if not isinstance(values, dict):
            raise LimbeckError(f"{path} is {values!r}", expected="a table")
        self.values, self.path = values, path
        self.known: set[str] = set()

    def take(self, key: str, kind: type, default: Any = _REQUIRED) -> Any:
        """Read a value of one kind."""
        self.known.add(key)
        if key not in self.values:
            if default is _REQUIRED:
                raise LimbeckError(f"{self.path}.{key} is missing", expected=f"a value ({kind.__name__})")
            return default
        value = self.values[key]
        fits = isinstance(value, kind) and (kind is bool or not isinstance(value, bool))
        if not fits or (kind is int and value < 1):
            raise LimbeckError(f"{self.path}.{key} is {value!r}", expected=f"a value ({kind.__name__})")
        return value

    def only(self, key: str, *allowed: Any, why: str = "") -> None:
        """Read a value that may be left out, and else must be one of these."""
        self.known.add(key)
        if key in self.values and self.values[key] not in allowed:
            raise LimbeckError(
                f"{self.path}.{key} is {self.values[key]!r}",
                expected=" or ".join(map(repr, allowed)) + (f": {why}" if why else ""),
            )

    def ignore(self, *keys: str) -> None:
        """Let keys be there that change nothing in what the model computes."""
        self.known.update(keys)

    def section(self, key: str, optional: bool = False) -> "_Section":
        """Open a table inside this one."""
        self.known.add(key)
        if key not in self.values and not optional:
            raise LimbeckError(f"{self.path}.{key} is missing", expected="a table")
        return _Section(self.values.get(key, {}), f"{self.path}.{key}")

    def end(self) -> None:
        """Refuse what was not read."""
        for key in self.values:
            if key not in self.known:
                raise unknown(f"key in {self.path}:", key, self.known)


# --- Phi-Mamba and Hybrid-Phi-Mamba -----------------------------------------------------------------------------------

_SECTIONS = ("LanguageModel", "MixerModel")
_BLOCK = re.compile(r"Block\d+")
_MIXERS = ("discrete_mamba2", "discrete_mamba2_ref", "DiscreteMamba2")
_ATTENTIONS = ("phi_attention",)
_HEADS = 32
"""Heads of the hybrid's attention: PhiConfig's default, whatever the model's width."""


def _read_phi_mamba(content: dict[str, Any], source: str) -> Layout:
    """Sections LanguageModel and MixerModel, then Block1, Block2 and so on in the order of the layers."""
    root = _Section(content, f"config.json in {source}")
    for key in content:
        if key not in _SECTIONS and not _BLOCK.fullmatch(key):
            raise unknown(f"section of config.json in {source}:", key, [*_SECTIONS, "Block1"])
    vocabulary, width, layers = _read_sizes(root)
    swapped: list[int] = []
    options: dict[str, Any] | None = None
    index = 0
    for key in (key for key in content if _BLOCK.fullmatch(key)):
        count, mixer = _read_block(root.section(key), width)
        if mixer is not None:
            if options not in (None, mixer):
                raise LimbeckError(f"{root.path}.{key}.core_input differs from that of an earlier block", "one mixer")
            options = mixer
            swapped += range(index, index + count)
        index += count
    if layers not in (None, index):
        raise LimbeckError(f"{root.path} has blocks of {index} layers", expected=f"MixerModel.input.n_layer = {layers}")
    if index == 0:
        raise LimbeckError(f"{root.path} has no blocks", expected="a section Block1")
    hybrid = len(swapped) < index
    if hybrid and width % (2 * _HEADS):
        raise LimbeckError(
            f"d_model {width} with attention layers", expected=f"a multiple of {2 * _HEADS}, for {_HEADS} heads"
        )
    config_class: Any = student_config_class(FAMILIES["phi"])
    config = config_class(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=index,
        num_attention_heads=_HEADS if hybrid else math.gcd(_HEADS, width),  # no layer asks where all are swapped
        hidden_act="gelu_new",
        layer_norm_eps=1e-5,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
        mixer="discrete-mamba2",
        mixer_kwargs=options or {},
        swapped_layers=swapped,
        mixer_init="identity",
    )
    name = "Hybrid-Phi-Mamba" if hybrid else "Phi-Mamba"
    return Layout(name, config, _phi_mamba_key, "backbone.embedding.weight")


def _read_sizes(root: _Section) -> tuple[int, int, int | None]:
    """The vocabulary, padded; the width; the layers, where they are given."""
    section = root.section("LanguageModel")
    language = section.section("input")
    multiple = language.take("pad_vocab_size_multiple", int, 1)
    vocabulary = multiple * math.ceil(language.take("vocab_size", int) / multiple)
    language.only("tie_embeddings", False, why="the published models have a head of their own")
    language.end()
    section.end()
    section = root.section("MixerModel")
    model = section.section("input")
    model.only("lm_head_prenorm", "layer")
    width, layers = model.take("d_model", int), model.take("n_layer", int, None)
    model.end()
    section.end()
    return vocabulary, width, layers


def _read_block(block: _Section, width: int) -> tuple[int, dict[str, Any] | None]:
    """How many layers, and the options of their mixer, or None where they have attention."""
    count, kind, core = block.take("n_layers", int), block.take("BlockType", str), block.take("CoreType", str)
    if kind.split(".")[-1] != "phi_block":
        raise LimbeckError(f"{block.path}.BlockType is {kind!r}", expected="'modules.phi_block'")
    around = block.section("block_input", optional=True)
    around.ignore("resid_dropout", "residual_in_fp32")
    around.end()
    inner = block.section("core_input")
    if core.split(".")[-1] in _MIXERS:
        options = _read_discrete_mamba2(inner, width)
    elif core.split(".")[-1] in _ATTENTIONS:
        options = None
        inner.ignore("attn_type", "attention_dropout")
        why = "the published attention takes PhiConfig's defaults, whatever is written here"
        for key, value in (("num_attention_heads", _HEADS), ("rope_theta", 10000.0), ("partial_rotary_factor", 0.5)):
            inner.only(key, value, why=why)
        inner.only("num_key_value_heads", None, _HEADS, why=why)
        inner.only("qk_layernorm", False, why=why)
    else:
        raise LimbeckError(
            f"{block.path}.CoreType is {core!r}",
            expected="'modules.mixers.discrete_mamba2' or 'modules.mixers.phi_attention'",
        )
    inner.end()
    block.end()
    return count, options


def _read_discrete_mamba2(inner: _Section, width: int) -> dict[str, Any]:
    """The options of `limbeck.mixers.DiscreteMamba2`; `nheads` is what earlier files say for both kinds of heads."""
    heads = inner.take("nheads", int, 32)
    activation = inner.take("activation", str, "identity")
    inner.only("activation", "identity", "silu", "swish")
    inner.only("norm_cls", "none")
    inner.ignore("chunk_size", "use_ref_impl")  # how it was computed, not what
    return {
        "d_inner": inner.take("expand", int, 1) * width,
        "d_state": inner.take("d_state", int, 64),
        "n_qk_heads": inner.take("n_qk_heads", int, heads),
        "n_v_heads": inner.take("n_v_heads", int, heads),
        "d_conv": inner.take("d_conv", int, 4),
        "activation": "silu" if activation == "swish" else activation,
        "bias": inner.take("bias", bool, False),
        "conv_bias": inner.take("conv_bias", bool, True),
    }


def _phi_mamba_key(name: str) -> str:
    name = re.sub(r"^model\.embed_tokens\.", "backbone.embedding.", name)
    name = re.sub(r"^model\.", "backbone.", name)
    name = re.sub(r"\.self_attn\.mixer\.", ".mixer.", name)
    return re.sub(r"\.self_attn\.", ".mixer.self_attn.", name)


# --- CALD's GPT-NeoX models with Mamba --------------------------------------------------------------------------------


def _read_cald(content: dict[str, Any], source: str) -> Layout:
    """A Mamba configuration, of which what equals transformers' default may be left out, around a GPT-NeoX one."""
    path = f"config.json in {source}"
    outer, nested = _Section(content, path), _Section(content["gpt_neox_config"], f"{path}.gpt_neox_config")

    def shared(key: str, kind: type, *aliases: str, default: Any = None) -> Any:
        """A value that both may have, and that must be the same then."""
        found = {
            f"{section.path}.{name}": section.take(name, kind)
            for section, names in ((outer, (key, *aliases)), (nested, (key,)))
            for name in names
            if name in section.values
        }
        if not found and default is None:
            raise LimbeckError(f"{path}.{key} is missing", expected=f"a value ({kind.__name__})")
        if len(set(found.values())) > 1:
            raise LimbeckError(", ".join(f"{name} is {value!r}" for name, value in found.items()), "the same in both")
        return next(iter(found.values()), default)

    width = shared("hidden_size", int)
    fields = {
        **{key: nested.values[key] for key in (*_GPT_NEOX, *_ROTARY) if key in nested.values},
        "hidden_size": width,
        "num_hidden_layers": shared("num_hidden_layers", int, "n_layers"),
        "vocab_size": shared("vocab_size", int),
        "layer_norm_eps": shared("layer_norm_eps", float, default=1e-5),
        "use_parallel_residual": shared("use_parallel_residual", bool, default=True),
        "tie_word_embeddings": False,
    }
    outer.only("tie_word_embeddings", False, why="the published models have a head of their own")
    outer.only("hidden_act", "silu", why="the mixers' activation")
    outer.only("rms_norm", False)
    rank = content.get("time_step_rank", "auto")
    kwargs = {
        "d_inner": outer.take("intermediate_size", int, None) or int(outer.take("expand", int, 2) * width),
        "d_state": outer.take("state_size", int, 16),
        "d_conv": outer.take("conv_kernel", int, 4),
        "dt_rank": math.ceil(width / 16) if rank == "auto" else outer.take("time_step_rank", int),
        "bias": outer.take("use_bias", bool, False),
        "conv_bias": outer.take("use_conv_bias", bool, True),
    }
    standard = GPTNeoXConfig.from_dict(fields).to_dict()
    standard = {key: standard[key] for key in _GPT_NEOX if key in standard}
    config_class: Any = student_config_class(FAMILIES["gpt_neox"])
    config = config_class(
        **standard,
        mixer="mamba",
        mixer_kwargs=kwargs,
        swapped_layers=list(range(fields["num_hidden_layers"])),
        mixer_init="random",
    )
    return Layout("CALD GPT-NeoX Mamba", config, _cald_key, "gpt_neox.embed_in.weight", saved=_gpt_neox_key)


_GPT_NEOX = sorted(
    set(GPTNeoXConfig().to_dict())
    - {"model_type", "architectures", "transformers_version", "dtype", "_name_or_path", "output_hidden_states"}
)
"""Fields of a GPT-NeoX configuration; what else old files hold speaks of where they come from, or of generation."""
_ROTARY = ("rotary_pct", "rotary_emb_base", "rope_theta", "rope_scaling", "partial_rotary_factor")


def _gpt_neox_key(name: str) -> str:
    return re.sub(r"^lm_head\.", "embed_out.", name)  # newer releases of transformers rename it on loading


def _cald_key(name: str) -> str:
    return re.sub(r"\.attention\.mixer\.", ".attention.mamba.", _gpt_neox_key(name))
