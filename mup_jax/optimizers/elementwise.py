"""Optimizers that treat all parameters alike."""

from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import optax

from mup_jax.optimizers.assembly import (
    Assembly,
    Rate,
    Scalar,
    Transfer,
)
from mup_jax.transfer import rules
from mup_jax.transfer.rules import MeasuredOrGupta, Rule
from mup_jax.transfer.shapes import map_shapes
from mup_jax.transforms.matrices import (
    PyTree,
    WeightDimensionNumbers,
    dimension_numbers,
    matrix_layout,
)
from mup_jax.transforms.options import check_decays, check_not_negative, check_positive
from mup_jax.transforms.sophia import scale_by_sophia_g

Curvature = Literal["hutchinson", "gnb"]
# What the paper has found for each.
_SOPHIA_GAMMA = {"hutchinson": 0.01, "gnb": 0.05}


def adamw(
    learning_rate: Rate,
    *,
    schedule: optax.Schedule | None = None,
    weight_decay: Scalar = 0.0,
    independent_weight_decay: Scalar = 0.0,
    shapes: PyTree | Transfer | None = None,
    embedding_readout_learning_rate: Rate | None = None,
    b1: float = 0.9,
    b2: float = 0.98,
    eps: float = 1e-8,
) -> optax.GradientTransformationExtraArgs:
    """AdamW.

    Args:
      learning_rate: η of the base model, or a function of the step that gives it.
      schedule: s(t), a factor of the learning rate and of both decays at each step; a schedule as
        `learning_rate` leaves the independent one as it is. None for 1.
      weight_decay: times the learning rate, as in `optax.adamw`, but of matrices only.
      independent_weight_decay: λ of the base model, per step, which no learning rate multiplies; of
        matrices only. `weight_decay` is a thousand times that at a learning rate of 1e-3.
      shapes: from `infer_shapes`, to scale by µP; a `Transfer` of them, to scale otherwise; None
        for the base model itself.
      embedding_readout_learning_rate: η of the base model of all but hidden matrices, which are
        embedding, readout and vectors; None for `learning_rate`. Without `shapes` every matrix is
        hidden.
      b1: decay of the momentum.
      b2: decay of the second moment.
      eps: ε of the base model, in units of the gradient.

    Returns:
      An optimizer whose updates go to `optax.apply_updates`.

    Example:
      >>> params = {"w": jnp.ones((6, 4)), "b": jnp.zeros(4)}
      >>> optimizer = mup_jax.adamw(1e-3, weight_decay=0.1)
      >>> updates, state = optimizer.update(params, optimizer.init(params), params)
      >>> params = optax.apply_updates(params, updates)

    References:
      Loshchilov and Hutter, `AdamW <https://arxiv.org/abs/1711.05101>`_, 2017.
    """
    of = Assembly(
        learning_rate,
        schedule,
        weight_decay,
        independent_weight_decay,
        shapes,
        embedding_readout_learning_rate,
    )
    return of.whole(of.adam(b1, b2, eps))


def adopt(
    learning_rate: Rate,
    *,
    schedule: optax.Schedule | None = None,
    weight_decay: Scalar = 0.0,
    independent_weight_decay: Scalar = 0.0,
    shapes: PyTree | Transfer | None = None,
    embedding_readout_learning_rate: Rate | None = None,
    b1: float = 0.9,
    b2: float = 0.9999,
    eps: float = 1e-6,
) -> optax.GradientTransformationExtraArgs:
    """ADOPT, with clipping: `optax.contrib.scale_by_adopt`. The first step updates nothing.

    Args:
      learning_rate, schedule, weight_decay, independent_weight_decay, shapes,
        embedding_readout_learning_rate: as in `adamw`.
      b1: decay of the momentum.
      b2: decay of the second moment.
      eps: least root of the second moment in the base model, in units of the gradient.

    Returns:
      An optimizer whose updates go to `optax.apply_updates`.

    Example:
      >>> params = {"w": jnp.ones((6, 4)), "b": jnp.zeros(4)}
      >>> optimizer = mup_jax.adopt(1e-3)
      >>> updates, state = optimizer.update(params, optimizer.init(params), params)
      >>> params = optax.apply_updates(params, updates)

    References:
      Taniguchi et al., `ADOPT <https://arxiv.org/abs/2411.02853>`_, 2024.
    """
    check_decays(b1=b1, b2=b2)
    check_not_negative(eps=eps)
    direction = optax.contrib.scale_by_adopt(b1, b2, eps)
    of = Assembly(
        learning_rate,
        schedule,
        weight_decay,
        independent_weight_decay,
        shapes,
        embedding_readout_learning_rate,
    )
    return of.whole(of.scaled(direction, rules.adopt()))


def lamb(
    learning_rate: Rate,
    *,
    schedule: optax.Schedule | None = None,
    weight_decay: Scalar = 0.0,
    independent_weight_decay: Scalar = 0.0,
    shapes: PyTree | Transfer | None = None,
    embedding_readout_learning_rate: Rate | None = None,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-6,
    variant: MeasuredOrGupta = "measured",
    weight_dimension_numbers: WeightDimensionNumbers = None,
) -> optax.GradientTransformationExtraArgs:
    """LAMB: Adam's direction r times the trust ratio ‖W‖/‖r‖ of each matrix.

    Weight decay stays out of the trust ratio, in which `optax.lamb` has it. As there, the ratio is
    1 where W or r is zero.

    Args:
      learning_rate, schedule, weight_decay, independent_weight_decay, shapes,
        embedding_readout_learning_rate: as in `adamw`.
      b1: decay of the momentum.
      b2: decay of the second moment.
      eps: ε of the base model, in units of the gradient.
      variant: of `rules.lamb`.
      weight_dimension_numbers: as in `scale_by_muon`: each matrix of a stack has its own ratio.

    Returns:
      An optimizer whose updates go to `optax.apply_updates`.

    Example:
      >>> params = {"w": jnp.ones((6, 4)), "b": jnp.zeros(4)}
      >>> optimizer = mup_jax.lamb(1e-2)
      >>> updates, state = optimizer.update(params, optimizer.init(params), params)
      >>> params = optax.apply_updates(params, updates)

    References:
      You et al., `LAMB <https://arxiv.org/abs/1904.00962>`_, 2019.
    """
    check_decays(b1=b1, b2=b2)
    check_not_negative(eps=eps)
    direction = optax.chain(
        optax.scale_by_adam(b1, b2, eps), _scale_by_trust_ratio(weight_dimension_numbers)
    )
    of = Assembly(
        learning_rate,
        schedule,
        weight_decay,
        independent_weight_decay,
        shapes,
        embedding_readout_learning_rate,
    )
    return of.whole(of.scaled(direction, rules.lamb(variant=variant)))


def lion(
    learning_rate: Rate,
    *,
    schedule: optax.Schedule | None = None,
    weight_decay: Scalar = 0.0,
    independent_weight_decay: Scalar = 0.0,
    shapes: PyTree | Transfer | None = None,
    embedding_readout_learning_rate: Rate | None = None,
    b1: float = 0.9,
    b2: float = 0.99,
) -> optax.GradientTransformationExtraArgs:
    """Lion: the sign of the momentum.

    Args:
      learning_rate, schedule, weight_decay, independent_weight_decay, shapes,
        embedding_readout_learning_rate: as in `adamw`.
      b1: weight of the momentum against the gradient in the sign.
      b2: decay of the momentum.

    Returns:
      An optimizer whose updates go to `optax.apply_updates`.

    Example:
      >>> params = {"w": jnp.ones((6, 4)), "b": jnp.zeros(4)}
      >>> optimizer = mup_jax.lion(1e-4)
      >>> updates, state = optimizer.update(params, optimizer.init(params), params)
      >>> params = optax.apply_updates(params, updates)

    References:
      Chen et al., `Lion <https://arxiv.org/abs/2302.06675>`_, 2023.
    """
    check_decays(b1=b1, b2=b2)
    of = Assembly(
        learning_rate,
        schedule,
        weight_decay,
        independent_weight_decay,
        shapes,
        embedding_readout_learning_rate,
    )
    return of.whole(of.scaled(optax.scale_by_lion(b1, b2), rules.lion()))


def sophia(
    learning_rate: Rate,
    *,
    schedule: optax.Schedule | None = None,
    weight_decay: Scalar = 0.0,
    independent_weight_decay: Scalar = 0.0,
    shapes: PyTree | Transfer | None = None,
    embedding_readout_learning_rate: Rate | None = None,
    b1: float = 0.96,
    b2: float = 0.99,
    gamma: float | None = None,
    eps: float = 1e-12,
    update_interval: int = 10,
    curvature: Curvature = "hutchinson",
    seed: int = 0,
) -> optax.GradientTransformationExtraArgs:
    """Sophia: momentum over a diagonal of curvature, clipped to ±1.

    With `shapes` γ grows as L·d_out, the size of momentum over curvature, so that the same fraction
    of entries is clipped at every size.

    Args:
      learning_rate, schedule, weight_decay, independent_weight_decay, shapes,
        embedding_readout_learning_rate: as in `adamw`.
      b1: decay of the momentum.
      b2: decay of the curvature, once in `update_interval` steps.
      gamma: γ of the base model, which scales where ε does; None for the paper's, 0.01 for
        "hutchinson" and 0.05 for "gnb".
      eps: least γ·curvature in the base model, in units of the gradient.
      update_interval: in steps, of the estimates of the curvature.
      curvature: "hutchinson" (Sophia-H, `optax.contrib.sophia`), for which `update` needs
        the loss as a function of the parameters, `obj_fn=`; or "gnb" (Sophia-G,
        `mup_jax.scale_by_sophia_g`), for which it needs the logits, `logits_fn=`.
      seed: of the estimates.

    Returns:
      An optimizer whose updates go to `optax.apply_updates`.

    Raises:
      ValueError: an unknown curvature; at `update`, the function of the parameters is missing.

    Example:
      >>> params = {"w": jnp.ones((6, 4))}
      >>> loss = lambda params: jnp.sum(jnp.square(params["w"]))
      >>> optimizer = mup_jax.sophia(1e-3)
      >>> state, gradient = optimizer.init(params), jax.grad(loss)(params)
      >>> updates, state = optimizer.update(gradient, state, params, obj_fn=loss)

    References:
      Liu et al., `Sophia <https://arxiv.org/abs/2305.14342>`_, 2023.
    """
    if curvature not in get_args(Curvature):
        raise ValueError(f"curvature={curvature!r}: choose 'hutchinson' or 'gnb'")
    gamma = _SOPHIA_GAMMA[curvature] if gamma is None else gamma
    if curvature == "gnb":
        direction = scale_by_sophia_g(
            b1, b2, gamma, eps, update_interval=update_interval, seed=seed
        )
    else:
        check_decays(b1=b1, b2=b2)
        check_positive(gamma=gamma, eps=eps, update_interval=update_interval)
        estimator = optax.contrib.hutchinson_estimator_diag_hessian(jax.random.PRNGKey(seed))
        whole = optax.contrib.sophia(
            1.0,
            b1,
            b2,
            eps,
            weight_decay=0.0,
            gamma=gamma,
            update_interval=update_interval,
            hessian_diagonal_fn=estimator,
        )
        # Optax puts the key itself into every first state, and with one that is donated it is gone.
        init = lambda params: jax.tree.map(jnp.copy, whole.init(params))
        # Optax offers its direction with a learning rate and a sign only.
        direction = optax.chain(whole._replace(init=init), optax.scale(-1.0))
    of = Assembly(
        learning_rate,
        schedule,
        weight_decay,
        independent_weight_decay,
        shapes,
        embedding_readout_learning_rate,
    )
    transfer = of.transfer
    if transfer.shapes is not None and transfer.scale_epsilon:
        direction = _with_functions_in_units_of_gradients(
            direction, rules.sophia(), transfer.shapes
        )
    return of.whole(of.scaled(direction, rules.sophia()))


def _scale_by_trust_ratio(numbers: WeightDimensionNumbers) -> optax.GradientTransformation:
    """`optax.scale_by_trust_ratio` for every matrix of a stack on its own."""
    trust_ratio = optax.scale_by_trust_ratio()

    def at_leaf(numbers: Any, update: jax.Array, param: jax.Array) -> jax.Array:
        scale = lambda u, w: trust_ratio.update(u, optax.EmptyState(), w)[0]
        if update.ndim > 1:
            for axis in matrix_layout(update.shape, numbers).stack_axes:
                scale = jax.vmap(scale, axis, axis)
        return scale(update, param)

    def update(updates: optax.Updates, params: Any) -> optax.Updates:
        if params is None:
            raise ValueError("trust ratios need the parameters: update(updates, state, params)")
        leaves, treedef = jax.tree.flatten(updates)
        resolved = dimension_numbers(numbers, updates)
        return jax.tree.unflatten(treedef, map(at_leaf, resolved, leaves, jax.tree.leaves(params)))

    return optax.stateless(update)


def _with_functions_in_units_of_gradients(
    direction: optax.GradientTransformation, rule: Rule, shapes: PyTree
) -> optax.GradientTransformationExtraArgs:
    """`direction` with functions of the parameters scaled as `mup` scales gradients, by c.

    p + c·(q - p) in place of q gives a function c times the gradient at q = p, and c² times the
    curvature.
    """

    def update(
        updates: optax.Updates, state: Any, params: Any = None, **extra_args: Any
    ) -> tuple[optax.Updates, Any]:
        def at_leaf(shape: Any, p: jax.Array, q: jax.Array) -> jax.Array:
            return p + rule.gradient_scale(shape) * (q - p)

        def rescaled(function: Any) -> Any:
            return lambda q: function(map_shapes(at_leaf, shapes, params, q))

        for name in ("obj_fn", "logits_fn"):
            if extra_args.get(name) is not None:
                extra_args[name] = rescaled(extra_args[name])
        return direction.update(updates, state, params, **extra_args)

    return optax.GradientTransformationExtraArgs(direction.init, update)
