"""Which algorithm runs where, and the float32 arithmetic that all of them share."""

import functools
import os
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

# Accelerators multiply float32 in reduced precision unless told otherwise, which is too coarse to
# compare eigenvalues or to rotate a second moment.
matmul = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)

# Below this a float32 statistic is rounding noise.
FLOOR = 1e-30
# And so is what is smaller than this times the largest value of its matrix.
ROUNDING = 1e-6


def identity(ndim: int, m: int, n: int | None = None) -> jax.Array:
    """The `(m, n)` identity, square without n, with as many axes of length 1 before as arrays of
    `ndim` axes need: it multiplies them under any setting of rank and dtype promotion.
    """
    return jnp.eye(m, n, dtype=jnp.float32)[(None,) * (ndim - 2)]


# `with use_paths_of("tpu"):` sends what is traced inside along the path of "cpu", "gpu" or "tpu" on
# any device, so that tests can run them all. jit traces anew where the value changes.
use_paths_of = jax.make_user_context(None)


def by_platform(
    *args: jax.Array,
    cpu: Callable[..., Any],
    gpu: Callable[..., Any],
    tpu: Callable[..., Any],
) -> Any:
    """One of three functions of `args`; a program for one platform contains no other.

    The outputs have the same shapes and dtypes. A platform with another name counts as a GPU.
    """
    if use_paths_of.value is not None:
        return {"cpu": cpu, "gpu": gpu, "tpu": tpu}[use_paths_of.value](*args)
    if tpu is gpu:
        return jax.lax.platform_dependent(*args, cpu=cpu, default=gpu)
    return jax.lax.platform_dependent(*args, cpu=cpu, tpu=tpu, default=gpu)


def after(first: jax.Array, x: jax.Array) -> jax.Array:
    """x, which a program has once it has `first`.

    On CPUs jaxlib's factorizations of a batch wait for tasks that they hand to the threads of
    their program. Where each of these runs another factorization, all wait for ever: no two may
    run side by side.
    """
    # A barrier would order them until the compiler removes it, before it orders the program.
    corner = first[(0,) * first.ndim].astype(x.dtype)
    return x * jnp.where(jnp.isinf(corner), 2.0, 1.0).astype(x.dtype)


def _lapack_takes_turns() -> bool:
    several = (
        "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", "")
        or jax.config.values["jax_num_cpu_devices"] > 1
    )
    return several and os.environ.get("OPENBLAS_NUM_THREADS") != "1"


def factorize(factorization: Callable[..., Any], *matrices: jax.Array) -> Any:
    """A function of `(..., m, n)` matrices that calls LAPACK.

    On CPUs jaxlib spreads a batch over all threads, and on each of them OpenBLAS does the same
    again. Several devices in a process (as in tests) then wait for each other's threads, for
    minutes or for ever. Unless OPENBLAS_NUM_THREADS=1 forbids that, they take one matrix at a time.
    """
    takes_turns = _lapack_takes_turns()
    return (one_at_a_time(factorization) if takes_turns else factorization)(*matrices)


def one_at_a_time(factorization: Callable[..., Any]) -> Callable[..., Any]:
    """A function of `(..., m, n)` matrices that maps no two at once, under `jax.vmap` either."""

    @jax.custom_batching.custom_vmap
    def in_turn(*matrices: jax.Array) -> Any:
        *batch, _, _ = matrices[0].shape
        if not batch:
            return factorization(*matrices)
        flat = [x.reshape(-1, *x.shape[-2:]) for x in matrices]
        results = jax.lax.map(lambda each: factorization(*each), flat)
        return jax.tree.map(lambda x: x.reshape(*batch, *x.shape[1:]), results)

    @in_turn.def_vmap
    def _(size: int, is_batched: list[bool], *matrices: jax.Array) -> Any:
        pairs = zip(matrices, is_batched, strict=True)
        stacks = (x if ok else jnp.broadcast_to(x, (size, *x.shape)) for x, ok in pairs)
        results = in_turn(*stacks)
        return results, jax.tree.map(lambda _: True, results)

    return in_turn
