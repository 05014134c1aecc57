"""Folders of runs and demos, made by hand: every file that a report can read, and no model."""

import json
import math

LONG = 400  # updates of the last stage


def make_run(folder, *, evaluation=True, sealed=True):
    """A run of two stages, the second a long one, with all that can be measured."""
    folder.mkdir(parents=True)
    (folder / "run.json").write_text(
        json.dumps({"teacher": {"path": "/models/<teacher>"}, "data": {"path": "/text"}, "recipe": {}})
    )
    (folder / "recipe.toml").write_text(RECIPE)
    lines = [
        {"stage": "matrix", "step": n, "tokens": 64 * n, "loss": 90 / n, "matrix_per_layer": 45 / n, "lr": 0.1}
        for n in range(1, 21)
    ]
    lines.append({"stage": "logits", "step": 0, "tokens": 0, **held_out(4.0)})
    for n in range(1, LONG + 1):
        loss = 0.2 + math.exp(-n / 80) + 0.05 * math.sin(n * 7.1)
        lines.append({"stage": "logits", "step": n, "tokens": 64 * n, "loss": loss, "kl": loss, "lr": 0.1})
        if n % 100 == 0:
            lines.append({"stage": "logits", "step": n, "tokens": 64 * n, **held_out(3.5 - n / 1000)})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"stage": "lo')
    if sealed:
        for index, stage in enumerate(("matrix", "logits"), start=1):
            seal = {"stage": stage, "weights_of_step": 200 if stage == "logits" else 20, "learns": LEARNS}
            write(folder / f"stages/{index}-{stage}/student/stage.json", {**seal, "environment": ENVIRONMENT})
        conversion = {"mixer": "discrete-mamba2", "swapped_layers": [0, 2], "kept_attention": [1]}
        write(folder / "stages/0-converted/student/conversion.json", conversion)
    if evaluation:
        for name, found in EVALUATION.items():
            write(folder / "evaluation" / f"{name}.json", found)
    return folder


def make_demo(folder):
    """A demo of two seeds."""
    make_run(folder / "seed-0/mohawk", evaluation=False)
    rows = {"unigram": [220.0], "without attention": [48.0], "teacher": [31.0]}
    students = {"student, converted": [110.0, 111.0], "student, after logits": [34.0, 33.0]}
    control = {"control, logits only": [33.5, 33.1]}
    results = {
        "perplexity": {**rows, **students, **control},
        "gap_closed": {"student, after logits": [0.84, 0.88]},
        "agreement": {"top1": [0.7, 0.71], "kl": [0.1, 0.09]},
        "samples": [{"prompt": "def <b>", "teacher": "\n    return a & b", "student": "x = 1\n"}],
    }
    write(folder / "results.json", results)
    return folder


def write(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def held_out(nll):
    return {"eval_loss": nll, "eval_perplexity": math.exp(nll), "eval_kl": nll / 8, "eval_top1": 1 / nll}


RECIPE = """name = "small"
description = "Two stages, for a test."

[student]
mixer = "discrete-mamba2"

[stages.matrix]
objective = "matrix"
tokens = 1280
tokens_per_step = 64
expect = { start = [40.0, 50.0], end = [2.0, 3.0] }

[stages.logits]
objective = "logits"
tokens = 25600
tokens_per_step = 64
"""

LEARNS = [
    {"name": "mixer, decay", "tensors": 4, "parameters": 12345, "lr": 0.001, "weight_decay": 0.1},
    {"name": "frozen", "tensors": 9, "parameters": 99000, "lr": None, "weight_decay": None},
]
ENVIRONMENT = {"limbeck": "0.1", "python": "3.12.1", "torch": "2.13.0", "device": "cpu (x86_64, 2 threads)"}


def matrix(size, sign=1.0):
    return [[sign * math.exp(-(i - j) / 6) if j <= i else 0.0 for j in range(size)] for i in range(size)]


def points(slope):
    return [
        {
            "context": context,
            "batch": batch,
            "prefill_tokens_per_second": 9000.0 / (1 + slope * context / 4096),
            "first_token_seconds": context / 9000,
            "decode_tokens_per_second": 400.0 / (1 + slope * context / 4096),
            "step_seconds": 0.0025 * (1 + slope * context / 4096),
            "cache_bytes": int(200_000 + slope * context * 400),
            "peak_bytes": None,
        }
        for context in (128, 512, 2048, 8192, 16384)
        for batch in (1, 8)
    ]


def answers(good):
    needle = [
        {"task": "needle", "length": length, "depth": depth, "correct": round(50 * good ** (n + 1)), "count": 50}
        for n, length in enumerate((256, 512, 1024, 2048))
        for depth in (0.0, 0.25, 0.5, 0.75, 1.0)
    ]
    copy = [
        {"task": "copy", "length": length, "depth": None, "correct": round(50 * good), "count": 50}
        for length in (64, 128, 256)
    ]
    return [{**result, "chance": 0.02} for result in needle + copy]


EVALUATION = {
    "bench": {
        "models": [
            {"name": "teacher", "role": "teacher", "device": "cpu", "dtype": "float32", "points": points(4.0)},
            {"name": "student", "role": "student", "device": "cpu", "dtype": "float32", "points": points(0.0)},
            {"name": "hybrid <1>", "role": "student", "device": "cpu", "dtype": "float32", "points": points(1.0)},
        ]
    },
    "recall": {
        "models": [
            {"name": "teacher", "role": "teacher", "results": answers(0.98)},
            {"name": "student", "role": "student", "results": answers(0.75)},
        ]
    },
    "inspect": {
        "tokens": [str(n) for n in range(48)],
        "layers": [
            {
                "layer": layer,
                "heads": [
                    {
                        "head": head,
                        "distance": 1.0 + head + layer,
                        "decay_length": 6.0 if head else None,
                        "teacher": matrix(48),
                        "student": matrix(48, -1.0 if head == 1 else 1.0),
                    }
                    for head in range(3)
                ],
            }
            for layer in (0, 2)
        ],
    },
    "text": {
        "model": "student",
        "perplexity": 33.0,
        "by_position": [
            {"from": 32 * n, "to": 32 * n + 31, "kl": 0.2 / (n + 1), "top1": 0.6 + 0.02 * n, "nll": 3.5 - 0.1 * n}
            for n in range(8)
        ],
    },
}
