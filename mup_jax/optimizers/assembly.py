"""What the ready-made optimizers are put together from."""

from typing import Any

import jax
import optax

from mup_jax.transfer import rules
from mup_jax.transfer.mup import add_independent_weight_decay, mup
from mup_jax.transfer.rules import Rule
from mup_jax.transfer.shapes import ROLES, is_shape
from mup_jax.transforms.matrices import PyTree

Scalar = float | jax.Array


def scaled(
    direction: optax.GradientTransformation,
    rule: Rule,
    shapes: PyTree | None,
    learning_rate: Scalar,
    normalize: optax.GradientTransformation | None = None,
) -> optax.GradientTransformation:
    """The direction, normalized if so wanted, times η: by the rule where there are shapes."""
    if normalize is not None:
        direction, rule = optax.chain(direction, normalize), rules.spectrally_normalized(rule)
    by_rule = direction if shapes is None else mup(direction, rule, shapes)
    return optax.chain(by_rule, optax.scale(learning_rate))


def adam(
    b1: float, b2: float, eps: float, shapes: PyTree | None, learning_rate: Scalar
) -> optax.GradientTransformation:
    return scaled(optax.scale_by_adam(b1, b2, eps), rules.adam(), shapes, learning_rate)


def route(
    shapes: PyTree | None,
    other: optax.GradientTransformation,
    **by_role: optax.GradientTransformation,
) -> optax.GradientTransformation:
    """Each parameter to the transformation of its role, or else to `other`."""

    def labels(params: PyTree) -> Any:
        if shapes is None:
            return jax.tree.map(lambda p: "hidden" if p.ndim > 1 else "vector", params)
        return jax.tree.map(lambda shape: shape.role, shapes, is_leaf=is_shape)

    return optax.partition(dict.fromkeys(ROLES, other) | by_role, labels)


def assemble(
    scaled: optax.GradientTransformation,
    schedule: optax.Schedule | None,
    weight_decay: Scalar,
    shapes: PyTree | None,
) -> optax.GradientTransformationExtraArgs:
    return optax.chain(
        scaled,
        add_independent_weight_decay(weight_decay, shapes),
        optax.scale_by_schedule(schedule or (lambda count: 1.0)),
        optax.scale(-1.0),
    )
