"""Peak memory of `limbeck convert`, beside the largest of one shard and the student's own mixers.

    python benchmarks/convert_memory.py     # writes benchmarks/results/convert_memory.json; needs 6 GB of disk, Linux

A Llama checkpoint with random weights is written shard by shard, then converted by the command line's own function
in a process of its own. Peak memory is what the kernel counts (VmHWM), mapped pages of files included, above what the
process held after its imports (VmRSS).
"""

import argparse
import gc
import json
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, LlamaConfig

RESULT = Path(__file__).parent / "results" / "convert_memory.json"
LIMIT = 1.3

CONVERT = """
import json, sys
import limbeck_cli, limbeck, limbeck.students

def kilobytes(name):
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith(name))

with open("/proc/self/clear_refs", "w") as file:
    file.write("5")  # the peak starts anew
imports = kilobytes("VmRSS")
try:
    limbeck_cli.app(sys.argv[1:], standalone_mode=False)
finally:
    print("peak", imports << 10, kilobytes("VmHWM") << 10)
"""


def write_teacher(folder: Path, config: LlamaConfig, shard_bytes: int, kind: str) -> None:
    """Write random weights in bfloat16, one shard in memory at a time."""
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    shards: list[list[str]] = [[]]
    filled = 0
    for name, tensor in model.state_dict().items():
        if shards[-1] and filled + tensor.nbytes > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += tensor.nbytes
    folder.mkdir(parents=True)
    config.dtype = torch.bfloat16
    config.save_pretrained(folder)
    stem, suffix = ("model", "safetensors") if kind == "safetensors" else ("pytorch_model", "bin")
    weight_map = {}
    for number, names in enumerate(shards, 1):
        file = f"{stem}-{number:05}-of-{len(shards):05}.{suffix}"
        state = model.state_dict()
        weights = {name: torch.empty(state[name].shape, dtype=torch.bfloat16).normal_(std=0.02) for name in names}
        if kind == "safetensors":
            save_file(weights, folder / file, metadata={"format": "pt"})
        else:
            torch.save(weights, folder / file)
        weight_map |= dict.fromkeys(names, file)
        del weights
        gc.collect()
    (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def measure(teacher: Path, student: Path, *options: str, program: str = CONVERT) -> dict[str, Any]:
    """Convert in a process of its own; bytes."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", program, "convert", str(teacher), str(student), *options]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise RuntimeError(done.stderr)
    imports, peak = (int(number) for number in done.stdout.splitlines()[-1].split()[1:])
    mixers = sum(size for key, size in _sizes(student).items() if ".mixer." in key)
    shards = [file.stat().st_size for file in teacher.iterdir() if file.suffix in (".safetensors", ".bin")]
    return {
        "checkpoint": sum(shards),
        "shards": len(shards),
        "largest_shard": max(shards),
        "mixers": mixers,
        "imports": imports,
        "peak_above_imports": peak - imports,
        "ratio": round((peak - imports) / max(max(shards), mixers), 4),
    }


def _sizes(folder: Path) -> dict[str, int]:
    """Bytes of every tensor in a folder, from the headers."""
    sizes = {}
    for file in folder.glob("*.safetensors"):
        with file.open("rb") as stream:
            header = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
        header.pop("__metadata__", None)
        sizes |= {key: entry["data_offsets"][1] - entry["data_offsets"][0] for key, entry in header.items()}
    return sizes


def llama(width: int, layers: int, vocabulary: int) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        num_key_value_heads=max(width // 256, 1),
        tie_word_embeddings=False,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--folder", type=Path, default=None, help="where the checkpoints go; by default a temporary one"
    )
    arguments = parser.parse_args()
    config = llama(2048, 18, 32000)
    cases: dict[str, tuple[str, int, tuple[str, ...]]] = {
        "safetensors, all layers, from attention": ("safetensors", 500 << 20, ()),
        "safetensors, all layers, at random": ("safetensors", 500 << 20, ("--init", "random")),
        "safetensors in one shard, two layers": (
            "safetensors",
            1 << 40,
            ("--keep-attention", ",".join(map(str, range(2, 18)))),
        ),
        ".bin, all layers, from attention": ("bin", 500 << 20, ()),
    }
    result: dict[str, Any] = {
        "machine": {
            "processor": platform.processor() or platform.machine(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "unit": "bytes",
        "limit_of_ratio": LIMIT,
        "teacher": "Llama, bfloat16, width 2048, 18 layers",
        "cases": {},
    }
    for case, (kind, shard_bytes, options) in cases.items():
        with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
            write_teacher(Path(folder) / "teacher", config, shard_bytes, kind)
            found = measure(Path(folder) / "teacher", Path(folder) / "student", *options)
        result["cases"][case] = found
        print(f"{case:45} {found['peak_above_imports'] / 2**20:7.1f} MiB, ratio {found['ratio']}", flush=True)
        assert found["checkpoint"] >= 2 * 10**9, "the checkpoint is too small to be measured on"
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps(result, indent=2) + "\n")
    assert all(found["ratio"] <= LIMIT for found in result["cases"].values())


if __name__ == "__main__":
    main()
