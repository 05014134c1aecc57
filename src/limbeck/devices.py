"""Where to run and in which number format, from what a user typed."""

import platform
from importlib.metadata import PackageNotFoundError, version

import torch

from limbeck._version import __version__
from limbeck.errors import LimbeckError, unknown

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}


def choose_device(name: str | None = None) -> torch.device:
    """Return the device of that name; without one, a GPU if there is one, else the CPU.

    Raises:
        LimbeckError: There is no such device on this machine.
    """
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
        if device.type == "meta":
            raise RuntimeError("it holds no numbers")
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise LimbeckError(f"device {name!r}: {reason}", expected="cpu, cuda, cuda:1 or mps, where it exists") from None
    return device


def choose_dtype(name: str | None) -> torch.dtype | None:
    """Return the dtype of that name; None stays None: the checkpoint's own.

    Raises:
        LimbeckError: Limbeck does not know the name.
    """
    if name is None:
        return None
    if name not in DTYPES:
        raise unknown("dtype", name, DTYPES)
    return DTYPES[name]


def environment(device: torch.device) -> dict[str, str]:
    """Where something was computed: versions, system and device, as plain words for a report."""
    found = {"limbeck": __version__, "python": platform.python_version()}
    for package in ("torch", "transformers", "triton", "numpy"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue  # triton is not everywhere
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    threads = f", {torch.get_num_threads()} threads" if device.type == "cpu" else ""
    return {**found, "system": f"{platform.system()} {platform.release()}", "device": f"{device} ({name}{threads})"}
