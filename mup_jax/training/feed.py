"""Batches from the data of this process to the devices of the mesh."""

import time
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from mup_jax import data
from mup_jax.training.mesh import batch_sharding


def part_of_process(sharding: NamedSharding, rows: int, context: int) -> tuple[int, int]:
    """Which part of a batch of rows the devices of this process have, as `(index, parts)`.

    All of it, `(0, 1)`, where their rows are not one contiguous part.
    """
    slices = sharding.addressable_devices_indices_map((rows, context)).values()
    spans = {index[0].indices(rows)[:2] for index in slices if index}
    first, last = min(start for start, _ in spans), max(stop for _, stop in spans)
    size = last - first
    if sum(stop - start for start, stop in spans) != size or first % size or rows % size:
        return 0, 1
    return first // size, rows // size


class Feed:
    """The training batches of a run in their order, and its validation batches, on the mesh in use.

    Attributes:
      validation: `{"inputs", "targets"}` of shape `(N, B, T)`, always the same.
      seconds: of the host, spent on batches; the devices wait for them only where they have no
        steps queued.

    Args:
      config: with the keys of `default_config`.
      tokens: the text.

    Raises:
      ValueError: the tokens do not fill a batch.
    """

    def __init__(self, config: ConfigDict, tokens: data.Tokens):
        sharding = batch_sharding(config)
        windows = {"context": config.context, "batch_size": config.batch_size}
        self._sharding, self._rows = sharding, config.batch_size
        self._part, parts = part_of_process(sharding, config.batch_size, config.context)
        self._batches = iter(
            data.training_batches(
                tokens.train,
                **windows,
                seed=config.seed,
                process_index=self._part,
                process_count=parts,
            )
        )
        held_out = data.validation_batches(
            tokens.validation, **windows, max_batches=config.eval_batches
        )
        stacked = NamedSharding(sharding.mesh, PartitionSpec(None, *sharding.spec))
        self.validation = {
            key: jax.make_array_from_callback(x.shape, stacked, x.__getitem__)
            for key, x in held_out.items()
        }
        self.seconds = 0.0

    def __next__(self) -> dict[str, jax.Array]:
        start = time.perf_counter()
        batch = {key: self._put(x) for key, x in next(self._batches).items()}
        self.seconds += time.perf_counter() - start
        return batch

    def _put(self, rows: np.ndarray) -> jax.Array:
        first = self._part * len(rows)

        def local(index: Any) -> np.ndarray:
            start, stop, _ = index[0].indices(self._rows)
            return rows[start - first : stop - first]

        return jax.make_array_from_callback((self._rows, rows.shape[1]), self._sharding, local)

    def get_state(self) -> dict[str, Any]:
        """The position, equal in all processes."""
        return self._batches.get_state()

    def set_state(self, position: dict[str, Any]) -> None:
        self._batches.set_state(position)
