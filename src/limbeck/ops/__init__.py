"""Tensor functions under the mixers: no modules, no parameters, one door per operator."""

from limbeck.ops.causal_conv import causal_conv, causal_conv_split, causal_conv_step
from limbeck.ops.gated_skip import gated_skip
from limbeck.ops.linear_kl import Head, HeadLosses, linear_kl
from limbeck.ops.matrix_distance import matrix_distance
from limbeck.ops.mixer_step import mixer_step
from limbeck.ops.one_row import Linear, Norm, linear_sum, norm_linears, sum_norm
from limbeck.ops.selective_scan import selective_scan, selective_scan_step
from limbeck.ops.ssd import ssd, ssd_matrix, ssd_step

__all__ = [
    "Head",
    "HeadLosses",
    "Linear",
    "Norm",
    "causal_conv",
    "causal_conv_split",
    "causal_conv_step",
    "gated_skip",
    "linear_kl",
    "linear_sum",
    "matrix_distance",
    "mixer_step",
    "norm_linears",
    "selective_scan",
    "selective_scan_step",
    "ssd",
    "ssd_matrix",
    "ssd_step",
    "sum_norm",
]
