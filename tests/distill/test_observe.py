"""What is observed is what the model did, and observing leaves the model as it was."""

import pytest
import torch
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, PersimmonConfig
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import limbeck
from limbeck import LimbeckError, observe, run_layer
from limbeck.distill import LayerSignals
from limbeck.students import FAMILIES, attention_of, blocks, mixers
from limbeck.students.arguments import carry
from limbeck.students.families import attention_shape
from tiny import WINDOW

WINDOWED = {"gemma2", "gemma3_text", "mistral", "phi3", "qwen2", "qwen3", "smollm3", "starcoder2"}


def no_hooks_left(model):
    """No hooks but those that students of some families have of their own."""
    modules = [module for block in blocks(model) for module in (block, attention_of(block))]
    hooks = [hook for m in modules for hook in (*m._forward_hooks.values(), *m._forward_pre_hooks.values())]
    return all(getattr(hook, "func", None) is carry for hook in hooks)


def at_tokens(matrix, mask):
    """Zero in the rows and columns of padding."""
    token = mask.bool()
    return matrix * (token[:, None, :, None] & token[:, None, None, :])


EVERY_FAMILY = pytest.mark.parametrize("family", FAMILIES)
EVERY_IMPLEMENTATION = pytest.mark.parametrize(
    ("family", "implementation"),
    [(family, name) for family in FAMILIES for name in ("eager", "sdpa") if (family, name) != ("gemma2", "sdpa")],
)  # sdpa knows no soft cap, and Gemma 2 refuses it


@EVERY_IMPLEMENTATION
@pytest.mark.parametrize("padded", [False, True])
def test_the_matrices_are_the_models_own(make_teacher, family, implementation, padded, tokens, left_padding):
    teacher = make_teacher(family)
    mask = left_padding if padded else None
    with torch.no_grad():
        expected = teacher(tokens, attention_mask=mask, output_attentions=True, output_hidden_states=True)
    teacher.set_attn_implementation(implementation)
    seen = observe(teacher, tokens, mask)
    everywhere = torch.ones_like(left_padding)
    token = (everywhere if mask is None else mask).bool()
    assert [signals.index for signals in seen] == [0, 1, 2]
    assert len(seen) == 3
    for signals, attention in zip(seen, expected.attentions, strict=True):
        assert_close(signals.attention_matrix(), at_tokens(attention, token), rtol=0, atol=2e-6)
        assert_close(signals.matrix(), signals.attention_matrix())
        heads, kv_heads, width = attention_shape(teacher.config)
        assert signals.query.shape == (2, heads, 12, width)
        assert signals.key.shape == (2, kv_heads, 12, width)
        assert signals.scale == attention_of(blocks(teacher)[signals.index]).scaling
        assert signals.softcap == (0.5 if family == "gemma2" else None)
        assert_close(signals.block_input[token], expected.hidden_states[signals.index][token], rtol=0, atol=1e-5)
    assert any(signals.sliding_window == WINDOW for signals in seen) == (family in WINDOWED)
    for before, after in zip(seen, list(seen)[1:], strict=False):
        assert torch.equal(before.block_output, after.block_input)
    assert_close(seen.logits[token], expected.logits[token], rtol=0, atol=1e-5)


@EVERY_FAMILY
def test_outputs_are_the_models_own(make_teacher, family, tokens):
    teacher = make_teacher(family)
    seen = observe(teacher, tokens)
    for index, signals in enumerate(seen):
        block = blocks(teacher)[index]
        norm = getattr(block, "ln_1" if family == "gpt2" else "input_layernorm", torch.nn.Identity())  # OLMo 2 has none
        assert torch.equal(signals.mixer_input, norm(signals.block_input))
        with torch.no_grad():
            output = attention_of(block)(signals.mixer_input, **attention_arguments(signals))[0]
            again = block(signals.block_input, **signals.block_kwargs)
        assert torch.equal(signals.mixer_output, output)
        assert torch.equal(signals.block_output, again)


def test_the_last_block_is_seen_before_the_final_norm(make_teacher, family, tokens):
    teacher = make_teacher(family)
    seen = observe(teacher, tokens)
    norms = ("final_layer_norm", "final_layernorm", "norm", "ln_f")
    norm = next(m for n, m in teacher.base_model.named_children() if n in norms)
    assert torch.equal(teacher.get_output_embeddings()(norm(seen[2].block_output)), seen.logits)


def attention_arguments(signals):
    return {k: v for k, v in signals.block_kwargs.items() if k in ("attention_mask", "position_embeddings")}


def test_some_layers_and_no_logits(make_teacher, tokens):
    teacher = make_teacher()
    seen = observe(teacher, tokens, layers=[2, 0], logits=False)
    assert set(seen.layers) == {0, 2}
    assert seen.logits is None
    assert observe(teacher, tokens, layers=[-1])[2].index == 2
    with pytest.raises(LimbeckError, match="layer 3"):
        observe(teacher, tokens, layers=[3])


@EVERY_IMPLEMENTATION
def test_observing_changes_nothing(make_teacher, family, implementation, tokens, left_padding):
    teacher = make_teacher(family, attn_implementation=implementation)
    state = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    configuration = teacher.config.to_dict()
    with torch.no_grad():
        expected = teacher(tokens, attention_mask=left_padding).logits
    assert torch.equal(observe(teacher, tokens, left_padding).logits, expected)
    run_layer(teacher, 1, torch.randn(2, 12, 32))
    with torch.no_grad():
        assert torch.equal(teacher(tokens, attention_mask=left_padding).logits, expected)
    assert teacher.config._attn_implementation == implementation
    assert teacher.config.to_dict() == configuration
    assert all(torch.equal(tensor, state[name]) for name, tensor in teacher.state_dict().items())
    assert no_hooks_left(teacher)


class StopHereError(Exception):
    pass


@pytest.mark.parametrize("where", ["attention", "block", "mlp"])
@pytest.mark.parametrize("look", ["observe", "run_layer"])
def test_a_forward_that_fails_leaves_the_model_as_it_was(make_teacher, where, look, tokens, monkeypatch):
    teacher = make_teacher()
    with torch.no_grad():
        expected = teacher(tokens).logits
    list_of_blocks = blocks(teacher)

    def fail(*_, **__):
        raise StopHereError

    part = {"attention": attention_of(list_of_blocks[1]), "block": list_of_blocks[1], "mlp": list_of_blocks[1].mlp}
    with monkeypatch.context() as patch:
        patch.setattr(part[where], "forward", fail)
        with pytest.raises(StopHereError):
            observe(teacher, tokens) if look == "observe" else run_layer(teacher, 1, torch.randn(2, 12, 32))
    assert teacher.config._attn_implementation == "eager"
    assert blocks(teacher) is list_of_blocks
    assert no_hooks_left(teacher)
    with torch.no_grad():
        assert torch.equal(teacher(tokens).logits, expected)


def test_an_attention_that_fails_restores_the_name_of_the_implementation(make_teacher, tokens, monkeypatch):
    teacher = make_teacher(attn_implementation="sdpa")

    def fail(*_, **__):
        raise StopHereError

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "sdpa", fail)
    with pytest.raises(StopHereError):
        observe(teacher, tokens)
    assert teacher.config._attn_implementation == "sdpa"


def test_gradients_only_on_demand(make_teacher, tokens):
    teacher = make_teacher()
    for signals in (seen := observe(teacher, tokens)):
        assert not signals.query.requires_grad
        assert not signals.block_output.requires_grad
    assert not seen.logits.requires_grad
    seen = observe(teacher, tokens, grad=True)
    (seen.logits.sum() + seen[1].attention_matrix().square().sum()).backward()
    assert all(p.grad is not None for p in teacher.parameters())


# --- students -------------------------------------------------------------------------------------------------------


@EVERY_FAMILY
def test_students_alike(make_teacher, make_student, family, tokens, left_padding):
    student = make_student(make_teacher(family), keep_attention=(1,))
    with torch.no_grad():
        expected = student(tokens, attention_mask=left_padding).logits
    seen = observe(student, tokens, left_padding)
    assert torch.equal(seen.logits, expected)
    assert no_hooks_left(student)
    for index, mixer in mixers(student).items():
        signals = seen[index]
        assert signals.query is None
        assert_close(signals.matrix(), mixer.mixing_matrix(signals.mixer_input, left_padding))
        assert_close(signals.mixer_output, mixer(signals.mixer_input, left_padding))
        with pytest.raises(LimbeckError, match=f"layer {index} has a mixer"):
            signals.attention_matrix()
    attention = seen[1].attention_matrix()
    assert_close(attention.sum(-1), left_padding[:, None].expand(-1, 4, -1).float())


@EVERY_FAMILY
def test_run_layer_is_the_full_forward(make_teacher, make_student, family, tokens, left_padding):
    for model in (make_teacher(family), make_student(make_teacher(family), keep_attention=(1,))):
        for mask in (None, left_padding):
            seen = observe(model, tokens, mask)
            token = torch.ones_like(tokens).bool() if mask is None else mask.bool()
            for index in range(3):
                alone = run_layer(model, index, seen[index].block_input, mask)
                assert_close(alone.block_output[token], seen[index].block_output[token], rtol=0, atol=1e-6)
                assert_close(alone.mixer_output[token], seen[index].mixer_output[token], rtol=0, atol=1e-6)
                assert_close(alone.mixing_matrix, seen[index].matrix(), rtol=0, atol=1e-6)


def test_run_layer_carries_gradients_to_its_block_alone(make_teacher, make_student):
    student = make_student(make_teacher())
    hidden_states = torch.randn(2, 12, 32, requires_grad=True)
    output = run_layer(student, -1, hidden_states)
    (output.block_output.sum() + output.mixing_matrix.sum()).backward()
    assert hidden_states.grad is not None
    learns = {id(parameter) for parameter in blocks(student)[2].parameters()}
    for name, parameter in student.named_parameters():
        assert (parameter.grad is not None) == (id(parameter) in learns), name


@pytest.mark.parametrize("index", [3, -4])
def test_run_layer_refuses_a_layer_that_is_not_there(make_teacher, index):
    with pytest.raises(LimbeckError, match=f"layer {index}"):
        run_layer(make_teacher(), index, torch.randn(1, 2, 32))


# --- sliding windows and soft caps ----------------------------------------------------------------------------------


def by_hand(query, key, scale, window, softcap):
    """Softmax attention one query at a time."""
    groups = query.shape[1] // key.shape[1]
    b, h, l, _ = query.shape
    matrix = torch.zeros(b, h, l, l)
    for i in range(b):
        for j in range(h):
            for t in range(l):
                first = 0 if window is None else max(0, t - window + 1)
                scores = key[i, j // groups, first : t + 1] @ query[i, j, t] * scale
                scores = scores if softcap is None else softcap * (scores / softcap).tanh()
                matrix[i, j, t, first : t + 1] = scores.exp() / scores.exp().sum()
    return matrix


@pytest.mark.parametrize("window", [None, 1, 3, 99])
@pytest.mark.parametrize("softcap", [None, 0.5])
def test_window_and_softcap_by_hand(window, softcap):
    query, key = torch.randn(2, 4, 7, 5), torch.randn(2, 2, 7, 5)
    signals = LayerSignals(0, query=query, key=key, scale=0.7, sliding_window=window, softcap=softcap)
    assert_close(signals.attention_matrix(), by_hand(query, key, 0.7, window, softcap))


def test_half_precision_gives_float32_and_float64_stays():
    query, key = torch.randn(1, 2, 5, 4), torch.randn(1, 2, 5, 4)
    for given, expected in ((torch.bfloat16, torch.float32), (torch.float64, torch.float64)):
        signals = LayerSignals(0, query=query.to(given), key=key.to(given), scale=0.5)
        assert signals.attention_matrix().dtype == expected


def test_unknown_families_are_refused():
    config = PersimmonConfig(
        vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8
    )
    with pytest.raises(LimbeckError, match="unknown family 'persimmon'"):
        limbeck.observe(AutoModelForCausalLM.from_config(config), torch.zeros(1, 2, dtype=torch.long))
