"""Hyperball (arXiv 2606.16899): W ← R·unit(W − η R·unit(u)), of a matrix that is not zero."""

import numpy as np

from .graft import Optimizer


class Hyperball:
    """Unlike the others, `update` returns the matrix after the step; `rates` has η of each."""

    def __init__(self, direction: Optimizer, W: np.ndarray, rates: list[float]) -> None:
        self.direction, self.W, self.rates = direction, W, iter(rates)
        self.R = np.linalg.norm(W)

    def update(self, G: np.ndarray) -> np.ndarray:
        u = self.direction.update(G)
        W = self.W - next(self.rates) * self.R * u / np.linalg.norm(u)
        self.W = self.R * W / np.linalg.norm(W)
        return self.W
