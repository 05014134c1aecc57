"""Generation on a GPU: Hugging Face's own greedy tokens, with the graph and without, drawn tokens by their seed."""

from typing import Any

import pytest
import torch

import limbeck
from limbeck.generation import Decoder, Sampling
from tiny import tiny_teacher

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

NEW = 12
DRAWN = (
    Sampling(temperature=1.0),
    Sampling(temperature=0.7, top_k=9),
    Sampling(temperature=1.3, top_p=0.8, repetition_penalty=1.4),
    Sampling(temperature=1.1, top_k=20, top_p=0.9, min_p=0.05),
)


def a_model(family: str, kept: Any) -> Any:
    teacher = tiny_teacher(family, dtype=torch.float32).cuda()
    return teacher if kept is None else limbeck.convert(teacher, keep_attention=kept, init="random")


def padded_prompts():
    ids = torch.randint(3, 61, (3, 9), device="cuda")
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    return ids, mask


@pytest.mark.parametrize("kept", [(), (1,), None], ids=["whole", "hybrid", "teacher"])
@pytest.mark.parametrize("family", ["phi", "gpt_neox", "llama", "qwen2", "gemma2"])
def test_greedy_is_hugging_faces(family, kept):
    model = a_model(family, kept)
    ids, mask = padded_prompts()
    expected = model.generate(
        ids, attention_mask=mask, max_new_tokens=NEW, do_sample=False, eos_token_id=[5, 7], pad_token_id=2
    )[:, 9:]
    options = {"max_new_tokens": NEW, "eos": [5, 7], "pad": 2}
    assert torch.equal(Decoder(model, ids, mask, **options, graph=False).run(), expected)
    assert torch.equal(Decoder(model, ids, mask, **options).run(), expected)


@pytest.mark.parametrize("kept", [(), (1,)], ids=["whole", "hybrid"])
def test_bfloat16_with_the_graph_is_without(kept):
    model = a_model("phi", kept).to(torch.bfloat16)
    ids, mask = padded_prompts()
    captured = Decoder(model, ids, mask, max_new_tokens=40)
    assert torch.equal(captured.run(), Decoder(model, ids, mask, max_new_tokens=40, graph=False).run())
    assert captured.graph is not None


@pytest.mark.parametrize("mixer", ["mamba2", "mamba"])
def test_other_mixers(mixer):
    model = limbeck.convert(tiny_teacher("llama").cuda(), mixer=mixer, init="random")
    ids, mask = padded_prompts()
    expected = Decoder(model, ids, mask, max_new_tokens=NEW, graph=False).run()
    assert torch.equal(Decoder(model, ids, mask, max_new_tokens=NEW).run(), expected)


@pytest.mark.parametrize("sampling", DRAWN, ids=str)
def test_drawing_in_the_graph_follows_the_seed(sampling):
    model = a_model("phi", (1,))
    ids, mask = padded_prompts()

    def drawn(seed):
        generator = torch.Generator("cuda").manual_seed(seed)
        return Decoder(model, ids, mask, max_new_tokens=40, sampling=sampling, generator=generator).run()

    first, again, other = drawn(3), drawn(3), drawn(4)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_without_a_seed_every_run_is_another():
    model = a_model("phi", ())
    ids, mask = padded_prompts()
    runs = [Decoder(model, ids, mask, max_new_tokens=40, sampling=Sampling(1.0)).run() for _ in range(2)]
    assert not torch.equal(*runs)


def test_tokens_come_one_by_one():
    model = a_model("phi", (1,))
    ids, mask = padded_prompts()
    streamed = [token.clone() for token in Decoder(model, ids, mask, max_new_tokens=NEW).tokens()]
    assert torch.equal(torch.stack(streamed, 1), Decoder(model, ids, mask, max_new_tokens=NEW).run())
