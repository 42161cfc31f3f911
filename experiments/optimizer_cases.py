"""What the benchmarks of optimizers share: the optimizers, their parameters, and what a compiler
says of a step.

The parameters are those of a Llama's layers, four D x D matrices and three of D x 4D each, either
stacked over the layers or as separate leaves.
"""

import functools
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from optax.contrib import MuonDimensionNumbers

import mup_jax
from mup_jax.training.flops import count_flops

STACKED = MuonDimensionNumbers(-2, -1)
FREQUENCY = 10
REFERENCE = "optax muon"


class Case(NamedTuple):
    """An optimizer and the parameters that it is given."""

    layout: str
    make: Callable[..., optax.GradientTransformation]
    dtype: jax.typing.DTypeLike = jnp.float32  # of the gradients

    @property
    def transformation(self) -> optax.GradientTransformation:
        numbers = STACKED if self.layout == "stacked" else None
        return self.make(weight_dimension_numbers=numbers)


def _optax_muon(weight_dimension_numbers: Any) -> optax.GradientTransformation:
    # Optax takes a tree.
    numbers = weight_dimension_numbers or MuonDimensionNumbers()
    return optax.contrib.scale_by_muon(
        weight_dimension_numbers=lambda params: jax.tree.map(lambda _: numbers, params)
    )


def optimizer_cases(block_size: int) -> dict[str, Case]:
    """What is measured, by name. Preconditioners are refreshed every `FREQUENCY` steps.

    So they are from the first step on: early steps refresh more, and say little of a long run.
    """
    of_blocks = {"block_size": block_size, "precondition_frequency": FREQUENCY, "exact_steps": 1}

    def muon(**options: Any) -> Callable[..., Any]:
        return lambda **numbers: mup_jax.scale_by_muon(**options, **numbers)

    def shampoo(**options: Any) -> Callable[..., Any]:
        return lambda **numbers: mup_jax.scale_by_shampoo(**of_blocks | options, **numbers)

    def soap(**options: Any) -> Callable[..., Any]:
        return lambda **numbers: mup_jax.scale_by_soap(**of_blocks | options, **numbers)

    def grafted(**numbers: Any) -> optax.GradientTransformation:
        return mup_jax.graft(
            optax.scale_by_adam(0.95, 0.98), shampoo(b1=0.95)(**numbers), **numbers
        )

    def normalized(**numbers: Any) -> optax.GradientTransformation:
        return optax.chain(soap()(**numbers), mup_jax.normalize_spectral_norm(**numbers))

    five = {"orthogonalizer": "newton_schulz", "ns_steps": 5}
    low = {"preconditioner_dtype": jnp.bfloat16}
    at_once = {"stagger": False}
    return {
        "optax adam": Case("stacked", lambda weight_dimension_numbers: optax.scale_by_adam()),
        REFERENCE: Case("stacked", _optax_muon),
        f"{REFERENCE}, separate": Case("separate", _optax_muon),
        "muon, 5 steps": Case("stacked", muon(**five)),
        "muon, 5 steps, separate": Case("separate", muon(**five)),
        "muon": Case("stacked", muon()),
        "muon, bf16 gradients": Case("stacked", muon(), jnp.bfloat16),
        "adamuon": Case("stacked", mup_jax.scale_by_adamuon),
        "shampoo² every step": Case("stacked", shampoo(precondition_frequency=1)),
        "shampoo²": Case("stacked", shampoo()),
        "shampoo², all at once": Case("stacked", shampoo(**at_once)),
        "shampoo², separate": Case("separate", shampoo()),
        "shampoo² # adam": Case("stacked", grafted),
        "shampoo², bf16 roots": Case("stacked", shampoo(**low)),
        "soap": Case("stacked", soap()),
        "soap, all at once": Case("stacked", soap(**at_once)),
        "soap, separate": Case("separate", soap()),
        "soap, bf16 bases": Case("stacked", soap(**low)),
        "soap, spectral norm": Case("stacked", normalized),
    }


def layer_shapes(width: int) -> dict[str, tuple[int, int]]:
    """The matrices `(d_in, d_out)` of a layer."""
    wide = 4 * width
    shapes = dict.fromkeys(("query", "key", "value", "attention_out"), (width, width))
    return shapes | {"gate": (width, wide), "up": (width, wide), "down": (wide, width)}


def gradients(
    layers: int, width: int, layout: str, count: int, dtype: jax.typing.DTypeLike = jnp.float32
) -> list[Any]:
    """`count` trees with a decaying spectrum, as gradients of matrices in training have."""
    trees = [_gradient(jax.random.key(i), layers, width, dtype) for i in range(count)]
    return trees if layout == "stacked" else [jax.tree.map(list, tree) for tree in trees]


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def _gradient(key: jax.Array, layers: int, width: int, dtype: Any) -> dict[str, jax.Array]:
    def leaf(key: jax.Array, m: int, n: int) -> jax.Array:
        spectrum = jnp.arange(1, m + 1)[:, None] ** -0.5
        return (spectrum * jax.random.normal(key, (layers, m, n))).astype(dtype)

    shapes = layer_shapes(width)
    keys = jax.random.split(key, len(shapes))
    return {name: leaf(key, *shapes[name]) for key, name in zip(keys, shapes, strict=True)}


class CompiledUpdate(NamedTuple):
    """A step of an optimizer, and what the compiler says of it.

    Attributes:
      step: `(gradient, state) -> (updates, state)`; donates the state.
      state: the first.
      facts: see `compile_program`; "gflops" of a usual step and "state_floats" per parameter.
    """

    step: Any
    state: Any
    facts: dict[str, float]


def compile_update(transformation: optax.GradientTransformation, gradient: Any) -> CompiledUpdate:
    """Of parameters like `gradient`."""
    state = jax.jit(transformation.init)(gradient)
    update = jax.jit(transformation.update, donate_argnums=1)
    start = time.perf_counter()
    lowered = update.lower(gradient, state)
    seconds = time.perf_counter() - start
    step, facts = compile_program(lowered, seconds)
    parameters = sum(x.size for x in jax.tree.leaves(gradient))
    facts["gflops"] = count_flops(transformation.update, gradient, state) / 1e9
    facts["state_floats"] = sum(x.nbytes for x in jax.tree.leaves(state)) / 4 / parameters
    return CompiledUpdate(step, state, facts)


def compile_program(lowered: Any, lower_seconds: float) -> tuple[Any, dict[str, float]]:
    """The compiled program, and of it "lower_seconds", "compile_seconds", "program_lines" of HLO
    and, where the compiler says so, the megabytes of memory of each kind.
    """
    start = time.perf_counter()
    compiled = lowered.compile()
    facts: dict[str, float] = {
        "lower_seconds": lower_seconds,
        "compile_seconds": time.perf_counter() - start,
        "program_lines": len((compiled.as_text() or "").splitlines()),
    }
    if memory := compiled.memory_analysis():
        facts |= {
            "argument_megabytes": memory.argument_size_in_bytes / 1e6,
            "output_megabytes": memory.output_size_in_bytes / 1e6,
            "donated_megabytes": memory.alias_size_in_bytes / 1e6,
            "temporary_megabytes": memory.temp_size_in_bytes / 1e6,
        }
    return compiled, facts


def orthogonality_error(updates: Any) -> float:
    """‖O - U Vᵀ‖ / √n of the first D x 4D matrix, with O = U S Vᵀ the update."""
    first = np.asarray(updates["gate"][0], np.float32)
    singular = np.linalg.svd(first, compute_uv=False)
    return float(np.sqrt(np.mean((singular - 1) ** 2)))
