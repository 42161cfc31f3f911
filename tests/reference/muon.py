"""Muon: orthogonalized momentum, by an odd polynomial iteration or by an exact SVD."""

from collections.abc import Sequence

import numpy as np

JORDAN = [(3.4445, -4.7750, 2.0315)] * 5


class Muon:
    """`coefficients` is one (a, b, c) per step of X ← aX + (bA + cA²)X, A = XXᵀ; None means SVD."""

    def __init__(
        self,
        beta: float = 0.95,
        *,
        nesterov: bool = True,
        eps: float = 1e-8,
        coefficients: Sequence[tuple[float, float, float]] | None = JORDAN,
    ) -> None:
        self.beta, self.nesterov, self.eps, self.coefficients = beta, nesterov, eps, coefficients
        self.m: np.ndarray | float = 0.0

    def update(self, G: np.ndarray) -> np.ndarray:
        self.m = self.beta * self.m + (1 - self.beta) * G
        m = self.beta * self.m + (1 - self.beta) * G if self.nesterov else np.asarray(self.m)
        if self.coefficients is None:
            return polar_factor(m)
        X = m / (np.linalg.norm(m) + self.eps)
        for a, b, c in self.coefficients:
            A = X @ X.T
            X = a * X + (b * A + c * A @ A) @ X
        return X


def polar_factor(M: np.ndarray) -> np.ndarray:
    """UVᵀ over the nonzero singular values: what the odd polynomials converge to."""
    U, s, Vt = np.linalg.svd(M, full_matrices=False)
    nonzero = s > s.max() * max(M.shape) * np.finfo(np.float64).eps
    return U[:, nonzero] @ Vt[nonzero]
