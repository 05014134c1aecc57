"""CALD's loss: its values by hand, what it keeps, and a teacher that learns alongside."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

import limbeck
from limbeck import LimbeckError
from limbeck.distill import LayerwiseObjective, StageStep, layer_outputs, make_objective
from limbeck.students import blocks, mixers


def batch_of(tokens, mask=None):
    batch = {"input_ids": tokens, "labels": tokens.roll(-1, dims=1)}
    return batch if mask is None else batch | {"attention_mask": mask}


def losses_of(objective, student, teacher, batch):
    return objective(student, teacher.eval().requires_grad_(False), batch)


@pytest.mark.parametrize("norm", ["layernorm", "rmsnorm", "loss_norm", "none"])
@pytest.mark.parametrize("distance", ["mse", "cosine"])
@pytest.mark.parametrize("position", ["block", "mixer"])
def test_a_student_that_is_its_teacher_has_no_layer_loss(
    make_teacher, make_student, family, tokens, left_padding, norm, distance, position
):
    teacher = make_student(make_teacher(family), keep_attention=(1,))
    student = copy.deepcopy(teacher).train()
    objective = LayerwiseObjective(alpha_logits=1.0, norm=norm, distance=distance, position=position)
    for batch in (batch_of(tokens), batch_of(tokens, left_padding)):
        losses = losses_of(objective, student, teacher, batch)
        assert losses["kl"].item() == 0.0
        if norm == "loss_norm" and distance == "cosine":  # rounding, scaled to 1
            continue
        assert abs(losses["layer"].item()) < (1e-12 if distance == "mse" else 2e-7)
    losses["loss"].backward()
    assert all(p.grad.isfinite().all() for p in student.parameters() if p.grad is not None)


def test_by_hand(make_teacher, make_student, family, tokens):
    teacher = make_teacher(family)
    student = make_student(teacher)
    step = StageStep(student, LayerwiseObjective(alpha_ce=0.7, alpha_logits=0.3))
    losses = losses_of(step.objective, student, teacher, batch_of(tokens))
    with torch.no_grad():
        ours = student(tokens, output_hidden_states=True)
        theirs = teacher(tokens, output_hidden_states=True)
    # hidden_states begins with the embeddings' output and ends with the normed output of the last block: L + 1 of them
    layers = []
    for found, target in zip(ours.hidden_states[1:-1], theirs.hidden_states[1:-1], strict=True):
        standard = [
            (h - h.mean(-1, keepdim=True)) / (h.var(-1, False, keepdim=True) + 1e-5).sqrt() for h in (found, target)
        ]
        layers.append((standard[0] - standard[1]).square().mean())
    assert len(layers) == 2
    layer = torch.stack(layers).mean()
    ce = F.cross_entropy(ours.logits.flatten(0, 1), tokens.roll(-1, dims=1).flatten())
    p, q = ((logits / 2).softmax(-1) for logits in (theirs.logits, ours.logits))
    kl = (p * (p / q).log()).sum(-1).mean()
    for name, expected in (("layer", layer), ("ce", ce), ("kl", kl)):
        assert_close(losses[name], expected, rtol=1e-4, atol=1e-6)
        assert not losses[name].requires_grad
    assert_close(losses["loss"].detach(), 0.7 * ce + 15 * layer + 0.3 * kl, rtol=1e-4, atol=1e-6)


def test_norms_and_distances_by_hand(make_teacher, make_student, tokens):
    teacher = make_teacher()
    student = make_student(teacher)
    batch = batch_of(tokens)

    def layer(**options):
        return losses_of(LayerwiseObjective(**options), student, teacher, batch)["layer"]

    with torch.no_grad(), layer_outputs(student, range(3)) as found, layer_outputs(teacher, range(3)) as target:
        student(tokens)
        teacher(tokens)
    pairs = [(found[i], target[i]) for i in range(3)]
    expected = [((a - b) ** 2).mean() for a, b in pairs]
    assert_close(layer(norm="none"), torch.stack(expected[:2]).mean())
    assert_close(layer(norm="none", skip_last=0), torch.stack(expected).mean())
    assert_close(layer(norm="none", skip_last=2), expected[0])
    assert_close(layer(norm="loss_norm"), torch.tensor(1.0))
    rms = [h / (h.square().mean(-1, keepdim=True) + 1e-6).sqrt() for h in pairs[0]]
    assert_close(layer(norm="rmsnorm", skip_last=2), (rms[0] - rms[1]).square().mean())
    cosine = [1 - F.cosine_similarity(a, b, -1).mean() for a, b in pairs]
    assert_close(layer(norm="none", distance="cosine"), torch.stack(cosine[:2]).mean())
    with torch.no_grad(), layer_outputs(student, range(3), "mixer") as found:
        student(tokens)
    with torch.no_grad(), layer_outputs(teacher, range(3), "mixer") as target:
        teacher(tokens)
    assert_close(layer(norm="none", position="mixer", skip_last=2), (found[0] - target[0]).square().mean())


def test_loss_norm_scales_the_gradient_of_each_layer(make_teacher, make_student, tokens):
    teacher = make_teacher(dtype=torch.float64)
    student = make_student(teacher)
    gradients = []
    for norm in ("none", "loss_norm"):
        objective = LayerwiseObjective(alpha_ce=0.0, norm=norm, skip_last=2)
        losses = losses_of(objective, student, teacher, batch_of(tokens))
        (gradient,) = torch.autograd.grad(losses["loss"], mixers(student)[0].in_proj.weight)
        gradients.append(gradient if norm == "loss_norm" else gradient / losses["layer"])
    assert_close(*gradients, rtol=1e-4, atol=1e-7)


def test_padding_and_unlabelled_tokens_count_for_nothing(make_teacher, make_student, family, tokens, left_padding):
    teacher = make_teacher(family)
    student = make_student(teacher)
    objective = LayerwiseObjective(alpha_logits=1.0)
    padded = batch_of(tokens, left_padding)
    losses = losses_of(objective, student, teacher, padded)
    rows = []
    for row, start in ((0, 4), (1, 0)):
        one = {"input_ids": tokens[row : row + 1, start:], "labels": padded["labels"][row : row + 1, start:]}
        rows.append((12 - start, losses_of(objective, student, teacher, one)))
    for name in ("ce", "layer", "kl"):
        expected = sum(count * found[name] for count, found in rows) / 20
        assert_close(losses[name], expected, rtol=1e-4, atol=1e-5)

    labels = padded["labels"].clone()
    labels[:, :6] = -100  # a prompt
    batch = {"input_ids": tokens, "labels": labels}
    found = losses_of(LayerwiseObjective(norm="none", skip_last=2, mask="labels"), student, teacher, batch)
    with torch.no_grad(), layer_outputs(student, range(1)) as ours, layer_outputs(teacher, range(1)) as theirs:
        student(tokens), teacher(tokens)
    assert_close(found["layer"], (ours[0] - theirs[0])[:, 6:].square().mean())


def test_without_a_teacher_it_is_cross_entropy(make_teacher, make_student, tokens):
    student = make_student(make_teacher())
    losses = LayerwiseObjective()(student, None, batch_of(tokens))
    assert losses.keys() == {"loss", "ce"}
    assert_close(
        losses["loss"], F.cross_entropy(student(tokens).logits.flatten(0, 1), batch_of(tokens)["labels"].flatten())
    )


def test_everything_learns_and_the_teacher_does_not(make_teacher, make_student, tokens):
    teacher = make_teacher()
    step = StageStep(make_student(teacher), LayerwiseObjective())
    losses_of(step.objective, step.student, teacher, batch_of(tokens))["loss"].backward()
    assert all(p.requires_grad for p in step.parameters())
    assert all(p.grad is None for p in teacher.parameters())
    silent = {name for name, p in step.student.named_parameters() if p.grad is None}
    assert not {name for name in silent if ".D" not in name}


def test_a_teacher_that_learns_gives_its_own_loss_and_a_detached_target(make_teacher, make_student, tokens):
    teacher = make_teacher()
    student = make_student(teacher)
    batch, objective = batch_of(tokens), LayerwiseObjective(alpha_logits=1.0)
    frozen = losses_of(objective, student, teacher, batch)
    calls = []
    handle = teacher.register_forward_hook(lambda *_: calls.append(1))
    losses = objective(student, teacher.requires_grad_(True), batch)
    handle.remove()
    assert calls == [1]  # one forward pass for both
    assert all(torch.equal(losses[name], frozen[name]) for name in frozen)
    assert_close(losses["teacher_loss"], losses_alone(teacher, batch))
    (losses["loss"] + losses["teacher_loss"]).backward()
    for ours, alone in ((teacher, losses_alone(teacher, batch)), (student, frozen["loss"])):
        grads = [p.grad for p in ours.parameters()]
        expected = torch.autograd.grad(alone, list(ours.parameters()), allow_unused=True)
        for found, wanted in zip(grads, expected, strict=True):
            assert (found is None) == (wanted is None)
            assert found is None or torch.equal(found, wanted)
    with torch.no_grad():
        assert "teacher_loss" not in objective(student, teacher, batch)


def losses_alone(teacher, batch):
    return F.cross_entropy(teacher(batch["input_ids"]).logits.flatten(0, 1), batch["labels"].flatten())


def test_nothing_is_kept_but_what_is_compared(make_teacher, tokens):
    teacher = make_teacher()
    with layer_outputs(teacher, range(2)) as outputs:
        teacher(tokens)
    assert list(outputs) == [0, 1]
    assert not any(block._forward_hooks for block in blocks(teacher))


def test_refusals(make_teacher, make_student, tokens):
    student = make_student(make_teacher())
    with pytest.raises(LimbeckError, match="a teacher of 3 layers of width 64") as error:
        LayerwiseObjective()(student, make_teacher(hidden_size=64), batch_of(tokens))
    assert "3 of 32" in error.value.expected
    with pytest.raises(LimbeckError, match="skip_last = 3 of 3 layers"):
        LayerwiseObjective(skip_last=3)(student, make_teacher(), batch_of(tokens))
    for option in ("norm", "distance", "position", "mask"):
        with pytest.raises(LimbeckError, match=f"unknown {option} of layers 'none-such'"):
            make_objective("layerwise", **{option: "none-such"})


def test_vocabularies_padded_to_two_sizes(make_teacher, make_student, tokens):
    small = make_teacher(vocab_size=500)
    wide = make_teacher(vocab_size=504)
    student = limbeck.convert(small)
    losses = LayerwiseObjective(alpha_layer=0.0, alpha_logits=1.0)(
        student, wide.requires_grad_(False), batch_of(tokens)
    )
    p, q = ((model(tokens).logits[..., :500] / 2).softmax(-1) for model in (wide, student))
    assert_close(losses["kl"], (p * (p / q).log()).sum(-1).mean().detach(), rtol=1e-4, atol=1e-6)
