"""A teacher whose layers lie in the host's memory says what it would say otherwise, and holds two of them at most."""

import copy

import pytest
import torch

from limbeck import convert
from limbeck.distill import GuidedStep, StageStep, TargetGuide, make_objective, matrix
from limbeck.students import blocks, mixers
from limbeck.training import offload, offload_layers
from tiny import VOCABULARY, shaken, tiny_teacher

CPU = torch.device("cpu")
OBJECTIVES = {
    "matrix": {},
    "hidden": {},
    "mixer": {"target": "mixer"},
    "logits": {},
    "layerwise": {"alpha_logits": 1.0},
    "layerwise-mixer": {"position": "mixer"},
}


@pytest.fixture
def batch():
    ids = torch.randint(3, VOCABULARY, (2, 9))
    mask = torch.ones(2, 8, dtype=torch.long)
    mask[0, :3] = 0
    return {"input_ids": ids[:, :-1], "labels": ids[:, 1:], "attention_mask": mask}


class Poisoned(offload._Layer):
    """A layer that is not a number while it is away, as on a GPU it would not be there."""

    def drop(self):
        super().drop()
        for parameter, nothing in zip(self.parameters, self.home, strict=True):
            parameter.data = torch.full_like(nothing, torch.nan)


@pytest.fixture
def poison(monkeypatch):
    monkeypatch.setattr(offload, "_Layer", Poisoned)


@pytest.fixture
def offloaded():
    def offloaded(teacher):
        twin = copy.deepcopy(teacher)
        offload_layers(twin, CPU)
        return twin.eval().requires_grad_(False)

    return offloaded


def losses(name, student, teacher, batch):
    options, objective = OBJECTIVES[name], {"mixer": "hidden"}.get(name, name.partition("-")[0])
    made = make_objective(objective, **options)
    if objective == "layerwise":
        step = GuidedStep(copy.deepcopy(student), made, TargetGuide(lambda: teacher, 1))
        step.enter(0)
    else:
        step = StageStep(copy.deepcopy(student), made, teacher)
    found = step(batch)
    found["loss"].backward()
    gradients = {name: weight.grad for name, weight in step.student.named_parameters() if weight.grad is not None}
    return found, gradients


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("family", ["gpt_neox", "llama"])
def test_losses_are_the_same_to_the_bit(name, family, batch, offloaded):
    teacher = tiny_teacher(family, tie_word_embeddings=family == "llama")
    student = convert(copy.deepcopy(teacher), init="random", keep_attention=[1]).train()
    expected, gradients = losses(name, student, teacher, batch)
    for _ in range(2):  # a layer that was dropped comes again
        found, ours = losses(name, student, offloaded(teacher), batch)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[term], expected[term]) for term in expected)
        assert ours.keys() == gradients.keys()
        assert all(torch.equal(ours[weight], gradients[weight]) for weight in gradients)


@pytest.mark.usefixtures("poison")
def test_a_teacher_with_mixers_gives_their_matrices(batch, offloaded, monkeypatch):
    """Their weights are read outside of their layer's forward, and again where matrices are made anew in backward."""
    monkeypatch.setattr(matrix, "STORED_LENGTH", 4)
    original = tiny_teacher("gpt_neox")
    teacher = shaken(convert(copy.deepcopy(original), init="random")).eval()
    student = convert(original, init="random").train()
    expected, gradients = losses("matrix", student, teacher, batch)
    twin = offloaded(teacher)
    assert any(parameter.isnan().any() for parameter in twin.parameters())
    found, ours = losses("matrix", student, twin, batch)
    assert torch.equal(found["loss"], expected["loss"])
    assert all(torch.equal(ours[weight], gradients[weight]) for weight in gradients)
    assert all(parameter.isnan().all() for mixer in mixers(twin).values() for parameter in mixer.parameters())


def at_home(teacher):
    """Where each parameter's numbers lie."""
    return {name: parameter.data_ptr() for name, parameter in teacher.named_parameters()}


def test_two_layers_at_most_are_on_the_device(batch, offloaded, monkeypatch):
    lists = []
    monkeypatch.setattr(offload, "_Layer", lambda *a, make=offload._Layer: lists.append(make(*a)) or lists[-1])
    teacher = offloaded(tiny_teacher("gpt_neox", layers=4))
    home, seen = at_home(teacher), []

    def look(*_):
        moved = {name for name, where in at_home(teacher).items() if where != home[name]}
        seen.append(({name.split(".")[2] for name in moved}, [layer.here is not None for layer in lists]))
        assert all("layers" in name for name in moved), "embeddings, norm and head stay"
        assert len(moved) == len(list(blocks(teacher)[len(seen) - 1].parameters())), "the whole layer comes"

    for block in blocks(teacher):
        block.mlp.register_forward_hook(look)
    with torch.no_grad():
        teacher(batch["input_ids"])
    assert [used for used, _ in seen] == [{"0"}, {"1"}, {"2"}, {"3"}]
    here = [[number for number, present in enumerate(flags) if present] for _, flags in seen]
    assert here == [[0, 1], [1, 2], [2, 3], [3]]
    assert at_home(teacher) == home
    assert all(layer.here is None for layer in lists)


def test_a_layer_that_fails_leaves_nothing_in_its_place(batch, offloaded):
    teacher = tiny_teacher("gpt_neox")
    twin = offloaded(teacher)
    home = at_home(twin)

    def fail(*_):
        raise torch.OutOfMemoryError("no room")

    handle = blocks(twin)[1].mlp.register_forward_hook(fail)
    with torch.no_grad(), pytest.raises(torch.OutOfMemoryError):
        twin(batch["input_ids"])
    assert at_home(twin) == home
    handle.remove()
    with torch.no_grad():
        assert torch.equal(twin(batch["input_ids"]).logits, teacher(batch["input_ids"]).logits)


@pytest.mark.gpu
def test_on_a_gpu_copies_overlap_and_the_loss_is_the_same(batch):
    teacher = tiny_teacher("gpt_neox", layers=6, hidden_size=512, intermediate_size=2048, dtype=torch.bfloat16)
    expected = copy.deepcopy(teacher).cuda()
    offload_layers(teacher, torch.device("cuda"))
    away = [parameter for block in blocks(teacher) for parameter in block.parameters()]
    with torch.no_grad():
        for _ in range(20):
            ids = torch.randint(3, VOCABULARY, (8, 64), device="cuda")
            assert torch.equal(teacher(ids).logits, expected(ids).logits)
            assert all(parameter.device.type == "cpu" and parameter.is_pinned() for parameter in away)
