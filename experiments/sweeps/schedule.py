"""Which values of a sweep to try next, given what has finished: no processes, no files."""

import math
import statistics

from experiments.cells.cell import Cell, Results, Task, Work
from experiments.sweeps.plan import Curve, Sweep


def tried(sweep: Sweep, curve: Curve, results: Results) -> tuple[dict[int, list[int]], bool]:
    """Powers of the step that are known to be needed, by size, and whether that is all.

    Sizes come one after another, because a size begins where the one before had its best.
    """
    config = sweep.config
    grid = range(-config.reach, config.reach + 1)
    needed: dict[int, list[int]] = {}
    first_best = before = 0
    for size in sweep.sizes:
        powers = set(grid)
        if config.follow and size != sweep.sizes[0]:
            ratio = math.log(size / sweep.sizes[0], config.step)
            carried = {first_best + round(a * ratio) for a in config.carried.values()}
            powers = {before - 1, before, before + 1} | carried
        extensions = config.max_extensions if config.follow else 0
        while True:
            needed[size] = sorted(powers)
            losses = {p: _mean_loss(sweep, curve, size, p, results) for p in needed[size]}
            known = {power: loss for power, loss in losses.items() if loss is not None}
            if len(known) < len(losses):
                return needed, False
            best = min(known, key=known.__getitem__)
            missing = {best - 1, best + 1} - powers
            if not missing or not extensions:
                break
            powers |= missing
            extensions -= 1
        if size == sweep.sizes[0]:
            first_best = best
        before = best
    return needed, True


def needed_cells(sweep: Sweep, curve: Curve, results: Results) -> dict[int, list[Cell]]:
    """The cells known to be needed, by size."""
    needed, _ = tried(sweep, curve, results)
    return {
        size: [
            cell
            for value in [sweep.value(curve, power) for power in powers] + list(sweep.config.also)
            for cell in sweep.cells(curve, size, value)
        ]
        for size, powers in needed.items()
    }


def missing_tasks(sweep: Sweep, results: Results) -> list[Task]:
    """The tasks that can run now; those first that have the most to follow them."""
    tasks = []
    for curve in sweep.curves:
        for size, cells in needed_cells(sweep, curve, results).items():
            missing = [cell for cell in cells if cell.name not in results]
            if missing:
                name = sweep.size_name(size)
                tasks.append(Task(name, curve.name, missing, sweep.config.vectorized))
    return sorted(tasks, key=lambda task: sweep.flops[task.size])


def remaining_cells(sweep: Sweep, results: Results) -> dict[tuple[str, str], int]:
    """How many cells of each size and curve have not finished; a guess for sizes not begun."""
    counts = {}
    config = sweep.config
    at_least = (3 + len(config.also)) * len(config.seeds)
    for curve in sweep.curves:
        needed = needed_cells(sweep, curve, results)
        for size in sweep.sizes:
            missing = sum(cell.name not in results for cell in needed.get(size, ()))
            counts[sweep.size_name(size), curve.name] = missing if size in needed else at_least
    return counts


def work_of(sweep: Sweep) -> Work:
    """The whole sweep, for `run_cells`."""
    return Work(
        missing_tasks=lambda results: missing_tasks(sweep, results),
        remaining_cells=lambda results: remaining_cells(sweep, results),
        flops=sweep.flops,
        workers=sweep.config.workers,
        platform=sweep.config.platform,
    )


def _mean_loss(sweep: Sweep, curve: Curve, size: int, power: int, results: Results) -> float | None:
    """Infinite where a seed diverged, None where one has not finished."""
    cells = sweep.cells(curve, size, sweep.value(curve, power))
    if any(cell.name not in results for cell in cells):
        return None
    losses = [results[cell.name]["validation_loss"] for cell in cells]
    return math.inf if None in losses else statistics.fmean(losses)
