"""What a matrix optimizer is to the engine: a few pure functions of one block."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import jax


class BlockRule(NamedTuple):
    r"""An optimizer of one `(m, n)` matrix, or of one block of a larger one.

    At each step `accumulate` takes in the gradient, then the block is refreshed if its turn has
    come, then `direction` gives the update. All are pure functions under `jax.vmap`; a gradient and
    an update are float32 `(m, n)`, `step` is an int32 scalar that begins at 1, and a state is any
    tree of arrays, whose structure, shapes and dtypes never change. Momentum, bias correction and ε
    are the rule's own; stacks, meshes, platforms and gradients that are not finite are not.

    Attributes:
      init: `(shape) -> state`.
      direction: `(gradient, state, step) -> (update, state)`.
      accumulate: `(gradient, state, step) -> state`, or None.
      refresh: `(state, step) -> state`: what is too expensive for every step, or None.
      first_refresh: in place of `refresh` at a block's first gradient that is not zero, and in
        early steps; None for `refresh` itself.

    Example:
      Momentum, whitened on one side:

      >>> import jax
      >>> import jax.numpy as jnp
      >>> import mup_jax
      >>> def init(shape):
      ...     return {"mu": jnp.zeros(shape), "gram": jnp.zeros((shape[0],) * 2)}
      >>> def direction(g, state, step):
      ...     mu = 0.9 * state["mu"] + 0.1 * g
      ...     gram = 0.9 * state["gram"] + 0.1 * g @ g.T
      ...     ridge = (1e-8 + 1e-3 * jnp.trace(gram)) * jnp.eye(len(g))
      ...     return jnp.linalg.solve(gram + ridge, mu), {"mu": mu, "gram": gram}
      >>> tx = mup_jax.scale_by_blocks(mup_jax.BlockRule(init, direction), block_size=64)
      >>> params = {"w": jnp.ones((96, 64))}
      >>> updates, state = tx.update(params, tx.init(params))
      >>> updates["w"].shape
      (96, 64)
    """

    init: Callable[[tuple[int, int]], Any]
    direction: Callable[[jax.Array, Any, jax.Array], tuple[jax.Array, Any]]
    accumulate: Callable[[jax.Array, Any, jax.Array], Any] | None = None
    refresh: Callable[[Any, jax.Array], Any] | None = None
    first_refresh: Callable[[Any, jax.Array], Any] | None = None


def _itself(x: jax.Array) -> jax.Array:
    return x


@dataclass(frozen=True)
class Block:
    """What a rule may have to know of its blocks beyond their gradients.

    Attributes:
      shape: of the whole block, of which a device may have a part.
      sides: whether in side and out side are to be preconditioned.
      sum_over_parts: sums an array over the devices that hold parts of one block. A side that is
        not preconditioned may be divided at any place, as that of a vocabulary is, and filled up
        with zeros at its end.
      max_over_parts: likewise the maximum.
    """

    shape: tuple[int, int]
    sides: tuple[bool, bool] = (True, True)
    sum_over_parts: Callable[[jax.Array], jax.Array] = _itself
    max_over_parts: Callable[[jax.Array], jax.Array] = _itself


# A rule, or what makes one for blocks of a kind.
AnyRule: TypeAlias = BlockRule | Callable[[Block], BlockRule]


def rule_for(rule: AnyRule, block: Block) -> BlockRule:
    return rule if isinstance(rule, BlockRule) else rule(block)
