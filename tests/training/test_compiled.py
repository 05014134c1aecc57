"""A compiled teacher says what it would say otherwise, and objectives still see what they look at."""

import copy

import pytest
import torch
from torch._dynamo.utils import counters

from limbeck import convert, observe
from limbeck.distill import layer_outputs
from limbeck.students import attention_of, blocks
from limbeck.training import compile_layers
from tiny import VOCABULARY, tiny_teacher


@pytest.fixture(autouse=True)
def _compiler():
    torch.compiler.reset()
    counters.clear()
    yield
    torch.compiler.reset()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method`:DeprecationWarning")
@pytest.mark.parametrize("family", ["gpt_neox", "llama", "phi"])
def test_signals_of_a_compiled_teacher_are_the_same(family):
    teacher = tiny_teacher(family)
    compiled = copy.deepcopy(teacher)
    compile_layers(compiled)
    tokens = torch.randint(3, VOCABULARY, (2, 12))
    with torch.no_grad():  # compiled before anybody looks
        torch.testing.assert_close(compiled(tokens).logits, teacher(tokens).logits, atol=1e-5, rtol=1e-5)
    assert counters["stats"]["unique_graphs"] == (2 if family == "llama" else 1), "a graph for each kind of part"
    for found, expected in zip(observe(compiled, tokens), observe(teacher, tokens), strict=True):
        for name in ("block_input", "block_output", "mixer_input", "mixer_output", "query", "key"):
            ours, theirs = getattr(found, name), getattr(expected, name)
            torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5, msg=name)
    for position in ("block", "mixer"):
        with torch.no_grad(), layer_outputs(compiled, range(2), position) as outputs:
            compiled(tokens)
        assert list(outputs) == [0, 1]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method`:DeprecationWarning")
def test_layers_and_attention_are_left_alone():
    student = convert(tiny_teacher("llama"), init="random")
    compile_layers(student)
    for block in blocks(student):
        compiled = [name for name, part in block.named_modules() if "forward" in vars(part)]
        assert compiled == ["mlp", "input_layernorm", "post_attention_layernorm"]
        assert attention_of(block) in list(block.children())
