"""Ready-made optimizers: a transformation, its µP rule and independent weight decay.

All of them update W <- W - s(t)·(η·u + λ·W), where s(t) is the schedule, η the learning rate and
λ the independent weight decay of the base model: η is scaled for every parameter by the rules of
`mup_jax.rules`, and λ over its width ratio, or both as a `Transfer` says. Those of `matrix` route
parameters by role: the preconditioned direction takes hidden matrices, and what takes embedding,
readout and vectors stands in each docstring. Without `shapes` nothing is scaled, and every leaf of
two or more axes counts as a hidden matrix. Those of `elementwise` take every parameter, and
`from_file` makes one of any direction in a file.
"""

from collections.abc import Callable

import optax

from mup_jax.optimizers.assembly import Transfer
from mup_jax.optimizers.elementwise import adamw, adopt, lamb, lion, sophia
from mup_jax.optimizers.from_file import from_source, is_file, read_file
from mup_jax.optimizers.matrix import adamuon, matrix_optimizer, muon, shampoo, soap

OPTIMIZERS: dict[str, Callable[..., optax.GradientTransformationExtraArgs]] = {
    "adamw": adamw,
    "muon": muon,
    "shampoo": shampoo,
    "soap": soap,
    "adamuon": adamuon,
    "adopt": adopt,
    "lamb": lamb,
    "lion": lion,
    "sophia": sophia,
}


def find_optimizer(
    name: str, source: str = ""
) -> Callable[..., optax.GradientTransformationExtraArgs]:
    """The ready-made optimizer of this name, or that of a function in a file.

    Args:
      name: of `OPTIMIZERS`, or FILE.py:FUNCTION; see `from_file`.
      source: the text of that file; empty to read it.

    Raises:
      ValueError: there is no such optimizer, or something is wrong with the file.
    """
    if is_file(name):
        return from_source(name, source) if source else from_source(*read_file(name))
    if name not in OPTIMIZERS:
        raise ValueError(
            f"unknown optimizer {name!r}: choose one of {', '.join(OPTIMIZERS)}, or one of your "
            "own as FILE.py:FUNCTION"
        )
    return OPTIMIZERS[name]


__all__ = ["OPTIMIZERS", "Transfer", "find_optimizer", "matrix_optimizer", *OPTIMIZERS]
