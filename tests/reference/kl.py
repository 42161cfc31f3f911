"""KL-Shampoo and KL-SOAP (arXiv 2509.03378): factors of gradients that the other has whitened.

S_in ← β₂ S_in + (1−β₂)/d_out · G S_out⁻¹ Gᵀ,  S_out ← β₂ S_out + (1−β₂)/d_in · Gᵀ S_in⁻¹ G,

both with the factors before the step. Their product S_out ⊗ S_in has the scale of the gradient's
covariance, to which it is nearest in Kullback-Leibler divergence where both stand still.
"""

import numpy as np

from .blocks import Refresh, early, every, next_basis


class KLFactors:
    """The factors of one matrix, and their bases; a side without a factor keeps the identity.

    At the steps of `exact` a basis Q has the eigenvectors of S, at those of `refresh` it takes a
    power step, and S is to all others Q diag(λ) Qᵀ with the diagonal λ of QᵀSQ. Between two bases
    that is the same as an average of λ alone: λ_in ← β₂ λ_in + (1−β₂) meanⱼ (G'²ᵢⱼ / λ_out,j) with
    G' = Q_inᵀ G Q_out, and the same of the other side.

    An identity of the size of the first gradient counts as one gradient before it, so that the
    first inverses exist; averages are divided by the sum of their weights, 1 − β₂^(t+1). ε is
    relative to the largest λ of a factor and added wherever λ is inverted.
    """

    def __init__(
        self, b2: float, eps: float, sides: str = "both", *, exact: Refresh, refresh: Refresh
    ) -> None:
        self.b2, self.eps = b2, eps
        self.sides = {"both": (0, 1), "in": (0,), "out": (1,)}[sides]
        self.exact, self.refresh = exact, refresh
        self.step = 0
        self.weight = 1 - b2

    def update(self, G: np.ndarray) -> list[np.ndarray]:
        """Takes the gradient in; for each side, the old basis as columns of the new."""
        if self.step == 0:
            size = np.sqrt(np.mean(G**2)) ** (2 / len(self.sides))
            scales = [size if side in self.sides else 1.0 for side in (0, 1)]
            self.S = [self.weight * scales[side] * np.eye(G.shape[side]) for side in (0, 1)]
            self.Q = [np.eye(d) for d in G.shape]
        inverse_in, inverse_out = self.power(0, -1), self.power(1, -1)
        d_in, d_out = G.shape
        self._average(0, G @ inverse_out @ G.T / d_out)
        self._average(1, G.T @ inverse_in @ G / d_in)
        self.weight = self.b2 * self.weight + 1 - self.b2

        old = list(self.Q)
        if self.exact(self.step, 0) or self.refresh(self.step, 0):
            for side in self.sides:
                exact = self.exact(self.step, 0)
                self.Q[side] = next_basis(self.S[side], self.Q[side], exact=exact)
        self.step += 1
        return [Q.T @ new for Q, new in zip(old, self.Q, strict=True)]

    def eigenvalues(self, side: int) -> np.ndarray:
        return np.diag(self.Q[side].T @ self.S[side] @ self.Q[side]) / self.weight

    def power(self, side: int, exponent: float) -> np.ndarray:
        Q = self.Q[side]
        if side not in self.sides:
            return Q
        values = np.maximum(self.eigenvalues(side), 0.0)
        return Q @ np.diag((values + self.eps * values.max()) ** exponent) @ Q.T

    def _average(self, side: int, new: np.ndarray) -> None:
        if side in self.sides:
            self.S[side] = self.b2 * self.S[side] + (1 - self.b2) * new


class KLShampoo:
    """u = S_in^(−½) M̂ S_out^(−½). As a rule in use with `exact=early(1, 1), refresh=every(10)`."""

    def __init__(
        self,
        b1: float = 0.9,
        b2: float = 0.98,
        eps: float = 1e-5,
        *,
        sides: str = "both",
        exact: Refresh = every(1),  # noqa: B008 - functions, never modified
        refresh: Refresh = every(1),  # noqa: B008
    ) -> None:
        self.b1 = b1
        self.factors = KLFactors(b2, eps, sides, exact=exact, refresh=refresh)
        self.m: np.ndarray | float = 0.0

    def update(self, G: np.ndarray) -> np.ndarray:
        self.factors.update(G)
        self.m = self.b1 * self.m + (1 - self.b1) * G
        m_hat = self.m / (1 - self.b1**self.factors.step)
        return self.factors.power(0, -0.5) @ m_hat @ self.factors.power(1, -0.5)


class KLSoap:
    """SOAP in the bases of these factors; `eps` is SOAP's, `factor_eps` that of the factors."""

    def __init__(
        self,
        b1: float = 0.9,
        b2: float = 0.98,
        eps: float = 1e-8,
        factor_eps: float = 1e-5,
        *,
        sides: str = "both",
        exact: Refresh = early(1, 1),  # noqa: B008 - functions, never modified
        refresh: Refresh = every(1),  # noqa: B008
    ) -> None:
        self.b1, self.b2, self.eps = b1, b2, eps
        self.factors = KLFactors(b2, factor_eps, sides, exact=exact, refresh=refresh)
        self.m: np.ndarray | float = 0.0
        self.v: np.ndarray | float = 0.0

    def update(self, G: np.ndarray) -> np.ndarray:
        turn_in, turn_out = self.factors.update(G)
        Q_in, Q_out = self.factors.Q
        self.m = self.b1 * self.m + (1 - self.b1) * G
        carried = (turn_in**2).T @ np.broadcast_to(self.v, G.shape) @ turn_out**2
        self.v = self.b2 * carried + (1 - self.b2) * (Q_in.T @ G @ Q_out) ** 2
        direction = (Q_in.T @ self.m @ Q_out) / (np.sqrt(self.v) + self.eps)
        t = self.factors.step
        return Q_in @ direction @ Q_out.T * np.sqrt(1 - self.b2**t) / (1 - self.b1**t)
