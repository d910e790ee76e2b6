"""The verbs of the evaluation binary, as commands on a small trained run."""

import functools
import json

import numpy as np
import pytest
from PIL import Image

from shortcut_jax.metrics import references
from tests.sentences import assert_sentence

SMALL = "--config=configs/digits.py:small"
FEW = "--config.eval.num_samples=50"


@pytest.fixture(scope="module")
def evaluate(in_turn):
    """evaluate([argument, ...], ...): what calls of the evaluation binary found."""
    return functools.partial(in_turn, "eval")


@pytest.fixture(scope="module")
def workdir(run_quickly, tmp_path_factory):
    """Of a run of 8 steps with checkpoints 4 and 8, which dropped labels in training."""
    folder = tmp_path_factory.mktemp("verbs") / "run"
    flags = [SMALL, f"--workdir={folder}", "--config.eval.every=0"]
    assert run_quickly(["-m", "shortcut_jax.main", *flags, *OWN]).returncode == 0
    return folder


# Guided where it takes 8 steps, so that guidance makes a difference without many.
OWN = ["--config.objective.class_dropout=0.1", "--config.objective.denoise_timesteps=8"]
OWN += ["--config.eval.steps=(1,8)", "--config.eval.steps_in_loop=(1,)"]


@pytest.fixture(scope="module")
def done(evaluate, workdir):
    """Answers of one call of everything that succeeds, and the folder with what was written."""
    folder, run = workdir.parent, [SMALL, f"--workdir={workdir}", *OWN]
    metrics = "--metrics=fd_digits,fd_digits_mlp64"
    commands = {
        "grid": ["run", *run, "--params=ema,online,ema", "--cfg_scales=1,2"],
        "npz": ["sample", *run, f"--out={folder / 'many.npz'}"],
        "pngs": ["sample", *run, "--steps=1", f"--out={folder / 'pngs'}", "--step=4"],
        "ref": ["ref", SMALL, f"--out={folder / 'ref.npz'}"],
        "calc": ["calc", f"--images={folder / 'many_1.npz'}", f"--reference={folder / 'ref.npz'}",
                 metrics, f"--out={folder / 'calc.json'}"],
        "of files": ["calc", f"--images={folder / 'pngs'}", f"--reference={folder / 'ref.npz'}",
                     metrics],
        "itself": ["calc", f"--images={folder / 'pngs'}", f"--reference={folder / 'pngs'}",
                   metrics],
        "follow": ["follow", *run, "--poll_seconds=0.1", "--steps=1"],
        "again": ["follow", *run, "--poll_seconds=0.1", "--steps=1"],
        "other": ["follow", *run, "--poll_seconds=0.1", "--steps=1", "--params=online"],
        "stored": ["run", *run, "--config.eval.metrics=('fd_digits',)", "--steps=1", "--dry_run"],
    }  # fmt: skip
    answers = dict(zip(commands, evaluate(*commands.values()), strict=True))
    for name, answer in answers.items():
        assert answer["status"] == 0, (name, answer["error"])
    return folder, answers


def records(workdir):
    text = (workdir / "eval" / "results.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


def value(workdir, **facts):
    (found,) = [r for r in records(workdir) if facts.items() <= r.items()]
    return found["value"]


def test_a_grid_has_a_row_for_each_way_and_guidance_only_where_there_is_one(done, workdir):
    _, answers = done
    rows = [line.split("  ")[0].strip() for line in answers["grid"]["out"].splitlines()[1:9]]
    assert rows == [
        f"{metric} {params} cfg={scale}"
        for params in ("ema", "online")
        for metric, scale in (("fd_digits", 1), ("fd_digits_mlp64", 1), ("fd_digits", 2),
                              ("fd_digits_mlp64", 2))
    ]  # fmt: skip
    guided = {(r["sampling_steps"], r["cfg_scale"]) for r in records(workdir) if r["step"] == 8}
    assert guided == {(1, 1.0), (8, 1.0), (8, 2.0)}
    one = dict(step=8, sampling_steps=8, metric="fd_digits", params="ema")
    assert value(workdir, **one, cfg_scale=2.0) != value(workdir, **one, cfg_scale=1.0)
    pictures = {path.name for path in (workdir / "eval" / "8").glob("*.png")}
    assert pictures == {
        "samples.png", "samples_ema_2.png", "samples_online_1.png", "samples_online_2.png",
        "curve.png",
    }  # fmt: skip


def test_samples_are_written_whole_and_nothing_else_is(done, workdir):
    folder, _ = done
    assert {path.name for path in folder.iterdir()} == {
        "run", "many_1.npz", "many_8.npz", "pngs", "ref.npz", "calc.json",
    }  # fmt: skip
    assert {p.name for p in (workdir / "eval").iterdir()} == {"4", "8", "results.jsonl"}
    with np.load(folder / "many_1.npz") as found:
        assert found["arr_0"].shape == (50, 8, 8, 1) and found["arr_0"].dtype == np.uint8
        assert found["arr_1"].shape == (50,)


def test_pictures_and_arrays_hold_the_same_samples(done):
    folder, _ = done
    lines = (folder / "pngs" / "labels.csv").read_text().splitlines()
    with np.load(folder / "many_1.npz") as found:
        labels = [f"{i:06}.png,{label}" for i, label in enumerate(found["arr_1"])]
    assert lines == ["path,label", *labels]
    assert len(list((folder / "pngs").glob("*.png"))) == 50
    assert np.asarray(Image.open(folder / "pngs" / "000049.png")).shape == (8, 8)


def test_comparing_files_gives_what_the_run_found(done, workdir):
    folder, answers = done
    found = {r["metric"]: r for r in json.loads((folder / "calc.json").read_text())}
    for metric in ("fd_digits", "fd_digits_mlp64"):
        whole = value(workdir, step=8, sampling_steps=1, params="ema", metric=metric, cfg_scale=1.0)
        assert found[metric]["value"] == pytest.approx(whole, rel=1e-12)
        assert f"{metric:<15}  {whole:.6f}" in answers["calc"]["out"].splitlines()
        assert found[metric]["num_samples"] == 50
        assert found[metric]["reference_size"] == 1797
        assert found[metric]["protocol"] == "plain"


def test_stored_statistics_say_of_which_images_they_are(done):
    folder, _ = done
    for reference in references.load(folder / "ref.npz"):
        origin = {"builder": "digits", "split": "train+test", "crop": None}
        assert origin.items() <= reference.facts.items()


def test_a_set_is_at_no_distance_from_itself(done):
    _, answers = done
    for line in answers["itself"]["out"].splitlines():
        assert abs(float(line.split()[1])) < 1e-6


def test_follow_takes_every_checkpoint_once_and_stops(done, workdir):
    _, answers = done
    assert "eval/4/samples.png" in answers["follow"]["out"]
    assert "eval/8/samples.png" in answers["follow"]["out"]
    assert answers["again"]["out"] == answers["follow"]["out"].splitlines()[-1] + "\n"
    assert answers["again"]["out"] == "The run ended at step 8.\n"
    assert {r["sampling_steps"] for r in records(workdir) if r["step"] == 4} == {1}


def test_follow_takes_every_checkpoint_again_for_another_grid(done, workdir):
    _, answers = done
    assert "eval/4/samples.png" in answers["other"]["out"]
    assert "eval/8/samples.png" in answers["other"]["out"]
    assert {r["params"] for r in records(workdir) if r["step"] == 4} == {"ema", "online"}


def test_a_dry_run_says_what_would_be_done(done):
    _, answers = done
    assert "sampling steps       1\n" in answers["stored"]["out"]


# ------------------------------------------------------------------ what is refused

BAD = {
    "no verb": (["measure"], ("'measure'", "run, follow, sample, ref, calc")),
    "another verb's flag": (["run", "RUN", "--images=a"], ("--images", "ref or calc", "leave it")),
    "calc with a config": (["calc", SMALL, "--images=a"], ("config",)),
    "no images": (["calc", "--reference=REF"], ("--images is missing",)),
    "no reference": (["calc", "--images=MANY"], ("--reference is missing",)),
    "no out": (["sample", "RUN"], ("--out is missing", "samples.npz")),
    "a picture": (["sample", "RUN", "--out=a.png"], ("--out=a.png", ".npz file nor a folder")),
    "a folder without a name": (["sample", "RUN", "--out=."], ("--out=. names neither",)),
    "other images": (
        ["sample", "RUN", "--out=FOLDER", "--steps=1", "--config.eval.num_samples=2", "--dry_run"],
        ("FOLDER", "other than the 2", "(1, the first 000002.png)", "another folder"),
    ),
    "two sources": (["ref", SMALL, "--images=MANY", "--out=a.npz"], ("--config", "just one")),
    "two sections": (
        ["ref", SMALL, "--metrics=fd_digits", "--out=a.npz"],
        ("--metrics is given", "--config", "leave out --metrics"),
    ),
    "size of images": (
        ["ref", "--images=MANY", "--image_size=8", "--metrics=fd_digits", "--out=a.npz"],
        ("--image_size is given", "MANY", "leave out --image_size"),
    ),
    "no source": (["ref", "--out=a.npz"], ("--config", "--images", "give one")),
    "no file": (["ref", SMALL], ("--out=None", "expected an .npz")),
    "steps": (["run", "RUN", "--steps=3"], ("--steps holds 3", "power of two")),
    "no numbers": (["run", "RUN", "--steps=one"], ("--steps=one", "not a list of numbers")),
    "parameters": (["run", "RUN", "--params=best"], ("--params='best'", "ema, online")),
    "untracked": (["run", "RUN", "--params=ema_0.5"], ("ema_0.5", "ema, online")),
    "guidance": (["run", "RUN", "--cfg_scales=-1"], ("cfg_scale=-1.0", "not possible")),
    "unguided": (
        ["run", "RUN", "--steps=1", "--cfg_scales=2"],
        ("cfg_scale=2.0", "1 steps are not guided"),
    ),
    "metric": (["calc", "--images=MANY", "--reference=REF", "--metrics=fd"], ("'fd'", "fd_digits")),
    "protocol": (
        ["calc", "--images=MANY", "--reference=REF", "--metrics=fd_digits", "--protocols=adm"],
        ("'adm'", "plain"),
    ),
    "weights": (
        ["calc", "--images=MANY", "--reference=REF", "--metrics=fid"],
        ("eval.inception_weights=''", "shortcut_jax.download"),
    ),
    "grey images": (
        ["calc", "--images=MANY", "--reference=REF", "--inception_weights=random"],
        ("MANY", "(50, 8, 8, 1)", "[n, H, W, 3]", "grey"),
    ),
    "not made so": (
        ["calc", "--images=MANY", "--reference=REF", "--metrics=fd_digits_mlp64,fd_digits"],
        ("REF", "fd_digits_mlp64", "is measured", "eval ref"),
    ),
    "another size": (
        ["calc", "--images=LARGE", "--reference=REF", "--metrics=fd_digits"],
        ("(9, 9, 1)", "(8, 8, 1)", "another metric"),
    ),
    "absent": (
        ["calc", "--images=absent", "--reference=REF", "--metrics=fd_digits"],
        ("absent", "does not exist", "folder or zip"),
    ),
    "no run": (["follow", SMALL, "--workdir=absent", "--give_up_after=0.1", "--poll_seconds=0.05"],
               ("absent", "no run")),
    "dead run": (["follow", "DEAD", "--give_up_after=0.1", "--poll_seconds=0.05"],
                 ("no new checkpoint for 0.1 seconds", "--give_up_after")),
}  # fmt: skip


def test_what_is_wrong_is_refused_in_one_sentence(evaluate, workdir, tmp_path):
    many, ref, large = (tmp_path / f"{name}.npz" for name in ("many", "ref", "large"))
    np.savez(many, arr_0=np.arange(3200, dtype=np.uint8).reshape(50, 8, 8, 1))
    np.savez(large, arr_0=np.zeros((3, 9, 9, 1), np.uint8))
    dead = tmp_path / "dead"
    dead.mkdir()
    (dead / "config.json").write_bytes((workdir / "config.json").read_bytes())
    run = [SMALL, *OWN]
    folder = tmp_path / "folder"
    folder.mkdir()
    for name in ("000001.png", "000002.png"):  # the first would be replaced
        (folder / name).write_bytes(b"")
    names = {"MANY": str(many), "REF": str(ref), "LARGE": str(large), "FOLDER": str(folder)}

    def fill(text):
        for name, path in names.items():
            text = text.replace(name, path)
        return text

    whole = {"RUN": [*run, f"--workdir={workdir}"], "DEAD": [*run, f"--workdir={dead}"]}
    made = ["ref", f"--images={many}", f"--out={ref}", "--metrics=fd_digits"]
    commands = [
        [fill(word) for arg in args for word in whole.get(arg, [arg])] for args, _ in BAD.values()
    ]
    first, *answers = evaluate(made, *commands)
    assert first["status"] == 0, first["error"]
    for (name, (_, fragments)), answer in zip(BAD.items(), answers, strict=True):
        assert answer["status"] == 2, name
        assert_sentence(answer["error"], tuple(map(fill, fragments)))
