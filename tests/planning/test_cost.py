"""The cost of the table's rows, beside one worked out by hand."""

from pathlib import Path

import pytest

from shortcut_jax.errors import UserError
from shortcut_jax.planning import chips, cost
from tests.sentences import assert_sentence

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs/cost.md"
V5E = next(chip for chip in chips.CHIPS if chip.name == "v5e")


@pytest.fixture(scope="module")
def rows():
    return {(row.dataset, row.name): row for row in cost.rows(teacher_share=0.5)}


def test_the_page_is_what_the_command_prints(capsys):
    cost.flags.FLAGS(["cost"])
    cost.main()
    assert PAGE.read_text() == capsys.readouterr().out


def test_a_row_by_hand(rows):
    """The shortcut model on CelebA-HQ: DiT-B/2 on latents of 32x32x4, unconditional."""
    t, h = 256, 768
    block = 24 * t * h**2 + 4 * t**2 * h + 12 * h**2
    forward = 12 * block + 4 * t * 16 * h + 4 * (256 * h + h**2) + 4 * h**2
    # 400,000 updates of 64 rows: 3 passes each, and 2 half-steps of every fourth.
    flop = 400_000 * 64 * (3 + 2 / 4) * forward
    row = rows["CelebA-HQ-256", "shortcut"]
    assert row.training == cost.Work(network=flop)
    hours = flop / (197e12 * 0.4) / 3600
    assert cost.chip_hours(row.training, V5E, 0.4) == pytest.approx(hours)
    cells = f"| CelebA-HQ-256 | shortcut | 400,000 | - | {flop / 1e18:.2f} |"
    line = next(line for line in PAGE.read_text().splitlines() if line.startswith(cells))
    assert f"| {hours:.1f} h, {1.2 * hours:.1f} / {0.29771 * hours:.2f} |" in line


def test_rows_cost_the_same_and_teachers_are_paid_for(rows):
    for dataset in cost.DATASETS:
        equal = [row for (data, name), row in rows.items() if data == dataset and "XL" not in name]
        assert len(equal) == 8
        whole = rows[dataset, "shortcut"].training.network
        for row in equal:
            assert whole <= row.training.network * (1 + 1e-9) < 1.0001 * whole
    reflow = rows["ImageNet-256", "reflow"].spent
    # 50,000 pairs of 128 guided steps; half of all for the teacher.
    assert reflow.pairs == 50_000 * 128 * 2
    assert reflow.teacher == pytest.approx(reflow.total / 2, rel=1e-4)


def test_guided_steps_pass_the_network_twice(rows):
    plain, guided = (rows[data, "shortcut"].evaluation for data in cost.DATASETS)
    assert guided[128].network == 2 * plain[128].network
    assert guided[4] == plain[4] and guided[4].network == 4 * guided[1].network
    assert guided[1].exact == guided[128].exact > guided[1].network  # decoder and Inception


def test_float32_is_divided_by_its_own_peak():
    work = cost.Work(network=V5E.peak, exact=2 * V5E.peak_float32)
    assert cost.chip_hours(work, V5E, 0.5) == pytest.approx((1 + 2) / 0.5 / 3600)
    assert V5E.peak == 6 * V5E.peak_float32


def test_networks_beside_it_have_the_flops_that_are_known():
    # 5.7 billion multiply-adds (table 2 of https://arxiv.org/abs/1905.11946), 2 FLOPs each.
    assert cost._inception() == pytest.approx(2 * 5.7e9, rel=0.1)
    # Decoding passes about the layers of encoding, with one more at each size.
    assert 2 < cost._decoder() / cost._encoder() < 2.5
    assert cost.encoding(10).exact == 2 * 10 * cost._encoder()


@pytest.mark.parametrize(
    ("value", "text"),
    [(1234.5, "1,230"), (99.96, "100"), (12.34, "12.3"), (0.01234, "0.0123"), (0, "0")],
)
def test_three_digits_count(value, text):
    assert cost._number(value) == text


def test_no_mfu_is_refused():
    cost.flags.FLAGS(["cost", "--mfu=0"])
    with pytest.raises(UserError) as caught:
        cost.main()
    cost.flags.FLAGS(["cost", "--mfu=0.4"])
    assert_sentence(str(caught.value), ["--mfu=0.0", "above 0", "raise it"])
