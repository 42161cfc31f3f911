"""How far a ladder is, whoever works on it."""

from pathlib import Path

from experiments.cells.cell import FinishedCells, folder_of
from experiments.cells.claims import Claims
from experiments.ladder.describe import aligned
from experiments.ladder.plan import Ladder
from experiments.ladder.schedule import needed_parts, remaining_cells


def status(ladder: Ladder, workdir: Path) -> str:
    """Cells of each rung that have finished, are claimed by a worker, or are left.

    A claim counts until it has stood still for some minutes, which one look cannot tell: of a
    machine that is gone it may be an old one.
    """
    results, claims = FinishedCells(workdir)(), Claims()
    remaining, finished, claimed = ({rung.name: 0 for rung in ladder.rungs} for _ in range(3))
    for (rung, _), count in remaining_cells(ladder, results).items():
        remaining[rung] += count
    for part in needed_parts(ladder, results):
        for cell in part.cells:
            if cell.name in results:
                finished[part.rung.name] += 1
            elif claims.next_number(folder_of(cell, workdir)) is None:
                claimed[part.rung.name] += 1
    counts: dict[str, tuple[int, ...]] = {
        rung: (finished[rung], claimed[rung], left - claimed[rung])
        for rung, left in remaining.items()
    }
    counts["all"] = tuple(map(sum, zip(*counts.values(), strict=True)))
    rows = [[rung, *map(str, of_rung)] for rung, of_rung in counts.items()]
    return aligned([["rung", "finished", "claimed", "left"], *rows])
