"""Coordinate check: does an optimizer move every layer equally far at every size of a model?

What µP promises is seen in a few steps of training: the change of each activation in one step is
the same at every width and depth. Nothing here looks into the model or the optimizer.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from mup_jax.transforms.iterations import trace
from mup_jax.transforms.linalg import matmul
from mup_jax.transforms.matrices import (
    PyTree,
    WeightDimensionNumbers,
    dimension_numbers,
    matrix_layout,
)

# init(seed) -> params, optimizer, loss_fn(params, batch), activations_fn(params, batch)
Subject = tuple[
    Callable[[int], PyTree],
    optax.GradientTransformation,
    Callable[[PyTree, Any], jax.Array],
    Callable[[PyTree, Any], Mapping[str, jax.Array]],
]
# Name -> quantity -> array.
Measurements = dict[str, dict[str, np.ndarray]]

OF_ACTIVATIONS = {
    "rms": "RMS",
    "change": "change since the start",
    "step_change": "change in one step",
}
OF_PARAMETERS = {
    "update_rms": "RMS of update",
    "spectral_norm": "‖update‖₂",
    "stable_rank": "stable rank",
    "alignment": "alignment",
}


@dataclass(frozen=True)
class CoordinateCheck:
    """What `coord_check` has measured; printed, Markdown tables of the slopes.

    Attributes:
      sizes: the widths or depths.
      tolerance: the largest |slope| that passes.
      activations: name -> quantity -> array `(sizes, seeds, steps)`, after each step, of "rms",
        "change" (RMS of the change since initialisation) and "step_change" (of that in the step).
      parameters: likewise, as arrays `(sizes, seeds)`, of each parameter's update U in the last
        step, means over the matrices of a stack: "update_rms", "spectral_norm" ‖U‖₂, "stable_rank"
        ‖U‖_F²/‖U‖₂², and "alignment" ‖GᵀU‖_F/(‖G‖_F·‖U‖₂) with the gradient G of the step. G is
        made of the layer's inputs x, so no input has to be known: where G has rank one, alignment
        is ‖xU‖/(‖x‖·‖U‖₂), the share of the largest change that U could make which it makes. Only
        parameters that have the same name at all sizes.
      loss: array `(sizes, seeds, steps)`, before each step.
    """

    sizes: tuple[int, ...]
    tolerance: float
    activations: Measurements
    parameters: Measurements
    loss: np.ndarray

    @cached_property
    def activation_slopes(self) -> dict[str, dict[str, float]]:
        """Name -> quantity -> a of quantity ∝ size^a at the last step, mean over seeds.

        NaN where a quantity is zero or not finite.
        """
        last = {
            name: {quantity: x[..., -1] for quantity, x in quantities.items()}
            for name, quantities in self.activations.items()
        }
        return _slopes(self.sizes, last)

    @cached_property
    def parameter_slopes(self) -> dict[str, dict[str, float]]:
        """As `activation_slopes`."""
        return _slopes(self.sizes, self.parameters)

    @property
    def failed(self) -> tuple[str, ...]:
        """The activations whose change in one step has a slope beyond the tolerance, or NaN."""
        slopes = self.activation_slopes
        within = lambda name: abs(slopes[name]["step_change"]) <= self.tolerance
        return tuple(name for name in slopes if not within(name))

    @property
    def passed(self) -> bool:
        """Whether no activation has failed."""
        return not self.failed

    def __str__(self) -> str:
        sizes = ", ".join(map(str, self.sizes))
        _, seeds, steps = self.loss.shape
        verdict = "Passed" if self.passed else f"Failed by {', '.join(self.failed)}"
        return "\n".join(
            [
                f"Exponents of the size ({sizes}) at step {steps}, mean of {seeds} seeds. "
                f"{verdict}: the change in one step may have ±{self.tolerance:g}.",
                "",
                *_table("activation", OF_ACTIVATIONS, self.activation_slopes),
                "",
                *_table("parameter", OF_PARAMETERS, self.parameter_slopes),
            ]
        )


def _table(
    title: str, quantities: Mapping[str, str], slopes: Mapping[str, Mapping[str, float]]
) -> list[str]:
    rows = [[title, *quantities.values()], ["---"] * (len(quantities) + 1)]
    rows += [[name, *(f"{of[q]:+.2f}" for q in quantities)] for name, of in slopes.items()]
    return [f"| {' | '.join(row)} |" for row in rows]


def coord_check(
    make: Callable[[int], Subject],
    sizes: Sequence[int],
    batches: Sequence[Any],
    *,
    steps: int = 10,
    seeds: Sequence[int] = (0, 1),
    tolerance: float = 0.15,
    weight_dimension_numbers: WeightDimensionNumbers = None,
) -> CoordinateCheck:
    """Trains a model for a few steps at several sizes and measures how far each layer moves.

    The optimizer is run as it is, with all that a chain holds; updates are what it returns.

    Args:
      make: `make(size)` gives `(init, optimizer, loss_fn, activations_fn)`: `init(seed)` the
        parameters, `optimizer` an Optax transformation whose updates go to `optax.apply_updates`,
        `loss_fn(params, batch)` a scalar, and `activations_fn(params, batch)` a dict of arrays, the
        logits among them, with the same names at all sizes.
      sizes: at least two widths, or depths, ascending.
      batches: whatever `loss_fn` takes, all of one shape. Each step trains on the next; after the
        last comes the first. Activations are those of the first.
      steps: how many.
      seeds: of the initialisation; slopes are means over them.
      tolerance: the largest |slope| of an activation's change in one step that passes.
      weight_dimension_numbers: which axes of a parameter are fan-in and fan-out, as in
        `scale_by_muon`; needed for arrays of more than two axes.

    Returns:
      Slopes, verdict and raw numbers.

    Raises:
      ValueError: sizes, batches, steps, seeds or tolerance that measure nothing; `make` ignores the
        size; activations have other names at another size; an array is not a matrix and
        `weight_dimension_numbers` do not say how it is one.

    Example:
      >>> def params_of(width, seed=0):
      ...     keys = jax.random.split(jax.random.key(seed))
      ...     hidden = jax.random.normal(keys[0], (width, width)) / width**0.5
      ...     return {"embed": jax.random.normal(keys[1], (5, width)), "hidden": hidden}
      >>> hidden_layer = lambda params, x: jnp.tanh(x @ params["embed"] @ params["hidden"])
      >>> loss = lambda params, x: jnp.mean(jnp.square(hidden_layer(params, x) - 0.5))
      >>> activations = lambda params, x: {"hidden": hidden_layer(params, x)}
      >>> def make(width):
      ...     shapes = mup_jax.infer_shapes(params_of(8), params_of(width))
      ...     optimizer = mup_jax.muon(0.02, shapes=shapes, embedding_readout_learning_rate=1e-3)
      ...     return functools.partial(params_of, width), optimizer, loss, activations
      >>> check = mup_jax.coord_check(make, (16, 32, 64), [jnp.eye(5)], steps=3)
      >>> check.passed  # where it is not, print(check) says which layer moves how
      True

    References:
      Yang et al., `Tensor programs V <https://arxiv.org/abs/2203.03466>`_, 2022, appendix D; Qiu et
      al., `Hyperparameter transfer <https://arxiv.org/abs/2512.05620>`_, 2025, figure 2.
    """
    sizes = tuple(sizes)
    if len(sizes) < 2 or sizes != tuple(sorted(set(sizes))) or sizes[0] < 1:
        raise ValueError(f"sizes={sizes}: give at least two, ascending from 1 or more")
    if steps < 1 or len(seeds) < 1 or len(batches) < 1:
        raise ValueError(
            f"steps={steps}, {len(seeds)} seeds, {len(batches)} batches: give at least one of each"
        )
    if tolerance <= 0:
        raise ValueError(f"tolerance={tolerance}: give the largest |slope| that passes, above 0")
    subjects = [make(size) for size in sizes]
    _check_subjects(subjects, sizes, seeds[0], batches[0], weight_dimension_numbers)
    runs = [
        _train(subject, batches, steps, seeds, weight_dimension_numbers) for subject in subjects
    ]
    everywhere = set.intersection(*(set(run.parameters) for run in runs))
    of_parameters = [{k: x for k, x in run.parameters.items() if k in everywhere} for run in runs]
    return CoordinateCheck(
        sizes,
        tolerance,
        activations=_stack([run.activations for run in runs]),
        parameters=_stack(of_parameters),
        loss=_stack([run.loss for run in runs]),
    )


def _check_subjects(
    subjects: Sequence[Subject],
    sizes: Sequence[int],
    seed: int,
    batch: Any,
    numbers: WeightDimensionNumbers,
) -> None:
    """Raises ValueError where a comparison of the sizes would mean nothing."""
    shapes, names = [], []
    for init, _, _, activations_fn in subjects:
        params = init(seed)
        jax.eval_shape(partial(_of_updates, numbers=numbers), params, params)
        shapes.append(jax.tree.map(jnp.shape, params))
        activations = jax.eval_shape(activations_fn, params, batch)
        if not isinstance(activations, Mapping) or not activations:
            raise ValueError(
                f"activations_fn gives {activations}: return a dict of at least one array, by name"
            )
        names.append(sorted(activations))
    for i in range(1, len(sizes)):
        if shapes[i] == shapes[i - 1]:
            raise ValueError(
                f"make({sizes[i - 1]}) and make({sizes[i]}) have parameters of the same shapes: "
                "let make build the model of the size that it is given"
            )
        if names[i] != names[0]:
            raise ValueError(
                f"activations_fn names {names[0]} at size {sizes[0]} and {names[i]} at {sizes[i]}: "
                "return the same names at all sizes, in a deeper model those of some layers"
            )


class _Record(NamedTuple):
    """What is measured of a run; in each step, but of parameters in the last."""

    loss: Any
    activations: Any
    parameters: Any


def _train(
    subject: Subject,
    batches: Sequence[Any],
    steps: int,
    seeds: Sequence[int],
    numbers: WeightDimensionNumbers,
) -> _Record:
    """The run of each seed, as arrays `(seeds, ...)`."""
    init, given_optimizer, loss_fn, activations_fn = subject
    optimizer = optax.with_extra_args_support(given_optimizer)
    forward = jax.jit(activations_fn)

    @jax.jit
    def train_step(params: PyTree, state: Any, batch: Any) -> tuple[Any, ...]:
        objective = lambda params: loss_fn(params, batch)
        loss, gradient = jax.value_and_grad(objective)(params)
        # Sophia and line searches ask for the loss as a function; others ignore it.
        updates, state = optimizer.update(gradient, state, params, obj_fn=objective)
        return optax.apply_updates(params, updates), state, loss, updates, gradient

    runs = []
    for seed in seeds:
        params = init(seed)
        state = jax.jit(optimizer.init)(params)
        start = before = forward(params, batches[0])
        losses, movements = [], []
        for step in range(steps):
            batch = batches[step % len(batches)]
            params, state, loss, updates, gradient = train_step(params, state, batch)
            now = forward(params, batches[0])
            losses.append(loss)
            movements.append(_of_activations(now, before, start))
            before = now
        # By way of the host, so that sharding cannot matter.
        updates, gradient = jax.device_get((updates, gradient))
        of_updates = _of_updates(updates, gradient, numbers)
        runs.append(_Record(_stack(losses), _stack(movements), of_updates))
    return _stack(runs)


def _stack(trees: Sequence[Any]) -> Any:
    """One tree of arrays with a new first axis."""
    return jax.tree.map(lambda *leaves: np.stack(jax.device_get(leaves)), *trees)


@jax.jit
def _of_activations(now: Any, before: Any, start: Any) -> dict[str, dict[str, jax.Array]]:
    def of_one(now: jax.Array, before: jax.Array, start: jax.Array) -> dict[str, jax.Array]:
        now, before, start = (x.astype(jnp.float32) for x in (now, before, start))
        return {
            "rms": _rms(now),
            "change": _rms(now - start),
            "step_change": _rms(now - before),
        }

    return {name: of_one(now[name], before[name], start[name]) for name in now}


def _of_updates(
    updates: PyTree, gradient: PyTree, numbers: WeightDimensionNumbers
) -> dict[str, dict[str, jax.Array]]:
    layouts = dimension_numbers(numbers, updates)
    leaves = jax.tree.leaves_with_path(updates)
    measured = {}
    for (path, u), g, number in zip(leaves, jax.tree.leaves(gradient), layouts, strict=True):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        measured[name] = _of_update(*(_matrices(x, number, name) for x in (u, g)))
    return measured


@jax.jit
def _of_update(u_nio: jax.Array, g_nio: jax.Array) -> dict[str, jax.Array]:
    norm = partial(jnp.linalg.norm, axis=(-2, -1))
    spectral_norm = _spectral_norms(u_nio)
    met = norm(matmul(g_nio.mT, u_nio)) / norm(g_nio)
    return {
        "update_rms": _rms(u_nio),
        "spectral_norm": spectral_norm.mean(),
        "stable_rank": jnp.mean((norm(u_nio) / spectral_norm) ** 2),
        "alignment": jnp.mean(met / spectral_norm),
    }


def _spectral_norms(u_nio: jax.Array) -> jax.Array:
    """‖U‖₂ of each, at most 0.1% too small: √(tr A²⁰⁴⁹ / tr A²⁰⁴⁸) of the Gram matrix A."""
    gram = matmul(u_nio, u_nio.mT) if u_nio.shape[1] < u_nio.shape[2] else matmul(u_nio.mT, u_nio)

    def unit_trace(x: jax.Array) -> jax.Array:
        return x / jnp.maximum(trace(x), jnp.finfo(x.dtype).tiny)

    power = jax.lax.fori_loop(0, 11, lambda _, x: unit_trace(matmul(x, x)), unit_trace(gram))
    return jnp.sqrt(jnp.sum(power * gram, axis=(1, 2)))


def _matrices(x: jax.Array, numbers: Any, name: str) -> jax.Array:
    """A stack `(n, d_in, d_out)` in float32; a vector is a matrix of one row."""
    x = x.astype(jnp.float32)
    if x.ndim < 2:
        return x.reshape(1, 1, -1)
    return matrix_layout(x.shape, numbers, name).to_matrices(x)


def _rms(x: jax.Array) -> jax.Array:
    return jnp.sqrt(jnp.mean(jnp.square(x)))


def _slopes(sizes: tuple[int, ...], measured: Measurements) -> dict[str, dict[str, float]]:
    """Of arrays `(sizes, seeds)`."""

    def slope(x: np.ndarray) -> float:
        with np.errstate(divide="ignore", invalid="ignore"):
            logs = np.log(x).mean(axis=1)
        return float(np.polyfit(np.log(sizes), logs, 1)[0]) if np.isfinite(logs).all() else np.nan

    return {
        name: {quantity: slope(x) for quantity, x in quantities.items()}
        for name, quantities in measured.items()
    }
