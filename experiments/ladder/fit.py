"""Which rungs of a ladder fit on a TPU slice that is not there, and with which mesh."""

import copy
import math
from collections.abc import Iterator
from typing import Any

import jax
from ml_collections import ConfigDict

from experiments.ladder.plan import Ladder, Rung, Series
from experiments.topologies import Slice, count_collectives
from mup_jax.models.llama import forward_flops_per_token
from mup_jax.training.mesh import AXES, mesh_shape
from mup_jax.training.program import Program

_GIBIBYTE = 2**30


def fit(ladder: Ladder, tpu: Slice) -> Iterator[dict[str, Any]]:
    """For each rung and optimizer the first arrangement that fits, or the last one tried.

    The mesh is that of the configuration; where that leaves parameters whole, they are divided over
    as many devices as they can. Of activations all are kept, or else those of matrix products, or
    else none.
    """
    for rung in ladder.rungs:
        for optimizer in ladder.config.optimizers:
            series = Series(optimizer)
            rates = ladder.grid(series).points[0]
            config = ladder.cell(rung, series, rates, ladder.config.seeds[0]).config
            yield {
                "rung": rung.name,
                "optimizer": optimizer,
                **_fit_cell(config, rung, ladder, tpu),
            }


def _fit_cell(config: ConfigDict, rung: Rung, ladder: Ladder, tpu: Slice) -> dict[str, Any]:
    row: dict[str, Any] = {}
    for arrangement in _arrangements(config, len(tpu.devices)):
        row = _compile(arrangement, rung, ladder.vocab_size, tpu)
        if row["fits"]:
            break
    return row


def _arrangements(config: ConfigDict, devices: int) -> Iterator[ConfigDict]:
    """Configurations that need less and less memory on a device."""
    fsdp = config.mesh.fsdp
    if fsdp == config.mesh.tensor == 1:
        fsdp = math.gcd(config.model.width, math.gcd(config.batch_size, devices))
    kept = [config.remat] if config.remat != "none" else ["none", "dots", "full"]
    for remat in kept:
        arranged = copy.deepcopy(config)
        arranged.remat = remat
        if fsdp != config.mesh.fsdp:
            arranged.mesh.update(data=-1, fsdp=fsdp)
        yield arranged


def _compile(config: ConfigDict, rung: Rung, vocab_size: int, tpu: Slice) -> dict[str, Any]:
    shape = mesh_shape(config, len(tpu.devices))
    mesh = jax.make_mesh(shape, AXES, devices=tpu.devices)
    with jax.set_mesh(mesh):
        program = Program(config, vocab_size)
        tokens = config.batch_size * config.context
        row = {
            "parameters": rung.parameters,
            "tokens": rung.tokens,
            "mesh": dict(zip(AXES, shape, strict=True)),
            "remat": config.remat,
            "model_flops": 3 * forward_flops_per_token(program.model, config.context) * tokens,
            "optimizer_flops": program.count_optimizer_flops(platform="tpu"),
        }
        try:
            compiled = program.step
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            return row | {"fits": False}  # the compiler says no more
    memory, text = compiled.memory_analysis(), compiled.as_text()
    total = sum(
        getattr(memory, f"{kind}_size_in_bytes")
        for kind in ("argument", "output", "temp", "generated_code")
    )
    gibibytes = (total - memory.alias_size_in_bytes) / _GIBIBYTE
    return row | {
        "state_gibibytes": memory.argument_size_in_bytes / _GIBIBYTE,
        "gibibytes": gibibytes,
        "fits": gibibytes <= tpu.gigabytes,
        "collectives": count_collectives(text),
    }


def heading(topology: str, tpu: Slice) -> str:
    return (
        f"{topology}: {len(tpu.devices)} devices of {tpu.gigabytes} GiB; a step of training, "
        f"bytes per device, jax {jax.__version__}\n\n"
        "| rung | optimizer | parameters | tokens | model, FLOPs | optimizer | state, GiB | "
        "in all, GiB | fits | mesh | kept | collectives |\n"
        "|---|---|---|---|---|---|---|---|---|---|---|---|"
    )


def line(row: dict[str, Any]) -> str:
    """A row of the table, in Markdown."""
    mesh = " ".join(f"{axis} {size}" for axis, size in row["mesh"].items() if size > 1)
    kept = {"none": "all", "dots": "products", "full": "none"}[row["remat"]]
    collectives = ", ".join(f"{n} {name}" for name, n in row.get("collectives", {}).items())
    share = row["optimizer_flops"] / (row["model_flops"] + row["optimizer_flops"])
    # Of a program that the compiler found too large nothing else is known.
    measured = lambda key, digits: f"{row[key]:.{digits}f}" if key in row else "?"
    cells = (
        row["rung"], row["optimizer"], f"{row['parameters']:,}", f"{row['tokens']:,}",
        f"{row['model_flops']:.2e}", f"{share:.1%}", measured("state_gibibytes", 2),
        measured("gibibytes", 1), "yes" if row["fits"] else "no", mesh, kept, collectives,
    )  # fmt: skip
    return f"| {' | '.join(cells)} |"
