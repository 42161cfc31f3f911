"""What the ready-made optimizers are put together from."""

from dataclasses import dataclass
from typing import Any, Literal, get_args

import jax
import optax

from mup_jax.transfer import rules
from mup_jax.transfer.mup import add_independent_weight_decay, mup
from mup_jax.transfer.rules import Rule
from mup_jax.transfer.shapes import ROLES, is_shape
from mup_jax.transforms.matrices import PyTree

Scalar = float | jax.Array
WeightDecayScaling = Literal["1/width", "constant", "coupled", "none"]


@dataclass(frozen=True)
class Assembly:
    """The arguments that all optimizers share, and what is made of them.

    Raises:
      ValueError: unknown weight_decay_scaling.
    """

    learning_rate: Scalar
    schedule: optax.Schedule | None
    weight_decay: Scalar
    shapes: PyTree | None
    weight_decay_scaling: WeightDecayScaling
    scale_epsilon: bool = True

    def __post_init__(self) -> None:
        if self.weight_decay_scaling not in get_args(WeightDecayScaling):
            raise ValueError(
                f"weight_decay_scaling={self.weight_decay_scaling!r}: choose one of "
                f"{', '.join(map(repr, get_args(WeightDecayScaling)))}"
            )

    def scaled(
        self,
        direction: optax.GradientTransformation,
        rule: Rule,
        *,
        normalize: optax.GradientTransformation | None = None,
        learning_rate: Scalar | None = None,
    ) -> optax.GradientTransformation:
        """η·direction + decay, by the rule; normalized, or with another η, if so wanted."""
        if normalize is not None:
            direction, rule = optax.chain(direction, normalize), rules.spectrally_normalized(rule)
        if not self.scale_epsilon:
            rule = rule.with_constant_epsilon()
        by_rule = direction if self.shapes is None else mup(direction, rule, self.shapes)
        rate = optax.scale(self.learning_rate if learning_rate is None else learning_rate)
        if self.weight_decay_scaling == "coupled":
            decay = add_independent_weight_decay(self.weight_decay, self.shapes, scaling=rule)
            return optax.chain(by_rule, decay, rate)
        decay = add_independent_weight_decay(
            self.weight_decay, self.shapes, scaling=self.weight_decay_scaling
        )
        return optax.chain(by_rule, rate, decay)

    def adam(
        self, b1: float, b2: float, eps: float, learning_rate: Scalar | None = None
    ) -> optax.GradientTransformation:
        return self.scaled(
            optax.scale_by_adam(b1, b2, eps), rules.adam(), learning_rate=learning_rate
        )

    def route(
        self, other: optax.GradientTransformation, **by_role: optax.GradientTransformation
    ) -> optax.GradientTransformation:
        """Each parameter to the transformation of its role, or else to `other`."""

        def labels(params: PyTree) -> Any:
            if self.shapes is None:
                return jax.tree.map(lambda p: "hidden" if p.ndim > 1 else "vector", params)
            return jax.tree.map(lambda shape: shape.role, self.shapes, is_leaf=is_shape)

        return optax.partition(dict.fromkeys(ROLES, other) | by_role, labels)

    def whole(self, scaled: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
        """The optimizer that takes these steps, by the schedule and downhill."""
        return optax.chain(
            scaled,
            optax.scale_by_schedule(self.schedule or (lambda count: 1.0)),
            optax.scale(-1.0),
        )
