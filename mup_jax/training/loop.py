"""One training run from beginning to end, or from where it was interrupted."""

import functools
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from mup_jax import data
from mup_jax.training import config as config_lib
from mup_jax.training.checkpoint import Checkpoints
from mup_jax.training.mesh import data_parallel_mesh
from mup_jax.training.metrics import MetricsWriter, write_atomically
from mup_jax.training.program import Hyperparameters, Program, TrainState, make_program
from mup_jax.training.record import optimizer_share, run_record

# [Q] (arXiv 2512.05620), Fig. 2: the features' change in one step, at this step.
_COORDINATE_CHECK_STEP = 10

_PROGRESS_STEPS = 16

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
        hyperparameters = jax.device_put(Hyperparameters.of(config), program.replicated)
        checkpoints = Checkpoints(workdir / "checkpoints") if config.checkpoint_every else None
        try:
            restored = checkpoints.restore(program.abstract_state) if checkpoints else None
            if restored is None:
                state = program.init(config.seed)
            else:
                state, position = restored
                batches.set_state(position)
            start = time.perf_counter()
            _ = program.step  # compiled already where a run before had the same program
            compile_seconds = time.perf_counter() - start
            metrics = MetricsWriter(workdir / "metrics.jsonl", int(state.step))
            state, seconds = _train_steps(
                config, program, state, hyperparameters, batches, validation, metrics, checkpoints,
                on_progress,
            )  # fmt: skip
        finally:
            if checkpoints:
                checkpoints.close()
        result = run_record(config, program, tokens, metrics.lines)
        result["seconds"] = {
            "total": seconds + compile_seconds,
            "compile": compile_seconds,
            "optimizer_share": None,
        }
        if config.measure_optimizer and result["validation_loss"] is not None:
            batch = _on_mesh(next(batches), program)
            share = optimizer_share(program, state, batch, hyperparameters)
            result["seconds"]["optimizer_share"] = share
    write_atomically(result_path, json.dumps(result, indent=1) + "\n")
    return result


def _train_steps(
    config: ConfigDict,
    program: Program,
    state: TrainState,
    hyperparameters: Hyperparameters,
    batches: Any,
    validation: data.Batch,
    metrics: MetricsWriter,
    checkpoints: Checkpoints | None,
    on_progress: Progress | None,
) -> tuple[TrainState, float]:
    """Takes the steps that are missing.

    Returns:
      The last state, and the seconds that all steps took, those before an interruption included.
    """
    elapsed = metrics.lines[-1]["seconds"] if metrics.lines else 0.0
    start = time.perf_counter() - elapsed

    def evaluate(params: Any) -> jax.Array:
        return program.evaluate(params, jax.device_put(validation, program.replicated))

    first_step = shown = int(state.step)
    for step in range(first_step + 1, program.steps + 1):
        batch = _on_mesh(next(batches), program)
        if step == _COORDINATE_CHECK_STEP:
            before = program.features(state.params, batch["inputs"])
        state, values = program.step(state, batch, hyperparameters)
        if step == _COORDINATE_CHECK_STEP:
            after = program.features(state.params, batch["inputs"])
            values["feature_change_rms"] = jnp.sqrt(jnp.mean(jnp.square(after - before)))
        is_last = step == program.steps
        if is_last or (config.eval_every and step % config.eval_every == 0):
            values["validation_loss"] = evaluate(state.params)
        metrics.add(step, **values, seconds=time.perf_counter() - start)
        if checkpoints and (step % config.checkpoint_every == 0 or is_last):
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


@functools.lru_cache(maxsize=1)
def _load_tokens(source: str, tokenizer: str) -> data.Tokens:
    return data.load(source, tokenizer)
