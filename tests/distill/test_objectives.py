"""The three objectives: their values by hand, what they let learn, and what they refuse."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch.distributions import Categorical
from torch.distributions import kl_divergence as reference_kl
from torch.testing import assert_close

import limbeck
from limbeck import LimbeckError, observe, run_layer
from limbeck.distill import (
    OBJECTIVES,
    HiddenObjective,
    LogitsObjective,
    MatrixObjective,
    StageStep,
    check_vocabularies,
    kl_divergence,
    make_objective,
    matrix,
)
from limbeck.distill.base import freeze, token_mean
from limbeck.mixers import DiscreteMamba2
from limbeck.mixers import registry as mixer_registry
from limbeck.ops import ssd_matrix
from limbeck.students import blocks, mixers

EVERY = [MatrixObjective, HiddenObjective, lambda: HiddenObjective("mixer"), LogitsObjective]
NAMES = ["matrix", "hidden", "hidden-mixer", "logits"]
every = pytest.mark.parametrize("make", EVERY, ids=NAMES)


def batch_of(tokens, mask=None):
    batch = {"input_ids": tokens, "labels": tokens.roll(-1, dims=1)}
    return batch if mask is None else batch | {"attention_mask": mask}


# --- nothing to learn -----------------------------------------------------------------------------------------------


def test_matrix_is_zero_for_the_teachers_own_linear_attention(make_teacher, family, tokens, left_padding):
    """The teacher's mixers are decayed linear attention over its queries and keys; so are the student's."""
    transformer = make_teacher(family)
    teacher = limbeck.convert(transformer, init="attention")
    student = limbeck.convert(transformer, init="identity")
    with torch.no_grad():
        for index, mixer in mixers(student).items():
            for name, parameter in mixer.named_parameters():
                parameter.copy_(mixers(teacher)[index].get_parameter(name))
    step = StageStep(student, MatrixObjective(), teacher)
    for batch in (batch_of(tokens), batch_of(tokens, left_padding)):
        losses = step(batch)
        assert losses["loss"].item() == 0.0
        losses["loss"].backward()  # the norm has a corner at zero: its gradient there is 0, not NaN
        assert all(not p.grad.any() for p in student.parameters() if p.grad is not None)

    mixer, seen = mixers(student)[1], observe(teacher, tokens)[1]
    xBC, _, A_log = mixer.in_proj(seen.mixer_input).split(mixer.in_proj_widths, dim=-1)
    _, key, query = (xBC + mixer.conv1d.bias).split(mixer.conv_widths, dim=-1)
    key, query = (part.unflatten(-1, (4, 8)).transpose(1, 2) for part in (key, query))  # (b, h, l, p)
    assert not A_log.any()
    t = torch.arange(12)
    decay = 0.5 ** (t[:, None] - t[None, :]).clamp_min(0)
    assert_close(seen.matrix(), (query @ key.transpose(-1, -2) * decay).tril(), rtol=1e-4, atol=1e-5)

    with torch.no_grad():
        mixer.D.add_(1.0)  # one on the diagonal of 12 rows, in one layer
    assert_close(step(batch_of(tokens))["loss"], torch.tensor(12.0).sqrt())


@pytest.mark.parametrize("make", EVERY[1:], ids=NAMES[1:])
def test_student_that_is_its_teacher_has_no_loss(make_teacher, make_student, family, make, tokens, left_padding):
    teacher = make_student(make_teacher(family), keep_attention=(1,))
    step = StageStep(copy.deepcopy(teacher).train(), make(), teacher)
    for batch in (batch_of(tokens), batch_of(tokens, left_padding)):
        assert step(batch)["loss"].item() == 0.0


def test_nothing_swapped_has_no_kl(make_teacher, tokens):
    teacher = make_teacher()
    step = StageStep(limbeck.convert(teacher, keep_attention=(0, 1, 2)), LogitsObjective(temperature=2.0), teacher)
    assert step(batch_of(tokens))["loss"].item() == 0.0


# --- values by hand -------------------------------------------------------------------------------------------------


def test_matrix_by_hand(make_teacher, make_student, family, tokens):
    teacher = make_teacher(family)
    student = make_student(teacher, keep_attention=(1,))
    losses = StageStep(student, MatrixObjective(), teacher)(batch_of(tokens))
    with torch.no_grad():
        attentions = teacher(tokens, output_attentions=True).attentions
        hidden_states = teacher(tokens, output_hidden_states=True).hidden_states
    expected = 0.0
    for index in (0, 2):
        matrix = run_layer(student, index, hidden_states[index]).mixing_matrix
        expected += (matrix - attentions[index]).square().sum(dim=(-1, -2)).sqrt().mean()
    assert_close(losses["loss"], expected, rtol=1e-5, atol=1e-5)
    assert_close(losses["matrix_per_layer"], expected.detach() / 2, rtol=1e-5, atol=1e-5)
    assert not losses["matrix_per_layer"].requires_grad


def test_matrices_that_are_made_again_give_the_same_gradients(make_teacher, make_student, tokens, monkeypatch):
    teacher = make_teacher()
    step = StageStep(make_student(teacher), MatrixObjective(), teacher)
    found = []
    for stored in (12, 11):  # the samples have 12 tokens
        monkeypatch.setattr(matrix, "STORED_LENGTH", stored)
        step.zero_grad()
        loss = step(batch_of(tokens))["loss"]
        loss.backward()
        found.append([loss, *(p.grad for p in step.parameters() if p.requires_grad)])
    assert all(torch.equal(kept, again) for kept, again in zip(*found, strict=True))
    with torch.no_grad():
        assert torch.equal(step(batch_of(tokens))["loss"], found[0][0])


class Opaque(DiscreteMamba2):
    """Tells its matrix, but not what it is made of."""

    def matrix_factors(self, *args, **options):
        return None

    def mixing_matrix(self, *args, **options):
        log_decay, B, C, D = super().matrix_factors(*args, **options)
        return ssd_matrix(log_decay, B, C) + torch.diag_embed(D.expand_as(log_decay).mT)


@pytest.mark.parametrize("teachers", ["gpt_neox", "mistral", "gemma2"])
@pytest.mark.parametrize("name", ["discrete-mamba2", "mamba2"])
def test_the_distance_by_its_factors_is_that_by_matrices(make_teacher, tokens, left_padding, teachers, name):
    teacher = make_teacher(teachers)
    student = limbeck.convert(teacher, mixer=name, init="random")
    for mask in (None, left_padding):
        seen = observe(teacher, tokens, mask)
        for index, mixer in mixers(student).items():
            assert matrix._is_plain(seen[index])
            learned = [p for p in mixer.parameters() if p.requires_grad]
            found = matrix.layer_distance(mixer, seen[index])
            expected = matrix._from_matrices(mixer, seen[index])
            assert_close(found, expected)
            gradients = [torch.autograd.grad(x, learned, materialize_grads=True) for x in (found, expected)]
            assert_close(*gradients, rtol=1e-4, atol=1e-6)


def test_a_mixer_that_tells_its_matrix_alone(make_teacher, make_student, tokens, monkeypatch):
    teacher = make_teacher()
    student = make_student(teacher)
    expected = StageStep(student, MatrixObjective(), teacher)(batch_of(tokens))["loss"]
    for mixer in mixers(student).values():
        mixer.__class__ = Opaque
    assert_close(StageStep(student, MatrixObjective(), teacher)(batch_of(tokens))["loss"], expected)


def test_a_mask_that_is_more_than_causal_is_heeded(make_teacher, make_student, tokens):
    teacher = make_teacher()
    mixer, seen = mixers(make_student(teacher))[0], observe(teacher, tokens)[0]
    seen.mask = (torch.rand(1, 1, 12, 12) < 0.5) | torch.eye(12, dtype=torch.bool)
    expected = torch.linalg.matrix_norm(mixer.mixing_matrix(seen.mixer_input) - seen.attention_matrix()).mean()
    assert_close(matrix.layer_distance(mixer, seen), expected)
    seen.mask = None
    assert not torch.allclose(matrix.layer_distance(mixer, seen), expected)


@every
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_half_precision_teacher_computes_in_its_own_format(make_teacher, make_student, make, dtype, tokens):
    transformer = make_teacher("gpt_neox")
    student = make_student(transformer)
    step = StageStep(student, make(), transformer.to(dtype))
    seen = {}
    for name, module in (("teacher", blocks(transformer)[0].mlp), ("student", mixers(student)[0].in_proj)):
        module.register_forward_hook(lambda *_, name=name: seen.update({name: torch.is_autocast_enabled("cpu")}))
    with torch.autocast("cpu", torch.bfloat16):
        loss = step(batch_of(tokens))["loss"]
    loss.backward()
    assert seen == {"teacher": dtype == torch.float32, "student": True}


@pytest.mark.gpu
def test_on_a_gpu_stage_1_stores_no_matrix(make_teacher, make_student):
    """The loss is that of float64 on a CPU; at 2048 tokens not one l × l matrix of float32 is there."""
    teacher = make_teacher(attn_implementation="sdpa", max_position_embeddings=2048)
    step = StageStep(make_student(teacher), MatrixObjective(), teacher)
    batch = batch_of(torch.randint(3, 60, (1, 2048)))
    step.double(), teacher.double()  # over 4 million squares float32 is off by 1e-4 on a CPU
    expected = step(batch)["loss"].float()
    step.float().cuda(), teacher.float().cuda()
    batch = {name: tensor.cuda() for name, tensor in batch.items()}
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    loss = step(batch)["loss"]
    loss.backward()
    assert torch.cuda.max_memory_allocated() - before < 4 * 2048 * 2048 * 4
    assert_close(loss.cpu(), expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("target", ["block", "mixer"])
def test_hidden_by_hand(make_teacher, make_student, family, target, tokens):
    teacher = make_teacher(family)
    student = make_student(teacher, keep_attention=(1,))
    losses = StageStep(student, HiddenObjective(target), teacher)(batch_of(tokens))
    seen, expected = observe(teacher, tokens), 0.0
    for index in (0, 2):
        output = run_layer(student, index, seen[index].block_input)
        difference = getattr(output, f"{target}_output") - getattr(seen[index], f"{target}_output")
        expected += difference.square().sum(-1).sqrt().mean()
    assert_close(losses["loss"], expected, rtol=1e-5, atol=1e-5)
    assert_close(losses["hidden_per_layer"], expected.detach() / 2, rtol=1e-5, atol=1e-5)


def test_logits_by_hand(make_teacher, make_student, tokens):
    teacher = make_teacher()
    student = make_student(teacher)
    objective = LogitsObjective(temperature=3.0, kl_weight=0.7, ce_weight=0.2)
    losses = StageStep(student, objective, teacher)(batch_of(tokens))
    ours, theirs = student(tokens).logits, teacher(tokens).logits
    kl = reference_kl(Categorical(logits=theirs / 3), Categorical(logits=ours / 3)).mean()
    ce = F.cross_entropy(ours.flatten(0, 1), tokens.roll(-1, dims=1).flatten())
    assert_close(losses["kl"], kl.detach())
    assert_close(losses["ce"], ce.detach())
    assert_close(losses["loss"], 0.7 * kl + 0.2 * ce)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_kl_divergence_is_torchs(temperature):
    student, teacher = torch.randn(2, 5, 9) * 4, torch.randn(2, 5, 9) * 4
    expected = reference_kl(Categorical(logits=teacher / temperature), Categorical(logits=student / temperature))
    found = kl_divergence(student, teacher, temperature)
    assert found.shape == (2, 5)
    assert_close(found, expected)
    assert (kl_divergence(student.bfloat16(), teacher.bfloat16(), temperature).dtype) == torch.float32


def test_kl_divergence_has_the_gradient_of_the_soft_cross_entropy():
    student, teacher = torch.randn(2, 5, 9, requires_grad=True), torch.randn(2, 5, 9)
    (found,) = torch.autograd.grad(kl_divergence(student, teacher).mean(), student)
    soft = F.cross_entropy(student.flatten(0, 1), teacher.softmax(-1).flatten(0, 1))
    (expected,) = torch.autograd.grad(soft, student)
    assert_close(found, expected)


def test_every_token_weighs_the_same_whatever_the_length(make_teacher):
    """Models that see the same token everywhere put out the same everywhere: length must not show in the loss."""
    teacher = make_teacher()
    student = limbeck.convert(make_teacher(), keep_attention=(0, 1, 2))
    step = StageStep(student, LogitsObjective(ce_weight=0.5), teacher)
    short, long = (step(batch_of(torch.full((b, l), 7))) for b, l in ((1, 3), (2, 40)))
    assert short["loss"] > 0.1
    for name in ("loss", "kl", "ce"):
        assert_close(short[name], long[name])


# --- padding --------------------------------------------------------------------------------------------------------


@every
def test_padding_counts_nothing(make_teacher, make_student, family, make, tokens):
    teacher = make_teacher(family)
    step = StageStep(make_student(teacher), make(), teacher)
    alone = step(batch_of(tokens[:1, 4:]))["loss"]
    mask = torch.ones(1, 12, dtype=torch.long)
    mask[:, :4] = 0
    padded, again = tokens[:1].clone(), tokens[:1].clone()
    padded[:, :4], again[:, :4] = 2, 33
    assert_close(step(batch_of(padded, mask))["loss"], alone, rtol=1e-5, atol=1e-5)
    assert torch.equal(step(batch_of(padded, mask))["loss"], step(batch_of(again, mask))["loss"])


def test_tokens_of_a_padded_batch_weigh_the_same(make_teacher, make_student, tokens, left_padding):
    teacher = make_teacher()
    step = StageStep(make_student(teacher), LogitsObjective(ce_weight=1.0), teacher)
    both = step(batch_of(tokens, left_padding))
    short, long = (step(batch_of(rows)) for rows in (tokens[:1, 4:], tokens[1:]))
    for name in ("kl", "ce"):
        if name == "ce":  # the labels of the short row as they are in the batch
            batch = {"input_ids": tokens[:1, 4:], "labels": tokens.roll(-1, dims=1)[:1, 4:]}
            short = step(batch)
        assert_close(both[name], (8 * short[name] + 12 * long[name]) / 20, rtol=1e-5, atol=1e-5)


def test_token_mean_ignores_even_nan_at_padding():
    values = torch.tensor([[float("nan"), 1.0, 3.0]])
    assert token_mean(values, torch.tensor([[0, 1, 1]])) == 2.0
    assert token_mean(values[:, 1:], None) == 2.0


# --- what learns ----------------------------------------------------------------------------------------------------


def mixer_part(name):
    return name.split(".mixer.")[1] if ".mixer." in name else None


@every
def test_exactly_what_is_reached_learns(make_teacher, make_student, family, make, tokens):
    teacher = make_teacher(family)
    student = make_student(teacher, keep_attention=(1,))
    step = StageStep(student, make(), teacher)
    step(batch_of(tokens))["loss"].backward()
    for name, parameter in student.named_parameters():
        assert parameter.requires_grad == (parameter.grad is not None), name
    assert not any(parameter.requires_grad or parameter.grad is not None for parameter in teacher.parameters())
    assert not any(name.startswith("teacher") for name, _ in step.named_parameters())
    assert all(name.startswith("student.") for name in step.state_dict())


def test_matrix_trains_what_the_matrix_depends_on(make_teacher, make_student):
    student = make_student(make_teacher(), keep_attention=(1,))
    learns = MatrixObjective().trainable(student)
    assert {mixer_part(name) for name in learns} == {"in_proj.weight", "conv1d.weight", "conv1d.bias", "D"}
    assert len(learns) == 2 * 4
    assert all(parameter.requires_grad for parameter in student.parameters())  # asking changed nothing


def test_hidden_trains_blocks_or_mixers(make_teacher, make_student):
    student = make_student(make_teacher(), keep_attention=(1,))
    inside = {n for i in (0, 2) for n in (f"gpt_neox.layers.{i}.{p}" for p, _ in blocks(student)[i].named_parameters())}
    assert HiddenObjective("block").trainable(student) == inside
    assert HiddenObjective("mixer").trainable(student) == {name for name in inside if ".mixer." in name}


def test_trainable_narrows(make_teacher, make_student):
    teacher = make_teacher()
    student = make_student(teacher, keep_attention=(1,))

    def learning(trainable):
        StageStep(student, LogitsObjective(), teacher, trainable)
        return {name for name, parameter in student.named_parameters() if parameter.requires_grad}

    everything = {name for name, _ in student.named_parameters()}
    assert learning(None) == learning("all") == everything
    assert learning("mixers") == {name for name in everything if ".mixer." in name}
    assert learning("blocks") == {name for name in everything if "layers.0." in name or "layers.2." in name}


def test_the_teacher_is_frozen_and_in_eval_mode(make_teacher, make_student, tokens):
    teacher = make_teacher(attention_dropout=0.5).train()
    StageStep(make_student(teacher).train(), LogitsObjective(), teacher)
    assert not teacher.training
    assert not any(parameter.requires_grad for parameter in teacher.parameters())


def test_text_alone_needs_no_teacher(make_teacher, make_student, tokens):
    student = make_student(make_teacher())
    losses = StageStep(student, LogitsObjective(kl_weight=0.0, ce_weight=1.0))(batch_of(tokens))
    assert set(losses) == {"loss", "ce"}
    assert_close(losses["loss"].detach(), losses["ce"])


# --- refusals -------------------------------------------------------------------------------------------------------


@every
def test_no_teacher(make_teacher, make_student, make):
    with pytest.raises(LimbeckError, match="without a teacher"):
        StageStep(make_student(make_teacher()), make())


def test_other_vocabulary(make_teacher, make_student):
    student, teacher = make_student(make_teacher()), make_teacher(vocab_size=62)
    with pytest.raises(LimbeckError, match=r"the student's vocabulary has 61 tokens\nexpected: the teacher's 62"):
        StageStep(student, LogitsObjective(), teacher)
    check_vocabularies(student.config, make_teacher().config)


@pytest.mark.parametrize("make", EVERY[:3], ids=NAMES[:3])
def test_a_model_without_a_mixer(make_teacher, make):
    teacher = make_teacher()
    with pytest.raises(LimbeckError, match="without a mixer"):
        StageStep(limbeck.convert(teacher, keep_attention=(0, 1, 2)), make(), teacher)


def test_other_number_of_heads(make_teacher, make_student, tokens):
    teacher = make_teacher()
    step = StageStep(make_student(teacher, n_v_heads=2, n_qk_heads=2), MatrixObjective(), teacher)
    with pytest.raises(LimbeckError, match="layer 0: the mixer has 2 value heads") as error:
        step(batch_of(tokens))
    assert "4 attention heads" in error.value.expected


class Blind(DiscreteMamba2):
    has_mixing_matrix = False


def test_a_mixer_without_a_matrix(make_teacher, monkeypatch, tokens):
    monkeypatch.setitem(mixer_registry._MIXERS, "blind", Blind)
    teacher = make_teacher()
    student = limbeck.convert(teacher, mixer="blind", init="random")
    with pytest.raises(LimbeckError, match="the Blind mixer of layer 0 has no mixing matrix"):
        StageStep(student, MatrixObjective(), teacher)
    assert StageStep(student, HiddenObjective(), teacher)(batch_of(tokens))["loss"].isfinite()


def test_a_probe_that_fails_leaves_the_student_as_it_was(make_teacher, make_student, monkeypatch):
    student = make_student(make_teacher())
    head = next(name for name, weight in student.named_parameters() if weight is student.get_output_embeddings().weight)
    freeze(student, {head})
    monkeypatch.setattr(DiscreteMamba2, "mixing_matrix", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        MatrixObjective().trainable(student)
    assert [name for name, parameter in student.named_parameters() if parameter.requires_grad] == [head]


def test_objectives_by_name():
    assert set(OBJECTIVES) >= {"matrix", "hidden", "logits"}
    assert [OBJECTIVES[name].scope for name in ("matrix", "hidden", "logits")] == [0, 1, 2]
    assert make_objective("hidden", target="mixer").target == "mixer"
    with pytest.raises(LimbeckError, match="did you mean 'matrix'"):
        make_objective("matrx")
    with pytest.raises(LimbeckError, match="temperature"):
        make_objective("matrix", temperature=2.0)
    with pytest.raises(LimbeckError, match="hidden target 'mlp'"):
        make_objective("hidden", target="mlp")
