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
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import app, flags
from optax.contrib import MuonDimensionNumbers

import mup_jax

LAYERS = flags.DEFINE_integer("layers", 8, "Layers of the model.", lower_bound=1)
WIDTH = flags.DEFINE_integer("width", 256, "Width D of the model.", lower_bound=8)
STEPS = flags.DEFINE_integer("steps", 30, "Measured steps of each optimizer.", lower_bound=2)
ONLY = flags.DEFINE_list("only", [], "Names of the optimizers to run beside Optax's Muon; or all.")
OUTPUT = flags.DEFINE_string("output", "", "JSON file to write.")

STACKED = MuonDimensionNumbers(-2, -1)
WARM_UP = 3
FREQUENCY = 10
REFERENCE = "optax muon"


class Case(NamedTuple):
    """An optimizer and the parameters that it is given."""

    layout: str
    make: Callable[..., optax.GradientTransformation]

    @property
    def options(self) -> dict[str, Any]:
        return {"weight_dimension_numbers": STACKED if self.layout == "stacked" else None}


def _blocked(make: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    return lambda **numbers: make(
        **{"block_size": WIDTH.value, "precondition_frequency": FREQUENCY} | options, **numbers
    )


def _grafted(**options: Any) -> optax.GradientTransformation:
    direction = _blocked(mup_jax.scale_by_shampoo, b1=0.95)(**options)
    numbers = options["weight_dimension_numbers"]
    return mup_jax.graft(
        optax.scale_by_adam(0.95, 0.98), direction, weight_dimension_numbers=numbers
    )


def _optax_muon(weight_dimension_numbers: Any) -> optax.GradientTransformation:
    # Optax takes a tree.
    numbers = weight_dimension_numbers or MuonDimensionNumbers()
    return optax.contrib.scale_by_muon(
        weight_dimension_numbers=lambda params: jax.tree.map(lambda _: numbers, params)
    )


def _muon(**options: Any) -> Callable[..., Any]:
    return lambda **numbers: mup_jax.scale_by_muon(**options, **numbers)


def cases() -> dict[str, Case]:
    """What is measured, by name."""
    five = {"orthogonalizer": "newton_schulz", "steps": 5}
    shampoo, soap = mup_jax.scale_by_shampoo, mup_jax.scale_by_soap
    low = {"preconditioner_dtype": jnp.bfloat16}
    return {
        "optax adam": Case("stacked", lambda weight_dimension_numbers: optax.scale_by_adam()),
        REFERENCE: Case("stacked", _optax_muon),
        f"{REFERENCE}, separate": Case("separate", _optax_muon),
        "muon, 5 steps": Case("stacked", _muon(**five)),
        "muon, 5 steps, separate": Case("separate", _muon(**five)),
        "muon": Case("stacked", _muon()),
        "shampoo² every step": Case("stacked", _blocked(shampoo, precondition_frequency=1)),
        "shampoo²": Case("stacked", _blocked(shampoo)),
        "shampoo², separate": Case("separate", _blocked(shampoo)),
        "shampoo² # adam": Case("stacked", _grafted),
        "shampoo², bf16 roots": Case("stacked", _blocked(shampoo, **low)),
        "soap": Case("stacked", _blocked(soap)),
        "soap, separate": Case("separate", _blocked(soap)),
        "soap, bf16 bases": Case("stacked", _blocked(soap, **low)),
    }


def gradients(layout: str, count: int = 4) -> list[Any]:
    """Gradients with a decaying spectrum, as those of matrices in training have."""
    rng = np.random.default_rng(0)
    width, wide = WIDTH.value, 4 * WIDTH.value
    shapes = dict.fromkeys(("query", "key", "value", "attention_out"), (width, width))
    shapes |= {"gate": (width, wide), "up": (width, wide), "down": (wide, width)}

    def leaf(m: int, n: int) -> jax.Array:
        spectrum = np.arange(1, m + 1)[:, None] ** -0.5
        return jnp.asarray(spectrum * rng.normal(size=(LAYERS.value, m, n)), jnp.float32)

    trees = [{name: leaf(*shape) for name, shape in shapes.items()} for _ in range(count)]
    if layout == "stacked":
        return trees
    return [jax.tree.map(list, tree) for tree in trees]


def orthogonality_error(updates: Any) -> float:
    """‖O - U Vᵀ‖ / √n of the first D x 4D matrix, with O = U S Vᵀ the update."""
    singular = np.linalg.svd(np.asarray(updates["gate"][0]), compute_uv=False)
    return float(np.sqrt(np.mean((singular - 1) ** 2)))


class Measured:
    """An optimizer, compiled, and how long each of its steps took."""

    def __init__(self, case: Case, inputs: list[Any]) -> None:
        transformation = case.make(**case.options)
        state = jax.jit(transformation.init)(inputs[0])
        update = jax.jit(transformation.update, donate_argnums=1)
        start = time.perf_counter()
        self._step = update.lower(inputs[0], state).compile()
        self.compile_seconds = time.perf_counter() - start
        self._state, self._inputs, self._count = state, inputs, 0
        self.seconds: list[float] = []
        parameters = sum(x.size for x in jax.tree.leaves(inputs[0]))
        costs = self._step.cost_analysis() or {}
        memory = self._step.memory_analysis()
        self.facts = {
            "state_floats": sum(x.nbytes for x in jax.tree.leaves(state)) / 4 / parameters,
            "gflops": costs.get("flops", 0.0) / 1e9,
            "temporary_megabytes": memory.temp_size_in_bytes / 1e6 if memory else 0.0,
            "program_lines": len((self._step.as_text() or "").splitlines()),
        }
        self.updates: Any = None

    def step(self) -> None:
        gradient = self._inputs[self._count % len(self._inputs)]
        start = time.perf_counter()
        self.updates, self._state = jax.block_until_ready(self._step(gradient, self._state))
        self.seconds.append(time.perf_counter() - start)
        self._count += 1


def measure(cases: dict[str, Case], steps: int) -> dict[str, dict[str, float]]:
    """Runs all cases, a step of each in turn, and returns a row for each."""
    inputs = {layout: gradients(layout) for layout in ("stacked", "separate")}
    measured = {name: Measured(case, inputs[case.layout]) for name, case in cases.items()}
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
    chosen = cases()
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
