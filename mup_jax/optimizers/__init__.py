"""Ready-made optimizers: a transformation, its µP rule and independent weight decay.

All of them update W <- W - s(t)·(η·u + λ·W), where s(t) is the schedule, η the learning rate and
λ the weight decay of the base model: η is scaled for every parameter by the rules of
`mup_jax.rules`, and λ as `weight_decay_scaling` says. Those of `matrix` route parameters by role:
the preconditioned direction takes hidden matrices, and what takes embedding, readout and vectors
stands in each docstring. Without `shapes` nothing is scaled, and every leaf of two or more axes
counts as a hidden matrix. Those of `elementwise` take every parameter.
"""

from collections.abc import Callable

import optax

from mup_jax.optimizers.elementwise import adamw, adopt, lamb, lion, sophia
from mup_jax.optimizers.matrix import adamuon, matrix_optimizer, muon, shampoo, soap

OPTIMIZERS: dict[str, Callable[..., optax.GradientTransformationExtraArgs]] = {
    "adamw": adamw,
    "muon": muon,
    "shampoo": shampoo,
    "soap": soap,
    "adamuon": adamuon,
    "adopt": adopt,
    "lamb": lamb,
    "lion": lion,
    "sophia": sophia,
}

__all__ = ["OPTIMIZERS", "matrix_optimizer", *OPTIMIZERS]
