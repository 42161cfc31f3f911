"""What the entry points of all sweeps share: run what is missing, then report."""

import json
from pathlib import Path
from typing import Any

from absl import flags as absl_flags
from ml_collections import config_flags

from experiments import command
from experiments.cells.cell import Results, without_machine
from experiments.cells.run import LAUNCHERS, run_cells
from experiments.sweeps.plan import Sweep, describe
from experiments.sweeps.schedule import needed_cells, work_of
from mup_jax.analysis.batch_figure import write_batch_figure
from mup_jax.analysis.sweep_figure import write_sweep_figure
from mup_jax.analysis.sweeps import (
    BATCH_FIGURE,
    add_summaries,
    finding,
    is_of_batches,
    markdown,
)
from mup_jax.training import claim_workdir
from mup_jax.training.files import write_atomically

# What of a run's record all runs of a sweep have in common.
_PROVENANCE = ("device", "versions", "corpus")
_RESULTS = "results.json"


def main(name: str, title: str) -> None:
    """The program `python -m experiments.{name}`, which answers the question `title`."""

    def run(flags: Any) -> None:
        workdir = Path(flags.workdir).absolute()
        if flags.mode == "report":
            results = json.loads((workdir / _RESULTS).read_text())
            add_summaries(results)
        else:
            sweep = Sweep(flags.config)
            print(describe(sweep), flush=True)
            if flags.mode == "plan":
                return
            claim_workdir(workdir, without_machine(flags.config))
            results = results_of(sweep, run_cells(work_of(sweep), workdir, flags.launcher))
        config = config_flags.get_config_filename(absl_flags.FLAGS["config"])
        write_report(results, workdir, title, f"python -m experiments.{name} --config={config}")
        print(finding(results))
        print(f"report.md, results.json and figure.png are in {flags.workdir}")

    command.run(
        run,
        config=f"configs/{name}_cpu.py",
        workdir=f"runs/{name}_cpu",
        define_flags=_define_flags,
    )


def _define_flags() -> None:
    absl_flags.DEFINE_enum("mode", "run", ["run", "plan", "report"], "What to do.")
    absl_flags.DEFINE_enum("launcher", "local", list(LAUNCHERS), "Where cells run.")


def results_of(sweep: Sweep, finished: Results) -> dict[str, Any]:
    """The losses of all curves, what they say of the transfer, and where they come from."""
    curves = []
    for curve in sweep.curves:
        points = {}
        for size, cells in needed_cells(sweep, curve, finished).items():
            losses: dict[float, list[float | None]] = {}
            for cell in cells:
                value = cell.config.optimizer[sweep.config.swept]
                losses.setdefault(value, []).append(finished[cell.name]["validation_loss"])
            points[str(size)] = sorted([value, list(of)] for value, of in losses.items())
        curves.append({"optimizer": curve.optimizer, "variant": curve.variant, "points": points})
    any_result = next(iter(finished.values()))
    results = {
        "swept": sweep.config.swept,
        "vary": sweep.config.vary,
        "sizes": list(sweep.sizes),
        "carried": sweep.config.carried.to_dict(),
        "curves": curves,
        **{key: any_result[key] for key in _PROVENANCE},
        "config": without_machine(sweep.config).to_dict(),
    }
    add_summaries(results)
    return results


def write_report(results: dict[str, Any], workdir: Path, title: str, command: str) -> None:
    """Writes results.json, report.md and figure.png, and of batch sizes batches.png."""
    write_atomically(workdir / _RESULTS, json.dumps(results) + "\n")
    write_sweep_figure(results, workdir / "figure.png")
    if is_of_batches(results):
        write_batch_figure(results, workdir / BATCH_FIGURE)
    write_atomically(workdir / "report.md", markdown(results, title, "figure.png", command))
