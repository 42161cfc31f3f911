"""Checks of the options of transformations, where these are made."""

from typing import Any

import jax


def check_static(**options: Any) -> None:
    """Refuses what shapes the program and is traced, as `optax.inject_hyperparams` does to numbers.

    Raises:
      ValueError: an option is an array.
    """
    for name, value in options.items():
        if isinstance(value, jax.Array):
            names = ", ".join(map(repr, options))
            raise ValueError(
                f"{name} shapes the program and cannot be an array: with optax.inject_hyperparams "
                f"say static_args=({names})"
            )


def check_preconditioner(*, precondition_frequency: int, exact_steps: int, **options: Any) -> None:
    """As `check_static`, of what says which blocks are refreshed when, and their numbers of steps.

    Raises:
      ValueError: an option is an array, or a number of steps is not positive.
    """
    steps = {"precondition_frequency": precondition_frequency, "exact_steps": exact_steps}
    check_static(**steps, **options)
    check_steps(**steps)


def check_decays(**options: Any) -> None:
    """Refuses factors of moving averages outside [0, 1); traced ones pass.

    Raises:
      ValueError: of the first of them.
    """
    _check(lambda value: 0 <= value < 1, "choose one in [0, 1)", options)


def check_not_negative(**options: Any) -> None:
    """As `check_decays`, of what may be zero."""
    _check(lambda value: 0 <= value < float("inf"), "give a finite value, at least 0", options)


def check_positive(**options: Any) -> None:
    """As `check_decays`, of what may not."""
    _check(lambda value: 0 < value < float("inf"), "give a finite value above 0", options)


def check_steps(**options: int) -> None:
    """As `check_decays`, of numbers of steps."""
    _check(lambda value: value >= 1, "give a positive number of steps", options)


def _check(is_valid: Any, remedy: str, options: dict[str, Any]) -> None:
    for name, value in options.items():
        if not isinstance(value, jax.Array) and not is_valid(value):
            raise ValueError(f"{name}={value!r}: {remedy}")
