"""What must hold for matrix functions and optimizers on any platform: measured, with bounds.

The functions run on JAX's default device, along its own paths or those of `use_paths_of`, and
compare with numpy in float64 on the host. Bounds are multiples of the rounding of the arithmetic:
products of float32 that do not ask for more are rounded to 11 bits on GPUs (TF32) and to 8 on TPUs
(one pass of bfloat16); factorizations and all that feeds them are in float32. Each bound is at
least twice what is seen on any of the paths.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from optax.contrib import MuonDimensionNumbers

import mup_jax
from experiments.accelerator import references
from mup_jax.transforms.linalg import (
    Orthogonalizer,
    eigenbasis,
    inverse_root,
    matmul,
    orthogonalize,
    quintic_coefficients,
    refine_eigenbasis,
    use_paths_of,
)

Array = np.ndarray

STACKED = MuonDimensionNumbers(-2, -1)
STEPS = 3
FREQUENCY = 2
EPS = 1e-2

# Half a unit in the last place of the operands of a float32 product that asks for no precision.
_FAST_ROUNDING = {"cpu": 2.0**-24, "gpu": 2.0**-11, "tpu": 2.0**-8}
_BF16_ROUNDING = 2.0**-8

# Distance from U Vᵀ for a condition of 30 in exact arithmetic, and somewhat more.
_ORTHOGONALIZERS: dict[Orthogonalizer, float] = {
    "tuned": 0.01,
    "polar_express": 0.2,
    "newton_schulz": 0.45,
    "svd": 2e-5,
}


class Finding(NamedTuple):
    """What a check measured: an error, or a count of what must not be, and the most allowed."""

    name: str
    measured: float
    bound: float

    @property
    def passed(self) -> bool:
        return self.measured <= self.bound  # NaN has not


class Subject(NamedTuple):
    """A transformation under test.

    Attributes:
      make: of `weight_dimension_numbers`.
      reference: its textbook for one matrix, or None.
      rotates: whether it turns with its gradient.
      rounding: relative error that rounding in fast products may cause, in units of that rounding
        to the power `order`.
      order: see `rounding`; 1/2 where a sign may change.
    """

    make: Callable[..., optax.GradientTransformation]
    reference: Callable[[], references.Reference] | None
    rotates: bool = True
    rounding: float = 0.0
    order: float = 1.0


def _of_blocks(make: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    schedule = {"precondition_frequency": FREQUENCY, "exact_steps": 1, "stagger": False}
    return functools.partial(make, eps=EPS, **schedule, **options)


def _graft(weight_dimension_numbers: Any = None) -> optax.GradientTransformation:
    numbers = {"weight_dimension_numbers": weight_dimension_numbers}
    direction = _of_blocks(mup_jax.scale_by_shampoo)(**numbers)
    return mup_jax.graft(optax.scale_by_adam(0.9, 0.98), direction, **numbers)


def _normalized(weight_dimension_numbers: Any = None) -> optax.GradientTransformation:
    numbers = {"weight_dimension_numbers": weight_dimension_numbers}
    direction = _of_blocks(mup_jax.scale_by_soap)(**numbers)
    return optax.chain(direction, mup_jax.normalize_spectral_norm(**numbers))


def _muon(method: Orthogonalizer) -> Subject:
    coefficients = None if method == "svd" else quintic_coefficients(method)
    make = functools.partial(mup_jax.scale_by_muon, orthogonalizer=method)
    rounding = 0.0 if method == "svd" else 40.0
    return Subject(make, lambda: references.Muon(coefficients), rounding=rounding)


def subjects() -> dict[str, Subject]:
    """The transformations of matrices, by name, those first that tell most."""
    shampoo = lambda: references.Shampoo(EPS, FREQUENCY)
    grafted = lambda: references.Graft(references.Adam(0.9, 0.98), shampoo())
    tuned = quintic_coefficients("tuned")
    return {
        "muon": _muon("tuned"),
        "shampoo": Subject(_of_blocks(mup_jax.scale_by_shampoo), shampoo),
        "soap": Subject(_of_blocks(mup_jax.scale_by_soap), lambda: references.Soap(EPS, FREQUENCY)),
        "graft of adam and shampoo": Subject(_graft, grafted, rotates=False),
        "adamuon": Subject(
            mup_jax.scale_by_adamuon,
            lambda: references.AdaMuon(tuned),
            rotates=False,
            rounding=6.0,
            order=0.5,
        ),
        "soap, spectral norm": Subject(_normalized, None, rotates=False),
        "muon, newton_schulz": _muon("newton_schulz"),
        "muon, polar_express": _muon("polar_express"),
        "muon, svd": _muon("svd"),
    }


def fast_rounding() -> float:
    """Of products in float32 that ask for no precision, on the path in use."""
    return _FAST_ROUNDING.get(use_paths_of.value or jax.default_backend(), 2.0**-11)


def _relative(got: Any, want: Any) -> float:
    """The largest relative error of a matrix, in the Frobenius norm."""
    got, want = (np.asarray(x, np.float64) for x in (got, want))
    norm = functools.partial(np.linalg.norm, axis=(-2, -1))
    return float(np.max(norm(got - want) / norm(want)))


def _orthogonal(rng: np.random.Generator, n: int) -> Array:
    return np.linalg.qr(rng.normal(size=(n, n)))[0]


def _with_condition(rng: np.random.Generator, condition: float, m: int, n: int) -> Array:
    k = min(m, n)
    values = np.geomspace(1, 1 / condition, k)
    return (_orthogonal(rng, m)[:, :k] * values) @ _orthogonal(rng, n)[:k]


def _statistics(rng: np.random.Generator, n: int, condition: float) -> Array:
    """A symmetric positive definite `(n, n)` matrix."""
    q = _orthogonal(rng, n)
    return q * np.geomspace(1, 1 / condition, n) @ q.T


def check_products(n: int) -> list[Finding]:
    """Products of `(n, n)` matrices: how the platform rounds, and whether it can be told not to."""
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(2, n, n)).astype(np.float32)
    want = x.astype(np.float64) @ y.astype(np.float64)
    fast = _relative(jax.jit(jnp.matmul)(x, y), want)
    full = _relative(jax.jit(matmul)(x, y), want)
    return [
        Finding("fast products", fast, 2 * fast_rounding() + 4e-6),
        Finding("full products", full, 4e-6),
    ]


def check_orthogonalize(method: Orthogonalizer, n: int) -> list[Finding]:
    """`orthogonalize` of stacks `(…, n, 2 n)` against the SVD, and in extreme cases."""
    rng = np.random.default_rng(0)
    f = jax.jit(functools.partial(orthogonalize, method=method))
    well = np.stack([_with_condition(rng, 30, n, 2 * n) for _ in range(2)])
    ill = _with_condition(rng, 1e6, n, 2 * n)
    deficient = _with_condition(rng, 4, n, 2 * n)
    deficient[n // 2 :] = 0  # rows
    rows = [*well, ill, deficient, 1e20 * well[0], 1e-20 * well[0], 0 * well[0]]
    batch = np.array(rows, np.float32)
    got = np.asarray(f(batch))
    rounding = 0.0 if method == "svd" else 40 * fast_rounding()
    findings = [
        Finding(
            "distance from the polar factor",
            _relative(got[:2], references.polar(well)),
            _ORTHOGONALIZERS[method] + rounding,
        ),
        Finding("of 1e20 times the same", _relative(got[4], got[0]), 1e-4 + rounding),
        Finding("not finite", float(np.sum(~np.isfinite(got))), 0.0),
        Finding("of a zero matrix", float(np.abs(got[6]).max()), 0.0),
        Finding(
            "spectral norm above 1, ill conditioned or of half the rank",
            float(np.linalg.norm(got[2:4], 2, axis=(-2, -1)).max()) - 1,
            2 * (_ORTHOGONALIZERS[method] + rounding),
        ),
    ]
    if method != "svd":
        exact = references.iterate(batch[:4].astype(np.float64), quintic_coefficients(method))
        findings.append(
            Finding("distance from float64", _relative(got[:4], exact), 2e-3 + rounding)
        )
    return findings


def check_inverse_root(n: int) -> list[Finding]:
    """`inverse_root` of `(n, n)` statistics against float64, well and ill conditioned."""
    rng = np.random.default_rng(0)
    statistics = functools.partial(_statistics, rng, n)
    well, ill, singular = statistics(1e2), statistics(1e8), statistics(1e2)
    half = _orthogonal(rng, n)[:, : n // 2]
    singular = half @ half.T
    nan = np.full((n, n), np.nan)
    batch = np.array([well, ill, singular, 1e20 * well, 1e-20 * well, nan, 0 * well], np.float32)
    previous = np.full_like(batch, 7.0)

    def exact(x: Array, exponent: float, eps: float) -> Array:
        values, q = np.linalg.eigh(x.astype(np.float64))
        return q * (np.maximum(values, 0) + eps * values[-1]) ** -exponent @ q.T

    findings = []
    for exponent in (0.5, 0.25):
        f = jax.jit(functools.partial(inverse_root, exponent=exponent, eps=1e-5, relative_eps=True))
        got = np.asarray(f(batch, previous))
        name = f"to the -{exponent:g}: "
        wants = [exact(x, exponent, 1e-5) for x in batch[:5]]
        findings += [
            Finding(name + "κ = 1e2", _relative(got[0], wants[0]), 1e-4),
            Finding(name + "κ = 1e8", _relative(got[1], wants[1]), 0.1),
            Finding(name + "singular", _relative(got[2], wants[2]), 0.1),
            Finding(name + "of sizes 1e±20", _relative(got[3:5], np.stack(wants[3:])), 1e-4),
            Finding(name + "NaN keeps the previous", float(np.abs(got[5] - 7).max()), 0.0),
            Finding(name + "zero gives zero", float(np.abs(got[6]).max()), 0.0),
        ]
    return findings


def check_eigenbasis(n: int) -> list[Finding]:
    """`eigenbasis` and its refinement: orthogonal, and what is left beside the diagonal."""
    rng = np.random.default_rng(0)
    statistics = functools.partial(_statistics, rng, n)
    batch = np.array([statistics(1e2), statistics(1e8), np.diag(np.arange(n) + 1.0)], np.float32)
    first = np.asarray(jax.jit(eigenbasis)(batch))
    drifted = 0.95 * batch + 0.05 * np.stack([statistics(10.0) for _ in range(3)])
    drifted = drifted.astype(np.float32)
    refined = np.asarray(jax.jit(refine_eigenbasis)(drifted, first))
    kept = np.asarray(jax.jit(refine_eigenbasis)(np.full_like(batch, np.nan), first))

    def off_diagonal(x: Array, q: Array) -> float:
        rotated = q.swapaxes(-2, -1).astype(np.float64) @ x.astype(np.float64) @ q
        beside = rotated - rotated * np.eye(n)
        norm = functools.partial(np.linalg.norm, axis=(-2, -1))
        return float(np.max(norm(beside) / norm(rotated)))

    def not_orthogonal(q: Array) -> float:
        return float(np.abs(q.swapaxes(-2, -1).astype(np.float64) @ q - np.eye(n)).max())

    exact = np.linalg.qr(drifted.astype(np.float64) @ first)[0]
    return [
        Finding("eigenvectors: Qᵀ Q - I", not_orthogonal(first), 2e-5),
        Finding("eigenvectors: beside the diagonal", off_diagonal(batch, first), 1e-5),
        Finding("refined: Qᵀ Q - I", not_orthogonal(refined), 2e-5),
        Finding(
            "refined: beside the diagonal, over that of float64",
            off_diagonal(drifted, refined) / off_diagonal(drifted, exact),
            2.0,
        ),
        Finding("refined: NaN keeps the basis", float(np.abs(kept - first).max()), 0.0),
    ]


def _run(transformation: optax.GradientTransformation, gradients: list[Any]) -> tuple[Array, Any]:
    """The updates of all steps, and the last state."""
    state = transformation.init(gradients[0])
    update = jax.jit(transformation.update)
    updates = []
    for gradient in gradients:
        u, state = update(gradient, state)
        updates.append(np.stack([np.asarray(x, np.float64) for x in u]))
    return np.stack(updates), state


def check_transformation(subject: Subject, n: int) -> list[Finding]:
    """A transformation on a stack of `(n, n)` matrices, each of which shows another property."""
    rng = np.random.default_rng(0)
    plain = np.stack([_with_condition(rng, 30, n, n) for _ in range(STEPS)])
    left, right = _orthogonal(rng, n), _orthogonal(rng, n)
    rank_one = rng.normal(size=(STEPS, n, 1)) * rng.normal(size=(STEPS, 1, n))
    members = {
        "plain": plain,
        "turned": left @ plain @ right,
        "transposed": plain.swapaxes(-2, -1),
        "bad": rng.normal(size=plain.shape),
        "zero": 0 * plain,
        "rank one": rank_one,
        "large": 1e20 * plain,
        "small": 1e-20 * plain,
        "ill conditioned": np.stack([_with_condition(rng, 1e6, n, n) for _ in range(STEPS)]),
    }
    at = {name: i for i, name in enumerate(members)}
    fine = np.stack(list(members.values()), axis=1).astype(np.float32)
    gradients = fine.copy()
    gradients[1, at["bad"], n // 2, n // 3] = np.nan

    stacked = subject.make(weight_dimension_numbers=STACKED)
    # One program for both.
    update = optax.GradientTransformation(stacked.init, jax.jit(stacked.update))
    got, state = _run(update, list(map(jnp.asarray, gradients)))
    without, _ = _run(update, list(map(jnp.asarray, fine)))
    leaves, _ = _run(subject.make(), [list(map(jnp.asarray, step)) for step in gradients])

    rounding = subject.rounding * fast_rounding() ** subject.order
    of = lambda name: got[:, at[name]]
    counted = sum(int(x) for _, x in optax.tree.get_all_with_path(state, "nonfinite"))
    not_finite = float(sum(np.sum(~np.isfinite(x)) for x in jax.tree.leaves(state)))
    tolerance = 2e-3 + rounding
    findings = []
    if subject.reference:
        textbook = subject.reference()
        want = np.stack([textbook.update(g) for g in fine[:, at["plain"]].astype(np.float64)])
        findings.append(Finding("distance from float64", _relative(of("plain"), want), tolerance))
    else:
        norms = np.linalg.norm(of("plain"), 2, axis=(-2, -1))
        findings.append(Finding("spectral norm beside 1", float(np.abs(norms - 1).max()), 0.3))
    if subject.rotates:
        error = _relative(of("turned"), left @ of("plain") @ right)
        findings.append(Finding("turns with its gradient", error, 2 * tolerance))
    if subject.reference:
        error = _relative(of("transposed"), of("plain").swapaxes(-2, -1))
        findings.append(Finding("transposes with its gradient", error, 2 * tolerance))
    # Of singular values that are rounding noise an SVD returns any vectors.
    alive = [
        at[name]
        for name in set(at) - {"bad", "ill conditioned"}
        if np.linalg.norm(of(name), axis=(-2, -1)).min() > 0
    ]
    findings += [
        Finding("a stack is its matrices", _relative(leaves[:, alive], got[:, alive]), tolerance),
        Finding("not finite", float(np.sum(~np.isfinite(got))), 0.0),
        Finding("of zero gradients", float(np.abs(of("zero")).max()), 0.0),
        Finding("not finite in the state", not_finite, 0.0),
        Finding(
            "NaN: others move by", _relative(got[:, alive], without[:, alive]), 1e-5 + rounding
        ),
        # At every step the squares of 1e20, and once NaN.
        Finding("bad gradients not counted", abs(counted - STEPS - 1), 0.0),
    ]
    return findings


def check_bfloat16(subject: Subject, n: int) -> list[Finding]:
    """Gradients and updates in bfloat16, with statistics in float32, of one `(n, n)` matrix."""
    rng = np.random.default_rng(0)
    gradients = np.stack([_with_condition(rng, 30, n, n) for _ in range(STEPS)])
    low = [[jnp.asarray(g, jnp.bfloat16)] for g in gradients]
    got, _ = _run(subject.make(), low)
    want, _ = _run(subject.make(), [[x.astype(jnp.float32) for x in step] for step in low])
    return [Finding("bfloat16 gradients", _relative(got, want), 4 * _BF16_ROUNDING)]
