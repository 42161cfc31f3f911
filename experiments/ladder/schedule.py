"""What a ladder has to run next, given what has finished: no processes, no files."""

import math
import statistics
from collections.abc import Iterator

from experiments.cells.cell import Cell, Results, Task, Work
from experiments.ladder.plan import GRID_STEP, Ladder, Rung, Series


def mean_loss(cells: list[Cell], results: Results) -> float:
    """Mean validation loss of finished cells; infinite where one diverged."""
    losses = [results[cell.name]["validation_loss"] for cell in cells]
    return math.inf if None in losses else statistics.fmean(losses)


def tune(ladder: Ladder, series: Series, results: Results) -> tuple[list[Cell], float | None]:
    """All tuning cells known to be needed and, once they have finished, the best learning rate.

    While the best stands at an edge, the grid grows by one learning rate on that side. There is no
    best where all diverged: nothing of the series is transferred then, and the report says so.
    """
    series = series.tuned
    rates = ladder.learning_rates(series)
    for extensions_left in range(ladder.config.max_extensions, -1, -1):
        cells = ladder.tuning_cells(series, rates)
        if any(cell.name not in results for cell in cells):
            return cells, None
        loss = {rate: mean_loss(ladder.tuning_cells(series, [rate]), results) for rate in rates}
        best = min(rates, key=loss.__getitem__)
        if loss[best] == math.inf:
            return cells, None
        if not extensions_left or rates[0] < best < rates[-1]:
            break
        if best == rates[0]:
            rates.insert(0, best / GRID_STEP)
        else:
            rates.append(best * GRID_STEP)
    return cells, best


def missing_tasks(ladder: Ladder, results: Results) -> list[Task]:
    """The tasks that can run now: tuning first, then the longest."""
    tasks = []
    for rung, series, cells in needed_cells(ladder, results):
        missing = [cell for cell in cells if cell.name not in results]
        if missing:
            vectorized = rung == ladder.rungs[0] and ladder.config.vectorized
            flops = rung.flops * len(missing)
            tasks.append(Task(rung.name, series.name, missing, flops, vectorized))
    is_tuning = lambda task: task.size == ladder.rungs[0].name
    return sorted(tasks, key=lambda task: (not is_tuning(task), -task.flops))


def needed_cells(ladder: Ladder, results: Results) -> Iterator[tuple[Rung, Series, list[Cell]]]:
    """All cells known to be needed, finished or not; those at the base once for all that share."""
    for series in ladder.series:
        cells, best = tune(ladder, series, results)
        if series == series.tuned:
            yield ladder.rungs[0], series, cells
        if best is not None:
            for rung in ladder.rungs[1:]:
                yield rung, series, ladder.transfer_cells(rung, series, best)


def remaining_cells(ladder: Ladder, results: Results) -> dict[str, int]:
    """How many cells of each rung have not finished.

    Counts what an optimizer that is not tuned yet will need at the larger rungs.
    """
    counts = dict.fromkeys((rung.name for rung in ladder.rungs), 0)
    for task in missing_tasks(ladder, results):
        counts[task.size] += len(task.cells)
    for series in ladder.series:
        cells, best = tune(ladder, series, results)
        if best is None and any(cell.name not in results for cell in cells):
            for rung in ladder.rungs[1:]:
                counts[rung.name] += len(ladder.transfer_cells(rung, series, 1.0))
    return counts


def work_of(ladder: Ladder) -> Work:
    """The whole ladder, for `run_cells`."""
    return Work(
        missing_tasks=lambda results: missing_tasks(ladder, results),
        remaining_cells=lambda results: remaining_cells(ladder, results),
        flops={rung.name: rung.flops for rung in ladder.rungs},
        workers=ladder.config.workers,
        platform=ladder.config.platform,
    )
