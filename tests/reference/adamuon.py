"""AdaMuon as Qiu et al. have it: O / (√V̂ + ε) for Muon's O and the average V of O²."""

from collections.abc import Sequence

import numpy as np

from .muon import JORDAN, Muon


class AdaMuon:
    def __init__(
        self,
        b1: float = 0.95,
        b2: float = 0.95,
        eps: float = 1e-8,
        *,
        nesterov: bool = True,
        coefficients: Sequence[tuple[float, float, float]] | None = JORDAN,
    ) -> None:
        self.muon = Muon(b1, nesterov=nesterov, coefficients=coefficients)
        self.b2, self.eps = b2, eps
        self.step = 0
        self.v: np.ndarray | float = 0.0

    def update(self, G: np.ndarray) -> np.ndarray:
        self.step += 1
        O = self.muon.update(G)  # noqa: E741 - the paper's letter
        self.v = self.b2 * self.v + (1 - self.b2) * O**2
        return O / (np.sqrt(self.v / (1 - self.b2**self.step)) + self.eps)
