"""Times the matrix optimizers beside Optax's Adam and Muon, on the same gradients in one process.

    python -m experiments.benchmark_optimizers --output=results/benchmark_optimizers.json

The parameters are those of a Llama's layers (--layers=8 --width=256: four D x D matrices and three
of D x 4D a layer), either stacked over the layers or as separate leaves. Steps of all optimizers
take turns, so that whatever else the machine does falls on all of them. Times are worth their
ratio to Optax's Muon of the same parameters; what does not depend on the machine (floats of state,
FLOPs, lines of the compiled program) stands beside them.
"""

import json
import pathlib
import statistics
import time
from typing import Any

import jax
import numpy as np
import optax
from absl import app, flags

from experiments.optimizer_cases import (
    REFERENCE,
    Case,
    compile_update,
    gradients,
    optimizer_cases,
    orthogonality_error,
)

LAYERS = flags.DEFINE_integer("layers", 8, "Layers of the model.", lower_bound=1)
WIDTH = flags.DEFINE_integer("width", 256, "Width D of the model.", lower_bound=8)
STEPS = flags.DEFINE_integer("steps", 30, "Measured steps of each optimizer.", lower_bound=2)
ONLY = flags.DEFINE_list("only", [], "Names of the optimizers to run beside Optax's Muon; or all.")
OUTPUT = flags.DEFINE_string("output", "", "JSON file to write.")

WARM_UP = 3
INPUTS = 4


class Measured:
    """An optimizer, compiled, and how long each of its steps took."""

    def __init__(self, case: Case, inputs: list[Any]) -> None:
        self._step, self._state, facts = compile_update(case.transformation, inputs[0])
        self.compile_seconds = facts["lower_seconds"] + facts["compile_seconds"]
        kept = ("state_floats", "gflops", "temporary_megabytes", "program_lines")
        self.facts = {key: facts[key] for key in kept if key in facts}
        self._inputs, self._count = inputs, 0
        self.seconds: list[float] = []
        self.updates: Any = None

    def step(self) -> None:
        gradient = self._inputs[self._count % len(self._inputs)]
        start = time.perf_counter()
        self.updates, self._state = jax.block_until_ready(self._step(gradient, self._state))
        self.seconds.append(time.perf_counter() - start)
        self._count += 1


def measure(cases: dict[str, Case], steps: int) -> dict[str, dict[str, float]]:
    """Runs all cases, a step of each in turn, and returns a row for each."""
    kinds = {(case.layout, case.dtype) for case in cases.values()}
    inputs = {
        (layout, dtype): gradients(LAYERS.value, WIDTH.value, layout, INPUTS, dtype)
        for layout, dtype in kinds
    }
    measured = {
        name: Measured(case, inputs[case.layout, case.dtype]) for name, case in cases.items()
    }
    for _ in range(WARM_UP + steps):
        for one in measured.values():
            one.step()
    rows = {}
    for name, one in measured.items():
        peer = measured[REFERENCE + (", separate" if cases[name].layout == "separate" else "")]
        unit = statistics.median(peer.seconds[WARM_UP:])
        seconds = one.seconds[WARM_UP:]
        median = statistics.median(seconds)
        rows[name] = {
            "milliseconds": 1e3 * median,
            "median": median / unit,
            "mean": statistics.mean(seconds) / unit,
            # One step in twenty may be disturbed by others on the machine.
            "slow_over_median": float(np.quantile(seconds, 0.95)) / median,
            "worst_over_median": max(seconds) / median,
            "compile": one.compile_seconds / peer.compile_seconds,
            "compile_seconds": one.compile_seconds,
            **one.facts,
        }
        if "muon" in name:
            rows[name]["orthogonality_error"] = orthogonality_error(one.updates)
    return rows


def table(rows: dict[str, dict[str, float]]) -> str:
    """The rows as Markdown."""
    columns = {
        "median": ("median", "{:.2f}"),
        "mean": ("mean", "{:.2f}"),
        "worst_over_median": ("worst / own median", "{:.2f}"),
        "compile": ("compile", "{:.2f}"),
        "state_floats": ("floats / parameter", "{:.2f}"),
        "gflops": ("GFLOP", "{:.0f}"),
        "temporary_megabytes": ("temporary MB", "{:.0f}"),
        "program_lines": ("HLO lines", "{:.0f}"),
        "orthogonality_error": ("orthogonality error", "{:.3f}"),
    }
    lines = ["| | " + " | ".join(title for title, _ in columns.values()) + " |"]
    lines.append("|---" * (len(columns) + 1) + "|")
    for name, row in rows.items():
        cells = [text.format(row[key]) if key in row else "" for key, (_, text) in columns.items()]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(_: list[str]) -> None:
    chosen = optimizer_cases(block_size=WIDTH.value)
    unknown = set(ONLY.value) - set(chosen)
    if unknown:
        raise app.UsageError(f"--only={','.join(ONLY.value)}: choose from {', '.join(chosen)}")
    if ONLY.value:
        chosen = {n: c for n, c in chosen.items() if n.startswith(REFERENCE) or n in ONLY.value}
    rows = measure(chosen, STEPS.value)
    device = jax.devices()[0]
    versions = f"jax {jax.__version__}, optax {optax.__version__}"
    print(
        f"{device.platform} ({device.device_kind}), {versions}; {LAYERS.value} layers, D = ", end=""
    )
    print(f"{WIDTH.value}; times and compile in units of {REFERENCE}'s\n")
    print(table(rows))
    if OUTPUT.value:
        result = {
            "command": f"python -m experiments.benchmark_optimizers --layers={LAYERS.value} "
            f"--width={WIDTH.value} --steps={STEPS.value}",
            "device": f"{device.platform} {device.device_kind}",
            "jax": jax.__version__,
            "optax": optax.__version__,
            "rows": rows,
        }
        path = pathlib.Path(OUTPUT.value)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    app.run(main)
