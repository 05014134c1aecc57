"""The corpus that every machine has."""

import sysconfig
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from limbeck.data import read_documents, split_by_file, standard_library_files
from limbeck.errors import LimbeckError


def test_the_standard_library_without_its_tests():
    files = standard_library_files()
    root = Path(sysconfig.get_path("stdlib"))
    names = [file.relative_to(root).as_posix() for file in files]
    assert names == sorted(names)
    assert {"argparse.py", "json/decoder.py", "asyncio/tasks.py"} <= set(names)
    assert not [name for name in names if {"test", "tests", "idle_test", "site-packages"} & set(name.split("/")[:-1])]
    assert sum(len(document) for document in read_documents(files)) > 5_000_000


def test_a_python_without_sources_is_refused(monkeypatch, tmp_path):
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(LimbeckError, match="no source of the standard library"):
        standard_library_files()


@given(count=st.integers(2, 200), fraction=st.floats(0.01, 0.7), seed=st.integers(0, 5))
def test_a_split_is_a_partition_in_order(count, fraction, seed):
    files = [Path(f"{index}.py") for index in range(count)]
    train, held_out = split_by_file(files, fraction, seed)
    assert sorted([*train, *held_out], key=files.index) == files
    assert train == sorted(train, key=files.index)
    assert len(held_out) == max(1, round(count * fraction))
    assert split_by_file(files, fraction, seed) == (train, held_out)


def test_seeds_hold_out_other_files_and_nothing_may_be_empty():
    files = [Path(f"{index}.py") for index in range(100)]
    assert split_by_file(files, 0.1, 0) != split_by_file(files, 0.1, 1)
    for few, fraction in ((files[:1], 0.5), (files, 0.999), (files, 0.0), ([], 0.5)):
        with pytest.raises(LimbeckError, match="to hold out"):
            split_by_file(few, fraction, 0)
