"""The small digits config with wrong values in it, for the tests of what is refused."""

from typing import Any

from ml_collections import ConfigDict

from configs import digits

SMALL = "--config=configs/digits.py:small"


def small(arg: str = "small", **overrides: Any) -> ConfigDict:
    """The small digits config with flat overrides, whatever their type."""
    config = digits.get_config(arg)
    with config.ignore_type():
        config.update_from_flattened_dict(overrides)
    return config
