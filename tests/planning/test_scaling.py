"""What is compiled to see how a step scales, what is kept of it, and docs/scaling.md."""

import json
from pathlib import Path

import pytest

from configs import digits
from shortcut_jax.errors import UserError
from shortcut_jax.planning import scaling, scaling_table
from tests.sentences import assert_sentence

ROOT = Path(__file__).resolve().parents[2]
KEPT = ROOT / "docs/results/scaling.json"
FAST = "--xla_backend_optimization_level=0"
TINY = ("-m", "shortcut_jax.planning.scaling", "--config=configs/digits.py:small")


def test_the_page_is_what_the_command_prints():
    text = scaling_table.page(scaling.read(KEPT))
    assert (ROOT / "docs/scaling.md").read_text() == text


def test_every_mesh_once_weak_and_strong():
    found = scaling.cases({"cpu:1": 1, "cpu:2": 2, "cpu:8": 8}, 64)
    assert [(c.machine, c.data, c.fsdp, c.batch_size) for c in found] == [
        ("cpu:1", 1, 1, 64), ("cpu:1", 1, 1, 8),
        ("cpu:2", 2, 1, 64), ("cpu:2", 2, 1, 16), ("cpu:2", 1, 2, 64), ("cpu:2", 1, 2, 16),
        ("cpu:8", 8, 1, 64), ("cpu:8", 1, 8, 64), ("cpu:8", 2, 4, 64),
    ]  # fmt: skip
    with pytest.raises(UserError) as caught:
        scaling.cases({"cpu:8": 8}, 60)
    assert_sentence(str(caught.value), ["batch_size=60", "multiple of 8", "--config.batch_size"])


def test_data_parallel_rows_send_the_least():
    rows = [r for r in scaling.read(KEPT) if r["mesh"]["fsdp"] == 1 and r["devices"] > 1]
    assert len(rows) >= 5  # 2, 4 and 8 devices, weak and strong
    for row in rows:
        assert 1 <= row["received"] / row["least"] < 1.03


def test_no_row_computes_twice_or_sends_more_than_a_tenth_above_the_least():
    rows = scaling.read(KEPT)
    assert {row["devices"] for row in rows} >= {1, 2, 4, 8}
    for row in rows:
        assert row["received"] <= 1.1 * row["least"]
        assert row["flops"] is None or 1 <= row["flops"] / row["flops_least"] < 1.05


def test_other_objectives_are_refused():
    with pytest.raises(UserError) as caught:
        scaling.check(digits.get_config("small,objective=diffusion"))
    assert_sentence(str(caught.value), ["objective=diffusion", "leave it out"])


@pytest.fixture(scope="module")
def measured(run_python, tmp_path_factory):
    out = tmp_path_factory.mktemp("scaling") / "rows.json"
    args = [*TINY, "--machines=cpu:2", f"--kept={out}"]
    assert run_python(args, env={"XLA_FLAGS": FAST}, timeout=280).returncode == 0
    return out


def test_a_machine_is_compiled_on_every_mesh(measured, tmp_path):
    rows = json.loads(measured.read_text())["rows"]
    assert [row["mesh"] for row in rows] == [{"data": 2, "fsdp": 1}, {"data": 1, "fsdp": 2}]
    dp, fsdp = rows
    # All gradients once, and fewer than a thousand bytes of scalars.
    assert dp["collectives"].keys() == {"all-reduce"}
    assert 0 <= dp["received"] - dp["least"] < 1024
    assert dp["least"] == pytest.approx(dp["parameters"])  # 2 N (2-1)/2
    assert fsdp["least"] > 2 * dp["least"] and "all-gather" in fsdp["collectives"]
    for row in rows:
        assert sum(size for *_, size in row["received_by"]) == pytest.approx(row["received"])
        assert sum(row["least_by"].values()) == pytest.approx(row["least"])
    layers = {layer for _, layer, kind, _ in fsdp["received_by"] if kind == "all-gather"}
    assert layers >= {"blocks/qkv", "blocks/mlp_in", "t_embed"}


def test_a_row_replaces_that_of_the_same_case(measured, tmp_path):
    path = tmp_path / "rows.json"
    (first, second) = (scaling.Row(**row) for row in scaling.read(measured))
    for row in (first, second, first):
        scaling.add(path, row)
    assert [row["mesh"]["fsdp"] for row in scaling.read(path)] == [2, 1]


def test_the_reading_says_what_the_tables_hold():
    rows, text = scaling.read(KEPT), (ROOT / "docs/scaling.md").read_text()

    def ratios(found, least, keep):
        return sorted(f"{r[found] / r[least]:.2f}" for r in rows if r[least] and keep(r))

    cpu = ratios("received", "least", lambda r: "cpu" in r["machine"] and r["mesh"]["fsdp"] > 1)
    assert f"on CPUs is below the least** ({cpu[0]} to {cpu[-1]})" in text
    flops = ratios("flops", "flops_least", lambda r: r["flops"])
    assert f"FLOPs are {flops[0]} to {flops[-1]} times" in text

    def of_v5e(size, **mesh):
        return ratios(
            "received", "least", lambda r: (r["machine"], r["mesh"]) == (f"v5e:{size}", mesh)
        )

    alone = [of_v5e("2x2", data=1, fsdp=4)[0], of_v5e("2x4", data=1, fsdp=8)[0]]
    alone.append(of_v5e("4x4", data=1, fsdp=16)[0])
    reading = " ".join(text.split())
    assert "({} on v5e:2x2, {} on v5e:2x4, {} on v5e:4x4)".format(*alone) in reading
    both = of_v5e("2x4", data=2, fsdp=4) + of_v5e("4x4", data=2, fsdp=8)
    assert f"the whole is {min(both)} to {max(both)} of the least" in reading
