"""Textbook optimizers in numpy float64, to test the library against.

Each class takes one 2-D gradient `G` of shape (d_in, d_out) a step and returns the direction `u` of
the same shape: positive, without learning rate, momentum and bias corrections included. They share
no code with `mup_jax`, work on one matrix at a time, loop over blocks in Python, and prefer the
obvious formula to the fast or the robust one. All-zero gradients are outside their domain.

Papers write a weight as (d_out, d_in): their left factor L is our "out" factor, an average of GᵀG,
and their right factor R is our "in" factor, an average of G Gᵀ.
"""

from .adam import Adam
from .adamuon import AdaMuon
from .blocks import early, every
from .graft import Graft
from .hyperball import Hyperball
from .kl import KLFactors, KLShampoo, KLSoap
from .muon import JORDAN, Muon
from .normuon import NorMuon
from .shampoo import Shampoo
from .soap import Soap
from .sophia import SophiaG, bartlett_estimate, gauss_newton_diagonal
from .spectral_norm import SpectralNorm

__all__ = [
    "JORDAN",
    "AdaMuon",
    "Adam",
    "Graft",
    "Hyperball",
    "KLFactors",
    "KLShampoo",
    "KLSoap",
    "Muon",
    "NorMuon",
    "Shampoo",
    "Soap",
    "SophiaG",
    "SpectralNorm",
    "bartlett_estimate",
    "early",
    "every",
    "gauss_newton_diagonal",
]
