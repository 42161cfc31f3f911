"""A ladder's plan as text: what would be trained, how it scales, and how long it might take."""

import math
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from experiments.ladder.added import added
from experiments.ladder.plan import Ladder, Rung, Series, planned_parts
from mup_jax.training.config import describe_rule, make_optimizer
from mup_jax.training.program import Hyperparameters, Program
from mup_jax.training.throughput import step_times
from mup_jax.transfer.shapes import is_shape

# A step that takes longer than so many seconds is not timed.
_PATIENCE = 5.0


def describe(ladder: Ladder) -> str:
    """Rungs, and how many cells there are at least."""
    rows = [["rung", "width", "depth", "parameters", "tokens", "steps", "batch", "FLOPs per run"]]
    rows += [
        [
            *(rung.name, str(rung.width), str(rung.depth), f"{rung.parameters:,}"),
            *(f"{rung.tokens:,}", f"{rung.steps:,}", str(ladder.config.train.batch_size)),
            f"{rung.flops:.4e}",
        ]
        for rung in ladder.rungs
    ]
    lines = [aligned(rows), ""]
    for series in dict.fromkeys(series.tuned for series in ladder.series):
        rates, factors = (", ".join(f"{x:g}" for x in axis) for axis in ladder.grid(series))
        lines.append(f"{series.name}: learning rate {rates}; times {factors} on all but hidden")
    for label in added(ladder.config):
        rule = describe_rule(_config(ladder, ladder.rungs[0], Series(label)))
        lines.append(f"{label}: {rule}")
    cells = sum(len(part.cells) for part in planned_parts(ladder))
    return "\n".join([*lines, f"at least {cells} cells"])


def describe_scaling(ladder: Ladder) -> str:
    """What an optimizer adds to a step at each rung, and by what each parametrization scales."""
    rungs = [rung.name for rung in ladder.rungs]
    rows = [["optimizer's FLOPs, of the model's", *rungs]]
    for series in _tuned(ladder):
        shares = [
            _program(ladder, rung, series).optimizer_flops * rung.steps / rung.flops
            for rung in ladder.rungs
        ]
        rows.append([series.name, *(f"{share:.1%}" for share in shares)])
    factors = [["factors of η: embedding, hidden, readout; of λ", *rungs[1:]]]
    for series in ladder.series:
        cells = [_factors(ladder, rung, series) for rung in ladder.rungs[1:]]
        factors.append([series.name, *cells])
    return f"{aligned(rows)}\n\n{aligned(factors)}"


def estimate(ladder: Ladder) -> str:
    """How long the ladder takes on this machine, from a few steps of its smaller rungs."""
    flops = ladder.rungs[0].flops / ladder.rungs[0].steps
    if flops / _peak() > _PATIENCE:
        return f"no estimate of time: a step of {flops:.2e} FLOPs is too long to be timed here"
    gradient = dict(_gradient_seconds(ladder))
    measured = ", ".join(gradient)
    last = [rung for rung in ladder.rungs if rung.name in gradient][-1]
    for rung in ladder.rungs:  # the larger ones by their FLOPs
        ratio = (rung.flops / rung.steps) / (last.flops / last.steps)
        gradient.setdefault(rung.name, gradient[last.name] * ratio)
    extra = {
        (series, rung): seconds
        for series in _tuned(ladder)
        for rung, seconds in _optimizer_seconds(ladder, series).items()
    }
    total = sum(
        len(part.cells)
        * part.rung.steps
        * (gradient[part.rung.name] + extra[part.series.tuned, part.rung.name])
        for part in planned_parts(ladder)
    )
    workers = ladder.config.workers
    return (
        f"about {_duration(total / workers)} here with {workers} worker{'s'[: workers > 1]}, "
        f"{_duration(total)} of training in all (from steps of {measured})"
    )


def _tuned(ladder: Ladder) -> list[Series]:
    """Those that differ in what a step computes."""
    return list(dict.fromkeys(series.tuned for series in ladder.series))


def _config(ladder: Ladder, rung: Rung, series: Series) -> ConfigDict:
    rates = ladder.grid(series).points[0]
    return ladder.cell(rung, series, rates, ladder.config.seeds[0]).config


def _program(ladder: Ladder, rung: Rung, series: Series) -> Program:
    with jax.set_mesh(jax.make_mesh((1,), ("data",), devices=jax.devices()[:1])):
        return Program(_config(ladder, rung, series), ladder.vocab_size)


def _factors(ladder: Ladder, rung: Rung, series: Series) -> str:
    """By what the optimizer scales the updates of each role: measured, on matrices of 2 x 2."""
    shapes = _program(ladder, rung, series).shapes
    # A parameter of each role, with the numbers of the model; its array can be of any size.
    of_role = {s.role: s for s in jax.tree.leaves(shapes, is_leaf=is_shape) if s.role != "vector"}
    params = {role: jnp.eye(2) for role in of_role}
    gradients = {role: jnp.array([[1.0, 0.5], [-0.25, 2.0]]) for role in of_role}
    settings = _config(ladder, rung, series).optimizer.options.to_dict()

    def update(decay: float, **options: Any) -> dict[str, jax.Array]:
        optimizer = make_optimizer(
            ladder.make(series.optimizer),
            1.0,
            shapes=of_role,
            weight_decay=decay,
            options=settings | options,
        )
        total = lambda p: sum(map(jnp.sum, jax.tree.leaves(p)))
        functions = {"obj_fn": total, "logits_fn": lambda p: p["readout"]}
        return optimizer.update(gradients, optimizer.init(params), params, **functions)[0]

    here = update(0.0)
    constant = update(0.0, learning_rate_scaling="constant")
    decayed = update(1.0)
    norm = jnp.linalg.norm
    rates = [float(norm(here[role]) / norm(constant[role])) for role in of_role]
    decay = float(norm(decayed["hidden"] - here["hidden"]) / norm(params["hidden"]))
    return f"{', '.join(f'{rate:.3g}' for rate in rates)}; {decay:.3g}"


def _gradient_seconds(ladder: Ladder) -> Iterator[tuple[str, float]]:
    """Of loss and gradient of a step, at the rungs where that is short."""
    seconds = before = 0.0
    for rung in ladder.rungs:
        flops = rung.flops / rung.steps
        if before and seconds * flops / before > _PATIENCE:
            return
        program = _program(ladder, rung, ladder.series[0])
        with jax.set_mesh(program.mesh):
            arguments = program.init(0).params, _batch(program)
            seconds = _median_seconds(program.loss_and_gradient, *arguments)
        before = flops
        yield rung.name, seconds


def _optimizer_seconds(ladder: Ladder, series: Series) -> dict[str, float]:
    """Of the optimizer in a step: timed at the base, and growing as its FLOPs or as parameters."""
    base = ladder.rungs[0]
    program = _program(ladder, base, series)
    with jax.set_mesh(program.mesh):
        hyperparameters = Hyperparameters.of(program.config)
        state = program.init(0)
        # The first steps of a run refresh preconditioners more often than the others.
        is_count = lambda path: jax.tree_util.keystr(path[-1:], simple=True) == "count"
        last = lambda path, x: jnp.full_like(x, base.steps) if is_count(path) else x
        state = state._replace(opt_state=jax.tree.map_with_path(last, state.opt_state))
        times = step_times(program, state, _batch(program), hyperparameters)
    share = times["optimizer_share"]
    seconds = times["gradient"] * share / (1 - share)
    size = lambda rung: _program(ladder, rung, series).optimizer_flops or rung.parameters
    return {rung.name: seconds * size(rung) / size(base) for rung in ladder.rungs}


def _batch(program: Program) -> dict[str, jax.Array]:
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), program.abstract_batch)


def _median_seconds(function: Callable[..., Any], *arguments: Any, repeats: int = 5) -> float:
    jax.block_until_ready(function(*arguments))
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(function(*arguments))
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def _peak() -> float:
    """FLOPs per second of a product of matrices of this machine."""
    x = jnp.ones((1024, 1024))
    return 2 * 1024**3 / _median_seconds(jnp.matmul, x, x)


def _duration(seconds: float) -> str:
    minutes = math.ceil(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes / 60:.1f} h"


def aligned(rows: list[list[str]]) -> str:
    """A table in plain text, numbers to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows
    )
