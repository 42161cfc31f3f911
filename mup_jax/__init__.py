"""Matrix optimizers for Optax, and hyperparameter transfer for any Optax transformation.

This package needs jax and optax only; the trainer (`mup_jax.training`, `mup_jax.models`,
`mup_jax.data`) is imported on its own and needs the `train` extra.
"""

from mup_jax import testing
from mup_jax.optimizers import (
    adamuon,
    adamw,
    adopt,
    lamb,
    lion,
    matrix_optimizer,
    muon,
    shampoo,
    soap,
    sophia,
)
from mup_jax.transfer import (
    CoordinateCheck,
    DerivedRule,
    ParamShape,
    PowerLaw,
    Rule,
    add_independent_weight_decay,
    coord_check,
    derive_rule,
    describe,
    infer_shapes,
    mup,
    rules,
)
from mup_jax.transforms import (
    Block,
    BlockRule,
    graft,
    hyperball,
    normalize_rms,
    normalize_spectral_norm,
    scale_by_adamuon,
    scale_by_blocks,
    scale_by_muon,
    scale_by_shampoo,
    scale_by_soap,
    scale_by_sophia_g,
)

__version__ = "0.2.0"

__all__ = [
    "Block",
    "BlockRule",
    "CoordinateCheck",
    "DerivedRule",
    "ParamShape",
    "PowerLaw",
    "Rule",
    "adamuon",
    "adamw",
    "add_independent_weight_decay",
    "adopt",
    "coord_check",
    "derive_rule",
    "describe",
    "graft",
    "hyperball",
    "infer_shapes",
    "lamb",
    "lion",
    "matrix_optimizer",
    "muon",
    "mup",
    "normalize_rms",
    "normalize_spectral_norm",
    "rules",
    "scale_by_adamuon",
    "scale_by_blocks",
    "scale_by_muon",
    "scale_by_shampoo",
    "scale_by_soap",
    "scale_by_sophia_g",
    "shampoo",
    "soap",
    "sophia",
    "testing",
]
