"""`check_mixer` passes what is right and names the law that each broken mixer breaks."""

import pytest
import torch
from torch import nn

from limbeck.mixers import DiscreteMamba2, MixerState
from limbeck.testing import check_mixer


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"d_state": 12, "n_qk_heads": 1},
        {"d_inner": 24, "n_v_heads": 4, "n_qk_heads": 2, "activation": "silu", "bias": True},
        {"conv_bias": False, "d_conv": 2},
        {"d_conv": 1},
    ],
    ids=str,
)
def test_discrete_mamba2_keeps_every_law(options):
    check_mixer(DiscreteMamba2, **options)


class ReturnsPair(DiscreteMamba2):
    def forward(self, *args, return_state=False, **kwargs):
        return super().forward(*args, return_state=True, **kwargs)


class LooksAhead(DiscreteMamba2):
    def forward(self, hidden_states, *args, return_state=False, **kwargs):
        out, state = super().forward(hidden_states, *args, return_state=True, **kwargs)
        out = out + hidden_states.mean(1, keepdim=True)
        return (out, state) if return_state else out


class Forgets(DiscreteMamba2):
    def _heads(self, xBC, A_log, attention_mask):
        x, log_decay, B, C = super()._heads(xBC, A_log, attention_mask)
        return x, torch.full_like(log_decay, -torch.inf), B, C


class DropsConvState(DiscreteMamba2):
    def forward(self, hidden_states, *args, state=None, **kwargs):
        if state is not None and hidden_states.shape[1] > 1:
            state = state._replace(conv=torch.zeros_like(state.conv))
        return super().forward(hidden_states, *args, state=state, **kwargs)


class StepsInPlace(DiscreteMamba2):
    def step(self, hidden_states, state, attention_mask=None):
        out, new = super().step(hidden_states, state, attention_mask)
        state.recurrent.data.copy_(new.recurrent)
        return out, MixerState(new.conv, state.recurrent)


class StepIgnoresPadding(DiscreteMamba2):
    def step(self, hidden_states, state, attention_mask=None):
        return super().step(hidden_states, state)


class IgnoresPadding(DiscreteMamba2):
    def forward(self, hidden_states, attention_mask=None, **kwargs):
        return super().forward(hidden_states, None, **kwargs)


class MasksInputOnly(DiscreteMamba2):
    """Zero at the input instead of after in_proj and the convolution: biases leak."""

    def forward(self, hidden_states, attention_mask=None, **kwargs):
        if attention_mask is not None:
            hidden_states = hidden_states * attention_mask[..., None]
        return super().forward(hidden_states, None, **kwargs)


class DecaysAtPadding(DiscreteMamba2):
    def _heads(self, xBC, A_log, attention_mask):
        x, _, B, C = super()._heads(xBC, A_log, attention_mask)
        return x, -torch.nn.functional.softplus(A_log), B, C


class IgnoresDocuments(DiscreteMamba2):
    def forward(self, *args, seq_idx=None, **kwargs):
        return super().forward(*args, **kwargs)


class HasIdleParameter(DiscreteMamba2):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.idle = nn.Parameter(torch.zeros(1))


class NarrowsD(DiscreteMamba2):
    def _apply(self, fn, recurse=True):
        return nn.Module._apply(self, fn, recurse)


class MatrixWithoutSkip(DiscreteMamba2):
    def mixing_matrix(self, *args, **kwargs):
        matrix = super().mixing_matrix(*args, **kwargs)
        return matrix - torch.diag_embed(self.D[:, None].expand(matrix.shape[:-1]))


class MatrixSeesPadding(DiscreteMamba2):
    def mixing_matrix(self, hidden_states, attention_mask=None, **kwargs):
        return super().mixing_matrix(hidden_states, **kwargs)


class KeepsSecret(DiscreteMamba2):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        secret = torch.rand(())
        self.out_proj.register_forward_hook(lambda _module, _inputs, out: out * secret)


class ResetsHalf(DiscreteMamba2):
    def __init__(self, *args, **kwargs):
        self.made = False
        super().__init__(*args, **kwargs)
        self.made = True

    def reset_parameters(self, init="identity"):
        before = self.D.detach().clone()
        super().reset_parameters(init)
        if self.made:
            self.D.data.copy_(before)


@pytest.mark.parametrize(
    ("cls", "law"),
    [
        (ReturnsPair, "shapes and types"),
        (LooksAhead, "causality"),
        (Forgets, "memory"),
        (DropsConvState, "carried state"),
        (StepsInPlace, "steps"),
        (StepIgnoresPadding, "steps"),
        (IgnoresPadding, "left padding"),
        (MasksInputOnly, "left padding"),
        (DecaysAtPadding, "padding passes the state"),
        (IgnoresDocuments, "packed documents"),
        (HasIdleParameter, "gradients"),
        (NarrowsD, "narrow types"),
        (MatrixWithoutSkip, "mixing matrix"),
        (MatrixSeesPadding, "mixing matrix"),
        (KeepsSecret, "saving"),
        (ResetsHalf, "initialisation"),
    ],
)
def test_a_broken_mixer_is_told_its_law(cls, law):
    with pytest.raises(AssertionError, match=f"{cls.__name__} breaks the law '{law}'"):
        check_mixer(cls)
