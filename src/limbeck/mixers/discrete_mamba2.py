"""Discrete Mamba-2, the mixer of MOHAWK's students (arXiv 2408.10189).

Linear attention with a scalar decay per head and step, a short causal convolution before it and a gate after it.
"""

from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from limbeck.errors import LimbeckError, unknown
from limbeck.mixers.base import AttentionWeights, MatrixFactors, Mixer, MixerState, check_mixer_inputs
from limbeck.mixers.common import CausalConv1d, at_tokens, wide, wide_default
from limbeck.mixers.discrete_mamba2_start import attention_start, identity_start, random_start
from limbeck.ops import gated_skip, mixer_step, ssd


class DiscreteMamba2(Mixer):
    """Discrete Mamba-2: y = out_proj((SSD(x, a, B, C) + D·x) · silu(z + z_bias)), with a = −softplus(A_log).

    `in_proj` makes, in this order, [x | B | C], z and A_log, of widths d_inner + 2·g·n, d_inner and h; [x | B | C]
    goes through a depthwise causal convolution. Each of the g heads of B and C serves h/g consecutive heads of x.
    Parameter names and layouts are those of the published Phi-Mamba checkpoints.

    Args:
        d_model: d, the width of the model.
        d_inner: h·p, the width of x; by default ``expand * d_model``.
        d_state: n, the state size per head.
        n_qk_heads: g, the heads of B and C.
        n_v_heads: h, the heads of x; a multiple of g.
        d_conv: k, the width of the convolution.
        expand: d_inner over d_model, when `d_inner` is not given.
        activation: After the convolution, ``"identity"`` or ``"silu"``.
        bias: Whether the linear projections have biases; `z_bias` exists when they have not.
        conv_bias: Whether the convolution has a bias.

    Raises:
        LimbeckError: When the sizes do not divide, or the activation is unknown.
    """

    has_mixing_matrix: ClassVar[bool] = True
    float32_parameters: ClassVar[tuple[str, ...]] = ("D",)
    no_weight_decay: ClassVar[tuple[str, ...]] = (
        "D",
        "z_bias",
        "conv1d.weight",
        "conv1d.bias",
        "in_proj.bias",
        "out_proj.bias",
    )

    def __init__(
        self,
        d_model: int,
        d_inner: int | None = None,
        d_state: int = 64,
        n_qk_heads: int = 32,
        n_v_heads: int = 32,
        d_conv: int = 4,
        expand: int = 1,
        activation: Literal["identity", "silu"] = "identity",
        bias: bool = False,
        conv_bias: bool = True,
    ):
        super().__init__(d_model)
        self.d_inner = expand * d_model if d_inner is None else d_inner
        self.d_state = d_state
        self.n_qk_heads = n_qk_heads
        self.n_v_heads = n_v_heads
        self.d_conv = d_conv
        self.activation: Literal["identity", "silu"] = activation
        self._check_options()
        self.head_dim = self.d_inner // n_v_heads

        conv_channels = self.d_inner + 2 * n_qk_heads * d_state
        # The rows of in_proj, in order: [x | B | C] through the convolution, z to the gate, A_log to the decay.
        self.in_proj_widths = (conv_channels, self.d_inner, n_v_heads)
        self.conv_widths = (self.d_inner, n_qk_heads * d_state, n_qk_heads * d_state)
        self.in_proj = nn.Linear(d_model, sum(self.in_proj_widths), bias=bias)
        self.conv1d = CausalConv1d(conv_channels, d_conv, bias=conv_bias, activation=activation)
        self.D = nn.Parameter(torch.empty(n_v_heads, dtype=wide_default()))
        self.z_bias = None if bias else nn.Parameter(torch.empty(self.d_inner))
        self.out_proj = nn.Linear(self.d_inner, d_model, bias=bias)
        self.reset_parameters()

    def _check_options(self) -> None:
        if self.d_inner % self.n_v_heads:
            raise LimbeckError(
                f"d_inner {self.d_inner} over n_v_heads {self.n_v_heads}",
                expected="d_inner to be a multiple of n_v_heads",
                hint="set d_inner or n_v_heads",
            )
        if self.n_v_heads % self.n_qk_heads:
            raise LimbeckError(
                f"n_v_heads {self.n_v_heads} over n_qk_heads {self.n_qk_heads}",
                expected="n_v_heads to be a multiple of n_qk_heads",
                hint="set n_qk_heads to n_v_heads",
            )
        if self.activation not in ("identity", "silu"):
            raise LimbeckError(f"activation {self.activation!r}", expected='"identity" or "silu"')
        for name in ("d_state", "d_conv"):
            if getattr(self, name) < 1:
                raise LimbeckError(f"{name} {getattr(self, name)}", expected="1 or more")

    @classmethod
    def defaults_for(cls, d_model: int, num_heads: int, num_kv_heads: int, head_dim: int) -> dict[str, Any]:
        """One head of B, C and x for every query head, all as wide as the attention's heads."""
        return {
            "d_inner": num_heads * head_dim,
            "d_state": head_dim,
            "n_qk_heads": num_heads,
            "n_v_heads": num_heads,
        }

    # --- the sequence ---------------------------------------------------------------------------------------------

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        *,
        seq_idx: Tensor | None = None,
        state: MixerState | None = None,
        return_state: bool = False,
    ) -> Tensor | tuple[Tensor, MixerState]:
        """Mix a sequence: see `Mixer.forward`."""
        check_mixer_inputs(self, hidden_states, attention_mask, seq_idx)
        if state is not None and hidden_states.shape[1] == 1:
            token_mask = None if attention_mask is None else attention_mask[:, 0]
            out, state = self.step(hidden_states[:, 0], state, token_mask)
            return (out[:, None], state) if return_state else out[:, None]

        x, log_decay, B, C, z, conv = self._project(hidden_states, attention_mask, seq_idx, state, return_state)
        recurrent = None if state is None else state.recurrent
        y, recurrent = ssd(x, log_decay, B, C, initial_state=recurrent, return_state=True, seq_idx=seq_idx)
        out = self._gate_and_project(y, z, x)  # (b, l, d)
        return (out, MixerState(conv, recurrent)) if return_state else out

    def step(
        self, hidden_states: Tensor, state: MixerState, attention_mask: Tensor | None = None
    ) -> tuple[Tensor, MixerState]:
        """Mix one more token: see `Mixer.step`."""
        mask = None if attention_mask is None else attention_mask.to(torch.bool)
        return self._step(hidden_states, state, mask, in_place=False)

    def step_in_place(self, hidden_states: Tensor, state: MixerState) -> Tensor:
        """Mix one more token over its state: see `Mixer.step_in_place`."""
        return self._step(hidden_states, state, None, in_place=True)[0]

    def _step(
        self, hidden_states: Tensor, state: MixerState, mask: Tensor | None, in_place: bool
    ) -> tuple[Tensor, MixerState]:
        xBC, z, A_log = self.in_proj(hidden_states).split(self.in_proj_widths, dim=-1)  # (b, …)

        def advance(weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
            inputs = (xBC, A_log, z, state.conv, state.recurrent, weight, bias, self.D, self.z_bias)
            return mixer_step(*inputs, activation=self.activation, mask=mask, in_place=in_place)

        out, *states = self.conv1d(advance)
        return self.out_proj(out), MixerState(*states)

    def init_state(
        self, batch_size: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> MixerState:
        """Build the state before the first token: see `Mixer.init_state`."""
        weight = self.in_proj.weight
        device, dtype = device or weight.device, dtype or weight.dtype
        conv = torch.zeros(batch_size, self.in_proj_widths[0], self.d_conv - 1, device=device, dtype=dtype)
        shape = (batch_size, self.n_v_heads, self.head_dim, self.d_state)
        return MixerState(conv, wide(torch.zeros(shape, device=device, dtype=dtype)))

    # --- the same as a matrix -------------------------------------------------------------------------------------

    def matrix_factors(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, *, seq_idx: Tensor | None = None
    ) -> MatrixFactors:
        """The log decay, B, C and D: see `Mixer.matrix_factors`."""
        check_mixer_inputs(self, hidden_states, attention_mask, seq_idx)
        _, log_decay, B, C, _, _ = self._project(hidden_states, attention_mask, seq_idx, None)
        return MatrixFactors(log_decay, B, C, self.D)

    def values(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, *, seq_idx: Tensor | None = None
    ) -> Tensor:
        """The convolved x: see `Mixer.values`."""
        check_mixer_inputs(self, hidden_states, attention_mask, seq_idx)
        return self._project(hidden_states, attention_mask, seq_idx, None)[0]

    def readout(self, mixed: Tensor, hidden_states: Tensor) -> Tensor:
        """Gate and out_proj: see `Mixer.readout`."""
        _, z, _ = self.in_proj(hidden_states).split(self.in_proj_widths, dim=-1)
        return self._gate_and_project(mixed, z)

    # --- the pieces -----------------------------------------------------------------------------------------------

    def _project(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None,
        seq_idx: Tensor | None,
        state: MixerState | None,
        return_state: bool = False,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Any]:
        """From (b, l, d) to x (b,l,h,p), log_decay (b,l,h), B and C (b,l,g,n), z (b,l,h·p), conv state (b,c,k-1)."""
        xBC, z, A_log = self.in_proj(hidden_states).split(self.in_proj_widths, dim=-1)
        xBC, conv = self.conv1d(  # masks what enters, in_proj's bias, and what leaves, its own
            xBC,
            None if state is None else state.conv,
            widths=self.conv_widths,
            attention_mask=attention_mask,
            seq_idx=seq_idx,
            return_state=return_state,
        )
        return *self._heads(xBC, A_log, attention_mask), z, conv

    def _heads(
        self, xBC: tuple[Tensor, Tensor, Tensor], A_log: Tensor, attention_mask: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Cut the convolved channels into heads; at padding nothing decays."""
        x, B, C = xBC
        log_decay = at_tokens(-F.softplus(wide(A_log)), attention_mask)  # (…, h)
        return (
            x.unflatten(-1, (self.n_v_heads, self.head_dim)),
            log_decay,
            B.unflatten(-1, (self.n_qk_heads, self.d_state)),
            C.unflatten(-1, (self.n_qk_heads, self.d_state)),
        )

    def _gate_and_project(self, y: Tensor, z: Tensor, x: Tensor | None = None) -> Tensor:
        """From y (b, l, h, p), to which D·x is added when x is given, and z (b, l, h·p) to (b, l, d)."""
        return self.out_proj(gated_skip(y, x, None if x is None else self.D, z, self.z_bias))

    # --- where it starts ------------------------------------------------------------------------------------------

    def reset_parameters(self, init: Literal["identity", "random"] = "identity") -> None:
        """Initialise in place.

        ``"identity"`` is the start of MOHAWK's training runs: identity convolution, open gate, D = 1, the rest of
        `in_proj` and `out_proj` random. ``"random"`` leaves convolution and gate random too.

        Args:
            init: ``"identity"`` or ``"random"``.

        Raises:
            LimbeckError: When `init` is neither.
        """
        starts = {"identity": identity_start, "random": random_start}
        if init not in starts:
            raise unknown("init of reset_parameters", init, starts, hint="load_attention starts from attention weights")
        starts[init](self)

    def load_attention(self, weights: AttentionWeights) -> list[str]:
        """Start from an attention layer: C ← scale·W_q, B ← W_k, x ← W_v, out ← W_o; key and value heads repeated.

        The mixer then is linear attention without softmax and rotary embedding, decayed by half at every step
        (METHODS 1.2): identity convolution, open gate, D = 0. Biases go to `in_proj.bias`, or, with ``bias=False``,
        to `conv1d.bias`. With d_state above the head width the extra rows of B are random and those of C zero: the
        function is the same and gradients reach both.

        Args:
            weights: The attention layer's projections.

        Returns:
            One note for each thing that could not be carried over.

        Raises:
            LimbeckError: When the heads or widths do not fit.
        """
        return attention_start(self, weights)
