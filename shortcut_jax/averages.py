"""Averages of the parameters beside the method's own EMA: their names, updates and profiles.

The method has one EMA, of rate `ema_rate`, which makes its targets (`TrainState.ema`). What is here
is tracked to be evaluated and changes nothing that is trained. Each has a name:

  ema_RATE      an EMA of that rate per step, which starts at the initial parameters
  power_WIDTH   a power-function EMA of that relative width, which remembers a fixed share of the
                training so far (Karras et al. 2024, section 3, https://arxiv.org/abs/2312.02696)

RATE and WIDTH are written as Python writes the number: power_0.1.
"""

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from shortcut_jax.errors import UserError
from shortcut_jax.state import PARAMS_FIELD

RATE, POWER = "ema_", "power_"
MAX_WIDTH = 12**-0.5  # gamma = 0: the plain mean of all steps


# ---------------------------------------------------------------------- names


def names(section: ConfigDict) -> list[str]:
    """The names of what `config.averages` asks to track."""
    return [f"{RATE}{r!r}" for r in section.rates] + [f"{POWER}{w!r}" for w in section.power]


def width(name: str) -> float | None:
    """WIDTH of power_WIDTH; None for other names."""
    return float(name.removeprefix(POWER)) if name.startswith(POWER) else None


def check_name(name: str, what: str) -> None:
    """Refuses what can be the name of no parameters, whatever the run tracks.

    Args:
      name: "ema", "online", "ema_RATE" or "power_WIDTH".
      what: the key or argument that gives it, for the error.

    Raises:
      UserError: it is none of these, or RATE or WIDTH is out of range or written differently.
    """
    written = _as_written(name)
    if name in (*PARAMS_FIELD, written):
        return
    meant = f"write {written}" if written else "choose one of them"
    raise UserError(
        f"{what}={name!r} is not known; expected {', '.join(PARAMS_FIELD)}, ema_RATE with RATE "
        f"below 1 or power_WIDTH with WIDTH above 0 and at most {MAX_WIDTH:.3f}: {meant}."
    )


def _as_written(name: str) -> str | None:
    """ "power_0.1" for "power_0.10"; None if there can be no such average."""
    for prefix, valid in ((RATE, lambda v: 0 <= v < 1), (POWER, lambda v: 0 < v <= MAX_WIDTH)):
        try:
            number = float(name.removeprefix(prefix))
        except ValueError:
            continue
        if name.startswith(prefix) and valid(number):
            return f"{prefix}{number!r}"
    return None


def check(config: ConfigDict) -> None:
    """Checks the section `averages` of a config (UserError for the first thing that is wrong)."""
    section = config.averages
    for key, prefix in (("rates", RATE), ("power", POWER)):
        for value in section[key]:
            if _as_written(f"{prefix}{value!r}") is None:
                expected = {RATE: "0 <= rate < 1", POWER: f"0 < width <= {MAX_WIDTH:.3f}"}[prefix]
                raise UserError(
                    f"averages.{key}={section[key]} holds {value}, which is out of range; expected "
                    f"{expected}: change it."
                )
    if config.ema_rate in section.rates:
        raise UserError(
            f"averages.rates={section.rates} holds ema_rate={config.ema_rate}, which is tracked "
            "already, under the name ema; expected other rates: leave it out."
        )
    if section.power and section.snapshot_every > config.total_steps:
        raise UserError(
            f"averages.snapshot_every={section.snapshot_every} is more than total_steps="
            f"{config.total_steps}, so that nothing could be reconstructed after the run; expected "
            "snapshots on the way: lower it, or set it to 0 to do without."
        )


def check_tracked(config: ConfigDict) -> None:
    """Refuses to evaluate in the loop what is not tracked there.

    Raises:
      UserError: it is not, naming what is.
    """
    name, known = config.eval.params, [*PARAMS_FIELD, *names(config.averages)]
    if config.eval.every and name not in known:
        raise UserError(
            f"eval.params={name} is not tracked in training, so that it cannot be evaluated in the "
            f"loop; expected one of {', '.join(known)}: add it to averages.rates or averages.power,"
            " or set eval.every=0 (what is reconstructed is for the evaluation after training)."
        )


# ---------------------------------------------------------------------- updates


def start(section: ConfigDict, params: Any) -> dict[str, Any]:
    """Name -> average, before the first step: the initial parameters, each an array of its own."""
    return {name: jax.tree.map(jnp.copy, params) for name in names(section)}


def update(averages: Mapping[str, Any], params: Any, step: jax.typing.ArrayLike) -> dict[str, Any]:
    """Every average after one more step.

    Args:
      averages: name -> tree like `params`.
      params: the new parameters, as the step leaves them.
      step: number of steps before this one.
    """

    # In s p + (1 - s) a both weights are rounded and their sum is not one, which adds up over the
    # steps: in float32, at a rate of 0.9999, to relative errors of 1e-4. Those of this are 1e-6.
    def one(name, average):
        s = share(name, step)
        return jax.tree.map(lambda a, p: a + s * (p - a), average, params)

    return {name: one(name, average) for name, average in averages.items()}


def share(name: str, step: jax.typing.ArrayLike) -> Any:
    """Share of the new parameters in an average: 1 - beta.

    For power_WIDTH beta_t = (1 - 1/t)^(gamma + 1) at update number t = step + 1 (section 3.1 of
    the paper): the first one replaces the initial parameters.
    """
    relative = width(name)
    if relative is None:
        return 1 - float(name.removeprefix(RATE))
    t = jnp.asarray(step + 1, float)
    # In float32 1 - 1/t would have lost most digits of 1/t where t is large.
    return -jnp.expm1((gamma(relative) + 1) * jnp.log1p(-1 / t))


@functools.cache
def gamma(relative_width: float) -> float:
    """Exponent of the power-function EMA of a relative width, 0 < width <= 12**-0.5.

    The largest root of width^2 (gamma + 2)^2 (gamma + 3) = gamma + 1: the standard deviation of
    the profile is `width` times the length of the training so far.
    """
    inverse = relative_width**-2
    return max(0.0, float(np.roots([1, 7, 16 - inverse, 12 - inverse]).real.max()))


# ---------------------------------------------------------------------- post-hoc reconstruction


class Profile(NamedTuple):
    """A power-function EMA after `step` steps.

    Its weight of the parameters of time s is (gamma + 1) s^gamma / step^(gamma + 1), 0 < s <= step;
    the recursion in `update` gives step i the integral from i - 1 to i of it, exactly.
    """

    step: int
    width: float


def combine(target: Profile, sources: Sequence[Profile]) -> tuple[np.ndarray, float]:
    """Weights of stored averages whose sum comes closest to another one.

    Least squares between the profiles, as in section 3.2 of the paper, with weights that sum to
    one. (The paper leaves that to the fit. Where the fit is poor, its sum is off by per cents, and
    with it the size of every parameter.)

    Args:
      target: the average that is wanted.
      sources: those that there are, no two alike.

    Returns:
      Weights [n] float64; and the error, the norm of the difference of the profiles divided by the
      norm of the target's.
    """
    # In units of the norm of each source, without which the system is badly scaled.
    norms = np.sqrt([_dot(s, s) for s in sources])
    products = np.array([[_dot(a, b) for b in sources] for a in sources])
    products /= norms[:, None] * norms
    wanted = np.array([_dot(s, target) for s in sources]) / norms
    sums = norms.min() / norms
    zero = np.zeros((1, 1))
    system = np.block([[products, sums[:, None]], [sums[None], zero]])
    solution = np.linalg.lstsq(system, np.append(wanted, norms.min()), rcond=None)[0][:-1]
    size = _dot(target, target)
    missed = size - 2 * solution @ wanted + solution @ products @ solution
    return solution / norms, math.sqrt(max(0.0, missed) / size)


def _dot(a: Profile, b: Profile) -> float:
    """Integral of the product of two profiles over all times."""
    first, last = sorted((a, b))
    g, h = gamma(first.width), gamma(last.width)
    return (g + 1) * (h + 1) / (g + h + 1) * (first.step / last.step) ** h / last.step
