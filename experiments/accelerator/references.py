"""Textbooks in numpy float64: one square matrix without blocks, for a few steps."""

from collections.abc import Sequence
from typing import Protocol

import numpy as np

Array = np.ndarray


class Reference(Protocol):
    """An optimizer of one matrix."""

    def update(self, g: Array) -> Array:
        """The direction of one step, for a gradient in float64."""
        ...


def polar(x: Array) -> Array:
    """U Vᵀ of x = U S Vᵀ, over singular values that are more than rounding of float32."""
    u, s, vt = np.linalg.svd(x, full_matrices=False)
    return (u * (s > 1e-6 * s[..., :1])[..., None, :]) @ vt


def iterate(x: Array, coefficients: Sequence[tuple[float, float, float]]) -> Array:
    """X <- a X + (b A + c A²) X with A = X Xᵀ, from x / ‖x‖_F."""
    x = x / np.linalg.norm(x, axis=(-2, -1), keepdims=True)
    for a, b, c in coefficients:
        gram = x @ x.swapaxes(-2, -1)
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x


class Adam:
    """Kingma and Ba 2014, algorithm 1."""

    def __init__(self, b1: float, b2: float, eps: float = 1e-8) -> None:
        self.b1, self.b2, self.eps = b1, b2, eps
        self.step, self.m, self.v = 0, np.zeros(()), np.zeros(())

    def update(self, g: Array) -> Array:
        self.step += 1
        self.m = self.b1 * self.m + (1 - self.b1) * g
        self.v = self.b2 * self.v + (1 - self.b2) * g**2
        size = np.sqrt(self.v / (1 - self.b2**self.step)) + self.eps
        return self.m / (1 - self.b1**self.step) / size


class Muon:
    """Jordan et al. 2024; exact where there are no coefficients."""

    def __init__(
        self, coefficients: Sequence[tuple[float, float, float]] | None, beta: float = 0.95
    ) -> None:
        self.coefficients, self.beta, self.m = coefficients, beta, np.zeros(())

    def update(self, g: Array) -> Array:
        self.m = self.beta * self.m + (1 - self.beta) * g
        ahead = self.beta * self.m + (1 - self.beta) * g
        return polar(ahead) if self.coefficients is None else iterate(ahead, self.coefficients)


class AdaMuon:
    """Si et al. 2025, as in Qiu et al. 2025."""

    def __init__(
        self, coefficients: Sequence[tuple[float, float, float]], b2: float = 0.95
    ) -> None:
        self.muon, self.b2, self.step, self.v = Muon(coefficients), b2, 0, np.zeros(())

    def update(self, g: Array) -> Array:
        self.step += 1
        direction = self.muon.update(g)
        self.v = self.b2 * self.v + (1 - self.b2) * direction**2
        return direction / (np.sqrt(self.v / (1 - self.b2**self.step)) + 1e-8)


class Shampoo:
    """Gupta et al. 2018 with the exponent 1/2 of a side and ε relative to the spectral norm."""

    def __init__(self, eps: float, frequency: int, b1: float = 0.9, b2: float = 0.98) -> None:
        self.eps, self.frequency, self.b1, self.b2 = eps, frequency, b1, b2
        self.step, self.m = 0, np.zeros(())
        self.factors: list[Array] = [np.zeros(()), np.zeros(())]
        self.roots: list[Array] = []

    def update(self, g: Array) -> Array:
        self.m = self.b1 * self.m + (1 - self.b1) * g
        if self.step == 0:
            self.roots = [np.eye(d) for d in g.shape]
        for side, gram in enumerate((g @ g.T, g.T @ g)):
            self.factors[side] = self.b2 * self.factors[side] + (1 - self.b2) * gram
            if self.step % self.frequency == 0:
                values, q = np.linalg.eigh(self.factors[side] / (1 - self.b2 ** (self.step + 1)))
                powers = (np.maximum(values, 0) + self.eps * values[-1]) ** -0.5
                self.roots[side] = q * powers @ q.T
        self.step += 1
        return self.roots[0] @ self.m @ self.roots[1] / (1 - self.b1**self.step)


class Soap:
    """Vyas et al. 2024, whose second moment goes along when a basis moves."""

    def __init__(self, eps: float, frequency: int, b1: float = 0.9, b2: float = 0.98) -> None:
        self.eps, self.frequency, self.b1, self.b2 = eps, frequency, b1, b2
        self.step, self.m, self.v = 0, np.zeros(()), np.zeros(())
        self.factors: list[Array] = [np.zeros(()), np.zeros(())]
        self.bases: list[Array] = []

    def update(self, g: Array) -> Array:
        if self.step == 0:
            self.v = np.zeros_like(g)
            self.bases = [np.eye(d) for d in g.shape]
        self.m = self.b1 * self.m + (1 - self.b1) * g
        for side, gram in enumerate((g @ g.T, g.T @ g)):
            self.factors[side] = self.b2 * self.factors[side] + (1 - self.b2) * gram
            if self.step % self.frequency == 0:
                old = self.bases[side]
                new = self.bases[side] = self._next_basis(self.factors[side], old)
                moved = (old.T @ new) ** 2
                self.v = moved.T @ self.v if side == 0 else self.v @ moved
        left, right = self.bases
        self.v = self.b2 * self.v + (1 - self.b2) * (left.T @ g @ right) ** 2
        direction = left.T @ self.m @ right / (np.sqrt(self.v) + self.eps)
        self.step += 1
        correction = np.sqrt(1 - self.b2**self.step) / (1 - self.b1**self.step)
        return left @ direction @ right.T * correction

    def _next_basis(self, factor: Array, old: Array) -> Array:
        if self.step == 0:
            return np.linalg.eigh(factor)[1][:, ::-1]
        order = np.argsort(-np.diag(old.T @ factor @ old))
        return np.linalg.qr(factor @ old[:, order])[0]


class Graft:
    """Agarwal et al. 2020: the direction of one at the size of the other."""

    def __init__(self, magnitude: Reference, direction: Reference) -> None:
        self.magnitude, self.direction = magnitude, direction

    def update(self, g: Array) -> Array:
        size, u = np.linalg.norm(self.magnitude.update(g)), self.direction.update(g)
        return u * size / np.linalg.norm(u)
