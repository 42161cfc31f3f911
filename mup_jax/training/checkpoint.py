"""Checkpoints of parameters, optimizer state, step and position in the data, with Orbax."""

import contextlib
import functools
import gc
import io
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from orbax.checkpoint import v1 as ocp

from mup_jax.training.program import TrainState

_KEPT = 2


class CheckpointError(ValueError):
    """A checkpoint that cannot be restored."""


@jax.jit
def _checksum(tree: Any) -> jax.Array:
    """The sum of all values' bits as words of at most 32, modulo 2³²: independent of the mesh.

    Orbax detects a truncated file, but not a flipped bit in the values.
    """

    def words(x: jax.Array) -> jax.Array:
        unsigned = {2: jnp.uint16, 4: jnp.uint32}[x.dtype.itemsize]
        return jnp.sum(jax.lax.bitcast_convert_type(x, unsigned), dtype=jnp.uint32)

    return functools.reduce(jnp.add, map(words, jax.tree.leaves(tree)))


class Checkpoints:
    """The checkpoints of one run.

    Saving is asynchronous; a checkpoint is complete or absent. The last two are kept.

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

    def save(self, step: int, state: TrainState, data_position: dict[str, int]) -> None:
        """Begins to save; waits for the save before, if that is still going on."""
        tree = {"train": state, "data": data_position}
        self._checkpointer.save_async(step, tree | {"checksum": _checksum(tree)})

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
        word = jax.ShapeDtypeStruct((), jnp.uint32, sharding=abstract_state.step.sharding)
        tree = {"train": abstract_state, "data": {"next_index": 0}, "checksum": word}
        # A failed read leaves coroutines behind that complain when they are collected.
        with contextlib.redirect_stderr(io.StringIO()):
            try:
                restored: Any = self._checkpointer.load(step, tree)
                checksum, reason = restored.pop("checksum"), None
            except Exception as error:
                restored, reason = None, f"{type(error).__name__} while reading"
            gc.collect()
        if restored is not None and _checksum(restored) != checksum:
            reason = "its values do not match their checksum"
        if reason is not None:
            before = [s for s in saved if s != step]
            then = f"from step {max(before)}" if before else "from the beginning"
            raise CheckpointError(
                f"the checkpoint in {self._directory / str(step)} is damaged ({reason}): delete "
                f"that folder to go on {then}"
            )
        return restored["train"], restored["data"]

    def close(self) -> None:
        """Waits until everything is saved."""
        self._checkpointer.close()
