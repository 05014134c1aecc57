"""Tensor functions under the mixers: no modules, no parameters, one door per operator."""

from limbeck.ops.causal_conv import causal_conv, causal_conv_step
from limbeck.ops.selective_scan import selective_scan, selective_scan_step
from limbeck.ops.ssd import ssd, ssd_matrix, ssd_step

__all__ = [
    "causal_conv",
    "causal_conv_step",
    "selective_scan",
    "selective_scan_step",
    "ssd",
    "ssd_matrix",
    "ssd_step",
]
