"""Model, optimizer and loss as the compiled programs of a training run.

Learning rate, weight decay and seed are arguments of the programs, so that a sweep over them
compiles once.
"""

import functools
import inspect
import json
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from optax.contrib import MuonDimensionNumbers

from mup_jax.models.llama import Llama, LlamaConfig, layer_groups, roles, shard
from mup_jax.models.sharding import place
from mup_jax.training.config import (
    Config,
    as_namespace,
    epsilons_of,
    make_optimizer,
    model_config,
    optimizer_of,
    program_identity,
    steps_of,
)
from mup_jax.training.flops import count_flops_by_precision
from mup_jax.training.mesh import batch_sharding
from mup_jax.transfer import infer_shapes
from mup_jax.transforms.health import preconditioner_health

# Blocks are stacked: (layers, d_in, d_out).
WEIGHT_DIMENSION_NUMBERS = MuonDimensionNumbers(-2, -1)


class TrainState(NamedTuple):
    """All that training changes; a checkpoint holds this and the position in the data."""

    params: Any
    opt_state: Any
    step: jax.Array
    skipped: jax.Array  # int32: steps so far whose gradient was not finite


class Hyperparameters(NamedTuple):
    """The tuned numbers of a run: float32 scalars, those of the base model.

    `epsilon` counts only where the configuration has one.
    """

    learning_rate: Any
    weight_decay: Any
    epsilon: Any = 0.0
    embedding_readout_factor: Any = 1.0

    @classmethod
    def of(cls, config: Config) -> "Hyperparameters":
        given = config.optimizer
        values = given.learning_rate, given.weight_decay, given.epsilon or 0.0
        return cls(*map(jnp.float32, (*values, given.embedding_readout_factor)))


def make_schedule(config: Config) -> optax.Schedule:
    """s(t): linear from 0 to 1 over the warm-up tokens, then linear to 0 at the last step."""
    steps = steps_of(config)
    warmup = min(round(config.warmup_tokens / (config.batch_size * config.context)), steps - 1)
    rise = optax.linear_schedule(0.0, 1.0, warmup)
    fall = optax.linear_schedule(1.0, 0.0, steps - warmup)
    return optax.join_schedules([rise, fall], [warmup]) if warmup else fall


def cross_entropy(logits_BTV: jax.Array, targets_BT: jax.Array) -> jax.Array:
    """Mean over all B·T positions, in nats per token; the vocabulary may be divided over a mesh."""
    # A sum, where Optax gathers from the vocabulary: it runs over devices as well.
    classes_V = place(jnp.arange(logits_BTV.shape[-1]), "vocab")
    of_target_BTV = jnp.where(targets_BT[..., None] == classes_V, logits_BTV, 0.0)
    return (jax.nn.logsumexp(logits_BTV, axis=-1) - of_target_BTV.sum(axis=-1)).mean()


class Program:
    """The functions of a run, jitted for the mesh in use (`jax.set_mesh`) when it is made.

    Args:
      config: of `default_config`, or of `as_namespace`: a program needs neither Grain nor
        ml_collections.
      vocab_size: of the model.

    Attributes:
      mesh: that mesh.
      model: the Llama's configuration.
      steps: optimizer steps of the whole run.
      schedule: of the learning rate; see `make_schedule`.
      batch_sharding: of a batch's arrays `(B, T)`.
      shapes: tree of ParamShape of the parameters.
    """

    def __init__(self, config: Config, vocab_size: int):
        self.config = config
        self.mesh = jax.sharding.get_mesh()
        platform = self.mesh.devices.flat[0].platform
        self.model = model_config(config, vocab_size, platform=platform)
        self.steps = steps_of(config)
        self.schedule = make_schedule(config)
        base = model_config(config, vocab_size, base=True)
        self._graphdef, params = _abstract_model(self.model)
        self.shapes = infer_shapes(
            _abstract_model(base)[1],
            params,
            weight_dimension_numbers=WEIGHT_DIMENSION_NUMBERS,
            depth_ratio=self.model.depth / base.depth,
            roles=roles,
        )
        self.batch_sharding = batch_sharding(config)
        self.loss_and_gradient = jax.jit(self._loss_and_gradient)
        self.evaluate = jax.jit(self._evaluate)
        self.health = jax.jit(preconditioner_health)
        self.features = jax.jit(self._features)

    @property
    def replicated(self) -> NamedSharding:
        return NamedSharding(self.mesh, PartitionSpec())

    @functools.cached_property
    def step(self) -> Any:
        """`(state, batch, hyperparameters) -> (state, metrics)`; donates the state."""
        return self.lower_step().compile()

    def lower_step(self) -> Any:
        """`step` as it is before it is compiled."""
        arguments = self.abstract_state, self.abstract_batch, _abstract_hyperparameters()
        return jax.jit(self._step, donate_argnums=0).lower(*arguments)

    @functools.cached_property
    def init(self) -> Any:
        """`seed -> state`."""
        shardings = jax.tree.map(lambda x: x.sharding, self.abstract_state)
        return jax.jit(self._init, out_shardings=shardings)

    @functools.cached_property
    def begin(self) -> Any:
        """`params -> state` at the first step."""
        shardings = jax.tree.map(lambda x: x.sharding, self.abstract_state)
        return jax.jit(self._begin, out_shardings=shardings)

    @functools.cached_property
    def abstract_state(self) -> TrainState:
        """Parameters as `models.sharding` lays them out; the optimizer divides its own state."""

        def placed(x: Any) -> jax.ShapeDtypeStruct:
            spec = PartitionSpec() if x.sharding is None else x.sharding.spec
            return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(self.mesh, spec))

        with jax.set_mesh(self.mesh):
            return jax.tree.map(placed, jax.eval_shape(self._init, 0))

    @property
    def abstract_batch(self) -> dict[str, jax.ShapeDtypeStruct]:
        shape = (self.config.batch_size, self.config.context)
        tokens = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=self.batch_sharding)
        return {"inputs": tokens, "targets": tokens}

    @functools.cached_property
    def optimizer_flops(self) -> float:
        """Matrix operations of the optimizer per step."""
        return sum(self.optimizer_flops_by_precision().values())

    def optimizer_flops_by_precision(self, platform: str | None = None) -> dict[str, float]:
        """As `optimizer_flops`; see `count_flops_by_precision`."""
        state = self.abstract_state
        update = functools.partial(self._update, Hyperparameters(1.0, 0.0))
        with jax.set_mesh(self.mesh):
            arguments = state.params, state, self.abstract_batch
            return count_flops_by_precision(update, *arguments, platform=platform)

    def _merge(self, params: Any) -> Llama:
        return nnx.merge(self._graphdef, params)

    def optimizer(self, hyperparameters: Hyperparameters) -> optax.GradientTransformationExtraArgs:
        """Clipping, the optimizer, its schedule and weight decay."""
        config = self.config.optimizer
        make = optimizer_of(self.config)
        options = dict(config.options)
        if "weight_dimension_numbers" in inspect.signature(make).parameters:
            options["weight_dimension_numbers"] = WEIGHT_DIMENSION_NUMBERS
        if config.epsilon is not None:
            options |= dict.fromkeys(
                epsilons_of(config.name, config.options, getattr(config, "source", "")),
                hyperparameters.epsilon,
            )
        optimizer = make_optimizer(
            make,
            hyperparameters.learning_rate,
            embedding_readout_learning_rate=hyperparameters.learning_rate
            * hyperparameters.embedding_readout_factor,
            weight_decay=hyperparameters.weight_decay,
            schedule=self.schedule,
            shapes=self.shapes,
            options=options,
        )
        if not self.config.clip_norm:
            return optimizer
        return optax.chain(optax.clip_by_global_norm(self.config.clip_norm), optimizer)

    def _init(self, seed: jax.Array) -> TrainState:
        model = Llama(self.model, rngs=nnx.Rngs(jax.random.key(seed)))
        params = shard(nnx.to_pure_dict(nnx.state(model, nnx.Param)))
        return self._begin(params)

    def _begin(self, params: Any) -> TrainState:
        opt_state = self.optimizer(Hyperparameters(1.0, 0.0)).init(params)
        return TrainState(params, opt_state, *jnp.zeros((2,), jnp.int32))

    def loss(self, params: Any, batch: dict[str, jax.Array]) -> jax.Array:
        """In nats per token."""
        return cross_entropy(self._merge(params)(batch["inputs"]), batch["targets"])

    def _features(self, params: Any, inputs: jax.Array) -> jax.Array:
        return self._merge(params).features(inputs)

    def activations(self, params: Any, batch: dict[str, jax.Array]) -> dict[str, jax.Array]:
        """Of `Llama.activations`."""
        return self._merge(params).activations(batch["inputs"])

    def _update(
        self,
        hyperparameters: Hyperparameters,
        gradient: Any,
        state: TrainState,
        batch: dict[str, jax.Array],
    ) -> tuple[Any, optax.OptState]:
        """The optimizer's updates and state; those without curvature ignore the functions."""
        with jax.named_scope("optimizer"):
            return self.optimizer(hyperparameters).update(
                gradient,
                state.opt_state,
                state.params,
                obj_fn=lambda params: self.loss(params, batch),
                logits_fn=lambda params: self._merge(params)(batch["inputs"]),
            )

    def _loss_and_gradient(self, params: Any, batch: dict[str, jax.Array]) -> tuple[jax.Array, Any]:
        """Means over the batch, of which one part after the other is in memory."""
        loss_and_gradient = jax.value_and_grad(self.loss)
        n = self.config.microbatches
        if n == 1:
            return loss_and_gradient(params, batch)

        def part(x: jax.Array) -> jax.Array:
            # Every n-th row: each device has its share of every part.
            return jnp.moveaxis(x.reshape(-1, n, *x.shape[1:]), 1, 0)

        def add(total: Any, microbatch: Any) -> tuple[Any, None]:
            return jax.tree.map(jnp.add, total, loss_and_gradient(params, microbatch)), None

        zero = jax.tree.map(jnp.zeros_like, (jnp.float32(0), params))
        total, _ = jax.lax.scan(add, zero, jax.tree.map(part, batch))
        return jax.tree.map(lambda x: x / n, total)

    def _step(
        self, state: TrainState, batch: dict[str, jax.Array], hyperparameters: Hyperparameters
    ) -> tuple[TrainState, dict[str, jax.Array]]:
        loss, gradient = self._loss_and_gradient(state.params, batch)
        updates, opt_state = self._update(hyperparameters, gradient, state, batch)
        params = optax.apply_updates(state.params, updates)
        norms = {"gradient_norm": group_norms(gradient), "update_norm": group_norms(updates)}
        # What is not finite would stay in moments and preconditioners for good.
        healthy = jnp.isfinite(norms["gradient_norm"]["all"]) & jnp.isfinite(loss)
        params, opt_state = jax.tree.map(
            functools.partial(jnp.where, healthy),
            (params, opt_state),
            (state.params, state.opt_state),
        )
        norms["parameter_norm"] = group_norms(params)
        skipped = state.skipped + ~healthy
        metrics = {
            "loss": loss,
            **{name: norm.pop("all") for name, norm in norms.items()},
            **{f"{name}/{group}": x for name, norm in norms.items() for group, x in norm.items()},
            "learning_rate": hyperparameters.learning_rate
            * self.schedule(state.step - state.skipped),
            "skipped": skipped,
        }
        return TrainState(params, opt_state, state.step + 1, skipped), metrics

    def _evaluate(self, params: Any, batches: dict[str, jax.Array]) -> jax.Array:
        """Mean loss over stacked batches `(N, B, T)`."""
        losses = jax.lax.map(lambda batch: self.loss(params, batch), batches)
        return losses.mean()


def group_norms(tree: Any) -> dict[str, jax.Array]:
    """Euclidean norms of a tree like a Llama's parameters: of "all", and of each `layer_groups`."""
    groups = layer_groups(tree)
    squares = [jnp.sum(jnp.square(x)) for x in jax.tree.leaves(tree)]
    names = jax.tree.leaves(groups)
    total = {"all": sum(squares)}
    for name, square in zip(names, squares, strict=True):
        total[name] = total.get(name, 0.0) + square
    return {name: jnp.sqrt(square) for name, square in total.items()}


def make_program(config: Config, vocab_size: int) -> Program:
    """The program of a configuration; one for all learning rates, weight decays and seeds."""
    return _cached_program(program_identity(config), vocab_size, jax.sharding.get_mesh())


@functools.lru_cache(maxsize=4)  # each holds its compiled programs
def _cached_program(identity: str, vocab_size: int, mesh: Any) -> Program:
    return Program(as_namespace(json.loads(identity)), vocab_size)


def _abstract_model(config: LlamaConfig) -> tuple[Any, Any]:
    """Graph definition and abstract parameters, as a pure dict."""
    model = nnx.eval_shape(lambda: Llama(config, rngs=nnx.Rngs(0)))
    graphdef, state = nnx.split(model, nnx.Param)
    return graphdef, nnx.to_pure_dict(state)


def _abstract_hyperparameters() -> Hyperparameters:
    return Hyperparameters(
        *(jax.ShapeDtypeStruct((), jnp.float32) for _ in Hyperparameters._fields)
    )
