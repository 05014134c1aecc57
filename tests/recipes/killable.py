"""The real command in a process of its own, which can be killed at a chosen moment."""

import multiprocessing
import os
import signal
import sys
import time


def start(arguments, log, kill=""):
    """Start ``limbeck ARGUMENTS``.

    `kill` is ``EVENT END`` or ``EVENT END COUNT``: the process kills itself just before the first (or COUNT-th) file
    operation of that kind (an audit event of Python, such as ``open`` or ``os.rename``) on a path with that end.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["limbeck", "limbeck_cli", "torch._dynamo"])
    process = context.Process(target=_command, args=([str(argument) for argument in arguments], str(log), kill))
    process.start()
    return process


def _command(arguments, log, kill):
    os.environ["HF_HUB_OFFLINE"] = "1"
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    import torch

    import limbeck_cli

    torch.set_num_threads(1)
    if kill:
        event, end, count = (*kill.split(), "1")[:3]
        sys.addaudithook(_Executioner(event, end, int(count)))
    sys.argv = ["limbeck", *arguments]
    limbeck_cli.main()


class _Executioner:
    def __init__(self, event, end, count):
        self.event, self.end, self.left = event, end, count

    def __call__(self, event, arguments):
        if event != self.event:
            return
        path = arguments[1] if event == "os.rename" else arguments[0]
        if isinstance(path, str | os.PathLike) and os.fspath(path).endswith(self.end):
            self.left -= 1
            if self.left == 0:
                os.kill(os.getpid(), signal.SIGKILL)


def run(arguments, log, kill=""):
    """Run to the end; the exit code, negative for a signal."""
    process = start(arguments, log, kill)
    process.join(180)
    return process.exitcode


def run_until(arguments, log, path, lines):
    """Kill the process from outside as soon as a file has that many lines."""
    process = start(arguments, log)
    while process.is_alive() and not (path.exists() and path.read_bytes().count(b"\n") >= lines):
        time.sleep(0.0005)
    process.kill()
    process.join()
    return process.exitcode
