"""What a ladder has to run next, given what has finished: no processes, no files."""

import math
import statistics
from collections.abc import Iterator

from experiments.cells.cell import Cell, Results, Task, Work
from experiments.ladder.plan import Grid, Ladder, Part, Rates, Series
from mup_jax.analysis.transfer import parabola_minimum

# Of those of the two smallest rungs there is a first result, optimizer by optimizer; then all of
# one rung before those of the next.
_FIRST_RUNGS = 2


def mean_loss(cells: list[Cell], results: Results) -> float:
    """Mean validation loss of finished cells; infinite where one diverged."""
    losses = [results[cell.name]["validation_loss"] for cell in cells]
    return math.inf if None in losses else statistics.fmean(losses)


def tune(ladder: Ladder, series: Series, results: Results) -> tuple[list[Cell], Rates | None]:
    """All tuning cells known to be needed and, once they have finished, the tuned rates.

    While the best pair stands at an edge, the grid grows on that side. Nothing is tuned where all
    diverged: nothing of the series is transferred then, and the report says so.
    """
    series = series.tuned
    grid = ladder.grid(series)
    if len(grid.points) == 1:
        return [], grid.points[0]
    for extensions_left in range(ladder.config.max_extensions, -1, -1):
        cells = ladder.tuning_cells(series, grid.points)
        if any(cell.name not in results for cell in cells):
            return cells, None
        loss = _losses(ladder, series, grid, results)
        best = min(loss, key=loss.__getitem__)
        if loss[best] == math.inf:
            return cells, None
        wider = grid.around(best)
        if wider == grid or not extensions_left:
            break
        grid = wider
    # Three digits: no processor has others, and more are not known.
    return cells, Rates(*(float(f"{x:.3g}") for x in parabola_minimum(loss)))


def _losses(ladder: Ladder, series: Series, grid: Grid, results: Results) -> dict[Rates, float]:
    return {
        point: mean_loss(ladder.tuning_cells(series, [point]), results) for point in grid.points
    }


def missing_tasks(ladder: Ladder, results: Results) -> list[Task]:
    """The tasks that can run now, the most urgent first."""
    rungs, series = ladder.rungs, ladder.series
    found: list[tuple[tuple[float, ...], Task]] = []
    for part in needed_parts(ladder, results):
        missing = [cell for cell in part.cells if cell.name not in results]
        if missing:
            rung, place = rungs.index(part.rung), series.index(part.series)
            is_first = rung < _FIRST_RUNGS
            # Where results of a rung are all that is left, the longest task goes first.
            urgency = (0, place, rung) if is_first else (1, rung, -part.rung.flops * len(missing))
            vectorized = part.is_tuning and ladder.config.vectorized
            found.append((urgency, Task(part.rung.name, _name(part), missing, vectorized)))
    return [task for _, task in sorted(found, key=lambda pair: pair[0])]


def _name(part: Part) -> str:
    return f"{part.series.name}, tuning" if part.is_tuning else part.series.name


def needed_parts(ladder: Ladder, results: Results) -> Iterator[Part]:
    """All cells known to be needed, finished or not; those at the base once for all that share."""
    for series in ladder.series:
        cells, rates = tune(ladder, series, results)
        alone = series == series.tuned
        if alone and cells:
            yield Part(ladder.rungs[0], series, cells, True)
        if rates is not None:
            for rung in ladder.rungs if alone else ladder.rungs[1:]:
                yield Part(rung, series, ladder.cells(rung, series, rates), False)


def remaining_cells(ladder: Ladder, results: Results) -> dict[tuple[str, str], int]:
    """How many cells of each rung and task have not finished.

    Counts what a series that is not tuned yet will need.
    """
    parts = list(needed_parts(ladder, results))
    for series in ladder.series:
        cells, rates = tune(ladder, series, results)
        if rates is None and any(cell.name not in results for cell in cells):
            first = ladder.grid(series).points[0]
            for rung in ladder.rungs if series == series.tuned else ladder.rungs[1:]:
                parts.append(Part(rung, series, ladder.cells(rung, series, first), False))
    return {
        (part.rung.name, _name(part)): sum(cell.name not in results for cell in part.cells)
        for part in parts
    }


def work_of(ladder: Ladder) -> Work:
    """The whole ladder, for `run_cells`."""
    return Work(
        missing_tasks=lambda results: missing_tasks(ladder, results),
        remaining_cells=lambda results: remaining_cells(ladder, results),
        flops={rung.name: rung.flops for rung in ladder.rungs},
        workers=ladder.config.workers,
        platform=ladder.config.platform,
    )
