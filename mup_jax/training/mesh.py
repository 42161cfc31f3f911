"""The device mesh of a run."""

import math

import jax
from jax.sharding import NamedSharding

from mup_jax.models.sharding import spec
from mup_jax.training.config import Config

AXES = ("data", "fsdp", "tensor")


def mesh_shape(config: Config, devices: int) -> tuple[int, int, int]:
    """The sizes of the axes data, fsdp and tensor; `config.mesh.data` of -1 takes the rest.

    Raises:
      ValueError: the sizes do not fit the devices, the batch or the model.
    """
    mesh = config.mesh
    if min(mesh.fsdp, mesh.tensor) < 1 or (mesh.data < 1 and mesh.data != -1):
        raise ValueError(
            f"config.mesh={_sizes(mesh)}: give positive sizes, or data=-1 for the rest"
        )
    data = mesh.data if mesh.data > 0 else max(1, devices // (mesh.fsdp * mesh.tensor))
    shape = (data, mesh.fsdp, mesh.tensor)
    if math.prod(shape) != devices:
        raise ValueError(
            f"config.mesh={_sizes(mesh)} is not a mesh of {devices} devices: choose sizes whose "
            f"product is {devices}"
        )
    rows, parts = config.batch_size, data * mesh.fsdp * config.microbatches
    if rows % parts:
        raise ValueError(
            f"config.batch_size={rows} cannot be divided over data * fsdp = {data * mesh.fsdp} "
            f"devices and microbatches={config.microbatches}: choose a multiple of {parts}"
        )
    model = config.model
    heads = model.width // model.head_dim
    for name, size, axis in (("width", model.width, "fsdp"), ("heads", heads, "tensor")):
        if size % (parts := getattr(mesh, axis)):
            raise ValueError(
                f"config.mesh.{axis}={parts} does not divide the model's {name}, {size}: "
                "choose one that does"
            )
    return shape


def make_mesh(config: Config) -> jax.sharding.Mesh:
    """A mesh of all devices; see `mesh_shape`."""
    return jax.make_mesh(mesh_shape(config, jax.device_count()), AXES)


def batch_sharding(config: Config) -> NamedSharding:
    """Of a batch `(B, T)`, on the mesh in use."""
    rows = spec((config.batch_size, config.context), "batch", "context")
    return NamedSharding(jax.sharding.get_mesh(), rows)


def _sizes(mesh: Config) -> str:
    return ", ".join(f"{axis}={getattr(mesh, axis)}" for axis in AXES)
