import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from limbeck.errors import LimbeckError
from limbeck.training import make_schedule


def test_wsd_at_every_edge():
    schedule = make_schedule("wsd", total_steps=100, peak=1e-4, warmup=10, decay=20)
    assert schedule(0) == 0.0
    assert schedule(1) == 1e-4 * 0.1
    assert schedule(9) == 1e-4 * 0.9
    assert schedule(10) == schedule(11) == schedule(79) == schedule(80) == 1e-4
    assert schedule(81) == 1e-4 * 0.95
    assert schedule(99) == 1e-4 * 0.05  # the last update: about 0
    assert schedule(100) == schedule(1000) == 0.0


def test_wsd_of_the_first_published_stage():
    schedule = make_schedule("wsd", total_steps=2441, peak=1e-4, warmup=0.1, decay=0.1)
    assert (schedule.warmup_steps, schedule.decay_steps) == (244, 244)
    assert schedule(244) == schedule(2197) == 1e-4
    assert schedule(243) < 1e-4 > schedule(2198)


@pytest.mark.parametrize(("warmup", "decay"), [(0, 0), (0, 10), (10, 0), (5, 5), (1.0, 0), (0.0, 1.0)])
def test_wsd_without_one_of_its_parts(warmup, decay):
    schedule = make_schedule("wsd", total_steps=10, peak=2.0, warmup=warmup, decay=decay)
    rates = [schedule(step) for step in range(11)]
    assert all(0 <= rate <= 2.0 for rate in rates)
    assert rates[0] == (2.0 if warmup == 0 else 0.0)
    assert max(rates[:10]) == (1.8 if schedule.warmup_steps == 10 else 2.0)
    assert rates[10] == 0.0


def test_cosine_of_the_published_half_percent_run():
    schedule = make_schedule("cosine", total_steps=11440, peak=3e-4, warmup=0.03, decay=12000, floor=3e-5)
    assert (schedule.warmup_steps, schedule.decay_steps) == (360, 12000)
    assert schedule(0) == schedule(36) == 3e-5  # warm-up is floored too: 3e-4 · 36/360 is the floor itself
    assert schedule(37) == 3e-4 * (37 / 360) > 3e-5
    assert schedule(360) == 3e-4
    assert schedule(6180) == pytest.approx(1.5e-4, rel=1e-12)  # half-way from 360 to 12000
    assert schedule(9615) > 3e-5
    assert schedule(9616) == schedule(11439) == schedule(12000) == 3e-5
    assert schedule(45759) == 3e-5  # it does not rise again


@pytest.mark.parametrize("decay_steps", [24000, 48000])
def test_cosine_warm_up_is_a_fraction_of_its_own_length(decay_steps):
    schedule = make_schedule("cosine", total_steps=45760, peak=3e-4, warmup=0.03, decay=decay_steps, floor=3e-5)
    assert schedule.warmup_steps == int(0.03 * decay_steps)


def test_cosine_without_floor_ends_at_zero():
    schedule = make_schedule("cosine", total_steps=10, peak=1.0)
    assert [schedule(0), schedule(10), schedule(11)] == [1.0, 0.0, 0.0]
    assert schedule(3) == 0.5 * (1 + math.cos(0.3 * math.pi))


def test_constant_after_warm_up():
    schedule = make_schedule("constant", total_steps=10, peak=3.0, warmup=0.2)
    assert [schedule(step) for step in (0, 1, 2, 9, 100)] == [0.0, 1.5, 3.0, 3.0, 3.0]


def test_fractions_mean_what_they_say():
    assert make_schedule("constant", total_steps=100, peak=1.0, warmup=0.29).warmup_steps == 29
    assert make_schedule("constant", total_steps=100, peak=1.0, warmup=1).warmup_steps == 1
    assert make_schedule("constant", total_steps=100, peak=1.0, warmup=1.0).warmup_steps == 100


@given(
    kind=st.sampled_from(["wsd", "cosine", "constant"]),
    total=st.integers(1, 500),
    warmup=st.floats(0, 0.5),
    decay=st.floats(0, 0.5),
    floor=st.floats(0, 1e-3),
    step=st.integers(0, 1000),
)
def test_rates_lie_between_floor_and_peak(kind, total, warmup, decay, floor, step):
    schedule = make_schedule(
        kind, total_steps=total, peak=1e-3, warmup=warmup, decay=total if kind == "cosine" else decay, floor=floor
    )
    assert floor <= schedule(step) <= 1e-3


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"kind": "wds"}, "did you mean 'wsd'"),
        ({"warmup": 0.6, "decay": 0.6}, "fit into the stage"),
        ({"warmup": 1.5}, "fraction between"),
        ({"warmup": -1}, "warmup = -1"),
        ({"peak": 0.0}, "peak above 0"),
        ({"floor": 2.0}, "floor between"),
        ({"total_steps": 0}, "at least one update"),
        ({"kind": "cosine", "warmup": 20, "decay": 20}, "warm-up and decay"),
    ],
)
def test_clear_errors(options, words):
    with pytest.raises(LimbeckError, match=words):
        make_schedule(**({"kind": "wsd", "total_steps": 100, "peak": 1.0} | options))
