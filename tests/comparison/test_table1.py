"""Table 1: the comparison of results, and the command itself."""

import json
import shutil

import numpy as np
import pytest

from configs import digits
from shortcut_jax import config as config_lib
from shortcut_jax import run
from shortcut_jax.comparison import ablations, experiment, table1_report
from shortcut_jax.comparison.paper_results import TABLE_1
from shortcut_jax.errors import UserError
from tests.sentences import assert_sentence, contents

# ------------------------------------------------------------------ the comparison


def made_up_rows(factor=1.0):
    """Rows of our own that order as the paper's CelebA-HQ column does, over three seeds."""
    return {
        row: {
            str(n): [factor * cell.value + e for e in (0.0, 0.01, 0.02)]
            for n, cell in zip((128, 4, 1), cells[0], strict=True)
        }
        for row, cells in TABLE_1.items()
    }


def test_all_28_pairs_hold_where_ours_order_as_the_paper():
    for kinds in table1_report.orderings(made_up_rows(), dataset=0).values():
        assert {kind: len(pairs) for kind, pairs in kinds.items()} == {
            "hold": 28, "do not hold": 0, "within noise": 0,
        }  # fmt: skip


def test_orderings_name_what_differs():
    rows = made_up_rows()
    rows["shortcut"]["1"] = [500.0, 501.0, 502.0]  # worst instead of second
    rows["diffusion"]["4"] = [60.0, 130.0, 100.0]  # overlaps flow matching's 63.3
    found = table1_report.orderings(rows, dataset=0)
    wrong = [pair for pair in TABLE_1 if pair not in ("shortcut", "progressive_distillation")]
    assert set(found[1]["do not hold"]) == {("shortcut", row) for row in wrong}
    assert ("flow_matching", "diffusion") in found[4]["within noise"]
    assert found[128]["do not hold"] == found[128]["within noise"] == []


def test_rows_that_were_not_run_are_left_out():
    rows = {name: made_up_rows()[name] for name in ("shortcut", "diffusion")}
    found = table1_report.orderings(rows, dataset=1)
    assert [sum(map(len, kinds.values())) for kinds in found.values()] == [1, 1, 1]


def test_claims_of_the_paper_hold_in_the_paper_and_fail_where_they_should():
    rows = made_up_rows()
    assert all(table1_report.claims(rows).values()) and len(table1_report.claims(rows)) == 7
    # 20.5 is below a fifth of 280.5; worse by a factor of 3 it is above that and the other rows.
    rows["shortcut"]["1"] = [61.5]
    wrong = [name for name, holds in table1_report.claims(rows).items() if not holds]
    assert len(wrong) == 3 and all(name.startswith("at 1 steps shortcut") for name in wrong)
    rows["shortcut"]["128"] = [1.16 * 7.31]
    assert sum(not holds for holds in table1_report.claims(rows).values()) == 4


def negated(rows):
    """A score that is the higher, the lower the distance."""
    return {
        row: {n: [-v for v in values] for n, values in by_steps.items()}
        for row, by_steps in rows.items()
    }


def test_where_higher_is_better_orderings_and_claims_are_those_of_the_distance():
    rows = made_up_rows()
    rows["shortcut"]["1"] = [500.0, 501.0, 502.0]
    rows["diffusion"]["4"] = [60.0, 130.0, 100.0]
    for dataset in (0, 1):
        assert table1_report.orderings(negated(rows), dataset, True) == table1_report.orderings(
            rows, dataset
        )
    # 1000 - distance: positive, as Inception scores are, which have no factor of five.
    scores = {
        row: {n: [1000 - v for v in values] for n, values in by_steps.items()}
        for row, by_steps in made_up_rows().items()
    }
    found = table1_report.claims(scores, True)
    assert all(found.values()) and len(found) == 7
    assert "at 1 steps shortcut is above flow_matching" in found
    scores["shortcut"] = {"1": [600.0], "4": [600.0], "128": [840.0]}
    wrong = [name for name, holds in table1_report.claims(scores, True).items() if not holds]
    assert wrong == [
        "at 1 steps shortcut is above flow_matching",
        "at 1 steps shortcut is above consistency_training",
        "at 1 steps shortcut is above live_reflow",
        "at 4 steps shortcut is above flow_matching",
        "at 128 steps the mean of shortcut is within 15 % of flow_matching, or better",
    ]


def test_mean_and_half_the_range():
    assert experiment.spread([1.0, 2.0, 6.0]) == "3 ± 2.5"
    assert experiment.spread([0.8249]) == "0.825"
    assert experiment.spread([]) == ""


def result(name, seed, **values):
    records = [
        {"metric": "fd", "sampling_steps": int(n[1:]), "value": v} for n, v in values.items()
    ]
    return {"name": name, "seed": seed, "records": records}


def test_values_are_gathered_over_seeds():
    results = [result("a", 0, _1=1.0, _4=2.0), result("b", 0, _1=5.0), result("a", 1, _1=3.0)]
    assert experiment.values(results) == {
        "fd": {"a": {"1": [1.0, 3.0], "4": [2.0]}, "b": {"1": [5.0]}}
    }


def record(metric, **reference):
    protocol = dict.fromkeys(table1_report.PROTOCOL, "x") | {"num_samples": 50_000}
    protocol = {k: v for k, v in protocol.items() if not k.startswith("reference")}
    return {"metric": metric, "sampling_steps": 1, "value": 2.0, **protocol, **reference}


COUNTED = {"reference": "adm.npz", "reference_size": 50_000}


@pytest.mark.parametrize(
    ("records", "text"),
    [
        ([record("fid", **COUNTED)], "parameters against 50,000 images of adm.npz;"),
        (
            [record("fid", **COUNTED | {"reference_size": None})],
            "parameters against an unknown number of images of adm.npz;",
        ),
        ([record("is"), record("fid", **COUNTED)], "parameters against 50,000 images of adm.npz;"),
        ([record("is")], "50,000 samples of the x parameters; x on"),
    ],
)
def test_the_table_says_what_samples_were_compared_with(records, text):
    spent = {"per_update": 3, "updates": 2, "teacher_updates": 0, "pairs": 0, "teacher": 0}
    row = {"name": "shortcut", "seed": 0, "budget": spent, "config": {"data.name": "toy"}}
    found = table1_report.summarise([row | {"records": records}])
    assert text in table1_report.markdown(json.loads(json.dumps(found)))


def test_the_report_reads_each_metric_in_its_own_direction():
    spent = {"per_update": 3, "updates": 2, "teacher_updates": 0, "pairs": 0, "teacher": 0}
    rows = [
        {"name": name, "seed": 0, "budget": spent, "config": {"data.name": "toy"}, "records": [
            record("fid_5000", **COUNTED) | {"value": fid, "protocol": "adm"},
            record("is_5000") | {"value": score, "protocol": "adm"},
        ]}
        for name, fid, score in (("shortcut", 20.5, 90.0), ("flow_matching", 280.5, 2.0))
    ]  # fmt: skip
    said = table1_report.markdown(table1_report.summarise(rows))
    fid, score = said.split("### The paper's orderings in ")[1:]
    assert fid.startswith("fid_5000 (adm)\n") and score.startswith("is_5000 (adm) (higher is")
    assert "at 1 steps shortcut is below a fifth of flow_matching: yes" in fid
    assert "at 1 steps shortcut is above flow_matching: yes" in score
    for text in (fid, score):
        assert "**no**" not in text and "1 steps: 1 hold, 0 do not hold, 0 within noise." in text
    rows[0]["records"][1]["value"] = 1.0
    said = table1_report.markdown(table1_report.summarise(rows))
    assert "do not hold: shortcut > flow_matching" in said


# ------------------------------------------------------------------ the commands

SMALL = "--config=configs/digits.py:small"
LONGER = "--config.total_steps=24"  # the student of half of 8 would have fewer steps than stages
ROWS = "flow_matching,progressive_distillation"


@pytest.fixture(scope="module")
def table(run_quickly, tmp_path_factory):
    """Workdir and output of a table with a teacher, two rows and two seeds."""
    workdir = tmp_path_factory.mktemp("table")
    flags = [SMALL, LONGER, f"--workdir={workdir}", f"--rows={ROWS}", "--seeds=2"]
    done = run_quickly(["-m", "shortcut_jax.table1", *flags], timeout=300)
    assert done.returncode == 0
    return workdir, done.stdout


def test_the_command_prints_what_rows_spend_and_the_table(table):
    _, printed = table
    lines = [" ".join(line.split()) for line in printed.splitlines()]
    # The shortcut model would take 24 * (32 * 3 + 8 * 2) = 2,688.
    assert "flow_matching 2,688 0 0 28 of 96" in lines
    assert "progressive_distillation 2,784 1,344 0 9 of 160" in lines
    assert any(line.startswith("| progressive_distillation (2) | (302.9) |") for line in lines)


def test_the_command_writes_table_numbers_and_pictures(table):
    workdir, _ = table
    assert {p.name for p in workdir.iterdir() if p.is_file()} == {
        "table1.json", "table1.md", "curves.png", "samples.png",
    }  # fmt: skip
    found = json.loads((workdir / "table1.json").read_text())
    assert list(found["rows"]) == ["progressive_distillation", "flow_matching"]  # the paper's order
    assert found["rows"]["flow_matching"]["seeds"] == [0, 1]
    for rows in found["metrics"].values():
        for by_steps in rows.values():
            assert {n: len(values) for n, values in by_steps.items()} == {"1": 2, "4": 2}
    # Both seeds were really trained, on teachers of their own.
    for name in ("teacher", "flow_matching", "progressive_distillation"):
        seeds = [json.loads((workdir / f"seed_{s}/{name}/config.json").read_text()) for s in (0, 1)]
        assert [c["seed"] for c in seeds] == [0, 1]
    assert seeds[1]["teacher"] == str(workdir / "seed_1" / "teacher")
    values = found["metrics"]["fd_digits"]["flow_matching"]["1"]
    assert values[0] != values[1]


def test_started_again_it_does_what_is_missing_alone(table, run_quickly, tmp_path):
    workdir = tmp_path / "copy"
    shutil.copytree(table[0], workdir)
    kept, redone = (workdir / f"seed_{s}/flow_matching/{experiment.RESULT}" for s in (0, 1))
    before, stamp = json.loads(redone.read_text()), kept.stat().st_mtime_ns
    redone.unlink()
    (workdir / "table1.json").unlink()
    flags = [SMALL, LONGER, f"--workdir={workdir}", "--rows=flow_matching", "--seeds=2"]
    done = run_quickly(["-m", "shortcut_jax.table1", *flags])
    assert done.returncode == 0 and "Compiled the step" not in done.stderr  # nothing was trained
    assert kept.stat().st_mtime_ns == stamp
    assert json.loads(redone.read_text())["records"] == before["records"]
    old, new = (json.loads((w / "table1.json").read_text()) for w in (table[0], workdir))
    assert new["metrics"] == old["metrics"]


def test_rows_measured_otherwise_are_left_out(table):
    config = digits.get_config("small")
    assert len(experiment.results(table[0], config)) == 4
    config.eval.num_samples = 51
    assert experiment.results(table[0], config) == []


def test_a_result_of_another_length_does_not_stand_for_a_longer_run(tmp_path):
    config = digits.get_config("small,objective=flow_matching")
    config.optimizer.schedule = "constant"  # so that training may go on
    run.claim_workdir(config, tmp_path)
    recorded = {"config": config_lib.flatten(config), "records": []}
    recorded["config"]["eval.every"] = 0
    (tmp_path / experiment.RESULT).write_text(json.dumps(recorded))
    before = contents(tmp_path)
    config.total_steps += 1
    for begin in (lambda: experiment.perform(config, tmp_path, {}),
                  lambda: experiment.train_once(config, tmp_path)):  # fmt: skip
        with pytest.raises(UserError) as error:
            begin()
        fragments = ("config.json is of a run of total_steps=8", "give 9", "another --workdir")
        assert_sentence(str(error.value), fragments)
    assert contents(tmp_path) == before
    config.total_steps -= 1
    experiment.perform(config, tmp_path, {})  # which is done already


def test_a_result_of_an_older_version_is_read(table, tmp_path):
    path = tmp_path / "seed_0" / "flow_matching" / experiment.RESULT
    shutil.copytree(table[0] / "seed_0" / "flow_matching", path.parent)
    found = json.loads(path.read_text())
    assert found["config"].pop("eval.seed") == config_lib.default().eval.seed
    path.write_text(json.dumps(found))
    assert len(experiment.results(tmp_path, digits.get_config("small"))) == 1


def test_report_of_several_tables(table, run_quickly, tmp_path):
    out, path = tmp_path / "results.md", table[0] / "table1.json"
    flags = [f"--tables={path},{path}", f"--out={out}"]
    done = run_quickly(["-m", "shortcut_jax.comparison.results", *flags])
    assert done.returncode == 0
    assert out.read_text().count((table[0] / "table1.md").read_text().strip()) == 2


# name -> flags and what the sentence says
WRONG = {
    "another config": (
        [LONGER, "--rows=flow_matching", "--config.optimizer.lr=1e-3"],
        "optimizer.lr: 0.004 -> 0.001",
    ),
    "a teacher of another budget": (
        [LONGER, "--rows=progressive_distillation", "--teacher_share=0.4"],
        "teacher/config.json is of a run of total_steps=14, which this comparison would give 12",
    ),
    "nothing to compare": (
        ["--rows=shortcut", "--config.eval.metrics=()"], "eval.metrics is empty",
    ),
    "a seed": (["--rows=shortcut", "--config.seed=3"], "seed=3 is set"),
    # Every row is checked before any is trained.
    "a row that cannot be trained": ([f"--rows={ROWS}"], "total_steps=3 is less than the 7 stages"),
    "no row of that name": (["--rows=shortcut,gan"], "holds gan; expected some of"),
}  # fmt: skip
ON_THE_TABLE = ("another config", "a teacher of another budget")


@pytest.fixture(scope="module")
def called(table, in_turn, tmp_path_factory):
    """name in WRONG, or a dry run -> what a call found; and the folder of those that write none."""
    folder = tmp_path_factory.mktemp("none")
    dry = [LONGER, "--dry_run"]
    guided = ["--config.objective.cfg_scale=2.0", "--config.objective.class_dropout=0.1"]
    calls = {name: flags for name, (flags, _) in WRONG.items()}
    calls |= {"dry run": dry, "guided dry run": [*dry, *guided]}
    workdirs = {name: table[0] if name in ON_THE_TABLE else folder for name in calls}
    commands = [[SMALL, f"--workdir={workdirs[name]}", *flags] for name, flags in calls.items()]
    return dict(zip(calls, in_turn("table1", *commands), strict=True)), folder


@pytest.mark.parametrize("name", WRONG)
def test_what_cannot_be_compared_is_refused(called, name):
    assert called[0][name]["status"] == 2
    assert WRONG[name][1] in called[0][name]["error"]


def test_a_dry_run_prints_and_nothing_refused_writes(called):
    answers, folder = called
    assert answers["dry run"]["status"] == 0 and "mean_flow" in answers["dry run"]["out"]
    assert list(folder.iterdir()) == []


def test_a_scale_of_guidance_is_for_the_rows_that_are_guided(called):
    answer = called[0]["guided dry run"]
    assert answer["status"] == 0, answer["error"]
    lines = [line.split() for line in answer["out"].splitlines()]
    spent = {words[0]: float(words[-1].replace(",", "")) for words in lines if len(words) > 6}
    assert spent["flow_matching"] == 3 * 32 and spent["consistency_training"] == (3 + 1) * 32
    assert spent["shortcut"] == 3 * 32 + 2 * (8 + 8)  # any of the random sizes may be guided
    assert spent["mean_flow"] == 3 * 32 + 2 * 8 + 32


def test_ablations_without_metrics(run_quickly, tmp_path):
    flags = [SMALL, f"--workdir={tmp_path}", "--config.eval.metrics=()"]
    done = run_quickly(["-m", "shortcut_jax.comparison.ablations", *flags])
    assert done.returncode == 2 and "error: eval.metrics is empty" in done.stderr


def test_ablations(run_quickly, tmp_path):
    flags = [SMALL, f"--workdir={tmp_path}", "--only=default,online_targets"]
    done = run_quickly(["-m", "shortcut_jax.comparison.ablations", *flags], timeout=300)
    assert done.returncode == 0
    assert "| `online_targets` (1) |" in done.stdout
    found = json.loads((tmp_path / "ablations.json").read_text())
    assert found["total_steps"] == 8
    config = json.loads((tmp_path / "seed_0/online_targets/config.json").read_text())
    assert config["objective.bootstrap_params"] == "online"
    one, other = (found["metrics"]["fd_digits"][n]["1"] for n in ("default", "online_targets"))
    assert np.isfinite(one + other).all()


@pytest.mark.parametrize("name", ablations.ABLATIONS)
def test_every_ablation_is_a_change_of_the_digits_config(name):
    config, plain = digits.get_config(), digits.get_config()
    config.update_from_flattened_dict(ablations.ABLATIONS[name])
    assert (config != plain) == (name != "default")
