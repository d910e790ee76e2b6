"""Metric files as a reader finds them, also after a kill in the middle of a line."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from absl import logging

from shortcut_jax import logs
from shortcut_jax.errors import UserError
from shortcut_jax.logs import JsonLines, MetricLogger, TensorBoard, progress_line

ROOT = Path(__file__).parents[1]


def read_jsonl(path):
    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    text = Path(path).read_text()
    assert text == "" or text.endswith("\n")
    return [json.loads(line, parse_constant=refuse) for line in text.splitlines()]


def run_python(code, *, environment=None, **options):
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), **(environment or {})},
        capture_output=True,
        text=True,
        timeout=60,
        **options,
    )


# --- JSON lines ---------------------------------------------------------------------------------


def test_jsonl_lines_are_strict_json_with_the_step_first(tmp_path):
    path = tmp_path / "m.jsonl"
    lines = JsonLines(path)
    lines.append(1, {"loss": float("nan"), "grad": np.float32("inf"), "lr": np.float64("-inf")})
    lines.append(
        2,
        {
            "loss": np.float32(0.5),
            "jax": jnp.float32(0.25),
            "half": jnp.bfloat16(0.5),
            "n": np.int64(4096),
            "protocol": {"sampler": "euler", "steps": [1, 2], "ema": True, "bad": float("nan")},
        },
    )
    lines.close()
    assert read_jsonl(path) == [
        {"step": 1, "loss": None, "grad": None, "lr": None},
        {
            "step": 2,
            "loss": 0.5,
            "jax": 0.25,
            "half": 0.5,
            "n": 4096,
            "protocol": {"sampler": "euler", "steps": [1, 2], "ema": True, "bad": None},
        },
    ]
    assert path.read_text().startswith('{"step": 1,')


def test_jsonl_line_survives_a_kill_right_after_append(tmp_path):
    path = tmp_path / "m.jsonl"
    result = run_python(f"""
        import os, signal
        from shortcut_jax.logs import JsonLines
        lines = JsonLines({str(path)!r})  # a name, because an object that is freed flushes
        lines.append(3, {{"loss": 1.0}})
        os.kill(os.getpid(), signal.SIGKILL)
    """)
    assert result.returncode == -signal.SIGKILL
    assert read_jsonl(path) == [{"step": 3, "loss": 1.0}]


def test_jsonl_truncation_drops_later_steps_and_goes_on_appending(tmp_path):
    path = tmp_path / "m.jsonl"
    lines = JsonLines(path)
    for step in (10, 20, 20, 30, 40):
        lines.append(step, {"x": step})
    assert lines.truncate_after(20) == 2
    lines.append(30, {"x": -30})
    lines.close()
    assert [(r["step"], r["x"]) for r in read_jsonl(path)] == [
        (10, 10),
        (20, 20),
        (20, 20),
        (30, -30),
    ]
    assert os.listdir(tmp_path) == ["m.jsonl"]


@pytest.mark.parametrize(
    "tail", [b'{"step": 30, "lo', b'{"step": 3', b"{", b'{"step": 30}\n\x00\x00', b"1"]
)
def test_jsonl_half_line_is_dropped_and_not_glued_to_the_next(tmp_path, tail):
    path = tmp_path / "m.jsonl"
    path.write_bytes(b'{"step": 10}\n{"step": 20}\n' + tail)
    lines = JsonLines(path)
    lines.truncate_after(20)
    lines.append(21, {})
    lines.close()
    assert [record["step"] for record in read_jsonl(path)] == [10, 20, 21]


def test_jsonl_half_line_is_dropped_on_opening_and_a_whole_one_without_newline_is_kept(tmp_path):
    path = tmp_path / "m.jsonl"
    path.write_bytes(b'{"step": 10}\n{"ste')
    JsonLines(path).close()
    assert read_jsonl(path) == [{"step": 10}]
    path.write_bytes(b'{"step": 10}\n{"step": 20}')
    lines = JsonLines(path)
    lines.append(30, {})
    lines.close()
    assert [record["step"] for record in read_jsonl(path)] == [10, 20, 30]


def test_jsonl_truncation_that_dies_before_the_replace_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "m.jsonl"
    lines = JsonLines(path)
    lines.append(1, {})
    lines.append(2, {})

    def die(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(logs.os, "replace", die)
    with pytest.raises(KeyboardInterrupt):
        lines.truncate_after(1)
    assert [record["step"] for record in read_jsonl(path)] == [1, 2]


# --- TensorBoard --------------------------------------------------------------------------------


def scalar_steps(logdir, tag):
    """What both of TensorBoard's own Python readers show: the classic one and the web server's."""
    from tensorboard.backend.event_processing import event_accumulator, plugin_event_accumulator

    classic = event_accumulator.EventAccumulator(str(logdir)).Reload()
    served = plugin_event_accumulator.EventAccumulator(str(logdir)).Reload()
    steps = [event.step for event in classic.Scalars(tag)]
    assert [event.step for event in served.Tensors(tag)] == steps
    return steps


def test_tensorboard_scalars_read_back(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = TensorBoard(tmp_path)
    board.scalars(0, {"loss": np.float32(1.5), "group/fid": 20})
    board.scalars(10, {"loss": jnp.float32(0.5)})
    events = EventAccumulator(str(tmp_path)).Reload()  # before close: events must not be held back
    assert events.Tags()["scalars"] == ["loss", "group/fid"]
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(0, 1.5), (10, 0.5)]
    assert events.Scalars("group/fid")[0].value == 20
    board.close()


@pytest.mark.parametrize("channels", [1, 3])
def test_tensorboard_image_reads_back(tmp_path, channels):
    import io

    from PIL import Image
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    pixels = np.arange(4 * 6 * channels, dtype=np.uint8).reshape(4, 6, channels)
    board = TensorBoard(tmp_path)
    board.image(7, "samples", pixels)
    board.close()
    (event,) = EventAccumulator(str(tmp_path)).Reload().Images("samples")
    assert (event.step, event.width, event.height) == (7, 6, 4)
    decoded = np.asarray(Image.open(io.BytesIO(event.encoded_image_string)))
    np.testing.assert_array_equal(decoded.reshape(pixels.shape), pixels)


@pytest.mark.parametrize(
    "shape,dtype", [((4, 4, 3), np.float32), ((4, 4), np.uint8), ((4, 4, 4), np.uint8)]
)
def test_tensorboard_refuses_other_images(tmp_path, shape, dtype):
    board = TensorBoard(tmp_path)
    with pytest.raises(ValueError, match="'samples'"):
        board.image(0, "samples", np.zeros(shape, dtype))
    board.close()


def test_tensorboard_restart_hides_the_later_steps_of_the_killed_process(tmp_path):
    board = TensorBoard(tmp_path)
    for step in (0, 10, 20, 30, 40):
        board.scalars(step, {"loss": step})
    board.close()
    board = TensorBoard(tmp_path, restart_step=20)
    board.scalars(25, {"loss": 25})
    board.close()
    assert scalar_steps(tmp_path, "loss") == [0, 10, 20, 25]
    board = TensorBoard(tmp_path, restart_step=10)
    board.scalars(11, {"loss": 11})
    board.close()
    assert scalar_steps(tmp_path, "loss") == [0, 10, 11]


def test_tensorboard_restart_after_the_clock_went_back(tmp_path, monkeypatch):
    for now, restart_step, steps in ((1e9, None, (0, 10, 20)), (9e8, 10, (15,)), (8e8, 10, (11,))):
        monkeypatch.setattr(time, "time", lambda now=now: now)
        board = TensorBoard(tmp_path, restart_step)
        for step in steps:
            board.scalars(step, {"loss": step})
        board.close()
    assert scalar_steps(tmp_path, "loss") == [0, 10, 11]


def test_tensorboard_run_from_scratch_hides_an_earlier_attempt(tmp_path):
    for steps in ((0, 5, 10), (0, 6)):
        board = TensorBoard(tmp_path)
        for step in steps:
            board.scalars(step, {"loss": step})
        board.close()
    assert scalar_steps(tmp_path, "loss") == [0, 6]


def test_tensorboard_never_imports_tensorflow_even_if_installed(tmp_path):
    fake = tmp_path / "site" / "tensorflow"
    fake.mkdir(parents=True)
    (fake / "__init__.py").write_text("raise SystemExit('tensorflow was imported')")
    result = run_python(
        f"""
        import sys
        import numpy as np
        from shortcut_jax.logs import TensorBoard
        assert "tensorboard" not in sys.modules and "PIL" not in sys.modules
        board = TensorBoard({str(tmp_path / "log")!r}, restart_step=3)
        board.scalars(4, {{"loss": 1.0}})
        board.image(4, "x", np.zeros((2, 2, 3), np.uint8))
        board.close()
        assert not [name for name in sys.modules if name.split(".")[0] == "tensorflow"]
        """,
        environment={"PYTHONPATH": os.pathsep.join([str(ROOT), str(fake.parent)])},
    )
    assert result.returncode == 0, result.stderr
    assert scalar_steps(tmp_path / "log", "loss") == [4]


def test_tensorboard_not_installed_names_the_key_and_the_fix(tmp_path, monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == "tensorboard"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with pytest.raises(UserError, match=r"log\.tensorboard.*pip install tensorboard"):
        MetricLogger(tmp_path, 10, tensorboard=True, write=True, restart_step=None)
    MetricLogger(tmp_path, 10, tensorboard=False, write=True, restart_step=None).close()


# --- Progress line ------------------------------------------------------------------------------


def test_progress_line():
    line = progress_line(
        1600,
        6400,
        {"loss": 0.4123, "empirical": 0.5, "grad": 12345.6, "lr": 1e-4, "bad": float("nan")},
        {"images_per_second_per_device": 9812.3, "eta_seconds": 72.4, "core_hours": 3.0},
    )
    assert line == (
        "step 1,600/6,400 (25%)  loss 0.412  empirical 0.5  grad 12,346  lr 0.0001  bad nan"
        "  9,812 img/s/device  ETA 1m 12s"
    )


def test_progress_line_without_a_speed():
    assert progress_line(0, 10, {"loss": 1.0}, {}) == "step 0/10 (0%)  loss 1"


@pytest.mark.parametrize("step,percent", [(6399, "(99%)"), (6400, "(100%)")])
def test_progress_line_says_100_percent_at_the_end_only(step, percent):
    assert percent in progress_line(step, 6400, {}, {})


@pytest.mark.parametrize(
    "seconds,text",
    [
        (0, "0s"),
        (59.6, "1m 00s"),
        (3599.7, "1h 00m"),
        (7500, "2h 05m"),
        (2 * 86400 + 3 * 3600, "2d 03h"),
    ],
)
def test_progress_line_shows_two_units_of_time(seconds, text):
    assert progress_line(1, 2, {}, {"eta_seconds": seconds}).endswith(f"  ETA {text}")


# --- MetricLogger -------------------------------------------------------------------------------


def test_metric_logger_writes_everywhere(tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr(logging, "info", lambda message, *args: said.append(message % args))
    workdir = tmp_path / "new" / "W"
    clock_info = {"images_per_second_per_device": 50.0, "seconds/training": 3.0}
    with MetricLogger(workdir, 20, tensorboard=True, write=True, restart_step=None) as logger:
        logger.scalars(10, {"loss": 0.5, "loss/bootstrap_1_8": 0.25}, clock_info)
        logger.scalars(20, {"fid10k": 30.0})
        logger.image(20, "samples", np.zeros((2, 2, 1), np.uint8))
    assert read_jsonl(workdir / "metrics.jsonl") == [
        {"step": 10, "loss": 0.5, "loss/bootstrap_1_8": 0.25, **clock_info},
        {"step": 20, "fid10k": 30.0},
    ]
    assert scalar_steps(workdir / "tensorboard", "loss") == [10]
    assert scalar_steps(workdir / "tensorboard", "seconds/training") == [10]
    # The progress line shows the headline only, and evaluations have lines of their own.
    assert said == ["step 10/20 (50%)  loss 0.5  50 img/s/device"]


def test_metric_logger_closes_its_files_when_training_raises(tmp_path):
    with (
        pytest.raises(RuntimeError),
        MetricLogger(tmp_path, 9, tensorboard=True, write=True, restart_step=None) as logger,
    ):
        raise RuntimeError
    with pytest.raises(ValueError, match="closed file"):
        logger.scalars(1, {"loss": 1.0})
    with pytest.raises(ValueError, match="closed file"):
        logger.image(1, "x", np.zeros((2, 2, 1), np.uint8))


def test_metric_logger_is_silent_on_other_processes(tmp_path, monkeypatch):
    monkeypatch.setattr(logging, "info", lambda *args: pytest.fail(f"said {args}"))
    workdir = tmp_path / "W"
    with MetricLogger(workdir, 20, tensorboard=True, write=False, restart_step=3) as logger:
        logger.scalars(10, {"loss": 0.5}, {})
        logger.image(10, "samples", np.zeros((2, 2, 1), np.uint8))
    assert not workdir.exists()


@pytest.mark.parametrize(
    "restart_step,expected", [(20, [0, 10, 20, 25]), (None, [25]), (0, [0, 25])]
)
def test_metric_logger_restart_supersedes_what_it_writes_again(tmp_path, restart_step, expected):
    with MetricLogger(tmp_path, 99, tensorboard=True, write=True, restart_step=None) as logger:
        for step in (0, 10, 20, 30):
            logger.scalars(step, {"loss": 1.0})
    with MetricLogger(
        tmp_path, 99, tensorboard=True, write=True, restart_step=restart_step
    ) as logger:
        logger.scalars(25, {"loss": 1.0})
    assert [record["step"] for record in read_jsonl(tmp_path / "metrics.jsonl")] == expected
    assert scalar_steps(tmp_path / "tensorboard", "loss") == expected


def test_metric_logger_writes_no_tensorboard_unless_asked(tmp_path):
    with MetricLogger(tmp_path, 9, tensorboard=False, write=True, restart_step=None) as logger:
        logger.scalars(1, {"loss": 1.0})
        logger.image(1, "samples", np.zeros((2, 2, 1), np.uint8))
    assert os.listdir(tmp_path) == ["metrics.jsonl"]
