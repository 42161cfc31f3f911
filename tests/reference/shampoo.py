"""Shampoo (arXiv 1802.09568) with bias-corrected averages, per block.

u = (R̂ + ε_R I)^(−e_in) M̂ (L̂ + ε_L I)^(−e_out) in our orientation (d_in, d_out).
"""

import numpy as np

from .blocks import Refresh, cut, every, kept_sides


class Shampoo:
    """The papers' e_left is `e_out`, their e_right `e_in`. The first step always refreshes."""

    def __init__(
        self,
        b1: float = 0.9,
        b2: float = 0.98,
        eps: float = 1e-5,
        *,
        e_in: float = 0.5,
        e_out: float = 0.5,
        relative_eps: bool = True,
        block_size: int = 512,
        max_preconditioner_dim: int = 10_000,
        sides: str = "both",
        refresh: Refresh = every(1),  # noqa: B008 - a function, never modified
    ) -> None:
        self.b1, self.b2 = b1, b2
        self.eps, self.relative_eps = eps, relative_eps
        self.e_in, self.e_out = e_in, e_out
        self.block_size, self.max_preconditioner_dim = block_size, max_preconditioner_dim
        self.sides, self.refresh = sides, refresh
        self.step = 0
        self.m: np.ndarray | float = 0.0
        self.factor_in: dict[int, np.ndarray] = {}
        self.factor_out: dict[int, np.ndarray] = {}
        self.root_in: dict[int, np.ndarray] = {}
        self.root_out: dict[int, np.ndarray] = {}

    def update(self, G: np.ndarray) -> np.ndarray:
        kept_in, kept_out = kept = kept_sides(G.shape, self.sides, self.max_preconditioner_dim)
        self.m = self.b1 * self.m + (1 - self.b1) * G
        u = self.m / (1 - self.b1 ** (self.step + 1))
        for block, where in enumerate(cut(G.shape, kept, self.block_size)):
            g = G[where]
            refresh = self.step == 0 or self.refresh(self.step, block)
            if kept_in:
                old = self.factor_in.get(block, 0.0)
                self.factor_in[block] = self.b2 * old + (1 - self.b2) * g @ g.T
                if refresh:
                    self.root_in[block] = self._root(self.factor_in[block], self.e_in)
                u[where] = self.root_in[block] @ u[where]
            if kept_out:
                old = self.factor_out.get(block, 0.0)
                self.factor_out[block] = self.b2 * old + (1 - self.b2) * g.T @ g
                if refresh:
                    self.root_out[block] = self._root(self.factor_out[block], self.e_out)
                u[where] = u[where] @ self.root_out[block]
        self.step += 1
        return u

    def _root(self, factor: np.ndarray, exponent: float) -> np.ndarray:
        eigenvalues, Q = np.linalg.eigh(factor / (1 - self.b2 ** (self.step + 1)))
        eigenvalues = np.maximum(eigenvalues, 0.0)  # rounding makes null ones negative
        eps = self.eps * eigenvalues.max() if self.relative_eps else self.eps
        return Q @ np.diag((eigenvalues + eps) ** -exponent) @ Q.T
