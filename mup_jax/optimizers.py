"""Ready-made optimizers: a transformation, its µP rule and independent weight decay.

All of them update W <- W - s(t)·(η·u + λ·W), where s(t) is the schedule, η the learning rate and
λ the weight decay of the base model, both scaled for every parameter by the rules of
`mup_jax.rules`. Parameters are routed by role: the preconditioned direction takes hidden matrices,
and what takes embedding, readout and vectors stands in each docstring. Without `shapes` nothing is
scaled, and every leaf of two or more axes counts as a hidden matrix.

[Q] is Qiu et al., arXiv 2512.05620.
"""

from collections.abc import Callable
from typing import Any

import jax
import optax

from mup_jax.transfer import rules
from mup_jax.transfer.mup import add_independent_weight_decay, mup
from mup_jax.transfer.rules import Rule
from mup_jax.transfer.shapes import is_shape
from mup_jax.transforms.blocking import Sides
from mup_jax.transforms.grafting import graft
from mup_jax.transforms.linalg import Orthogonalizer
from mup_jax.transforms.matrices import PyTree, WeightDimensionNumbers
from mup_jax.transforms.muon import scale_by_muon
from mup_jax.transforms.shampoo import scale_by_shampoo
from mup_jax.transforms.soap import scale_by_soap

Scalar = float | jax.Array


def adamw(
    learning_rate: Scalar,
    *,
    schedule: optax.Schedule | None = None,
    weight_decay: Scalar = 0.0,
    shapes: PyTree | None = None,
    b1: float = 0.9,
    b2: float = 0.98,
    eps: float = 1e-8,
) -> optax.GradientTransformationExtraArgs:
    """AdamW on every parameter.

    Args:
      learning_rate: η of the base model.
      schedule: s(t), a factor of learning rate and weight decay at each step; None for 1.
      weight_decay: λ of the base model, per step, independent of η.
      shapes: from `infer_shapes`; None for standard parametrization.
      b1: decay of the momentum.
      b2: decay of the second moment.
      eps: ε of the base model, in units of the gradient.

    Returns:
      An optimizer whose updates go to `optax.apply_updates`.

    References:
      Loshchilov and Hutter, `AdamW <https://arxiv.org/abs/1711.05101>`_, 2017; µP as in [Q].
    """
    scaled = _adam(b1, b2, eps, shapes, learning_rate)
    return _optimizer(scaled, schedule, weight_decay, shapes)


def muon(
    learning_rate: Scalar,
    *,
    schedule: optax.Schedule | None = None,
    weight_decay: Scalar = 0.0,
    shapes: PyTree | None = None,
    beta: float = 0.95,
    nesterov: bool = True,
    eps: float = 1e-8,
    orthogonalizer: Orthogonalizer = "polar_express",
    steps: int = 5,
    adam_learning_rate: Scalar | None = None,
    adam_b1: float = 0.8,
    adam_b2: float = 0.98,
    adam_eps: float = 1e-8,
    weight_dimension_numbers: WeightDimensionNumbers = None,
) -> optax.GradientTransformationExtraArgs:
    """Muon on hidden matrices, Adam on embedding, readout and vectors ("Muon-Adam" of [Q]).

    Args:
      learning_rate: η of the base model.
      schedule: s(t), a factor of learning rate and weight decay at each step; None for 1.
      weight_decay: λ of the base model, per step, independent of η.
      shapes: from `infer_shapes`; None for standard parametrization.
      beta: as in `scale_by_muon`; so are nesterov, eps, orthogonalizer, steps and
        weight_dimension_numbers.
      nesterov: see beta.
      eps: see beta.
      orthogonalizer: see beta.
      steps: see beta.
      adam_learning_rate: η of Adam in the base model; None for `learning_rate`.
      adam_b1: decay of Adam's momentum.
      adam_b2: decay of Adam's second moment.
      adam_eps: ε of Adam in the base model.
      weight_dimension_numbers: see beta.

    Returns:
      An optimizer whose updates go to `optax.apply_updates`.

    References:
      Jordan et al., `Muon <https://kellerjordan.github.io/posts/muon/>`_, 2024; µP as in [Q].
    """
    direction = scale_by_muon(
        beta,
        nesterov=nesterov,
        eps=eps,
        orthogonalizer=orthogonalizer,
        steps=steps,
        weight_dimension_numbers=weight_dimension_numbers,
    )
    rate = learning_rate if adam_learning_rate is None else adam_learning_rate
    adam = _adam(adam_b1, adam_b2, adam_eps, shapes, rate)
    hidden = _scaled(direction, rules.muon(), shapes, learning_rate)
    routed = _route(shapes, hidden=hidden, embedding=adam, readout=adam, vector=adam)
    return _optimizer(routed, schedule, weight_decay, shapes)


def shampoo(
    learning_rate: Scalar,
    *,
    schedule: optax.Schedule | None = None,
    weight_decay: Scalar = 0.0,
    shapes: PyTree | None = None,
    b1: float = 0.95,
    b2: float = 0.98,
    eps: float = 1e-5,
    exponent: float = 0.5,
    block_size: int | None = 512,
    max_preconditioner_dim: int = 10_000,
    precondition_frequency: int = 10,
    stagger: bool = True,
    adam_learning_rate: Scalar | None = None,
    adam_eps: float = 1e-8,
    weight_dimension_numbers: WeightDimensionNumbers = None,
) -> optax.GradientTransformationExtraArgs:
    """Shampoo² with blocks, grafted to Adam, on hidden matrices; Adam on the others ([Q]).

    Args:
      learning_rate: η of the base model.
      schedule: s(t), a factor of learning rate and weight decay at each step; None for 1.
      weight_decay: λ of the base model, per step, independent of η.
      shapes: from `infer_shapes`; None for standard parametrization.
      b1: decay of the momentum, of Adam's too.
      b2: decay of the statistics, and of Adam's second moment.
      eps: ridge of the roots, times the largest eigenvalue of each factor.
      exponent: as in `scale_by_shampoo`; so are block_size, max_preconditioner_dim,
        precondition_frequency, stagger and weight_dimension_numbers.
      block_size: see exponent.
      max_preconditioner_dim: see exponent.
      precondition_frequency: see exponent.
      stagger: see exponent.
      adam_learning_rate: η of embedding, readout and vectors in the base model; None for
        `learning_rate`.
      adam_eps: ε of Adam in the base model, also of the Adam that sets the size of Shampoo's
        updates.
      weight_dimension_numbers: see exponent.

    Returns:
      An optimizer whose updates go to `optax.apply_updates`.

    References:
      Gupta et al., `Shampoo <https://arxiv.org/abs/1802.09568>`_, 2018; Shi et al., `Distributed
      Shampoo <https://arxiv.org/abs/2309.06497>`_, 2023; µP as in [Q].
    """
    direction = graft(
        optax.scale_by_adam(b1, b2, adam_eps),
        scale_by_shampoo(
            b1,
            b2,
            eps,
            exponent=exponent,
            block_size=block_size,
            max_preconditioner_dim=max_preconditioner_dim,
            precondition_frequency=precondition_frequency,
            stagger=stagger,
            weight_dimension_numbers=weight_dimension_numbers,
        ),
        weight_dimension_numbers=weight_dimension_numbers,
    )
    rate = learning_rate if adam_learning_rate is None else adam_learning_rate
    adam = _adam(b1, b2, adam_eps, shapes, rate)
    hidden = _scaled(direction, rules.grafted(rules.adam()), shapes, learning_rate)
    routed = _route(shapes, hidden=hidden, embedding=adam, readout=adam, vector=adam)
    return _optimizer(routed, schedule, weight_decay, shapes)


def soap(
    learning_rate: Scalar,
    *,
    schedule: optax.Schedule | None = None,
    weight_decay: Scalar = 0.0,
    shapes: PyTree | None = None,
    b1: float = 0.9,
    b2: float = 0.98,
    eps: float = 1e-8,
    block_size: int | None = 512,
    max_preconditioner_dim: int = 10_000,
    precondition_frequency: int = 10,
    exact_steps: int = 1,
    stagger: bool = True,
    adam_learning_rate: Scalar | None = None,
    weight_dimension_numbers: WeightDimensionNumbers = None,
) -> optax.GradientTransformationExtraArgs:
    """SOAP with blocks on matrices, on the width side alone of embedding and readout ([Q]).

    Args:
      learning_rate: η of the base model.
      schedule: s(t), a factor of learning rate and weight decay at each step; None for 1.
      weight_decay: λ of the base model, per step, independent of η.
      shapes: from `infer_shapes`; None for standard parametrization.
      b1: decay of the momentum, of Adam's too.
      b2: decay of the second moment and of the statistics, of Adam's too.
      eps: ε of the base model, of SOAP and of Adam, in units of the gradient.
      block_size: as in `scale_by_soap`; so are max_preconditioner_dim, precondition_frequency,
        exact_steps, stagger and weight_dimension_numbers.
      max_preconditioner_dim: see block_size.
      precondition_frequency: see block_size.
      exact_steps: see block_size.
      stagger: see block_size.
      adam_learning_rate: η of Adam in the base model, which then takes embedding and readout; None
        leaves them to SOAP. Vectors have Adam either way, at this rate or at `learning_rate`.
      weight_dimension_numbers: see block_size.

    Returns:
      An optimizer whose updates go to `optax.apply_updates`.

    References:
      Vyas et al., `SOAP <https://arxiv.org/abs/2409.11321>`_, 2024; µP as in [Q].
    """
    blocks: dict[str, Any] = {
        "block_size": block_size,
        "max_preconditioner_dim": max_preconditioner_dim,
    }

    def on(sides: Sides) -> optax.GradientTransformation:
        direction = scale_by_soap(
            b1,
            b2,
            eps,
            **blocks,
            precondition_frequency=precondition_frequency,
            exact_steps=exact_steps,
            stagger=stagger,
            sides=sides,
            weight_dimension_numbers=weight_dimension_numbers,
        )
        return _scaled(direction, rules.soap(**blocks, sides=sides), shapes, learning_rate)

    rate = learning_rate if adam_learning_rate is None else adam_learning_rate
    adam = _adam(b1, b2, eps, shapes, rate)
    width_side = {"embedding": on("out"), "readout": on("in")}
    outer = width_side if adam_learning_rate is None else {"embedding": adam, "readout": adam}
    routed = _route(shapes, hidden=on("both"), **outer, vector=adam)
    return _optimizer(routed, schedule, weight_decay, shapes)


OPTIMIZERS: dict[str, Callable[..., optax.GradientTransformationExtraArgs]] = {
    "adamw": adamw,
    "muon": muon,
    "shampoo": shampoo,
    "soap": soap,
}


def _scaled(
    direction: optax.GradientTransformation,
    rule: Rule,
    shapes: PyTree | None,
    learning_rate: Scalar,
) -> optax.GradientTransformation:
    """The direction times η, by the rule where there are shapes."""
    scaled = direction if shapes is None else mup(direction, rule, shapes)
    return optax.chain(scaled, optax.scale(learning_rate))


def _adam(
    b1: float, b2: float, eps: float, shapes: PyTree | None, learning_rate: Scalar
) -> optax.GradientTransformation:
    return _scaled(optax.scale_by_adam(b1, b2, eps), rules.adam(), shapes, learning_rate)


def _route(
    shapes: PyTree | None,
    *,
    hidden: optax.GradientTransformation,
    embedding: optax.GradientTransformation,
    readout: optax.GradientTransformation,
    vector: optax.GradientTransformation,
) -> optax.GradientTransformation:
    """Each parameter to the transformation of its role."""

    def labels(params: PyTree) -> Any:
        if shapes is None:
            return jax.tree.map(lambda p: "hidden" if p.ndim > 1 else "vector", params)
        return jax.tree.map(lambda shape: shape.role, shapes, is_leaf=is_shape)

    routes = {"hidden": hidden, "embedding": embedding, "readout": readout, "vector": vector}
    return optax.partition(routes, labels)


def _optimizer(
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
