"""The files that a ladder ends with."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from experiments.cells.cell import FinishedCells, Results
from experiments.ladder.plan import Ladder
from experiments.ladder.schedule import needed_cells
from mup_jax import analysis
from mup_jax.analysis import figures
from mup_jax.analysis.page import html_page
from mup_jax.training.metrics import read_lines, write_atomically

_RESULTS = "results.jsonl"


def read_results(ladder: Ladder, workdir: Path) -> list[dict[str, Any]]:
    """What has finished: from the folders of the cells, and where those are gone results.jsonl.

    Raises:
      ValueError: nothing has.
    """
    lines = {line["cell"]: line for line in read_lines(workdir / _RESULTS)}
    lines |= {line["cell"]: line for line in result_lines(ladder, FinishedCells(workdir)())}
    if not lines:
        raise ValueError(f"no cell in {workdir} has finished: run the ladder before its report")
    return _sorted(lines.values())


def result_lines(ladder: Ladder, results: Results) -> list[dict[str, Any]]:
    """A line for each finished cell of the ladder."""
    lines = [
        {
            "cell": cell.name,
            "rung": rung.name,
            "parametrization": series.parametrization,
            **results[cell.name],
        }
        for rung, series, cells in needed_cells(ladder, results)
        for cell in cells
        if cell.name in results
    ]
    return _sorted(lines)


def _sorted(lines: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    order = ("parameters", "optimizer", "parametrization", "learning_rate", "weight_decay", "seed")
    return sorted(lines, key=lambda line: [line[key] for key in order])


def write_report(
    lines: Sequence[dict[str, Any]], workdir: Path, commands: Sequence[str] = ()
) -> str:
    """Writes results.jsonl, report.json, report.md, report.html and the figures.

    Args:
      lines: of `read_results`.
      workdir: an existing folder.
      commands: that give these results, for the page.

    Returns:
      The table as text.
    """
    write_atomically(workdir / _RESULTS, "".join(json.dumps(line) + "\n" for line in lines))
    report = analysis.summarize(lines)
    write_atomically(workdir / "report.json", json.dumps(report, indent=1) + "\n")
    paths = figures.write_figures(report, lines, workdir)
    page = analysis.markdown(report, [path.name for path in paths], commands)
    write_atomically(workdir / "report.md", page)
    write_atomically(workdir / "report.html", html_page(page, workdir))
    return analysis.terminal_table(report)
