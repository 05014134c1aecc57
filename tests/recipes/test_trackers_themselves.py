"""The trackers themselves, where they are installed: a run's losses are in them afterwards."""

import os
import subprocess
import sys

import pytest

from limbeck.training import read_metrics

pytestmark = pytest.mark.slow

SHOWN = {
    "tensorboard": """
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
events = EventAccumulator({run!r} + "/tensorboard")
events.Reload()
shown = [event.value for event in events.Scalars("logits/loss")]
""",
    "wandb": r"""
import re
from pathlib import Path
(records,) = Path({run!r}).glob("wandb/offline-run-*/run-*.wandb")
found = re.findall(rb"logits/loss\x82\x01.([\d.e-]+)", records.read_bytes())  # each in the history and in a summary
shown = [float(loss) for loss in dict.fromkeys(found)]
""",
    "trackio": """
from trackio.sqlite_storage import SQLiteStorage
(name,) = SQLiteStorage.get_runs("limbeck")
shown = [line["logits/loss"] for line in SQLiteStorage.get_logs("limbeck", name) if "logits/loss" in line]
""",
}
"""What reads, in a process of its own, the losses of the last stage out of a tracker."""


@pytest.mark.parametrize("tracker", SHOWN)
def test_a_runs_losses_are_in_it(tracker, recipe_file, teacher_folder, text_file, tmp_path):
    pytest.importorskip(tracker)
    run = tmp_path / "run"
    environment = os.environ | {"WANDB_MODE": "offline", "TRACKIO_DIR": str(tmp_path / "trackio")}
    command = [sys.executable, "-m", "limbeck", "distill", recipe_file, "--teacher", teacher_folder]
    command += ["--data", text_file, "--output", run, "--device", "cpu"]
    command += ["--set", f'tracking.trackers=["{tracker}"]', "--set", "engine.log_every=1"]
    learned = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=300)
    assert learned.returncode == 0, learned.stderr[-3000:]
    assert "left out from now on" not in learned.stdout + learned.stderr

    script = SHOWN[tracker].format(run=str(run)) + "print(*(f'{loss:.5f}' for loss in shown))"
    read = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False, timeout=300
    )
    assert read.returncode == 0, read.stderr[-3000:]
    lines = [line for line in read_metrics(run / "metrics.jsonl") if line["stage"] == "logits" and "loss" in line]
    assert read.stdout.split() == [f"{line['loss']:.5f}" for line in lines]
