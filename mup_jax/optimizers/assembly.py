"""What the ready-made optimizers are put together from."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, get_args

import jax
import jax.numpy as jnp
import optax

from mup_jax.transfer import rules
from mup_jax.transfer.mup import add_independent_weight_decay, mup
from mup_jax.transfer.rules import PowerLaw, Rule
from mup_jax.transfer.shapes import ROLES, map_shapes
from mup_jax.transforms.matrices import PyTree
from mup_jax.transforms.options import check_decays, check_not_negative

Scalar = float | jax.Array
Rate: TypeAlias = float | jax.Array | Callable[[jax.Array], Any]
LearningRateScaling = Literal["mup", "constant", "1/width"]
WeightDecayScaling = Literal["1/width", "constant", "learning_rate", "none"]

# What an absolute ε is called among the arguments of an optimizer.
EPSILONS = ("eps", "adam_eps", "muon_eps")

_OTHER_LAWS = {"constant": PowerLaw(), "1/width": rules.adam().learning_rate_law}


@dataclass(frozen=True)
class Assembly:
    """The arguments that all optimizers share, and what is made of them.

    Raises:
      ValueError: unknown learning_rate_scaling or weight_decay_scaling.
    """

    learning_rate: Rate
    schedule: optax.Schedule | None
    weight_decay: Scalar
    shapes: PyTree | None
    embedding_readout_learning_rate: Rate | None
    learning_rate_scaling: LearningRateScaling
    weight_decay_scaling: WeightDecayScaling
    scale_epsilon: bool = True

    def __post_init__(self) -> None:
        for key, known in (
            ("learning_rate_scaling", LearningRateScaling),
            ("weight_decay_scaling", WeightDecayScaling),
        ):
            if getattr(self, key) not in get_args(known):
                raise ValueError(
                    f"{key}={getattr(self, key)!r}: choose one of "
                    f"{', '.join(map(repr, get_args(known)))}"
                )

    def scaled(
        self,
        direction: optax.GradientTransformation,
        rule: Rule,
        *,
        normalize: optax.GradientTransformation | None = None,
    ) -> optax.GradientTransformation:
        """The direction by its rule, normalized if so wanted, and decay that η scales."""
        if normalize is not None:
            direction, rule = optax.chain(direction, normalize), rules.spectrally_normalized(rule)
        if self.learning_rate_scaling != "mup":
            rule = rule.with_learning_rate(_OTHER_LAWS[self.learning_rate_scaling])
        if not self.scale_epsilon:
            rule = rule.with_constant_epsilon()
        by_rule = direction if self.shapes is None else mup(direction, rule, self.shapes)
        if self.weight_decay_scaling != "learning_rate":
            return by_rule
        decay = add_independent_weight_decay(self.weight_decay, self.shapes, scaling=rule)
        return optax.chain(by_rule, decay)

    def adam(self, b1: float, b2: float, eps: float) -> optax.GradientTransformation:
        check_decays(b1=b1, b2=b2)
        check_not_negative(eps=eps)
        return self.scaled(optax.scale_by_adam(b1, b2, eps), rules.adam())

    def route(
        self, other: optax.GradientTransformation, **by_role: optax.GradientTransformation
    ) -> optax.GradientTransformation:
        """Each parameter to the transformation of its role, or else to `other`."""

        def labels(params: PyTree) -> Any:
            if self.shapes is None:
                return jax.tree.map(lambda p: "hidden" if p.ndim > 1 else "vector", params)
            return map_shapes(lambda shape, _: shape.role, self.shapes, params)

        return optax.partition(dict.fromkeys(ROLES, other) | by_role, labels)

    def whole(self, scaled: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
        """The optimizer that takes these steps, by the schedule and downhill.

        It computes with the promotion of dtypes that Optax needs, and with float16, whose range
        does not hold the squares of gradients, in float32.
        """
        scale = functools.partial(optax.scale_by_learning_rate, flip_sign=False)
        rate = scale(self.learning_rate)
        if self.embedding_readout_learning_rate is not None:
            rate = self.route(scale(self.embedding_readout_learning_rate), hidden=rate)
        steps = [scaled, rate]
        if self.weight_decay_scaling != "learning_rate":
            steps.append(
                add_independent_weight_decay(
                    self.weight_decay, self.shapes, scaling=self.weight_decay_scaling
                )
            )
        chain = optax.chain(
            *steps,
            optax.scale_by_schedule(self.schedule or (lambda count: 1.0)),
            optax.scale(-1.0),
        )

        def init(params: PyTree) -> Any:
            with jax.numpy_dtype_promotion("standard"):
                return chain.init(_in_range(params))

        def update(
            updates: PyTree, state: Any, params: PyTree | None = None, **extra_args: Any
        ) -> tuple[PyTree, Any]:
            with jax.numpy_dtype_promotion("standard"):
                new, state = chain.update(
                    _in_range(updates), state, _in_range(params), **extra_args
                )
            return jax.tree.map(lambda u, g: u.astype(g.dtype), new, updates), state

        return optax.GradientTransformationExtraArgs(init, update)


def _in_range(tree: PyTree) -> PyTree:
    """A tree whose float16 leaves are in float32."""
    is_half = lambda x: getattr(x, "dtype", None) == jnp.float16
    return jax.tree.map(lambda x: x.astype(jnp.float32) if is_half(x) else x, tree)
