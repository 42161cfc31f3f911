"""Times of steps that are given to a device one after another."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import jax

_MOST_REPEATS = 7


def time_steps(
    advance: Callable[[Any], Any],
    state: Any,
    *,
    steps: int,
    warm_up: int = 2,
    patience: float = 4.0,
    wait: Callable[[Any], Any] = jax.block_until_ready,
) -> tuple[dict[str, float], Any]:
    """Milliseconds of a step, and the last state.

    Accelerators run behind the program that feeds them, so `steps` are given to them at once and
    waited for at the end, as a training loop does; of several such times the median counts. What
    single steps take, waited for one by one, shows those that refresh more than others.

    Args:
      advance: from a state to the next; may donate it.
      state: the first.
      steps: given at once; also so many single ones.
      warm_up: steps before.
      patience: seconds for all that are given at once; where `steps` take longer one by one, their
        mean counts.
      wait: until a state is there.

    Returns:
      "step_ms", and of single steps "single_ms" (median) and "worst_ms".
    """
    for _ in range(warm_up):
        state = advance(state)
        wait(state)
    single = []
    for _ in range(steps):
        start = time.perf_counter()
        state = advance(state)
        wait(state)
        single.append(time.perf_counter() - start)
    together = []
    for _ in range(min(int(patience / sum(single)), _MOST_REPEATS)):
        start = time.perf_counter()
        for _ in range(steps):
            state = advance(state)
        wait(state)
        together.append((time.perf_counter() - start) / steps)
    return {
        "step_ms": 1e3 * statistics.median(together or [statistics.mean(single)]),
        "single_ms": 1e3 * statistics.median(single),
        "worst_ms": 1e3 * max(single),
    }, state
