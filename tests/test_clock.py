"""The clock, driven by a time source that only moves when a test says so."""

import json
import math

import pytest

from shortcut_jax.clock import PHASES, Clock


class FakeTime:
    def __init__(self, seconds: float = 1000.0) -> None:
        self.seconds = seconds

    def __call__(self) -> float:
        return self.seconds

    def advance(self, seconds: float) -> None:
        self.seconds += seconds


def make(total_steps=100, batch_size=64, num_devices=4):
    now = FakeTime()
    return Clock(batch_size, total_steps, num_devices, now=now), now


def spend(clock, now, phase, seconds):
    with clock.phase(phase):
        now.advance(seconds)


def test_rates_of_the_last_interval():
    clock, now = make()
    now.advance(5)
    first = clock.tick(10)
    now.advance(20)
    second = clock.tick(20)
    assert first["steps_per_second"] == pytest.approx(2.0)
    assert first["images_per_second_per_device"] == pytest.approx(2.0 * 64 / 4)
    assert second["steps_per_second"] == pytest.approx(0.5)
    assert second["images_per_second_per_device"] == pytest.approx(0.5 * 64 / 4)


def test_pauses_stay_out_of_speed_and_eta_but_are_reported():
    clock, now = make(total_steps=100)
    spend(clock, now, "start", 3)
    spend(clock, now, "compile", 50)
    now.advance(10)
    spend(clock, now, "evaluate", 100)
    spend(clock, now, "checkpoint", 27)
    now.advance(10)
    report = clock.tick(20)
    assert report["steps_per_second"] == pytest.approx(1.0)
    assert report["eta_seconds"] == pytest.approx(80.0)
    assert report["seconds/training"] == pytest.approx(20)
    assert {name: report[f"seconds/{name}"] for name in PHASES} == pytest.approx(
        {"start": 3, "pairs": 0, "compile": 50, "data": 0, "evaluate": 100, "checkpoint": 27}
    )
    assert report["fraction/evaluate"] == pytest.approx(0.5)
    fractions = [value for name, value in report.items() if name.startswith("fraction/")]
    assert sum(fractions) == pytest.approx(1.0)


def test_waiting_for_data_lowers_the_speed_and_is_reported_apart():
    clock, now = make()
    now.advance(6)
    spend(clock, now, "data", 4)
    report = clock.tick(10)
    assert report["steps_per_second"] == pytest.approx(1.0)
    assert report["seconds/training"] == pytest.approx(6)
    assert report["fraction/data"] == pytest.approx(0.4)


def test_eta_follows_the_mean_of_this_process_not_the_last_interval():
    clock, now = make(total_steps=40)
    now.advance(10)
    clock.tick(10)
    now.advance(30)
    assert clock.tick(20)["eta_seconds"] == pytest.approx(20 * 40 / 20)
    now.advance(1)
    assert clock.tick(40)["eta_seconds"] == 0
    now.advance(1)
    assert clock.tick(41)["eta_seconds"] == 0


def test_nested_phase_takes_its_time_from_the_outer_one():
    clock, now = make()
    with clock.phase("evaluate"):
        now.advance(1)
        spend(clock, now, "compile", 10)
        now.advance(2)
    now.advance(5)
    report = clock.tick(5)
    assert report["seconds/evaluate"] == pytest.approx(3)
    assert report["seconds/compile"] == pytest.approx(10)
    assert report["seconds/training"] == pytest.approx(5)


def test_phase_ends_when_its_block_raises():
    clock, now = make()
    with pytest.raises(RuntimeError), clock.phase("evaluate"):
        now.advance(1)
        raise RuntimeError
    now.advance(2)
    report = clock.tick(1)
    assert report["seconds/evaluate"] == pytest.approx(1)
    assert report["seconds/training"] == pytest.approx(2)


def test_unknown_phase_is_refused():
    clock, _ = make()
    with pytest.raises(ValueError, match="evaluat'"), clock.phase("evaluat"):
        pass


def test_restart_continues_the_totals_and_the_interval():
    clock, now = make(total_steps=100)
    spend(clock, now, "compile", 7)
    now.advance(10)
    clock.tick(10)
    now.advance(4)
    with clock.phase("checkpoint"):
        now.advance(1)
        state = json.loads(json.dumps(clock.state_dict()))  # at step 14
    now.advance(1000)  # killed; this work is done again

    later = FakeTime(5.0)  # another machine, another origin
    resumed = Clock(64, 100, 4, now=later)
    with resumed.phase("start"):
        later.advance(30)
        resumed.load_state_dict(state)
        later.advance(30)
    spend(resumed, later, "compile", 8)
    later.advance(6)
    report = resumed.tick(20)
    assert report["steps_per_second"] == pytest.approx(1.0)  # 10 steps in 4 + 6 s
    assert report["eta_seconds"] == pytest.approx(80)
    assert report["seconds/training"] == pytest.approx(20)
    assert report["seconds/compile"] == pytest.approx(15)
    assert report["seconds/start"] == pytest.approx(60)
    assert report["seconds/checkpoint"] == pytest.approx(1)
    assert report["core_hours"] == pytest.approx(20 * 4 / 3600)


def test_training_time_before_the_restore_stays_out_of_the_speed():
    clock, now = make()
    now.advance(10)
    clock.tick(10)
    state = clock.state_dict()
    resumed, now = make()
    now.advance(500)  # set-up outside every phase
    resumed.load_state_dict(state)
    now.advance(5)
    report = resumed.tick(15)
    assert report["steps_per_second"] == pytest.approx(1.0)
    assert report["core_hours"] == pytest.approx(515 * 4 / 3600)


def test_eta_after_a_restart_forgets_the_speed_of_the_earlier_process():
    clock, now = make(total_steps=100)
    now.advance(1000)
    clock.tick(10)
    state = clock.state_dict()
    resumed, now = make(total_steps=100)
    resumed.load_state_dict(state)
    now.advance(10)
    assert resumed.tick(20)["eta_seconds"] == pytest.approx(80)


def test_core_hours_count_the_devices_of_each_process():
    clock, now = make(num_devices=4)
    now.advance(3600)
    spend(clock, now, "evaluate", 3600)
    clock.tick(10)
    state = clock.state_dict()
    resumed, now = make(num_devices=8)
    resumed.load_state_dict(state)
    now.advance(1800)
    assert resumed.tick(20)["core_hours"] == pytest.approx(1 * 4 + 0.5 * 8)


def test_state_of_a_restored_clock_is_the_state_it_was_given():
    clock, now = make()
    now.advance(3)
    clock.tick(2)
    spend(clock, now, "data", 2)
    state = clock.state_dict()
    assert all(type(value) is float for value in state.values())
    resumed, _ = make()
    assert set(resumed.state_dict()) == set(state)
    resumed.load_state_dict(state)
    assert resumed.state_dict() == state


@pytest.mark.parametrize("moves", [(-50, 5), (5, -50), (-50, -50), (0, 0), (math.ulp(1000.0), 0)])
def test_no_negative_or_infinite_number_whatever_the_time_source_does(moves):
    clock, now = make()
    for step, move in enumerate(moves, start=1):
        now.advance(move)
        report = clock.tick(step)
        assert all(math.isfinite(value) and value >= 0 for value in report.values()), report


def test_time_that_went_backwards_counts_as_none():
    clock, now = make()
    now.advance(-500)
    assert "steps_per_second" not in clock.tick(1)
    now.advance(2)
    report = clock.tick(4)
    assert report["seconds/training"] == pytest.approx(2)
    assert report["steps_per_second"] == pytest.approx(2.0)  # the unmeasured step is in here


def test_second_tick_at_a_step_has_no_speed_and_loses_no_time():
    clock, now = make()
    now.advance(10)
    clock.tick(10)
    now.advance(2)
    assert "steps_per_second" not in clock.tick(10)
    now.advance(8)
    assert clock.tick(20)["steps_per_second"] == pytest.approx(1.0)
