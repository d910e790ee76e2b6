"""Flags of the command that prepares image sets, and how files are dealt to shards."""

import pytest
from absl import flags
from absl.testing import flagsaver

from shortcut_jax import prepare
from shortcut_jax.data import image_files, shards
from shortcut_jax.errors import UserError
from tests.sentences import assert_sentence


def test_shards_end_at_a_size_too(monkeypatch):
    monkeypatch.setattr(shards, "SHARD_BYTES", 100)
    entries = [image_files.Entry(str(i), size, 0) for i, size in enumerate([60, 40, 1, 500, 9, 9])]
    plan = shards.plan(entries, [0] * 6)
    assert [[e.size for e in shard.entries] for shard in plan] == [[60, 40], [1], [500], [9, 9]]


@pytest.fixture
def parse():
    """Sets flags of the command as if they were given."""
    with flagsaver.flagsaver():
        yield lambda *arguments: flags.FLAGS(["prepare", *arguments])


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], ("folders", ())),
        (["--labels=x.csv", "--count=7"], ("x.csv", (7,))),
        (["--preset=celebahq"], ("none", (30_000, 28_000))),
        (["--preset=celebahq", "--split=validation"], ("none", (2_000,))),
    ],
)
def test_labels_and_counts(parse, arguments, expected):
    parse(*arguments)
    assert prepare.labels_and_counts() == expected


@pytest.mark.parametrize(
    ("arguments", "fragments"),
    [
        (["--name=a"], ("--source", "--name")),
        (["--source=a"], ("--source", "--name")),
        (["--source=a", "--name=a", "--preset=celebahq", "--count=3"], ("--preset", "--count")),
        (["--source=a", "--name=a", "--preset=celebahq", "--labels=none"], ("--labels",)),
        (["--source=a", "--name=a", "--preset=celebahq", "--split=dev"], ("--split=dev",)),
        (["--source=a", "--name=a", "--data_dir=gs://b"], ("--data_dir=gs://b", "local folder")),
    ],
)
def test_flags_that_do_not_go_together(parse, arguments, fragments):
    parse(*arguments)
    with pytest.raises(UserError) as error:
        prepare.main()
    assert_sentence(str(error.value), fragments)
