"""The files that a ladder ends with."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from experiments.cells.cell import FinishedCells, Results
from experiments.ladder.added import added
from experiments.ladder.plan import Ladder, Rates
from experiments.ladder.schedule import needed_parts
from mup_jax import analysis
from mup_jax.analysis import figures
from mup_jax.analysis.page import html_page
from mup_jax.training.files import read_lines, write_atomically

_RESULTS = "results.jsonl"


def read_results(ladder: Ladder, workdir: Path) -> list[dict[str, Any]]:
    """What has finished: from the folders of the cells, and where those are gone results.jsonl.

    Raises:
      ValueError: nothing has.
    """
    before = {line["cell"]: line for line in read_lines(workdir / _RESULTS)}
    now = result_lines(ladder, before | FinishedCells(workdir)())
    # What an added optimizer did while its file, or its options, were others is left out.
    own = added(ladder.config)
    lines = {name: line for name, line in before.items() if line["optimizer"] not in own}
    lines |= {line["cell"]: line for line in now}
    if not lines:
        raise ValueError(f"no cell in {workdir} has finished: run the ladder before its report")
    return _sorted(lines.values())


def result_lines(ladder: Ladder, results: Results) -> list[dict[str, Any]]:
    """A line for each finished cell of the ladder."""
    lines = [
        {
            "cell": cell.name,
            "rung": part.rung.name,
            "parametrization": part.series.parametrization,
            "is_tuning": part.is_tuning,
            **results[cell.name],
        }
        for part in needed_parts(ladder, results)
        for cell in part.cells
        if cell.name in results
    ]
    return _sorted(lines)


def _sorted(lines: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    of_series = ("parameters", "optimizer", "parametrization", "is_tuning")
    order = (*of_series, *Rates._fields, "weight_decay", "seed")
    older = {"is_tuning": False, "embedding_readout_factor": 1.0}  # lines of version 0.1
    return sorted(lines, key=lambda line: [(older | line)[key] for key in order])


def write_report(
    lines: Sequence[dict[str, Any]],
    workdir: Path,
    commands: Sequence[str] = (),
    *,
    with_figures: bool = True,
) -> str:
    """Writes results.jsonl, report.json, report.md, report.html and the figures.

    Args:
      lines: of `read_results`.
      workdir: an existing folder.
      commands: that give these results, for the page.
      with_figures: they take seconds, which a ladder that is under way does not have.

    Returns:
      The table as text.
    """
    write_atomically(workdir / _RESULTS, "".join(json.dumps(line) + "\n" for line in lines))
    report = analysis.summarize(lines)
    write_atomically(workdir / "report.json", json.dumps(report, indent=1) + "\n")
    paths = figures.write_figures(report, lines, workdir) if with_figures else []
    page = analysis.markdown(report, [path.name for path in paths], commands)
    write_atomically(workdir / "report.md", page)
    write_atomically(workdir / "report.html", html_page(page, workdir))
    return analysis.terminal_table(report)
