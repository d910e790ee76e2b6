"""A save copies what it holds: on the devices, without holding anything up, or to the host."""

import concurrent.futures
import contextlib
import threading
import types

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from configs import digits
from shortcut_jax import checkpoint, checksums, device_memory, run, validation
from shortcut_jax.errors import UserError
from tests.sentences import assert_sentence

META = {"config": {}, "data": {}, "clock": {}}
SOON = 0.2  # seconds in which nothing happens where something waits
LONG = 60  # in which something happens where nothing waits


def make_state(value=0.0):
    arrays = {"kernel": jnp.arange(12.0).reshape(3, 4) + value, "bias": jnp.full(4, value)}
    return {"step": jnp.int32(3), "params": arrays, "ema": jax.tree.map(lambda a: a / 2, arrays)}


@jax.jit(donate_argnums=0)
def update(state):
    """A step: other values in the memory of the old ones."""
    return jax.tree.map(lambda a: -a - 1, state)


def assert_holds(checkpoints, step, state):
    shapes = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), state
    )
    jax.tree.map(np.testing.assert_array_equal, checkpoints.restore(step, shapes), state)


@pytest.fixture
def opened(tmp_path):
    """opened(**settings): checkpoints, closed after the test whatever came of them."""
    with contextlib.ExitStack() as stack:

        def open_them(**settings):
            found = checkpoint.Checkpoints(tmp_path, keep=3, **settings)
            stack.callback(found.close)
            return found

        yield open_them


class Held:
    """A function that waits until it is let go, or fails then."""

    def __init__(self, function):
        self._function = function
        self.reached, self.free, self.error = threading.Event(), threading.Event(), None

    def __call__(self, *args, **kwargs):
        self.reached.set()
        assert self.free.wait(LONG)
        if self.error:
            raise self.error
        return self._function(*args, **kwargs)

    def release(self, error=None):
        self.error = error
        self.free.set()


@pytest.fixture(params=["checksums", "manager"])
def held(request, monkeypatch):
    """What the thread does, held up at the checksums or when orbax is to begin."""
    if request.param == "checksums":
        hold = Held(checksums.named)
        monkeypatch.setattr(checksums, "named", hold)
    else:
        hold = Held(ocp.CheckpointManager.save)
        monkeypatch.setattr(ocp.CheckpointManager, "save", lambda *a, **k: hold(*a, **k))
    yield hold
    hold.free.set()


@pytest.fixture
def aside():
    """aside(function, *args): a future of the call in another thread."""
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        yield pool.submit


def assert_waits(future):
    with pytest.raises(concurrent.futures.TimeoutError):
        future.result(SOON)


# ------------------------------------------------------------------ what is saved


@pytest.mark.parametrize("copy", ["device", "host"])
def test_steps_after_it_do_not_change_it(opened, copy):
    checkpoints, state = opened(copy=copy), make_state(1.0)
    for step in (1, 2, 3):
        checkpoints.save(step, state, META)
        for _ in range(3):
            state = update(state)
    checkpoints.wait()
    expected = make_state(1.0)
    for step in (1, 2, 3):
        assert_holds(checkpoints, step, expected)
        for _ in range(3):
            expected = update(expected)


def test_copies_lie_as_the_arrays_do_and_are_dropped(opened):
    before = sum(a.nbytes for a in jax.live_arrays())
    state = {"params": jnp.ones((256, 256))}
    checkpoints = opened(copy="device")
    checkpoints.save(1, state, META)
    checkpoints.wait()
    assert sum(a.nbytes for a in jax.live_arrays()) - before < 1.5 * state["params"].nbytes
    copies = checkpoint._copied(state)
    assert copies["params"].sharding == state["params"].sharding
    assert copies["params"].unsafe_buffer_pointer() != state["params"].unsafe_buffer_pointer()


# ------------------------------------------------------------------ what waits, and what does not


def test_it_returns_before_anything_is_fetched_or_written(opened, held, aside):
    checkpoints, state = opened(copy="device"), make_state(2.0)
    checkpoints.save(1, state, META)
    assert held.reached.wait(LONG)
    state = update(state)
    checkpoints.check()  # nothing has failed, and it does not wait
    assert not list(checkpoints.directory.iterdir())
    waiting = aside(checkpoints.wait)
    assert_waits(waiting)
    held.release()
    waiting.result(LONG)
    assert_holds(checkpoints, 1, make_state(2.0))


@pytest.mark.parametrize("ask", ["latest", "steps", "close"])
def test_what_asks_for_finished_ones_waits(opened, held, aside, ask):
    checkpoints = opened(copy="device")
    checkpoints.save(1, make_state(), META)
    asked = aside(getattr(checkpoints, ask))
    assert_waits(asked)
    held.release()
    assert asked.result(LONG) == {"latest": 1, "steps": [1], "close": None}[ask]


def test_a_second_save_waits_for_the_first(opened, held, aside):
    checkpoints = opened(copy="device")
    checkpoints.save(1, make_state(1.0), META)
    second = aside(checkpoints.save, 2, make_state(2.0), META)
    assert_waits(second)
    held.release()
    second.result(LONG)
    assert checkpoints.steps() == [1, 2]
    for step in (1, 2):
        assert_holds(checkpoints, step, make_state(float(step)))


def test_copying_to_the_host_waits(opened, held, aside):
    checkpoints = opened()
    saving = aside(checkpoints.save, 1, make_state(), META)
    assert_waits(saving)
    held.release()
    saving.result(LONG)


def test_later_ones_are_dropped_when_they_are_whole(opened, held, aside):
    checkpoints = opened(copy="device")
    checkpoints.save(7, make_state(), META)
    dropping = aside(checkpoints.drop_after, 5)
    assert_waits(dropping)
    held.release()
    assert dropping.result(LONG) == [7]
    assert checkpoints.steps() == []


def test_orbax_does_not_ask_whether_to_leave(opened, monkeypatch):
    """Its questions, by numbers of its own, would move the step that processes agree on."""
    asked = []
    monkeypatch.setattr(
        "jax.experimental.multihost_utils.reached_preemption_sync_point", asked.append
    )
    checkpoints = opened(copy="device")
    checkpoints.save(1, make_state(), META)
    checkpoints.wait()
    assert asked == []


# ------------------------------------------------------------------ what fails


@pytest.mark.parametrize("ask", ["check", "save", "wait", "latest", "close"])
def test_what_fails_in_the_thread_is_told_by_the_next_call(opened, held, ask):
    checkpoints = opened(copy="device")
    checkpoints.save(1, make_state(), META)
    held.release(OSError("the disk is gone"))
    arguments = (2, make_state(), META) if ask == "save" else ()
    with pytest.raises(UserError) as error:
        for _ in range(LONG * 100):
            getattr(checkpoints, ask)(*arguments)
            assert ask == "check"  # which alone may come too early
            threading.Event().wait(0.01)
    expected = ["could not be written", "the disk is gone", "none was saved before", "make room"]
    assert_sentence(str(error.value), expected)

    # It is told once; where the reason is gone, saves go on.
    held.error = None
    with contextlib.suppress(UserError):
        checkpoints.wait()
    checkpoints.save(3, make_state(3.0), META)
    assert checkpoints.steps() == [3]


@pytest.mark.parametrize("fails", [False, True])
def test_an_error_of_the_run_waits_for_the_save_before_it(opened, held, aside, caplog, fails):
    checkpoints = opened(copy="device")

    def run_and_fail():
        with checkpoints:
            checkpoints.save(1, make_state(), META)
            raise RuntimeError("the run's own")

    failing = aside(run_and_fail)
    assert_waits(failing)
    with caplog.at_level("ERROR", logger="absl"):
        held.release(OSError("the disk is gone") if fails else None)
        with pytest.raises(RuntimeError, match="the run's own"):
            failing.result(LONG)
    assert [p.name for p in checkpoints.directory.iterdir()] == ([] if fails else ["1"])
    assert ("the disk is gone" in caplog.text) == fails


def test_devices_without_memory_for_the_copy(opened, monkeypatch):
    def exhausted(*args):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.")

    monkeypatch.setattr(checkpoint, "_copied", exhausted)
    with pytest.raises(UserError) as error:
        opened(copy="device").save(1, make_state(), META)
    expected = ["Out of memory allocating 9 bytes", "--config.checkpoint.copy=host", "start again"]
    assert_sentence(str(error.value), expected)


# ------------------------------------------------------------------ memory


def test_it_is_one_of_two():
    config = digits.get_config("small")
    config.checkpoint.copy = "disk"
    with pytest.raises(UserError) as error:
        validation.check_values(config)
    assert_sentence(str(error.value), ["checkpoint.copy='disk'", "device, host"])


@pytest.mark.parametrize(
    ("limit", "peak", "copy", "fits"),
    [(30, 20, 10, True), (30, 20, 11, False), (30, 20, 0, True), (None, 20, 11, True)],
)
def test_room_for_a_step_and_a_copy(limit, peak, copy, fits):
    assert device_memory.holds(limit, peak, copy) == fits


@pytest.fixture
def compiled():
    """A step that needs 20 MiB, of which 10 are a train state."""
    sizes = {"argument": 11, "temp": 9, "output": 10, "alias": 10}
    memory = {f"{name}_size_in_bytes": size * 2**20 for name, size in sizes.items()}
    return types.SimpleNamespace(
        memory_analysis=lambda: types.SimpleNamespace(**memory),
        cost_analysis=lambda: {"flops": 1.0},
    )


@pytest.mark.parametrize(("limit", "copy"), [(29, "device"), (30, "device"), (29, "host")])
def test_a_run_without_room_is_refused_before_its_first_step(compiled, monkeypatch, limit, copy):
    config = digits.get_config("small")
    config.checkpoint.copy = copy
    device = types.SimpleNamespace(
        platform="gpu", memory_stats=lambda: {"bytes_limit": limit * 2**20}
    )
    monkeypatch.setattr(jax, "local_devices", lambda: [device])
    if (limit, copy) == (29, "device"):
        with pytest.raises(UserError) as error:
            run.report_compiled(config, compiled, 1.0)
        expected = ["20 MiB of the 29 MiB", "10 MiB", "--config.checkpoint.copy=host"]
        assert_sentence(str(error.value), expected)
    else:
        run.report_compiled(config, compiled, 1.0)


@pytest.mark.parametrize("copy", ["device", "host"])
def test_a_step_that_does_not_fit_by_itself_is_refused(compiled, monkeypatch, copy):
    """Its copy is not what has to go; nor need the compiler count FLOPs."""
    config = digits.get_config("small")
    config.checkpoint.copy = copy
    compiled.cost_analysis = lambda: None
    device = types.SimpleNamespace(platform="gpu", memory_stats=lambda: {"bytes_limit": 19 * 2**20})
    monkeypatch.setattr(jax, "local_devices", lambda: [device])
    with pytest.raises(UserError) as error:
        run.report_compiled(config, compiled, 1.0)
    expected = ["20 MiB", "19 MiB", "accumulation_steps", "model.remat=full", "batch_size"]
    assert_sentence(str(error.value), [*expected, "XLA_CLIENT_MEM_FRACTION"])
    assert "checkpoint.copy" not in str(error.value)
