"""What a run takes over from another one, and from which checkpoint of it."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from shortcut_jax import pretrained, run, state
from shortcut_jax.parallel import sharding
from tests.untrained_runs import param_shapes, random_params, save_run, small


@pytest.fixture(scope="module")
def flow(tmp_path_factory):
    """Workdir of a flow-matching run, and the EMA by step."""
    workdir = tmp_path_factory.mktemp("runs") / "flow"
    return workdir, save_run(workdir, small("flow_matching"), steps=(2, 4))


@pytest.fixture(scope="module")
def diffusion(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("runs") / "diffusion"
    return workdir, save_run(workdir, small("diffusion"), steps=(7,))


def assert_equal(found, expected):
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def place(setup):
    shapes = param_shapes(setup)
    return shapes, sharding.shard_tree(shapes, setup.mesh)


# ------------------------------------------------------------------ which checkpoint


@pytest.mark.parametrize(
    ("text", "step"),
    [("flow", 4), ("flow/", 4), ("./flow/checkpoints/2", 2), ("flow/checkpoints/4/", 4)],
)
@pytest.mark.parametrize("absolute", [False, True])
def test_the_newest_checkpoint_or_the_one_that_is_named(flow, monkeypatch, text, step, absolute):
    workdir, emas = flow
    monkeypatch.chdir(workdir.parent)
    config = small("progressive_distillation", teacher=f"{workdir.parent}/{text}")
    if not absolute:
        config.teacher = text
    found = pretrained.find(config).teacher
    assert (found.key, found.workdir, found.step) == ("teacher", workdir, step)
    monkeypatch.chdir("/")  # the path is that of the time when it was looked up
    assert_equal(found.params(*place(run.prepare(config))), emas[step])


def test_looking_and_reading_changes_nothing(flow):
    workdir, _ = flow
    before = {p: p.read_bytes() if p.is_file() else None for p in workdir.rglob("*")}
    config = small("consistency_distillation", teacher=str(workdir), init_from=str(workdir))
    origins = pretrained.find(config)
    for found in (origins.teacher, origins.init_from):
        found.params(*place(run.prepare(config)))
    assert {p: p.read_bytes() if p.is_file() else None for p in workdir.rglob("*")} == before


def test_a_resumed_run_needs_its_teacher_for_missing_pairs_only():
    nowhere = {"teacher": "nowhere", "init_from": "nowhere"}
    nothing = pretrained.Origins(None, None)
    for objective in ("progressive_distillation", "consistency_distillation"):
        assert pretrained.find(small(objective, **nowhere), resuming=True) == nothing
    reflow = small("reflow", **nowhere)
    assert pretrained.find(reflow, resuming=True, has_pairs=True) == nothing
    with pytest.raises(pretrained.UserError, match="^teacher=nowhere names no run"):
        pretrained.find(reflow, has_pairs=True)  # that it starts from, too
    with pytest.raises(pretrained.UserError, match="^teacher=nowhere names no run"):
        pretrained.find(small("reflow", **nowhere), resuming=True)


def test_products_in_another_type_are_the_same_network(flow, tmp_path):
    workdir = shutil.copytree(flow[0], tmp_path / "flow")
    saved = json.loads((workdir / "config.json").read_text())
    (workdir / "config.json").write_text(json.dumps(saved | {"model.dtype": "bfloat16"}))
    assert pretrained.find(small("reflow", teacher=str(workdir))).teacher.step == 4


# ------------------------------------------------------------------ what a run starts with

FRESH = 7.0  # in every array of a fresh state


def fresh_state(setup):
    """A state like a fresh one, with its shardings; of an objective whose teacher gives targets."""
    params = jax.tree.map(lambda a: jnp.full(a.shape, FRESH), param_shapes(setup))
    has_teacher = setup.objective.teacher == "targets"
    opt_state = state.build_optimizer(setup.config).init(params)
    fresh = state.TrainState(
        jnp.int32(0), params, params, opt_state, params if has_teacher else {}, {}
    )
    return fresh, sharding.shard_tree(fresh, setup.mesh)


def start(objective, **overrides):
    """The state a run starts with, and the fresh one it would start with otherwise."""
    config = small(objective, **overrides)
    fresh, shardings = fresh_state(run.prepare(config))
    return pretrained.start_from(pretrained.find(config), fresh, shardings), fresh


def test_a_teacher_is_where_the_student_starts(flow):
    workdir, emas = flow
    for objective in ("progressive_distillation", "consistency_distillation"):
        found, fresh = start(objective, teacher=str(workdir))
        for part in (found.params, found.ema, found.teacher):
            assert_equal(part, emas[4])
        assert_equal((found.step, found.opt_state), (fresh.step, fresh.opt_state))


def test_a_reflow_student_starts_at_its_teacher_too(flow):
    workdir, emas = flow
    found, _ = start("reflow", teacher=f"{workdir}/checkpoints/2")
    assert_equal((found.params, found.ema), (emas[2], emas[2]))
    assert found.teacher == {}


def test_init_from_goes_before_the_teacher(flow, diffusion):
    found, _ = start("progressive_distillation", teacher=str(flow[0]), init_from=str(diffusion[0]))
    assert_equal((found.params, found.ema), (diffusion[1][7], diffusion[1][7]))
    assert_equal(found.teacher, flow[1][4])


@pytest.mark.parametrize("origin", ["flow", "diffusion"])
def test_a_shortcut_model_starts_from_another_objective(request, origin):
    workdir, emas = request.getfixturevalue(origin)
    found, fresh = start("shortcut", init_from=str(workdir))
    ema = emas[max(emas)]
    assert_equal((found.params, found.ema), (ema, ema))
    assert_equal((found.step, found.opt_state), (fresh.step, fresh.opt_state))
    assert found.teacher == {}


def test_without_origins_the_state_stays_as_it_is():
    found, fresh = start("shortcut")
    assert found is fresh


def test_parameters_and_ema_are_arrays_of_their_own(flow):
    # A step is given its state to write over: XLA refuses one array in two places.
    found, _ = start("progressive_distillation", teacher=str(flow[0]))
    step = jax.jit(lambda a: jax.tree.map(lambda x: x + 1, a), donate_argnums=0)
    assert_equal(step((found.params, found.ema, found.teacher))[1]["output"]["bias"][0],
                 flow[1][4]["output"]["bias"][0] + 1)  # fmt: skip


def test_a_shortcut_model_begins_as_the_flow_it_starts_from(flow):
    setups = [run.prepare(small(name)) for name in ("flow_matching", "shortcut")]
    x = np.random.default_rng(0).normal(size=(5, 8, 8, 1)).astype(np.float32)
    t, labels = np.linspace(0, 0.9, 5, dtype=np.float32), np.arange(5)

    def predict(setup, d):
        return state.apply_fn(setup.network)(flow[1][4], x, t, np.full(5, d, np.float32), labels)

    velocity, jump = predict(setups[0], 0), predict(setups[1], 0)
    assert np.abs(velocity).mean() > 0.1
    np.testing.assert_array_equal(jump, velocity)
    assert np.abs(predict(setups[1], 1) - jump).mean() > 0.01  # only at d = 0


# ------------------------------------------------------------------ digests


def test_a_digest_names_every_bit_of_the_parameters():
    params = random_params(run.prepare(small("flow_matching")), seed=0)
    params = jax.tree.map(jnp.asarray, params)
    name = pretrained.digest(params)
    assert len(name) == 16 and int(name, 16) >= 0
    assert pretrained.digest(jax.tree.map(jnp.copy, params)) == name

    bias = params["output"]["bias"]
    nearly = bias.at[1].set(jnp.nextafter(bias[1], jnp.inf))
    others = [
        {**params, "output": {**params["output"], "bias": nearly}},
        {**params, "output": {**params["output"], "bias": -bias}},
        {**params, "t_embed": params["d_embed"], "d_embed": params["t_embed"]},
        {k: v for k, v in params.items() if k != "d_embed"},
    ]
    digests = {pretrained.digest(other) for other in others}
    assert len(digests) == len(others) and name not in digests


def test_evaluation_needs_no_teacher():
    run.prepare(small("progressive_distillation", teacher=""))
