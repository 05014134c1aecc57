"""The causal convolution, the gate and the one-token step on a GPU, beside the time that their bytes take.

`benchmarks/kernels.py` runs `measure()`. The floor counts every input read once and every output written once, at the
bandwidth of a large copy in the same run. By itself:

    python benchmarks/kernels_elementwise.py              # measure()
    python benchmarks/kernels_elementwise.py sweep        # other launch configurations
    python benchmarks/kernels_elementwise.py profile      # where a whole mixer's time goes
"""

import itertools
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from timing import copy_bandwidth, extra_memory, host_us, median_ms
from torch import Tensor

from limbeck.mixers import DiscreteMamba2
from limbeck.ops import causal_conv_split, causal_conv_triton, gated_skip, gated_skip_triton, mixer_step

B, L = 8, 2048
PHI = (2048, 2048, 2048)  # x, B and C of Phi-1.5
REST = 2080  # what else its in_proj makes: z and A_log


def normal(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(*shape, device="cuda", dtype=dtype)


def conv_inputs(widths: Sequence[int] = PHI, k: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    """x as a slice of a projection in bf16, weight and bias in fp32, as under autocast."""
    c = sum(widths)
    x = normal(B, L, c + REST)[..., :c].requires_grad_()
    return x, *(normal(*shape, dtype=torch.float32).requires_grad_() for shape in ((c, k), (c,)))


def gate_inputs(h: int = 32, p: int = 64) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """y, x, D, z (a slice of a projection) and z_bias."""
    c = h * p
    y, x = (normal(B, L, h, p).requires_grad_() for _ in range(2))
    D, z_bias = (normal(n, dtype=torch.float32).requires_grad_() for n in (h, c))
    return y, x, D, normal(B, L, sum(PHI) + REST)[..., -c - h : -h].requires_grad_(), z_bias


def conv(widths: Sequence[int], activation: Any, *inputs: Tensor) -> tuple[Tensor, ...]:
    return causal_conv_split(*inputs, widths, activation=activation)[0]


def torchs_conv(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
    """The same of x (b, c, l), in torch's layout."""
    return (F.conv1d(x, weight, bias, padding=weight.shape[2] - 1, groups=len(bias))[..., : x.shape[2]],)


def gate(*inputs: Tensor) -> tuple[Tensor, ...]:
    return (gated_skip(*inputs),)


def forward_and_both(call: Callable[..., tuple[Tensor, ...]], inputs: Sequence[Tensor]) -> dict[str, float]:
    """Milliseconds of forward alone, without gradients, and of forward + backward to every input."""
    run = partial(call, *inputs)
    with torch.no_grad():
        forward = median_ms(run)
        outputs = run()
    readings = [torch.randn_like(output) for output in outputs]

    def both() -> None:
        torch.autograd.grad(run(), inputs, readings)

    return {"forward": forward, "forward + backward": median_ms(both), "extra": extra_memory(both, inputs) / 1e9}


def entries(operator: str, shape: str, times: dict[str, float], floors: dict[str, float]) -> Iterator[dict[str, Any]]:
    for what, floor in floors.items():
        yield {
            "operator": operator,
            "shape": shape,
            "what": what,
            "ms": times[what],
            "floor_ms": floor,
            "ratio": times[what] / floor,
            "extra_memory_gb": times["extra"],
        }


def measure_conv(bandwidth: float) -> Iterator[dict[str, Any]]:
    for activation, widths in (("identity", PHI), ("silu", (5120,))):
        inputs = conv_inputs(widths)
        once = inputs[0].numel() * 2 / bandwidth * 1e3  # milliseconds to read or write x
        times = forward_and_both(partial(conv, widths, activation), inputs)
        shape = f"b {B}, l {L}, c {sum(widths)}, k 4, bf16, {activation}"
        yield from entries("causal_conv", shape, times, {"forward": 2 * once, "forward + backward": 5 * once})
        if activation == "identity":
            x, weight, bias = inputs
            whole = x.detach().mT.contiguous().requires_grad_()  # what torch's own wants, (b, c, l)
            taps, offset = (tensor.detach().bfloat16().requires_grad_() for tensor in (weight[:, None], bias))
            torchs = forward_and_both(torchs_conv, (whole, taps, offset))
            yield from entries("F.conv1d", shape, torchs, {"forward": 2 * once, "forward + backward": 5 * once})


def measure_gate(bandwidth: float) -> Iterator[dict[str, Any]]:
    inputs = gate_inputs()
    once = inputs[0].numel() * 2 / bandwidth * 1e3
    times = forward_and_both(gate, inputs)
    shape = f"b {B}, l {L}, h 32, p 64, bf16"
    yield from entries("gated_skip", shape, times, {"forward": 4 * once, "forward + backward": 11 * once})


def step_inputs(b: int, h: int, g: int, p: int, n: int, k: int = 4) -> list[Tensor]:
    """What `mixer_step` takes, with weights in bf16 as a loaded model has them."""
    c = h * p + 2 * g * n
    xBC, z, A_log = normal(b, c + h * p + h).split((c, h * p, h), dim=1)
    states = normal(b, c, k - 1), normal(b, h, p, n, dtype=torch.float32)
    return [xBC, A_log, z, *states, normal(c, k), normal(c), normal(h, dtype=torch.float32), normal(h * p)]


def measure_step(bandwidth: float) -> Iterator[dict[str, Any]]:
    for b, heads in ((1, (32, 32, 64, 64)), (16, (32, 32, 64, 64)), (64, (32, 32, 64, 64)), (64, (24, 8, 128, 128))):
        inputs = step_inputs(b, *heads)
        state, conv_state = inputs[4], inputs[3]
        # As many states as a model has layers, or enough to leave the L2 cache: in a model they are never in it.
        sets = [[*inputs[:3], conv_state.clone(), state.clone(), *inputs[5:]] for _ in range(24 if b == 1 else 6)]

        def steps(backend: str, sets: list[list[Tensor]] = sets) -> None:
            with torch.no_grad():
                for one in sets:
                    mixer_step(*one, in_place=True, backend=backend)

        count = 2 * state.numel() * 4 + 2 * conv_state.numel() * 2 + sum(t.numel() * 2 for t in inputs[:3])
        floor = (count + sum(t.numel() * t.element_size() for t in inputs[5:])) / bandwidth * 1e3
        ours = median_ms(lambda: steps("triton")) / len(sets)
        yield {
            "operator": "mixer_step",
            "shape": "b {}, h {}, g {}, p {}, n {}, bf16".format(b, *heads),
            "what": "in place",
            "ms": ours,
            "floor_ms": floor,
            "ratio": ours / floor,
            "reference_ms": median_ms(lambda: steps("reference")) / len(sets),
            "host_us": host_us(lambda: steps("triton"), 5) / len(sets),
        }


def measure() -> list[dict[str, Any]]:
    """Every shape of the issue: ours, torch's own, the floor in bytes."""
    torch.manual_seed(0)
    bandwidth = copy_bandwidth()
    return [*measure_conv(bandwidth), *measure_gate(bandwidth), *measure_step(bandwidth)]


# --- to choose by -----------------------------------------------------------------------------------------------------


def sweep() -> Iterator[dict[str, Any]]:
    """Milliseconds of forward and of what the backward adds under many launch configurations."""
    torch.manual_seed(0)
    for name, module, inputs, call, spans in (
        ("conv identity", causal_conv_triton, conv_inputs(), partial(conv, PHI, "identity"), (64, 128, 256, 344, 512)),
        ("conv silu", causal_conv_triton, conv_inputs((5120,)), partial(conv, (5120,), "silu"), (64, 128, 256, 344)),
        ("gate", gated_skip_triton, gate_inputs(), gate, (16, 32, 64, 128)),
    ):
        usual = module.launch_of
        with torch.no_grad():
            readings = [torch.randn_like(output) for output in call(*inputs)]
        for channels, rows, span in itertools.product((128, 256), (2, 4, 8), spans):
            launch = module.Launch(channels, rows, span)
            module.launch_of = lambda *_, launch=launch, **__: launch
            with torch.no_grad():
                forward = median_ms(partial(call, *inputs), 5)

            def both(call: Any = call, inputs: Any = inputs, readings: Any = readings) -> None:
                torch.autograd.grad(call(*inputs), inputs, readings)

            yield {"case": name, **launch._asdict(), "forward_ms": forward, "backward_ms": median_ms(both, 5) - forward}
        module.launch_of = usual


def profile() -> str:
    """The kernels of one mixer of Phi-1.5, forward and backward under autocast, by their time on the GPU."""
    mixer = DiscreteMamba2(2048).cuda()
    hidden = normal(B, L, 2048, dtype=torch.float32).requires_grad_()

    def run() -> None:
        with torch.autocast("cuda", torch.bfloat16):
            out = mixer(hidden)
        out.backward(torch.ones_like(out))

    run()
    run()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        run()
        torch.cuda.synchronize()
    return profiler.key_averages().table(sort_by="cuda_time_total", row_limit=40, max_name_column_width=80)


if __name__ == "__main__":
    what = sys.argv[1] if len(sys.argv) > 1 else "measure"
    if what == "profile":
        print(profile())
    else:
        for result in sweep() if what == "sweep" else measure():
            print(json.dumps(result), flush=True)
