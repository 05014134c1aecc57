"""What a conversion on disk holds in memory, as the kernel counts it; benchmarks/convert_memory.py has a large one."""

import importlib.util
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "convert_memory.py"
IN_MEMORY = """
def convert_folder(source, destination, mixer, keep_attention, init, mixer_kwargs, seed):
    limbeck.convert(source, mixer, keep_attention, init, mixer_kwargs, seed).save_pretrained(destination)
    raise SystemExit

limbeck.convert_folder = convert_folder
"""


@pytest.fixture(scope="module")
def benchmark():
    spec = importlib.util.spec_from_file_location("convert_memory", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_no_more_than_a_shard_or_the_mixers(benchmark, tmp_path, kind):
    config = benchmark.llama(width=1024, layers=12, vocabulary=8000)
    benchmark.write_teacher(tmp_path / "teacher", config, 100 << 20, kind)
    found = benchmark.measure(tmp_path / "teacher", tmp_path / "student")
    assert found["shards"] > 2
    assert found["checkpoint"] > 2.5 * max(found["mixers"], found["largest_shard"])
    assert found["ratio"] <= benchmark.LIMIT, found


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_conversion_in_memory_takes_more(benchmark, tmp_path):
    """That the measurement would see it if the model were loaded."""
    config = benchmark.llama(width=1024, layers=12, vocabulary=8000)
    benchmark.write_teacher(tmp_path / "teacher", config, 100 << 20, "safetensors")
    program = benchmark.CONVERT.replace("\ndef kilobytes", f"{IN_MEMORY}\ndef kilobytes")
    program = program.replace("finally:", "except SystemExit:\n    pass\nfinally:")
    found = benchmark.measure(tmp_path / "teacher", tmp_path / "student", program=program)
    assert found["ratio"] > benchmark.LIMIT, found
