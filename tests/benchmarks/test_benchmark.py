"""The benchmark: it runs in small, its numbers are sound, and what it compares with is optional."""

import json
import math
import os
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest
from absl.testing import flagsaver
from PIL import Image

from shortcut_jax import benchmark, benchmarks
from shortcut_jax.benchmarks import data, latents, startup, timing
from shortcut_jax.benchmarks.peer import FOLDER, Peer
from shortcut_jax.errors import UserError
from tests.sentences import assert_sentence

FAST_COMPILE = "--xla_backend_optimization_level=0"
COMMAND = ["-m", "shortcut_jax.benchmark", "--small", "--repeats=2"]


CHECKPOINT = ("size", "step", "restore") + tuple(
    f"{copy}/{what}"
    for copy in ("device", "host")
    for what in ("first save", "save", "written", "steps with a save")
)


@pytest.fixture(scope="module")
def measured(run_python, tmp_path_factory):
    """Process of all parts in small but `startup`, and what it wrote."""
    out = tmp_path_factory.mktemp("benchmark") / "new" / "all.json"
    parts = [part for part in benchmarks.PARTS if part != "startup"]
    command = [*COMMAND, f"--parts={','.join(parts)}", f"--out={out}"]
    done = run_python(command, env={"XLA_FLAGS": FAST_COMPILE}, timeout=250)
    assert done.returncode == 0
    return done, json.loads(out.read_text())


def test_numbers_are_finite_positive_and_within_their_spread(measured):
    _, content = measured
    names = {found["name"] for found in content["measurements"]}
    whole = {name for name in names if ": " not in name or name.startswith("metrics/")}
    assert whole == {
        *(f"step/tiny/{name}" for name in ("ceiling", "flow_matching", "shortcut_1_4_guided")),
        *(f"sample/tiny/{steps}{how}" for steps in (1, 4) for how in ("", "/decoded")),
        *(f"checkpoint/tiny/{name}" for name in CHECKPOINT),
        *(f"data/jpeg/{name}" for name in ("decode", "adm", "authors")),
        *(f"data/jpeg/{name}/workers" for name in ("adm", "authors")),
        *(f"data/latents/{name}" for name in ("read", "drawn", "read_and_drawn")),
        *("vae/encode", "vae/decode"),
        *(f"metrics/{name}" for name in ("features", "moments", "moments: share of features")),
        *(f"metrics/distance/{name}" for name in ("ours", "scipy")),
        "metrics/distance: ours / scipy",
        *(f"digits/trainer/{several} per dispatch" for several in (1, 2)),
        "digits/device/ours",
        *(f"host/latents/made {when}" for when in ("ahead", "when asked for")),
        "host/log",
    }
    for found in content["measurements"]:
        low, high = found["spread"]
        assert 0 < low <= found["value"] <= high and math.isfinite(high)
        assert found["conditions"]
    units = {(found["name"], found["unit"]) for found in content["measurements"]}
    assert ("data/jpeg/adm", "images / CPU s") in units and ("data/jpeg/adm", "images / s") in units


def by_name(content):
    """(name, unit) -> measurement."""
    return {(found["name"], found["unit"]): found for found in content["measurements"]}


def test_what_a_step_and_a_sample_take_is_sound(measured):
    found = by_name(measured[1])
    mfu = {key: m for key, m in found.items() if key[0].endswith(": MFU")}
    assert {name.split("/")[0] for name, _ in mfu} == {"step", "sample"}
    assert all(0 < m["value"] <= 1.1 for m in mfu.values())
    for name in ("flow_matching", "shortcut_1_4_guided"):
        # The tiny network does much that is no product.
        assert 1 < found[f"step/tiny/{name}: XLA / formula", "x"]["value"] < 1.5
        size = found[f"step/tiny/{name}: FLOPs", "GFLOP / device"]
        assert size["conditions"]["batch_size"] == 16
        peak = found[f"step/tiny/{name}: peak memory", "GB / device"]
        assert peak["value"] * 1e9 > peak["conditions"]["state_bytes"]


def test_the_cost_of_a_shortcut_step_is_beside_that_of_its_flops(measured):
    found = by_name(measured[1])
    for kind in ("time", "CPU s"):
        cost = found["step/tiny/shortcut_1_4_guided: cost", f"x flow_matching's {kind}"]
        relative = found["step/tiny/shortcut_1_4_guided: cost / FLOPs", f"x FLOPs' ({kind})"]
        # 3 passes for a row; 2 more for every fourth, and as many for its twin without a label.
        assert cost["conditions"]["ratio_of_flops"] == pytest.approx((3 + 2 * 2 / 4) / 3)
        assert cost["value"] == pytest.approx(relative["value"] * 4 / 3)


STAGES = [
    *("python", "import shortcut_jax", "import shortcut_jax.train", "devices"),
    *("compiled", "train state", "first step"),
]


def test_a_start_says_when_each_stage_was_done(measured, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", FAST_COMPILE)  # finds the step that `measured` has compiled
    found = startup._start(small=True, cache=Path(os.environ["JAX_COMPILATION_CACHE_DIR"]))
    times = list(found["done"].values())
    assert list(found["done"]) == STAGES and times == sorted(times) and times[0] > 0
    assert found["conditions"]["workload"] == "tiny"


def test_stages_of_a_start_add_up(monkeypatch):
    def start(small, cache):
        assert small and cache.is_dir()
        times = {"python": 1.0, "first step": 3.5 if any(cache.iterdir()) else 9.0}
        (cache / "program").touch()
        return {"done": times, "conditions": {"workload": "w"}}

    monkeypatch.setattr(startup, "_start", start)
    found = {m.name: m.value for m in startup.measure(benchmarks.Options(5, small=True))}
    assert found == {
        "startup/w/cold: python": 1.0,
        "startup/w/cold: first step": 8.0,
        "startup/w/cold": 9.0,
        "startup/w/warm: python": 1.0,
        "startup/w/warm: first step": 2.5,
        "startup/w/warm": 3.5,
    }


@pytest.mark.slow
def test_a_start_finds_its_program_in_the_cache_of_the_one_before(run_python, tmp_path):
    out = tmp_path / "startup.json"
    assert run_python([*COMMAND, "--parts=startup", f"--out={out}"]).returncode == 0
    found = by_name(json.loads(out.read_text()))
    cold, warm = (found[f"startup/tiny/{kind}: compiled", "s"] for kind in ("cold", "warm"))
    assert cold["value"] > warm["value"]
    assert {name for name, _ in found if "cold" in name} == {
        "startup/tiny/cold",
        *(f"startup/tiny/cold: {stage}" for stage in STAGES),
    }


def test_the_table_has_every_number_and_the_file_the_machine(measured):
    done, content = measured
    for found in content["measurements"]:
        value = f"{found['value']:.4g}"
        assert any(
            line[: benchmark.WIDTH].strip() == found["name"]
            and line[benchmark.WIDTH :].split()[0] == value
            and line.endswith(found["unit"])
            for line in done.stdout.splitlines()
        )
    assert content["machine"]["backend"] == "cpu" and content["machine"]["cpus_usable"] >= 1
    assert content["machine"]["pillow"] and content["options"]["small"] is True


def test_an_unknown_part_is_a_sentence(run_python, tmp_path):
    done = run_python([*COMMAND, "--parts=data,nothing", f"--out={tmp_path / 'a.json'}"])
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert_sentence(done.stderr.splitlines()[-1], ("'nothing'", "step, sample, checkpoint, data"))
    assert done.stdout == "" and not list(tmp_path.iterdir())
    with pytest.raises(UserError, match="is empty"):
        benchmark.check_parts([])


@pytest.mark.parametrize("name", benchmark.COMPARES)
def test_something_to_compare_with_that_no_part_is_compared_with(name):
    with flagsaver.flagsaver(**{name: "there"}):
        benchmark.check_comparisons(["step", *benchmark.COMPARES[name]])
        with pytest.raises(UserError) as error:
            benchmark.check_comparisons(["step", "sample"])
    assert_sentence(str(error.value), (f"--{name}", "--parts=step,sample", "add it, or leave out"))


def test_median_and_ratio():
    ours = [timing.Took(8, 9.0, cpu) for cpu in (1.0, 4.0, 2.0)]
    theirs = [timing.Took(4, 9.0, cpu) for cpu in (1.0, 1.0, 2.0)]
    per_cpu, per_wall = timing.rates("x", ours, "images", {})
    assert (per_cpu.value, per_cpu.spread) == (4.0, (2.0, 8.0))
    assert per_wall.value == pytest.approx(8 / 9)
    found = timing.ratio("x", ours, theirs, {})  # of rounds: 2, 1/2, 2
    assert (found.value, found.spread) == (2.0, (0.5, 2.0))


def test_contenders_take_turns_after_a_round_that_does_not_count():
    order = []

    def contender(name):
        return lambda: order.append(name) or timing.Took(1, 1.0, len(order))

    found = timing.rounds({"a": contender("a"), "b": contender("b")}, 2)
    assert order == ["a", "b"] * 3
    assert [took.cpu for took in found["a"]] == [3, 5]


def test_cpu_time_leaves_out_waiting():
    took = timing.timed(lambda: time.sleep(0.2) or 3)
    assert took.count == 3 and took.wall >= 0.2 and took.cpu < 0.1


def test_jpegs_are_photographs_that_differ(tmp_path):
    folder = data.write_jpegs(tmp_path / "jpegs", 4, (50, 37))
    images = [np.asarray(Image.open(path)) for path in sorted(folder.rglob("*.jpg"))]
    assert [image.shape for image in images] == [(37, 50, 3)] * 4
    for i, image in enumerate(images):
        assert image.std() > 20
        assert all(np.abs(image.astype(int) - other).mean() > 5 for other in images[:i])


def test_the_cache_has_the_shards_that_are_said(tmp_path):
    cache = latents.make_cache(tmp_path, 20, (4, 4, 8), shard_rows=8)
    assert len(list(tmp_path.glob("*.arrayrecord"))) == 3
    rows = cache.rows(np.arange(40))["image"].astype(float)
    assert rows.shape == (40, 4, 4, 8) and len(np.unique(rows[:, 0, 0, 0])) > 35


# ------------------------------------------------------------------ the other side


def script(tmp_path, monkeypatch, body):
    """Has Peer find a program `peer.py` with this body beside turns.py."""
    (tmp_path / "turns.py").write_text((FOLDER / "turns.py").read_text())
    (tmp_path / "peer.py").write_text(textwrap.dedent(body))
    monkeypatch.setattr("shortcut_jax.benchmarks.peer.FOLDER", tmp_path)
    return Peer("tf_python", sys.executable, "peer.py", {"rows": 3})


def test_a_peer_answers_what_it_did(tmp_path, monkeypatch):
    body = """
    import json, sys, time
    from turns import take_turns
    rows = json.loads(sys.argv[1])["rows"]
    def work():
        print("what a library prints is no answer")
        time.sleep(0.1)
        return rows
    take_turns({"library": "1.2"}, {"sleep": work})
    """
    with script(tmp_path, monkeypatch, body) as peer:
        assert peer.versions == {"library": "1.2"}
        for _ in range(2):
            took = peer.run("sleep")
            assert took.count == 3 and took.wall >= 0.1 and took.cpu < 0.09
        process = peer._process
    assert process.poll() is not None


def test_a_peer_that_lacks_its_library_is_a_sentence(tmp_path, monkeypatch):
    with pytest.raises(UserError) as error:
        script(tmp_path, monkeypatch, "import no_such_library")
    said = (f"--tf_python={sys.executable}", "No module named 'no_such_library'", "leave the flag")
    assert_sentence(str(error.value), said)


def test_a_python_that_is_not_there_is_a_sentence(tmp_path):
    with pytest.raises(UserError) as error:
        Peer("torch_python", str(tmp_path / "python"), "diffusers_vae.py", {})
    assert_sentence(str(error.value), ("--torch_python=", "cannot be started"))


@pytest.mark.parametrize("name", ["tf_data", "diffusers_vae", "torch_fidelity_features"])
def test_scripts_import_their_libraries_only_when_they_run(run_python, name):
    code = f"""
import sys
sys.path.insert(0, {str(FOLDER)!r})
import {name}
libraries = {{"tensorflow", "torch", "diffusers", "torch_fidelity", "jax", "shortcut_jax"}}
assert not libraries & set(sys.modules)
"""
    assert run_python(["-c", code]).returncode == 0
