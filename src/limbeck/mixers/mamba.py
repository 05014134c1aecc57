"""Mamba, the mixer of CALD's students (arXiv 2312.00752, 2410.06846).

A selective scan in which every channel keeps a state of its own, a short causal convolution before it, a gate after it.
"""

import math
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from limbeck.errors import LimbeckError, unknown
from limbeck.mixers.base import Mixer, MixerState, check_mixer_inputs
from limbeck.mixers.common import CausalConv1d, at_tokens, identity_conv_, time_step_bias_, wide, wide_default
from limbeck.ops import gated_skip, selective_scan, selective_scan_step
from limbeck.ops.checks import without_autocast


class Mamba(Mixer):
    """Mamba: y = out_proj((scan(x, Δ, A, B, C) + D·x) · silu(z)), with A = −exp(A_log).

    `in_proj` makes x and z, each d_inner wide; x goes through a depthwise causal convolution and silu; `x_proj` makes
    of it a low-rank Δ, B and C; `dt_proj` and a softplus make Δ per channel. Parameter names and layouts are those of
    transformers' `MambaMixer`. A_log, D, `dt_proj` (and so Δ) and the state stay in float32.

    There is one decay per channel and state entry, so there is no matrix per head: stage 1 (`matrix`) does not apply,
    and attention's projections have no place to go, so that it starts with ``init="random"``.

    Args:
        d_model: d, the width of the model.
        d_inner: c, the width of x; by default 2·d.
        d_state: n, the state size per channel.
        d_conv: k, the width of the convolution.
        dt_rank: The rank of Δ; by default ⌈d/16⌉.
        bias: Whether `in_proj` and `out_proj` have biases.
        conv_bias: Whether the convolution has a bias.

    Raises:
        LimbeckError: When a size is below 1.
    """

    float32_parameters: ClassVar[tuple[str, ...]] = ("A_log", "D", "dt_proj.weight", "dt_proj.bias")
    no_weight_decay: ClassVar[tuple[str, ...]] = (
        "A_log",
        "D",
        "dt_proj.bias",
        "conv1d.weight",
        "conv1d.bias",
        "in_proj.bias",
        "out_proj.bias",
    )

    def __init__(
        self,
        d_model: int,
        d_inner: int | None = None,
        d_state: int = 16,
        d_conv: int = 4,
        dt_rank: int | None = None,
        bias: bool = False,
        conv_bias: bool = True,
    ):
        super().__init__(d_model)
        self.d_inner = 2 * d_model if d_inner is None else d_inner
        self.d_state = d_state
        self.d_conv = d_conv
        self.dt_rank = math.ceil(d_model / 16) if dt_rank is None else dt_rank
        for name in ("d_inner", "d_state", "d_conv", "dt_rank"):
            if getattr(self, name) < 1:
                raise LimbeckError(f"{name} {getattr(self, name)}", expected="1 or more")

        self.in_proj = nn.Linear(d_model, 2 * self.d_inner, bias=bias)
        self.conv1d = CausalConv1d(self.d_inner, d_conv, bias=conv_bias, activation="silu")
        self.x_proj_widths = (self.dt_rank, d_state, d_state)
        self.x_proj = nn.Linear(self.d_inner, sum(self.x_proj_widths), bias=False)
        self.dt_proj = nn.Linear(self.dt_rank, self.d_inner, dtype=wide_default())
        self.A_log = nn.Parameter(torch.empty(self.d_inner, d_state, dtype=wide_default()))
        self.D = nn.Parameter(torch.empty(self.d_inner, dtype=wide_default()))
        self.out_proj = nn.Linear(self.d_inner, d_model, bias=bias)
        self.reset_parameters()

    @classmethod
    def defaults_for(cls, d_model: int, num_heads: int, num_kv_heads: int, head_dim: int) -> dict[str, Any]:
        """Mamba's own sizes, whatever the attention: it has no heads."""
        return {"d_inner": 2 * d_model, "d_state": 16, "d_conv": 4, "dt_rank": math.ceil(d_model / 16)}

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

        x, z = self.in_proj(hidden_states).chunk(2, dim=-1)  # (b, l, c) each
        (x,), conv = self.conv1d(  # masks what enters: in_proj's bias must not leak from padding
            x,
            None if state is None else state.conv,
            attention_mask=attention_mask,
            seq_idx=seq_idx,
            return_state=return_state,
        )
        delta, B, C = self._select(x, attention_mask)  # (b, l, c), (b, l, n), (b, l, n)
        y, recurrent = selective_scan(
            x,
            delta,
            -self.A_log.exp(),
            B,
            C,
            initial_state=None if state is None else state.recurrent,
            return_state=True,
            seq_idx=seq_idx,
        )
        out = self._skip_and_gate(y, x, z)  # (b, l, d)
        return (out, MixerState(conv, recurrent)) if return_state else out

    def step(
        self, hidden_states: Tensor, state: MixerState, attention_mask: Tensor | None = None
    ) -> tuple[Tensor, MixerState]:
        """Mix one more token: see `Mixer.step`."""
        x, z = self.in_proj(hidden_states).chunk(2, dim=-1)  # (b, c) each
        (x,), conv = self.conv1d(x, state.conv, attention_mask=attention_mask)
        delta, B, C = self._select(x, attention_mask)
        y, recurrent = selective_scan_step(state.recurrent, x, delta, -self.A_log.exp(), B, C)  # (b, c)
        out = self._skip_and_gate(y[:, None], x[:, None], z[:, None])  # (b, 1, d)
        return out[:, 0], MixerState(conv, recurrent)

    def init_state(
        self, batch_size: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> MixerState:
        """Build the state before the first token, recurrent (b, c, n): see `Mixer.init_state`."""
        weight = self.in_proj.weight
        device, dtype = device or weight.device, dtype or weight.dtype
        conv = torch.zeros(batch_size, self.d_inner, self.d_conv - 1, device=device, dtype=dtype)
        return MixerState(conv, wide(torch.zeros(batch_size, self.d_inner, self.d_state, device=device, dtype=dtype)))

    # --- the pieces -----------------------------------------------------------------------------------------------

    def _select(self, x: Tensor, attention_mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """From the convolved x to Δ, B and C; at padding Δ is 0: nothing enters the state and nothing decays."""
        low_rank, B, C = self.x_proj(x).split(self.x_proj_widths, dim=-1)
        with without_autocast(x):
            delta = F.softplus(self.dt_proj(low_rank.to(self.dt_proj.weight.dtype)))
        return at_tokens(delta, attention_mask), B, C

    def _skip_and_gate(self, y: Tensor, x: Tensor, z: Tensor) -> Tensor:
        """From y, x and z (b, l, c) to (b, l, d): every channel is a head of width 1."""
        return self.out_proj(gated_skip(y[..., None], x[..., None], self.D, z))

    # --- where it starts ------------------------------------------------------------------------------------------

    @torch.no_grad()
    def reset_parameters(self, init: Literal["identity", "random"] = "identity") -> None:
        """Initialise in place, the standard Mamba way.

        A_log = log 1…n in every channel, D = 1; Δ starts log-uniform on [1e-3, 1e-1]; `dt_proj.weight` is uniform on
        ±dt_rank^−½; the other projections and the convolution start as torch's do.

        Args:
            init: ``"random"`` is that; ``"identity"`` has an identity convolution on top.

        Raises:
            LimbeckError: When `init` is neither.
        """
        if init not in ("identity", "random"):
            raise unknown("init of reset_parameters", init, ("identity", "random"))
        for module in (self.in_proj, self.conv1d, self.x_proj, self.out_proj):
            module.reset_parameters()
        if init == "identity":
            identity_conv_(self.conv1d)
        nn.init.uniform_(self.dt_proj.weight, -(self.dt_rank**-0.5), self.dt_rank**-0.5)
        time_step_bias_(self.dt_proj.bias)
        A = torch.arange(1, self.d_state + 1, device=self.A_log.device, dtype=self.A_log.dtype)
        self.A_log.copy_(A.log().expand_as(self.A_log))
        nn.init.ones_(self.D)
