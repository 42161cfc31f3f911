"""Hyperparameter transfer. Knows shapes and any transformation, no model."""

from mup_jax.transfer import rules
from mup_jax.transfer.coord_check import CoordinateCheck, coord_check
from mup_jax.transfer.derive import DerivedRule, derive_rule
from mup_jax.transfer.mup import MupState, add_independent_weight_decay, mup
from mup_jax.transfer.rules import PowerLaw, Rule
from mup_jax.transfer.shapes import ParamShape, infer_shapes
from mup_jax.transfer.tables import describe

__all__ = [
    "CoordinateCheck",
    "DerivedRule",
    "MupState",
    "ParamShape",
    "PowerLaw",
    "Rule",
    "add_independent_weight_decay",
    "coord_check",
    "derive_rule",
    "describe",
    "infer_shapes",
    "mup",
    "rules",
]
