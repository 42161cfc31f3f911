"""AdaMuon: Muon's orthogonalized momentum, divided by the root of its own second moment."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from mup_jax.transforms.engine import scale_by_blocks
from mup_jax.transforms.linalg import Orthogonalizer, check_orthogonalizer, orthogonalize
from mup_jax.transforms.matrices import WeightDimensionNumbers
from mup_jax.transforms.options import check_decays, check_not_negative
from mup_jax.transforms.rule import BlockRule
from mup_jax.transforms.statistics import bias_correction, ema, momentum


class AdaMuonState(NamedTuple):
    """What `scale_by_adamuon` keeps of a matrix."""

    mu: jax.Array
    nu: jax.Array  # second moment of the orthogonalized momentum


def scale_by_adamuon(
    b1: float = 0.95,
    b2: float = 0.95,
    eps: float = 1e-8,
    *,
    nesterov: bool = True,
    muon_eps: float = 1e-8,
    orthogonalizer: Orthogonalizer = "tuned",
    ns_steps: int | None = None,
    weight_dimension_numbers: WeightDimensionNumbers = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Divides Muon's direction O by the root of its second moment, entry by entry (AdaMuon).

    .. math::
      V \leftarrow \beta_2 V + (1 - \beta_2) O^2, \quad
      u = O / (\sqrt{V / (1 - \beta_2^t)} + \epsilon)

    This is AdaMuon as Qiu et al. have it, without sign before and RMS scale after. A matrix whose
    gradient is not finite keeps its momentum, as in `scale_by_muon`.

    Args:
      b1: decay of the momentum that Muon orthogonalizes.
      b2: decay of the second moment.
      eps: in units of O, whose entries are about (d_in·d_out)^(-½); above 0.
      nesterov: as in `scale_by_muon`; so are orthogonalizer, ns_steps and weight_dimension_numbers.
      muon_eps: ε of Muon, in units of the gradient.
      orthogonalizer: see nesterov.
      ns_steps: see nesterov.
      weight_dimension_numbers: see nesterov.

    Returns:
      A transformation of gradients into updates of the same shapes and dtypes.

    Raises:
      ValueError: as from `scale_by_muon`.

    Example:
      >>> params = {"w": jnp.ones((6, 4))}
      >>> tx = mup_jax.scale_by_adamuon()
      >>> updates, state = tx.update(params, tx.init(params))

    References:
      Si et al., `AdaMuon <https://arxiv.org/abs/2507.11005>`_, 2025; Qiu et al.,
      `Hyperparameter transfer <https://arxiv.org/abs/2512.05620>`_, 2025.
    """
    check_orthogonalizer(orthogonalizer, ns_steps)
    check_decays(b1=b1, b2=b2)
    check_not_negative(eps=eps, muon_eps=muon_eps)

    def init(shape: tuple[int, int]) -> AdaMuonState:
        return AdaMuonState(jnp.zeros(shape, jnp.float32), jnp.zeros(shape, jnp.float32))

    def direction(
        gradient: jax.Array, state: AdaMuonState, step: jax.Array
    ) -> tuple[jax.Array, AdaMuonState]:
        mu, ahead = momentum(state.mu, gradient, b1, nesterov)
        polar = orthogonalize(ahead, orthogonalizer, ns_steps=ns_steps, eps=muon_eps)
        nu = ema(state.nu, jnp.square(polar), b2)
        size = jnp.sqrt(nu / bias_correction(b2, step))
        return polar / (size + eps), AdaMuonState(mu, nu)

    return scale_by_blocks(
        BlockRule(init, direction), weight_dimension_numbers=weight_dimension_numbers
    )
