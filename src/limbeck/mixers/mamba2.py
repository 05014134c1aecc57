"""Mamba-2, the mixer that existing servers know (arXiv 2405.21060): SSD with a step Δ per head, and a gated norm."""

from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from limbeck.errors import LimbeckError, unknown
from limbeck.mixers.base import MatrixFactors, Mixer, MixerState, check_mixer_inputs
from limbeck.mixers.common import CausalConv1d, at_tokens, identity_conv_, time_step_bias_, wide, wide_default
from limbeck.ops import ssd, ssd_step


class GatedRMSNorm(nn.Module):
    """y · silu(z), divided by its root mean square within each group of channels, times a weight.

    Args:
        width: The channels.
        groups: Into how many groups they fall.
        eps: Added to the mean square.
    """

    def __init__(self, width: int, groups: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.groups, self.eps = groups, eps

    def forward(self, y: Tensor, z: Tensor) -> Tensor:
        """Norm y gated by z, both (…, width); computed in float32 or wider, returned in z's dtype."""
        gated = (wide(y) * F.silu(wide(z))).unflatten(-1, (self.groups, -1))  # (…, g, width/g)
        scale = torch.rsqrt(gated.square().mean(-1, keepdim=True) + self.eps)
        return (gated * scale).flatten(-2).to(z.dtype) * self.weight.to(z.dtype)


class Mamba2(Mixer):
    """Mamba-2: y = out_proj(norm((SSD(Δ·x, Δ·A, B, C) + D·x), z)), with A = −exp(A_log) and Δ = softplus(dt + dt_bias).

    `in_proj` makes, in this order, z, [x | B | C] and dt, of widths h·p, h·p + 2·g·n and h; [x | B | C] goes through a
    depthwise causal convolution and silu. Each of the g groups of B and C serves h/g consecutive heads of x. Parameter
    names and layouts are those of transformers' `Mamba2Mixer`. A_log, D, dt_bias and the state stay in float32.

    It has a mixing matrix per head, so stage 1 (`matrix`) applies. Attention's projections have no place to go (all
    heads of a group share B and C, and a norm follows), so that it starts with ``init="random"`` or ``"identity"``.

    Args:
        d_model: d, the width of the model.
        d_state: n, the state size per head.
        d_conv: k, the width of the convolution.
        expand: h·p over d.
        headdim: p, the width of a head.
        ngroups: g, the groups of heads that share B and C.
        bias: Whether `in_proj` and `out_proj` have biases.
        conv_bias: Whether the convolution has a bias.
        norm_eps: Added to the mean square in the norm.

    Raises:
        LimbeckError: When the sizes do not divide.
    """

    has_mixing_matrix: ClassVar[bool] = True
    float32_parameters: ClassVar[tuple[str, ...]] = ("A_log", "D", "dt_bias")
    no_weight_decay: ClassVar[tuple[str, ...]] = (
        "A_log",
        "D",
        "dt_bias",
        "norm.weight",
        "conv1d.weight",
        "conv1d.bias",
        "in_proj.bias",
        "out_proj.bias",
    )

    def __init__(
        self,
        d_model: int,
        d_state: int = 128,
        d_conv: int = 4,
        expand: int = 2,
        headdim: int = 64,
        ngroups: int = 1,
        bias: bool = False,
        conv_bias: bool = True,
        norm_eps: float = 1e-5,
    ):
        super().__init__(d_model)
        self.d_inner = expand * d_model
        self.d_state = d_state
        self.d_conv = d_conv
        self.headdim = headdim
        self.ngroups = ngroups
        for name in ("d_inner", "d_state", "d_conv", "headdim", "ngroups"):
            if getattr(self, name) < 1:
                raise LimbeckError(f"{name} {getattr(self, name)}", expected="1 or more")
        self.num_heads = self.d_inner // headdim
        if self.d_inner % headdim or self.num_heads % ngroups:
            raise LimbeckError(
                f"{self.d_inner} channels (expand · d_model) over headdim {headdim} and ngroups {ngroups}",
                expected="the channels to be a multiple of headdim, and the heads a multiple of ngroups",
                hint="set headdim or ngroups",
            )

        self.conv_widths = (self.d_inner, ngroups * d_state, ngroups * d_state)
        conv_channels = sum(self.conv_widths)
        # The rows of in_proj, in order: z to the gate, [x | B | C] through the convolution, dt to the step.
        self.in_proj_widths = (self.d_inner, conv_channels, self.num_heads)
        self.in_proj = nn.Linear(d_model, sum(self.in_proj_widths), bias=bias)
        self.conv1d = CausalConv1d(conv_channels, d_conv, bias=conv_bias, activation="silu")
        self.dt_bias = nn.Parameter(torch.empty(self.num_heads, dtype=wide_default()))
        self.A_log = nn.Parameter(torch.empty(self.num_heads, dtype=wide_default()))
        self.D = nn.Parameter(torch.empty(self.num_heads, dtype=wide_default()))
        self.norm = GatedRMSNorm(self.d_inner, ngroups, norm_eps)
        self.out_proj = nn.Linear(self.d_inner, d_model, bias=bias)
        self.reset_parameters()

    @classmethod
    def defaults_for(cls, d_model: int, num_heads: int, num_kv_heads: int, head_dim: int) -> dict[str, Any]:
        """As many heads as the attention has, so that each has a matrix to learn; Mamba-2's own sizes otherwise."""
        return {"headdim": 2 * d_model // num_heads} if 2 * d_model % num_heads == 0 else {}

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

        x, delta, B, C, z, conv = self._project(hidden_states, attention_mask, seq_idx, state, return_state)
        recurrent = None if state is None else state.recurrent
        y, recurrent = ssd(
            wide(x) * delta[..., None],
            -self.A_log.exp() * delta,
            B,
            C,
            initial_state=recurrent,
            return_state=True,
            seq_idx=seq_idx,
        )
        out = self._norm_and_project(y + self.D[:, None] * x, z)  # (b, l, d)
        return (out, MixerState(conv, recurrent)) if return_state else out

    def step(
        self, hidden_states: Tensor, state: MixerState, attention_mask: Tensor | None = None
    ) -> tuple[Tensor, MixerState]:
        """Mix one more token: see `Mixer.step`."""
        z, xBC, dt = self.in_proj(hidden_states).split(self.in_proj_widths, dim=-1)  # (b, …)
        xBC, conv = self.conv1d(xBC, state.conv, widths=self.conv_widths, attention_mask=attention_mask)
        x, delta, B, C = self._heads(xBC, dt, attention_mask)
        y, recurrent = ssd_step(state.recurrent, wide(x) * delta[..., None], -self.A_log.exp() * delta, B, C)
        return self._norm_and_project(y + self.D[:, None] * x, z), MixerState(conv, recurrent)

    def init_state(
        self, batch_size: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> MixerState:
        """Build the state before the first token: see `Mixer.init_state`."""
        weight = self.in_proj.weight
        device, dtype = device or weight.device, dtype or weight.dtype
        conv = torch.zeros(batch_size, sum(self.conv_widths), self.d_conv - 1, device=device, dtype=dtype)
        shape = (batch_size, self.num_heads, self.headdim, self.d_state)
        return MixerState(conv, wide(torch.zeros(shape, device=device, dtype=dtype)))

    # --- the same as a matrix -------------------------------------------------------------------------------------

    def matrix_factors(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, *, seq_idx: Tensor | None = None
    ) -> MatrixFactors:
        """B times Δ, so that every head has its own, and the like of C: see `Mixer.matrix_factors`."""
        check_mixer_inputs(self, hidden_states, attention_mask, seq_idx)
        _, delta, B, C, _, _ = self._project(hidden_states, attention_mask, seq_idx, None)
        B, C = (tensor.repeat_interleave(self.num_heads // self.ngroups, dim=2) for tensor in (B, C))  # (b, l, h, n)
        return MatrixFactors(-self.A_log.exp() * delta, (B * delta[..., None]).to(B.dtype), C, self.D)

    def values(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, *, seq_idx: Tensor | None = None
    ) -> Tensor:
        """The convolved x: see `Mixer.values`."""
        check_mixer_inputs(self, hidden_states, attention_mask, seq_idx)
        return self._project(hidden_states, attention_mask, seq_idx, None)[0]

    def readout(self, mixed: Tensor, hidden_states: Tensor) -> Tensor:
        """Gated norm and out_proj: see `Mixer.readout`."""
        z, _, _ = self.in_proj(hidden_states).split(self.in_proj_widths, dim=-1)
        return self._norm_and_project(mixed, z)

    # --- the pieces -----------------------------------------------------------------------------------------------

    def _project(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None,
        seq_idx: Tensor | None,
        state: MixerState | None,
        return_state: bool = False,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Any]:
        """From (b, l, d) to x (b,l,h,p), Δ (b,l,h), B and C (b,l,g,n), z (b,l,h·p), conv state (b,c,k-1)."""
        z, xBC, dt = self.in_proj(hidden_states).split(self.in_proj_widths, dim=-1)
        xBC, conv = self.conv1d(  # masks what enters, in_proj's bias, and what leaves, its own
            xBC,
            None if state is None else state.conv,
            widths=self.conv_widths,
            attention_mask=attention_mask,
            seq_idx=seq_idx,
            return_state=return_state,
        )
        return *self._heads(xBC, dt, attention_mask), z, conv

    def _heads(
        self, xBC: tuple[Tensor, Tensor, Tensor], dt: Tensor, attention_mask: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Cut the convolved channels into heads; at padding Δ is 0: nothing enters and nothing decays."""
        x, B, C = xBC
        return (
            x.unflatten(-1, (self.num_heads, self.headdim)),
            at_tokens(F.softplus(wide(dt) + self.dt_bias), attention_mask),
            B.unflatten(-1, (self.ngroups, self.d_state)),
            C.unflatten(-1, (self.ngroups, self.d_state)),
        )

    def _norm_and_project(self, y: Tensor, z: Tensor) -> Tensor:
        """From y (…, h, p) and z (…, h·p) to (…, d)."""
        return self.out_proj(self.norm(y.flatten(-2), z))

    # --- where it starts ------------------------------------------------------------------------------------------

    @torch.no_grad()
    def reset_parameters(self, init: Literal["identity", "random"] = "identity") -> None:
        """Initialise in place, the standard Mamba-2 way.

        A uniform on [1, 16] per head, D = 1; Δ starts log-uniform on [1e-3, 1e-1]; the projections and the convolution
        start as torch's do.

        Args:
            init: ``"random"`` is that; ``"identity"`` has an identity convolution on top.

        Raises:
            LimbeckError: When `init` is neither.
        """
        if init not in ("identity", "random"):
            raise unknown("init of reset_parameters", init, ("identity", "random"))
        for module in (self.in_proj, self.conv1d, self.out_proj):
            module.reset_parameters()
        if init == "identity":
            identity_conv_(self.conv1d)
        time_step_bias_(self.dt_bias)
        self.A_log.copy_(torch.empty_like(self.A_log).uniform_(1, 16).log_())
        nn.init.ones_(self.D)
        nn.init.ones_(self.norm.weight)
