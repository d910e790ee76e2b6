"""The parameters of a run by name: stored, or reconstructed from snapshots, and evaluated."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from shortcut_jax import averages, checkpoint, parameters, run, sampling, snapshots, state, train
from shortcut_jax.errors import UserError
from shortcut_jax.evaluation import grid, measuring, of_runs, reports
from shortcut_jax.parallel import sharding
from shortcut_jax.weights import conversion
from tests.kept_samples import by_steps
from tests.sentences import assert_sentence, contents
from tests.untrained_runs import param_shapes, small

TRACKED = {"averages.rates": (0.5,), "averages.power": (0.05, 0.1), "averages.snapshot_every": 1}
NAMES = ["ema_0.5", "power_0.05", "power_0.1"]
CONFIG = {**TRACKED, "eval.steps": (1,), "eval.metrics": (), "checkpoint.every": 4}
META = {"config": {}, "data": {}, "clock": {}}


def random_like(shapes, seed):
    numbers = np.random.default_rng(seed)
    return jax.tree.map(
        lambda a: numbers.normal(scale=0.2, size=a.shape).astype(np.float32), shapes
    )


class Run:
    """A run whose parameters are random after each of 8 steps; checkpoints at 4 and 8."""

    def __init__(self, workdir):
        self.workdir = workdir
        self.config = small("flow_matching", **CONFIG)
        self.setup = run.prepare(self.config)
        run.claim_workdir(self.config, workdir)
        self.checkpoints = checkpoint.Checkpoints(workdir, keep=3)
        self.stored = {}  # (step, name) -> flat parameters
        writer = snapshots.Snapshots(workdir, self.config.averages, 0)
        update = jax.jit(averages.update)
        shapes = param_shapes(self.setup)
        params = random_like(shapes, 0)
        tracked = averages.start(self.config.averages, params)
        for step in range(8):
            params = random_like(shapes, step + 1)
            tracked = update(tracked, params, step)
            self.stored |= {(step + 1, k): flatten_dict(jax.device_get(tracked[k])) for k in NAMES}
            writer.save(step + 1, tracked)
            if (step + 1) % 4 == 0:
                ema = random_like(shapes, 100 + step)
                self.stored |= {(step + 1, "ema"): flatten_dict(ema)}
                self.stored |= {(step + 1, "online"): flatten_dict(params)}
                arrays = {"params": params, "ema": ema, "averages": tracked}
                self.checkpoints.save(step + 1, arrays, META)
        writer.close()
        self.checkpoints.wait()

    def restore(self, name, step=8):
        return flatten_dict(run.restore_params(self.setup, self.checkpoints, step, name)[0])


@pytest.fixture(scope="module")
def tracked(tmp_path_factory):
    return Run(tmp_path_factory.mktemp("runs") / "tracked")


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for key in expected:
        np.testing.assert_array_equal(found[key], expected[key])


def weighted_sum(tracked, name, step, snapshot_steps):
    """What `name` must be, in float64, from the arrays as they were before they were stored."""
    sources = [averages.Profile(t, w) for t in snapshot_steps for w in (0.05, 0.1)]
    weights, _ = averages.combine(averages.Profile(step, averages.width(name)), sources)
    return {
        key: sum(
            w * tracked.stored[s.step, f"power_{s.width}"][key].astype(np.float64)
            for w, s in zip(weights, sources, strict=True)
        )
        for key in tracked.stored[8, "ema"]
    }


@pytest.mark.parametrize("step", [4, 8])
@pytest.mark.parametrize("name", ["ema", "online", *NAMES])
def test_what_is_stored_is_read(tracked, name, step):
    assert_same(tracked.restore(name, step), tracked.stored[step, name])


@pytest.mark.parametrize(("name", "step"), [("power_0.15", 8), ("power_0.07", 4)])
def test_other_widths_are_reconstructed(tracked, name, step, caplog):
    with caplog.at_level("INFO", logger="absl"):
        found = tracked.restore(name, step)
    # Snapshots up to the step, and none of later parameters.
    expected = weighted_sum(tracked, name, step, range(1, step + 1))
    for key, array in expected.items():
        assert found[key].dtype == np.float32
        np.testing.assert_allclose(found[key], array, rtol=0, atol=2e-7)
    assert f"Reconstructed {name} at step {step} from {2 * step} averages" in caplog.text
    assert "relative error of" in caplog.text


def test_a_reconstruction_holds_little_at_a_time(tracked, monkeypatch):
    shapes = param_shapes(tracked.setup)
    largest = max(a.size * 4 for a in jax.tree.leaves(shapes))
    asked = []
    restore = checkpoint.Checkpoints.restore

    def recorded(self, step, wanted):
        asked.append(sum(a.size * 4 for a in jax.tree.leaves(wanted)))
        return restore(self, step, wanted)

    monkeypatch.setattr(checkpoint.Checkpoints, "restore", recorded)
    whole = tracked.restore("power_0.07", 4)
    monkeypatch.setattr(snapshots, "GROUP_BYTES", largest)
    grouped = tracked.restore("power_0.07", 4)
    assert_same(grouped, whole)
    assert len(asked) > 2 * 8 and max(asked[8:]) <= largest < asked[0]


def test_groups_are_whole_and_no_larger_than_they_may_be(monkeypatch):
    monkeypatch.setattr(snapshots, "GROUP_BYTES", 40)
    sizes = {"a": 4, "b": 6, "c": 1, "d": 30, "e": 9, "f": 1}
    flat = {key: jax.ShapeDtypeStruct((n,), np.float32) for key, n in sizes.items()}
    assert list(snapshots._groups(flat)) == [["a", "b"], ["c"], ["d"], ["e", "f"]]


# ------------------------------------------------------------------ refusals


@pytest.fixture
def copy(tracked, tmp_path):
    """copy(kept snapshots): the checkpoints of a copy of the run."""

    def copy(*kept):
        shutil.copytree(tracked.workdir, tmp_path / "copy")
        for path in (tmp_path / "copy" / "snapshots").iterdir():
            if int(path.name) not in kept:
                shutil.rmtree(path)
        return checkpoint.Checkpoints(tmp_path / "copy", keep=3, read_only=True)

    return copy


@pytest.mark.parametrize(
    ("kept", "name", "fragments"),
    [
        ((1, 2), "best", ("params='best' is not known", "ema_RATE")),
        ((1, 2), "ema_0.7", ("ema_0.7 is not in", *NAMES, "averages.rates")),
        ((), "power_0.2", ("no snapshot of an earlier step", "snapshots", *NAMES)),
        ((4, 8), "power_0.2", ("no snapshot of an earlier step",)),  # of later ones
        ((1,), "power_0.2", ("1 earlier snapshots", "missed by", "10%", "snapshot_every")),
    ],
)
def test_what_cannot_be_had_is_refused(copy, kept, name, fragments):
    checkpoints = copy(*kept)
    with pytest.raises(UserError) as error:
        parameters.check(checkpoints, 4, name, "params")
    assert_sentence(str(error.value), (f"params={name}"[:7], *fragments))


def test_a_run_that_tracked_nothing_names_what_it_has(tmp_path):
    checkpoints = checkpoint.Checkpoints(tmp_path, keep=1)
    arrays = {"params": {"a": np.zeros(3)}, "ema": {"a": np.ones(3)}}
    for step, more in ((1, {}), (2, {"averages": {}})):  # before there was the field, and since
        checkpoints.save(step, {**arrays, **more}, META)
        checkpoints.wait()
        assert checkpoints.averages(step) == []
        with pytest.raises(UserError) as error:
            parameters.check(checkpoints, step, "power_0.1")
        said = ("eval.params=power_0.1", "one of ema, online:", "averages.power")
        assert_sentence(str(error.value), said)
        shardings = sharding.shard_tree(arrays, sharding.make_mesh(1, 1))
        shapes = checkpoint.with_shardings(arrays, shardings)
        found = checkpoints.restore(step, {**shapes, "averages": {}})
        assert found["averages"] == {}
        np.testing.assert_array_equal(found["params"]["a"], np.zeros(3))


def test_a_damaged_snapshot_is_named(tracked, copy):
    checkpoints = copy(1, 2, 3)
    folder = snapshots.folder(checkpoints) / "2" / "state"
    for path in folder.rglob("*"):
        if path.is_file():
            path.write_bytes(b"")
    with pytest.raises(UserError) as error:
        run.restore_params(tracked.setup, checkpoints, 4, "power_0.12")
    assert_sentence(str(error.value), ("snapshot ", str(folder.parent), "move that directory"))


# ------------------------------------------------------------------ what uses the names


def test_sampling_and_export_take_the_names(tracked, tmp_path):
    for name in ("ema_0.5", "power_0.15"):
        model = sampling.load(tracked.workdir, params=name)
        assert_same(flatten_dict(model.params), tracked.restore(name))
        conversion.export(tracked.workdir, tmp_path / name, params=name)
        described = json.loads((tmp_path / name / "architecture.json").read_text())
        assert described["params"] == name
    with pytest.raises(UserError, match="params=ema_0.7 is not in"):
        sampling.load(tracked.workdir, params="ema_0.7")
    # What is exported is one set of parameters, and no run that tracked others.
    again = tmp_path / "again"
    conversion.import_exported(tmp_path / "ema_0.5", again)
    assert_same(flatten_dict(sampling.load(again).params), tracked.stored[8, "ema_0.5"])
    with pytest.raises(UserError, match="expected one of ema, online:"):
        sampling.load(again, params="ema_0.5")


def test_the_evaluation_command_takes_the_names(tracked, run_python, tmp_path):
    workdir = tmp_path / "copy"
    shutil.copytree(tracked.workdir, workdir)
    flags = ["-m", "shortcut_jax.eval", "--config=configs/digits.py:small,objective=flow_matching"]
    flags += [f"--workdir={workdir}", "--config.eval.steps=(1,)", "--config.eval.metrics=()"]
    samples = tmp_path / "samples.npz"
    done = run_python([*flags, "--config.eval.params=power_0.15", f"--save_samples={samples}"])
    assert done.returncode == 0 and "Reconstructed power_0.15 at step 8" in done.stderr
    setup = run.prepare(small("flow_matching", **{"eval.metrics": ()}))
    with np.load(samples) as found:
        for name, same in (("power_0.15", True), ("power_0.1", False)):
            params, shardings = run.restore_params(setup, tracked.checkpoints, 8, name)
            kept, sink = by_steps()
            ways = grid.cells(setup, grid.Grid(steps=(1,)))
            measuring.Evaluator(setup, None, shardings).run(params, 8, ways, sink=sink)
            assert np.array_equal(found["arr_0"], kept[1].images) == same

    config, before = small("flow_matching", **{"eval.params": "ema_0.7"}), contents(workdir)
    with pytest.raises(UserError) as error:
        of_runs.evaluate_checkpoint(run.prepare(config), workdir, 8)
    assert_sentence(str(error.value), ("eval.params=ema_0.7", *NAMES, "averages.rates"))
    assert contents(workdir) == before


# ------------------------------------------------------------------ training


class Toy:
    """A network v(x) = a x + b, so that nothing takes long to compile."""

    dtype, scan_layers, rows = np.float32, False, None

    def clone(self, **_):
        return self

    def init(self, *_):
        return {"params": {"a": jnp.float32(0.5), "inner": {"b": jnp.float32(-0.2)}}}

    def apply(self, variables, x, t, d, labels):
        return variables["params"]["a"] * x + variables["params"]["inner"]["b"]


@pytest.fixture
def toy_run(monkeypatch):
    """toy_run(workdir, **overrides): final state, and what the loop evaluated, by step."""
    seen = {}

    class Recorder:
        def __init__(self, *_):
            pass

        def run(self, params, step, ways):
            seen[step] = flatten_dict(jax.device_get(params))

    monkeypatch.setattr(measuring, "Evaluator", Recorder)
    monkeypatch.setattr(reports, "report", lambda *_: None)
    monkeypatch.setattr(state, "build_network", lambda *_: Toy())

    def run(workdir, **overrides):
        loop = {"eval.every": 4, "eval.params": "power_0.1", "log.tensorboard": False}
        config = small("flow_matching", **{**CONFIG, **loop, "batch_size": 4, **overrides})
        return train.train(config, workdir), seen

    return run


def stores(workdir):
    """Checkpoints and snapshots of a run."""
    folders = ("checkpoints", snapshots.FOLDER)
    return [checkpoint.Checkpoints(workdir, keep=9, read_only=True, folder=f) for f in folders]


def test_the_loop_writes_and_evaluates_them(toy_run, tmp_path):
    final, seen = toy_run(tmp_path)
    assert sorted(final.averages) == NAMES and sorted(seen) == [4, 8]
    checkpoints, kept = stores(tmp_path)
    assert kept.steps() == list(range(1, 9)) and checkpoints.steps() == [4, 8]
    shapes = jax.eval_shape(lambda: Toy().init()["params"])
    wanted = checkpoint.with_shardings(
        shapes, sharding.shard_tree(shapes, sharding.make_mesh(1, 1))
    )
    for step in (4, 8):
        stored = flatten_dict(parameters.restore(checkpoints, step, "power_0.1", wanted))
        assert_same(seen[step], stored)
        snapshot = kept.restore(step, {"averages": {"power_0.1": wanted}})["averages"]
        assert_same(flatten_dict(snapshot["power_0.1"]), stored)
        assert kept.averages(step) == ["power_0.05", "power_0.1"]  # the rates are not needed
    assert_same(seen[8], flatten_dict(parameters.of(final, "power_0.1")))
    for name, field in state.PARAMS_FIELD.items():
        assert parameters.of(final, name) is getattr(final, field)


def test_snapshots_later_than_the_checkpoint_are_made_again(toy_run, tmp_path):
    """As after a kill between a snapshot and the next checkpoint."""
    final, _ = toy_run(tmp_path)
    shutil.rmtree(tmp_path / "checkpoints" / "8")
    shutil.rmtree(tmp_path / "snapshots" / "7")
    before = {step: contents(tmp_path / "snapshots" / str(step)) for step in range(1, 5)}
    marked = tmp_path / "snapshots" / "6" / "meta" / "metadata"
    marked.write_text("of the process that died")
    again, _ = toy_run(tmp_path)
    jax.tree.map(np.testing.assert_array_equal, again, final)
    assert stores(tmp_path)[1].steps() == list(range(1, 9))
    assert json.loads(marked.read_text()).keys() == {"checksums"}
    assert before == {step: contents(tmp_path / "snapshots" / str(step)) for step in range(1, 5)}

    # What is tracked cannot be changed on the way: the averages would be of something else.
    before = contents(tmp_path)
    for key, value in (("averages.rates", ()), ("averages.power", (0.1,))):
        with pytest.raises(UserError) as error:
            toy_run(tmp_path, **{key: value})
        assert_sentence(str(error.value), (f"{key}: ", "nothing was changed"))
    assert contents(tmp_path) == before


def test_no_snapshots_where_none_are_asked_for(toy_run, tmp_path):
    final, _ = toy_run(tmp_path, **{"averages.snapshot_every": 0})
    assert not (tmp_path / "snapshots").exists() and sorted(final.averages) == NAMES


def test_they_start_at_the_parameters_that_a_run_starts_from(toy_run, tmp_path):
    first, _ = toy_run(tmp_path / "first")
    # One step of the same batches, with buffers of their own: they are donated to it.
    config = {"total_steps": 1, "averages.snapshot_every": 0}
    second, _ = toy_run(tmp_path / "second", init_from=str(tmp_path / "first"), **config)
    starts, ends = flatten_dict(first.ema), flatten_dict(second.params)
    for key, found in flatten_dict(second.averages["ema_0.5"]).items():
        np.testing.assert_allclose(found, (starts[key] + ends[key]) / 2, rtol=1e-6)
        assert starts[key] != ends[key]
    for key, found in flatten_dict(second.averages["power_0.1"]).items():
        np.testing.assert_allclose(found, ends[key], rtol=1e-6)
