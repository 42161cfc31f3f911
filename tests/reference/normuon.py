"""NorMuon (arXiv 2510.05491): Muon's O, over what each output neuron's entries usually are.

v ← β₂v + (1−β₂) mean over the inputs of O²,  u = Ô ‖O‖_F/‖Ô‖_F with Ô = O / (√v + ε). The norm that
is given back makes a correction of v's bias idle, but for ε.
"""

from collections.abc import Sequence

import numpy as np

from .muon import JORDAN, Muon


class NorMuon:
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
        self.v: np.ndarray | float = 0.0

    def update(self, G: np.ndarray) -> np.ndarray:
        O = self.muon.update(G)  # noqa: E741 - the paper's letter
        self.v = self.b2 * self.v + (1 - self.b2) * np.mean(O**2, axis=0)
        u = O / (np.sqrt(self.v) + self.eps)
        return u * np.linalg.norm(O) / np.linalg.norm(u)
