"""The files that a ladder ends with."""

import json
from pathlib import Path

from experiments.cells.cell import Results
from experiments.ladder.plan import rung_name
from mup_jax import analysis
from mup_jax.analysis import figures
from mup_jax.training.metrics import write_atomically


def write_report(results: Results, workdir: Path) -> str:
    """Writes results.jsonl, report.json, report.md and the figures; returns the table as text.

    Raises:
      ValueError: no cell has finished.
    """
    lines = [{"cell": name, "rung": rung_name(r["width"]), **r} for name, r in results.items()]
    order = ("parameters", "optimizer", "learning_rate", "seed")
    lines.sort(key=lambda line: [line[key] for key in order])
    write_atomically(workdir / "results.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
    report = analysis.summarize(lines)
    write_atomically(workdir / "report.json", json.dumps(report, indent=1) + "\n")
    paths = figures.write_figures(report, lines, workdir)
    write_atomically(workdir / "report.md", analysis.markdown(report, [p.name for p in paths]))
    return analysis.terminal_table(report)
