"""CALD's five modes at equal tokens: which student predicts held-out text best (docs/cald.md).

The teacher is a GPT-NeoX of half a million parameters, trained here on Python's standard library; its attention is
swapped for random Mamba mixers, as published, and every mode runs through `limbeck distill` with its own recipe and the
sizes below, from a Megatron token file (.idx and .bin) as Pythia's are. Three seeds each: of the mixers' start and of
the order of samples.

    OMP_NUM_THREADS=1 python benchmarks/cald_modes.py [FOLDER]

takes some minutes on two cores; a FOLDER that holds a part of it is gone on with.
"""

import json
import math
import os
import platform
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM
from transformers.utils.logging import disable_progress_bar

from limbeck.data import BatchSampler, MegatronWriter, TokenDataset, collate, micro_batches
from limbeck.demo.corpus import write_corpus
from limbeck.demo.folder import Folder
from limbeck.demo.teacher import teacher_config
from limbeck.distill import LogitsObjective, StageStep
from limbeck.evaluation import perplexity
from limbeck.files import replacing_folder
from limbeck.students import load_model, load_tokenizer
from limbeck.training import (
    Checkpoints,
    MetricsLog,
    load_learned,
    make_adamw,
    make_schedule,
    parameter_groups,
    train_stage,
)

RESULT = Path(__file__).parent / "results" / "cald_modes.json"
LENGTH, SAMPLES_PER_STEP, HELD_OUT = 256, 8, 128  # of the teacher
STUDENTS_SAMPLES = 4
TEACHER_STEPS, WAYPOINTS = 500, (200, 300, 400, 500)
STEPS, SWITCH, SEEDS = 150, 60, (0, 1, 2)  # the switch at 40 %, as published
MODES = ("unguided", "target-guided", "trajectory-guided", "waypoint-guided", "hybrid")
SETTINGS = {
    "precision": "float32",
    "tf32": "false",
    "data.sequence_length": LENGTH,
    "data.shuffle": "true",
    "data.samples": 10_000_000,  # all there are
    "mixer.d_inner": 240,  # 2.5 times the width, as for Pythia-1B
    "mixer.dt_rank": 6,
    "stages.layerwise.tokens_per_step": STUDENTS_SAMPLES * LENGTH,
    "stages.layerwise.micro_batch": STUDENTS_SAMPLES,
    "stages.layerwise.steps": STEPS,
    "stages.layerwise.decay": round(STEPS * 12_000 / 11_440),
    "stages.layerwise.lr": 3e-3,
    "stages.layerwise.min_lr": 3e-4,
    "stages.layerwise.checkpoint_every": 0.5,
}


def own_settings(mode: str, folder: Path) -> dict[str, object]:
    stage = "stages.layerwise"
    match mode:
        case "hybrid":
            return {f"{stage}.guidance_until": SWITCH}
        case "trajectory-guided":
            return {f"{stage}.teacher_lr": 3e-4}
        case "waypoint-guided":
            return {f"{stage}.waypoints": folder / "waypoints"}
    return {}


def train_teacher(folder: Folder) -> None:
    """Train the teacher from text, and keep steps of it on the way: the waypoints."""
    if (folder.path / "teacher").exists():
        return
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(teacher_config()).train()
    step = StageStep(model, LogitsObjective(kl_weight=0.0, ce_weight=1.0))
    dataset = TokenDataset(folder.tokens("training"), LENGTH)
    checkpoints = Checkpoints(folder.path / "training", stage="teacher", keep_for_good=lambda step: step in WAYPOINTS)
    with MetricsLog(folder.path / "training" / "metrics.jsonl") as metrics:
        train_stage(
            step,
            make_adamw(parameter_groups(step.named_parameters(), mixer_parameters=(), lr=4e-3)),
            stage="teacher",
            batches=micro_batches(dataset, BatchSampler(len(dataset), SAMPLES_PER_STEP, seed=0), SAMPLES_PER_STEP),
            schedule=make_schedule("wsd", total_steps=TEACHER_STEPS, peak=4e-3, warmup=0.05, decay=0.4),
            total_steps=TEACHER_STEPS,
            tokens_per_step=SAMPLES_PER_STEP * LENGTH,
            metrics=metrics,
            checkpoints=checkpoints,
        )
    tokenizer = load_tokenizer(folder.path / "tokenizer")
    for number in WAYPOINTS:
        load_learned(step, folder.path / "training" / f"step-{number:08d}")
        with replacing_folder(folder.path / "waypoints" / f"step-{number}") as work:
            model.save_pretrained(work)
    with replacing_folder(folder.path / "teacher") as work:
        model.save_pretrained(work)
        tokenizer.save_pretrained(work)


def token_file(folder: Folder) -> Path:
    """Write the training text as a Megatron token file, one stored sequence to a document; its prefix."""
    prefix = folder.path / "corpus" / "document"
    if not prefix.with_suffix(".idx").exists():
        tokens = folder.tokens("training")
        with MegatronWriter(prefix, vocab_size=teacher_config().vocab_size) as writer:
            for document in np.split(tokens, np.flatnonzero(tokens == teacher_config().eos_token_id) + 1):
                if len(document):
                    writer.add(document)
    return prefix


def distil(folder: Folder, mode: str, seed: int) -> Path:
    """Run `limbeck distill` in a process of its own."""
    output = folder.path / f"{mode}-{seed}"
    settings = SETTINGS | own_settings(mode, folder.path) | {"student.seed": seed, "data.seed": seed}
    changes = [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]
    given = ["--teacher", folder.path / "teacher", "--data", folder.path / "corpus" / "document", "--output", output]
    command = ["distill", f"cald-{mode}", *given]
    done = subprocess.run(
        [sys.executable, "-m", "limbeck_cli", *map(str, command), *changes, "--device", "cpu"],
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise SystemExit(f"{mode}, seed {seed}:\n{done.stderr}")
    print(f"{mode}, seed {seed} is done", file=sys.stderr)
    return output / "student"


def held_out_perplexity(folder: Folder, model: Path) -> float:
    dataset = TokenDataset(folder.tokens("held-out"), LENGTH)
    spread = np.linspace(0, len(dataset) - 1, HELD_OUT).astype(int)
    batches = [collate(dataset, spread[start : start + 16]) for start in range(0, HELD_OUT, 16)]
    return perplexity(load_model(model), batches).perplexity


def main() -> None:
    started = time.monotonic()
    disable_progress_bar()
    torch.set_num_threads(1)
    folder = Folder(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/cald-modes"))
    folder.path.mkdir(parents=True, exist_ok=True)
    write_corpus(folder, seed=0)
    train_teacher(folder)
    token_file(folder)
    tasks = [(mode, seed) for seed in SEEDS for mode in MODES]
    with ThreadPoolExecutor(2) as pool:
        students = dict(zip(tasks, pool.map(lambda task: distil(folder, *task), tasks), strict=True))
    found = {mode: [held_out_perplexity(folder, students[mode, seed]) for seed in SEEDS] for mode in MODES}
    result = {
        "machine": {"processor": platform.processor() or platform.machine(), "torch": torch.__version__},
        "settings": {key: str(value) for key, value in SETTINGS.items()},
        "tokens": STEPS * STUDENTS_SAMPLES * LENGTH,
        "seeds": SEEDS,
        "teacher": held_out_perplexity(folder, folder.path / "teacher"),
        "perplexity": found,
        "seconds": round(time.monotonic() - started),
    }
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps(result, indent=2) + "\n")
    print(f"| mode | held-out perplexity, mean of {len(SEEDS)} seeds | lowest – highest | against unguided |")
    print("|---|---|---|---|")
    for mode, values in found.items():
        ratios = [math.log(value / base) for value, base in zip(values, found["unguided"], strict=True)]
        gain = math.expm1(statistics.fmean(ratios))
        print(f"| {mode} | {statistics.fmean(values):.2f} | {min(values):.2f} – {max(values):.2f} | {gain:+.1%} |")
    print(f"\nteacher {result['teacher']:.2f}; {result['seconds']} s")


if __name__ == "__main__":
    main()
