"""Compiles each optimizer's update of a Llama for TPUs or GPUs that are not there.

    pip install 'jax[tpu]'
    export JAX_PLATFORMS=cpu
    python -m experiments.compile_optimizers --output=results/compile_optimizers.json

Parameters are sharded over both axes of the topology. The table tells, for each optimizer, how long
the compiler took, what a device holds and computes, how often it communicates, and whether an
eigendecomposition is left, which TPUs compile for minutes. FLOPs are our own count of a usual step.
"""

import json
import math
import pathlib
import re
import time
from typing import Any

import jax
from absl import app, flags
from flax import nnx
from optax.contrib import MuonDimensionNumbers

import mup_jax
from experiments.collectives import count_collectives
from experiments.topologies import find_topology
from mup_jax.models.llama import Llama, LlamaConfig, roles
from mup_jax.optimizers import OPTIMIZERS
from mup_jax.training.flops import count_flops

TOPOLOGY = flags.DEFINE_string("topology", "v5e:4x4", "TPU slice, or hosts of GPUs as h100:2x8.")
LAYERS = flags.DEFINE_integer("layers", 32, "Layers of the Llama.", lower_bound=1)
WIDTH = flags.DEFINE_integer("width", 1024, "Width of the Llama, a multiple of 64.", lower_bound=64)
VOCABULARY = flags.DEFINE_integer("vocabulary", 50257, "Tokens.", lower_bound=1)
NAMES = flags.DEFINE_list("optimizers", ["adamw", "muon", "adamuon", "shampoo", "soap"], "Names.")
OUTPUT = flags.DEFINE_string("output", "", "JSON file to write.")

STACKED = MuonDimensionNumbers(-2, -1)


def parameters(width: int) -> Any:
    """Abstract parameters of the Llama, as a pure dict."""
    config = LlamaConfig(VOCABULARY.value, width, LAYERS.value)
    model = nnx.eval_shape(lambda: Llama(config, rngs=nnx.Rngs(0)))
    return nnx.to_pure_dict(nnx.state(model, nnx.Param))


def shard(params: Any, mesh: jax.sharding.Mesh) -> Any:
    """Layers over both axes, one a side; embedding and readout along their width."""

    def place(role: str, x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        both = ("data", "model")
        spec = {"embedding": jax.P(None, both), "readout": jax.P(both, None)}.get(
            role, jax.P(None, *both)
        )
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=jax.NamedSharding(mesh, spec))

    return jax.tree.map(place, roles(params), params)


def compile_update(name: str, mesh: jax.sharding.Mesh, platform: str) -> dict[str, Any]:
    """One row of the table."""
    params = parameters(WIDTH.value)
    shapes = mup_jax.infer_shapes(
        parameters(64), params, weight_dimension_numbers=STACKED, roles=roles
    )
    options = {} if name == "adamw" else {"weight_dimension_numbers": STACKED}
    optimizer = OPTIMIZERS[name](1e-3, shapes=shapes, independent_weight_decay=1e-4, **options)
    with jax.set_mesh(mesh):
        params = shard(params, mesh)
        everywhere = jax.NamedSharding(mesh, jax.P())
        state = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding or everywhere),
            jax.eval_shape(optimizer.init, params),
        )
        lowered = jax.jit(optimizer.update, donate_argnums=(0, 1)).lower(params, state, params)
        start = time.perf_counter()
        compiled = lowered.compile()
        seconds = time.perf_counter() - start
        flops = count_flops(optimizer.update, params, state, params, platform=platform)
    memory, text = compiled.memory_analysis(), compiled.as_text()
    if memory is None or text is None:
        raise RuntimeError("this compiler reports no memory or text")
    part = lambda x: math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
    return {
        "compile_seconds": seconds,
        "eigh": len(re.findall("eigh", lowered.as_text(), re.IGNORECASE)),
        "state_gigabytes": sum(map(part, jax.tree.leaves(state))) / 1e9,
        "temporary_gigabytes": memory.temp_size_in_bytes / 1e9,
        "code_megabytes": memory.generated_code_size_in_bytes / 1e6,
        "gflops": flops / mesh.size / 1e9,
        "collectives": count_collectives(text),
    }


def table(rows: dict[str, dict[str, Any]]) -> str:
    """The rows as Markdown."""
    lines = [
        "| | compile, s | eigh | state, GB | temporary, GB | code, MB | GFLOP | collectives |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, row in rows.items():
        found = ", ".join(f"{n} {operation}" for operation, n in row["collectives"].items())
        lines.append(
            f"| {name} | {row['compile_seconds']:.0f} | {row['eigh']} | "
            f"{row['state_gigabytes']:.3f} | {row['temporary_gigabytes']:.3f} | "
            f"{row['code_megabytes']:.1f} | {row['gflops']:.0f} | {found} |"
        )
    return "\n".join(lines)


def main(_: list[str]) -> None:
    unknown = set(NAMES.value) - set(OPTIMIZERS)
    if unknown:
        raise app.UsageError(f"--optimizers: choose from {', '.join(OPTIMIZERS)}, not {unknown}")
    topology = find_topology(TOPOLOGY.value)
    mesh = jax.make_mesh(topology.sizes, ("data", "model"), devices=topology.devices)
    print(
        f"{TOPOLOGY.value}, a Llama of {LAYERS.value} layers with D = {WIDTH.value}; "
        f"per device, jax {jax.__version__}\n"
    )
    rows = {name: compile_update(name, mesh, topology.platform) for name in NAMES.value}
    print(table(rows))
    if OUTPUT.value:
        path = pathlib.Path(OUTPUT.value)
        path.parent.mkdir(parents=True, exist_ok=True)
        command = (
            f"python -m experiments.compile_optimizers --topology={TOPOLOGY.value} "
            f"--layers={LAYERS.value} --width={WIDTH.value} --vocabulary={VOCABULARY.value}"
        )
        result = {"command": command, "jax": jax.__version__, "rows": rows}
        path.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    app.run(main)
