"""`selective_scan` on a GPU at Pythia-1B's CALD size, beside its floors and mamba_ssm's CUDA kernel.

`benchmarks/kernels.py` runs `measure()`. There are two floors: bytes, each input read once and each output written
once; and arithmetic, a kernel that does nothing but the exponentials and multiply-adds of a scan, in registers.

    python benchmarks/kernels_selective_scan.py           # measure()
    python benchmarks/kernels_selective_scan.py sweep     # other launches, and the kernels one by one
"""

import json
import sys
from collections.abc import Callable

import torch
import triton
import triton.language as tl
from timing import copy_bandwidth, extra_memory, median_ms
from torch import Tensor

from limbeck.ops import selective_scan

SIZES = {"b": 8, "l": 2048, "c": 5120, "n": 16}


def draw(b: int, l: int, c: int, n: int) -> list[Tensor]:
    """x, Δ, A, B, C of a mixer's sizes, wanting gradients; B and C are slices of one projection."""
    x = torch.randn(b, l, c, device="cuda", dtype=torch.bfloat16)
    delta = torch.nn.functional.softplus(torch.randn(b, l, c, device="cuda") - 4)
    A = -torch.arange(1, n + 1, device="cuda").expand(c, n) * (0.5 + torch.rand(c, n, device="cuda"))
    B, C = torch.randn(b, l, 2 * n, device="cuda", dtype=torch.bfloat16).split(n, dim=-1)
    return [tensor.detach().requires_grad_() for tensor in (x, delta, A, B, C)]


def times(run: Callable[[], Tensor], inputs: list[Tensor]) -> dict[str, float]:
    """Milliseconds of forward alone, without gradients, and of forward + backward to every input; extra memory."""
    with torch.no_grad():
        forward = median_ms(run)
    weight = torch.randn_like(run())

    def both() -> None:
        torch.autograd.grad(run(), inputs, weight)

    extra = extra_memory(both, inputs) / 1e9
    return {"forward_ms": forward, "both_ms": median_ms(both), "extra_memory_gb": extra}


# --- the floors -------------------------------------------------------------------------------------------------------


@triton.jit
def arithmetic(
    seed_ptr, out_ptr, l, BACKWARD: tl.constexpr, EXPONENTIALS: tl.constexpr, LANES: tl.constexpr, ENTRIES: tl.constexpr
):
    """What a thread with ENTRIES states does for l tokens: 1 exponential and 4 multiply-adds each, backward 11."""
    lane, entry = tl.arange(0, LANES)[None, :], tl.arange(0, ENTRIES)[:, None]
    at = seed_ptr + lane * ENTRIES + entry
    A, B, C = tl.load(at), tl.load(at + 4096), tl.load(at + 8192)
    state, dstate, dA, dB, dC = A, B, C, A, B
    delta, x, y, dx = tl.load(seed_ptr + 4096 + lane), tl.load(seed_ptr + 8192 + lane), 0 * lane + 0.0, 0 * lane + 0.0
    for _ in range(0, l, 4):
        for _ in tl.static_range(4):
            if EXPONENTIALS:
                state += tl.exp2(delta * A)
            else:
                decay = tl.exp2(delta * A)
                state = decay * state + x * B
                if BACKWARD:
                    dstate += C * x
                    dC += state * y
                    dB += dstate * x
                    dx += tl.sum(dstate * B, axis=0, keep_dims=True)
                    dstate *= decay
                    dexponent = dstate * state
                    dA += dexponent * delta
                    y += tl.sum(dexponent * A, axis=0, keep_dims=True)
                else:
                    y += tl.sum(state * C, axis=0, keep_dims=True)
            delta = delta * 0.999 + 1e-4  # both differ from token to token, so that nothing moves out of the loop
            x = 1 - x
    out = state + dstate + dA + dB + dC + y + dx
    tl.store(out_ptr + (tl.program_id(0) * LANES + lane) * ENTRIES + entry, out)


def arithmetic_ms(b: int, l: int, c: int, n: int, **options: bool) -> float:
    """Milliseconds of the arithmetic of one pass over all states."""
    entries, warps = 8, 4
    seed = torch.rand(3 * 4096, device="cuda")
    seed[:4096] = -0.1 - seed[:4096]  # A
    programs = b * c * n // (entries * 32 * warps)
    out = torch.empty(programs * entries * 32 * warps, device="cuda")
    options = {"BACKWARD": False, "EXPONENTIALS": False} | options
    return median_ms(
        lambda: arithmetic[(programs,)](seed, out, l, LANES=32 * warps, ENTRIES=entries, num_warps=warps, **options)
    )


def floors(b: int, l: int, c: int, n: int) -> dict[str, float]:
    """Milliseconds of the bytes and of the arithmetic, forward and both."""
    bandwidth = copy_bandwidth() / 1e3  # bytes in a millisecond
    tokens = b * l
    forward = tokens * (c * (2 + 4 + 2) + 2 * n * 2)  # x, Δ, y; B, C
    backward = tokens * (c * (2 + 4 + 2 + 2 + 4) + 4 * n * 2)  # x, Δ, dy, dx, dΔ; B, C, dB, dC
    sizes = {"b": b, "l": l, "c": c, "n": n}
    scan = {name: arithmetic_ms(**sizes, BACKWARD=name == "backward") for name in ("forward", "backward")}
    return {
        "bytes_forward_ms": forward / bandwidth,
        "bytes_both_ms": (forward + backward) / bandwidth,
        "exponentials_one_pass_ms": arithmetic_ms(**sizes, EXPONENTIALS=True),
        "arithmetic_forward_ms": scan["forward"],
        "arithmetic_both_ms": scan["forward"] + scan["backward"],
    }


# --- the comparison ---------------------------------------------------------------------------------------------------


def peer(inputs: list[Tensor]) -> dict[str, float] | str:
    """mamba_ssm's kernel on the same numbers, in the layout and the dtypes that it is fastest in."""
    try:
        from mamba_ssm.ops.selective_scan_interface import selective_scan_fn
    except ImportError as error:
        return f"not built: {error}"
    x, delta, A, B, C = inputs
    x, delta, B, C = (t.detach().to(torch.bfloat16).transpose(1, 2).contiguous() for t in (x, delta, B, C))
    leaves = [t.requires_grad_() for t in (x, delta, A.detach().clone(), B, C)]
    return times(lambda: selective_scan_fn(*leaves), leaves)


def measure() -> list[dict]:
    """Ours, the floors and the peer at the size of the issue."""
    inputs = draw(**SIZES)
    ours, floor = times(lambda: selective_scan(*inputs, backend="triton"), inputs), floors(**SIZES)
    return [
        {
            "operator": "selective_scan",
            "shape": "8 x 2048, 5120 channels, state 16, bfloat16",
            "ours": ours,
            "floors": floor,
            "peers": {"mamba_ssm": peer(inputs)},
            "forward_over_floor": ours["forward_ms"] / max(floor["bytes_forward_ms"], floor["arithmetic_forward_ms"]),
            "both_over_floor": ours["both_ms"] / max(floor["bytes_both_ms"], floor["arithmetic_both_ms"]),
        }
    ]


def sweep() -> None:
    """Launches side by side, to choose from, and how the time of the chosen one divides among the kernels."""
    from limbeck.ops import selective_scan_triton

    chosen = selective_scan_triton.launch_for
    inputs = draw(**SIZES)
    weight = torch.randn_like(inputs[0])
    for tile, tiles_kept, registers, product in (
        (8, 1, 200, "tf32"),
        (8, 1, 200, "bf16"),
        (8, 1, 255, "tf32"),
        (8, 1, 168, "tf32"),
        (8, 1, 168, "bf16"),
        (8, 2, 200, "tf32"),
        (4, 2, 128, "bf16"),
        (4, 4, 160, "tf32"),
    ):
        launch = selective_scan_triton.Launch(tile, tiles_kept, registers, product)
        selective_scan_triton.launch_for = lambda x, launch=launch: launch
        with torch.no_grad():
            forward = median_ms(lambda: selective_scan(*inputs, backend="triton"), 20)
        y = selective_scan(*inputs, backend="triton")
        backward = median_ms(lambda y=y: torch.autograd.grad(y, inputs, weight, retain_graph=True), 20)
        print(launch, f"forward {forward:.4f}  backward {backward:.4f}", flush=True)
    selective_scan_triton.launch_for = chosen
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(10):
            torch.autograd.grad(selective_scan(*inputs, backend="triton"), inputs, weight)
        torch.cuda.synchronize()
    for event in sorted(profile.key_averages(), key=lambda event: -event.device_time_total)[:8]:
        print(f"{event.device_time_total / 10:9.1f} us  {event.count / 10:4.1f} x  {event.key[:100]}")


if __name__ == "__main__":
    if sys.argv[1:] == ["sweep"]:
        sweep()
    else:
        print(json.dumps(measure(), indent=1))
