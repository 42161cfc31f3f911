"""µP as a wrapper around any transformation, and independent weight decay."""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import optax

from mup_jax.transfer.rules import Rule
from mup_jax.transfer.shapes import ParamShape, map_shapes
from mup_jax.transforms.matrices import PyTree


class MupState(NamedTuple):
    """State of `mup`: that of the wrapped transformation."""

    inner: Any


def mup(
    inner: optax.GradientTransformation, rule: Rule, shapes: PyTree
) -> optax.GradientTransformationExtraArgs:
    r"""Scales a transformation by a rule: gradient scale -> `inner` -> update scale.

    .. math::
      u = \eta_{rule} c^{-h} \operatorname{inner}(c G)

    Where `inner` is homogeneous of degree h but for its ε, running it on c·G is the same as
    dividing ε by c; so nothing inside `inner` has to change.

    Args:
      inner: any transformation of gradients into directions, without a learning rate.
      rule: of this optimizer, from `mup_jax.rules`.
      shapes: from `infer_shapes`, for (at least) the parameters that arrive here.

    Returns:
      The scaled transformation.

    Raises:
      ValueError: at `update`, the structure of `shapes` is not that of the gradients.

    References:
      Qiu et al., `Hyperparameter transfer <https://arxiv.org/abs/2512.05620>`_, 2025, section 3.
    """
    inner = optax.with_extra_args_support(inner)

    def init(params: optax.Params) -> MupState:
        return MupState(inner.init(params))

    def update(
        updates: optax.Updates, state: MupState, params: Any = None, **extra_args: Any
    ) -> tuple[optax.Updates, MupState]:
        updates = map_shapes(lambda s, g: rule.gradient_scale(s) * g, shapes, updates)
        updates, inner_state = inner.update(updates, state.inner, params, **extra_args)
        updates = map_shapes(lambda s, u: rule.update_scale(s) * u, shapes, updates)
        return updates, MupState(inner_state)

    return optax.GradientTransformationExtraArgs(init, update)


WeightDecayScaling = Literal["1/width", "constant"]


def add_independent_weight_decay(
    weight_decay: float | jax.Array,
    shapes: PyTree | None = None,
    *,
    scaling: WeightDecayScaling = "1/width",
    mask: PyTree | Callable[[PyTree], PyTree] | None = None,
) -> optax.GradientTransformation:
    r"""Adds λ·W to updates that already carry their learning rate.

    Place it after the learning rate and before the schedule and the sign, so that
    W ← W - s(t)·(η·u + λ·W).

    Args:
      weight_decay: λ at the base width, per step; not multiplied by the learning rate.
      shapes: from `infer_shapes`; None means the base model itself, where λ is as given.
      scaling: "1/width" divides λ by the width ratio of each parameter ([Q]: best for every
        optimizer), "constant" does not (µP theory and [G]).
      mask: which parameters to decay, as in `optax.add_decayed_weights`; None means all but scalars
        and vectors.

    Returns:
      A transformation that needs `params`.

    Raises:
      ValueError: unknown scaling; at `update`, no parameters.
    """
    if scaling not in ("1/width", "constant"):
        raise ValueError(f"scaling={scaling!r}: choose '1/width' or 'constant'")

    def decay(shape: ParamShape | None, pair: tuple[jax.Array, jax.Array]) -> jax.Array:
        u, w = pair
        if mask is None and (w.ndim < 2 or (shape is not None and shape.role == "vector")):
            return u
        ratio = 1.0 if shape is None or scaling == "constant" else shape.width_ratio
        return u + (weight_decay / ratio) * w

    def update(updates: optax.Updates, state: Any, params: Any = None) -> tuple[Any, Any]:
        if params is None:
            raise ValueError("weight decay needs the parameters: update(updates, state, params)")
        pairs = jax.tree.map(lambda u, w: (u, w), updates, params)
        if shapes is None:
            decayed = jax.tree.map(lambda u, pair: decay(None, pair), updates, pairs)
        else:
            decayed = map_shapes(decay, shapes, pairs)
        return decayed, state

    transformation = optax.GradientTransformation(lambda params: optax.EmptyState(), update)
    return transformation if mask is None else optax.masked(transformation, mask)
