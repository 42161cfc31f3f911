"""Optax transformations for matrices. They know nothing of models or of µP."""

from mup_jax.transforms.grafting import GraftState, graft
from mup_jax.transforms.muon import ScaleByMuonState, scale_by_muon
from mup_jax.transforms.shampoo import ScaleByShampooState, scale_by_shampoo
from mup_jax.transforms.soap import ScaleBySoapState, scale_by_soap

__all__ = [
    "GraftState",
    "ScaleByMuonState",
    "ScaleByShampooState",
    "ScaleBySoapState",
    "graft",
    "scale_by_muon",
    "scale_by_shampoo",
    "scale_by_soap",
]
