"""Head and KL on a GPU: `linear_kl` beside logits that are all in memory, Liger-Kernel, and the four products alone.

    python benchmarks/kernels_linear_kl.py            # prints measure(), errors() and sweep()

`benchmarks/kernels.py` runs `measure()`. Liger-Kernel is measured where it can be imported, and said to be missing
where not. Times are medians of whole calls, since Liger waits for the GPU within a call, which no CUDA graph allows.
"""

import json
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
import triton
from timing import extra_memory
from torch import Tensor

from limbeck.ops import Head, linear_kl, linear_kl_triton
from limbeck.ops.linear_kl_reference import kl_divergence

B, L, VOCABULARY, WIDTH = 4, 2048, 51200, 2048
SHAPE = f"{B * L} tokens x {VOCABULARY}, d = {WIDTH}"


def draw(tokens: int = B * L, dtype: torch.dtype = torch.bfloat16) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """Hidden states (1, tokens, d) and weight (v, d) of student and teacher, and labels; the teacher is in bfloat16."""

    def model(number_format: torch.dtype) -> list[Tensor]:
        states = torch.randn(1, tokens, WIDTH, device="cuda", dtype=torch.bfloat16)
        return [states, torch.randn(VOCABULARY, WIDTH, device="cuda", dtype=number_format) * 2 / WIDTH**0.5]

    labels = torch.randint(0, VOCABULARY, (1, tokens), device="cuda")
    return [tensor.requires_grad_() for tensor in model(dtype)], model(torch.bfloat16), labels


def plain(student: list[Tensor], teacher: list[Tensor]) -> Tensor:
    """What distill/logits.py did: logits of both models, then float32 softmax."""
    with torch.no_grad():
        target = F.linear(*teacher)
    return kl_divergence(F.linear(*student), target).mean()


def ours(student: list[Tensor], teacher: list[Tensor], **options: Any) -> Tensor:
    """`linear_kl`."""
    return linear_kl(student[0], Head(student[1]), teacher[0], Head(teacher[1]), backend="triton", **options).loss


def liger() -> dict[str, Callable[[list[Tensor], list[Tensor]], Tensor]]:
    """Forward KL of Liger-Kernel, in both of its forms, on hidden states (tokens, d)."""
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss
    from liger_kernel.ops.fused_linear_jsd import LigerFusedLinearJSDFunction

    chunked = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=0.0)

    def kernels(student: list[Tensor], teacher: list[Tensor]) -> Tensor:
        tensors = (student[0][0], student[1], teacher[0][0], teacher[1])
        return LigerFusedLinearJSDFunction.apply(*tensors, None, 0.0, -100, 1.0, torch.float32)

    def compiled(student: list[Tensor], teacher: list[Tensor]) -> Tensor:
        labels = torch.zeros(student[0].shape[1], dtype=torch.int64, device="cuda")
        return chunked(student[0][0], student[1], teacher[0][0], teacher[1], labels)

    return {"Liger-Kernel, fused_linear_jsd": kernels, "Liger-Kernel, chunked_loss compiled": compiled}


def products(student: list[Tensor], teacher: list[Tensor]) -> float:
    """Milliseconds of what no form can leave out: both logits, and their gradient's products with weight and states."""
    states, weight = (tensor.detach().bfloat16() for tensor in student)
    logits = states[0] @ weight.T

    def run() -> None:
        torch.mm(states[0], weight.T, out=logits)
        torch.mm(teacher[0][0], teacher[1].T, out=logits)
        torch.mm(logits, weight)
        torch.mm(logits.T, states[0])

    return timed(run)


def timed(run: Callable[[], object]) -> float:
    """Median milliseconds of a call."""
    return float(triton.testing.do_bench(run, warmup=60, rep=250, return_mode="median"))


def both(run: Callable[[], Tensor], student: list[Tensor]) -> dict[str, float]:
    """Forward + backward to the student: milliseconds, and peak memory beyond its gradients."""

    def call() -> None:
        torch.autograd.grad(run(), student)

    return {"ms": timed(call), "peak_memory_gb": extra_memory(call) / 1e9}


def measure() -> list[dict]:
    """Plain, ours and Liger's, with bfloat16 weights and, as Limbeck trains, float32 weights under autocast."""
    results: list[dict] = []
    for what, dtype, autocast in (("bf16", torch.bfloat16, False), ("fp32 under bf16 autocast", torch.float32, True)):
        student, teacher, labels = draw(dtype=dtype)
        floor = products(student, teacher)
        forms: dict[str, Callable[[], Tensor]] = {
            "plain": lambda s=student, t=teacher: plain(s, t),
            "ours": lambda s=student, t=teacher: ours(s, t),
            "ours with CE": lambda s=student, t=teacher, y=labels: ours(s, t, labels=y, ce_weight=1.0),
        }
        try:
            forms |= {name: lambda f=f, s=student, t=teacher: f(s, t) for name, f in liger().items()}
        except ImportError as error:
            results.append({"operator": "linear_kl", "what": "Liger-Kernel", "missing": str(error)})
        for name, form in forms.items():
            entry = {"operator": "linear_kl", "shape": SHAPE, "weights": what, "what": name, "floor_ms": floor}
            with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
                try:
                    entry |= both(form, student)
                except Exception as error:  # noqa: BLE001 a peer that fails is a finding
                    entry["failed"] = f"{type(error).__name__}: {error}"[:300]
            results.append(entry)
        for name in ("plain", "ours"):
            with torch.no_grad(), torch.autocast("cuda", torch.bfloat16, enabled=autocast):
                entry = {"operator": "linear_kl", "shape": SHAPE, "weights": what, "what": f"{name}, forward alone"}
                results.append(entry | {"ms": timed(forms[name]), "peak_memory_gb": extra_memory(forms[name]) / 1e9})
    return results


def errors(tokens: int = 512) -> list[dict]:
    """Relative errors of bfloat16 gradients against float64, the teacher's weights some part of theirs apart."""
    results: list[dict] = []
    for apart in (0.01, 0.1, 1.0):
        student, teacher, _ = draw(tokens)
        teacher = [student[0].detach(), (student[1].float() * (1 + apart * torch.randn_like(student[1]))).bfloat16()]
        teacher = [tensor.detach() for tensor in teacher]
        exact = [tensor.detach().double().requires_grad_() for tensor in student]
        expected = torch.autograd.grad(plain(exact, [tensor.double() for tensor in teacher]), exact)
        forms: dict[str, Callable[[list[Tensor], list[Tensor]], Tensor]] = {"plain": plain, "ours": ours}
        try:
            forms |= liger()
        except ImportError as error:
            results.append({"operator": "linear_kl", "what": "Liger-Kernel", "missing": str(error)})
        for name, form in forms.items():
            entry: dict = {"operator": "linear_kl", "what": f"errors of {name}", "teacher_apart": apart}
            try:
                found = torch.autograd.grad(form(student, teacher), student)
            except Exception as error:  # noqa: BLE001 a peer that fails is a finding
                results.append(entry | {"failed": f"{type(error).__name__}: {error}"[:300]})
                continue
            for gradient, ours_, theirs in zip(("dstates", "dweight"), found, expected, strict=True):
                entry[gradient] = ((ours_.double() - theirs).norm() / theirs.norm()).item()
            results.append(entry)
    return results


def sweep() -> list[dict]:
    """Blocks and warps of the kernel between the products, and sizes of chunks."""
    student, teacher, _ = draw()
    kept = linear_kl_triton.BLOCK, linear_kl_triton.WARPS, linear_kl_triton.LOGITS
    results = []
    for block, warps in ((2048, 8), (4096, 8), (4096, 16), (8192, 16), (8192, 32), (16384, 32)):
        linear_kl_triton.BLOCK, linear_kl_triton.WARPS = block, warps
        results.append({"block": block, "warps": warps} | both(lambda: ours(student, teacher), student))
    linear_kl_triton.BLOCK, linear_kl_triton.WARPS = kept[:2]
    for logits in (2**25, 2**26, 2**27, 2**28, 2**29):
        linear_kl_triton.LOGITS = logits
        chunk = linear_kl_triton.chunk_of(B * L, VOCABULARY)
        results.append({"tokens in a chunk": chunk} | both(lambda: ours(student, teacher), student))
    linear_kl_triton.LOGITS = kept[2]
    return results


if __name__ == "__main__":
    for result in [*measure(), *errors(), *sweep()]:
        print(json.dumps(result), flush=True)
