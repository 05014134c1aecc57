"""Losses without logits are those with logits, in every family, and whole logits are there where they must be."""

import copy
import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch import distributed, nn
from torch.testing import assert_close

import limbeck
from limbeck import LimbeckError
from limbeck.distill import LayerwiseObjective, LogitsObjective, StageStep, kl_divergence
from limbeck.distill.head import Predictions, predict
from limbeck.students import FAMILIES, blocks, plain_head
from tiny import VOCABULARY, tiny_teacher

CAPPED = {"gemma2": {"final_logit_softcapping": 1.5}, "gemma3_text": {"final_logit_softcapping": 1.5}}


def batch_of(tokens):
    labels = tokens.roll(-1, dims=1)
    labels[0, :3] = -100
    return {"input_ids": tokens, "labels": labels}


def losses_of_logits(student, teacher, batch):
    """What `LogitsObjective(temperature=2.0, ce_weight=0.5)` is, from the models' own logits."""
    ours = student(batch["input_ids"]).logits
    with torch.no_grad():
        theirs = teacher(batch["input_ids"]).logits
    ce = F.cross_entropy(ours.flatten(0, 1), batch["labels"].flatten())
    return kl_divergence(ours, theirs, 2.0).mean() + 0.5 * ce


def gradients(loss, student):
    named = dict(student.named_parameters())
    found = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    return {name: gradient for name, gradient in zip(named, found, strict=True) if gradient is not None}


def models(family, **options):
    teacher = tiny_teacher(family, 2, **(CAPPED.get(family, {}) | options))
    return limbeck.convert(teacher, init="random").train(), teacher


@pytest.mark.parametrize("family", FAMILIES)
def test_losses_are_those_of_the_models_own_logits(family, tokens):
    student, teacher = models(family)
    step = StageStep(student, LogitsObjective(temperature=2.0, ce_weight=0.5), teacher)
    batch = batch_of(tokens)
    expected = losses_of_logits(student, teacher, batch)
    for _ in range(2):  # the first time the family's word is checked
        losses = step(batch)
        assert_close(losses["loss"], expected)
    found, theirs = gradients(losses["loss"], student), gradients(expected, student)
    assert found.keys() == theirs.keys()
    for name, gradient in found.items():
        assert_close(gradient, theirs[name], rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("family", ["phi", "gemma2", "granite"])
def test_under_autocast(family, tokens):
    student, teacher = models(family)
    step = StageStep(student, LogitsObjective(temperature=2.0, ce_weight=0.5), teacher)
    with torch.autocast("cpu", torch.bfloat16):
        losses, expected = step(batch_of(tokens)), losses_of_logits(student, teacher, batch_of(tokens))
    assert_close(losses["loss"], expected, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_familys_head_is_plain(family):
    for model in models(family):
        found = plain_head(model)
        assert found is not None
        assert found[0] is model.get_output_embeddings()


def test_the_head_makes_no_logits_and_is_itself_again(make_teacher, tokens):
    model, shapes = make_teacher("phi"), []
    model.lm_head.register_forward_hook(lambda _module, _args, output: shapes.append(tuple(output.shape)))
    hooks = len(model._forward_hooks)
    found = [predict(model, {"input_ids": tokens}, lambda found: found) for _ in range(2)]
    assert shapes[1] == (2, 12, 0)
    assert "forward" not in vars(model.lm_head)
    assert len(model._forward_hooks) == hooks
    assert all(torch.equal(one.logits(), model(tokens).logits) for one in found)
    with pytest.raises(ZeroDivisionError):
        predict(model, {"input_ids": tokens}, lambda _: 1 / 0)
    assert model(tokens).logits.shape == (2, 12, VOCABULARY)
    assert len(model._forward_hooks) == hooks


@pytest.mark.parametrize("family", ["gemma2", "granite"])
def test_a_family_that_does_not_tell_the_truth(family, tokens, monkeypatch):
    monkeypatch.setitem(FAMILIES, family, dataclasses.replace(FAMILIES[family], logits=FAMILIES["llama"].logits))
    student, teacher = models(family)
    with pytest.raises(LimbeckError, match=r"of a head's output -100, -10, -0\.5, 0, 0\.5, 10, 100") as error:
        StageStep(student, LogitsObjective(), teacher)(batch_of(tokens))
    assert "LogitForm(scale=1.0, softcap=None)" in error.value.expected


class Adapted(nn.Linear):
    """A head that is more than a matrix product."""

    def forward(self, states):
        return super().forward(states) + states[..., :1].tanh()


def adapt(model):
    head = Adapted(32, VOCABULARY, bias=False)
    head.weight = model.lm_head.weight
    model.lm_head = head


def keep_forward(model):
    model.lm_head.forward = model.lm_head.forward


@pytest.mark.parametrize("change", [adapt, keep_forward, "family"])
@pytest.mark.parametrize("which", ["student", "teacher", "both"])
def test_other_heads_run_as_they_are(change, which, tokens, monkeypatch):
    if change == "family":
        monkeypatch.setitem(FAMILIES, "granite", dataclasses.replace(FAMILIES["granite"], logits=lambda _config: None))
    student, teacher = models("granite")
    for name, model in (("student", student), ("teacher", teacher)):
        if change != "family" and which in (name, "both"):
            change(model)
            assert plain_head(model) is None
    step = StageStep(student, LogitsObjective(temperature=2.0, ce_weight=0.5), teacher)
    batch = batch_of(tokens)
    loss, expected = step(batch)["loss"], losses_of_logits(student, teacher, batch)
    assert_close(loss, expected)
    found, theirs = gradients(loss, student), gradients(expected, student)
    assert all(torch.allclose(found[name], theirs[name], rtol=1e-4, atol=1e-6) for name in theirs)


def test_a_learning_teacher_with_another_head_is_followed_detached(tokens):
    student, teacher = models("llama")
    adapt(teacher)
    losses = LayerwiseObjective(alpha_logits=1.0, skip_last=0)(student, teacher.requires_grad_(True), batch_of(tokens))
    found = torch.autograd.grad(losses["loss"], list(teacher.parameters()), allow_unused=True)
    assert all(gradient is None for gradient in found)


def test_a_teacher_of_no_known_family(make_teacher, make_student, tokens, monkeypatch):
    teacher = make_teacher("llama")
    student = make_student(make_teacher("gpt_neox"))
    monkeypatch.delitem(FAMILIES, "llama")
    assert plain_head(teacher) is None
    assert StageStep(student, LogitsObjective(), teacher)(batch_of(tokens))["loss"] > 0


@pytest.fixture
def one_process():
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield distributed.init_device_mesh("cpu", (1,))
    distributed.destroy_process_group()


@pytest.mark.parametrize("family", ["phi", "gemma2"])
@pytest.mark.parametrize("root", ["step", "student", "both"])
@pytest.mark.parametrize(
    "objective",
    [LogitsObjective(ce_weight=0.5), LayerwiseObjective(alpha_logits=0.3, skip_last=0)],
    ids=lambda o: o.name,
)
def test_sharded_students(family, root, objective, tokens, one_process):
    from torch.distributed.fsdp import fully_shard

    student, teacher = models(family)
    whole = StageStep(copy.deepcopy(student), objective, teacher)
    expected = whole(batch_of(tokens))
    expected["loss"].backward()
    step = StageStep(student, objective, teacher)
    for block in blocks(student):
        fully_shard(block, mesh=one_process)
    if root != "step":
        fully_shard(student, mesh=one_process, reshard_after_forward=True if root == "both" else None)
    if root != "student":
        fully_shard(step, mesh=one_process)
    losses = step(batch_of(tokens))
    losses["loss"].backward()
    for name in expected:
        assert_close(losses[name], expected[name], msg=name)
    for (name, parameter), sharded in zip(whole.named_parameters(), step.parameters(), strict=True):
        assert (parameter.grad is None) == (sharded.grad is None), name
        if parameter.grad is not None:
            assert_close(sharded.grad.full_tensor(), parameter.grad, rtol=1e-4, atol=1e-5, msg=name)


def test_predictions_are_logits_where_there_is_no_head():
    logits = torch.randn(1, 2, 3)
    assert Predictions(logits, None).logits() is logits


@pytest.mark.gpu
@pytest.mark.parametrize("family", ["phi", "gemma2", "granite"])
def test_on_a_gpu_under_autocast(family, tokens):
    student, teacher = (model.cuda() for model in models(family))
    batch = {name: tensor.cuda() for name, tensor in batch_of(tokens).items()}
    step = StageStep(student, LogitsObjective(temperature=2.0, ce_weight=0.5), teacher)
    with torch.autocast("cuda", torch.bfloat16):
        losses, expected = step(batch), losses_of_logits(student, teacher, batch)
        same = StageStep(copy.deepcopy(teacher), LogitsObjective(), teacher)(batch)
    assert same["kl"] == 0
    assert_close(losses["loss"], expected, rtol=2e-2, atol=1e-3)
    found, theirs = gradients(losses["loss"], student), gradients(expected, student)
    assert found.keys() == theirs.keys()
    head = next(name for name, weight in student.named_parameters() if weight is student.get_output_embeddings().weight)
    assert found[head].dtype == torch.float32
    assert (found[head] - theirs[head]).norm() < 0.1 * theirs[head].norm()
