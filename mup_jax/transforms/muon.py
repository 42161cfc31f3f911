"""Muon: momentum, orthogonalized."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from mup_jax.transforms.linalg import Orthogonalizer, orthogonalize
from mup_jax.transforms.matrices import MatrixGroups, WeightDimensionNumbers
from mup_jax.transforms.statistics import ema, is_healthy


class ScaleByMuonState(NamedTuple):
    """State of `scale_by_muon`; one entry per matrix shape."""

    mu: dict[str, jax.Array]
    nonfinite: jax.Array  # int32: matrices of gradients skipped so far


def scale_by_muon(
    beta: float = 0.95,
    *,
    nesterov: bool = True,
    eps: float = 1e-8,
    orthogonalizer: Orthogonalizer = "polar_express",
    steps: int = 5,
    weight_dimension_numbers: WeightDimensionNumbers = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Orthogonalizes the momentum of each matrix (Muon).

    .. math::
      M \leftarrow \beta M + (1 - \beta) G, \quad M' = \beta M + (1 - \beta) G, \quad
      u = \operatorname{polar}(M' / (\|M'\|_F + \epsilon))

    where polar(U S Vᵀ) = U Vᵀ, and M' = M without `nesterov`. No shape factor is applied: the
    spectral norm of u is 1. A matrix whose gradient is not finite keeps its momentum.

    Args:
      beta: decay of the momentum.
      nesterov: whether to look ahead with the current gradient.
      eps: added to the Frobenius norm of M', in units of the gradient.
      orthogonalizer: "polar_express" (Amsel et al. 2025), "newton_schulz" (Jordan's coefficients)
        or "svd" (exact).
      steps: iterations of the first two.
      weight_dimension_numbers: None for `(d_in, d_out)` leaves, or
        `optax.contrib.MuonDimensionNumbers` for all leaves, a tree of them, or a function of the
        parameters that returns one of these; axes not named are stack axes.

    Returns:
      A transformation of gradients into updates of the same shapes and dtypes.

    Raises:
      ValueError: at `init` or `update`, a leaf is not a matrix; an unknown orthogonalizer.

    References:
      Jordan et al., `Muon <https://kellerjordan.github.io/posts/muon/>`_, 2024.
    """

    def init(params: optax.Params) -> ScaleByMuonState:
        groups = MatrixGroups(params, weight_dimension_numbers).stack(params)
        return ScaleByMuonState(jax.tree.map(jnp.zeros_like, groups), jnp.zeros((), jnp.int32))

    def update(
        updates: optax.Updates, state: ScaleByMuonState, params: Any = None
    ) -> tuple[optax.Updates, ScaleByMuonState]:
        del params
        groups = MatrixGroups(updates, weight_dimension_numbers)
        mu, directions, skipped = {}, {}, state.nonfinite
        for key, gradient in groups.stack(updates).items():
            healthy = is_healthy(gradient)
            mu[key] = ema(state.mu[key], gradient, beta, healthy)
            ahead = ema(mu[key], gradient, beta, healthy) if nesterov else mu[key]
            directions[key] = orthogonalize(ahead, orthogonalizer, steps=steps, eps=eps)
            skipped = skipped + jnp.sum(~healthy, dtype=jnp.int32)
        return groups.unstack(directions), ScaleByMuonState(mu, skipped)

    return optax.with_extra_args_support(optax.GradientTransformation(init, update))
