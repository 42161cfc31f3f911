"""Optax transformations for matrices. They know nothing of models or of µP."""

from mup_jax.transforms.adamuon import ScaleByAdaMuonState, scale_by_adamuon
from mup_jax.transforms.grafting import GraftState, graft
from mup_jax.transforms.hyperball import HyperballState, hyperball
from mup_jax.transforms.muon import ScaleByMuonState, scale_by_muon
from mup_jax.transforms.shampoo import ScaleByShampooState, scale_by_shampoo
from mup_jax.transforms.soap import ScaleBySoapState, scale_by_soap
from mup_jax.transforms.sophia import ScaleBySophiaGState, scale_by_sophia_g
from mup_jax.transforms.spectral_norm import (
    NormalizeRmsState,
    NormalizeSpectralNormState,
    normalize_rms,
    normalize_spectral_norm,
)

__all__ = [
    "GraftState",
    "HyperballState",
    "NormalizeRmsState",
    "NormalizeSpectralNormState",
    "ScaleByAdaMuonState",
    "ScaleByMuonState",
    "ScaleByShampooState",
    "ScaleBySoapState",
    "ScaleBySophiaGState",
    "graft",
    "hyperball",
    "normalize_rms",
    "normalize_spectral_norm",
    "scale_by_adamuon",
    "scale_by_muon",
    "scale_by_shampoo",
    "scale_by_soap",
    "scale_by_sophia_g",
]
