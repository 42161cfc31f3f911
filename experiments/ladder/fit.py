"""Which rungs of a ladder fit on TPUs or GPUs that are not there, and with which mesh."""

import copy
import itertools
import math
from collections.abc import Iterator
from typing import Any

import jax
from ml_collections import ConfigDict

from experiments.collectives import traffic, without
from experiments.ladder.plan import Ladder, Rung, Series
from experiments.ladder.roofline import Phase, least_seconds
from experiments.topologies import Topology
from mup_jax.models.llama import forward_flops_per_token
from mup_jax.training.mesh import AXES, mesh_shape
from mup_jax.training.program import Program

_GIBIBYTE = 2**30


def fit(ladder: Ladder, topology: Topology) -> Iterator[dict[str, Any]]:
    """For each rung and optimizer the first arrangement that fits, or the last one tried.

    The mesh is that of the configuration; where that leaves parameters whole, they are divided over
    the GPUs of a host, or else over as many devices as they can. Of activations all are kept, or
    else those of matrix products, or else none.
    """
    for rung in ladder.rungs:
        for optimizer in ladder.config.optimizers:
            series = Series(optimizer)
            rates = ladder.grid(series).points[0]
            config = ladder.cell(rung, series, rates, ladder.config.seeds[0]).config
            yield {
                "rung": rung.name,
                "optimizer": optimizer,
                **_fit_cell(config, rung, ladder, topology),
            }


def _fit_cell(config: ConfigDict, rung: Rung, ladder: Ladder, topology: Topology) -> dict[str, Any]:
    row: dict[str, Any] = {}
    for arrangement in _arrangements(config, topology):
        row = _compile(arrangement, rung, ladder.vocab_size, topology)
        if row["fits"]:
            break
    return row


def _arrangements(config: ConfigDict, topology: Topology) -> Iterator[ConfigDict]:
    """Configurations that need less and less memory on a device."""
    meshes = [config.mesh.fsdp]
    if meshes == [config.mesh.tensor] == [1]:
        # Within a host GPUs are connected ten times as fast as beyond it.
        limits = topology.sizes[-1:] if topology.platform == "gpu" else ()
        divisible = math.gcd(config.model.width, config.batch_size)
        meshes = [math.gcd(divisible, n) for n in (*limits, len(topology.devices))]
    kept = [config.remat] if config.remat != "none" else ["none", "dots", "full"]
    for remat, fsdp in itertools.product(kept, dict.fromkeys(meshes)):
        arranged = copy.deepcopy(config)
        arranged.remat = remat
        if topology.platform == "gpu":
            arranged.attention = "xla"  # cuDNN's needs cuDNN when it is compiled
        if fsdp != config.mesh.fsdp:
            arranged.mesh.update(data=-1, fsdp=fsdp)
        yield arranged


def _compile(config: ConfigDict, rung: Rung, vocab_size: int, topology: Topology) -> dict[str, Any]:
    shape = mesh_shape(config, len(topology.devices))
    mesh = jax.make_mesh(shape, AXES, devices=topology.devices)
    with jax.set_mesh(mesh):
        program = Program(config, vocab_size)
        tokens = config.batch_size * config.context
        optimizer_flops = program.optimizer_flops_by_precision(topology.platform)
        row = {
            "parameters": rung.parameters,
            "tokens": rung.tokens,
            "mesh": dict(zip(AXES, shape, strict=True)),
            "remat": config.remat,
            "model_flops": 3 * forward_flops_per_token(program.model, config.context) * tokens,
            "optimizer_flops": sum(optimizer_flops.values()),
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
    sent = traffic(text, topology.per_host)
    sent_by_optimizer = traffic(text, topology.per_host, scope="optimizer")
    part = lambda flops: {key: x / len(topology.devices) for key, x in flops.items()}
    weights = 4 * rung.parameters / math.prod(shape[1:])
    phases = {
        # Weights are read and their gradient is written.
        "model": Phase(
            part({"16 bit" if config.dtype == "bfloat16" else "default": row["model_flops"]}),
            2 * weights,
            {kind: without(one, sent_by_optimizer.get(kind)) for kind, one in sent.items()},
        ),
        # The state, with the weights, is read and written, and the gradient is read.
        "optimizer": Phase(
            part(optimizer_flops),
            2 * memory.argument_size_in_bytes + weights,
            sent_by_optimizer,
        ),
    }
    return row | {
        "state_gibibytes": memory.argument_size_in_bytes / _GIBIBYTE,
        "gibibytes": gibibytes,
        "fits": gibibytes <= topology.gigabytes,
        "collectives": sent,
        "least_seconds": {name: least_seconds(phase, topology) for name, phase in phases.items()},
    }


def heading(topology: Topology) -> str:
    return (
        f"{topology.name}: {len(topology.devices)} devices of {topology.gigabytes:.1f} GiB; a step "
        f"of training, bytes per device, jax {jax.__version__}\n\n"
        "| rung | optimizer | parameters | tokens | model, FLOPs | optimizer | state, GiB | "
        "in all, GiB | fits | mesh | kept | collectives, GiB sent | step, ms at least | "
        "optimizer, ms at least | multiplier in seconds |\n"
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|"
    )


FOOTNOTE = """
Collectives: how often, and what a device sends. At least: the longest of products at the peak of
their precision, weights and state through memory, what is sent within a host, and beyond it, for
the model and then for the optimizer, with what is longest for it. Left out are activations, what
the compiler writes and reads again, starts of kernels, and that nothing runs at its peak;
factorizations least of all. Multiplier in seconds: of one in FLOPs of the model, over AdamW."""


def line(row: dict[str, Any], adamw: dict[str, Any]) -> str:
    """A row of the table, in Markdown, beside that of AdamW at the same rung."""
    mesh = " ".join(f"{axis} {size}" for axis, size in row["mesh"].items() if size > 1)
    kept = {"none": "all", "dots": "products", "full": "none"}[row["remat"]]
    collectives = ", ".join(
        f"{sent.calls} {kind} {sent.bytes / _GIBIBYTE:.2g}"
        for kind, sent in row.get("collectives", {}).items()
    )
    share = row["optimizer_flops"] / (row["model_flops"] + row["optimizer_flops"])
    # Of a program that the compiler found too large nothing else is known.
    measured = lambda key, digits: f"{row[key]:.{digits}f}" if key in row else "?"
    step = optimizer = seconds = "?"
    if "least_seconds" in row:
        step = f"{1e3 * _step(row):.1f}"
        needed = row["least_seconds"]["optimizer"]
        longest = max(needed, key=needed.__getitem__)
        optimizer = f"{1e3 * needed[longest]:.2f} ({longest})"
        if "least_seconds" in adamw:
            seconds = f"× {_step(adamw) / _step(row):.2f}"
    cells = (
        row["rung"], row["optimizer"], f"{row['parameters']:,}", f"{row['tokens']:,}",
        f"{row['model_flops']:.2e}", f"{share:.1%}", measured("state_gibibytes", 2),
        measured("gibibytes", 1), "yes" if row["fits"] else "no", mesh, kept, collectives,
        step, optimizer, seconds,
    )  # fmt: skip
    return f"| {' | '.join(cells)} |"


def _step(row: dict[str, Any]) -> float:
    """The least seconds of a step: of the model, and then of the optimizer."""
    return sum(max(phase.values()) for phase in row["least_seconds"].values())
