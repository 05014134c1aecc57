"""For authors of mixers: `check_mixer` tries every promise of `limbeck.mixers.Mixer`, on tiny inputs, in seconds."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from limbeck.mixers import Mixer, MixerState

_LENGTH = 11


def check_mixer(cls: type[Mixer], *, d_model: int = 16, **options: Any) -> None:
    """Try every promise that a mixer makes.

    The weights are drawn at random, so that no gentle initialisation hides a fault; the laws are tried in float64.

    Args:
        cls: The mixer class.
        d_model: d of the instance to try.
        **options: Options of the instance, on top of ``cls.defaults_for`` an attention of two heads.

    Raises:
        AssertionError: When a promise is broken; the message starts with the class and the law's name.
    """
    defaults = cls.defaults_for(d_model, 2, 2, d_model // 2)
    case = _Case(cls, d_model, defaults | options)
    for law in _LAWS:
        try:
            law(case)
        except Exception as error:
            name = law.__name__.removeprefix("_").replace("_", " ")
            raise AssertionError(f"{cls.__name__} breaks the law {name!r}: {law.__doc__}\n{error}") from error


@dataclass(frozen=True)
class _Case:
    cls: type[Mixer]
    d_model: int
    options: dict[str, Any]

    def mixer(self, seed: int = 0) -> Mixer:
        """An instance in float64 with every parameter shaken."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            mixer = self.cls(self.d_model, **self.options).double()
            for parameter in mixer.parameters():
                parameter.data += 0.3 * torch.randn_like(parameter)
        return mixer

    def inputs(self, length: int = _LENGTH, batch: int = 2) -> Tensor:
        generator = torch.Generator().manual_seed(length)
        return torch.randn(batch, length, self.d_model, generator=generator, dtype=torch.float64)


def _run(mixer: Mixer, inputs: Tensor, mask: Tensor | None = None, **options: Any) -> tuple[Tensor, MixerState]:
    out = mixer(inputs, mask, return_state=True, **options)
    assert isinstance(out, tuple), "forward(return_state=True) returned no state"
    return out


def _gradient(out: Tensor, learned: Sequence[Tensor]) -> tuple[Tensor, ...]:
    return torch.autograd.grad(out.square().sum(), learned, retain_graph=True, materialize_grads=True)


def _close(got: Any, expected: Any, what: str, tolerance: float = 1e-9) -> None:
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance, msg=lambda text: f"{what}: {text}")


def _shapes_and_types(case: _Case) -> None:
    """(b, l, d) in, (b, l, d) out, in the same type; the state has the sizes and types of init_state."""
    mixer, inputs = case.mixer(), case.inputs()
    out = mixer(inputs)
    assert isinstance(out, Tensor), "forward returned a pair without being asked for the state"
    assert (out.shape, out.dtype) == (inputs.shape, inputs.dtype), f"got {tuple(out.shape)} in {out.dtype}"
    again, state = _run(mixer, inputs)
    _close(again, out, "with return_state")
    for got, expected in zip(state, mixer.init_state(2), strict=True):
        assert (got.shape, got.dtype) == (expected.shape, expected.dtype), "the returned state is not as init_state's"
    _close(_run(mixer, inputs, state=mixer.init_state(2)), (out, state), "starting from init_state")
    recurrent = mixer.init_state(2, dtype=torch.bfloat16).recurrent
    assert recurrent.dtype == torch.float32, "the recurrent state must stay float32 beside narrow activations"


def _causality(case: _Case) -> None:
    """A token changes nothing before it, and something at its place."""
    mixer, inputs = case.mixer(), case.inputs()
    out = mixer(inputs)
    for t in range(1, _LENGTH):
        changed = inputs.clone()
        changed[:, t:] += 1
        after = mixer(changed)
        _close(after[:, :t], out[:, :t], f"the outputs before token {t}")
        assert not torch.allclose(after[:, t], out[:, t]), f"token {t} does not see itself"


def _memory(case: _Case) -> None:
    """The first token still changes the last output."""
    mixer, inputs = case.mixer(), case.inputs()
    changed = inputs.clone()
    changed[:, 0] += 1
    assert (mixer(changed)[:, -1] != mixer(inputs)[:, -1]).any(), "the last output does not depend on the first token"


def _carried_state(case: _Case) -> None:
    """Splitting anywhere and carrying the state gives the whole, outputs and state."""
    mixer, inputs = case.mixer(), case.inputs()
    whole = _run(mixer, inputs)
    for cut in range(1, _LENGTH):
        first, state = _run(mixer, inputs[:, :cut])
        second, state = _run(mixer, inputs[:, cut:], state=state)
        _close((torch.cat([first, second], dim=1), state), whole, f"split at {cut}")


def _steps(case: _Case) -> None:
    """A prefill and single steps give the whole; a step leaves the state it was given alone and heeds the mask."""
    mixer, inputs = case.mixer(), case.inputs()
    whole, final = _run(mixer, inputs)
    _, state = _run(mixer, inputs[:, :4])
    for t in range(4, _LENGTH):
        before = MixerState(*(tensor.clone() for tensor in state))
        out, after = mixer.step(inputs[:, t], state)
        _close(out, whole[:, t], f"step {t}")
        _close(state, before, "the state that a step was given", 0)
        _close(_run(mixer, inputs[:, t : t + 1], state=state), (out[:, None], after), "forward of one token")
        state = after
    _close(state, final, "the state after the steps")
    mask = torch.tensor([0, 1])
    state = mixer.init_state(2)
    for t in range(3):  # the first row sees three tokens of padding
        out, state = mixer.step(inputs[:, t], state, mask)
    out, state = mixer.step(inputs[:, 3], state)
    _close(out[:1], mixer(inputs[:1, 3:4])[:, 0], "a first token after steps of padding")


def _left_padding(case: _Case) -> None:
    """Left padding leaves no trace, in the outputs, the state, or the gradients."""
    mixer, inputs = case.mixer(), case.inputs()
    whole, state = _run(mixer, inputs)
    for pad in (1, 5):
        garbage = 3 + case.inputs(pad)
        mask = torch.cat([torch.zeros(2, pad), torch.ones(2, _LENGTH)], dim=1).long()
        padded, padded_state = _run(mixer, torch.cat([garbage, inputs], dim=1), mask)
        _close(padded[:, pad:], whole, f"outputs after {pad} tokens of padding")
        _close(padded_state, state, f"the state after {pad} tokens of padding")
        learned = list(mixer.parameters())
        _close(_gradient(padded[:, pad:], learned), _gradient(whole, learned), "gradients beside padding")


def _padding_passes_the_state(case: _Case) -> None:
    """Padding after tokens leaves the recurrent state as it was, in a sequence and in a step."""
    mixer, inputs = case.mixer(), case.inputs()
    _, state = _run(mixer, inputs)
    mask = torch.cat([torch.ones(2, _LENGTH), torch.zeros(2, 3)], dim=1)
    _, padded = _run(mixer, torch.cat([inputs, case.inputs(3)], dim=1), mask)
    _close(padded.recurrent, state.recurrent, "the state after padding")
    _, stepped = mixer.step(case.inputs(1)[:, 0], state, torch.zeros(2))
    _close(stepped.recurrent, state.recurrent, "the state after a step of padding")


def _packed_documents(case: _Case) -> None:
    """Documents packed by seq_idx are documents apart, in the outputs, the state and the gradients."""
    mixer, inputs = case.mixer(), case.inputs().requires_grad_()
    lengths = (1, 4, _LENGTH - 5)
    seq_idx = torch.cat([torch.full((2, length), 2 * i) for i, length in enumerate(lengths)], dim=1)
    packed, packed_state = _run(mixer, inputs, seq_idx=seq_idx)
    parts = [_run(mixer, part) for part in inputs.split(lengths, dim=1)]
    apart, apart_state = torch.cat([out for out, _ in parts], dim=1), parts[-1][1]
    _close(packed, apart, "outputs")
    _close(packed_state, apart_state, "the state of the last document")
    learned = [inputs, *mixer.parameters()]
    _close(_gradient(packed, learned), _gradient(apart, learned), "gradients")
    _, state = _run(mixer, inputs)
    carried, _ = _run(mixer, inputs, seq_idx=seq_idx, state=state)
    expected, _ = _run(mixer, inputs[:, :1], state=state)
    _close(carried, torch.cat([expected, apart[:, 1:]], dim=1), "a given state belongs to the first document")


def _gradients(case: _Case) -> None:
    """Every parameter has a finite gradient that is not all zero."""
    mixer = case.mixer()
    mixer(case.inputs()).square().sum().backward()
    for name, parameter in mixer.named_parameters():
        assert parameter.grad is not None, f"no gradient reaches {name}"
        assert parameter.grad.isfinite().all(), f"the gradient of {name} is not finite"
        assert parameter.grad.any(), f"the gradient of {name} is zero"


def _narrow_types(case: _Case) -> None:
    """In bfloat16, as weights or by autocast, everything is finite and float32_parameters stay float32."""
    inputs = case.inputs()
    expected = case.mixer()(inputs)
    for weights in (torch.bfloat16, torch.float32):
        mixer = case.mixer().float()
        wide = {name: mixer.get_parameter(name).detach().clone() for name in mixer.float32_parameters}
        mixer = mixer.to(weights)
        with torch.autocast("cpu", torch.bfloat16, enabled=weights == torch.float32):
            out, state = _run(mixer, inputs.to(weights))
            step, _ = mixer.step(inputs[:, 0].to(weights), state)
        assert out.dtype == step.dtype == torch.bfloat16, f"outputs in {out.dtype}, of a step in {step.dtype}"
        assert state.recurrent.dtype == torch.float32, f"the recurrent state is in {state.recurrent.dtype}"
        assert (out - expected).norm() <= 0.1 * expected.norm(), "bfloat16 is far from float64"
        out.float().square().sum().backward()
        for name, parameter in mixer.named_parameters():
            assert parameter.grad is None or parameter.grad.isfinite().all(), f"the gradient of {name} is not finite"
        for name, value in wide.items():
            _close(mixer.get_parameter(name).data, value, f"{name} after .to({weights})", 0)


def _mixing_matrix(case: _Case) -> None:
    """The matrix applied to the values, then read out, is forward; padding and other documents are zero in it."""
    mixer, inputs = case.mixer(), case.inputs()
    if not mixer.has_mixing_matrix:
        return
    ids = torch.arange(_LENGTH).expand(2, -1) // 4
    mask = (torch.arange(_LENGTH) >= torch.tensor([[0], [3]])).long()
    for options in ({}, {"attention_mask": mask}, {"seq_idx": ids}):
        matrix = mixer.mixing_matrix(inputs, **options)  # (b, h, l, l)
        if mixer.matrix_factors(inputs, **options) is not None:
            _close(Mixer.mixing_matrix(mixer, inputs, **options), matrix, "the matrix that matrix_factors make")
        values = mixer.values(inputs, **options)  # (b, l, h, p)
        out = mixer.readout(torch.einsum("bhts,bshp->bthp", matrix, values), inputs)
        tokens = options.get("attention_mask", torch.ones_like(mask)).bool()
        _close(out[tokens], mixer(inputs, **options)[tokens], f"with {[*options]}")
        assert torch.equal(matrix, matrix.tril()), "the matrix looks ahead"
        assert not matrix.mT[~tokens[:, None].expand(-1, matrix.shape[1], -1)].any(), "columns of padding"
        assert not matrix[~tokens[:, None].expand(-1, matrix.shape[1], -1)].any(), "rows of padding"
        if "seq_idx" in options:
            assert not matrix[:, :, ids[0][:, None] != ids[0]].any(), "entries between documents"


def _saving(case: _Case) -> None:
    """The state_dict is all that a mixer is."""
    mixer, other = case.mixer(), case.mixer(seed=1)
    other.load_state_dict(mixer.state_dict())
    _close(other(case.inputs()), mixer(case.inputs()), "after load_state_dict", 0)


def _initialisation(case: _Case) -> None:
    """reset_parameters sets every parameter, from the current random state alone, for "identity" and "random"."""
    for init in ("identity", "random"):
        states = []
        for seed in (0, 1):
            mixer = case.mixer(seed)
            for parameter in mixer.parameters():
                torch.nn.init.constant_(parameter, torch.nan)
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(5)
                mixer.reset_parameters(init)
            states.append(mixer.state_dict())
        for name, value in states[0].items():
            assert value.isfinite().all(), f"{name} is left out by {init!r}"
            assert torch.equal(value, states[1][name]), f"{name} does not follow from the random state alone"


_LAWS: tuple[Callable[[_Case], None], ...] = (
    _shapes_and_types,
    _causality,
    _memory,
    _carried_state,
    _steps,
    _left_padding,
    _padding_passes_the_state,
    _packed_documents,
    _gradients,
    _narrow_types,
    _mixing_matrix,
    _saving,
    _initialisation,
)
