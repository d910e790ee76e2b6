"""Checkpoints: train state, data position and clock, written by orbax.

Saves are asynchronous and atomic: a step becomes visible by the renaming of its finished directory,
so a kill during a save leaves the previous one in place. What the next update changes in place is
copied first: on the devices, which the host does not wait for, or to the host, which it does. EMA
parameters can be read alone, on any mesh, for evaluation. Checksums of all arrays are saved beside
them and compared with what is read.
"""

import concurrent.futures
import contextlib
import functools
import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from absl import logging

from shortcut_jax import checksums, layers
from shortcut_jax.errors import UserError
from shortcut_jax.parallel import distributed

CHECKSUMS = "checksums"  # in the JSON part: of every array, and of the rest of that part

# One thread for all folders: orbax numbers what it begins in a process, and two at once would mix
# that up; several processes meet in every save, so that all must begin them in the same order.
_WRITER = concurrent.futures.ThreadPoolExecutor(1, "checkpoint")


class _Manager(ocp.CheckpointManager):
    def reached_preemption(self, step: int) -> bool:
        """Never: each question counts for all that ask, and `preemption.Notice` counts its own."""
        return False


class Checkpoints(contextlib.AbstractContextManager):
    """The checkpoints of a workdir, in WORKDIR/checkpoints/STEP/{state,meta}.

    Args:
      workdir: of the run.
      keep: how many of the newest to keep; None keeps all.
      read_only: for evaluation beside a run: creates and removes nothing.
      folder: of the workdir, if they are others than those a run resumes from.
      copy: "host": `save` returns when the host has copies of the arrays. "device": it returns at
        once, and the devices have memory for what is saved once more, until the host has it.

    Raises:
      UserError: the folder is a file.
    """

    def __init__(
        self,
        workdir: str | os.PathLike[str],
        *,
        keep: int | None,
        read_only: bool = False,
        folder: str = "checkpoints",
        copy: str = "host",
    ):
        self.directory = Path(workdir).absolute() / folder
        self._noun = folder.removesuffix("s")
        if self.directory.exists() and not self.directory.is_dir():
            raise UserError(
                f"{self.directory} is a file; expected the folder of the {folder}: move it away."
            )
        self._report_unfinished()
        if not read_only:
            self.directory.mkdir(parents=True, exist_ok=True)
        self._copy = copy
        self._begun: concurrent.futures.Future[None] | None = None  # the save before
        several = distributed.several() and not read_only
        self._manager = _Manager(
            self.directory,
            options=ocp.CheckpointManagerOptions(
                max_to_keep=keep,
                create=False,
                read_only=read_only,
                cleanup_tmp_directories=not read_only,
                # Processes that are named meet at jax.distributed's barriers, which are safe in a
                # thread; else in a collective on all devices, between which steps would come.
                multiprocessing_options=ocp.options.MultiprocessingOptions(
                    active_processes=set(range(jax.process_count())) if several else None,
                    barrier_sync_key_prefix=folder,
                ),
            ),
        )

    def latest(self) -> int | None:
        """Step of the newest finished checkpoint, or None; waits as `steps` does."""
        return max(self.steps(), default=None)

    def steps(self) -> list[int]:
        """Steps of all finished checkpoints; waits for what is written (UserError if it fails)."""
        self.wait()
        return sorted(self._manager.all_steps())

    def choose(self, step: int | None, name: str = "step") -> int:
        """`step` if it is a finished checkpoint, or the newest if it is None.

        Raises:
          UserError: there is no such checkpoint; `name` says where the step was given.
        """
        steps = self.steps()
        if not steps:
            raise UserError(
                f"{self.directory} holds no finished checkpoint; expected at least one: train "
                "first, or wait for the first save."
            )
        if step is not None and step not in steps:
            raise UserError(
                f"{name}={step} is not a checkpoint in {self.directory}; expected one of "
                f"{', '.join(map(str, steps))}: give one of them, or none for the newest."
            )
        return steps[-1] if step is None else step

    def save(self, step: int, state: Mapping[str, Any], meta: Mapping[str, Any]) -> None:
        """Starts writing; returns when the arrays may be donated. Waits for the save before.

        Args:
          step: number of updates done.
          state: tree of arrays, in which parameters and EMA are top-level entries.
          meta: JSON data: data position, clock, config.

        Raises:
          UserError: there is a later one, or the save before failed; if arrays are copied to the
            host, or the devices cannot begin to copy them, this one.
        """
        rest = json.loads(json.dumps(dict(meta)))
        latest = self.latest()
        if latest is not None and latest >= step:
            raise UserError(
                f"checkpoint {step} was not written, because {self.directory} holds the later "
                f"{latest}; expected none: another run may be writing there, end one of them."
            )
        distributed.gather(step)  # all begin together: at those barriers none waits for long
        with self._failing():
            arrays = _copied(dict(state)) if self._copy == "device" else dict(state)
            # Of the copies: the next step waits for what reads its own arrays.
            sums = checksums.dispatch(arrays)
            if distributed.several() and jax.default_backend() == "cpu":
                # Nothing keeps gloo from mixing up what two programs exchange at once.
                jax.block_until_ready(sums)
            self._begun = _WRITER.submit(self._write, step, arrays, sums, rest)
            if self._copy == "host":
                self._begun.result()

    def _write(
        self, step: int, arrays: dict[str, Any], sums: jax.Array, rest: dict[str, Any]
    ) -> None:
        """Returns when the host has the arrays; orbax writes them in threads of its own."""
        found = {"arrays": checksums.named(arrays, sums), "rest": checksums.of_json(rest)}
        self._manager.save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.PyTreeSave(arrays),
                meta=ocp.args.JsonSave({**rest, CHECKSUMS: found}),
            ),
            force=True,  # whether to save is not for orbax to decide
        )

    def check(self) -> None:
        """Raises UserError if a save that was begun has failed meanwhile; does not wait."""
        begun = self._begun
        if begun is None or not begun.done():
            return
        # (The manager's own `check_for_errors` knows nothing of a save that has ended.)
        if begun.exception() or not self._manager.is_saving_in_progress():
            self.wait()

    def drop_after(self, step: int) -> list[int]:
        """Removes those of later steps; returns which these were."""
        later = [found for found in self.steps() if found > step]
        for found in later:
            self._manager.delete(found)
        return later

    def averages(self, step: int) -> list[str]:
        """Names of the averages in a checkpoint, beside its parameters and EMA.

        Raises:
          UserError: it cannot be read.
        """
        path = self.directory / str(step) / "state"
        try:
            tree = ocp.PyTreeCheckpointHandler().metadata(path).tree
        except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
            raise self._unreadable(step, str(error)) from error
        return list(tree.get("averages") or {})

    def meta(self, step: int) -> dict[str, Any]:
        """The JSON part of a checkpoint.

        Raises:
          UserError: it is missing, unreadable or not what was saved.
        """
        meta = self._whole_meta(step)
        for part in ("config", "data", "clock"):
            if not isinstance(meta.get(part), dict):
                raise self._unreadable(step, f"metadata: {part} is {meta.get(part)!r:.50}")
        return {k: v for k, v in meta.items() if k != CHECKSUMS}

    def _whole_meta(self, step: int) -> dict[str, Any]:
        path = self.directory / str(step) / "meta" / "metadata"
        try:
            meta = json.loads(path.read_text())
            if not isinstance(meta, dict):
                raise TypeError(f"it holds a {type(meta).__name__}")
            if CHECKSUMS in meta:  # older versions wrote none
                rest = {k: v for k, v in meta.items() if k != CHECKSUMS}
                if checksums.of_json(rest) != meta[CHECKSUMS]["rest"]:
                    raise ValueError("its checksum is another")
            return meta
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise self._unreadable(step, f"{path.name}: {error!r}") from error

    def restore(self, step: int, shapes: Mapping[str, Any]) -> dict[str, Any]:
        """Reads the entries of the state that `shapes` has, straight onto their devices.

        Blocks that were saved in the other layout of `shortcut_jax.layers` are moved to this one.

        Args:
          step: one of `steps()`.
          shapes: tree of jax.ShapeDtypeStruct with shardings: all of the state or some of its
            top-level entries.

        Raises:
          UserError: the checkpoint cannot be read as that, or is not what was saved.
        """
        saved = self._whole_meta(step).get(CHECKSUMS)
        path = self.directory / str(step) / "state"
        try:
            scanned = layers.holds_stacked(ocp.PyTreeCheckpointHandler().metadata(path).tree)
            item = layers.shapes_as(dict(shapes), scanned)
            found = self._reader().restore(
                path,
                args=ocp.args.PyTreeRestore(
                    item=item,
                    restore_args=ocp.checkpoint_utils.construct_restore_args(item),
                    partial_restore=True,
                ),
            )
            # A partial restore hands back what it was asked with for an array that is not there.
            for key, leaf in jax.tree_util.tree_leaves_with_path(found):
                if not isinstance(leaf, jax.Array):
                    name = jax.tree_util.keystr(key, simple=True, separator="/")
                    raise KeyError(f"it has no array {name}")
            if saved is not None:
                for name, checksum in checksums.of_arrays(found).items():
                    if saved["arrays"].get(name) != checksum:
                        raise ValueError(f"state/{name} is damaged: its checksum is another")
            if scanned == layers.holds_stacked(dict(shapes)):
                return found
            convert = layers.unstack if scanned else layers.stack
            placed = jax.tree.map(lambda a: a.sharding, dict(shapes))
            return jax.jit(lambda tree: convert(tree), out_shardings=placed)(found)
        # What orbax and tensorstore raise for damaged files is not documented, and much.
        except Exception as error:
            raise self._unreadable(step, str(error)) from error

    def wait(self) -> None:
        """Returns when nothing is being written; UserError if that failed."""
        with self._failing():
            begun, self._begun = self._begun, None
            if begun is not None:
                begun.result()
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits, then releases the manager; UserError if what was being written failed."""
        self.wait()
        with self._failing():
            self._manager.close()

    def __exit__(self, kind: object, error: object, traceback: object) -> None:
        """Waits when there is an error, too: a process that ends does not end what it writes."""
        # Of several processes none waits for others, which may be gone.
        if error is None or distributed.several():
            return
        try:
            self.wait()
        except UserError as another:
            logging.error("%s", another)

    @contextlib.contextmanager
    def _failing(self) -> Iterator[None]:
        try:
            yield
        # What orbax and tensorstore raise for full or absent disks is not documented.
        except (OSError, ValueError, RuntimeError) as error:
            steps = self._manager.all_steps()
            kept = f"the newest whole one is {max(steps)}" if steps else "none was saved before"
            if isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" in str(error):
                raise UserError(
                    f"a checkpoint could not be copied on the devices ({_shortened(error)}), "
                    f"{kept}; expected memory for what is saved once more: set "
                    "--config.checkpoint.copy=host and start again to continue from there."
                ) from error
            raise UserError(
                f"a checkpoint could not be written to {self.directory} ({_shortened(error)}), "
                f"{kept}; expected room and permission: make room or mend the disk, and start "
                "again to continue from there."
            ) from error

    def _reader(self) -> ocp.Checkpointer:
        # Host memory: what is read, and at most this much on its way to the devices.
        return ocp.Checkpointer(ocp.PyTreeCheckpointHandler(restore_concurrent_gb=1))

    def _unreadable(self, step: int, found: str) -> UserError:
        others = [s for s in self.steps() if s != step]
        fix = (
            f"move that directory away to continue from step {others[-1]}"
            if others
            else "move that directory away to start again, or restore it from a copy"
        )
        return UserError(
            f"{self._noun} {self.directory / str(step)} cannot be read ({_shortened(found)}); "
            f"expected a whole {self._noun} of this run: {fix}."
        )

    def _report_unfinished(self) -> None:
        unfinished = sorted(self.directory.glob("*orbax-checkpoint-tmp*"))
        for path in unfinished:
            logging.warning(
                "%s %s was not finished (the process died while saving); it is ignored and the "
                "newest finished one is used.",
                self._noun.capitalize(),
                path.name.partition(".")[0],
            )


def _copied(tree: dict[str, Any]) -> dict[str, Any]:
    """Copies of the arrays where they lie; returns at once, and the arrays may be donated."""
    leaves, structure = jax.tree.flatten(tree)
    copies = _copies(leaves, tuple(leaf.sharding for leaf in leaves))
    return jax.tree.unflatten(structure, copies)


@functools.partial(jax.jit, static_argnums=1)  # one program for all
def _copies(leaves: list[jax.Array], shardings: tuple[jax.sharding.Sharding, ...]) -> Any:
    return jax.lax.with_sharding_constraint([jnp.copy(leaf) for leaf in leaves], list(shardings))


def _shortened(error: BaseException | str) -> str:
    """One line; what tensorstore says of a failed system call is long and gives its number last."""
    line = " ".join(str(error).split())
    number = re.search(r"os_error_code='(\d+)'", line)
    return f"{os.strerror(int(number[1]))}: {line[:200]}" if number else line[:300]


def with_shardings(shapes: Any, shardings: Any) -> Any:
    """Trees of shapes and of shardings to one tree of jax.ShapeDtypeStruct with shardings."""
    return jax.tree.map(
        lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), shapes, shardings
    )
