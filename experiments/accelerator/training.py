"""Part (c): what training the 190M rung of the paper's ladder takes in bfloat16, by microbatches.

The model, its batch and the optimizers are those of configs/ladder_paper.py, which needs
ml_collections, as this does not. Tokens are random, and made on the device.
"""

import functools
import time
from typing import Any

import jax

from experiments.accelerator.report import COMPILER, number, words
from experiments.accelerator.session import OUT_OF_MEMORY, Case, Column, Part, Row, Rows
from experiments.accelerator.timing import time_steps
from experiments.optimizer_cases import compile_program
from mup_jax.models.llama import forward_flops_per_token, num_parameters
from mup_jax.training.config import as_namespace, default_settings
from mup_jax.training.mesh import AXES
from mup_jax.training.metrics import finite_or_none
from mup_jax.training.program import Hyperparameters, Program
from mup_jax.training.throughput import peak_flops

_GRADIENT = "gradient alone"
_BASE_WIDTH = 512
# Learning rate, options and, on a GPU, the seconds of a case, mostly of compiling.
_OPTIMIZERS: dict[str, tuple[float, dict[str, Any], int]] = {
    "adamw": (4e-3, {"eps": 1e-20}, 60),
    _GRADIENT: (4e-3, {}, 40),
    "muon": (
        8e-3,
        {"orthogonalizer": "newton_schulz", "ns_steps": 5, "eps": 1e-5, "adam_eps": 1e-15},
        60,
    ),
    "shampoo": (2e-3, {}, 80),
    "soap": (3.2e-2, {"b2": 0.999, "spectral_norm": True}, 80),
}
# What embedding and readout have, of the learning rate of hidden matrices.
_EMBEDDING_READOUT = {"muon": 1.28e-2 / 8e-3, "shampoo": 6.4e-2 / 2e-3}
# 31 GB in 16 parts and 57 GB in 8, as compiled for an H100; fewer are faster, where they fit.
_MICROBATCHES = {"full": (16, 8, 32, 4), "tiny": (2,)}
_STEPS = {"full": 4, "tiny": 2}


def settings(scale: str) -> tuple[dict[str, Any], int]:
    """The configuration of a run but for its optimizer, and the size of its vocabulary."""
    run = default_settings()
    if scale == "tiny":
        run["model"] |= {"width": 64, "depth": 2, "head_dim": 16}
        run["base"] |= {"width": 64, "depth": 2}
        run |= {"context": 32, "batch_size": 4, "dtype": "bfloat16"}
        return run, 128
    run["model"] |= {"width": _BASE_WIDTH, "depth": 32, "head_dim": 64}
    run["base"] |= {"width": _BASE_WIDTH, "depth": 32}
    run |= {"context": 1024, "batch_size": 128, "dtype": "bfloat16", "clip_norm": 1.0}
    tokens = 20 * 190_000_000
    return run | {"tokens": tokens, "warmup_tokens": tokens // 100}, 50_257


def make_program(name: str, scale: str, microbatches: int, attention: str = "auto") -> Program:
    """The program of an optimizer, for the mesh in use or else the first device."""
    run, vocabulary = settings(scale)
    rate, options, _ = _OPTIMIZERS[name]
    run["optimizer"] |= {
        "name": "adamw" if name == _GRADIENT else name,
        "learning_rate": rate,
        "embedding_readout_factor": _EMBEDDING_READOUT.get(name, 1.0),
        "weight_decay": 0.1024 / _BASE_WIDTH,
        "options": options,
    }
    config = as_namespace(run | {"microbatches": microbatches, "attention": attention})
    mesh = jax.sharding.get_mesh()
    if mesh.empty:
        mesh = jax.make_mesh((1,) * len(AXES), AXES, devices=jax.devices()[:1])
    with jax.set_mesh(mesh):
        return Program(config, vocabulary)


def lower(name: str, program: Program) -> Any:
    """The program of a step or, of its loss and gradient, of what every optimizer shares."""
    if name != _GRADIENT:
        return program.lower_step()
    params = program.abstract_state.params
    return program.loss_and_gradient.lower(params, program.abstract_batch)


def part(scale: str) -> Part:
    """The part at the scale "full" or "tiny"."""
    run, vocabulary = settings(scale)
    cases = [
        Case(
            _case_name(name, microbatches),
            seconds,
            functools.partial(_measure, name, scale, microbatches),
        )
        for microbatches in _MICROBATCHES[scale]
        for name, (_, _, seconds) in _OPTIMIZERS.items()
    ]
    return Part(
        "training",
        f"Training: {run['model']['depth']} layers of D = {run['model']['width']}, {vocabulary} "
        f"tokens, {run['batch_size']} rows of {run['context']}, in bfloat16",
        share=0.4,
        cases=cases,
        columns=[
            number("parameters, M", "parameters", "{:.1f}", 1e-6),
            number("tokens / s", "tokens_per_second", "{:,.0f}"),
            number("MFU", "mfu", "{:.1%}"),
            number("step, ms", "step_ms"),
            number("worst, ms", "worst_ms"),
            Column("optimizer's share", _optimizer_share),
            number("state and batch, GB", "argument_megabytes", "{:.2f}", 1e-3),
            number("temporary, GB", "temporary_megabytes", "{:.2f}", 1e-3),
            *COMPILER,
            words("attention", "attention"),
            number("loss", "loss", "{:.2f}"),
            words("", "note"),
        ],
    )


def _case_name(name: str, microbatches: int) -> str:
    return f"{name}, {microbatches} microbatches"


def _optimizer_share(row: Row, rows: Rows) -> str:
    """Of a step, what the gradient alone does not take."""
    gradient = rows.get(_case_name(_GRADIENT, row.get("microbatches", 0)), {}).get("step_ms")
    is_step = "loss" in row and "step_ms" in row
    return f"{max(0.0, 1 - gradient / row['step_ms']):.1%}" if gradient and is_step else ""


def _measure(name: str, scale: str, microbatches: int, _: float) -> Row:
    row: Row = {"microbatches": microbatches}
    try:
        return row | _train(name, scale, microbatches, "auto")
    except Exception as error:
        attention = make_program(name, scale, microbatches).model.attention
        if OUT_OF_MEMORY in str(error) or attention == "xla":
            raise
        row["note"] = f"{attention} fails: {' '.join(str(error).split())[:200]}"
    return row | _train(name, scale, microbatches, "xla")


def _train(name: str, scale: str, microbatches: int, attention: str) -> Row:
    program = make_program(name, scale, microbatches, attention)
    with jax.set_mesh(program.mesh):
        return _time(name, program, _STEPS[scale])


def _time(name: str, program: Program, steps: int) -> Row:
    config = program.config
    start = time.perf_counter()
    lowered = lower(name, program)
    step, facts = compile_program(lowered, time.perf_counter() - start)
    row: Row = {
        "parameters": num_parameters(program.model),
        "attention": program.model.attention,
        **facts,
    }
    limit = (jax.devices()[0].memory_stats() or {}).get("bytes_limit")
    needed = 1e6 * sum(facts.get(f"{kind}_megabytes", 0) for kind in ("argument", "temporary"))
    if limit and needed > limit:
        note = f"does not fit: {needed / 1e9:.1f} GB of {limit / 1e9:.1f}"
        return row | {"note": note}

    state = program.init(0)
    tokens = program.abstract_batch["inputs"]
    draw = jax.jit(
        lambda key: jax.random.randint(key, tokens.shape, 0, program.model.vocab_size),
        out_shardings=tokens.sharding,
    )
    inputs, targets = map(draw, jax.random.split(jax.random.key(1)))
    batch = {"inputs": inputs, "targets": targets}
    if name == _GRADIENT:
        loss, advance = None, lambda _: step(state.params, batch)
        times, _ = time_steps(advance, None, steps=steps)
    else:
        hyperparameters = jax.device_put(Hyperparameters.of(config), program.replicated)
        advance = lambda pair: step(pair[0], batch, hyperparameters)
        times, (_, metrics) = time_steps(advance, (state, None), steps=steps)
        loss = float(metrics["loss"])
    row |= times
    if loss is not None:
        rate = 1e3 * config.batch_size * config.context / times["step_ms"]
        row |= {
            "tokens_per_second": rate,
            "mfu": _utilization(program, rate),
            "loss": finite_or_none(loss),
            "skipped_steps": int(metrics["skipped"]),
        }
        if row["loss"] is None or row["skipped_steps"]:
            row["violations"] = [f"loss {loss}, {row['skipped_steps']} steps skipped"]
    return row


def _utilization(program: Program, tokens_per_second: float) -> float | None:
    """Model FLOPs utilization of one device; see `mup_jax.training.throughput.Progress`."""
    peak = peak_flops(jax.devices()[0].device_kind)
    flops = 3 * forward_flops_per_token(program.model, program.config.context)
    return tokens_per_second * flops / peak if peak else None
