"""The laws of students, over families × ways of swapping; each beside what breaks it.

In the quick tests every family meets every law and every way of swapping, and every law every way, but not all three
at once: that is the whole table, whose rest is marked `slow`.
"""

import copy
import functools
import itertools
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import limbeck
from limbeck import LimbeckError
from limbeck.students import (
    FAMILIES,
    RecurrentLayer,
    StudentCache,
    arguments,
    attention_of,
    blocks,
    mixers,
    student_config,
    swapped_layers,
)
from limbeck.students.activations import fuse_activations
from tiny import VOCABULARY, shaken, tiny_teacher

LAYERS, LENGTH = 4, 12
SWAPPED = {"first": (0,), "last": (3,), "every second": (1, 3), "all": (0, 1, 2, 3)}
CLOSE = {"rtol": 1e-5, "atol": 1e-5}
FAR = {"rtol": 1e-3, "atol": 1e-3}

_laws = itertools.count()


def over_the_table(law: Callable[..., None]) -> Callable[..., None]:
    """Run a law for every family and every way of swapping; quickly one way a family, and the next for the next law."""
    number = next(_laws)
    cells = [
        pytest.param(family, way, marks=[] if (row + number) % len(SWAPPED) == column else pytest.mark.slow)
        for row, family in enumerate(FAMILIES)
        for column, way in enumerate(SWAPPED)
    ]
    return pytest.mark.parametrize(("family", "way"), cells)(law)


def kept(way: str) -> list[int]:
    return [layer for layer in range(LAYERS) if layer not in SWAPPED[way]]


@functools.cache
def teacher_of(family: str) -> Any:
    torch.manual_seed(1)
    return tiny_teacher(family, LAYERS)


@functools.cache
def student_of(family: str, way: str) -> Any:
    """A student whose mixers are random and strong; tests leave it as it is."""
    student = limbeck.convert(teacher_of(family), keep_attention=kept(way), init="random")
    torch.manual_seed(2)
    for mixer in mixers(student).values():
        shaken(mixer)
    return student.requires_grad_(False)


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.randint(3, VOCABULARY, (2, LENGTH))


@pytest.fixture
def forgetful(monkeypatch: pytest.MonkeyPatch) -> None:
    """Recurrent layers count their tokens but do not keep the state."""
    monkeypatch.setattr(RecurrentLayer, "advance", lambda self, _, n: setattr(self, "tokens", self.tokens + n))


def apart(found: Any, expected: Any) -> bool:
    return not torch.allclose(found, expected, **FAR)


# --- cached and uncached ----------------------------------------------------------------------------------------------


def greedy(student: Any, tokens: torch.Tensor, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """The sequences, and the logits they were chosen by, (b, new, v)."""
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None} | options
    output = student.generate(tokens, return_dict_in_generate=True, output_logits=True, **options)
    return output.sequences, torch.stack(output.logits, dim=1)


@over_the_table
def test_cached_greedy_is_uncached_greedy(family, way, tokens):
    student = student_of(family, way)
    (cached, cached_logits), (uncached, logits) = greedy(student, tokens), greedy(student, tokens, use_cache=False)
    assert torch.equal(cached, uncached)
    torch.testing.assert_close(cached_logits, logits, **CLOSE)


@over_the_table
@pytest.mark.usefixtures("forgetful")
def test_without_the_state_greedy_goes_wrong(family, way, tokens):
    student = student_of(family, way)
    assert apart(greedy(student, tokens)[1], greedy(student, tokens, use_cache=False)[1])


def in_pieces(student: Any, tokens: torch.Tensor) -> torch.Tensor:
    cache = StudentCache(student.config)
    pieces = tokens.split([5, 4, 1, 1, 1], dim=1)  # prefill, a chunk, single steps
    return torch.cat([student(piece, past_key_values=cache, use_cache=True).logits for piece in pieces], dim=1)


@over_the_table
def test_prefill_chunk_and_steps_are_the_full_forward(family, way, tokens):
    student = student_of(family, way)
    torch.testing.assert_close(in_pieces(student, tokens), student(tokens).logits, **CLOSE)


@over_the_table
@pytest.mark.usefixtures("forgetful")
def test_without_the_state_the_pieces_do_not_fit(family, way, tokens):
    student = student_of(family, way)
    assert apart(in_pieces(student, tokens), student(tokens).logits)


# --- beams ------------------------------------------------------------------------------------------------------------


def beams(student: Any, tokens: torch.Tensor, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None} | options
    output = student.generate(
        tokens, num_beams=4, num_return_sequences=3, return_dict_in_generate=True, output_scores=True, **options
    )
    return output.sequences, output.sequences_scores


@over_the_table
def test_cached_beams_are_uncached_beams(family, way, tokens):
    student = student_of(family, way)
    (cached, cached_scores), (uncached, scores) = beams(student, tokens), beams(student, tokens, use_cache=False)
    assert torch.equal(cached, uncached)
    torch.testing.assert_close(cached_scores, scores, **CLOSE)


@over_the_table
def test_without_reordering_beams_go_wrong(family, way, tokens, monkeypatch):
    student = student_of(family, way)
    right = beams(student, tokens)[1]
    monkeypatch.setattr(RecurrentLayer, "reorder_cache", lambda self, beam_idx: None)
    assert apart(beams(student, tokens)[1], right)


# --- padding ----------------------------------------------------------------------------------------------------------


def padded(student: Any, tokens: torch.Tensor, length: int) -> torch.Tensor:
    """Logits of the first row's last tokens, when all before them is padding."""
    mask = torch.ones_like(tokens)
    mask[0, :-length] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    logits = student(tokens.where(mask.bool(), 2), attention_mask=mask, position_ids=positions).logits
    return logits[:1, -length:]


@over_the_table
def test_left_padded_logits_are_those_without_padding(family, way, tokens):
    student = student_of(family, way)
    torch.testing.assert_close(padded(student, tokens, 5), student(tokens[:1, -5:]).logits, **CLOSE)


@over_the_table
def test_without_the_mask_padding_leaks(family, way, tokens, monkeypatch):
    student = student_of(family, way)
    monkeypatch.setattr(arguments, "token_columns", lambda mask, length: torch.ones_like(mask))
    assert apart(padded(student, tokens, 5), student(tokens[:1, -5:]).logits)


# --- packed documents -------------------------------------------------------------------------------------------------


@over_the_table
def test_packed_documents_are_separate_documents(family, way, tokens):
    student = student_of(family, way)
    seq_idx = torch.tensor([0] * 4 + [1] * 7 + [2]).expand(2, -1)
    separate = torch.cat([student(piece).logits for piece in tokens.split([4, 7, 1], dim=1)], dim=1)
    torch.testing.assert_close(student(tokens, seq_idx=seq_idx).logits, separate, **CLOSE)
    assert apart(student(tokens).logits, separate)


# --- saving and loading -----------------------------------------------------------------------------------------------


def without(folder: Any, part: str) -> str:
    """Take the first tensor whose name has `part` in it out of a checkpoint; its name."""
    file = folder / "model.safetensors"
    weights = load_file(file)
    name = next(name for name in sorted(weights) if part in name)
    weights.pop(name)
    save_file(weights, file, metadata={"format": "pt"})
    return name


@over_the_table
def test_saved_and_loaded_it_is_the_same_to_the_bit(family, way, tokens, tmp_path):
    student = student_of(family, way)
    student.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(again) is type(student)
    assert torch.equal(again(tokens).logits, student(tokens).logits)


@over_the_table
def test_a_student_that_is_not_whole_does_not_load(family, way, tmp_path):
    student_of(family, way).save_pretrained(tmp_path)
    name = without(tmp_path, ".mixer.")
    with pytest.raises(LimbeckError, match="1 missing") as refused:
        AutoModelForCausalLM.from_pretrained(tmp_path)
    assert name in str(refused.value)


@over_the_table
def test_a_teachers_folder_leaves_nothing_but_mixers_new(family, way, tmp_path):
    teacher = teacher_of(family)
    teacher.save_pretrained(tmp_path)
    config = student_config(teacher.config, keep_attention=kept(way))
    student, info = AutoModelForCausalLM.from_pretrained(tmp_path, config=config, output_loading_info=True)
    assert swapped_layers(student) == SWAPPED[way]
    assert set(info["missing_keys"]) == {name for name in student.state_dict() if ".mixer." in name}
    for name, tensor in student.state_dict().items():
        if ".mixer." not in name:
            assert torch.equal(tensor, teacher.state_dict()[name]), name


@over_the_table
def test_a_teachers_folder_that_leaves_more_new_is_refused(family, way, tmp_path):
    teacher = teacher_of(family)
    teacher.save_pretrained(tmp_path)
    without(tmp_path, ".mlp.")
    with pytest.raises(LimbeckError, match=r"1 missing \(.*\.mlp\."):
        AutoModelForCausalLM.from_pretrained(tmp_path, config=student_config(teacher.config, keep_attention=kept(way)))


# --- no layer swapped -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_with_no_layer_swapped_it_is_the_teacher(family, tokens):
    teacher, student = teacher_of(family), limbeck.convert(teacher_of(family), keep_attention=range(LAYERS))
    fuse_activations(teacher)
    mask = torch.ones_like(tokens)
    mask[0, :4] = 0
    for options in ({}, {"attention_mask": mask}):
        assert torch.equal(student(tokens, **options).logits, teacher(tokens, **options).logits)
    assert torch.equal(greedy(student, tokens)[0], greedy(teacher, tokens)[0])


@over_the_table
def test_a_layer_swapped_shows(family, way, tokens):
    teacher, student = teacher_of(family), student_of(family, way)
    assert apart(student(tokens).logits, teacher(tokens).logits)
    for layer in kept(way):
        assert type(attention_of(blocks(student)[layer])) is type(attention_of(blocks(teacher)[layer]))


# --- what is particular to some families ------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch's own tracing does
def test_a_carried_mask_is_the_one_of_its_own_call(tokens):
    """StableLM's blocks drop our keywords; what carries them stays an argument, compiled and recomputed too."""
    student, mask = student_of("stablelm", "every second"), torch.ones_like(tokens)
    mask[0, :4] = 0
    padded_logits, plain = student(tokens, attention_mask=mask).logits, student(tokens).logits
    compiled = torch.compile(student, backend="aot_eager")
    torch.testing.assert_close(compiled(tokens, attention_mask=mask, use_cache=False).logits, padded_logits, **CLOSE)
    torch.testing.assert_close(compiled(tokens, use_cache=False).logits, plain, **CLOSE)
    for again in (copy.deepcopy(student), pickle.loads(pickle.dumps(student))):  # noqa: S301
        assert torch.equal(again(tokens, attention_mask=mask).logits, padded_logits)


def test_gpt2_as_it_was_published(tokens, tmp_path):
    """The checkpoints on the hub have no prefix, no head, and causal masks among the weights."""
    teacher = teacher_of("gpt2")
    teacher.save_pretrained(tmp_path)
    fuse_activations(teacher)
    file = tmp_path / "model.safetensors"
    weights = {name.removeprefix("transformer."): tensor for name, tensor in load_file(file).items()}
    weights |= {f"h.{layer}.attn.bias": torch.ones(1, 1, 64, 64).tril() for layer in range(LAYERS)}
    save_file(weights, file, metadata={"format": "pt"})
    config = student_config(teacher.config, keep_attention=[1, 2])
    student = AutoModelForCausalLM.from_pretrained(tmp_path, config=config)
    assert swapped_layers(student) == (0, 3)
    assert torch.equal(limbeck.load_model(tmp_path)(tokens).logits, teacher(tokens).logits)
    converted = limbeck.convert(tmp_path, keep_attention=[1, 2], init="attention")
    expected = limbeck.convert(teacher, keep_attention=[1, 2], init="attention")
    assert torch.equal(converted(tokens).logits, expected(tokens).logits)
    limbeck.convert_folder(tmp_path, tmp_path / "student", keep_attention=[1, 2])
    assert torch.equal(limbeck.load_model(tmp_path / "student")(tokens).logits, expected(tokens).logits)
