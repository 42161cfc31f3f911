"""How much compute does each optimizer save over AdamW, and does the tuned learning rate transfer?

    python -m experiments.scale_ladder --config=configs/ladder_cpu.py --workdir=DIR [--mode=MODE]

MODE is "run" (default: run what is missing, then report), "plan" (print the cells), "status" or
"report" (of what has finished). Every cell is trained once; started again, a ladder goes on where
it was interrupted. DIR ends with results.jsonl, report.json, report.md and figures.
"""

from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import ConfigDict

from experiments import command
from experiments.cells.cell import FinishedCells
from experiments.cells.run import run_cells
from experiments.ladder.plan import Ladder, default_ladder, describe
from experiments.ladder.report import write_report
from experiments.ladder.schedule import missing_tasks, work_of
from mup_jax.training import claim_workdir


def main(flags: Any) -> None:
    ladder = Ladder(flags.config)
    workdir = Path(flags.workdir).absolute()
    if flags.mode == "plan":
        print(describe(ladder))
        return
    # Which machine runs a cell does not change its result.
    machine = {"workers": default_ladder().workers, "platform": default_ladder().platform}
    claim_workdir(workdir, ConfigDict({**flags.config, **machine}))
    if flags.mode == "status":
        results = FinishedCells(workdir)()
        tasks = missing_tasks(ladder, results)
        print(f"{len(results)} cells have finished; {sum(len(t.cells) for t in tasks)} can run now")
        return
    if flags.mode == "run":
        print(describe(ladder), flush=True)
        run_cells(work_of(ladder), workdir)
    print(write_report(FinishedCells(workdir)(), workdir))
    print(f"report.md, report.json, results.jsonl and figures are in {flags.workdir}")


def define_flags() -> None:
    flags.DEFINE_enum("mode", "run", ["run", "plan", "status", "report"], "What to do.")


if __name__ == "__main__":
    command.run(
        main,
        config="configs/ladder_cpu.py",
        workdir="runs/ladder_cpu",
        define_flags=define_flags,
    )
