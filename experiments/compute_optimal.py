"""How many tokens per parameter are compute-optimal, and does that depend on the optimizer?

    python -m experiments.compute_optimal --config=configs/compute_optimal_cpu.py --workdir=DIR
        [--mode=MODE] [--launcher=LAUNCHER]

Models of several widths are trained with the same compute, for each optimizer and each of several
budgets; a parabola of the loss in log tokens per parameter has its lowest point at the best. MODE
is "run" (default: run what is missing, then report), "plan" (print the models) or "report" (of what
has finished). LAUNCHER is that of `experiments.scale_ladder`. DIR ends with report.md, results.json
and figure.png. Every run is trained once: started again, it goes on where it was interrupted.
"""

from pathlib import Path
from typing import Any

from absl import flags as absl_flags
from ml_collections import config_flags

from experiments import command
from experiments.cells.cell import FinishedCells, without_machine
from experiments.cells.run import LAUNCHERS, run_cells
from experiments.isoflop.plan import IsoFlop, describe, work_of
from experiments.isoflop.report import results_of, write_report
from mup_jax.analysis.isoflop_report import finding
from mup_jax.training import claim_workdir


def main(flags: Any) -> None:
    plan = IsoFlop(flags.config)
    if flags.mode in ("plan", "run"):
        print(describe(plan), flush=True)
    if flags.mode == "plan":
        return
    workdir = Path(flags.workdir).absolute()
    claim_workdir(workdir, without_machine(flags.config))
    if flags.mode == "run":
        run_cells(work_of(plan), workdir, flags.launcher)
    results = results_of(plan, FinishedCells(workdir)())
    config = config_flags.get_config_filename(absl_flags.FLAGS["config"])
    write_report(results, workdir, f"python -m experiments.compute_optimal --config={config}")
    print(finding(results))
    print(f"report.md, results.json and figure.png are in {flags.workdir}")


def define_flags() -> None:
    absl_flags.DEFINE_enum("mode", "run", ["run", "plan", "report"], "What to do.")
    absl_flags.DEFINE_enum("launcher", "local", list(LAUNCHERS), "Where cells run.")


if __name__ == "__main__":
    command.run(
        main,
        config="configs/compute_optimal_cpu.py",
        workdir="runs/compute_optimal_cpu",
        define_flags=define_flags,
    )
