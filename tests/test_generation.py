"""Text in, text out: greedy or drawn, one prompt or a batch, the same again with the same seed."""

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, GenerationConfig, GPTNeoXConfig, MambaConfig, PreTrainedTokenizerFast
from transformers.generation import BaseStreamer

import limbeck
from limbeck import LimbeckError, generate

PROMPTS = ["ab", "the quick fox", ""]


@pytest.fixture
def tokenizer():
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    one = Tokenizer(models.BPE({c: i + 1 for i, c in enumerate(alphabet)} | {"<end>": 0}, []))
    one.pre_tokenizer, one.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=one, eos_token="<end>", bos_token="<end>")


@pytest.fixture(params=[(), (1,)], ids=["whole", "hybrid"])
def student(request):
    config = GPTNeoXConfig(
        vocab_size=257,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        initializer_range=0.3,
        bos_token_id=0,
        eos_token_id=0,
    )
    return limbeck.convert(AutoModelForCausalLM.from_config(config).eval(), keep_attention=request.param)


def test_greedy_is_the_models_own(student, tokenizer):
    (text,) = generate(student, tokenizer, ["ab"], max_new_tokens=8)
    ids = tokenizer("ab", return_tensors="pt").input_ids
    expected = student.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=0)[0, 2:]
    assert text == tokenizer.decode(expected, skip_special_tokens=True)


def test_a_batch_is_each_prompt_alone(student, tokenizer):
    together = generate(student, tokenizer, PROMPTS, max_new_tokens=8)
    assert together == [generate(student, tokenizer, [prompt], max_new_tokens=8)[0] for prompt in PROMPTS]
    assert generate(student, tokenizer, []) == []


def test_drawing_follows_the_seed_alone(student, tokenizer):
    torch.manual_seed(1)
    expected = torch.rand(2)
    torch.manual_seed(1)
    options = {"max_new_tokens": 12, "temperature": 1.5}
    first, again, other = (generate(student, tokenizer, PROMPTS, seed=seed, **options) for seed in (3, 3, 4))
    assert torch.equal(torch.rand(2), expected)
    assert first == again != other
    assert generate(student, tokenizer, PROMPTS, **options) != generate(student, tokenizer, PROMPTS, **options)


@pytest.mark.parametrize("narrow", [{"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0}, {"temperature": 1e-4}], ids=str)
def test_narrowed_to_one_token_drawing_is_greedy(student, tokenizer, narrow):
    drawn = generate(student, tokenizer, PROMPTS, max_new_tokens=8, seed=0, **({"temperature": 1.0} | narrow))
    assert drawn == generate(student, tokenizer, PROMPTS, max_new_tokens=8)


def test_the_checkpoints_own_settings_do_not_interfere(student, tokenizer):
    expected = generate(student, tokenizer, PROMPTS, max_new_tokens=8)
    student.generation_config = GenerationConfig(
        eos_token_id=0, do_sample=True, temperature=3.0, top_k=40, top_p=0.9, num_beams=2, max_length=3
    )
    assert generate(student, tokenizer, PROMPTS, max_new_tokens=8) == expected
    torch.manual_seed(0)
    first = generate(student, tokenizer, PROMPTS, max_new_tokens=8, temperature=1.0, seed=1)
    student.generation_config = GenerationConfig(eos_token_id=0)
    assert generate(student, tokenizer, PROMPTS, max_new_tokens=8, temperature=1.0, seed=1) == first


def test_repetition_penalty(student, tokenizer):
    (text,) = generate(student, tokenizer, ["ab"], max_new_tokens=24, repetition_penalty=1e6)
    assert len(set(text)) >= len(generate(student, tokenizer, ["ab"], max_new_tokens=24)[0]) // 2
    ids = tokenizer(text)["input_ids"]
    assert not {*tokenizer("ab")["input_ids"]} & {*ids}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompts": "ab"}, "one string"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"temperature": -1}, "temperature is -1"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"top_k": -2}, "top_k is -2"),
        ({"top_p": 0}, "top_p is 0"),
        ({"min_p": 2}, "min_p is 2"),
        ({"repetition_penalty": 0}, "repetition_penalty is 0"),
    ],
)
def test_values_out_of_range_are_refused(student, tokenizer, options, message):
    with pytest.raises(LimbeckError, match=message):
        generate(student, tokenizer, **({"prompts": ["ab"]} | options))


class Kept(BaseStreamer):
    """What a streamer is given."""

    def __init__(self):
        self.given, self.ended = [], False

    def put(self, value: torch.Tensor) -> None:
        self.given.append(value.tolist())

    def end(self) -> None:
        self.ended = True


def test_streaming(student, tokenizer):
    kept = Kept()
    (text,) = generate(student, tokenizer, ["the quick"], max_new_tokens=8, streamer=kept)
    (prompt,), *tokens = kept.given
    assert prompt == tokenizer("the quick").input_ids
    assert tokenizer.decode([token for (token,) in tokens], skip_special_tokens=True) == text
    assert kept.ended
    with pytest.raises(LimbeckError, match="3 prompts"):
        generate(student, tokenizer, PROMPTS, streamer=Kept())


def test_a_model_of_another_family_goes_its_own_way(tokenizer):
    config = MambaConfig(vocab_size=257, hidden_size=16, num_hidden_layers=1, state_size=4, eos_token_id=0)
    model = AutoModelForCausalLM.from_config(config).eval()
    options = {"max_new_tokens": 5, "temperature": 1.0, "top_k": 9}
    first, again = (generate(model, tokenizer, ["ab"], seed=seed, **options) for seed in (3, 3))
    assert first == again
    assert len(generate(model, tokenizer, ["ab"], max_new_tokens=5)) == 1


def test_an_empty_prompt_needs_a_first_token(student, tokenizer):
    tokenizer.bos_token = None
    with pytest.raises(LimbeckError, match="has no token"):
        generate(student, tokenizer, [""])
