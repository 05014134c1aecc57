"""A teacher on disk beside the teacher itself: what an update costs, and what the truncation to k tokens changes.

    python benchmarks/teacher_cache.py        # writes benchmarks/results/teacher_cache.json; some minutes

A small GPT-NeoX is trained on the standard library's source, so that its predictions are as sharp as a language
model's. Then students of it, all from one start, learn from the same samples in the same order: one from the teacher,
the others from caches of k tokens. They take turns, update by update, on one thread of a CPU in float32; times are
processor time, the median over updates. "kl" is each one's own loss, "kl of the whole" the divergence from the live
teacher, on held-out samples and over the whole vocabulary.
"""

import json
import platform
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, GPTNeoXConfig

from limbeck import convert
from limbeck.data import (
    BatchSampler,
    Samples,
    TokenDataset,
    collate,
    encode_documents,
    micro_batches,
    read_documents,
    split_samples,
    standard_library_files,
)
from limbeck.demo import train_tokenizer
from limbeck.distill import Keeping, LogitsObjective, StageStep, TeacherCache, write_teacher_cache
from limbeck.evaluation import agreement
from limbeck.progress import say

RESULT = Path(__file__).parent / "results" / "teacher_cache.json"
VOCABULARY, LENGTH, BATCH = 4096, 128, 8
TEACHER_UPDATES, UPDATES = 300, 24
KS = (8, 64, 512, VOCABULARY)


def updated(step: StageStep, batch: dict[str, torch.Tensor], optimizer: torch.optim.Optimizer) -> float:
    """One update; its loss."""
    loss = step(batch)["loss"]
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(step.parameters(), 1.0)
    optimizer.step()
    return loss.item()


def trained_teacher(samples: Samples) -> Any:
    """A teacher that has read a little."""
    config = GPTNeoXConfig(
        vocab_size=VOCABULARY,
        hidden_size=192,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=768,
        max_position_embeddings=LENGTH,
    )
    teacher = AutoModelForCausalLM.from_config(config)
    step = StageStep(teacher, LogitsObjective(kl_weight=0.0, ce_weight=1.0))
    optimizer = torch.optim.AdamW(teacher.parameters(), lr=2e-3)
    batches = micro_batches(samples, BatchSampler(len(samples), BATCH, seed=1), BATCH)
    losses = [updated(step, batches(number)[0], optimizer) for number in range(TEACHER_UPDATES)]
    say(f"the teacher's loss: {losses[0]:.2f} → {losses[-1]:.2f}")
    return teacher.eval()


def cached(folder: Path, teacher: Any, samples: Samples, k: int) -> tuple[TeacherCache, dict[str, Any]]:
    """A cache of k tokens, and what it costs."""
    start = time.process_time()
    about = {"teacher": "trained here", "fingerprint": {}, "data": "the standard library"}
    stored = "float32" if k == VOCABULARY else "float16"
    cache = write_teacher_cache(
        folder / str(k),
        teacher,
        lambda numbers: collate(samples, numbers),
        samples=BATCH * UPDATES,
        about=about,
        keeping=Keeping(k, stored=stored),
    )
    seconds, tokens = time.process_time() - start, BATCH * UPDATES * LENGTH
    size = sum(about["bytes"] for about in cache.manifest["files"].values())
    rest = np.exp(np.load(cache.folder / "shard-00000.npy")["log_rest"]).mean()
    about = {"stored": stored, "bytes_per_token": round(size / tokens), "mass_left_out": round(float(rest), 4)}
    return cache, about | {"seconds_to_make": round(seconds, 1)}


def main() -> None:
    """Measure, and write the result."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    files = standard_library_files()[::12]
    documents = list(read_documents(files))
    tokenizer = train_tokenizer(documents, VOCABULARY)
    samples, held_out = split_samples(TokenDataset(encode_documents(tokenizer, documents, 0), LENGTH), 0.02)
    teacher = trained_teacher(samples)
    start = convert(teacher, mixer="discrete-mamba2").state_dict()

    ways: dict[str, Any] = {}
    steps: dict[str, tuple[StageStep, Any, torch.optim.Optimizer]] = {}
    sampler = BatchSampler(BATCH * UPDATES, BATCH, seed=0)
    with tempfile.TemporaryDirectory() as folder:
        for k in (None, *KS):
            name = "teacher" if k is None else f"k = {k}"
            student = convert(teacher, mixer="discrete-mamba2")
            student.load_state_dict(start)
            cache, ways[name] = (None, {}) if k is None else cached(Path(folder), teacher, samples, k)
            objective = LogitsObjective(cached_vocabulary=None if k is None else VOCABULARY)
            complete = None if cache is None else lambda _, indices, batch, cache=cache: cache.rows(indices, batch)
            batches = micro_batches(samples, sampler, BATCH, complete=complete)
            step = StageStep(student, objective, teacher if k is None else None)
            steps[name] = (step, batches, torch.optim.AdamW(student.parameters(), lr=1e-3))
        losses: dict[str, list[float]] = {name: [] for name in steps}
        times: dict[str, list[float]] = {name: [] for name in steps}
        for number in range(UPDATES):
            for name, (step, batches, optimizer) in steps.items():
                began = time.process_time()
                losses[name].append(updated(step, batches(number)[0], optimizer))
                times[name].append(time.process_time() - began)
            say(f"update {number + 1}: " + "  ".join(f"{name} {values[-1]:.4f}" for name, values in losses.items()))
    unseen = [collate(held_out, range(BATCH))]
    live = statistics.median(times["teacher"])
    for name, (step, _, _) in steps.items():
        seconds = statistics.median(times[name])
        ways[name] |= {
            "seconds_per_update": round(seconds, 3),
            "times_faster": round(live / seconds, 2),
            "kl_first": losses[name][0],
            "kl_last": losses[name][-1],
            "kl_of_the_whole_held_out": agreement(step.student, teacher, unseen).kl,
            "largest_difference_of_kl": max(abs(a - b) for a, b in zip(losses[name], losses["teacher"], strict=True)),
        }
    about = {"torch": torch.__version__, "machine": platform.machine(), "threads": 1, "vocabulary": VOCABULARY}
    about |= {"sequence_length": LENGTH, "samples_per_update": BATCH, "updates": UPDATES}
    RESULT.write_text(json.dumps({"about": about, "ways": ways}, indent=1) + "\n")


if __name__ == "__main__":
    main()
