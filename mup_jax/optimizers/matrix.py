"""Optimizers with a preconditioned direction for matrices, and Adam for the other parameters."""

import warnings
from typing import Any

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
from mup_jax.transfer.derive import DerivedRule, derive_rule
from mup_jax.transfer.rules import PowerLaw, QiuOrRmsMatching, Rule
from mup_jax.transforms.adamuon import scale_by_adamuon
from mup_jax.transforms.blocking import Sides
from mup_jax.transforms.grafting import graft
from mup_jax.transforms.linalg import Orthogonalizer
from mup_jax.transforms.matrices import PyTree, WeightDimensionNumbers
from mup_jax.transforms.muon import ShapeFactor, scale_by_muon
from mup_jax.transforms.shampoo import scale_by_shampoo
from mup_jax.transforms.soap import scale_by_soap
from mup_jax.transforms.spectral_norm import normalize_rms, normalize_spectral_norm

# Of a direction without a rule, which takes 1 s where it is elementwise and 10 s with eigenbases.
_MEASURED_WIDTHS = (64, 128, 256)
# Of the base model, where all factors are 1.
_UNSCALED = Rule("unscaled", PowerLaw(), epsilon_degree=0)


def matrix_optimizer(
    learning_rate: Rate,
    direction: optax.GradientTransformation,
    rule: Rule | None = None,
    *,
    schedule: optax.Schedule | None = None,
    weight_decay: Scalar = 0.0,
    independent_weight_decay: Scalar = 0.0,
    shapes: PyTree | Transfer | None = None,
    embedding_readout_learning_rate: Rate | None = None,
    hidden_only: bool = True,
    spectral_norm: bool = False,
    adam_b1: float = 0.8,
    adam_b2: float = 0.98,
    adam_eps: float = 1e-8,
    weight_dimension_numbers: WeightDimensionNumbers = None,
) -> optax.GradientTransformationExtraArgs:
    """Any direction on hidden matrices, Adam on embedding, readout and vectors.

    It is what `muon`, `adamuon` and `shampoo` are made with:

        direction = optax.scale_by_lion()
        optimizer = mup_jax.matrix_optimizer(1e-3, direction, rules.lion(), shapes=shapes)

    Args:
      learning_rate, schedule, weight_decay, independent_weight_decay, shapes,
        embedding_readout_learning_rate: as in `adamw`.
      direction: a transformation of gradients into directions that are positive and without a
        learning rate, as any `scale_by_*`.
      rule: how η and ε of the direction scale, from `mup_jax.rules`; None to measure it with
        `measure_rule`, in seconds, where there are `shapes` to scale by.
      hidden_only, spectral_norm, adam_b1, adam_b2, adam_eps: as in `muon`.
      weight_dimension_numbers: those that `direction` was made with.

    Returns:
      An optimizer whose updates go to `optax.apply_updates`.

    Raises:
      ValueError: no rule fits what was measured.

    Example:
      >>> params = {"w": jnp.ones((6, 4)), "b": jnp.zeros(4)}
      >>> optimizer = mup_jax.matrix_optimizer(
      ...     0.1, mup_jax.scale_by_normuon(), mup_jax.rules.normuon(), hidden_only=False
      ... )
      >>> updates, state = optimizer.update(params, optimizer.init(params), params)
      >>> params = optax.apply_updates(params, updates)
    """
    if hidden_only and shapes is None:
        warnings.warn(
            "without shapes= nothing tells embedding, readout and stacked vectors from hidden "
            "matrices, so that every leaf of two axes or more takes the direction: give "
            "shapes=mup_jax.infer_shapes(base_params, params), with roles= for the base model "
            "itself, or say hidden_only=False",
            stacklevel=3,  # whoever calls `muon`
        )
    if rule is None:
        rule = _UNSCALED if shapes is None else measure_rule(direction).rule
    of = Assembly(
        learning_rate,
        schedule,
        weight_decay,
        independent_weight_decay,
        shapes,
        embedding_readout_learning_rate,
    )
    roles = ("hidden",) if hidden_only else ("embedding", "hidden", "readout")
    by_role = {
        role: of.scaled(
            direction,
            rule,
            normalize=_normalizer(role, weight_dimension_numbers) if spectral_norm else None,
        )
        for role in roles
    }
    return of.whole(of.route(of.adam(adam_b1, adam_b2, adam_eps), **by_role))


def measure_rule(direction: optax.GradientTransformation) -> DerivedRule:
    """`derive_rule` at widths of which it takes seconds, under `jax.jit` too.

    Raises:
      ValueError: as `derive_rule`, or what it measured is no rule.
    """
    with jax.ensure_compile_time_eval():
        derived = derive_rule(direction, widths=_MEASURED_WIDTHS)
    if derived.problems:
        raise ValueError(
            f"no rule was derived: {'; '.join(derived.problems)}. Measure it with "
            "mup_jax.derive_rule, or choose one of mup_jax.rules, and give it beside the direction"
        )
    return derived


def adamuon(
    learning_rate: Rate,
    *,
    schedule: optax.Schedule | None = None,
    weight_decay: Scalar = 0.0,
    independent_weight_decay: Scalar = 0.0,
    shapes: PyTree | Transfer | None = None,
    embedding_readout_learning_rate: Rate | None = None,
    b1: float = 0.95,
    b2: float = 0.95,
    eps: float = 1e-8,
    nesterov: bool = True,
    muon_eps: float = 1e-8,
    orthogonalizer: Orthogonalizer = "tuned",
    ns_steps: int | None = None,
    hidden_only: bool = True,
    spectral_norm: bool = False,
    adam_b1: float = 0.8,
    adam_b2: float = 0.98,
    adam_eps: float = 1e-8,
    weight_dimension_numbers: WeightDimensionNumbers = None,
) -> optax.GradientTransformationExtraArgs:
    """AdaMuon on hidden matrices, Adam on embedding, readout and vectors.

    Args:
      learning_rate, schedule, weight_decay, independent_weight_decay, shapes,
        embedding_readout_learning_rate: as in `adamw`.
      b1, b2, eps, nesterov, muon_eps, orthogonalizer, ns_steps, weight_dimension_numbers: as in
        `scale_by_adamuon`. Both ε are the same at every size.
      hidden_only, spectral_norm, adam_b1, adam_b2, adam_eps: as in `muon`.

    Returns:
      An optimizer whose updates go to `optax.apply_updates`.

    Example:
      >>> params = {"w": jnp.ones((6, 4)), "b": jnp.zeros(4)}
      >>> optimizer = mup_jax.adamuon(0.02, hidden_only=False)
      >>> updates, state = optimizer.update(params, optimizer.init(params), params)
      >>> params = optax.apply_updates(params, updates)

    References:
      Si et al., `AdaMuon <https://arxiv.org/abs/2507.11005>`_, 2025; as in Qiu et al.
    """
    direction = scale_by_adamuon(
        b1,
        b2,
        eps,
        nesterov=nesterov,
        muon_eps=muon_eps,
        orthogonalizer=orthogonalizer,
        ns_steps=ns_steps,
        weight_dimension_numbers=weight_dimension_numbers,
    )
    return matrix_optimizer(
        learning_rate,
        direction,
        rules.adamuon(),
        schedule=schedule,
        weight_decay=weight_decay,
        independent_weight_decay=independent_weight_decay,
        shapes=shapes,
        embedding_readout_learning_rate=embedding_readout_learning_rate,
        hidden_only=hidden_only,
        spectral_norm=spectral_norm,
        adam_b1=adam_b1,
        adam_b2=adam_b2,
        adam_eps=adam_eps,
        weight_dimension_numbers=weight_dimension_numbers,
    )


def muon(
    learning_rate: Rate,
    *,
    schedule: optax.Schedule | None = None,
    weight_decay: Scalar = 0.0,
    independent_weight_decay: Scalar = 0.0,
    shapes: PyTree | Transfer | None = None,
    embedding_readout_learning_rate: Rate | None = None,
    beta: float = 0.95,
    nesterov: bool = True,
    eps: float = 1e-8,
    orthogonalizer: Orthogonalizer = "tuned",
    ns_steps: int | None = None,
    gram_form: bool | None = None,
    compute_dtype: jax.typing.DTypeLike = jnp.float32,
    mu_dtype: jax.typing.DTypeLike = jnp.float32,
    shape_factor: ShapeFactor = "none",
    variant: QiuOrRmsMatching = "qiu",
    hidden_only: bool = True,
    spectral_norm: bool = False,
    adam_b1: float = 0.8,
    adam_b2: float = 0.98,
    adam_eps: float = 1e-8,
    weight_dimension_numbers: WeightDimensionNumbers = None,
) -> optax.GradientTransformationExtraArgs:
    """Muon on hidden matrices, Adam on embedding, readout and vectors.

    Args:
      learning_rate, schedule, weight_decay, independent_weight_decay, shapes,
        embedding_readout_learning_rate: as in `adamw`.
      beta, nesterov, eps, orthogonalizer, ns_steps, gram_form, compute_dtype, mu_dtype,
        weight_dimension_numbers: as in `scale_by_muon`.
      shape_factor: as in `scale_by_muon`, for use without `shapes`: their rule has a factor itself.
      variant: of `rules.muon`.
      hidden_only: whether embedding and readout are left to Adam ("Muon-Adam" of Qiu et al.), for
        which it needs `shapes`; otherwise they take the direction too ("Muon"), and vectors alone
        have Adam.
      spectral_norm: whether to follow the direction by `normalize_spectral_norm`, on embeddings by
        `normalize_rms`; η of what is normalized is the same at every size.
      adam_b1: decay of Adam's momentum.
      adam_b2: decay of Adam's second moment.
      adam_eps: ε of Adam in the base model.

    Returns:
      An optimizer whose updates go to `optax.apply_updates`.

    Raises:
      ValueError: a shape factor with `shapes`; as `scale_by_muon`.

    Example:
      >>> small, large = ({"w": jnp.ones((d, d)), "out": jnp.ones((d, 10))} for d in (32, 128))
      >>> shapes = mup_jax.infer_shapes(small, large)
      >>> optimizer = mup_jax.muon(0.02, shapes=shapes, weight_decay=0.1)
      >>> updates, state = optimizer.update(large, optimizer.init(large), large)

    References:
      Jordan et al., `Muon <https://kellerjordan.github.io/posts/muon/>`_, 2024; as in Qiu et al.
    """
    if shapes is not None and shape_factor != "none":
        raise ValueError(
            f"shape_factor={shape_factor!r} with shapes=: leave it out, how the learning rate goes "
            "with the shape is said by the rule (variant='rms_matching' for that of \"rms\")"
        )
    direction = scale_by_muon(
        beta,
        nesterov=nesterov,
        eps=eps,
        orthogonalizer=orthogonalizer,
        ns_steps=ns_steps,
        gram_form=gram_form,
        compute_dtype=compute_dtype,
        mu_dtype=mu_dtype,
        shape_factor=shape_factor,
        weight_dimension_numbers=weight_dimension_numbers,
    )
    return matrix_optimizer(
        learning_rate,
        direction,
        rules.muon(variant=variant),
        schedule=schedule,
        weight_decay=weight_decay,
        independent_weight_decay=independent_weight_decay,
        shapes=shapes,
        embedding_readout_learning_rate=embedding_readout_learning_rate,
        hidden_only=hidden_only,
        spectral_norm=spectral_norm,
        adam_b1=adam_b1,
        adam_b2=adam_b2,
        adam_eps=adam_eps,
        weight_dimension_numbers=weight_dimension_numbers,
    )


def shampoo(
    learning_rate: Rate,
    *,
    schedule: optax.Schedule | None = None,
    weight_decay: Scalar = 0.0,
    independent_weight_decay: Scalar = 0.0,
    shapes: PyTree | Transfer | None = None,
    embedding_readout_learning_rate: Rate | None = None,
    b1: float = 0.9,
    b2: float = 0.98,
    eps: float = 1e-5,
    exponent: float = 0.5,
    relative_eps: bool = True,
    block_size: int | None = 512,
    max_preconditioner_dim: int = 10_000,
    precondition_frequency: int = 10,
    exact_steps: int = 20,
    stagger: bool = True,
    preconditioner_dtype: jax.typing.DTypeLike = jnp.float32,
    grafted: bool = True,
    hidden_only: bool = True,
    spectral_norm: bool = False,
    adam_eps: float = 1e-8,
    weight_dimension_numbers: WeightDimensionNumbers = None,
) -> optax.GradientTransformationExtraArgs:
    """Shampoo² with blocks, grafted to Adam, on hidden matrices; Adam on the others.

    Args:
      learning_rate, schedule, weight_decay, independent_weight_decay, shapes,
        embedding_readout_learning_rate: as in `adamw`.
      b1, b2: as in `scale_by_shampoo`; of Adam too.
      eps, exponent, relative_eps, block_size, max_preconditioner_dim, precondition_frequency,
        exact_steps, stagger, preconditioner_dtype, weight_dimension_numbers: as in
        `scale_by_shampoo`. An absolute ε is that of the base model, and needs `grafted=False`: the
        rule of grafting is about Adam's ε.
      grafted: whether Adam sets the size of the updates, matrix by matrix; otherwise they are
        those of Shampoo, whose η is of another order of magnitude.
      hidden_only: as in `muon`.
      spectral_norm: as in `muon`; it leaves nothing of the grafting.
      adam_eps: ε of Adam in the base model, where it sets the size of Shampoo's updates too.

    Returns:
      An optimizer whose updates go to `optax.apply_updates`.

    Raises:
      ValueError: relative_eps=False with grafting.

    Example:
      >>> params = {"w": jnp.ones((6, 4)), "b": jnp.zeros(4)}
      >>> optimizer = mup_jax.shampoo(1e-3, block_size=256, hidden_only=False)
      >>> updates, state = optimizer.update(params, optimizer.init(params), params)
      >>> params = optax.apply_updates(params, updates)

    References:
      Gupta et al., `Shampoo <https://arxiv.org/abs/1802.09568>`_, 2018; Shi et al., `Distributed
      Shampoo <https://arxiv.org/abs/2309.06497>`_, 2023; as in Qiu et al.
    """
    if grafted and not relative_eps:
        raise ValueError("relative_eps=False needs grafted=False: grafting scales Adam's ε only")
    blocks: dict[str, Any] = {
        "exponent": exponent,
        "relative_eps": relative_eps,
        "block_size": block_size,
        "max_preconditioner_dim": max_preconditioner_dim,
    }
    direction = scale_by_shampoo(
        b1,
        b2,
        eps,
        **blocks,
        precondition_frequency=precondition_frequency,
        exact_steps=exact_steps,
        stagger=stagger,
        preconditioner_dtype=preconditioner_dtype,
        weight_dimension_numbers=weight_dimension_numbers,
    )
    rule = rules.shampoo(**blocks)
    if grafted:
        magnitude = optax.scale_by_adam(b1, b2, adam_eps)
        direction = graft(magnitude, direction, weight_dimension_numbers=weight_dimension_numbers)
        rule = rules.grafted(rules.adam())
    return matrix_optimizer(
        learning_rate,
        direction,
        rule,
        schedule=schedule,
        weight_decay=weight_decay,
        independent_weight_decay=independent_weight_decay,
        shapes=shapes,
        embedding_readout_learning_rate=embedding_readout_learning_rate,
        hidden_only=hidden_only,
        spectral_norm=spectral_norm,
        adam_b1=b1,
        adam_b2=b2,
        adam_eps=adam_eps,
        weight_dimension_numbers=weight_dimension_numbers,
    )


def soap(
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
    block_size: int | None = 512,
    max_preconditioner_dim: int = 10_000,
    precondition_frequency: int = 10,
    exact_steps: int = 20,
    stagger: bool = True,
    preconditioner_dtype: jax.typing.DTypeLike = jnp.float32,
    hidden_only: bool = False,
    spectral_norm: bool = False,
    weight_dimension_numbers: WeightDimensionNumbers = None,
) -> optax.GradientTransformationExtraArgs:
    """SOAP with blocks on matrices, on the width side alone of embedding and readout.

    Args:
      learning_rate, schedule, weight_decay, independent_weight_decay, shapes,
        embedding_readout_learning_rate: as in `adamw`.
      b1, b2, eps: as in `scale_by_soap`; of Adam too. ε is that of the base model.
      block_size, max_preconditioner_dim, precondition_frequency, exact_steps, stagger,
        preconditioner_dtype, weight_dimension_numbers: as in `scale_by_soap`.
      hidden_only: whether embedding and readout are left to Adam.
      spectral_norm: as in `muon`.

    Returns:
      An optimizer whose updates go to `optax.apply_updates`.

    Example:
      >>> params = {"w": jnp.ones((6, 4)), "b": jnp.zeros(4)}
      >>> optimizer = mup_jax.soap(1e-3, block_size=256)
      >>> updates, state = optimizer.update(params, optimizer.init(params), params)
      >>> params = optax.apply_updates(params, updates)

    References:
      Vyas et al., `SOAP <https://arxiv.org/abs/2409.11321>`_, 2024; as in Qiu et al.
    """
    blocks: dict[str, Any] = {
        "block_size": block_size,
        "max_preconditioner_dim": max_preconditioner_dim,
    }
    of = Assembly(
        learning_rate,
        schedule,
        weight_decay,
        independent_weight_decay,
        shapes,
        embedding_readout_learning_rate,
    )

    def on(role: str, sides: Sides) -> optax.GradientTransformation:
        direction = scale_by_soap(
            b1,
            b2,
            eps,
            **blocks,
            precondition_frequency=precondition_frequency,
            exact_steps=exact_steps,
            stagger=stagger,
            preconditioner_dtype=preconditioner_dtype,
            sides=sides,
            weight_dimension_numbers=weight_dimension_numbers,
        )
        normalize = _normalizer(role, weight_dimension_numbers) if spectral_norm else None
        return of.scaled(direction, rules.soap(**blocks, sides=sides), normalize=normalize)

    by_role = {"hidden": on("hidden", "both")}
    if not hidden_only:
        by_role |= {"embedding": on("embedding", "out"), "readout": on("readout", "in")}
    return of.whole(of.route(of.adam(b1, b2, eps), **by_role))


def _normalizer(role: str, numbers: WeightDimensionNumbers) -> optax.GradientTransformation:
    normalize = normalize_rms if role == "embedding" else normalize_spectral_norm
    return normalize(weight_dimension_numbers=numbers)
