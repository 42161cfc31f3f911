"""Checkpoints of parameters, optimizer state, step and position in the data, with Orbax."""

import hashlib
import json
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
from orbax.checkpoint import v1 as ocp

from mup_jax.training.metrics import write_atomically
from mup_jax.training.program import TrainState

_KEPT = 2
_DIGESTS = "digests.json"


class CheckpointError(ValueError):
    """A checkpoint that cannot be restored."""


class Checkpoints:
    """The checkpoints of one run.

    Saving is asynchronous; a checkpoint is complete or absent. The last two are kept. Each gets a
    file of its files' digests, because Orbax does not notice a flipped bit in the values.

    Args:
      directory: of this run's checkpoints alone.
    """

    def __init__(self, directory: Path):
        self._directory = directory
        self._checkpointer = ocp.training.Checkpointer(
            directory,
            save_decision_policy=ocp.training.save_decision_policies.FixedIntervalPolicy(1),
            preservation_policy=ocp.training.preservation_policies.LatestN(_KEPT),
            cleanup_tmp_directories=True,
        )
        self._background = ThreadPoolExecutor(max_workers=1)
        self._sealing: Future[None] | None = None

    def save(self, step: int, state: TrainState, data_position: dict[str, int]) -> None:
        """Begins to save; waits for the save before, if that is still going on."""
        self._wait()
        response = self._checkpointer.save_async(step, {"train": state, "data": data_position})
        self._sealing = self._background.submit(self._seal, step, response)

    def restore(self, abstract_state: TrainState) -> tuple[TrainState, dict[str, int]] | None:
        """The latest state and data position, or None where nothing was saved.

        Args:
          abstract_state: shapes, dtypes and shardings to restore to; any mesh will do.

        Raises:
          CheckpointError: the latest checkpoint is damaged or belongs to another model.
        """
        saved = [checkpoint.step for checkpoint in self._checkpointer.checkpoints]
        if not saved:
            return None
        step = max(saved)
        folder = self._directory / str(step)
        before = [s for s in saved if s != step]
        then = f"step {max(before)}" if before else "the beginning"
        remedy = f"delete that folder to go on from {then}"
        changed = _changed_files(folder)
        if changed:
            raise CheckpointError(
                f"the checkpoint in {folder} is damaged ({', '.join(changed)}): {remedy}"
            )
        tree = {"train": abstract_state, "data": {"next_index": 0}}
        try:
            restored: Any = self._checkpointer.load(step, tree)
        except Exception as error:
            raise CheckpointError(
                f"the checkpoint in {folder} is not one of this model, or is damaged "
                f"({type(error).__name__} while reading): {remedy}"
            ) from error
        return restored["train"], restored["data"]

    def close(self) -> None:
        """Waits until everything is saved."""
        self._wait()
        self._background.shutdown()
        self._checkpointer.close()

    def _wait(self) -> None:
        if self._sealing is not None:
            self._sealing.result()

    def _seal(self, step: int, response: Any) -> None:
        response.result()
        if jax.process_index() == 0:
            folder = self._directory / str(step)
            write_atomically(folder / _DIGESTS, json.dumps(_digests(folder)))


def _digests(folder: Path) -> dict[str, str]:
    """SHA-256 of each file below a folder, but for the file of digests itself."""
    paths = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in paths
        if path.name != _DIGESTS
    }


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
