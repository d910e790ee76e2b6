"""A loaded model: that it draws what an evaluation draws, and refuses what it cannot draw."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from shortcut_jax import run, sampling, state, trained
from shortcut_jax.errors import UserError
from shortcut_jax.evaluation import of_runs
from shortcut_jax.objectives import OBJECTIVES
from tests.kept_samples import by_steps
from tests.sentences import assert_sentence
from tests.untrained_runs import random_params, save_run, small

SHAPE = (8, 8, 1)


@pytest.fixture(scope="module")
def load(tmp_path_factory):
    """load(objective, cfg_scale=1.5, ...): the model of an untrained run, which is written once."""

    @functools.cache
    def load(objective, **overrides):
        workdir = tmp_path_factory.mktemp("runs")
        save_run(workdir, small(objective, **overrides))
        return sampling.load(workdir)

    return load


def shortcut(load, cfg_scale=1.5):
    """M = 8, so that the smallest step is cheap; some dropout, so that guidance makes sense."""
    overrides = {"objective.denoise_timesteps": 8, "objective.class_dropout": 0.1}
    steps = {"eval.steps": (1, 8), "eval.steps_in_loop": (1, 8)}
    return load("shortcut", **overrides, **steps, **{"objective.cfg_scale": cfg_scale})


# ------------------------------------------------------------------ what evaluation draws


@pytest.mark.parametrize("name", ["shortcut", "diffusion", "consistency_training"])
def test_samples_are_those_of_an_evaluation(name, tmp_path):
    config = small(name, **{"eval.seed": 7, "eval.metrics": ("fd_digits_mlp64",)})
    save_run(tmp_path, config)
    found, sink = by_steps()
    of_runs.evaluate_checkpoint(run.prepare(config), tmp_path, 4, sink=sink)
    model = sampling.load(tmp_path)
    for num_steps, kept in found.items():
        drawn = model.sample(num_steps=num_steps, num=50, seed=7)
        assert drawn.dtype == np.uint8 and drawn.shape == (50, *SHAPE)
        np.testing.assert_array_equal(drawn, kept.images)
        np.testing.assert_array_equal(drawn, model.sample(num_steps=num_steps, num=50, seed=7))
    np.testing.assert_array_equal(model.labels(50, 7), found[1].labels)
    assert np.any(found[1].images != found[4].images)
    assert np.any(model.sample(num_steps=4, num=50, seed=6) != found[4].images)


def test_sample_i_does_not_depend_on_how_many_there_are(load):
    model = shortcut(load)
    few, many = model.sample(num_steps=1, num=3), model.sample(num_steps=1, num=70)
    assert len(few) == 3 and len(many) == 70
    assert np.abs(few.astype(int) - many[:3]).max() <= 1
    assert len(np.unique(many.reshape(70, -1), axis=0)) == 70
    assert len(model.sample(num_steps=1)) == 8


def test_a_label_changes_its_sample_and_no_other(load):
    model = shortcut(load)
    labels = model.labels(8)
    drawn = model.sample(num_steps=1, num=8)
    np.testing.assert_array_equal(model.sample(num_steps=1, labels=labels), drawn)
    labels[2] = (labels[2] + 1) % 10
    changed = model.sample(num_steps=1, labels=labels.tolist()) != drawn
    assert changed.any(axis=(1, 2, 3)).tolist() == [i == 2 for i in range(8)]


def test_one_program_serves_all_seeds_labels_and_numbers_of_steps(load, monkeypatch):
    traced = []

    def apply_fn(network):
        def apply(params, x, t, d, labels):
            traced.append(x.shape)
            return -x

        return apply

    model = dataclasses.replace(shortcut(load, 1.0))  # has no program yet
    monkeypatch.setattr(state, "apply_fn", apply_fn)
    model.sample(num_steps=1, num=4)
    before = len(traced)
    model.sample(num_steps=8, labels=[1, 2, 3, 4], seed=3)
    model.interpolate(num=4)
    assert before > 0 and len(traced) == before


def test_the_notebook_of_the_documentation_on_eight_devices(run_python, tmp_path):
    save_run(tmp_path / "run", small("shortcut"))
    code = f"""
from shortcut_jax import sampling
model = sampling.load("{tmp_path}/run")
images = model.sample(num_steps=4, labels=[3] * 5, seed=0)
strip = model.interpolate(num=16, label=3, num_steps=1, seed=0)
import numpy as np; np.savez("{tmp_path}/drawn.npz", images=images, strip=strip)
"""
    assert run_python(["-W", "error::DeprecationWarning", "-c", code], devices=8).returncode == 0
    model = sampling.load(tmp_path / "run")
    with np.load(tmp_path / "drawn.npz") as found:
        here = model.sample(num_steps=4, labels=[3] * 5)
        assert np.abs(found["images"].astype(int) - here).max() <= 1
        here = model.interpolate(num=16, label=3)
        assert np.abs(found["strip"].astype(int) - here).max() <= 1


# ------------------------------------------------------------------ which parameters


def test_load_takes_the_newest_checkpoint_and_the_ema(tmp_path):
    config = small("shortcut")
    emas = save_run(tmp_path, config, steps=(4, 8))
    online = random_params(run.prepare(config), seed=1004)
    for options, step, expected in [
        ({}, 8, emas[8]),
        ({"step": 4}, 4, emas[4]),
        ({"step": 4, "params": "online"}, 4, online),
    ]:
        model = sampling.load(str(tmp_path), **options)
        assert model.step == step
        jax.tree.map(np.testing.assert_array_equal, model.params, expected)


# ------------------------------------------------------------------ interpolation


@pytest.mark.parametrize("name", ["shortcut", "diffusion", "consistency_training"])
def test_interpolation_leads_from_one_sample_to_another(name, load):
    model = load(name)
    strip = model.interpolate(num=8, label=3, num_steps=4, seed=5)
    ends = model.sample(num_steps=4, labels=[3] * 8, seed=5)[:2]
    np.testing.assert_array_equal(strip[[0, -1]], ends)
    steps = np.abs(np.diff(strip.astype(int), axis=0)).mean(axis=(1, 2, 3))
    assert steps.max() < np.abs(ends[0].astype(int) - ends[1]).mean()
    drawn = model.interpolate(num=8, num_steps=4, seed=5)
    label = model.labels(1, 5)[0]
    np.testing.assert_array_equal(drawn, model.interpolate(num=8, label=label, num_steps=4, seed=5))


def test_interpolation_mixes_noises_so_that_their_variance_stays(load, monkeypatch):
    model = dataclasses.replace(shortcut(load))  # has no program yet
    # A velocity of zero: the image is the noise.
    monkeypatch.setattr(state, "apply_fn", lambda _: lambda params, x, *others: jnp.zeros_like(x))
    strip = model.interpolate(num=5, seed=2)
    (b, a), _ = sampling.initial(2, np.arange(2), SHAPE, 10)
    for image, n in zip(strip, (0, 0.25, 0.5, 0.75, 1), strict=True):
        expected = sampling.to_uint8(n * np.asarray(a) + np.sqrt(1 - n**2) * np.asarray(b))
        assert np.abs(image.astype(int) - expected).max() <= 1


def test_mixed_noises_are_standard_normal():
    request = {
        "first": jnp.arange(0, 400, 2), "second": jnp.arange(1, 401, 2),
        "n": jnp.linspace(0, 1, 200), "labels": jnp.zeros(200, jnp.int32),
    }  # fmt: skip
    x, _, step_noise = trained._mixture(SHAPE, 10, request, 0)
    for noise in (x, step_noise(0), step_noise(1)):
        assert abs(noise.mean()) < 0.04 and abs(noise.std() - 1) < 0.03
        # In the middle, too, and not at the ends only.
        assert np.abs(np.asarray(noise).reshape(5, -1).std(axis=1) - 1).max() < 0.06
    np.testing.assert_array_equal(
        step_noise(3)[0], sampling.step_noise(0, jnp.zeros(1, int), 3, SHAPE)[0]
    )


# ------------------------------------------------------------------ guidance


@pytest.mark.parametrize("cfg_scale", [0, 1, 3.0])
def test_another_scale_of_guidance_is_that_of_a_model_trained_with_it(cfg_scale, load):
    def guided(scale):
        overrides = {"objective.class_dropout": 0.1, "objective.cfg_scale": scale}
        return load("flow_matching", **overrides)

    model = guided(1.5)
    drawn = model.sample(num_steps=3, cfg_scale=cfg_scale)
    np.testing.assert_array_equal(drawn, guided(float(cfg_scale)).sample(num_steps=3))
    assert np.any(drawn != model.sample(num_steps=3))
    np.testing.assert_array_equal(
        model.sample(num_steps=3), model.sample(num_steps=3, cfg_scale=1.5)
    )


def test_guidance_may_change_only_where_it_is_applied_while_sampling(load):
    model = shortcut(load)
    assert np.any(model.sample(num_steps=8, cfg_scale=4) != model.sample(num_steps=8))
    with pytest.raises(UserError, match="cfg_scale=4 .* shortcut .*in 4 steps .* in the weights"):
        model.sample(num_steps=4, cfg_scale=4)
    model.check(4, cfg_scale=1.5)  # the one it has
    for wrong in (-1.0, np.nan, np.inf):
        with pytest.raises(UserError, match="positive number"):
            model.check(8, cfg_scale=wrong)
    with pytest.raises(UserError, match="trained without labels"):
        shortcut(load, 0.0).check(8, cfg_scale=1.5)
    with pytest.raises(UserError, match="class_dropout=0"):
        load("flow_matching").check(8, cfg_scale=1.5)


# ------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("arguments", "fragments"),
    [
        ({"num_steps": 3}, ("num_steps holds 3;", "1, 2, 4, 8.")),
        ({"num_steps": 16}, ("num_steps holds 16;", "denoise_timesteps=8")),
        ({"num_steps": 0}, ("num_steps=0", "from 1")),
        ({"num_steps": 4.0}, ("num_steps=4.0", "whole number")),
        ({"num_steps": 1, "labels": [0, 10]}, ("labels=[0, 10]", "0 to 9", "digits")),
        ({"num_steps": 1, "labels": [-1]}, ("labels=[-1]", "0 to 9")),
        ({"num_steps": 1, "labels": [0.5]}, ("labels=[0.5]", "whole numbers")),
        ({"num_steps": 1, "labels": []}, ("labels=[]", "one for each sample")),
        ({"num_steps": 1, "labels": 3}, ("labels=3", "one for each sample")),
        ({"num_steps": 1, "labels": [1, 2], "num": 3}, ("num=3", "2 labels")),
        ({"num_steps": 1, "num": 0}, ("num=0", "from 1")),
        ({"num_steps": 1, "seed": -1}, ("seed=-1", "4294967295")),
    ],
)
def test_samples_that_cannot_be_drawn(arguments, fragments, load):
    model = shortcut(load)
    with pytest.raises(UserError) as refused:
        model.sample(**arguments)
    assert_sentence(str(refused.value), fragments)


def test_interpolations_that_cannot_be_drawn(load):
    model = shortcut(load)
    for arguments, fragment in [
        ({"num": 1}, "num=1"),
        ({"label": 10}, "labels=[10]"),
        ({"num_steps": 3}, "num_steps holds 3;"),
    ]:
        with pytest.raises(UserError) as refused:
            model.interpolate(**arguments)
        assert fragment in str(refused.value)


def test_an_unconditional_model_takes_no_labels(load):
    model = shortcut(load, 0.0)
    assert len(model.sample(num_steps=1)) == 8 and len(model.interpolate(num=8)) == 8
    for draw in (
        lambda: model.sample(num_steps=1, labels=[3]),
        lambda: model.interpolate(label=3),
        # A conditional model becomes one:
        lambda: shortcut(load).sample(num_steps=8, labels=[3], cfg_scale=0),
    ):
        with pytest.raises(UserError, match=r"labels=\[3\] .*unconditional"):
            draw()


def test_runs_that_cannot_be_loaded(tmp_path):
    with pytest.raises(UserError, match=r"nowhere/config\.json"):
        sampling.load(tmp_path / "nowhere")
    run.claim_workdir(small("shortcut"), tmp_path)
    with pytest.raises(UserError, match="no finished checkpoint"):
        sampling.load(tmp_path)
    save_run(tmp_path, small("shortcut"), steps=(4, 8))
    with pytest.raises(UserError, match=r"step=5 .* 4, 8"):
        sampling.load(tmp_path, step=5)
    with pytest.raises(UserError, match=r"params='best' .* ema, online, ema_RATE"):
        sampling.load(tmp_path, params="best")


def test_an_autoencoder_for_a_network_that_sees_images(tmp_path):
    save_run(tmp_path, small("shortcut"))
    with pytest.raises(UserError) as error:
        sampling.load(tmp_path, autoencoder="vae.safetensors")
    assert_sentence(str(error.value), ("an autoencoder is given", str(tmp_path), "leave it out"))


# ------------------------------------------------------------------ config.json


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_config_of_a_run_is_the_one_it_was_trained_with(name, tmp_path):
    config = small(name, teacher="" if OBJECTIVES[name].teacher == "none" else "runs/flow")
    run.claim_workdir(config, tmp_path)
    restored = run.restore_config(tmp_path)
    assert restored.to_dict() == config.to_dict()
    assert restored.eval.steps == (1, 4) and restored.is_locked
    assert run.config_hash(restored) == run.config_hash(config)


def edit_config(workdir, **changes):
    run.claim_workdir(small("shortcut"), workdir)
    path = workdir / "config.json"
    flat = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({k: v for k, v in flat.items() if v is not None}))


def test_a_config_of_an_older_version_has_the_new_keys_at_their_defaults(tmp_path):
    edit_config(tmp_path, **{"eval.grid_rows": None, "init_from": None, "model.remat": None})
    restored = run.restore_config(tmp_path)
    assert restored.eval.grid_rows == 10 and restored.init_from == ""
    assert restored.model.remat == "none"


@pytest.mark.parametrize(
    "change",
    [
        {"model.depth": None}, {"objective.class_dropout": None}, {"data.name": None},
        {"model.new": 1}, {"a.b.c": 1}, {"model.depth": "3"}, {"model.patch_size": 3},
    ],
    ids=str,
)  # fmt: skip
def test_another_config_is_refused(change, tmp_path):
    edit_config(tmp_path, **change)
    with pytest.raises(UserError, match=r"config\.json is not a config .*expected"):
        run.restore_config(tmp_path)
