"""SOAP (arXiv 2409.11321, algorithm 3), per block, with its second moment V carried along.

G' = Q_inᵀ G Q_out,  V ← β₂V + (1−β₂)G'²,
u = Q_in [(Q_inᵀ M Q_out)/(√V + ε)] Q_outᵀ · √(1−β₂ᵗ)/(1−β₁ᵗ).
"""

import numpy as np

from .blocks import Refresh, cut, early, every, kept_sides, next_basis


class Soap:
    """Bases come from `eigh` at the steps of `exact`, from power steps at those of `refresh`."""

    def __init__(
        self,
        b1: float = 0.9,
        b2: float = 0.98,
        eps: float = 1e-8,
        *,
        block_size: int = 512,
        max_preconditioner_dim: int = 10_000,
        sides: str = "both",
        exact: Refresh = early(1, 1),  # noqa: B008 - functions, never modified
        refresh: Refresh = every(1),  # noqa: B008
    ) -> None:
        self.b1, self.b2, self.eps = b1, b2, eps
        self.block_size, self.max_preconditioner_dim = block_size, max_preconditioner_dim
        self.sides, self.exact, self.refresh = sides, exact, refresh
        self.step = 0
        self.m: np.ndarray | float = 0.0
        self.v: dict[int, np.ndarray] = {}
        self.factor_in: dict[int, np.ndarray] = {}
        self.factor_out: dict[int, np.ndarray] = {}
        self.Q_in: dict[int, np.ndarray] = {}
        self.Q_out: dict[int, np.ndarray] = {}

    def update(self, G: np.ndarray) -> np.ndarray:
        kept_in, kept_out = kept = kept_sides(G.shape, self.sides, self.max_preconditioner_dim)
        self.m = self.b1 * self.m + (1 - self.b1) * G
        u = np.zeros_like(G)
        for block, where in enumerate(cut(G.shape, kept, self.block_size)):
            g, m = G[where], self.m[where]
            if self.step == 0:
                self.v[block] = np.zeros_like(g)
                self.factor_in[block] = np.zeros((g.shape[0],) * 2)
                self.factor_out[block] = np.zeros((g.shape[1],) * 2)
                # A side without a factor keeps the identity: it is never rotated.
                self.Q_in[block] = np.eye(g.shape[0])
                self.Q_out[block] = np.eye(g.shape[1])
            self.factor_in[block] = self.b2 * self.factor_in[block] + (1 - self.b2) * g @ g.T
            self.factor_out[block] = self.b2 * self.factor_out[block] + (1 - self.b2) * g.T @ g

            exact = self.exact(self.step, block)
            if exact or self.refresh(self.step, block):
                if kept_in:
                    old = self.Q_in[block]
                    new = next_basis(self.factor_in[block], old, exact=exact)
                    self.v[block] = ((old.T @ new) ** 2).T @ self.v[block]
                    self.Q_in[block] = new
                if kept_out:
                    old = self.Q_out[block]
                    new = next_basis(self.factor_out[block], old, exact=exact)
                    self.v[block] = self.v[block] @ (old.T @ new) ** 2
                    self.Q_out[block] = new

            Q_in, Q_out = self.Q_in[block], self.Q_out[block]
            g_rotated = Q_in.T @ g @ Q_out
            self.v[block] = self.b2 * self.v[block] + (1 - self.b2) * g_rotated**2
            direction = (Q_in.T @ m @ Q_out) / (np.sqrt(self.v[block]) + self.eps)
            u[where] = Q_in @ direction @ Q_out.T
        self.step += 1
        return u * np.sqrt(1 - self.b2**self.step) / (1 - self.b1**self.step)
