"""Grafting Q1#Q2 (arXiv 2002.11803): the direction of Q2 at the size of Q1, over the matrix."""

from typing import Protocol

import numpy as np


class Optimizer(Protocol):
    def update(self, G: np.ndarray) -> np.ndarray: ...


class Graft:
    def __init__(self, magnitude: Optimizer, direction: Optimizer, *, eps: float = 0.0) -> None:
        self.magnitude, self.direction, self.eps = magnitude, direction, eps

    def update(self, G: np.ndarray) -> np.ndarray:
        size = np.linalg.norm(self.magnitude.update(G))
        u = self.direction.update(G)
        return u * size / (np.linalg.norm(u) + self.eps)
