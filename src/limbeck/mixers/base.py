"""What every sequence mixer promises: the class to derive from, its state, and what an attention layer hands over.

Anyone can add a mixer: derive from `Mixer`, call `limbeck.mixers.register_mixer`, and let
`limbeck.testing.check_mixer` tell whether the promises hold.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple, Self

import torch
from torch import Tensor, nn

from limbeck.errors import LimbeckError
from limbeck.mixers.common import at_tokens
from limbeck.ops import ssd_matrix


class MixerState(NamedTuple):
    """What a mixer remembers of the tokens it has seen; its size does not depend on how many they were.

    Attributes:
        conv: The last k−1 inputs of the causal convolution, (b, c, k-1), in the mixer's dtype.
        recurrent: The recurrent state, (b, h, p, n), or (b, c, n) where every channel has its own; at least float32.
    """

    conv: Tensor
    recurrent: Tensor


class MatrixFactors(NamedTuple):
    """What a mixing matrix is made of: ``ssd_matrix(log_decay, B, C)`` with D on the diagonal, undecayed.

    Attributes:
        log_decay: (b, l, h), a ≤ 0, at least float32.
        B: (b, l, g, n), zero at padding.
        C: (b, l, g, n), zero at padding.
        D: (h,), or None for nothing.
    """

    log_decay: Tensor
    B: Tensor
    C: Tensor
    D: Tensor | None = None


@dataclass(frozen=True)
class AttentionWeights:
    """The projections of one attention layer, in one layout whatever the family.

    Rows are grouped by head: head j of `query` is rows j·p to (j+1)·p. The g key and value heads serve the h query
    heads in order, h/g consecutive query heads each.

    Attributes:
        query: (h·p, d).
        key: (g·p, d).
        value: (g·p, d).
        output: (d, h·p).
        num_heads: h, the number of query heads.
        num_kv_heads: g, the number of key and value heads.
        head_dim: p, the width of a head.
        scale: What the scores are multiplied with before the softmax, mostly 1/√p.
        query_bias: (h·p,) or None.
        key_bias: (g·p,) or None.
        value_bias: (g·p,) or None.
        output_bias: (d,) or None.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    output: Tensor
    num_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float
    query_bias: Tensor | None = None
    key_bias: Tensor | None = None
    value_bias: Tensor | None = None
    output_bias: Tensor | None = None

    def __post_init__(self):
        heads, kv_heads, width = self.num_heads, self.num_kv_heads, self.head_dim
        if heads % kv_heads:
            raise LimbeckError(f"{heads} query heads over {kv_heads} key heads", expected="a multiple")
        d_model = self.query.shape[-1]
        expected = {
            "query": (heads * width, d_model),
            "key": (kv_heads * width, d_model),
            "value": (kv_heads * width, d_model),
            "output": (d_model, heads * width),
            "query_bias": (heads * width,),
            "key_bias": (kv_heads * width,),
            "value_bias": (kv_heads * width,),
            "output_bias": (d_model,),
        }
        for name, shape in expected.items():
            tensor = getattr(self, name)
            if tensor is not None and tuple(tensor.shape) != shape:
                raise LimbeckError(
                    f"attention weight {name!r} has shape {tuple(tensor.shape)}",
                    expected=f"{shape} for {heads} heads, {kv_heads} key heads, head width {width}",
                )

    def per_head(self, name: Literal["key", "value"]) -> tuple[Tensor, Tensor | None]:
        """Repeat a key or value projection so that every query head has its own copy.

        Args:
            name: ``"key"`` or ``"value"``.

        Returns:
            The weight, (h·p, d), and the bias, (h·p,) or None.
        """
        repeats = self.num_heads // self.num_kv_heads

        def repeat(tensor: Tensor) -> Tensor:
            heads = tensor.unflatten(0, (self.num_kv_heads, self.head_dim))  # (g, p, …)
            return heads.repeat_interleave(repeats, dim=0).flatten(0, 1)  # (h·p, …)

        weight, bias = getattr(self, name), getattr(self, f"{name}_bias")
        return repeat(weight), None if bias is None else repeat(bias)


class Mixer(nn.Module, ABC):
    """A causal sequence mixer with a state of constant size: what stands where attention stood.

    A subclass takes `d_model` and keyword options, and implements the abstract methods below. Conventions:

    - `attention_mask` is 2-D (b, l), 1 or True at a token, 0 at padding. Padding leaves no trace: a left-padded
      sequence gives at its tokens the outputs, and at its end the state, of the sequence without padding.
    - `seq_idx` (b, l) holds non-decreasing document ids. Nothing crosses a change of id; a given state belongs to
      the first document, a returned one to the last.
    - parameters named in `float32_parameters` never become narrower than float32, whatever `.to()` asks for.

    Attributes:
        d_model: d, the width of the inputs and outputs.
        has_mixing_matrix: Whether `mixing_matrix`, `values` and `readout` exist.
        float32_parameters: Parameters, by name inside the mixer, that stay in float32 or wider.
        no_weight_decay: Parameters, by name inside the mixer, that weight decay leaves alone by default.
    """

    has_mixing_matrix: ClassVar[bool] = False
    float32_parameters: ClassVar[tuple[str, ...]] = ()
    no_weight_decay: ClassVar[tuple[str, ...]] = ()

    d_model: int

    def __init__(self, d_model: int):
        super().__init__()
        self.d_model = d_model

    @classmethod
    @abstractmethod
    def defaults_for(cls, d_model: int, num_heads: int, num_kv_heads: int, head_dim: int) -> dict[str, Any]:
        """Options under which this mixer suits the attention layer it replaces.

        Args:
            d_model: d, the width of the model.
            num_heads: The attention's query heads.
            num_kv_heads: The attention's key and value heads.
            head_dim: The width of an attention head.

        Returns:
            Keyword options for the constructor, beside `d_model`.
        """

    @abstractmethod
    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        *,
        seq_idx: Tensor | None = None,
        state: MixerState | None = None,
        return_state: bool = False,
    ) -> Tensor | tuple[Tensor, MixerState]:
        """Mix a sequence. With one token and a state, this is `step`.

        Args:
            hidden_states: (b, l, d).
            attention_mask: (b, l), 1 at a token, or None when all are.
            seq_idx: (b, l) integer, document ids, or None for one document.
            state: The state after the tokens that came before, or None at the start.
            return_state: Whether to return the state after the last token as well.

        Returns:
            The outputs, (b, l, d), alone or with the state.

        Raises:
            LimbeckError: When the shapes do not fit.
        """

    @abstractmethod
    def step(
        self, hidden_states: Tensor, state: MixerState, attention_mask: Tensor | None = None
    ) -> tuple[Tensor, MixerState]:
        """Mix one more token.

        Args:
            hidden_states: (b, d).
            state: The state after the tokens that came before; left as it is.
            attention_mask: (b,), 1 at a token, or None when all are.

        Returns:
            The output, (b, d), and the state after the token.
        """

    def step_in_place(self, hidden_states: Tensor, state: MixerState) -> Tensor:
        """Mix one more token, and write the state after it over the state before it, as a CUDA graph needs it.

        Args:
            hidden_states: (b, d); every row is a token.
            state: The state after the tokens that came before; overwritten.

        Returns:
            The output, (b, d).
        """
        output, after = self.step(hidden_states, state)
        for kept, new in zip(state, after, strict=True):
            kept.copy_(new)
        return output

    @abstractmethod
    def init_state(
        self, batch_size: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> MixerState:
        """Build the state before the first token, all zero.

        Args:
            batch_size: b.
            device: Where to put it; by default where the mixer is.
            dtype: Of the convolution state; by default the mixer's.
        """

    @abstractmethod
    def reset_parameters(self, init: Literal["identity", "random"] = "identity") -> None:
        """Initialise every parameter, in place, with the current random state.

        Args:
            init: ``"identity"`` starts as close to passing the input on as the mixer can (open gate, identity
                convolution); ``"random"`` is the mixer's usual random start.
        """

    def load_attention(self, weights: AttentionWeights) -> list[str]:
        """Start from an attention layer's projections, in place.

        Args:
            weights: The attention layer's projections.

        Returns:
            One note for each thing that could not be carried over.

        Raises:
            LimbeckError: When this mixer cannot start from these weights.
        """
        raise LimbeckError(
            f"{type(self).__name__} cannot start from attention weights",
            expected="a mixer with query-, key- and value-like projections",
            hint='init="identity" or init="random"',
        )

    def matrix_factors(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, *, seq_idx: Tensor | None = None
    ) -> MatrixFactors | None:
        """What the mixing matrix is made of, where it is an SSD matrix: stage 1 then stores no matrix on a GPU.

        Args:
            hidden_states: (b, l, d).
            attention_mask: (b, l), 1 at a token.
            seq_idx: (b, l), document ids.

        Returns:
            The factors, or None, the default, when the matrix is of another kind.
        """
        return None

    def mixing_matrix(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, *, seq_idx: Tensor | None = None
    ) -> Tensor:
        """Materialise the matrix that this mixer applies along the sequence, for every head.

        It comes from `matrix_factors`; a mixer whose matrix is of another kind makes it here.

        Args:
            hidden_states: (b, l, d).
            attention_mask: (b, l), 1 at a token; rows and columns of padding are zero.
            seq_idx: (b, l), document ids; entries between documents are zero.

        Returns:
            (b, h, l, l), at least float32, lower triangular.
        """
        factors = self.matrix_factors(hidden_states, attention_mask, seq_idx=seq_idx)
        if factors is None:
            raise self._no_matrix()
        matrix = ssd_matrix(factors.log_decay, factors.B, factors.C, seq_idx=seq_idx)
        if factors.D is None:
            return matrix
        diagonal = factors.D.expand_as(factors.log_decay)  # (b, l, h)
        diagonal = at_tokens(diagonal, attention_mask).transpose(1, 2)  # (b, h, l)
        return matrix + torch.diag_embed(diagonal.to(matrix.dtype))

    def values(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, *, seq_idx: Tensor | None = None
    ) -> Tensor:
        """What the mixing matrix is applied to.

        Args:
            hidden_states: (b, l, d).
            attention_mask: (b, l), 1 at a token.
            seq_idx: (b, l), document ids.

        Returns:
            (b, l, h, p), zero at padding.
        """
        raise self._no_matrix()

    def readout(self, mixed: Tensor, hidden_states: Tensor) -> Tensor:
        """What follows the mixing: ``readout(mixing_matrix @ values, hidden_states)`` is `forward`.

        Args:
            mixed: (b, l, h, p), the mixing matrix applied to the values.
            hidden_states: (b, l, d), the mixer's input.

        Returns:
            (b, l, d).
        """
        raise self._no_matrix()

    def _no_matrix(self) -> LimbeckError:
        return LimbeckError(
            f"{type(self).__name__} has no mixing matrix per head",
            expected="a mixer whose has_mixing_matrix is True",
            hint='the mixer "discrete-mamba2", or stages that need no matrix (hidden, logits)',
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move or cast as torch does, then undo casts that would make a `float32_parameters` entry narrower."""
        before = {name: self.get_parameter(name).data for name in self.float32_parameters}
        super()._apply(fn, recurse)
        for name, wide in before.items():
            parameter = self.get_parameter(name)
            if torch.finfo(parameter.dtype).bits < 32:
                parameter.data = wide.to(parameter.device, torch.float32)
        return self


def check_mixer_inputs(
    mixer: Mixer, hidden_states: Tensor, attention_mask: Tensor | None, seq_idx: Tensor | None
) -> None:
    """Check the shapes that every mixer's forward takes.

    Args:
        mixer: The mixer that was called.
        hidden_states: Should be (b, l, d).
        attention_mask: Should be (b, l) or None.
        seq_idx: Should be (b, l) or None.

    Raises:
        LimbeckError: When one of them is not.
    """
    name = type(mixer).__name__
    if hidden_states.ndim != 3 or hidden_states.shape[-1] != mixer.d_model:
        raise LimbeckError(
            f"{name} was given hidden_states of shape {tuple(hidden_states.shape)}",
            expected=f"(batch, length, {mixer.d_model})",
        )
    for label, tensor in (("attention_mask", attention_mask), ("seq_idx", seq_idx)):
        if tensor is not None and tensor.shape != hidden_states.shape[:2]:
            raise LimbeckError(
                f"{name} was given {label} of shape {tuple(tensor.shape)}",
                expected=f"(batch, length) = {tuple(hidden_states.shape[:2])}",
                hint="a 2-D mask of the tokens given in this call" if label == "attention_mask" else "",
            )
