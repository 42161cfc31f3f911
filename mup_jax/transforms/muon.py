"""Muon: momentum, orthogonalized."""

import math
from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from mup_jax.transforms.engine import scale_by_blocks
from mup_jax.transforms.linalg import Orthogonalizer, check_orthogonalizer, orthogonalize
from mup_jax.transforms.matrices import WeightDimensionNumbers
from mup_jax.transforms.options import check_decays, check_not_negative
from mup_jax.transforms.rule import BlockRule
from mup_jax.transforms.statistics import momentum

ShapeFactor = Literal["none", "spectral", "jordan", "rms"]
SHAPE_FACTORS: dict[str, Callable[[int, int], float]] = {
    "none": lambda d_in, d_out: 1.0,
    "spectral": lambda d_in, d_out: math.sqrt(d_out / d_in),
    "jordan": lambda d_in, d_out: math.sqrt(max(1.0, d_out / d_in)),
    "rms": lambda d_in, d_out: 0.2 * math.sqrt(max(d_in, d_out)),
}


class MuonState(NamedTuple):
    """What `scale_by_muon` keeps of a matrix."""

    mu: jax.Array


def scale_by_muon(
    beta: float = 0.95,
    *,
    nesterov: bool = True,
    eps: float = 1e-8,
    orthogonalizer: Orthogonalizer = "tuned",
    ns_steps: int | None = None,
    gram_form: bool | None = None,
    compute_dtype: jax.typing.DTypeLike = jnp.float32,
    mu_dtype: jax.typing.DTypeLike = jnp.float32,
    shape_factor: ShapeFactor = "none",
    weight_dimension_numbers: WeightDimensionNumbers = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Orthogonalizes the momentum of each matrix (Muon).

    .. math::
      M \leftarrow \beta M + (1 - \beta) G, \quad M' = \beta M + (1 - \beta) G, \quad
      u = \operatorname{polar}(M' / (\|M'\|_F + \epsilon))

    where polar(U S Vᵀ) = U Vᵀ, and M' = M without `nesterov`. A matrix whose gradient is not finite
    keeps its momentum. M' has no correction for the bias of M, as `optax.contrib.scale_by_muon`
    has: on random gradients their updates are apart by 10% of the norm at the second step, 2% at
    the tenth and 0.1% at the sixtieth.

    The spectral norm of u is 1, times a factor of the shape (d_in, d_out):

    ==========  ========================  ====================================================
    none        1                         with the width rule `mup_jax.rules.muon`
    spectral    √(d_out / d_in)           that rule, as a factor (Bernstein; modula)
    jordan      √max(1, d_out / d_in)     as published with Muon
    rms         0.2 √max(d_in, d_out)     the RMS of Adam's updates (Moonlight; Kimi K2)
    ==========  ========================  ====================================================

    Only the first two carry a learning rate from one width to another; do not combine the others
    with a width rule.

    Args:
      beta: decay of the momentum.
      nesterov: whether to look ahead with the current gradient.
      eps: added to the Frobenius norm of M', in units of the gradient.
      orthogonalizer: "tuned" (quintics fitted to six steps, or to five), "polar_express" (Amsel et
        al. 2025), "newton_schulz" (Jordan's coefficients) or "svd" (exact).
      ns_steps: iterations of all but "svd"; None for the method's own, six of "tuned", five of
        others.
      gram_form: whether to iterate on Gram matrices: less work for long matrices, but in full
        float32. None: on CPUs, where it is less work.
      compute_dtype: of the iterations: bfloat16 for half the memory of their products and, on
        accelerators, the fastest units. With "tuned" the update is within 0.05 of the polar factor
        (relative to its norm) for momenta of condition 100. `mup_jax.transforms.linalg` says why
        float32 is the default on all platforms.
      mu_dtype: in which M is stored. In bfloat16, with β = 0.95, it and the update are within 0.01
        of float32's after 100 steps.
      shape_factor: see above.
      weight_dimension_numbers: None for `(d_in, d_out)` leaves, or
        `optax.contrib.MuonDimensionNumbers` for all leaves, a tree of them, or a function of the
        parameters that returns one of these; axes not named are stack axes.

    Returns:
      A transformation of gradients into updates of the same shapes and dtypes.

    Raises:
      ValueError: an unknown orthogonalizer or shape factor, or a number of steps, a Gram form or a
        `compute_dtype` that it does not have; at `init` or `update`, a leaf is not a matrix.

    Example:
      >>> params = {"layers": jnp.ones((3, 6, 4))}
      >>> numbers = optax.contrib.MuonDimensionNumbers(-2, -1)
      >>> tx = mup_jax.scale_by_muon(weight_dimension_numbers=numbers)
      >>> updates, state = tx.update(params, tx.init(params))

    References:
      Jordan et al., `Muon <https://kellerjordan.github.io/posts/muon/>`_, 2024.
    """
    check_orthogonalizer(orthogonalizer, ns_steps, gram_form, compute_dtype)
    check_decays(beta=beta)
    check_not_negative(eps=eps)
    if shape_factor not in SHAPE_FACTORS:
        raise ValueError(f"shape_factor={shape_factor!r}: choose from {', '.join(SHAPE_FACTORS)}")

    def init(shape: tuple[int, int]) -> MuonState:
        return MuonState(jnp.zeros(shape, mu_dtype))

    def direction(
        gradient: jax.Array, state: MuonState, step: jax.Array
    ) -> tuple[jax.Array, MuonState]:
        del step
        mu, ahead = momentum(state.mu.astype(jnp.float32), gradient, beta, nesterov)
        polar = orthogonalize(
            ahead,
            orthogonalizer,
            ns_steps=ns_steps,
            eps=eps,
            gram_form=gram_form,
            compute_dtype=compute_dtype,
        )
        update = SHAPE_FACTORS[shape_factor](*gradient.shape) * polar
        return update, MuonState(mu.astype(mu_dtype))

    return scale_by_blocks(
        BlockRule(init, direction), weight_dimension_numbers=weight_dimension_numbers
    )
