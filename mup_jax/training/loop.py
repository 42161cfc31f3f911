"""One training run from beginning to end, or from where it was interrupted."""

import functools
import importlib.metadata
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from mup_jax import data
from mup_jax.models.llama import forward_flops_per_token, num_parameters
from mup_jax.training import config as config_lib
from mup_jax.training.checkpoint import Checkpoints
from mup_jax.training.mesh import data_parallel_mesh
from mup_jax.training.metrics import MetricsWriter, write_atomically
from mup_jax.training.program import Hyperparameters, Program, TrainState, make_program

# [Q] (arXiv 2512.05620), Fig. 2: the features' change in one step, at this step.
_COORDINATE_CHECK_STEP = 10

_LOSS_CURVE_POINTS = 100
_PROGRESS_STEPS = 16
_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")

Progress = Callable[[int, int, float | None], None]


def claim_workdir(workdir: Path, config: ConfigDict) -> None:
    """Makes `workdir` this configuration's.

    Raises:
      ValueError: it belongs to another configuration.
    """
    path = workdir / "config.json"
    if path.exists():
        now = json.loads(config_lib.to_json(config))
        changed = config_lib.differences(json.loads(path.read_text()), now)
        if changed:
            raise ValueError(
                f"{workdir} belongs to another configuration ({'; '.join(changed[:3])}): choose "
                "another --workdir, or undo the change to go on with this one"
            )
        return
    workdir.mkdir(parents=True, exist_ok=True)
    write_atomically(path, config_lib.to_json(config) + "\n")


def train(
    config: ConfigDict, workdir: str | Path, on_progress: Progress | None = None
) -> dict[str, Any]:
    """Trains one model and returns what there is to know of the run.

    Writes to `workdir`: config.json, metrics.jsonl (a line per step), checkpoints/ and at the end
    result.json. A finished run is not trained again; an interrupted one goes on from its last
    checkpoint and ends with the same numbers.

    Args:
      config: with the keys of `default_config`.
      workdir: of this run alone.
      on_progress: called now and then with (step, steps, training loss).

    Returns:
      The contents of result.json. `validation_loss` is in nats per token; it is None where the
      training loss ceased to be finite, which ends a run early.

    Raises:
      ValueError: a bad configuration, a workdir of another one, or a damaged checkpoint; each
        before anything is compiled.
    """
    config_lib.validate(config)
    workdir = Path(workdir).absolute()
    mesh = data_parallel_mesh(config.batch_size)
    tokens = _load_tokens(config.data.source, config.data.tokenizer)
    windows = {"context": config.context, "batch_size": config.batch_size}
    validation = data.validation_batches(
        tokens.validation, **windows, max_batches=config.eval_batches
    )
    batches = iter(
        data.training_batches(
            tokens.train,
            **windows,
            seed=config.seed,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
        )
    )
    claim_workdir(workdir, config)
    result_path = workdir / "result.json"
    if result_path.exists():
        return json.loads(result_path.read_text())

    with jax.set_mesh(mesh):
        program = make_program(config, tokens.vocab_size)
        checkpoints = Checkpoints(workdir / "checkpoints")
        try:
            restored = checkpoints.restore(program.abstract_state)
            if restored is None:
                state, first_step = program.init(config.seed), 0
            else:
                state, position = restored
                batches.set_state(position)
                first_step = int(state.step)
            metrics = MetricsWriter(workdir / "metrics.jsonl", first_step)
            state, seconds = _train_steps(
                config, program, state, first_step, batches, validation, metrics, checkpoints,
                on_progress,
            )  # fmt: skip
        finally:
            checkpoints.close()
        result = _result(config, program, tokens, metrics.lines, seconds, state, next(batches))
    write_atomically(result_path, json.dumps(result, indent=1) + "\n")
    return result


def _train_steps(
    config: ConfigDict,
    program: Program,
    state: TrainState,
    first_step: int,
    batches: Any,
    validation: data.Batch,
    metrics: MetricsWriter,
    checkpoints: Checkpoints,
    on_progress: Progress | None,
) -> tuple[TrainState, float]:
    """The last state, and the seconds that all steps took, compilation of the step excluded."""
    hyperparameters = jax.device_put(Hyperparameters.of(config), program.replicated)
    train_step = program.step
    elapsed = metrics.lines[-1]["seconds"] if metrics.lines else 0.0
    start = time.perf_counter() - elapsed

    def evaluate(params: Any) -> jax.Array:
        return program.evaluate(params, jax.device_put(validation, program.replicated))

    shown = first_step
    for step in range(first_step + 1, program.steps + 1):
        batch = _on_mesh(next(batches), program)
        if step == _COORDINATE_CHECK_STEP:
            before = program.features(state.params, batch["inputs"])
        state, values = train_step(state, batch, hyperparameters)
        if step == _COORDINATE_CHECK_STEP:
            after = program.features(state.params, batch["inputs"])
            values["feature_change_rms"] = jnp.sqrt(jnp.mean(jnp.square(after - before)))
        is_last = step == program.steps
        if is_last or (config.eval_every and step % config.eval_every == 0):
            values["validation_loss"] = evaluate(state.params)
        metrics.add(step, **values, seconds=time.perf_counter() - start)
        if step % config.checkpoint_every == 0 or is_last:
            metrics.flush()
            checkpoints.save(step, state, batches.get_state())
        if metrics.lines:
            written = metrics.lines[-1]
            if written["loss"] is None:
                break
            if on_progress and written["step"] >= shown + _PROGRESS_STEPS:
                shown = written["step"]
                on_progress(shown, program.steps, written["loss"])
    metrics.close()  # waits for the device
    return state, time.perf_counter() - start


def _on_mesh(batch: data.Batch, program: Program) -> dict[str, jax.Array]:
    sharding = program.batch_sharding
    return {k: jax.make_array_from_process_local_data(sharding, v) for k, v in batch.items()}


def _result(
    config: ConfigDict,
    program: Program,
    tokens: data.Tokens,
    lines: list[dict[str, Any]],
    seconds: float,
    state: TrainState,
    batch: data.Batch,
) -> dict[str, Any]:
    n_tokens = program.steps * config.batch_size * config.context
    forward_flops = forward_flops_per_token(program.model, config.context)
    diverged = any(line["loss"] is None for line in lines)
    stride = -(-len(lines) // _LOSS_CURVE_POINTS)
    changes = [line["feature_change_rms"] for line in lines if "feature_change_rms" in line]
    return {
        "width": config.model.width,
        "depth": config.model.depth,
        "parameters": num_parameters(program.model),
        "tokens": n_tokens,
        "steps": program.steps,
        "batch_size": config.batch_size,
        "optimizer": config.optimizer.name,
        "learning_rate": config.optimizer.learning_rate,
        "weight_decay": config.optimizer.weight_decay,
        "seed": config.seed,
        "validation_loss": None if diverged else lines[-1]["validation_loss"],
        "loss_curve": [[line["step"], line["loss"]] for line in lines[::stride]],
        "coordinate_check": {"feature_change_rms": changes[0]} if changes else None,
        "flops": {
            "model": 3 * forward_flops * n_tokens,
            "optimizer": program.optimizer_flops * program.steps,
        },
        "seconds": {
            "total": seconds + program.compile_seconds,
            "compile": program.compile_seconds,
            "optimizer_share": None
            if diverged
            else _optimizer_share(config, program, state, batch),
        },
        "device": jax.devices()[0].device_kind,
        "versions": {
            "python": sys.version.split()[0],
            **{name: importlib.metadata.version(name) for name in _PACKAGES},
        },
        "corpus": {
            "source": config.data.source,
            "tokenizer": config.data.tokenizer,
            "fingerprint": tokens.fingerprint,
            "training_tokens": len(tokens.train),
            "validation_tokens": len(tokens.validation),
        },
        "config": config.to_dict(),
    }


def _optimizer_share(
    config: ConfigDict, program: Program, state: TrainState, batch: data.Batch, repeats: int = 15
) -> float:
    """The part of a step's time that is not spent on loss and gradient, from medians."""
    on_mesh = _on_mesh(batch, program)
    hyperparameters = jax.device_put(Hyperparameters.of(config), program.replicated)
    jax.block_until_ready(program.loss_and_gradient(state.params, on_mesh))
    full, gradient_only = [], []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(program.loss_and_gradient(state.params, on_mesh))
        gradient_only.append(time.perf_counter() - start)
        start = time.perf_counter()
        state, _ = jax.block_until_ready(program.step(state, on_mesh, hyperparameters))
        full.append(time.perf_counter() - start)
    return max(0.0, 1 - statistics.median(gradient_only) / statistics.median(full))


@functools.lru_cache(maxsize=1)
def _load_tokens(source: str, tokenizer: str) -> data.Tokens:
    return data.load(source, tokenizer)
