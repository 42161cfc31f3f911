"""µP as a wrapper around any transformation, and independent weight decay."""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple, get_args

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

    Example:
      >>> small, large = ({"w": jnp.ones((d, d)), "out": jnp.ones((d, 10))} for d in (32, 128))
      >>> shapes = mup_jax.infer_shapes(small, large)
      >>> tx = mup_jax.mup(mup_jax.scale_by_muon(), mup_jax.rules.muon(), shapes)
      >>> updates, state = tx.update(large, tx.init(large))

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


IndependentScaling = Literal["1/width", "constant"]


def weight_decay_factor(shape: ParamShape, scaling: IndependentScaling | Rule) -> float:
    """The factor of λ for a parameter that decays; see `add_independent_weight_decay`."""
    if isinstance(scaling, Rule):
        return scaling.learning_rate(shape)
    return {"1/width": 1 / shape.width_ratio, "constant": 1.0}[scaling]


def add_independent_weight_decay(
    weight_decay: float | jax.Array,
    shapes: PyTree | None = None,
    *,
    scaling: IndependentScaling | Rule = "1/width",
    mask: PyTree | Callable[[PyTree], PyTree] | None = None,
) -> optax.GradientTransformation:
    r"""Adds λ·W to updates that already carry their learning rate.

    Place it after the learning rate and before the schedule and the sign, so that
    W ← W - s(t)·(η·u + λ·W). Placed before the learning rate, with the optimizer's rule as
    `scaling`, decay is scaled by the learning rate, as in `optax.adamw`: W ← W - s(t)·η·(u + λ·W).

    Args:
      weight_decay: λ at the base width, per step; not multiplied by the learning rate.
      shapes: from `infer_shapes`; None means the base model itself, where λ is as given.
      scaling: "1/width" divides λ by the width ratio of each parameter (Qiu et al.,
        arXiv 2512.05620: best for every optimizer), "constant" does not (µP theory and Gupta et
        al., arXiv 2602.20937); a Rule multiplies λ by its factor of η.
      mask: which parameters to decay, as in `optax.add_decayed_weights`; None means all but scalars
        and vectors.

    Returns:
      A transformation that needs `params`.

    Raises:
      ValueError: unknown scaling; at `update`, no parameters.

    Example:
      >>> small, large = ({"w": jnp.ones((d, d)), "out": jnp.ones((d, 10))} for d in (32, 128))
      >>> shapes = mup_jax.infer_shapes(small, large)
      >>> decay = mup_jax.add_independent_weight_decay(1e-3, shapes)
      >>> steps, _ = decay.update(jax.tree.map(jnp.zeros_like, large), decay.init(large), large)
      >>> print(f"{steps['w'][0, 0]:.5f}")  # λ times the ratio of the widths, 32/128
      0.00025
    """
    if not isinstance(scaling, Rule) and scaling not in get_args(IndependentScaling):
        raise ValueError(
            f"scaling={scaling!r}: choose '1/width' or 'constant', or for decay that is "
            "scaled by the learning rate give the optimizer's rule"
        )

    def decay(shape: ParamShape | None, u: jax.Array, w: jax.Array) -> jax.Array:
        if mask is None and (w.ndim < 2 or (shape is not None and shape.role == "vector")):
            return u
        factor = 1.0 if shape is None else weight_decay_factor(shape, scaling)
        return u + weight_decay * factor * w

    def update(updates: optax.Updates, state: Any, params: Any = None) -> tuple[Any, Any]:
        if params is None:
            raise ValueError("weight decay needs the parameters: update(updates, state, params)")
        if shapes is None:
            return jax.tree.map(partial(decay, None), updates, params), state
        return map_shapes(decay, shapes, updates, params), state

    transformation = optax.GradientTransformation(lambda params: optax.EmptyState(), update)
    return transformation if mask is None else optax.masked(transformation, mask)
