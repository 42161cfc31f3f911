"""Checkpoints of parameters, optimizer state, step and position in the data, with Orbax."""

import errno
import hashlib
import json
import logging
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from orbax.checkpoint import v1 as ocp

from mup_jax.training import distributed
from mup_jax.training.files import write_atomically
from mup_jax.training.program import TrainState

_KEPT = 2
_DIGESTS = "digests.json"
_DAMAGED = "damaged"


class CheckpointError(ValueError):
    """A checkpoint that cannot be written or restored."""


class Checkpoints:
    """The checkpoints of one run.

    Saving is asynchronous; a checkpoint is complete or absent. The last two are kept. Each gets a
    file of its files' digests, because Orbax does not notice a flipped bit in the values.

    A checkpoint that is not what it was when it was completed is moved to a folder "damaged", with
    a warning, and the one before it is the latest.

    Args:
      directory: of this run's checkpoints alone; all processes see it.

    Raises:
      CheckpointError: all checkpoints are damaged.
    """

    def __init__(self, directory: Path):
        self._directory = directory
        distributed.in_first(lambda: set_damaged_aside(directory))
        self._checkpointer = ocp.training.Checkpointer(
            directory,
            save_decision_policy=ocp.training.save_decision_policies.FixedIntervalPolicy(1),
            preservation_policy=ocp.training.preservation_policies.LatestN(_KEPT),
            cleanup_tmp_directories=True,
        )
        self._background = ThreadPoolExecutor(max_workers=1)
        self._sealing: Future[None] | None = None

    def save(self, step: int, state: TrainState, data_position: dict[str, int]) -> None:
        """Begins to save; waits for the save before, if that is still going on.

        Raises:
          CheckpointError: the save before, or this one, has failed.
        """
        self.wait()
        try:
            response = self._checkpointer.save_async(step, {"train": state, "data": data_position})
        except Exception as error:
            raise self._not_saved(error) from error
        self._sealing = self._background.submit(self._seal, step, response)

    def wait(self) -> None:
        """Returns when all is saved.

        Raises:
          CheckpointError: it could not be saved.
        """
        sealing, self._sealing = self._sealing, None
        if sealing is not None:
            try:
                sealing.result()
            except Exception as error:
                raise self._not_saved(error) from error

    def restore(self, abstract_state: TrainState) -> tuple[TrainState, dict[str, int]] | None:
        """The latest state and data position, or None where nothing was saved.

        Args:
          abstract_state: shapes, dtypes and shardings to restore to; any mesh will do.

        Raises:
          CheckpointError: the latest checkpoint belongs to another model.
        """
        if self._checkpointer.latest is None:
            return None
        tree = {"train": abstract_state, "data": {"next_index": 0}}
        restored = _load(self._checkpointer, tree, self._directory)
        return restored["train"], restored["data"]

    def close(self) -> None:
        """Waits until everything is saved, and lets go of the folder.

        Raises:
          CheckpointError: it could not be saved.
        """
        try:
            self.wait()
        finally:
            self._background.shutdown()
            try:
                self._checkpointer.close()
            except Exception as error:  # that of the save, once more
                raise self._not_saved(error) from error

    def _seal(self, step: int, response: Any) -> None:
        response.result()
        if distributed.is_first():
            folder = self._directory / str(step)
            write_atomically(folder / _DIGESTS, json.dumps(_digests(folder)))

    def _not_saved(self, error: Exception) -> CheckpointError:
        steps = sorted(_steps(self._directory))
        last = f"that of step {steps[-1]} is complete" if steps else "there is none before it"
        is_full = getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error)
        reason = "the disk is full" if is_full else f"{type(error).__name__}: {error}"
        return CheckpointError(
            f"no checkpoint could be written to {self._directory}: {reason}; {last}. Make room, or "
            "mend what is wrong, and start the same command again"
        )


def load_params(directory: Path, abstract_params: Any) -> Any:
    """The parameters of the latest checkpoint of a run, and nothing else of it.

    Args:
      directory: of that run's checkpoints.
      abstract_params: shapes, dtypes and shardings to restore to.

    Raises:
      CheckpointError: there is no checkpoint, or it is damaged or of another model.
    """
    steps = sorted(_steps(directory))
    if not steps:
        raise CheckpointError(f"there is no checkpoint in {directory}: give the folder of a run")
    changed = _changed_files(directory / str(steps[-1]))
    if changed:
        raise CheckpointError(f"{directory / str(steps[-1])} is damaged: {', '.join(changed)}")
    context = ocp.Context()
    context.pytree.loading.partial_load = True
    with context, ocp.training.Checkpointer(directory) as checkpointer:
        tree = {"train": {"params": abstract_params}}
        return _load(checkpointer, tree, directory)["train"]["params"]


def _load(checkpointer: Any, tree: Any, directory: Path) -> Any:
    step = checkpointer.latest.step
    try:
        return checkpointer.load(step, tree)
    except Exception as error:
        raise CheckpointError(
            f"the checkpoint in {directory / str(step)} is not one of this model, or is damaged "
            f"({type(error).__name__} while reading): delete that folder to go on from the one "
            "before"
        ) from error


def _steps(directory: Path) -> list[int]:
    return [int(path.name) for path in directory.glob("*") if path.name.isdigit()]


def set_damaged_aside(directory: Path) -> None:
    """Moves checkpoints after the last whole one to a folder "damaged" beside theirs.

    Raises:
      CheckpointError: there are checkpoints, and none is whole; nothing is moved.
    """
    damaged: dict[int, list[str]] = {}
    for step in sorted(_steps(directory), reverse=True):
        changed = _changed_files(directory / str(step))
        if not changed:
            break
        damaged[step] = changed
    else:
        if damaged:
            raise CheckpointError(
                f"no checkpoint in {directory} is whole "
                f"({'; '.join(f'{step}: {files[0]}' for step, files in damaged.items())}): put a "
                f"good copy there, or delete {directory.parent} to begin again"
            )
    for step, changed in damaged.items():
        aside = directory.parent / _DAMAGED / f"{step}-{time.time_ns()}"
        aside.parent.mkdir(exist_ok=True)
        (directory / str(step)).rename(aside)
        logging.getLogger(__name__).warning(
            "the checkpoint of step %d is damaged (%s) and is now in %s: going on from the one "
            "before", step, ", ".join(changed), aside,
        )  # fmt: skip


def _digests(folder: Path) -> dict[str, str]:
    """SHA-256 of each file below a folder, but for the file of digests itself."""

    def digest(path: Path) -> tuple[str, str]:
        with path.open("rb") as file:
            return str(path.relative_to(folder)), hashlib.file_digest(file, "sha256").hexdigest()

    paths = [p for p in sorted(folder.rglob("*")) if p.is_file() and p.name != _DIGESTS]
    with ThreadPoolExecutor() as pool:
        return dict(pool.map(digest, paths))


def _changed_files(folder: Path) -> list[str]:
    """The files that are not what they were when the checkpoint was completed."""
    path = folder / _DIGESTS
    if not path.exists():  # the run was killed in the moment after the checkpoint was complete
        return []
    try:
        expected = json.loads(path.read_text())
    except ValueError:
        return [_DIGESTS]
    found = _digests(folder)
    return sorted(name for name in {*expected, *found} if expected.get(name) != found.get(name))
