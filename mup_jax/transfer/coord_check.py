"""Coordinate check: does an optimizer move every layer equally far at every size of a model?

What µP promises is seen in a few steps of training: the change of each activation in one step is
the same at every width and depth. Nothing here looks into the model or the optimizer.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from mup_jax.transforms.matrices import (
    PyTree,
    WeightDimensionNumbers,
    is_dimension_numbers,
    matrix_layout,
    resolve_dimension_numbers,
)

# init(seed) -> params, optimizer, loss_fn(params, batch), activations_fn(params, batch)
Subject = tuple[
    Callable[[int], PyTree],
    optax.GradientTransformation,
    Callable[[PyTree, Any], jax.Array],
    Callable[[PyTree, Any], Mapping[str, jax.Array]],
]
# Name -> quantity -> array of shape (sizes, seeds, steps).
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
      steps: of training; slopes are those of the last.
      tolerance: the largest |slope| that passes.
      activations: name -> quantity -> array `(sizes, seeds, steps)`, after each step, of "rms",
        "change" (RMS of the change since initialisation) and "step_change" (of that in the step).
      parameters: likewise of each parameter's update U, means over the matrices of a stack:
        "update_rms", "spectral_norm" ‖U‖₂, "stable_rank" ‖U‖_F²/‖U‖₂², and "alignment"
        ‖GᵀU‖_F/(‖G‖_F·‖U‖₂) with the gradient G of the step. G is made of the layer's inputs x, so
        no input has to be known: where G has rank one, alignment is ‖xU‖/(‖x‖·‖U‖₂), the share
        of the largest change that U could make which it makes. Only parameters that have the
        same name at all sizes.
      loss: array `(sizes, seeds, steps)`, before each step.
    """

    sizes: tuple[int, ...]
    steps: int
    tolerance: float
    activations: Measurements
    parameters: Measurements
    loss: np.ndarray

    @cached_property
    def activation_slopes(self) -> dict[str, dict[str, float]]:
        """Name -> quantity -> a of quantity ∝ size^a at the last step, mean over seeds.

        NaN where a quantity is zero or not finite.
        """
        return _slopes(self.sizes, self.activations)

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
        verdict = "passed" if self.passed else f"failed by {', '.join(self.failed)}"
        return "\n".join(
            [
                f"Exponents of the size ({sizes}) at step {self.steps}, mean of "
                f"{self.loss.shape[1]} seeds. {verdict.capitalize()}: the change in one step may "
                f"have ±{self.tolerance:g}.",
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

        def make(width):
            shapes = mup_jax.infer_shapes(abstract_params(base_width), abstract_params(width))
            optimizer = mup_jax.muon(0.02, shapes=shapes)
            return lambda seed: init(jax.random.key(seed), width), optimizer, loss_fn, activations

        check = mup_jax.coord_check(make, (64, 128, 256), batches)
        assert check.passed, check

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
        size; activations have other names at another size.

    References:
      Yang et al., `Tensor programs V <https://arxiv.org/abs/2203.03466>`_, 2022, appendix D; Qiu et
      al., `Hyperparameter transfer <https://arxiv.org/abs/2512.05620>`_, 2025, figure 2.
    """
    sizes = tuple(sizes)
    if len(sizes) < 2 or sizes != tuple(sorted(set(sizes))) or sizes[0] < 1:
        raise ValueError(f"sizes={sizes}: give at least two, ascending from 1 or more")
    if steps < 1 or not seeds or not batches:
        raise ValueError(
            f"steps={steps}, {len(seeds)} seeds, {len(batches)} batches: give at least one of each"
        )
    if tolerance <= 0:
        raise ValueError(f"tolerance={tolerance}: give the largest |slope| that passes, above 0")
    subjects = [make(size) for size in sizes]
    _check_subjects(subjects, sizes, seeds[0], batches[0])
    records = [
        record
        for subject in subjects
        for record in _train(subject, batches, steps, seeds, weight_dimension_numbers)
    ]
    shape = (len(sizes), len(seeds), steps)
    return CoordinateCheck(
        sizes,
        steps,
        tolerance,
        _merged([record.activations for record in records], shape),
        _merged([record.parameters for record in records], shape),
        np.reshape([record.loss for record in records], shape),
    )


def _check_subjects(
    subjects: Sequence[Subject], sizes: Sequence[int], seed: int, batch: Any
) -> None:
    """Raises ValueError where a comparison of the sizes would mean nothing."""
    shapes, names = [], []
    for init, _, _, activations_fn in subjects:
        params = init(seed)
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
    """What is measured of one step: name -> quantity -> value."""

    loss: float
    activations: dict[str, dict[str, float]]
    parameters: dict[str, dict[str, float]]


def _train(
    subject: Subject,
    batches: Sequence[Any],
    steps: int,
    seeds: Sequence[int],
    numbers: WeightDimensionNumbers,
) -> list[_Record]:
    """The steps of the first seed, then those of the next."""
    init, given_optimizer, loss_fn, activations_fn = subject
    optimizer = optax.with_extra_args_support(given_optimizer)
    forward = jax.jit(activations_fn)

    @jax.jit
    def train_step(params: PyTree, state: Any, batch: Any) -> tuple[Any, ...]:
        objective = lambda params: loss_fn(params, batch)
        loss, gradient = jax.value_and_grad(objective)(params)
        # Sophia and line searches ask for the loss as a function; others ignore it.
        updates, state = optimizer.update(gradient, state, params, obj_fn=objective)
        return optax.apply_updates(params, updates), state, loss, gradient, updates

    records = []
    for seed in seeds:
        params = init(seed)
        state = jax.jit(optimizer.init)(params)
        start = before = forward(params, batches[0])
        for step in range(steps):
            batch = batches[step % len(batches)]
            params, state, loss, gradient, updates = train_step(params, state, batch)
            now = forward(params, batches[0])
            records.append(
                _Record(
                    float(loss),
                    {name: _movement(now[name], before[name], start[name]) for name in now},
                    _of_updates(updates, gradient, numbers),
                )
            )
            before = now
    return records


def _movement(now: jax.Array, before: jax.Array, start: jax.Array) -> dict[str, float]:
    differences = {"rms": now, "change": now - start, "step_change": now - before}
    return {quantity: _rms(np.asarray(x)) for quantity, x in differences.items()}


def _of_updates(
    updates: PyTree, gradient: PyTree, numbers: WeightDimensionNumbers
) -> dict[str, dict[str, float]]:
    """Name -> quantity -> value of each parameter's update."""
    found = {}
    leaves = jax.tree_util.tree_leaves_with_path(updates)
    gradients = jax.tree.leaves(gradient)
    layouts = jax.tree.leaves(
        resolve_dimension_numbers(numbers, updates), is_leaf=is_dimension_numbers
    )
    for (path, update), its_gradient, number in zip(leaves, gradients, layouts, strict=True):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        u_nio, g_nio = (_matrices(x, number, name) for x in (update, its_gradient))
        found[name] = _of_update(u_nio, g_nio)
    return found


def _of_update(u_nio: np.ndarray, g_nio: np.ndarray) -> dict[str, float]:
    spectral_norm = _spectral_norms(u_nio)
    frobenius, gradient_norm = (np.linalg.norm(x, axis=(1, 2)) for x in (u_nio, g_nio))
    met = np.linalg.norm(g_nio.swapaxes(1, 2) @ u_nio, axis=(1, 2))
    with np.errstate(divide="ignore", invalid="ignore"):
        return {
            "update_rms": _rms(u_nio),
            "spectral_norm": float(spectral_norm.mean()),
            "stable_rank": float(np.mean((frobenius / spectral_norm) ** 2)),
            "alignment": float(np.mean(met / (gradient_norm * spectral_norm))),
        }


def _spectral_norms(u_nio: np.ndarray) -> np.ndarray:
    """NaN where a matrix is not finite, which LAPACK would refuse."""
    if not np.isfinite(u_nio).all():
        return np.full(len(u_nio), np.nan)
    transposed = u_nio.swapaxes(1, 2)
    gram = u_nio @ transposed if u_nio.shape[1] < u_nio.shape[2] else transposed @ u_nio
    return np.sqrt(np.maximum(np.linalg.eigvalsh(gram)[:, -1], 0))


def _matrices(x: jax.Array, numbers: Any, name: str) -> np.ndarray:
    """A stack `(n, d_in, d_out)`; a vector is a matrix of one row."""
    local = np.asarray(x, np.float32)
    if x.ndim < 2:
        return local.reshape(1, 1, -1)
    return np.asarray(matrix_layout(x.shape, numbers, name).to_matrices(local))


def _rms(x: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(x, dtype=np.float64))))


def _merged(records: list[dict[str, dict[str, float]]], shape: tuple[int, ...]) -> Measurements:
    """Of the names that all records have."""
    first, *others = records
    return {
        name: {
            quantity: np.reshape([record[name][quantity] for record in records], shape)
            for quantity in first[name]
        }
        for name in first
        if all(name in record for record in others)
    }


def _slopes(sizes: tuple[int, ...], measurements: Measurements) -> dict[str, dict[str, float]]:
    def slope(x: np.ndarray) -> float:
        with np.errstate(divide="ignore"):
            logs = np.log(x[..., -1]).mean(axis=1)
        return float(np.polyfit(np.log(sizes), logs, 1)[0]) if np.isfinite(logs).all() else np.nan

    return {
        name: {quantity: slope(x) for quantity, x in quantities.items()}
        for name, quantities in measurements.items()
    }
