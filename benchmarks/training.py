"""Whole training steps on one GPU at the sizes of the published systems, beside their peers.

    python benchmarks/training.py                        # everything; writes results/training.json and, for our own
                                                         # steps, where the time goes: results/training_profile.txt
    python benchmarks/training.py "student" "stage 1"    # these

Weights are random and made on the device from configurations of Phi-1.5's and Pythia-1B's sizes. A step is what a run
does: teacher, student, backward, clip, AdamW; float32 weights, bfloat16 autocast, and tf32 where a product of float32
is left, for all alike. "use" is the part of the card's matrix product, measured beside it, that the step's arithmetic
comes to, as `limbeck plan` counts it.
"""

import gc
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import training_peers as peers
from timing import copy_bandwidth, matmul_rate
from torch.utils._python_dispatch import TorchDispatchMode
from training_peers import Batch, Update
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, PhiConfig, PhiForCausalLM, PreTrainedModel

import limbeck
from limbeck.distill import GuidedStep, StageStep, TargetGuide, make_objective, mixer_parameters
from limbeck.plan.arithmetic import flops_of
from limbeck.students import blocks
from limbeck.students.activations import fuse_activations
from limbeck.training import World, make_adamw, parameter_groups
from limbeck.training.parallel import Replicas
from limbeck.training.update import accumulate, apply

RESULTS = Path(__file__).with_name("results")
WARM_UP, SECONDS = 2, 4.0
DEVICE = torch.device("cuda")


def phi() -> PreTrainedModel:
    """A teacher of Phi-1.5's size, bfloat16."""
    config = PhiConfig(
        vocab_size=51200, hidden_size=2048, intermediate_size=8192, num_hidden_layers=24, num_attention_heads=32,
        partial_rotary_factor=0.5, max_position_embeddings=2048,
    )  # fmt: skip
    return made(PhiForCausalLM, config)


def pythia() -> PreTrainedModel:
    """A teacher of Pythia-1B's size, bfloat16."""
    config = GPTNeoXConfig(
        vocab_size=50304, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=8,
        rotary_pct=0.25, max_position_embeddings=2048,
    )  # fmt: skip
    return made(GPTNeoXForCausalLM, config)


def made(kind: type[PreTrainedModel], config: object, dtype: torch.dtype = torch.bfloat16) -> PreTrainedModel:
    """A model with random weights on the device."""
    with DEVICE:
        return kind(config).to(dtype)


def random_tokens(b: int = 4, l: int = 2048) -> Batch:
    """Random tokens, and those that follow them."""
    tokens = torch.randint(0, 50000, (b, l + 1), device=DEVICE)
    return {"input_ids": tokens[:, :-1].contiguous(), "labels": tokens[:, 1:].contiguous()}


def ours(teacher: PreTrainedModel, batch: Batch, objective: str, compiled: bool = False, **options: Any) -> Update:
    """One update of a stage, as a run makes it."""
    mamba = objective == "layerwise"
    student = limbeck.convert(
        teacher,
        mixer="mamba" if mamba else "discrete-mamba2",
        init="random" if mamba else "identity",
        mixer_kwargs={"d_inner": 5120, "dt_rank": 160} if mamba else {},
    )
    fuse_activations(teacher)
    student = student.float().train()
    if compiled:
        for block in (*blocks(student), *blocks(teacher)):
            block.compile(dynamic=False)
    goal = make_objective(objective, **options)
    step: StageStep
    if mamba:
        step = GuidedStep(student, goal, TargetGuide(lambda: teacher, 1))
        step.enter(0)
    else:
        step = StageStep(student, goal, teacher if goal.needs_teacher else None)
    mixer_born = {f"student.{name}" for name in mixer_parameters(student)}
    optimizer = make_adamw(parameter_groups(step.named_parameters(), mixer_parameters=mixer_born, lr=1e-4))

    module = Replicas(step, World.alone(DEVICE))
    module.prepare()

    def update() -> None:
        accumulate(module, [batch], DEVICE, torch.bfloat16)
        apply(optimizer, 1e-4, 1.0)

    return update


CASES: dict[str, tuple[int, Callable[[Batch], Update]]] = {
    "student": (4, lambda batch: ours(phi(), batch, "logits", kl_weight=0.0, ce_weight=1.0)),
    "student compiled": (4, lambda batch: ours(phi(), batch, "logits", True, kl_weight=0.0, ce_weight=1.0)),
    "stage 1": (4, lambda batch: ours(phi(), batch, "matrix")),
    "stage 2": (4, lambda batch: ours(phi(), batch, "hidden")),
    "stage 3": (4, lambda batch: ours(phi(), batch, "logits")),
    "stage 3 compiled": (4, lambda batch: ours(phi(), batch, "logits", True)),
    "CALD": (8, lambda batch: ours(pythia(), batch, "layerwise")),
    "Hugging Face Phi": (4, lambda batch: peers.on_text(phi().float().train(), batch)),
    "phi-mamba": (4, lambda batch: peers.on_text(peers.phi_mamba(), batch)),
    "mohawk stage 1": (1, lambda batch: peers.mohawk_stage1(phi(), batch, at_once=True)),
    "phi-mamba stage 1, layer by layer": (4, lambda batch: peers.mohawk_stage1(phi(), batch, at_once=False)),
    "mohawk stage 2": (4, lambda batch: peers.mohawk_stage2(phi(), batch)),
    "mohawk stage 3": (4, lambda batch: peers.mohawk_stage3(phi(), batch)),
    "CALD, mamba_ssm's scan": (8, lambda batch: peers.cald(pythia(), batch, kernels=True)),
    "CALD, transformers' fallback": (1, lambda batch: peers.cald(pythia(), batch, kernels=False)),
}
"""Samples of an update, and what makes it."""


OURS = [name for name in CASES if name.startswith(("student", "stage", "CALD")) and "," not in name]


def measure(update: Update, tokens: int) -> dict[str, float]:
    """Tokens per second of a step and the most memory that it holds."""
    begin = time.perf_counter()
    for _ in range(WARM_UP):
        update()
    torch.cuda.synchronize()
    ready = time.perf_counter()
    torch.cuda.reset_peak_memory_stats()
    seconds: list[float] = []
    while sum(seconds) < SECONDS and len(seconds) < 8:
        start = time.perf_counter()
        update()
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    step = statistics.median(seconds)
    return {
        "tokens": tokens,
        "tokens_per_second": tokens / step,
        "step_ms": step * 1e3,
        "peak_memory_gb": torch.cuda.max_memory_allocated() / 1e9,
        "cold_start_s": ready - begin,
    }


class Arithmetic(TorchDispatchMode):
    """Counts the floating-point operations of what runs inside."""

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        self.flops += flops_of(func._schema.name, func, args, kwargs, out)
        return out


def profile(update: Update) -> str:
    """A table of the kernels of one step."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as found:
        update()
        torch.cuda.synchronize()
    rows = sorted(found.key_averages(), key=lambda row: -row.device_time_total)
    total = sum(row.device_time_total for row in rows)
    lines = [f"{row.device_time_total / 1e3:9.2f} ms  {row.count:5d} x  {row.key[:120]}" for row in rows[:40]]
    return "\n".join([f"{total / 1e3:9.2f} ms in all", *lines])


def free() -> None:
    """Let go of the last case's tensors."""
    gc.collect()
    torch.cuda.empty_cache()


def main(names: list[str]) -> None:
    """Measure cases; what one cannot do is its result."""
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    steps: dict[str, Any] = {}
    tables: list[str] = []
    ceilings = {
        "card": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "copy_bytes_per_second": copy_bandwidth(),
        "bf16_matmul_per_second": matmul_rate(),
    }
    for name in names or CASES:
        try:
            torch.manual_seed(0)
            samples, make = CASES[name]
            batch = random_tokens(samples)
            update = make(batch)
            steps[name] = measure(update, batch["input_ids"].numel())
            if name in OURS:
                tables.append(f"{name}\n{profile(update)}")
            if name in OURS and "compiled" not in name:
                with Arithmetic() as counted:
                    update()
                use = counted.flops / (steps[name]["step_ms"] / 1e3) / ceilings["bf16_matmul_per_second"]
                steps[name] |= {"flops": counted.flops, "use": use}
        except Exception as error:  # noqa: BLE001 (a peer that does not run is a result)
            steps[name] = f"not measured: {type(error).__name__}: {error}"[:300]
        update = batch = None
        free()
        print(name, json.dumps(steps[name]), flush=True)
        (RESULTS / "training.json").write_text(json.dumps(ceilings | {"steps": steps}, indent=1) + "\n")
        (RESULTS / "training_profile.txt").write_text("\n\n".join(tables) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
