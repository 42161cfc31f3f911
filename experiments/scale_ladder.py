"""How much compute does each optimizer save over AdamW, and does the tuned learning rate transfer?

    python -m experiments.scale_ladder --config=configs/ladder_cpu.py --workdir=DIR
        [--add=my_optimizer.py:make] [--mode=MODE] [--launcher=LAUNCHER] [--topology=TOPOLOGY]

MODE is "run" (default: run what is missing, then report), "plan" (print rungs, FLOPs, factors of
the parametrizations, and an estimate of the time here), "status" or "report" (of what has finished,
or of a results.jsonl alone). With a TOPOLOGY like v5e:8x8 a plan compiles every rung for that TPU
slice instead, which need not be there (JAX_PLATFORMS=cpu, and libtpu from `pip install
'jax[tpu]'`), and says which fit and with which mesh. LAUNCHER is "local" (default: processes of
this machine) or "ray" (tasks of a Ray cluster, whose nodes share the file system of DIR). Every
cell is trained once; started again, a ladder goes on where it was interrupted. DIR ends with
results.jsonl, report.json, report.md and figures.

With --add the function `make` of a file is one of the optimizers, `config.optimizers.my_optimizer`;
several are given one after the other, or with commas. What the others have trained in DIR stays,
and of a file that has changed all cells are new. See `mup_jax.optimizers.from_file`.
"""

import sys
from pathlib import Path
from typing import Any

from absl import flags as absl_flags
from ml_collections import config_flags

from experiments import command
from experiments.cells.cell import Results, without_machine
from experiments.cells.run import LAUNCHERS, run_cells
from experiments.ladder.added import amend, without_added
from experiments.ladder.describe import describe, describe_scaling, estimate
from experiments.ladder.fit import FOOTNOTE, fit, heading, line
from experiments.ladder.plan import Ladder
from experiments.ladder.report import read_results, result_lines, write_report
from experiments.ladder.schedule import work_of
from experiments.ladder.status import status
from experiments.topologies import Topology, find_topology
from mup_jax.training import claim_workdir


def main(flags: Any) -> None:
    ladder = Ladder(flags.config)
    workdir = Path(flags.workdir).absolute()
    if flags.mode == "plan":
        print(describe(ladder))
        if flags.topology:
            _print_fit(ladder, find_topology(flags.topology))
        else:
            print(f"\n{describe_scaling(ladder)}\n", flush=True)
            print(estimate(ladder))
        return
    if flags.mode == "status" and not (workdir / "config.json").exists():
        raise ValueError(f"no ladder was begun in {workdir}: start it with --mode=run")
    if flags.mode in ("run", "status"):
        claim_workdir(workdir, without_added(without_machine(flags.config)))
    if flags.mode == "status":
        print(status(ladder, workdir))
        return
    if flags.mode == "run":
        print(describe(ladder), flush=True)
        show = lambda results: _show_so_far(ladder, workdir, results)
        run_cells(work_of(ladder), workdir, flags.launcher, show)
    config = config_flags.get_config_filename(absl_flags.FLAGS["config"])
    overrides = [x for x in sys.argv[1:] if x.startswith(("--config.", "--add="))]
    parts = f"python -m experiments.scale_ladder --config={config} --workdir=DIR", *overrides
    command = " ".join(parts)
    commands = command, f"{command} --mode=report"
    print(write_report(read_results(ladder, workdir), workdir, commands))
    print(f"report.md, report.html, results.jsonl and figures are in {flags.workdir}")


def _show_so_far(ladder: Ladder, workdir: Path, results: Results) -> None:
    """The table, and all files but the figures, as soon as there is something to compare."""
    lines = result_lines(ladder, results)
    if len({line["optimizer"] for line in lines if not line["is_tuning"]}) > 1:
        print(write_report(lines, workdir, with_figures=False), flush=True)


def _print_fit(ladder: Ladder, topology: Topology) -> None:
    print(f"\n{heading(topology)}")
    adamw: dict[str, Any] = {}
    for row in fit(ladder, topology):
        adamw = row if row["optimizer"] == "adamw" else adamw
        print(line(row, adamw), flush=True)
    print(FOOTNOTE)


def define_flags() -> None:
    absl_flags.DEFINE_enum("mode", "run", ["run", "plan", "status", "report"], "What to do.")
    absl_flags.DEFINE_string(
        "topology",
        "",
        "What to plan for: a TPU slice like v5e:8x8, or hosts of GPUs like h100:2x8.",
    )
    absl_flags.DEFINE_multi_string("add", [], "FILE.py:FUNCTION of an optimizer of your own.")
    absl_flags.DEFINE_enum("launcher", "local", list(LAUNCHERS), "Where cells run.")


def run() -> None:
    command.run(
        main,
        config="configs/ladder_cpu.py",
        workdir="runs/ladder_cpu",
        define_flags=define_flags,
        amend=amend,
    )


if __name__ == "__main__":
    run()
