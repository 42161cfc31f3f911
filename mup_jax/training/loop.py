"""One training run from beginning to end, or from where it was interrupted."""

import contextlib
import functools
import json
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from mup_jax import data
from mup_jax.training import config as config_lib
from mup_jax.training import distributed
from mup_jax.training.checkpoint import Checkpoints, load_params
from mup_jax.training.feed import Feed
from mup_jax.training.files import write_atomically
from mup_jax.training.mesh import make_mesh
from mup_jax.training.metrics import Line, MetricsWriter, Observer
from mup_jax.training.program import Hyperparameters, Program, TrainState, make_program
from mup_jax.training.record import run_record
from mup_jax.training.throughput import Progress, step_times, utilization

# [Q] (arXiv 2512.05620), Fig. 2: the features' change in one step, at this step.
COORDINATE_CHECK_STEP = 10

_PROGRESS_STEPS = 16

# After so many steps in a row whose gradient was not finite, a run gives up.
_PATIENCE = 20


class Preempted(Exception):
    """A run was asked to stop, and has saved its state."""


def claim_workdir(workdir: Path, config: ConfigDict) -> None:
    """Makes `workdir` this configuration's, on any machine.

    Raises:
      ValueError: it belongs to another configuration.
    """
    path = workdir / "config.json"
    if path.exists():
        now = json.loads(config_lib.to_json(config_lib.without_machine(config)))
        before = ConfigDict(json.loads(path.read_text()))
        changed = config_lib.differences(config_lib.without_machine(before).to_dict(), now)
        if changed:
            raise ValueError(
                f"{workdir} belongs to another configuration ({'; '.join(changed[:3])}): undo the "
                "change to go on with this one, or choose another --workdir; there "
                f"--config.init_from={workdir} keeps the weights and begins with new optimizer "
                "state, preconditioners included"
            )
        return
    workdir.mkdir(parents=True, exist_ok=True)
    write_atomically(path, config_lib.to_json(config) + "\n")


def claim_run(workdir: Path, config: ConfigDict, tokens: data.Tokens) -> None:
    """Makes `workdir` that of a run of this configuration on this text.

    Raises:
      ValueError: it was begun with another configuration, or on other text, where its place in it
        means nothing.
    """
    claim_workdir(workdir, config)
    path, fingerprint = workdir / "text.json", tokens.fingerprint
    if path.exists():
        before = json.loads(path.read_text())["fingerprint"]
        if before != fingerprint:
            raise ValueError(
                f"{workdir} was begun on other text ({before}, now {fingerprint}): restore it, or "
                "choose another --workdir"
            )
    elif distributed.is_first():
        write_atomically(path, json.dumps({"fingerprint": fingerprint}) + "\n")


def train(
    config: ConfigDict,
    workdir: str | Path,
    on_progress: Callable[[Progress], None] | None = None,
    *,
    observers: Sequence[Observer] = (),
    profile: range = range(0),
) -> dict[str, Any]:
    """Trains one model and returns what there is to know of the run.

    Writes to `workdir`: config.json, text.json (the text's fingerprint), metrics.jsonl (a line per
    step), checkpoints/ and at the end result.json. A finished run is not trained again; an
    interrupted one goes on from its last checkpoint and ends with the same numbers. SIGTERM makes
    it save and leave. With several processes, all call this with equal arguments and see the same
    `workdir`.

    A step whose loss or gradient is not finite changes neither parameters nor optimizer, its
    schedule included; it is counted as "skipped". A run that skips 20 steps in a row ends.

    Args:
      config: with the keys of `default_config`.
      workdir: of this run alone.
      on_progress: called now and then, by the first process.
      observers: called with every line of metrics.jsonl, some steps after the device took them.
      profile: steps of which a trace is written to `workdir`/profile.

    Returns:
      The contents of result.json. `validation_loss` is in nats per token; it is None where the run
      gave up, or the loss is not finite.

    Raises:
      ValueError: a bad configuration, a workdir of another one or of other text, or nothing but
        damaged checkpoints; each before anything is compiled. Where a checkpoint cannot be written,
        a CheckpointError.
      Preempted: it was asked to stop, and has saved.
    """
    config = config_lib.with_source(config)
    config_lib.validate(config)
    workdir = Path(workdir).absolute()
    mesh = make_mesh(config)
    result_path = workdir / "result.json"
    if result_path.exists():
        claim_workdir(workdir, config)
        return json.loads(result_path.read_text())
    tokens = load_tokens(config.data.source, config.data.tokenizer)
    distributed.check_equal(config_lib.identity(config), "the configuration")
    distributed.check_equal(tokens.fingerprint, f"the text of {config.data.source}")
    with jax.set_mesh(mesh):
        feed = Feed(config, tokens)
        claim_run(workdir, config, tokens)
        program = make_program(config, tokens.vocab_size)
        checkpoints = Checkpoints(workdir / "checkpoints") if config.checkpoint_every else None
        with contextlib.ExitStack() as stack:
            # Until all is saved: a second signal must not end that.
            preemption = stack.enter_context(distributed.Preemption())
            if checkpoints:
                stack.callback(checkpoints.close)
            state = _first_state(config, program, feed, checkpoints)
            start = time.perf_counter()
            _ = program.step  # compiled already where a run before had the same program
            compile_seconds = time.perf_counter() - start
            metrics = MetricsWriter(workdir / "metrics.jsonl", int(state.step), observers)
            trace = stack.enter_context(_Trace(workdir / "profile", profile))
            run = _Run(config, program, feed, metrics, checkpoints)
            state = run.take_steps(state, on_progress, trace, preemption)
        seconds: dict[str, float] = {
            "total": metrics.lines[-1]["seconds"] + compile_seconds,
            "compile": compile_seconds,
            "input": feed.seconds,
        }
        if config.measure_optimizer and not is_lost(metrics.lines):
            seconds |= step_times(program, state, next(feed), run.hyperparameters)
    return finish_run(workdir, config, program, tokens, metrics.lines, seconds)


def finish_run(
    workdir: Path,
    config: ConfigDict,
    program: Program,
    tokens: data.Tokens,
    lines: Sequence[Line],
    seconds: Mapping[str, float],
) -> dict[str, Any]:
    """Writes what there is to know of a run to result.json, and returns it."""
    result = run_record(config, program, tokens, lines)
    if is_lost(lines):
        logging.getLogger(__name__).warning(_lost_message(lines))
        result["validation_loss"] = None
    result["seconds"] = {"gradient": None, "optimizer_share": None, **seconds}
    if distributed.is_first():
        write_atomically(workdir / "result.json", json.dumps(result, indent=1) + "\n")
    distributed.wait_for_all("result was written")
    return result


def _first_state(
    config: ConfigDict, program: Program, feed: Feed, checkpoints: Checkpoints | None
) -> TrainState:
    """The state to go on from; the feed is moved to its place."""
    restored = checkpoints.restore(program.abstract_state) if checkpoints else None
    if restored is not None:
        state, position = restored
        feed.set_state(position)
        return state
    if config.init_from:
        folder = Path(config.init_from).absolute() / "checkpoints"
        return program.begin(load_params(folder, program.abstract_state.params))
    return program.init(config.seed)


class _Run:
    """The steps of a run, and what is written of them."""

    def __init__(
        self,
        config: ConfigDict,
        program: Program,
        feed: Feed,
        metrics: MetricsWriter,
        checkpoints: Checkpoints | None,
    ):
        self._config, self._program, self._feed = config, program, feed
        self._metrics, self._checkpoints = metrics, checkpoints
        self.hyperparameters = jax.device_put(Hyperparameters.of(config), program.replicated)

    def take_steps(
        self,
        state: TrainState,
        on_progress: Callable[[Progress], None] | None,
        trace: "_Trace",
        preemption: distributed.Preemption,
    ) -> TrainState:
        """Takes the steps that are missing; returns the last state."""
        config, program, metrics = self._config, self._program, self._metrics
        is_due = lambda step, every: every and step % every == 0
        shows = on_progress if distributed.is_first() else None
        first_step = int(state.step)
        shown: Line = {"step": first_step, "seconds": metrics.seconds}
        metrics.start()
        for step in range(first_step + 1, program.steps + 1):
            trace.before(step)
            state, values = self._step(step, state, next(self._feed))
            is_last = step == program.steps
            if is_last or is_due(step, config.eval_every):
                values["validation_loss"] = program.evaluate(state.params, self._feed.validation)
            if is_due(step, config.health_every):
                values |= program.health(state.opt_state)
            metrics.add(step, **values)
            leaves = preemption.requested(step) and not is_last
            trace.after(step, state)
            if is_last or leaves or is_due(step, config.checkpoint_every):
                self._save(step, state)
            if leaves:
                saved = "is saved" if self._checkpoints else "is lost, checkpoint_every is 0"
                raise Preempted(f"asked to stop: step {step} of {program.steps} {saved}")
            if is_lost(metrics.lines):
                break
            written = metrics.lines[-1] if metrics.lines else shown
            if shows and written["step"] >= shown["step"] + _PROGRESS_STEPS:
                shows(self._progress(shown, written))
                shown = written
        metrics.close()  # waits for the device
        return state

    def _step(
        self, step: int, state: TrainState, batch: dict[str, jax.Array]
    ) -> tuple[TrainState, dict[str, Any]]:
        """One step, with the coordinate check where it is due."""
        program = self._program
        if step != COORDINATE_CHECK_STEP:
            return program.step(state, batch, self.hyperparameters)
        before = program.features(state.params, batch["inputs"])
        state, values = program.step(state, batch, self.hyperparameters)
        after = program.features(state.params, batch["inputs"])
        values["feature_change_rms"] = jnp.sqrt(jnp.mean(jnp.square(after - before)))
        return state, values

    def _progress(self, before: Line, now: Line) -> Progress:
        config, program = self._config, self._program
        tokens = (now["step"] - before["step"]) * config.batch_size * config.context
        rate = tokens / (now["seconds"] - before["seconds"])
        mfu = utilization(program.model, config, rate)
        return Progress(now["step"], program.steps, now["loss"], rate, mfu)

    def _save(self, step: int, state: TrainState) -> None:
        self._metrics.flush()
        if self._checkpoints:
            self._checkpoints.save(step, state, self._feed.get_state())


class _Trace:
    """Writes a trace of some steps to a folder, for TensorBoard or Perfetto."""

    def __init__(self, folder: Path, steps: range):
        self._folder, self._steps = folder, steps
        self._is_on = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: Any) -> None:
        if self._is_on:
            jax.profiler.stop_trace()

    def before(self, step: int) -> None:
        if step in self._steps and not self._is_on:
            jax.profiler.start_trace(self._folder)
            self._is_on = True

    def after(self, step: int, state: TrainState) -> None:
        if self._is_on and step == self._steps[-1]:
            jax.block_until_ready(state)
            jax.profiler.stop_trace()
            self._is_on = False


def is_lost(lines: Sequence[Line]) -> bool:
    """Whether all of the last steps were skipped."""
    if len(lines) < _PATIENCE:
        return False
    before = lines[-_PATIENCE - 1]["skipped"] if len(lines) > _PATIENCE else 0
    return lines[-1]["skipped"] - before == _PATIENCE


def _lost_message(lines: Sequence[Line]) -> str:
    return (
        f"the run has ended: no gradient was finite from step {lines[-_PATIENCE]['step']} on, or "
        "before. Look in metrics.jsonl at the norms of the layer groups up to there, and try a "
        "lower learning rate or a longer warm-up"
    )


@functools.lru_cache(maxsize=1)
def load_tokens(source: str, tokenizer: str) -> data.Tokens:
    return data.load(source, tokenizer)
