"""The configs of the paper's data sets, key by key: what a run of each row of Table 1 trains."""

import pytest
from ml_collections import ConfigDict

from configs import celebahq, imagenet
from shortcut_jax import config as config_lib
from shortcut_jax import data, objectives, spaces

FILES = {"imagenet": imagenet, "celebahq": celebahq}

# Row -> keys of its section that both data sets share. mean_flow is later than the paper.
ROWS = {
    "shortcut": {
        "denoise_timesteps": 128, "bootstrap_fraction": 0.25, "bootstrap_params": "ema",
        "bootstrap_cfg": True, "flow_time_grid": 0, "noise_floor": 0.0, "bootstrap_clip": 0.0,
        "bootstrap_label_dropout": False, "reuse_images": False,
    },
    "flow_matching": {"flow_time_grid": 0, "noise_floor": 0.0},
    "diffusion": {"sampler": "ddpm"},
    "live_reflow": {
        "denoise_timesteps": 128, "bootstrap_fraction": 0.25, "reflow_steps": 128,
        "flow_time_grid": 0, "noise_floor": 0.0,
    },
    "reflow": {"num_pairs": 50_000, "pair_steps": 128, "flow_time_grid": 0, "noise_floor": 0.0},
    "progressive_distillation": {
        "denoise_timesteps": 128, "noise_floor": 0.0, "bootstrap_clip": 0.0,
    },
    "consistency_distillation": {
        "denoise_timesteps": 128, "noise_floor": 0.0, "bootstrap_clip": 0.0, "sampler": "renoise",
    },
    "consistency_training": {"denoise_timesteps": 128, "noise_floor": 0.0, "sampler": "renoise"},
    "mean_flow": {
        "mean_flow_fraction": 0.25, "time_mean": 0.4, "time_std": 1.0, "weight_power": 1.0,
    },
}  # fmt: skip

# Guidance of 1.5 and dropped labels on ImageNet, but where nothing is guided, or the teacher alone.
GUIDED = {"cfg_scale": 1.5, "class_dropout": 0.1}
OF_IMAGENET = {
    "shortcut": {**GUIDED, "step_size_sampling": "systematic"},
    "flow_matching": GUIDED,
    "diffusion": GUIDED,
    "live_reflow": GUIDED,
    "reflow": {"cfg_scale": 1.5, "class_dropout": 0.0},
    "progressive_distillation": {"cfg_scale": 1.5},
    "consistency_distillation": {"cfg_scale": 1.0},
    "consistency_training": {"cfg_scale": 1.0},
    "mean_flow": GUIDED,
}


def of_celebahq(row):
    """No row sees a label."""
    own = {"cfg_scale": 0.0}
    own |= {"class_dropout": 1.0} if "class_dropout" in OF_IMAGENET[row] else {}
    return own | ({"step_size_sampling": "random"} if row == "shortcut" else {})


@pytest.mark.parametrize("row", objectives.OBJECTIVES)
def test_every_row_has_the_settings_of_its_data_set(row):
    expected = {"name": row, **ROWS[row]}
    for variant in ("", "b,", "xl,"):
        found = imagenet.get_config(f"{variant}objective={row}").objective
        assert found.to_dict() == expected | OF_IMAGENET[row]
    found = celebahq.get_config(f"objective={row}").objective
    assert found.to_dict() == expected | of_celebahq(row)


def trains(config: ConfigDict) -> dict:
    """The keys that decide what is trained, flat, beside the objective and the files of data."""
    left_out = ("objective.", "eval.", "checkpoint.", "log.", "mesh.", "averages.", "data.data_dir",
                "data.latents", "data.workers", "autoencoder.weights")  # fmt: skip
    flat = config_lib.flatten(config)
    return {
        key: value
        for key, value in flat.items()
        if not key.startswith(left_out) and key not in config_lib.LAYOUT
    }


OF_BOTH = {
    "seed": 0, "accumulation_steps": 1, "steps_per_dispatch": 1, "ema_rate": 0.999, "teacher": "",
    "init_from": "",
    "data.name": "images", "data.split": "train", "data.flip": True, "data.image_size": 256,
    "data.crop": "adm",
    "autoencoder.kind": "sd", "autoencoder.scale": 0.18215,
    "model.patch_size": 2, "model.mlp_ratio": 4.0, "model.attention_scale": "sqrt",
    "model.time_scale": 1000.0, "model.step_embedding": "d", "model.modulation_init": "zero",
    "model.dtype": "auto",
    "optimizer.lr": 1e-4, "optimizer.schedule": "constant", "optimizer.warmup_steps": 0,
    "optimizer.b1": 0.9, "optimizer.b2": 0.999, "optimizer.eps": 1e-8,
    "optimizer.weight_decay": 0.1, "optimizer.on_nonfinite": "stop",
}  # fmt: skip
B = {"model.hidden_size": 768, "model.depth": 12, "model.num_heads": 12}
XL = {"model.hidden_size": 1152, "model.depth": 28, "model.num_heads": 16}
IMAGENET = {
    "total_steps": 800_000, "batch_size": 256,
    "data.builder": "imagenet2012", "data.num_classes": 1000,
}  # fmt: skip
CELEBAHQ = {
    "total_steps": 400_000, "batch_size": 64,
    "data.builder": "celebahq", "data.num_classes": 1,
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "arg", "own"),
    [
        ("imagenet", "", IMAGENET | B),
        ("imagenet", "b", IMAGENET | B),
        ("imagenet", "xl", IMAGENET | XL),
        ("celebahq", "", CELEBAHQ | B),
    ],
)
@pytest.mark.parametrize("row", [row for row in ROWS if row != "mean_flow"])
def test_all_rows_are_trained_alike(name, arg, own, row):
    config = FILES[name].get_config(f"{arg},objective={row}")
    assert trains(config) == OF_BOTH | own
    assert spaces.shape(config, data.describe(config.data)[0]) == (32, 32, 4)


@pytest.mark.parametrize("name", FILES)
def test_what_is_measured_is_the_fid_of_50_000_samples_of_the_ema(name):
    section = FILES[name].get_config().eval
    assert section.metrics == ("fid",) and section.num_samples == 50_000
    assert section.params == "ema" and section.reference == ""
    assert {128, 4, 1} <= set(section.steps)


# Row -> what the released code does otherwise in it, and what it does so in every row.
RELEASED = {
    "shortcut": {
        "bootstrap_fraction": 1 / 8, "step_size_sampling": "stratified", "flow_time_grid": 128,
        "noise_floor": 1e-5, "bootstrap_clip": 4.0, "reuse_images": True,
    },
    "flow_matching": {"flow_time_grid": 128, "noise_floor": 1e-5},
    "diffusion": {},
    "live_reflow": {
        "bootstrap_fraction": 1 / 8, "reflow_steps": 8, "flow_time_grid": 128, "noise_floor": 1e-5,
    },
    "reflow": {"flow_time_grid": 128, "noise_floor": 1e-5, "class_dropout": 0.1},
    "progressive_distillation": {"noise_floor": 1e-5, "bootstrap_clip": 4.0},
    "consistency_distillation": {"noise_floor": 1e-5, "bootstrap_clip": 4.0, "sampler": "euler"},
    "consistency_training": {"noise_floor": 1e-5},
}  # fmt: skip
RELEASED_MODEL = {
    "model.attention_scale": "linear", "model.time_scale": 1.0, "model.step_embedding": "log2",
    "model.modulation_init": "xavier",
}  # fmt: skip


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("row", RELEASED)
def test_authors_code_changes_what_the_released_code_does_otherwise(name, row):
    plain = config_lib.flatten(FILES[name].get_config(f"objective={row}"))
    found = config_lib.flatten(FILES[name].get_config(f"objective={row},authors_code"))
    expected = {f"objective.{key}": value for key, value in RELEASED[row].items()}
    expected |= {**RELEASED_MODEL, "data.crop": "authors", "eval.params": "online"}
    assert found == plain | expected
