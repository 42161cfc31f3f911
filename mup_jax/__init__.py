"""Matrix optimizers for Optax, and hyperparameter transfer for any Optax transformation.

This package needs jax and optax only; the trainer (`mup_jax.training`, `mup_jax.models`,
`mup_jax.data`) is imported on its own and needs the `train` extra.
"""

from mup_jax.optimizers import adamw, muon, shampoo, soap
from mup_jax.transfer import (
    ParamShape,
    PowerLaw,
    Rule,
    add_independent_weight_decay,
    infer_shapes,
    mup,
    rules,
)
from mup_jax.transforms import graft, scale_by_muon, scale_by_shampoo, scale_by_soap

__all__ = [
    "ParamShape",
    "PowerLaw",
    "Rule",
    "adamw",
    "add_independent_weight_decay",
    "graft",
    "infer_shapes",
    "muon",
    "mup",
    "rules",
    "scale_by_muon",
    "scale_by_shampoo",
    "scale_by_soap",
    "shampoo",
    "soap",
]
