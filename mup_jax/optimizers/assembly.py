"""What the ready-made optimizers are put together from."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, get_args, get_type_hints

import jax
import jax.numpy as jnp
import optax

from mup_jax.transfer import rules
from mup_jax.transfer.mup import IndependentScaling, add_independent_weight_decay, mup
from mup_jax.transfer.rules import PowerLaw, Rule
from mup_jax.transfer.shapes import ROLES, map_shapes
from mup_jax.transforms.matrices import PyTree
from mup_jax.transforms.options import check_decays, check_not_negative

Scalar = float | jax.Array
Rate: TypeAlias = float | jax.Array | Callable[[jax.Array], Any]

# What an absolute ε is called among the arguments of an optimizer.
EPSILONS = ("eps", "adam_eps", "muon_eps")

_OTHER_LAWS = {"constant": PowerLaw(), "1/width": rules.adam().learning_rate_law}


@dataclass(frozen=True)
class Transfer:
    """How the hyperparameters of an optimizer depend on the size of the model: µP, or otherwise.

    It goes where an optimizer takes `shapes`, which alone mean `Transfer(shapes)`. The defaults
    transfer; whatever else there is, is there to be compared with them.

    Args:
      shapes: from `infer_shapes`.
      learning_rate_scaling: η of a parameter: "mup" times the factor of its rule; "constant" the
        same at every size, which is standard parametrization; "1/width" by Adam's rule, whatever
        the optimizer.
      weight_decay_scaling: the independent λ of a parameter: "1/width" over its width ratio (best
        for every optimizer in Qiu et al.); "constant" the same at every size (Gupta et al.).
      scale_epsilon: whether ε follows its rule; otherwise it is the same at every size.

    Raises:
      ValueError: an unknown scaling.

    Example:
      >>> small, large = ({"w": jnp.ones((d, d)), "out": jnp.ones((d, 10))} for d in (32, 128))
      >>> shapes = mup_jax.infer_shapes(small, large)
      >>> as_it_is = mup_jax.Transfer(shapes, learning_rate_scaling="constant")
      >>> optimizer = mup_jax.muon(0.02, shapes=as_it_is)

    References:
      Qiu et al., `Hyperparameter transfer <https://arxiv.org/abs/2512.05620>`_, 2025; Gupta et al.,
      `arXiv 2602.20937 <https://arxiv.org/abs/2602.20937>`_, 2026.
    """

    shapes: PyTree
    learning_rate_scaling: Literal["mup", "constant", "1/width"] = "mup"
    weight_decay_scaling: IndependentScaling = "1/width"
    scale_epsilon: bool = True

    def __post_init__(self) -> None:
        types = get_type_hints(Transfer)
        for key in ("learning_rate_scaling", "weight_decay_scaling"):
            known = get_args(types[key])
            if getattr(self, key) not in known:
                raise ValueError(
                    f"{key}={getattr(self, key)!r}: choose one of {', '.join(map(repr, known))}"
                )


@dataclass(frozen=True)
class Assembly:
    """The arguments that all optimizers share, and what is made of them."""

    learning_rate: Rate
    schedule: optax.Schedule | None
    weight_decay: Scalar
    independent_weight_decay: Scalar
    shapes: PyTree | Transfer | None
    embedding_readout_learning_rate: Rate | None

    @property
    def transfer(self) -> Transfer:
        return self.shapes if isinstance(self.shapes, Transfer) else Transfer(self.shapes)

    def scaled(
        self,
        direction: optax.GradientTransformation,
        rule: Rule,
        *,
        normalize: optax.GradientTransformation | None = None,
    ) -> optax.GradientTransformation:
        """The direction by its rule, normalized if so wanted, and the decay that η scales."""
        if normalize is not None:
            direction, rule = optax.chain(direction, normalize), rules.spectrally_normalized(rule)
        transfer = self.transfer
        if transfer.learning_rate_scaling != "mup":
            rule = rule.with_learning_rate(_OTHER_LAWS[transfer.learning_rate_scaling])
        if not transfer.scale_epsilon:
            rule = rule.with_constant_epsilon()
        by_rule = direction if transfer.shapes is None else mup(direction, rule, transfer.shapes)
        decay = add_independent_weight_decay(self.weight_decay, transfer.shapes, scaling=rule)
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
            shapes = self.transfer.shapes
            if shapes is None:
                return jax.tree.map(lambda p: "hidden" if p.ndim > 1 else "vector", params)
            return map_shapes(lambda shape, _: shape.role, shapes, params)

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
        transfer = self.transfer
        chain = optax.chain(
            scaled,
            rate,
            add_independent_weight_decay(
                self.independent_weight_decay,
                transfer.shapes,
                scaling=transfer.weight_decay_scaling,
            ),
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
