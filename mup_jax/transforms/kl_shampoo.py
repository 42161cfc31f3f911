"""KL-Shampoo and KL-SOAP: Shampoo and SOAP whose factors see gradients whitened by each other."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from mup_jax.transforms.blocking import Sides
from mup_jax.transforms.engine import scale_by_blocks
from mup_jax.transforms.kl import (
    KLFactors,
    accumulate_factors,
    new_factors,
    refresh_factors,
    scale_sides,
)
from mup_jax.transforms.matrices import WeightDimensionNumbers
from mup_jax.transforms.options import check_decays, check_not_negative, check_preconditioner
from mup_jax.transforms.rule import Block, BlockRule
from mup_jax.transforms.soap import adam_in_bases, carry
from mup_jax.transforms.statistics import bias_correction, ema, multiply_sides


class KLShampooState(NamedTuple):
    """What `scale_by_kl_shampoo` keeps of a block."""

    mu: jax.Array
    factors: KLFactors


class KLSoapState(NamedTuple):
    """What `scale_by_kl_soap` keeps of a block."""

    mu: jax.Array
    nu: jax.Array  # second moment, in the bases
    factors: KLFactors


def scale_by_kl_shampoo(
    b1: float = 0.9,
    b2: float = 0.98,
    eps: float = 1e-5,
    *,
    block_size: int | None = 512,
    max_preconditioner_dim: int | None = 10_000,
    precondition_frequency: int = 10,
    exact_steps: int = 20,
    stagger: bool = True,
    sides: Sides = "both",
    preconditioner_dtype: jax.typing.DTypeLike = jnp.float32,
    weight_dimension_numbers: WeightDimensionNumbers = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Preconditions the momentum of each block by the factors nearest to its covariance.

    .. math::
      u = \hat S_{in}^{-1/2} \hat M \hat S_{out}^{-1/2}

    with the factors of `mup_jax.transforms.kl`: each is the covariance of gradients that the other
    has whitened. Their product has the scale of the covariance, so that the entries of u are about
    1, as Adam's are, and no grafting is needed. Averages are bias-corrected; an identity of the
    size of the first gradient counts as one gradient before it. A matrix whose gradient is not
    finite keeps its state.

    The authors' code begins with an identity of 0.1 instead, which depends on the size of the
    gradients, skips the first step, takes factors before the current gradient, and corrects no
    bias.

    Args:
      b1: decay of the momentum.
      b2: decay of the factors.
      eps: added to the eigenvalues of a factor, times the largest of them.
      block_size: largest block side; None for whole matrices. Edge blocks are smaller.
      max_preconditioner_dim: a longer side of a matrix has no factor and is not cut; None: no
        limit.
      precondition_frequency: steps between two refreshes of a block's bases, each one step of
        orthogonal iteration; eigenvalues are averaged at every step.
      exact_steps: as in `scale_by_soap`.
      stagger: as in `scale_by_shampoo`.
      sides: "both", or "in" or "out" for one factor only, which is then Shampoo's.
      preconditioner_dtype: in which the bases are stored.
      weight_dimension_numbers: as in `scale_by_muon`.

    Returns:
      A transformation of gradients into updates of the same shapes and dtypes.

    Raises:
      ValueError: an option is out of range, or a leaf is not a matrix or has no side to
        precondition.

    Example:
      >>> import jax.numpy as jnp
      >>> import mup_jax
      >>> params = {"w": jnp.ones((6, 4))}
      >>> tx = mup_jax.scale_by_kl_shampoo()
      >>> updates, state = tx.update(params, tx.init(params))

    References:
      Lin et al., `KL-Shampoo <https://arxiv.org/abs/2509.03378>`_, 2025.
    """
    check_preconditioner(
        precondition_frequency=precondition_frequency,
        exact_steps=exact_steps,
        block_size=block_size,
        max_preconditioner_dim=max_preconditioner_dim,
        preconditioner_dtype=preconditioner_dtype,
    )
    check_decays(b1=b1, b2=b2)
    check_not_negative(eps=eps)

    def make_rule(block: Block) -> BlockRule:
        def init(shape: tuple[int, int]) -> KLShampooState:
            factors = new_factors(shape, block, preconditioner_dtype)
            return KLShampooState(jnp.zeros(shape, jnp.float32), factors)

        def accumulate(g: jax.Array, state: KLShampooState, step: jax.Array) -> KLShampooState:
            del step
            factors = accumulate_factors(g, state.factors, block, b2, eps)
            return state._replace(factors=factors)

        def refresh(
            state: KLShampooState, step: jax.Array, *, exact: bool = False
        ) -> KLShampooState:
            del step
            return state._replace(factors=refresh_factors(state.factors, exact=exact))

        def direction(
            g: jax.Array, state: KLShampooState, step: jax.Array
        ) -> tuple[jax.Array, KLShampooState]:
            mu = ema(state.mu, g, b1)
            bases = jax.tree.map(lambda q: q.astype(jnp.float32), state.factors.bases)
            scaled = scale_sides(state.factors, multiply_sides(bases, mu), -0.5, eps)
            back = multiply_sides(jax.tree.map(lambda q: q.mT, bases), scaled)
            # Before a first gradient there is nothing to divide by.
            update = jnp.where(state.factors.weight > 0, back / bias_correction(b1, step), 0.0)
            return update, state._replace(mu=mu)

        return BlockRule(init, direction, accumulate, refresh, partial(refresh, exact=True))

    return scale_by_blocks(
        make_rule,
        block_size=block_size,
        max_preconditioner_dim=max_preconditioner_dim,
        sides=sides,
        precondition_frequency=precondition_frequency,
        first_steps=exact_steps,
        stagger=stagger,
        weight_dimension_numbers=weight_dimension_numbers,
    )


def scale_by_kl_soap(
    b1: float = 0.9,
    b2: float = 0.98,
    eps: float = 1e-8,
    factor_eps: float = 1e-5,
    *,
    block_size: int | None = 512,
    max_preconditioner_dim: int | None = 10_000,
    precondition_frequency: int = 10,
    exact_steps: int = 20,
    stagger: bool = True,
    sides: Sides = "both",
    preconditioner_dtype: jax.typing.DTypeLike = jnp.float32,
    weight_dimension_numbers: WeightDimensionNumbers = None,
) -> optax.GradientTransformationExtraArgs:
    """Runs Adam in the eigenbasis of KL-Shampoo's factors (KL-SOAP).

    SOAP's update, see `scale_by_soap`, in the bases of the factors of `scale_by_kl_shampoo`.

    Args:
      b1: decay of the momentum.
      b2: decay of the second moment and of the factors.
      eps: added to √V, in units of the gradient.
      factor_eps: ε of the factors, as in `scale_by_kl_shampoo`; so are the others.
      block_size: see factor_eps.
      max_preconditioner_dim: see factor_eps.
      precondition_frequency: see factor_eps.
      exact_steps: see factor_eps.
      stagger: see factor_eps.
      sides: see factor_eps.
      preconditioner_dtype: see factor_eps.
      weight_dimension_numbers: see factor_eps.

    Returns:
      A transformation of gradients into updates of the same shapes and dtypes.

    Raises:
      ValueError: as from `scale_by_kl_shampoo`.

    Example:
      >>> import jax.numpy as jnp
      >>> import mup_jax
      >>> params = {"w": jnp.ones((6, 4))}
      >>> tx = mup_jax.scale_by_kl_soap(block_size=None)
      >>> updates, state = tx.update(params, tx.init(params))

    References:
      Lin et al., `KL-Shampoo <https://arxiv.org/abs/2509.03378>`_, 2025.
    """
    check_preconditioner(
        precondition_frequency=precondition_frequency,
        exact_steps=exact_steps,
        block_size=block_size,
        max_preconditioner_dim=max_preconditioner_dim,
        preconditioner_dtype=preconditioner_dtype,
    )
    check_decays(b1=b1, b2=b2)
    check_not_negative(eps=eps, factor_eps=factor_eps)

    def make_rule(block: Block) -> BlockRule:
        def init(shape: tuple[int, int]) -> KLSoapState:
            factors = new_factors(shape, block, preconditioner_dtype)
            moments = (jnp.zeros(shape, jnp.float32), jnp.zeros(shape, jnp.float32))
            return KLSoapState(*moments, factors)

        def accumulate(g: jax.Array, state: KLSoapState, step: jax.Array) -> KLSoapState:
            del step
            factors = accumulate_factors(g, state.factors, block, b2, factor_eps)
            return state._replace(factors=factors)

        def refresh(state: KLSoapState, step: jax.Array, *, exact: bool = False) -> KLSoapState:
            del step
            factors = refresh_factors(state.factors, exact=exact)
            nu = carry(state.nu, state.factors.bases, factors.bases)
            return state._replace(nu=nu, factors=factors)

        def direction(
            g: jax.Array, state: KLSoapState, step: jax.Array
        ) -> tuple[jax.Array, KLSoapState]:
            update, mu, nu = adam_in_bases(
                g, state.mu, state.nu, state.factors.bases, step, block, b1, b2, eps
            )
            return update, state._replace(mu=mu, nu=nu)

        return BlockRule(init, direction, accumulate, refresh, partial(refresh, exact=True))

    return scale_by_blocks(
        make_rule,
        block_size=block_size,
        max_preconditioner_dim=max_preconditioner_dim,
        sides=sides,
        precondition_frequency=precondition_frequency,
        first_steps=exact_steps,
        stagger=stagger,
        weight_dimension_numbers=weight_dimension_numbers,
    )
