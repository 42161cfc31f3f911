"""Explicit spectral normalization by power iteration, with vectors kept from step to step."""

import numpy as np

from .graft import Optimizer


class SpectralNorm:
    """`v` is the first vector, of length d_in; `iterations` are those of each step, in order."""

    def __init__(self, direction: Optimizer, v: np.ndarray, iterations: list[int]) -> None:
        self.direction, self.v, self.iterations = direction, v, iter(iterations)

    def update(self, G: np.ndarray) -> np.ndarray:
        u = self.direction.update(G)
        W = u.T  # (d_out, d_in), as in papers
        for _ in range(next(self.iterations)):
            y = W @ self.v
            self.v = W.T @ y / np.linalg.norm(W.T @ y)
        d_out, d_in = W.shape
        return u * np.sqrt(d_out / d_in) / np.linalg.norm(y)
