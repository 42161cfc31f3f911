"""Optimizers with a preconditioned direction for hidden matrices, and Adam for the others."""

from typing import Any

import optax

from mup_jax.optimizers.assembly import Scalar, adam, assemble, route, scaled
from mup_jax.transfer import rules
from mup_jax.transforms.adamuon import scale_by_adamuon
from mup_jax.transforms.blocking import Sides
from mup_jax.transforms.grafting import graft
from mup_jax.transforms.linalg import Orthogonalizer
from mup_jax.transforms.matrices import PyTree, WeightDimensionNumbers
from mup_jax.transforms.muon import scale_by_muon
from mup_jax.transforms.shampoo import scale_by_shampoo
from mup_jax.transforms.soap import scale_by_soap
from mup_jax.transforms.spectral_norm import normalize_rms, normalize_spectral_norm


def adamuon(
    learning_rate: Scalar,
    *,
    schedule: optax.Schedule | None = None,
    weight_decay: Scalar = 0.0,
    shapes: PyTree | None = None,
    b1: float = 0.95,
    b2: float = 0.95,
    eps: float = 1e-8,
    nesterov: bool = True,
    muon_eps: float = 1e-8,
    orthogonalizer: Orthogonalizer = "tuned",
    steps: int | None = None,
    spectral_norm: bool = False,
    adam_learning_rate: Scalar | None = None,
    adam_b1: float = 0.8,
    adam_b2: float = 0.98,
    adam_eps: float = 1e-8,
    weight_dimension_numbers: WeightDimensionNumbers = None,
) -> optax.GradientTransformationExtraArgs:
    """AdaMuon on hidden matrices, Adam on embedding, readout and vectors.

    Args:
      learning_rate, schedule, weight_decay, shapes: as in `adamw`.
      b1, b2, eps, nesterov, muon_eps, orthogonalizer, steps, weight_dimension_numbers: as in
        `scale_by_adamuon`.
      spectral_norm: as in `muon`.
      adam_learning_rate, adam_b1, adam_b2, adam_eps: as in `muon`.

    Returns:
      An optimizer whose updates go to `optax.apply_updates`.

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
        steps=steps,
        weight_dimension_numbers=weight_dimension_numbers,
    )
    normalize = _spectral(spectral_norm, weight_dimension_numbers)
    hidden = scaled(direction, rules.adamuon(), shapes, learning_rate, normalize)
    rate = learning_rate if adam_learning_rate is None else adam_learning_rate
    other = adam(adam_b1, adam_b2, adam_eps, shapes, rate)
    return assemble(route(shapes, other, hidden=hidden), schedule, weight_decay, shapes)


def muon(
    learning_rate: Scalar,
    *,
    schedule: optax.Schedule | None = None,
    weight_decay: Scalar = 0.0,
    shapes: PyTree | None = None,
    beta: float = 0.95,
    nesterov: bool = True,
    eps: float = 1e-8,
    orthogonalizer: Orthogonalizer = "tuned",
    steps: int | None = None,
    spectral_norm: bool = False,
    adam_learning_rate: Scalar | None = None,
    adam_b1: float = 0.8,
    adam_b2: float = 0.98,
    adam_eps: float = 1e-8,
    weight_dimension_numbers: WeightDimensionNumbers = None,
) -> optax.GradientTransformationExtraArgs:
    """Muon on hidden matrices, Adam on embedding, readout and vectors ("Muon-Adam" of Qiu et al.).

    Args:
      learning_rate, schedule, weight_decay, shapes: as in `adamw`.
      beta, nesterov, eps, orthogonalizer, steps, weight_dimension_numbers: as in `scale_by_muon`.
      spectral_norm: whether to follow the direction by `normalize_spectral_norm`; η of what is
        normalized is the same at every size.
      adam_learning_rate: η of Adam in the base model; None for `learning_rate`.
      adam_b1: decay of Adam's momentum.
      adam_b2: decay of Adam's second moment.
      adam_eps: ε of Adam in the base model.

    Returns:
      An optimizer whose updates go to `optax.apply_updates`.

    References:
      Jordan et al., `Muon <https://kellerjordan.github.io/posts/muon/>`_, 2024; as in Qiu et al.
    """
    direction = scale_by_muon(
        beta,
        nesterov=nesterov,
        eps=eps,
        orthogonalizer=orthogonalizer,
        steps=steps,
        weight_dimension_numbers=weight_dimension_numbers,
    )
    normalize = _spectral(spectral_norm, weight_dimension_numbers)
    hidden = scaled(direction, rules.muon(), shapes, learning_rate, normalize)
    rate = learning_rate if adam_learning_rate is None else adam_learning_rate
    other = adam(adam_b1, adam_b2, adam_eps, shapes, rate)
    return assemble(route(shapes, other, hidden=hidden), schedule, weight_decay, shapes)


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
    spectral_norm: bool = False,
    adam_learning_rate: Scalar | None = None,
    adam_eps: float = 1e-8,
    weight_dimension_numbers: WeightDimensionNumbers = None,
) -> optax.GradientTransformationExtraArgs:
    """Shampoo² with blocks, grafted to Adam, on hidden matrices; Adam on the others.

    Args:
      learning_rate, schedule, weight_decay, shapes: as in `adamw`.
      b1, b2: as in `scale_by_shampoo`; of Adam too.
      eps, exponent, block_size, max_preconditioner_dim, precondition_frequency, stagger,
        weight_dimension_numbers: as in `scale_by_shampoo`.
      spectral_norm: as in `muon`; it leaves nothing of the grafting.
      adam_learning_rate: η of embedding, readout and vectors in the base model; None for
        `learning_rate`.
      adam_eps: ε of Adam in the base model, also of the Adam that sets the size of Shampoo's
        updates.

    Returns:
      An optimizer whose updates go to `optax.apply_updates`.

    References:
      Gupta et al., `Shampoo <https://arxiv.org/abs/1802.09568>`_, 2018; Shi et al., `Distributed
      Shampoo <https://arxiv.org/abs/2309.06497>`_, 2023; as in Qiu et al.
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
    normalize = _spectral(spectral_norm, weight_dimension_numbers)
    hidden = scaled(direction, rules.grafted(rules.adam()), shapes, learning_rate, normalize)
    rate = learning_rate if adam_learning_rate is None else adam_learning_rate
    other = adam(b1, b2, adam_eps, shapes, rate)
    return assemble(route(shapes, other, hidden=hidden), schedule, weight_decay, shapes)


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
    spectral_norm: bool = False,
    adam_learning_rate: Scalar | None = None,
    weight_dimension_numbers: WeightDimensionNumbers = None,
) -> optax.GradientTransformationExtraArgs:
    """SOAP with blocks on matrices, on the width side alone of embedding and readout.

    Args:
      learning_rate, schedule, weight_decay, shapes: as in `adamw`.
      b1, b2, eps: as in `scale_by_soap`; of Adam too. ε is that of the base model.
      block_size, max_preconditioner_dim, precondition_frequency, exact_steps, stagger,
        weight_dimension_numbers: as in `scale_by_soap`.
      spectral_norm: as in `muon`; on embeddings it is `normalize_rms`.
      adam_learning_rate: η of Adam in the base model, which then takes embedding and readout; None
        leaves them to SOAP. Vectors have Adam either way, at this rate or at `learning_rate`.

    Returns:
      An optimizer whose updates go to `optax.apply_updates`.

    References:
      Vyas et al., `SOAP <https://arxiv.org/abs/2409.11321>`_, 2024; as in Qiu et al.
    """
    blocks: dict[str, Any] = {
        "block_size": block_size,
        "max_preconditioner_dim": max_preconditioner_dim,
    }
    spectral = _spectral(spectral_norm, weight_dimension_numbers)
    rms = normalize_rms(weight_dimension_numbers=weight_dimension_numbers)

    def on(
        sides: Sides, normalize: optax.GradientTransformation | None
    ) -> optax.GradientTransformation:
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
        rule = rules.soap(**blocks, sides=sides)
        return scaled(direction, rule, shapes, learning_rate, normalize)

    rate = learning_rate if adam_learning_rate is None else adam_learning_rate
    other = adam(b1, b2, eps, shapes, rate)
    by_role = {"hidden": on("both", spectral)}
    if adam_learning_rate is None:
        by_role["embedding"] = on("out", rms if spectral_norm else None)
        by_role["readout"] = on("in", spectral)
    return assemble(route(shapes, other, **by_role), schedule, weight_decay, shapes)


def _spectral(wanted: bool, numbers: WeightDimensionNumbers) -> optax.GradientTransformation | None:
    return normalize_spectral_norm(weight_dimension_numbers=numbers) if wanted else None
