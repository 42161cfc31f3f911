"""Sophia-G (arXiv 2305.14342, algorithms 2 and 3), and its estimate where it is known exactly."""

import numpy as np


class SophiaG:
    """`update` takes the estimate of the Gauss-Newton diagonal at steps that have a new one."""

    def __init__(
        self, b1: float = 0.96, b2: float = 0.99, gamma: float = 0.05, eps: float = 1e-12
    ) -> None:
        self.b1, self.b2, self.gamma, self.eps = b1, b2, gamma, eps
        self.m: np.ndarray | float = 0.0
        self.h: np.ndarray | float = 0.0

    def update(self, G: np.ndarray, estimate: np.ndarray | None = None) -> np.ndarray:
        self.m = self.b1 * self.m + (1 - self.b1) * G
        if estimate is not None:
            self.h = self.b2 * self.h + (1 - self.b2) * estimate
        return np.clip(self.m / np.maximum(self.gamma * self.h, self.eps), -1, 1)


def softmax(logits: np.ndarray) -> np.ndarray:
    p = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return p / p.sum(axis=-1, keepdims=True)


def bartlett_estimate(X: np.ndarray, W: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """B·ĝ² of a model with logits X W, X of shape (B, d)."""
    gradient = X.T @ (softmax(X @ W) - np.eye(W.shape[1])[labels]) / len(X)
    return len(X) * gradient**2


def gauss_newton_diagonal(X: np.ndarray, W: np.ndarray) -> np.ndarray:
    """Of the mean cross-entropy: the mean of x_i² p_j (1 - p_j)."""
    p = softmax(X @ W)
    return (X**2).T @ (p * (1 - p)) / len(X)
