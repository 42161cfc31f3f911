"""Adam (arXiv 1412.6980, algorithm 1): m̂ / (√v̂ + ε)."""

import numpy as np


class Adam:
    def __init__(self, b1: float = 0.9, b2: float = 0.98, eps: float = 1e-8) -> None:
        self.b1, self.b2, self.eps = b1, b2, eps
        self.step = 0
        self.m: np.ndarray | float = 0.0
        self.v: np.ndarray | float = 0.0

    def update(self, G: np.ndarray) -> np.ndarray:
        self.step += 1
        self.m = self.b1 * self.m + (1 - self.b1) * G
        self.v = self.b2 * self.v + (1 - self.b2) * G**2
        m_hat = self.m / (1 - self.b1**self.step)
        v_hat = self.v / (1 - self.b2**self.step)
        return m_hat / (np.sqrt(v_hat) + self.eps)
