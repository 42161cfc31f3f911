"""Orthogonalization as a transformation of its own."""

from typing import Any

import jax
import optax

from mup_jax.transforms.engine import scale_by_blocks
from mup_jax.transforms.linalg import Orthogonalizer, check_orthogonalizer, orthogonalize
from mup_jax.transforms.matrices import WeightDimensionNumbers
from mup_jax.transforms.options import check_not_negative
from mup_jax.transforms.rule import BlockRule


def orthogonalize_updates(
    *,
    eps: float = 1e-8,
    orthogonalizer: Orthogonalizer = "tuned",
    ns_steps: int | None = None,
    gram_form: bool | None = None,
    weight_dimension_numbers: WeightDimensionNumbers = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Replaces each matrix of updates by its polar factor, U Vᵀ of U S Vᵀ.

    After any direction: `optax.trace` and this are Muon with heavy-ball momentum, `scale_by_soap`
    and this are SOAP→Muon. The result has spectral norm 1, whatever came in, so that its width rule
    is `mup_jax.rules.muon`. A matrix that is not finite becomes zero.

    Args:
      eps: added to the Frobenius norm of the update, in its units.
      orthogonalizer: as in `scale_by_muon`; so are gram_form and weight_dimension_numbers.
      ns_steps: as in `scale_by_muon`.
      gram_form: see orthogonalizer.
      weight_dimension_numbers: see orthogonalizer.

    Returns:
      A transformation of updates into updates of the same shapes and dtypes.

    Raises:
      ValueError: an unknown orthogonalizer, or a number of steps that it does not have; at `init`
        or `update`, a leaf is not a matrix.

    Example:
      >>> import jax.numpy as jnp
      >>> import mup_jax
      >>> import optax
      >>> soap_to_muon = optax.chain(mup_jax.scale_by_soap(), mup_jax.orthogonalize_updates())
      >>> params = {"w": jnp.ones((6, 4))}
      >>> updates, state = soap_to_muon.update(params, soap_to_muon.init(params))

    References:
      Jordan et al., `Muon <https://kellerjordan.github.io/posts/muon/>`_, 2024.
    """
    check_orthogonalizer(orthogonalizer, ns_steps)
    check_not_negative(eps=eps)

    def direction(update: jax.Array, state: Any, step: jax.Array) -> tuple[jax.Array, Any]:
        del step
        polar = orthogonalize(
            update, orthogonalizer, ns_steps=ns_steps, eps=eps, gram_form=gram_form
        )
        return polar, state

    return scale_by_blocks(
        BlockRule(lambda shape: (), direction), weight_dimension_numbers=weight_dimension_numbers
    )
