"""What was measured of GPUs: all that a plan knows of their speed.

`benchmarks/plan.py` measures a card and writes what belongs here to ``benchmarks/results/plan.json``.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from limbeck.errors import unknown


@dataclass(frozen=True)
class MeasuredCard:
    """A GPU as it was measured.

    Attributes:
        memory: Bytes that it has.
        matmul_rate: Operations per second of a large bfloat16 matrix product.
        copy_bandwidth: Bytes per second of a copy, read and written.
        kernels: Part of those two that a kernel of Limbeck's reaches, by the operation's name; 1 for those left out.
        efficiency: Part of the least time that an update takes, by objective: (floating-point operations of a
            micro-batch, part), measured at several sizes. Between two of them it is read off by the logarithm.
        launch: Seconds that the host takes for an operation, backward pass included: what small models wait for.
    """

    memory: int
    matmul_rate: float
    copy_bandwidth: float
    kernels: Mapping[str, float]
    efficiency: Mapping[str, tuple[tuple[float, float], ...]]
    launch: float = 0.0

    def seconds(self, name: str, flops: float, moved: float) -> float:
        """Least time of a call: the longer of its arithmetic and its memory."""
        return max(flops / self.matmul_rate, moved / self.copy_bandwidth) / self.kernels.get(name, 1.0)

    def efficiency_at(self, objective: str, flops: float) -> float:
        """The part of the least time at a size; beyond the sizes that were measured, that of the nearest."""
        sizes, parts = zip(*sorted(self.efficiency[objective]), strict=True)
        if flops <= sizes[0]:
            return parts[0]
        for (small, low), (large, high) in zip(
            zip(sizes, parts, strict=True), zip(sizes[1:], parts[1:], strict=False), strict=False
        ):
            if flops <= large:
                place = math.log(flops / small) / math.log(large / small)
                return low + place * (high - low)
        return parts[-1]


CARDS: Mapping[str, MeasuredCard] = {
    "H200": MeasuredCard(
        memory=150_100_000_000,
        matmul_rate=6.77e14,
        copy_bandwidth=4.25e12,
        kernels={
            "limbeck::ssd_triton": 0.5,
            "limbeck::ssd_triton_backward": 0.5,
            "limbeck::matrix_distance_triton": 0.2,
            "limbeck::selective_scan_triton": 0.4,
            "limbeck::selective_scan_triton_backward": 0.12,
        },
        efficiency={
            "matrix": ((3.88e13, 0.954),),
            "hidden": ((8.64e13, 0.874),),
            "logits": ((9.33e13, 0.870),),
            "layerwise": ((1.444e14, 0.839),),
        },
        launch=7.5e-5,
    ),
}
"""By the name that ``--gpu`` takes."""


def card_named(name: str) -> MeasuredCard:
    """A measured card.

    Raises:
        LimbeckError: None of that name was measured; the error names those that were.
    """
    if name not in CARDS:
        raise unknown("GPU", name, CARDS, hint="measure it with benchmarks/plan.py")
    return CARDS[name]
