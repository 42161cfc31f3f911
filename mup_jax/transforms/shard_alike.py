"""Two arrays of one sharding, where only the compiler knows it.

Of an automatic mesh axis a type shows nothing, so `jax.reshard` cannot be asked for what another
array has. Shardy can, by a sharding group; JAX once had it as `jax.experimental.shard_alike` and
has no public function for it any more, so a primitive is made here, from public parts.
"""

import itertools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.extend.mlir.dialects import sdy
from jax.interpreters import ad, batching, mlir

_group_ids = itertools.count()
_shard_alike_p = Primitive("mup_jax_shard_alike")


def shard_alike(x: jax.Array, like: jax.Array) -> jax.Array:
    """`x`, for which the compiler chooses the sharding that `like`, of equal shape, has.

    In a jitted function, where `x` is computed; an argument stays where it is. Without the Shardy
    partitioner (`jax_use_shardy_partitioner=False`) the compiler chooses freely.
    """
    # What a `jax.shard_map` returns has its sharding; what passes it on is free to have another.
    free = jax.lax.optimization_barrier(x)
    # The group is a parameter of the primitive: JAX lowers equal ones once, which would put all
    # arrays of one shape into one group.
    return _shard_alike_p.bind(free, like, group=next(_group_ids))


def _lower(_: Any, x: Any, like: Any, *, group: int) -> list[Any]:
    if jax.config.values["jax_use_shardy_partitioner"]:
        for value in (x, like):
            sdy.sharding_group(value, group)
    return [x]


def _batch(
    args: Sequence[jax.Array], axes: Sequence[int | None], *, group: int
) -> tuple[jax.Array, int]:
    del group
    size = next(x.shape[axis] for x, axis in zip(args, axes, strict=True) if axis is not None)
    stacked = (
        jnp.broadcast_to(x, (size, *x.shape)) if axis is None else jnp.moveaxis(x, axis, 0)
        for x, axis in zip(args, axes, strict=True)
    )
    return shard_alike(*stacked), 0


_shard_alike_p.def_impl(lambda x, like, *, group: x)
_shard_alike_p.def_abstract_eval(lambda x, like, *, group: x)
mlir.register_lowering(_shard_alike_p, _lower)
batching.primitive_batchers[_shard_alike_p] = _batch
# Linear in `x`, and no function of the values of `like`.
ad.deflinear2(_shard_alike_p, lambda cotangent, x, like, *, group: (cotangent, None))
