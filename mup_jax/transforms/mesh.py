"""The mesh that arrays are on, and arrays moved to where work on it wants them."""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType

from mup_jax.transforms.matrices import PyTree
from mup_jax.transforms.shard_alike import shard_alike


def axis_names(entry: Any) -> tuple[str, ...]:
    """The mesh axes in one entry of a PartitionSpec."""
    return () if entry is None else (entry,) if isinstance(entry, str) else tuple(entry)


@dataclass(frozen=True)
class MeshInUse:
    """The axes of a mesh over which work can be divided."""

    mesh: jax.sharding.AbstractMesh

    @classmethod
    def of(cls, leaves: list[Any]) -> "MeshInUse":
        """That of `jax.set_mesh`, or else that of the leaves."""
        shardings = [getattr(jax.typeof(leaf), "sharding", None) for leaf in leaves]
        meshes = [jax.sharding.get_abstract_mesh(), *(s.mesh for s in shardings if s is not None)]
        return cls(next((mesh for mesh in meshes if not mesh.empty), meshes[0]))

    def entered(self, leaves: list[Any]) -> contextlib.AbstractContextManager | None:
        """A context in which arrays that depend on no other can be made on the devices of the mesh.

        None where it is known from the types of traced leaves alone, which name no devices.
        """
        if not self.types or not jax.sharding.get_abstract_mesh().empty:
            return contextlib.nullcontext()
        arrays = [leaf for leaf in leaves if not isinstance(leaf, jax.core.Tracer)]
        shardings = [getattr(array, "sharding", None) for array in arrays]
        meshes = (s.mesh for s in shardings if isinstance(s, jax.NamedSharding))
        is_concrete = lambda mesh: isinstance(mesh, jax.sharding.Mesh) and not mesh.empty
        of_devices: Any = next(filter(is_concrete, meshes), None)
        return None if of_devices is None else jax.set_mesh(of_devices)

    @cached_property
    def types(self) -> dict[str, AxisType]:
        """Of the axes of more than one device that no `jax.shard_map` around us has taken."""
        axes = zip(self.mesh.axis_names, self.mesh.axis_sizes, self.mesh.axis_types, strict=True)
        return {name: kind for name, size, kind in axes if size > 1 and kind != AxisType.Manual}

    @cached_property
    def sizes(self) -> dict[str, int]:
        return {name: self.mesh.shape[name] for name in self.types}

    def of_type(self, kind: AxisType) -> list[str]:
        return [name for name in self.types if self.types[name] == kind]

    def spec(self, leaf: Any) -> tuple[tuple[str, ...], ...]:
        """The mesh axes that a leaf's type shows along each of its axes."""
        sharding = getattr(jax.typeof(leaf), "sharding", None)
        entries = [] if sharding is None else list(sharding.spec)
        entries += [None] * (jnp.ndim(leaf) - len(entries))
        return tuple(tuple(a for a in axis_names(e) if a in self.types) for e in entries)

    def shard(self, function: Callable, in_specs: PyTree, out_specs: PyTree) -> Callable:
        """`jax.shard_map` of a function over the axes of this mesh; itself if there are none."""
        if not self.types:
            # Of axes of one device, two leaves may still name different ones.
            return lambda *args: function(*jax.tree.map(partial(self._put, spec=jax.P()), args))
        mapped = jax.shard_map(
            function,
            mesh=self.mesh,
            in_specs=in_specs,
            out_specs=out_specs,
            axis_names=set(self.types),
            check_vma=False,
        )

        @jax.jit
        def placed(*args: Any) -> Any:
            is_spec = lambda x: isinstance(x, jax.P)
            put = lambda spec, part: jax.tree.map(partial(self._put, spec=spec), part)
            return mapped(*jax.tree.map(put, in_specs, args, is_leaf=is_spec))

        return placed

    @cached_property
    def _explicit(self) -> list[str]:
        """The explicit axes, those of one device too."""
        axes = zip(self.mesh.axis_names, self.mesh.axis_types, strict=True)
        return [name for name, kind in axes if kind == AxisType.Explicit]

    def _put(self, x: jax.Array, spec: jax.P) -> jax.Array:
        """Moves to the explicit axes of a sharding; the others follow by themselves."""
        entries = [tuple(a for a in axis_names(e) if a in self._explicit) or None for e in spec]
        if not self._explicit or jax.typeof(x).sharding.spec == jax.P(*entries):
            return x
        return jax.reshard(x, jax.NamedSharding(self.mesh, jax.P(*entries)))

    def like(self, new: jax.Array, old: jax.Array, param: jax.Array) -> jax.Array:
        """`new` with the sharding of `old`; on automatic axes with that of `param`.

        There the compiler may choose how a gradient is divided, which it knows of no parameter.
        """
        if self.mesh.empty:
            return new
        new = self._put(new, jax.typeof(old).sharding.spec)
        return shard_alike(new, param) if self.of_type(AxisType.Auto) else new
