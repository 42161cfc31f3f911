"""The device mesh of a run."""

import jax


def data_parallel_mesh(batch_size: int) -> jax.sharding.Mesh:
    """A mesh of all devices along the axis "data", over which the rows of a batch are divided.

    Raises:
      ValueError: the devices do not divide the batch.
    """
    devices = jax.device_count()
    if batch_size % devices:
        raise ValueError(
            f"config.batch_size={batch_size} cannot be divided over {devices} devices: choose a "
            f"multiple of {devices}"
        )
    return jax.make_mesh((devices,), ("data",))
