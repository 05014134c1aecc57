"""What torchrun starts in tests: the command line, with a mishap at a chosen moment.

``together.py MISHAP distill …`` with MISHAP one of ``none``; ``SIGTERM:STAGE:STEP``, a signal to the last process alone
before that update; ``error:STAGE:STEP``, a mistake that the last process alone meets; ``memory:SAMPLES``, a device that
takes so many samples at once.
"""

import os
import signal
import subprocess
import sys
from pathlib import Path

COMMAND = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node"]


def start(processes, mishap, arguments, log, module=Path(__file__), **environment):
    """Run it in so many processes, without torchrun for one; return the exit code, and write what it says."""
    launcher = [sys.executable] if processes == 1 else [*COMMAND, str(processes)]
    rest = [str(module), mishap, *map(str, arguments)]
    variables = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    with log.open("ab") as file:
        return subprocess.run(
            [*launcher, *rest], stdout=file, stderr=file, env=variables, timeout=240, check=False
        ).returncode


def limited(forward, samples):
    import torch

    def on_a_small_device(self, batch):
        if len(batch["input_ids"]) > samples:
            raise torch.OutOfMemoryError("no room")
        return forward(self, batch)

    return on_a_small_device


def arm(mishap):
    from limbeck.distill import GuidedStep, StageStep
    from limbeck.errors import LimbeckError
    from limbeck.recipes import driver

    what, *where = mishap.split(":")
    last = os.environ.get("RANK", "0") == str(int(os.environ.get("WORLD_SIZE", "1")) - 1)
    if what == "memory":
        for kind in (StageStep, GuidedStep):
            kind.forward = limited(kind.forward, int(where[0]))
    if what in ("SIGTERM", "error") and last:
        train_stage = driver.train_stage

        def watched(*arguments, stage, batches, **options):
            def watch(step):
                if where == [stage, str(step)]:
                    if what == "error":
                        raise LimbeckError("a mistake that one process meets")
                    os.kill(os.getpid(), signal.SIGTERM)
                return batches(step)

            return train_stage(*arguments, stage=stage, batches=watch, **options)

        driver.train_stage = watched


if __name__ == "__main__":
    from limbeck_cli import main

    arm(sys.argv.pop(1))
    main()
