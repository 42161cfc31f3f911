"""Runs that differ in learning rate, weight decay, ε or seed alone, trained by one program.

A small model leaves most of a device idle, and most of a short run is compilation. Here the runs
are divided over all devices; each device takes its runs `lanes` at a time, vectorized.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from mup_jax import data
from mup_jax.training import config as config_lib
from mup_jax.training.feed import Feed
from mup_jax.training.loop import (
    COORDINATE_CHECK_STEP,
    claim_run,
    finish_run,
    is_lost,
    load_tokens,
)
from mup_jax.training.mesh import make_mesh
from mup_jax.training.metrics import Line, MetricsWriter
from mup_jax.training.program import Hyperparameters, Program, TrainState, make_program
from mup_jax.training.throughput import Progress, step_times, utilization

_AXIS = "runs"
_REFRESHING = ("shampoo", "soap", "sophia")
# Numbers kept of a token in a layer, in units of the width: twice those of the matrix products.
_ACTIVATIONS = 40
# Threads cost small matrices more than they gain: every run has a core.
_CPU_OPTIONS = {"xla_cpu_experimental_ynn_fusion_type": "", "xla_cpu_multi_thread_eigen": False}
_METRICS = ("loss", "gradient_norm", "learning_rate", "skipped")
# Steps between two looks at the device.
_CHUNK = 32


def most_runs(config: ConfigDict, vocab_size: int, memory: int) -> int:
    """How many runs of this program fit into so many bytes on every device, at least 1.

    Counts parameters and optimizer state twice, the new beside the old, and again as much for what
    the optimizer computes in between; and logits and activations, none computed again, as float32.
    """
    with jax.set_mesh(_mesh(1)):
        program = Program(config, vocab_size)
        state = program.abstract_state
    of_state = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))
    model = program.model
    of_token = 3 * vocab_size + _ACTIVATIONS * model.depth * model.width
    size = 4 * of_state + 4 * config.batch_size * config.context * of_token
    return max(1, memory // size) * jax.local_device_count()


def train_vectorized(
    configs: Sequence[ConfigDict],
    workdirs: Sequence[str | Path],
    on_progress: Callable[[int, Progress], None] | None = None,
    *,
    lanes: int | None = None,
) -> list[dict[str, Any]]:
    """Trains many runs as `train` trains each, up to rounding.

    Writes to every workdir what `train` does, but for checkpoints: interrupted, all begin again.
    Nothing but the last step is validated; of the norms that of the whole gradient is measured
    alone, and the health of preconditioners is not.

    Args:
      configs: equal in all that a program is made of (`program_identity`).
      workdirs: of each run alone; what is there of an unfinished run begins again.
      on_progress: called now and then, with the place of a run in `configs`.
      lanes: runs that a device takes at once, vectorized; None for 1 on a CPU, whose caches hold no
        more, and of optimizers that refresh something now and then, which vectorized they do at
        every step; for all runs otherwise.

    Returns:
      For each run the contents of its result.json. Of "seconds", "total" and "compile" are an equal
      share of those of the program, and "together" is how many runs shared it.

    Raises:
      ValueError: as `train`; the runs differ in more than a program's arguments, or one of them
        has finished.
    """
    configs = [config_lib.with_source(config) for config in configs]
    _check(configs)
    for config in configs:
        config_lib.validate(config)
    paths = [Path(workdir).absolute() for workdir in workdirs]
    first = configs[0]
    tokens = load_tokens(first.data.source, first.data.tokenizer)
    for config, path in zip(configs, paths, strict=True):
        if (path / "result.json").exists():
            raise ValueError(f"the run in {path} has finished: leave it out")
        claim_run(path, config, tokens)
    devices = min(jax.local_device_count(), len(configs))
    if lanes is None:
        one = jax.default_backend() == "cpu" or first.optimizer.name in _REFRESHING
        lanes = 1 if one else len(configs)
    with ThreadPoolExecutor(1) as beside, jax.set_mesh(_mesh(devices)):
        start = time.perf_counter()
        alone = beside.submit(_Alone, first, tokens) if first.measure_optimizer else None
        runs = _Runs(configs, tokens, lanes)
        writers = [MetricsWriter(path / "metrics.jsonl", 0, lag=0) for path in paths]
        states = runs.train(writers, on_progress)
        seconds = time.perf_counter() - start
        for writer in writers:
            writer.close()
    healthy = [i for i, writer in enumerate(writers) if not is_lost(writer.lines)]
    timings = alone.result().step_times(states, healthy) if alone else {}
    shared = {
        "total": seconds / len(configs),
        "compile": runs.compile_seconds / len(configs),
        "input": runs.input_seconds / len(configs),
        "together": len(configs),
        **timings,
    }
    return [
        finish_run(path, config, runs.program, tokens, writer.lines, shared)
        for config, writer, path in zip(configs, writers, paths, strict=True)
    ]


def _check(configs: Sequence[ConfigDict]) -> None:
    if jax.process_count() > 1:
        raise ValueError(f"{jax.process_count()} processes: runs are vectorized within one only")
    programs = [config_lib.program_identity(config) for config in configs]
    for config, program in zip(configs, programs, strict=True):
        if program != programs[0]:
            changed = config_lib.differences(configs[0].to_dict(), config.to_dict())
            raise ValueError(
                f"runs of different programs cannot be vectorized ({'; '.join(changed[:3])}): "
                "give those that differ in learning rate, weight decay, epsilon or seed alone"
            )
    if configs[0].init_from:
        raise ValueError(f"config.init_from={configs[0].init_from!r}: train this run on its own")


def _mesh(devices: int) -> jax.sharding.Mesh:
    return jax.make_mesh((devices,), (_AXIS,), devices=jax.local_devices()[:devices])


class _Alone:
    """A run by itself, as `train` has it: its programs are compiled beside those of all runs."""

    def __init__(self, config: ConfigDict, tokens: data.Tokens):
        self._config, self._tokens = config, tokens
        self._mesh = make_mesh(config)
        with jax.set_mesh(self._mesh):
            self._program = make_program(config, tokens.vocab_size)
            params, batch = self._program.abstract_state.params, self._program.abstract_batch
            zeros = lambda x: jax.device_put(np.zeros(x.shape, x.dtype), x.sharding)
            self._program.loss_and_gradient(*jax.tree.map(zeros, (params, batch)))
            _ = self._program.step

    def step_times(self, states: Any, runs: Sequence[int]) -> dict[str, float]:
        """Of a step, from the last state of the first of these runs; empty where there is none."""
        if not runs:
            return {}
        alone = jax.tree.map(lambda x: x[runs[0]], jax.device_get(states))
        with jax.set_mesh(self._mesh):
            shardings = jax.tree.map(lambda x: x.sharding, self._program.abstract_state)
            state = jax.device_put(alone, shardings)
            hyperparameters = Hyperparameters.of(self._config)
            batch = next(Feed(self._config, self._tokens))
            return step_times(self._program, state, batch, hyperparameters)


class _Runs:
    """The programs of all runs, on a mesh of one axis over which they are divided."""

    def __init__(self, configs: Sequence[ConfigDict], tokens: data.Tokens, lanes: int):
        self.configs = configs
        self._mesh = jax.sharding.get_mesh()
        with jax.set_mesh(_mesh(1)):  # each run has a device to itself
            self.program = Program(configs[0], tokens.vocab_size)
        self._lanes = lanes
        # Every device has as many: the first run fills the gaps.
        filled = [*configs, *[configs[0]] * (-len(configs) % self._mesh.size)]
        self._seeds = [config.seed for config in filled]
        self._hyperparameters = self._put(
            jax.tree.map(lambda *xs: np.stack(xs), *map(Hyperparameters.of, filled))
        )
        windows = {"context": configs[0].context, "batch_size": configs[0].batch_size}
        self._batches = {
            seed: iter(data.training_batches(tokens.train, **windows, seed=seed))
            for seed in self._seeds
        }
        self._validation = data.validation_batches(
            tokens.validation, **windows, max_batches=configs[0].eval_batches
        )
        self.compile_seconds = self.input_seconds = 0.0

    def train(
        self,
        writers: Sequence[MetricsWriter],
        on_progress: Callable[[int, Progress], None] | None,
    ) -> Any:
        """Takes all steps; returns the last states."""
        program = self.program
        seeds = self._put(np.array(self._seeds, np.int32))
        init, advance, features, validate = self._compile(seeds)
        states = init(seeds, ())
        for writer in writers:
            writer.start()
        self._last_look = time.perf_counter()
        taken: tuple[int, int, dict[str, jax.Array]] | None = None
        for first, last in _chunks(program.steps):
            batches = self._next_batches(last - first)
            is_checked = last == COORDINATE_CHECK_STEP
            if is_checked:
                inputs = batches["inputs"][:, 0]
                before = features((states.params, inputs), ())
            given = (states, batches, self._hyperparameters)
            states, metrics = advance(given, np.int32(last - first))
            if is_checked:
                change = features((states.params, inputs), ()) - before
                squares = jnp.mean(jnp.square(change), axis=range(1, change.ndim))
                metrics["feature_change_rms"] = jnp.sqrt(squares)[:, None]
            if last == program.steps:
                metrics["validation_loss"] = validate(states.params, self._validation)
            if taken:  # while the devices take the next steps
                self._write(writers, on_progress, *taken)
            taken = first, last, metrics
        if taken:
            self._write(writers, on_progress, *taken)
        return states

    def _write(
        self,
        writers: Sequence[MetricsWriter],
        on_progress: Callable[[int, Progress], None] | None,
        first: int,
        last: int,
        metrics: dict[str, jax.Array],
    ) -> None:
        """The lines of the steps first + 1 to last; waits for the devices."""
        values = {key: np.asarray(x).tolist() for key, x in metrics.items()}
        seconds = time.perf_counter() - self._last_look
        self._last_look += seconds
        validation_losses = values.pop("validation_loss", None)
        for i, writer in enumerate(writers):
            for step in range(first + 1, last + 1):
                if is_lost(writer.lines):
                    break
                line = {key: x[i][step - first - 1] for key, x in values.items()}
                if validation_losses and step == last:
                    line["validation_loss"] = validation_losses[i]
                writer.add(step, **line)
            if on_progress and not is_lost(writer.lines):
                on_progress(i, self._progress(writer.lines[-1], (last - first) / seconds))

    def _take_steps(self, each: Any, count: jax.Array) -> tuple[TrainState, dict[str, jax.Array]]:
        """The state after `count` steps, and their metrics, each of shape `(_CHUNK,)`.

        Norms are left out but for that of the gradient: they take a tenth of a small model's step.
        """
        state, batches, hyperparameters = each

        def step(i: jax.Array, carry: Any) -> Any:
            state, metrics = carry
            batch = jax.tree.map(lambda x: x[i], batches)
            state, values = one(state, batch, hyperparameters)
            return state, jax.tree.map(lambda xs, x: xs.at[i].set(x), metrics, values)

        def one(*arguments: Any) -> tuple[TrainState, dict[str, jax.Array]]:
            state, values = self.program._step(*arguments)
            return state, {key: values[key] for key in _METRICS}

        batch = jax.tree.map(lambda x: x[0], batches)
        _, values = jax.eval_shape(one, state, batch, hyperparameters)
        metrics = jax.tree.map(lambda x: jnp.zeros((_CHUNK, *x.shape), x.dtype), values)
        return jax.lax.fori_loop(0, count, step, (state, metrics))

    def _compile(self, seeds: jax.Array) -> list[Any]:
        """The compiled programs `init`, `advance`, `features` and `validate`."""
        start = time.perf_counter()
        program = self.program
        divided = NamedSharding(self._mesh, PartitionSpec(_AXIS))
        init = self._lower(lambda each, _: program._init(each), seeds, ())
        states = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=divided), init.out_info
        )
        batches = self._next_batches(0)
        lowered = [
            init,
            self._lower(self._take_steps, (states, batches, self._hyperparameters), np.int32(0)),
            self._lower(
                lambda each, _: program._features(*each),
                (states.params, batches["inputs"][:, 0]),
                (),
            ),
            self._lower(program._evaluate, states.params, self._validation),
        ]
        options = _CPU_OPTIONS if jax.default_backend() == "cpu" else None
        with ThreadPoolExecutor() as pool:  # the compiler uses one core for most of its work
            compiled = list(pool.map(lambda each: each.compile(options), lowered))
        self.compile_seconds = time.perf_counter() - start
        return compiled

    def _lower(self, function: Any, each: Any, shared: Any) -> Any:
        """`function(each, shared)` of every run: `each` has an axis of runs, `shared` is common."""
        of_runs, whole = PartitionSpec(_AXIS), PartitionSpec()

        def on_device(each: Any, shared: Any) -> Any:
            lanes = self._lanes if self._lanes > 1 else None
            return jax.lax.map(lambda x: function(x, shared), each, batch_size=lanes)

        mapped = jax.shard_map(
            on_device, in_specs=(of_runs, whole), out_specs=of_runs, check_vma=False
        )
        return jax.jit(mapped).lower(each, shared)

    def _next_batches(self, steps: int) -> dict[str, jax.Array]:
        """Of shape `(runs, _CHUNK, B, T)`: so many batches of each run, and zeros after them."""
        start = time.perf_counter()
        shape = (_CHUNK, self.configs[0].batch_size, self.configs[0].context)
        of_seed = {
            seed: {key: np.zeros(shape, np.int32) for key in ("inputs", "targets")}
            for seed in self._batches
        }
        for seed, batches in self._batches.items():
            for i in range(steps):
                for key, rows in next(batches).items():
                    of_seed[seed][key][i] = rows
        chosen = [of_seed[seed] for seed in self._seeds]
        batches = self._put(jax.tree.map(lambda *xs: np.stack(xs), *chosen))
        self.input_seconds += time.perf_counter() - start
        return batches

    def _put(self, tree: Any) -> Any:
        """On the devices, divided by runs."""
        return jax.device_put(tree, NamedSharding(self._mesh, PartitionSpec(_AXIS)))

    def _progress(self, line: Line, steps_per_second: float) -> Progress:
        config, program = self.configs[0], self.program
        rate = steps_per_second * config.batch_size * config.context
        mfu = utilization(program.model, config, rate)
        return Progress(line["step"], program.steps, line["loss"], rate, mfu)


def _chunks(steps: int) -> Iterator[tuple[int, int]]:
    """`(first, last)`: the steps first + 1 to last; the coordinate check's stands alone."""
    first = 0
    while first < steps:
        last = min(first + _CHUNK, steps)
        for end in (COORDINATE_CHECK_STEP - 1, COORDINATE_CHECK_STEP):
            if first < end < last:
                last = end
        yield first, last
        first = last
