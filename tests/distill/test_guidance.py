"""Guides: the right teacher at every update, one at a time, and gone when it is over."""

import gc
import weakref

import pytest
import torch

from limbeck import LimbeckError
from limbeck.distill import Guide, GuidedStep, LayerwiseObjective, TargetGuide, TrajectoryGuide, WaypointGuide


@pytest.fixture
def loads(make_teacher):
    """Teachers that are made when they are asked for; what was made is remembered weakly."""
    made = []

    def load(**options):
        teacher = make_teacher(**options)
        made.append(weakref.ref(teacher))
        return teacher

    load.made = made
    return load


def alive(load):
    gc.collect()
    return [teacher() is not None for teacher in load.made]


def batch_of(tokens):
    return {"input_ids": tokens, "labels": tokens.roll(-1, dims=1)}


def test_nobody(make_teacher, make_student, tokens):
    step = GuidedStep(make_student(make_teacher()), LayerwiseObjective(), Guide())
    step.enter(0)
    assert step(batch_of(tokens)).keys() == {"loss", "ce"}


@pytest.mark.slow
def test_a_target_is_loaded_once_and_really_freed(make_teacher, make_student, loads, tokens):
    step = GuidedStep(make_student(make_teacher()), LayerwiseObjective(), TargetGuide(loads, until=3))
    assert not loads.made
    for number in range(5):
        step.enter(number)
        assert ("layer" in step(batch_of(tokens))) == (number < 3)
        assert alive(loads) == [number < 3]
    assert not any("teacher" in name for name, _ in step.named_parameters())


def test_a_resumed_run_after_the_switch_loads_nothing(make_teacher, make_student, loads):
    step = GuidedStep(make_student(make_teacher()), LayerwiseObjective(), TargetGuide(loads, until=3))
    step.enter(3)
    assert not loads.made


@pytest.mark.slow
def test_waypoints_one_at_a_time_each_for_its_share(make_teacher, loads):
    asked = []

    def load(number):
        def make():
            assert not any(alive(loads)), "two teachers at a time"
            asked.append(number)
            return loads()

        return make

    guide = WaypointGuide([load(number) for number in range(3)], until=8)
    present = []
    for step in range(10):
        guide.enter(step)
        present.append(guide.waypoint(step) if guide.teacher is not None else None)
    assert present == [0, 0, 0, 1, 1, 1, 2, 2, None, None]
    assert asked == [0, 1, 2]
    assert not any(alive(loads))
    guide.enter(4)  # as a resumed run does
    assert asked[-1] == 1
    with pytest.raises(LimbeckError, match="3 waypoints in 2 guided updates"):
        WaypointGuide([loads] * 3, until=2)


def test_a_trajectory_asks_for_gradients_in_every_so_many_th_update(make_teacher, make_student, tokens):
    teacher = make_teacher()
    guide = TrajectoryGuide(teacher, until=5, update_every=2)
    step = GuidedStep(make_student(teacher), LayerwiseObjective(), guide)
    found = []
    for number in range(6):
        step.enter(number)
        found.append("teacher_loss" in step(batch_of(tokens)))
    assert found == [False, True, False, True, False, False]
    assert guide.teacher is None
    assert teacher.training


def test_a_teacher_of_another_language_is_refused(make_teacher, make_student, loads):
    guide = TargetGuide(lambda: loads(vocab_size=99), until=3)
    step = GuidedStep(make_student(make_teacher()), LayerwiseObjective(), guide)
    with pytest.raises(LimbeckError, match="vocabulary"):
        step.enter(0)


def test_student_weights_are_untouched_by_a_guide(make_teacher, make_student, loads, tokens):
    student = make_student(make_teacher())
    step = GuidedStep(student, LayerwiseObjective(), TargetGuide(loads, until=1), trainable="mixers")
    step.enter(0)
    step(batch_of(tokens))["loss"].backward()
    learned = {name for name, p in student.named_parameters() if p.grad is not None}
    assert learned
    assert all(".mixer." in name for name in learned)
    assert all(torch.isfinite(p.grad).all() for p in student.parameters() if p.grad is not None)
