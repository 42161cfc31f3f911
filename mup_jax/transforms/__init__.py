"""Optax transformations for matrices. They know nothing of models or of µP."""

from mup_jax.transforms.adamuon import AdaMuonState, scale_by_adamuon
from mup_jax.transforms.by_parameter import state_by_parameter, state_from_parameters
from mup_jax.transforms.engine import Blocks, ScaleByBlocksState, scale_by_blocks
from mup_jax.transforms.grafting import GraftState, graft
from mup_jax.transforms.hyperball import HyperballState, hyperball
from mup_jax.transforms.kl_shampoo import (
    KLShampooState,
    KLSoapState,
    scale_by_kl_shampoo,
    scale_by_kl_soap,
)
from mup_jax.transforms.muon import MuonState, scale_by_muon
from mup_jax.transforms.normuon import NorMuonState, scale_by_normuon
from mup_jax.transforms.orthogonalize_updates import orthogonalize_updates
from mup_jax.transforms.rule import Block, BlockRule
from mup_jax.transforms.shampoo import ShampooState, scale_by_shampoo
from mup_jax.transforms.soap import SoapState, scale_by_soap
from mup_jax.transforms.sophia import ScaleBySophiaGState, scale_by_sophia_g
from mup_jax.transforms.spectral_norm import (
    NormalizeRmsState,
    NormalizeSpectralNormState,
    normalize_rms,
    normalize_spectral_norm,
)

__all__ = [
    "AdaMuonState",
    "Block",
    "BlockRule",
    "Blocks",
    "GraftState",
    "HyperballState",
    "KLShampooState",
    "KLSoapState",
    "MuonState",
    "NorMuonState",
    "NormalizeRmsState",
    "NormalizeSpectralNormState",
    "ScaleByBlocksState",
    "ScaleBySophiaGState",
    "ShampooState",
    "SoapState",
    "graft",
    "hyperball",
    "normalize_rms",
    "normalize_spectral_norm",
    "orthogonalize_updates",
    "scale_by_adamuon",
    "scale_by_blocks",
    "scale_by_kl_shampoo",
    "scale_by_kl_soap",
    "scale_by_muon",
    "scale_by_normuon",
    "scale_by_shampoo",
    "scale_by_soap",
    "scale_by_sophia_g",
    "state_by_parameter",
    "state_from_parameters",
]
