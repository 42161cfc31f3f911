"""The smallest runs that train: a step compiles in seconds."""

import functools

import jax
import numpy as np
from ml_collections import ConfigDict

from mup_jax.training import default_config
from mup_jax.training.mesh import AXES
from mup_jax.training.program import Hyperparameters, Program, make_program

VOCABULARY = 96
STEPS = 40
LEARNING_RATE = 3e-2


def tiny_config(**changes: object) -> ConfigDict:
    """A configuration; `changes` are keys with dots written as double underscores."""
    config = default_config()
    config.model.update(width=16, depth=1)
    config.base.update(width=16, depth=1)
    config.update(context=16, batch_size=8, tokens=STEPS * 128, warmup_tokens=4 * 128)
    config.update(eval_batches=2, eval_every=20, checkpoint_every=10)
    config.optimizer.update(name="adamw", learning_rate=1e-2)
    for key, value in changes.items():
        *path, last = key.split("__")
        functools.reduce(lambda node, name: node[name], path, config)[last] = value
    return config


@functools.cache
def mesh_of(devices: int) -> jax.sharding.Mesh:
    return jax.make_mesh((devices, 1, 1), AXES, devices=jax.devices()[:devices])


def program_of(devices: int, **changes: object) -> Program:
    with jax.set_mesh(mesh_of(devices)):
        return make_program(tiny_config(**changes), VOCABULARY)


def some_tokens(step: int = 0) -> dict[str, np.ndarray]:
    """A batch of a sequence that can be learned: every token follows from the one before."""
    start = np.random.default_rng(step).integers(0, 8, (8, 1))
    tokens = ((start + np.arange(17)) % 8).astype(np.int32)
    return {"inputs": tokens[:, :-1], "targets": tokens[:, 1:]}


def run_steps(program: Program, devices: int, steps: int, seed: int = 0, **changes: object):
    """The state after some steps from a fresh start, and the metrics of every step."""
    with jax.set_mesh(mesh_of(devices)):
        hyperparameters = jax.device_put(
            Hyperparameters.of(tiny_config(**changes)), program.replicated
        )
        state, metrics = program.init(seed), []
        for step in range(steps):
            batch = jax.device_put(some_tokens(step), program.batch_sharding)
            state, values = program.step(state, batch, hyperparameters)
            metrics.append(jax.device_get(values))
    return state, metrics


@functools.cache
def trained(name: str, devices: int = 1):
    """State and metrics of 20 steps, enough to learn the sequence."""
    program = program_of(devices, optimizer__name=name)
    return run_steps(program, devices, 20, optimizer__learning_rate=LEARNING_RATE)
