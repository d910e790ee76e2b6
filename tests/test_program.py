"""Several steps per dispatch: where they are cut, and that no number changes."""

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from configs import digits
from shortcut_jax import program, train
from shortcut_jax.parallel import preemption
from tests.test_resume import CLOCK, read_lines


def every(**keys):
    config = digits.get_config("small")
    config.update_from_flattened_dict(keys)
    return config


def test_dispatches_end_where_the_host_has_something_to_do():
    keys = {"log.every": 5, "checkpoint.every": 8, "eval.every": 0, "total_steps": 18}
    config = every(**keys, steps_per_dispatch=3)
    found = list(program.dispatches(config, 1))
    assert found == [(1, 3), (4, 1), (5, 3), (8, 2), (10, 3), (13, 2), (15, 1), (16, 2), (18, 0)]
    config.averages.power = (0.1,)  # with snapshots of it every 2 steps
    assert list(program.dispatches(config, 14)) == [(14, 1), (15, 1), (16, 2), (18, 0)]
    assert list(program.dispatches(config, 19)) == []  # more than the config asks for


@given(st.data())
def test_no_step_is_left_out_or_taken_twice(data):
    cadence = st.integers(1, 9)
    names = ("log.every", "checkpoint.every", "eval.every", "total_steps", "steps_per_dispatch")
    keys = {name: data.draw(cadence, label=name) for name in names}
    first = data.draw(st.integers(0, keys["total_steps"]))
    found = list(program.dispatches(every(**keys), first))
    taken = [step + i for step, count in found for i in range(count)]
    assert taken == list(range(first, keys["total_steps"]))
    stops = {step for step, _ in found}
    assert found[-1] == (keys["total_steps"], 0)
    assert max(count for _, count in found) <= keys["steps_per_dispatch"]
    for name in names[:3]:
        assert {s for s in taken if s > first and s % keys[name] == 0} <= stops


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Final state and log lines of a run, step by step, and several at once with a resume."""

    def run(name, **keys):
        config = every(
            **{"checkpoint.every": 20, "log.every": 5, "eval.every": 0, "total_steps": 9}
        )
        config.averages.rates, config.log.tensorboard = (0.9,), False
        config.update_from_flattened_dict(keys)
        return train.train(config, tmp_path_factory.getbasetemp() / name)

    found = {"one by one": run("one"), "several": run("several", steps_per_dispatch=4)}
    with pytest.MonkeyPatch.context() as patch:
        # Asked to leave before the second dispatch: after 4 steps of the interval that is logged.
        calls = iter([False, True])
        patch.setattr(preemption.Notice, "reached", lambda notice: next(calls))
        with pytest.raises(preemption.Preempted, match="step 4"):
            run("resumed", steps_per_dispatch=4)
    found["resumed"] = run("resumed", steps_per_dispatch=3)
    folder = tmp_path_factory.getbasetemp()
    names = {"one by one": "one", "several": "several", "resumed": "resumed"}
    lines = {name: read_lines(folder / at / "metrics.jsonl") for name, at in names.items()}
    return found, lines


@pytest.mark.parametrize("way", ["several", "resumed"])
def test_several_steps_at_once_give_the_same_bits(runs, way):
    """Parameters, EMA, averages, optimizer and the sums of the metrics."""
    states, _ = runs
    assert states[way].step == 9
    leaves, expected = (jax.tree.leaves(states[name]) for name in (way, "one by one"))
    for found, wanted in zip(leaves, expected, strict=True):
        np.testing.assert_array_equal(np.asarray(found), np.asarray(wanted))


@pytest.mark.parametrize("way", ["several", "resumed"])
def test_and_log_the_same_numbers(runs, way):
    def numbers(name):
        return [
            {key: value for key, value in line.items() if not key.startswith(CLOCK)}
            for line in runs[1][name]
        ]

    assert [line["step"] for line in numbers(way)] == [5]
    assert numbers(way) == numbers("one by one")
