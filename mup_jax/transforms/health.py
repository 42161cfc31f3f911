"""How well the preconditioners of an optimizer do, measured from its state by matrix products."""

import jax
import jax.numpy as jnp
import optax

from mup_jax.transforms.engine import ScaleByBlocksState
from mup_jax.transforms.linalg import FLOOR, ROUNDING, identity, matmul
from mup_jax.transforms.shampoo import ShampooState
from mup_jax.transforms.soap import SoapState
from mup_jax.transforms.statistics import unpack

_SQUARINGS = 14


def preconditioner_health(state: optax.OptState) -> dict[str, jax.Array]:
    """Measures the preconditioners of Shampoo and SOAP, wherever they are in a state.

    Args:
      state: of any optimizer; what has no preconditioners gives nothing.

    Returns:
      Scalars, for each group of matrices, named by its shape as "8x256x1024":

      - "condition/GROUP": the largest condition number among the blocks: of Shampoo's inverse
        roots, where it is right to a tenth up to 1e3, or of SOAP's factors in the basis kept; at
        most 1/rounding, where rank is lacking.
      - "staleness/GROUP": how far statistics have turned away since the blocks were refreshed,
        as a mean: of Shampoo ‖RS − SR‖ / ‖R‖‖S‖ with the statistics S and their root R, which is 0
        when R is fresh; of SOAP the part of S off the diagonal of QᵀSQ.
      - "nonfinite": matrices of gradients skipped so far, with their refreshes.

      Blocks without statistics count as zeros.
    """
    is_known = lambda x: isinstance(x, ScaleByBlocksState)
    states = [x for x in jax.tree.leaves(state, is_leaf=is_known) if is_known(x)]
    sides: dict[str, list[tuple[jax.Array, jax.Array]]] = {}
    nonfinite: list[jax.Array] = []
    for known in states:
        pieces = [(key, each.state) for key, blocks in known.blocks.items() for each in blocks]
        pieces = [(key, x) for key, x in pieces if isinstance(x, (ShampooState, SoapState))]
        for key, x in pieces:
            of_side, factors = (
                (_of_root, x.roots) if isinstance(x, ShampooState) else (_of_basis, x.bases)
            )
            pairs = zip(jax.tree.leaves(x.statistics), jax.tree.leaves(factors), strict=True)
            sides.setdefault(key, []).extend(of_side(*map(_whole, pair)) for pair in pairs)
        if pieces:
            nonfinite.append(known.nonfinite)
    health: dict[str, jax.Array] = {}
    for group, measured in sides.items():
        conditions, stalenesses = zip(*measured, strict=True)
        health[f"condition/{group}"] = jnp.max(jnp.stack([jnp.max(x) for x in conditions]))
        health[f"staleness/{group}"] = jnp.mean(jnp.stack([jnp.mean(x) for x in stalenesses]))
    if nonfinite:
        health["nonfinite"] = jnp.sum(jnp.stack(nonfinite))
    return health


def _whole(x: jax.Array) -> jax.Array:
    """Each matrix on one device, also where a mesh in explicit mode shows it divided."""
    mesh, spec = jax.typeof(x).sharding.mesh, jax.typeof(x).sharding.spec
    return jax.reshard(x, jax.NamedSharding(mesh, jax.P(*spec[:-2]))) if any(spec[-2:]) else x


def _of_root(statistic: jax.Array, root: jax.Array) -> tuple[jax.Array, jax.Array]:
    statistic = _scaled(unpack(statistic))
    root = _scaled(unpack(root).astype(jnp.float32))
    product = matmul(root, statistic)
    scale = _norm(root) * _norm(statistic)
    staleness = _norm(product - product.mT) / jnp.maximum(scale, ROUNDING)
    largest = _at_top(root, root)
    mirrored = 2 * largest[..., None, None] * identity(root.ndim, root.shape[-1]) - root
    return _ratio(largest, _at_top(mirrored, root)), staleness


def _of_basis(statistic: jax.Array, basis: jax.Array) -> tuple[jax.Array, jax.Array]:
    basis = basis.astype(jnp.float32)
    rotated = matmul(basis.mT, matmul(_scaled(unpack(statistic)), basis))
    staleness = _norm(rotated * (1 - identity(rotated.ndim, rotated.shape[-1])))
    diagonal = jnp.diagonal(rotated, axis1=-2, axis2=-1)
    condition = _ratio(jnp.max(diagonal, axis=-1), jnp.min(diagonal, axis=-1))
    return condition, staleness / jnp.maximum(_norm(rotated), ROUNDING)


def _scaled(x: jax.Array) -> jax.Array:
    """Matrices whose largest entry is 1, or that are zero: their squares do not overflow."""
    return x / jnp.maximum(jnp.max(jnp.abs(x), axis=(-2, -1), keepdims=True), FLOOR)


def _norm(x: jax.Array) -> jax.Array:
    return jnp.sqrt(jnp.sum(jnp.square(x), axis=(-2, -1)))


def _ratio(largest: jax.Array, smallest: jax.Array) -> jax.Array:
    return largest / jnp.maximum(smallest, ROUNDING * jnp.maximum(largest, ROUNDING))


def _at_top(x: jax.Array, y: jax.Array) -> jax.Array:
    """vᵀyv with the first eigenvector v of positive semidefinite matrices x `(..., d, d)`.

    A high power of x is vvᵀ; where several eigenvalues are close, it is a mean over theirs.
    """

    def square(_: int, power: jax.Array) -> jax.Array:
        return _scaled(matmul(power, power))

    power = jax.lax.fori_loop(0, _SQUARINGS, square, x)
    weight = jnp.trace(power, axis1=-2, axis2=-1)
    return jnp.sum(power * y, axis=(-2, -1)) / jnp.maximum(weight, ROUNDING)
