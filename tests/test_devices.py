"""Devices and number formats by name."""

import pytest
import torch

from limbeck import LimbeckError
from limbeck.devices import DTYPES, choose_device, choose_dtype, environment


def test_by_default_a_gpu_if_there_is_one(monkeypatch):
    assert choose_device("cpu") == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device() == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert choose_device() == torch.device("cuda")


@pytest.mark.parametrize("name", ["abacus", "", "cuda:x", "cuda:99", "mps:0", "meta"])
def test_devices_that_are_not_there(name):
    with pytest.raises(LimbeckError, match="device ") as error:
        choose_device(name)
    assert "cpu" in error.value.expected
    assert "\n" not in error.value.found


def test_number_formats():
    assert choose_dtype(None) is None
    assert [choose_dtype(name) for name in DTYPES] == list(DTYPES.values())
    with pytest.raises(LimbeckError, match="did you mean 'bfloat16'"):
        choose_dtype("bfloat")


def test_the_environment_is_plain_words():
    found = environment(torch.device("cpu"))
    assert {"limbeck", "python", "torch", "transformers", "system", "device"} <= found.keys()
    assert found["torch"].startswith("2.")
    assert "threads" in found["device"]
