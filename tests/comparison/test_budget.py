"""Equal compute: what each row of Table 1 costs and gets."""

import pytest

from configs import celebahq, digits, fashion_mnist, imagenet
from shortcut_jax import objectives, run
from shortcut_jax.comparison import budget
from shortcut_jax.errors import UserError


def test_budget_by_hand():
    # 6,400 updates of 64 rows at 3, and 16 bootstrap rows with two half-steps each.
    shortcut = digits.get_config()
    total = 6400 * budget.per_update(shortcut)
    assert total == 6400 * (64 * 3 + 16 * 2) == 1_433_600
    teacher = digits.get_config("objective=flow_matching")
    spent = budget.split(total, teacher, teacher, 0.5)
    assert (spent.updates, spent.teacher_updates, spent.pairs) == (7467, 0, 0)  # of 192 each
    # Half for the teacher: 3,734 updates of 192. Students of 3 + 2 per row: 716,672 / 320.
    distilled = budget.split(
        total, digits.get_config("objective=progressive_distillation"), teacher, 0.5
    )
    assert (distilled.updates, distilled.teacher_updates) == (2240, 3734)
    # A quarter for the teacher (1,867 updates: 358,464), 10 pairs of 128 steps, 3 per row.
    reflow = digits.get_config("objective=reflow")
    reflow.objective.num_pairs = 10
    spent = budget.split(total, reflow, teacher, 0.25)
    assert (spent.teacher_updates, spent.pairs) == (1867, 1280)
    assert spent.updates == -(-(total - 358_464 - 1280) // 192)


@pytest.mark.parametrize("name", objectives.OBJECTIVES)
@pytest.mark.parametrize("module", [digits, imagenet, celebahq])  # imagenet's rows are guided
def test_no_row_gets_less_than_the_shortcut_model_or_more_than_one_update_over(module, name):
    shortcut = module.get_config()
    total = shortcut.total_steps * budget.per_update(shortcut)
    teacher = module.get_config("objective=flow_matching")
    spent = budget.split(total, module.get_config(f"objective={name}"), teacher, 0.5)
    assert total <= spent.total < total + spent.per_update + budget.per_update(teacher)


def test_budget_of_imagenet_by_hand():
    def each(name):
        return budget.per_update(imagenet.get_config(f"objective={name}"))

    # 64 of 256 rows bootstrap, at most ceil(64 / 7) of them guided, each in two half-steps.
    assert each("shortcut") == 3 * 256 + 2 * (64 + 10)
    # Two steps of the teacher, guided in the first of seven stages.
    assert each("progressive_distillation") == pytest.approx(3 * 256 + 2 * 256 * 8 / 7)
    # 64 rows are denoised in 128 guided steps.
    assert each("live_reflow") == 3 * 256 + 64 * 128 * 2
    assert each("mean_flow") == 3 * 256 + 2 * 64 + 256  # and a velocity without labels for each row
    assert each("consistency_distillation") == (3 + 2) * 256  # nothing is guided
    assert each("consistency_training") == (3 + 1) * 256
    assert each("flow_matching") == each("diffusion") == each("reflow") == 3 * 256


def test_guided_pairs_cost_two_passes_each():
    teacher = digits.get_config("objective=flow_matching")
    row = digits.get_config("objective=reflow")
    plain = budget.split(2e6, row, teacher, 0.5).pairs
    row.objective.cfg_scale = 2.0
    assert budget.split(2e6, row, teacher, 0.5).pairs == 2 * plain


def test_pairs_beyond_the_budget_are_refused():
    row = digits.get_config("objective=reflow")
    row.objective.num_pairs = 50_000
    with pytest.raises(UserError, match="objective=reflow has .* 6,400,000 to pairs.*num_pairs"):
        budget.split(1.4e6, row, digits.get_config("objective=flow_matching"), 0.5)


@pytest.mark.parametrize("share", [0.0, 1.0, 0.9999])
@pytest.mark.parametrize("name", ["progressive_distillation", "reflow"])
def test_shares_that_leave_nothing_are_refused(name, share):
    row, teacher = (digits.get_config(f"objective={n}") for n in (name, "flow_matching"))
    with pytest.raises(UserError, match="leaves (nothing|none)"):
        budget.split(10_000, row, teacher, share)


@pytest.mark.parametrize("name", objectives.OBJECTIVES)
@pytest.mark.parametrize(
    ("module", "variant"),
    [(digits, ""), (fashion_mnist, ""), (fashion_mnist, "cpu"), (imagenet, ""), (celebahq, "")],
)
def test_every_config_can_pay_for_every_row(module, variant, name):
    def config(objective):
        return module.get_config(f"{variant},objective={objective}")

    total = config("shortcut").total_steps * budget.per_update(config("shortcut"))
    row, teacher = config(name), config("flow_matching")
    row.total_steps = budget.split(total, row, teacher, 0.5).updates
    run.check(row)
