"""Generation at Phi-1.5's size on a GPU: decode and prefill of a student beside its teacher; and the demo's on a CPU.

    python benchmarks/generation.py            # some two minutes on one H200; writes benchmarks/results/generation.json
    python benchmarks/generation.py --profile  # the kernels of one token instead, as a table
    python benchmarks/generation.py --cpu      # the demo's student; writes benchmarks/results/generation_cpu.json

Weights are random, made on the device from a configuration, in bfloat16 on the GPU. "decode" is tokens per second of
all rows after the prompt, from the graph's first replay on; "generate" has the prompt in it, ours and Hugging Face's.
On the CPU the prompt is in it too, and the fastest of five turns counts, since other work shares the two cores.
"""

import argparse
import gc
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, PhiConfig

import limbeck
from limbeck.demo.teacher import teacher_config
from limbeck.generation import Decoder, Sampling

RESULTS = Path(__file__).parent / "results"
PROMPT, NEW = 512, 128
HYBRID = (4, 10, 16, 22)
PREFILLS = (2048, 32768, 131072)
START = time.perf_counter()


def phi() -> PhiConfig:
    return PhiConfig(
        vocab_size=51200,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=24,
        num_attention_heads=32,
        max_position_embeddings=2**18,
        bos_token_id=None,
        eos_token_id=None,
    )


def teacher() -> Any:
    with torch.device("cuda"):
        return AutoModelForCausalLM.from_config(phi(), dtype=torch.bfloat16, attn_implementation="sdpa").eval()


def student(keep_attention: tuple[int, ...] = ()) -> Any:
    return limbeck.convert(teacher(), init="random", keep_attention=keep_attention)


def say(name: str, found: Any) -> None:
    print(f"{time.perf_counter() - START:6.1f} s  {name}: {found}", flush=True)


def clocked(run: Callable[[], object]) -> float:
    torch.cuda.synchronize()
    begin = time.perf_counter()
    run()
    torch.cuda.synchronize()
    return time.perf_counter() - begin


def ready(model: Any, batch: int, context: int, sampling: Sampling | None = None, room: int = 512) -> Decoder:
    """A decoder whose graph was captured."""
    ids = torch.randint(51200, (batch, context), device="cuda")
    decoder = Decoder(model, ids, max_new_tokens=room, sampling=sampling)
    tokens = decoder.tokens()
    while decoder.graph is None:
        next(tokens)
    return decoder


def decode(
    model: Any, batch: int, context: int, sampling: Sampling | None = None, steps: int = 128
) -> dict[str, float]:
    torch.cuda.reset_peak_memory_stats()
    begin = time.perf_counter()
    decoder = ready(model, batch, context, sampling)
    torch.cuda.synchronize()
    before = time.perf_counter() - begin

    def some() -> None:
        for _ in range(steps):
            decoder.step()

    seconds = statistics.median(clocked(some) for _ in range(3)) / steps
    return {
        "tokens_per_second": round(batch / seconds),
        "step_ms": round(1e3 * seconds, 4),
        "prompt_and_capture_seconds": round(before, 3),
        "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2),
    }


def whole(model: Any, batch: int) -> dict[str, float]:
    """Prompt and new tokens with `Decoder`, all that a user waits for; the second time."""
    ids = torch.randint(51200, (batch, PROMPT), device="cuda")
    seconds = min(clocked(lambda: Decoder(model, ids, max_new_tokens=NEW).run()) for _ in range(2))
    return {"tokens_per_second": round(batch * NEW / seconds), "seconds": round(seconds, 3)}


def hugging_face(model: Any, batch: int) -> dict[str, float]:
    ids = torch.randint(51200, (batch, PROMPT), device="cuda")
    options = {"attention_mask": torch.ones_like(ids), "do_sample": False, "pad_token_id": 0}
    model.generate(ids, max_new_tokens=4, **options)
    seconds = clocked(lambda: model.generate(ids, max_new_tokens=NEW, **options))
    return {"tokens_per_second": round(batch * NEW / seconds), "seconds": round(seconds, 3)}


@torch.no_grad()
def prefill(model: Any, context: int) -> dict[str, float]:
    ids = torch.randint(51200, (1, context), device="cuda")

    def read() -> None:
        model(ids, use_cache=True, logits_to_keep=1)

    read()
    torch.cuda.reset_peak_memory_stats()
    seconds = statistics.median(clocked(read) for _ in range(3))
    peak = torch.cuda.max_memory_allocated() / 2**30
    return {"tokens_per_second": round(context / seconds), "ms": round(1e3 * seconds, 2), "peak_gib": round(peak, 2)}


def profile(model: Any, batch: int) -> str:
    """The kernels of one token, with how often and how long each runs."""
    decoder, steps = ready(model, batch, PROMPT), 20
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as found:
        for _ in range(steps):
            decoder.step()
        torch.cuda.synchronize()
    kernels = [event for event in found.key_averages() if event.device_time_total > 0]
    kernels.sort(key=lambda event: -event.device_time_total)
    total = sum(event.device_time_total for event in kernels) / steps
    lines = [f"batch {batch}: {total:.0f} us of kernels, {sum(e.count for e in kernels) / steps:.0f} launches a token"]
    lines += [f"{e.device_time_total / steps:9.1f} us {e.count / steps:7.1f} x  {e.key[:110]}" for e in kernels[:40]]
    return "\n".join(lines)


def on_gpu(profiled: bool) -> None:
    torch.manual_seed(0)
    machine = {
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    result: dict[str, Any] = {"machine": machine, "prompt": PROMPT, "new_tokens": NEW}
    model = student()
    if profiled:
        text = "\n\n".join(profile(model, batch) for batch in (1, 64))
        print(text, flush=True)
        RESULTS.joinpath("generation_profile.txt").write_text(text + "\n")
        return

    def note(part: str, name: str, found: dict[str, float]) -> None:
        result.setdefault(part, {})[name] = found
        say(f"{part}, {name}", found)
        gc.collect()
        torch.cuda.empty_cache()

    drawn = Sampling(temperature=0.8, top_k=50, top_p=0.95, repetition_penalty=1.1)
    for batch in (1, 64):
        note("student", f"decode b {batch}, context 512", decode(model, batch, PROMPT))
        note("student", f"generate b {batch}, context 512", whole(model, batch))
        note("student", f"decode b {batch}, context 512, drawn", decode(model, batch, PROMPT, drawn))
    note("student", "decode b 1, context 65536", decode(model, 1, 65536))
    for context in PREFILLS:
        note("student", f"prefill {context}", prefill(model, context))
    del model
    model = student(HYBRID)
    note("hybrid", "decode b 1, context 512", decode(model, 1, PROMPT))
    note("hybrid", "decode b 64, context 512", decode(model, 64, PROMPT))
    note("hybrid", "decode b 1, context 65536", decode(model, 1, 65536))
    del model
    model = teacher()
    for batch in (1, 64):
        note("teacher", f"decode b {batch}, context 512", decode(model, batch, PROMPT))
        note("teacher", f"Hugging Face generate b {batch}, context 512", hugging_face(model, batch))
    for context in PREFILLS:
        note("teacher", f"prefill {context}", prefill(model, context))
    result["seconds"] = round(time.perf_counter() - START, 1)
    write(RESULTS / "generation.json", result)


def on_cpu() -> None:
    torch.manual_seed(0)
    model: Any = limbeck.convert(AutoModelForCausalLM.from_config(teacher_config()).eval())
    result: dict[str, Any] = {
        "machine": {
            "processor": platform.processor() or platform.machine(),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "prompt": 64,
        "new_tokens": 256,
    }
    for batch in (1, 8):
        ids = torch.randint(1, 512, (batch, 64))
        options = {"attention_mask": torch.ones_like(ids), "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
        runs: dict[str, Callable[[int], object]] = {
            "hugging_face": lambda new, ids=ids, options=options: model.generate(ids, max_new_tokens=new, **options),
            "limbeck": lambda new, ids=ids: Decoder(model, ids, max_new_tokens=new).run(),
        }
        times: dict[str, list[float]] = {name: [] for name in runs}
        for number in range(6):  # turn and turn about, so that both meet the same machine
            for name, run in runs.items():
                begin = time.perf_counter()
                run(256 if number else 8)
                times[name].append(time.perf_counter() - begin)
        found = {name: round(batch * 256 / min(taken[1:])) for name, taken in times.items()}
        entry = {"tokens_per_second": found, "ratio": round(found["limbeck"] / found["hugging_face"], 2)}
        result[f"batch {batch}"] = entry
        say(f"batch {batch}", entry)
    write(RESULTS / "generation_cpu.json", result)


def write(path: Path, result: dict[str, Any]) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--cpu", action="store_true")
    parser.add_argument("--profile", action="store_true")
    arguments = parser.parse_args()
    on_cpu() if arguments.cpu else on_gpu(arguments.profile)
