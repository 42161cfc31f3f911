"""Part (d): compile and run times of the matrix functions alone, on blocks as optimizers have.

Those of whole optimizers and of training steps stand in the tables of the other parts.
"""

import functools
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp

from experiments.accelerator.report import COMPILER, number
from experiments.accelerator.session import Case, Part, Row
from experiments.accelerator.timing import time_steps
from experiments.optimizer_cases import compile_program
from mup_jax.transforms.linalg import (
    eigenbasis,
    inverse_root,
    matmul,
    orthogonalize,
    refine_eigenbasis,
)

# Matrices in a batch, and their side.
_SIZES = {"full": (64, 512), "tiny": (2, 16)}
_STEPS = 5


def _root(x: jax.Array) -> jax.Array:
    return inverse_root(x, jnp.zeros_like(x), 0.5, eps=1e-5, relative_eps=True)


def _refined(x: jax.Array) -> jax.Array:
    return refine_eigenbasis(x, jnp.zeros_like(x) + jnp.eye(x.shape[-1]))


_FUNCTIONS: dict[str, tuple[float, Callable[[jax.Array], jax.Array]]] = {
    "product": (3, lambda x: x @ x),
    "product in full float32": (3, lambda x: matmul(x, x)),
    "refine_eigenbasis": (6, _refined),
    "inverse_root": (8, _root),
    "eigenbasis": (8, eigenbasis),
    "orthogonalize": (5, orthogonalize),
    "orthogonalize, svd": (30, functools.partial(orthogonalize, method="svd")),
}


def part(scale: str) -> Part:
    """The part at the scale "full" or "tiny"."""
    count, side = _SIZES[scale]
    return Part(
        "compilation",
        f"Functions of {count} matrices {side} x {side}",
        share=0.05,
        cases=[
            Case(name, seconds, functools.partial(_measure, function, count, side))
            for name, (seconds, function) in _FUNCTIONS.items()
        ],
        columns=[
            number("one call, ms", "step_ms", "{:.2f}"),
            number("temporary, MB", "temporary_megabytes", "{:.0f}"),
            *COMPILER,
        ],
    )


def _measure(function: Callable[[jax.Array], jax.Array], count: int, side: int, _: float) -> Row:
    # Statistics with eigenvalues between 1 and those of noise, as in training.
    shape = (count, side, 2 * side)
    wide = jax.random.normal(jax.random.key(0), shape) * jnp.arange(1, 2 * side + 1) ** -1.0
    statistics = matmul(wide, wide.mT)
    start = time.perf_counter()
    lowered = jax.jit(function).lower(statistics)
    call, facts = compile_program(lowered, time.perf_counter() - start)
    times, _ = time_steps(lambda _: call(statistics), None, steps=_STEPS, patience=1.0)
    return facts | times
