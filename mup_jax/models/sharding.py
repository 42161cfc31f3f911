"""Where the arrays of a model lie on a mesh: one table, from the axes of arrays to those of meshes.

The functions look at the mesh in use (`jax.set_mesh`), in explicit and in automatic mode alike, and
do nothing where there is none, so that a model is written once.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

AXIS_RULES: dict[str, tuple[str, ...]] = {
    "batch": ("data", "fsdp"),
    "context": (),
    "layers": (),
    # The width: parameters are divided along it, and gathered when they are used.
    "embed": ("fsdp",),
    "heads": ("tensor",),
    "mlp": ("tensor",),
    # Where the vocabulary is no multiple of the axis, each device has all of it.
    "vocab": ("tensor",),
}


def spec(shape: tuple[int, ...], *names: str | None) -> PartitionSpec:
    """How the mesh in use divides an array of `shape` whose axes have these names (None: not).

    Axes that the mesh lacks, of one device, or that do not divide the array are left out.
    """
    sizes = jax.sharding.get_abstract_mesh().shape

    def axes(length: int, name: str | None) -> tuple[str, ...] | None:
        rule = tuple(a for a in AXIS_RULES[name] if sizes.get(a, 1) > 1) if name else ()
        divided = length % math.prod(sizes[a] for a in rule) == 0
        return rule if rule and divided else None

    return PartitionSpec(*map(axes, shape, names))


def place(x: jax.Array, *names: str | None) -> jax.Array:
    """`x` laid out by the names of its axes."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.are_all_axes_manual:  # within a `shard_map` there is one device
        return x
    target = spec(x.shape, *names)
    if _is_explicit(mesh):
        return jax.reshard(x, target)
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, target))


def linear(x: jax.Array, weight: jax.Array, *axes: str, **options: Any) -> jax.Array:
    """`x @ weight`, for `x` of shape `(B, T, d_in)` and a weight of axes (in, out).

    The weight is gathered along "embed" in the dtype of `x`; a sum over a divided axis runs over
    the devices.
    """
    used = [None if axis == "embed" else axis for axis in axes]
    weight = place(weight.astype(x.dtype), *used)
    # One axis of rows: with two, the gradients' products copy their operands on CPUs.
    rows = x.reshape(-1, x.shape[-1])
    shape = (*x.shape[:-1], weight.shape[1])
    mesh = jax.sharding.get_abstract_mesh()
    if not mesh.empty and _is_explicit(mesh):
        batch, _, out = spec(shape, "batch", "context", used[1])
        options["out_sharding"] = PartitionSpec(batch, out)
    return jax.numpy.matmul(rows, weight, **options).reshape(shape)


def lookup(table: jax.Array, tokens: jax.Array) -> jax.Array:
    """Rows of a table of axes (vocab, embed) for tokens `(B, T)`; NaN for one not in the table."""
    table = place(table, "vocab", None)
    mesh = jax.sharding.get_abstract_mesh()
    target = None
    if not mesh.empty and _is_explicit(mesh):
        target = spec((*tokens.shape, table.shape[1]), "batch", "context", None)
    return table.at[tokens].get(mode="fill", fill_value=jax.numpy.nan, out_sharding=target)


def per_head(
    function: Callable[..., jax.Array], xs: tuple[jax.Array, ...], *rest: Any
) -> jax.Array:
    """`function(xs, *rest)` for arrays xs `(B, T, heads · head_dim)`, on each device's own heads.

    Every device has all of `rest`.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return function(xs, *rest)
    divided = spec(xs[0].shape, "batch", "context", "heads")
    in_specs = (divided, *(PartitionSpec() for _ in rest))
    return jax.shard_map(function, in_specs=in_specs, out_specs=divided, check_vma=False)(xs, *rest)


def _is_explicit(mesh: Any) -> bool:
    return all(kind == AxisType.Explicit for kind in mesh.axis_types)
