"""Notes in a program for `mup_jax.training.flops`, which counts operations without running it."""

from collections.abc import Callable
from typing import Any

import jax

_PREFIX = "counted_times_"


def counted(times: float, function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, which runs so often per step: a loop's body, or a branch taken now and then."""

    def noted(*args: Any) -> Any:
        return function(*args)

    noted.__name__ = f"{_PREFIX}{times}"
    return jax.jit(noted)


def times_of(name: str) -> float:
    """How often a function of this name in a program counts: once, where nothing is noted."""
    return float(name.removeprefix(_PREFIX)) if name.startswith(_PREFIX) else 1.0
