"""Where to run and in which number format, from what a user typed."""

import torch

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
