"""AdaMuon: Muon's orthogonalized momentum, divided by the root of its own second moment."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from mup_jax.transforms.linalg import Orthogonalizer
from mup_jax.transforms.matrices import WeightDimensionNumbers
from mup_jax.transforms.muon import ScaleByMuonState, scale_by_muon
from mup_jax.transforms.options import check_decays, check_not_negative
from mup_jax.transforms.statistics import bias_correction


class ScaleByAdaMuonState(NamedTuple):
    """State of `scale_by_adamuon`."""

    count: jax.Array  # type: ignore[assignment]  # int32: steps so far
    muon: ScaleByMuonState
    nu: Any  # float32: second moments, like the parameters


def scale_by_adamuon(
    b1: float = 0.95,
    b2: float = 0.95,
    eps: float = 1e-8,
    *,
    nesterov: bool = True,
    muon_eps: float = 1e-8,
    orthogonalizer: Orthogonalizer = "tuned",
    steps: int | None = None,
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
      nesterov: as in `scale_by_muon`; so are orthogonalizer, steps and weight_dimension_numbers.
      muon_eps: ε of Muon, in units of the gradient.
      orthogonalizer: see nesterov.
      steps: see nesterov.
      weight_dimension_numbers: see nesterov.

    Returns:
      A transformation of gradients into updates of the same shapes and dtypes.

    Raises:
      ValueError: as from `scale_by_muon`.

    References:
      Si et al., `AdaMuon <https://arxiv.org/abs/2507.11005>`_, 2025; Qiu et al.,
      `Hyperparameter transfer <https://arxiv.org/abs/2512.05620>`_, 2025.
    """
    check_decays(b1=b1, b2=b2)
    check_not_negative(eps=eps, muon_eps=muon_eps)
    muon = scale_by_muon(
        b1,
        nesterov=nesterov,
        eps=muon_eps,
        orthogonalizer=orthogonalizer,
        steps=steps,
        weight_dimension_numbers=weight_dimension_numbers,
    )

    def init(params: optax.Params) -> ScaleByAdaMuonState:
        nu = optax.tree.zeros_like(params, dtype=jnp.float32)
        return ScaleByAdaMuonState(jnp.zeros((), jnp.int32), muon.init(params), nu)

    def update(
        updates: optax.Updates, state: ScaleByAdaMuonState, params: Any = None
    ) -> tuple[optax.Updates, ScaleByAdaMuonState]:
        # In float32 O is not rounded to the gradients' dtype before it is squared.
        gradients = optax.tree.cast(updates, jnp.float32)
        directions, muon_state = muon.update(gradients, state.muon, params)
        count = optax.safe_increment(state.count)
        nu = optax.tree.update_moment(directions, state.nu, b2, 2)
        scaled = jax.tree.map(
            lambda o, v, g: (o / (jnp.sqrt(v) + eps)).astype(g.dtype),
            directions,
            jax.tree.map(lambda v: v / bias_correction(b2, count), nu),
            updates,
        )
        return scaled, ScaleByAdaMuonState(count, muon_state, nu)

    return optax.with_extra_args_support(optax.GradientTransformation(init, update))
