"""NorMuon: Muon's direction, over what each output neuron's entries usually are."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from mup_jax.transforms.engine import scale_by_blocks
from mup_jax.transforms.linalg import Orthogonalizer, check_orthogonalizer, orthogonalize
from mup_jax.transforms.matrices import WeightDimensionNumbers
from mup_jax.transforms.options import check_decays, check_not_negative
from mup_jax.transforms.platforms import FLOOR
from mup_jax.transforms.rule import BlockRule
from mup_jax.transforms.statistics import ema, momentum


class NorMuonState(NamedTuple):
    """What `scale_by_normuon` keeps of a matrix."""

    mu: jax.Array
    nu: jax.Array  # `(1, d_out)`: second moment of each output neuron


def scale_by_normuon(
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
    r"""Divides Muon's direction O by the root of each output neuron's second moment (NorMuon).

    .. math::
      v \leftarrow \beta_2 v + (1 - \beta_2) \operatorname{mean}_{in} O^2, \quad
      \hat O = O / (\sqrt v + \epsilon), \quad u = \hat O \, \|O\|_F / \|\hat O\|_F

    The norm that is given back makes a correction of the bias of v idle, and keeps the size of
    Muon's update: the width rule is `mup_jax.rules.muon`. A matrix whose gradient is not finite
    keeps its state.

    Args:
      b1: decay of the momentum that Muon orthogonalizes.
      b2: decay of the second moment.
      eps: in units of O, whose entries are about (d_in·d_out)^(-½).
      nesterov: as in `scale_by_muon`; so are orthogonalizer and weight_dimension_numbers.
      muon_eps: ε of Muon, in units of the gradient.
      orthogonalizer: see nesterov.
      ns_steps: as in `scale_by_muon`.
      weight_dimension_numbers: see nesterov.

    Returns:
      A transformation of gradients into updates of the same shapes and dtypes.

    Raises:
      ValueError: as from `scale_by_muon`.

    Example:
      >>> import jax.numpy as jnp
      >>> import mup_jax
      >>> params = {"w": jnp.ones((6, 4))}
      >>> tx = mup_jax.scale_by_normuon()
      >>> updates, state = tx.update(params, tx.init(params))

    References:
      Li et al., `NorMuon <https://arxiv.org/abs/2510.05491>`_, 2025.
    """
    check_orthogonalizer(orthogonalizer, ns_steps)
    check_decays(b1=b1, b2=b2)
    check_not_negative(eps=eps, muon_eps=muon_eps)

    def init(shape: tuple[int, int]) -> NorMuonState:
        return NorMuonState(jnp.zeros(shape, jnp.float32), jnp.zeros((1, shape[1]), jnp.float32))

    def direction(
        gradient: jax.Array, state: NorMuonState, step: jax.Array
    ) -> tuple[jax.Array, NorMuonState]:
        del step
        mu, ahead = momentum(state.mu, gradient, b1, nesterov)
        polar = orthogonalize(ahead, orthogonalizer, ns_steps=ns_steps, eps=muon_eps)
        nu = ema(state.nu, jnp.mean(jnp.square(polar), axis=0, keepdims=True), b2)
        normalized = polar / jnp.maximum(jnp.sqrt(nu) + eps, FLOOR)
        ratio = jnp.linalg.norm(polar) / jnp.maximum(jnp.linalg.norm(normalized), FLOOR)
        return normalized * ratio, NorMuonState(mu, nu)

    return scale_by_blocks(
        BlockRule(init, direction), weight_dimension_numbers=weight_dimension_numbers
    )
