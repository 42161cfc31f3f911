"""Times a sweep trained by one program beside the same runs one after another.

    python -m experiments.benchmark_sweep --output=results/benchmark_sweep.json

The runs are those of the CPU ladder's base rung: one optimizer, several learning rates and seeds.
Both ways begin in a process of their own that may use every core, and both compile all that they
need. The program exits with 1 where the sweep is not `--least` times as fast.
"""

import json
import multiprocessing
import pathlib
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import jax
import numpy as np
from absl import app, flags
from ml_collections import ConfigDict

from configs import ladder_cpu
from experiments.ladder.plan import Ladder, Rates, Series
from mup_jax import data
from mup_jax.training import train, train_vectorized

OPTIMIZER = flags.DEFINE_string("optimizer", "adamw", "One of the ladder's.")
RATES = flags.DEFINE_integer("rates", 9, "Learning rates, powers of two apart.", lower_bound=1)
SEEDS = flags.DEFINE_integer("seeds", 7, "Runs of each.", lower_bound=1)
LEAST = flags.DEFINE_float("least", 2.5, "Ratio of throughputs that is asked for.")
OUTPUT = flags.DEFINE_string("output", "", "JSON file to write.")

LOWEST_RATE = 2.5e-4


def sweep_configs(optimizer: str, rates: int, seeds: int) -> list[ConfigDict]:
    config = ladder_cpu.get_config()
    config.seeds = tuple(range(seeds))
    config.tuning_seeds = seeds
    ladder, series = Ladder(config), Series(optimizer)
    factor = ladder.grid(series).embedding_readout_factors[0]
    points = [Rates(LOWEST_RATE * 2**i, factor) for i in range(rates)]
    return [cell.config for cell in ladder.tuning_cells(series, points)]


def train_all(
    vectorized: bool, cores: int, configs: list[ConfigDict]
) -> tuple[float, list[float | None]]:
    """Seconds and validation losses of all runs, in a process that has not used JAX before."""
    jax.config.update("jax_platforms", "cpu")
    if vectorized:
        jax.config.update("jax_num_cpu_devices", cores)
    data.load("stdlib", "char")  # the text, before the clock starts
    with tempfile.TemporaryDirectory() as folder:
        folders = [pathlib.Path(folder) / str(i) for i in range(len(configs))]
        start = time.perf_counter()
        if vectorized:
            found = train_vectorized(configs, folders)
        else:
            found = [train(*run) for run in zip(configs, folders, strict=True)]
        seconds = time.perf_counter() - start
    return seconds, [result["validation_loss"] for result in found]


def main(_: Any) -> int:
    context = multiprocessing.get_context("spawn")
    configs = sweep_configs(OPTIMIZER.value, RATES.value, SEEDS.value)
    cores = multiprocessing.cpu_count()
    found = {}
    for vectorized in (False, True):
        with ProcessPoolExecutor(1, context) as process:
            found[vectorized] = process.submit(train_all, vectorized, cores, configs).result()
    (alone, losses), (together, same) = found[False], found[True]
    difference = np.abs(np.array(same, float) / np.array(losses, float) - 1)
    speedup = alone / together
    report = {
        "optimizer": OPTIMIZER.value,
        "runs": len(configs),
        "cores": cores,
        "seconds_one_after_another": alone,
        "seconds_vectorized": together,
        "speedup": speedup,
        "median_difference_of_losses": float(np.nanmedian(difference)),
    }
    print(f"{len(configs)} runs of {OPTIMIZER.value}: {alone:.1f} s one after another, "
          f"{together:.1f} s by one program, {speedup:.2f} times the throughput; losses "
          f"differ by {report['median_difference_of_losses']:.1e} (median)")  # fmt: skip
    if OUTPUT.value:
        pathlib.Path(OUTPUT.value).write_text(json.dumps(report, indent=1) + "\n")
    return int(speedup < LEAST.value)


if __name__ == "__main__":
    app.run(main)
