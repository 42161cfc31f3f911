"""What Shampoo and SOAP share: cuts of a matrix, sides that are kept, when and how to refresh."""

from collections.abc import Callable

import numpy as np

Refresh = Callable[[int, int], bool]


def every(frequency: int, exact_steps: int = 1) -> Refresh:
    """A schedule `refresh(step, block_index)`, steps from 0: all blocks on the same one."""
    before = early(frequency, exact_steps)
    return lambda step, block: step % frequency == 0 or before(step, block)


def early(frequency: int, exact_steps: int) -> Refresh:
    """All blocks at intervals of 1, 2, ..., `frequency` steps, each for `exact_steps` steps."""
    steps = {
        step
        for interval in range(1, frequency + 1)
        for step in range((interval - 1) * exact_steps, interval * exact_steps)
        if step % interval == 0
    }
    return lambda step, block: step in steps


def kept_sides(
    shape: tuple[int, int], sides: str, max_preconditioner_dim: int
) -> tuple[bool, bool]:
    """Whether the in side and the out side have a factor."""
    d_in, d_out = shape
    return (
        sides in ("both", "in") and d_in <= max_preconditioner_dim,
        sides in ("both", "out") and d_out <= max_preconditioner_dim,
    )


def cut(
    shape: tuple[int, int], kept: tuple[bool, bool], block_size: int
) -> list[tuple[slice, slice]]:
    """Blocks row by row, the last of a side smaller; a side without a factor is not cut."""
    d_in, d_out = shape
    b_in = block_size if kept[0] else d_in
    b_out = block_size if kept[1] else d_out
    return [
        (slice(i, min(i + b_in, d_in)), slice(j, min(j + b_out, d_out)))
        for i in range(0, d_in, b_in)
        for j in range(0, d_out, b_out)
    ]


def next_basis(P: np.ndarray, Q: np.ndarray, *, exact: bool) -> np.ndarray:
    """The eigenvectors of P, or a power step towards them from Q with its columns by size."""
    if exact:
        return np.linalg.eigh(P)[1]
    by_size = np.argsort(-np.diag(Q.T @ P @ Q), kind="stable")
    return np.linalg.qr(P @ Q[:, by_size])[0]
