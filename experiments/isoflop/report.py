"""The files that a comparison of widths at equal compute ends with."""

import json
from pathlib import Path
from typing import Any

from experiments.cells.cell import Results, without_machine
from experiments.isoflop.plan import IsoFlop, Model
from mup_jax.analysis.isoflop_figure import write_isoflop_figure
from mup_jax.analysis.isoflop_report import add_summaries, markdown
from mup_jax.training.files import write_atomically

# What of a run's record all runs have in common.
_PROVENANCE = ("device", "versions", "corpus")


def results_of(plan: IsoFlop, finished: Results) -> dict[str, Any]:
    """The losses of all models, what is the best of each budget, and where they come from.

    Raises:
      ValueError: none of the cells has finished.
    """
    optimizers = [
        {
            "optimizer": label,
            "budgets": [
                [_model(plan, model, label, finished) for model in of_budget]
                for of_budget in plan.models
            ],
        }
        for label in plan.config.optimizers
    ]
    if not finished:
        raise ValueError("no run has finished yet: start with --mode=run")
    any_result = next(iter(finished.values()))
    results = {
        "budgets": list(plan.config.budgets),
        "optimizers": optimizers,
        **{key: any_result[key] for key in _PROVENANCE},
        "config": without_machine(plan.config).to_dict(),
    }
    add_summaries(results)
    return results


def write_report(results: dict[str, Any], workdir: Path, command: str) -> None:
    """Writes results.json, report.md and figure.png."""
    write_atomically(workdir / "results.json", json.dumps(results, allow_nan=False) + "\n")
    write_isoflop_figure(results, workdir / "figure.png")
    write_atomically(workdir / "report.md", markdown(results, "figure.png", command))


def _model(plan: IsoFlop, model: Model, label: str, finished: Results) -> dict[str, Any]:
    cells = plan.cells(model, label)
    if any(cell.name not in finished for cell in cells):
        cells = []  # some seeds are not comparable with all
    return {
        **{key: getattr(model, key) for key in ("width", "parameters", "tokens", "steps")},
        "flops": model.flops,
        "tokens_per_parameter": model.tokens_per_parameter,
        "losses": [finished[cell.name]["validation_loss"] for cell in cells],
    }
