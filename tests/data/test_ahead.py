"""Batches read ahead are the batches; the next one is made meanwhile; an error comes in its turn."""

import contextlib
import threading
import weakref

import pytest
import torch

from limbeck.data import ReadAhead


def batches(update):
    return [{"input_ids": torch.full((1, 2), update)}]


def numbers(made):
    return [int(batch["input_ids"][0, 0]) for batch in made]


def test_any_order_gives_what_was_asked_for():
    with ReadAhead(batches, 9) as ahead:
        for update in (0, 1, 2, 5, 5, 6, 0, 8):
            assert numbers(ahead(update)) == [update]


def test_the_next_is_made_meanwhile_and_nothing_beyond_the_end():
    made, asked = [], threading.Event()

    def noted(update):
        made.append(update)
        if update == 2:
            asked.set()
        return batches(update)

    with ReadAhead(noted, 3) as ahead:
        ahead(0)
        ahead(1)
        assert asked.wait(10)  # though nobody asked for 2
        ahead(2)
    assert made == [0, 1, 2]


def test_an_error_comes_when_its_batch_is_asked_for():
    def broken(update):
        if update == 1:
            raise OSError("the disk is gone")
        return batches(update)

    with ReadAhead(broken, 3) as ahead:
        assert numbers(ahead(0)) == [0]
        with pytest.raises(OSError, match="the disk is gone"):
            ahead(1)


def test_the_thread_ends():
    with ReadAhead(batches, 3) as ahead:
        ahead(0)
        assert any(thread.name.startswith("batches") for thread in threading.enumerate())
    assert not any(thread.name.startswith("batches") for thread in threading.enumerate())


def test_an_error_does_not_keep_alive_what_was_at_work():
    """A run's lock goes with the run: it may not wait for the garbage collector."""

    class Run:
        def __call__(self, update):
            raise OSError("the disk is gone")

    run = Run()
    gone = weakref.ref(run)
    with contextlib.suppress(OSError), ReadAhead(run, 3) as ahead:
        ahead(0)
    del run, ahead
    assert gone() is None
