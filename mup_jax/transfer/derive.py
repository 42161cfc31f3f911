"""Measures the scaling rule of any Optax transformation.

What makes a rule is one condition: after an update every layer's output has changed by Θ(1), at
every width. So a transformation is given the gradients that layers of growing width get, and the
rule is read off the slopes of the change against the width. Nothing is trained.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from mup_jax.transfer.rules import PowerLaw, Rule
from mup_jax.transforms.linalg import matmul

# Role -> a number.
PerLayer = dict[str, float]
# probe(width, scale of all gradients, embedding=scale of that one) -> log of the change per layer.
Probe = Callable[..., PerLayer]

LAYERS = ("embedding", "hidden", "readout")
# Below all widths, so that which side of a matrix is the longer is the same at all of them.
VOCABULARY = 24
INITIAL_STD: dict[str, Callable[[int], float]] = {
    "embedding": lambda d_in: 0.1,
    "hidden": lambda d_in: d_in**-0.5,
    "readout": lambda d_in: 1 / d_in,
}

# Factors of gradients with entries of about 1/d_out: one leaves every ε, initial accumulator and
# noise behind, the other stays below them.
LARGE, SMALL = 1e6, 1e-12
# Exponents of theory are multiples of 1/4, or of 1/3 (MADGRAD); a measured one is taken for the
# nearest within this.
TOLERANCE = 0.1
# A fit that misses a measurement by more than 10% is no power law.
LARGEST_RESIDUAL = 0.1
# By how much 100 times the gradient of one layer may change the updates of the others.
LARGEST_COUPLING = 1.5


@dataclass(frozen=True)
class DerivedRule:
    """A measured rule; printed, a Markdown table of it.

    Attributes:
      exponents: a of η ∝ width^a, for "embedding", "hidden" and "readout".
      epsilon_exponents: likewise of an absolute ε, or of noise or an initial accumulator, in units
        of the gradient; of an ε in units of its square they are twice that. None where nothing is
        compared with the gradient, or nothing above 1e-12 of it.
      homogeneity: h of hidden matrices, where c·G gives c^h times the update of G once no ε
        matters; in residual blocks η ∝ depth^h.
      residuals: of the fits of `exponents`: how far, relatively, a measurement is from the line.
      problems: why there is no rule, in sentences; empty where there is one.
      notes: what to know about the rule, likewise.

    Example:
      >>> derived = mup_jax.derive_rule(optax.scale_by_adam(), widths=(64, 128, 256))
      >>> round(derived.exponents["hidden"], 1)  # η ∝ 1/width
      -1.0
      >>> rule = derived.rule  # for `mup`
    """

    exponents: PerLayer
    epsilon_exponents: PerLayer | None
    homogeneity: float
    residuals: PerLayer
    problems: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @cached_property
    def rule(self) -> Rule:
        """For `mup`, with exponents taken for the multiples of 1/4 or 1/3 that they are near.

        Raises:
          ValueError: the measurements follow no power law.
        """
        if self.problems:
            raise ValueError(f"no rule was derived: {'; '.join(self.problems)}")
        embedding, hidden, readout = (_snapped(self.exponents[role]) for role in LAYERS)
        homogeneity = _snapped(self.homogeneity)
        law = PowerLaw(d_in=hidden - embedding, d_out=embedding, depth=homogeneity)
        epsilon_law = PowerLaw()
        if self.epsilon_exponents:
            of_embedding, of_hidden, _ = (_snapped(self.epsilon_exponents[r]) for r in LAYERS)
            epsilon_law = PowerLaw(d_in=of_hidden - of_embedding, d_out=of_embedding, depth=-1)
        return Rule(
            "derived",
            law,
            epsilon_law,
            readout_learning_rate_law=None if readout == law.d_in else PowerLaw(d_in=readout),
            homogeneity=homogeneity,
            epsilon_degree=1 if self.epsilon_exponents else 0,
            source="measured",
        )

    def __str__(self) -> str:
        lines = ["| | η ∝ width^ | off by | ε ∝ width^ |", "|---|---|---|---|"]
        for role in LAYERS:
            epsilon = f"{self.epsilon_exponents[role]:+.2f}" if self.epsilon_exponents else "–"
            lines.append(
                f"| {role} | {self.exponents[role]:+.2f} | {self.residuals[role]:.1%} | {epsilon} |"
            )
        lines += ["", f"η ∝ depth^{self.homogeneity:+.2f} in residual blocks."]
        lines += [f"No rule: {problem}." for problem in self.problems]
        return "\n".join([*lines, *(f"Note: {note}." for note in self.notes)])


def derive_rule(
    inner: optax.GradientTransformation,
    *,
    widths: Sequence[int] = (64, 128, 256, 512, 1024),
    steps: int = 8,
    examples: int = 16,
    initial_std: Mapping[str, Callable[[int], float]] | None = None,
) -> DerivedRule:
    r"""Measures how learning rate and ε of a transformation scale with width and depth.

        derived = mup_jax.derive_rule(optax.contrib.scale_by_ademamix())
        optimizer = mup_jax.mup(optax.contrib.scale_by_ademamix(), derived.rule, shapes)

    An embedding `(24, width)`, a hidden matrix `(width, width)` and a readout `(width, 24)`, leaves
    of one tree, get gradients Xᵀδ/B of B examples for some steps: inputs X with entries of size 1
    that have a direction in common, and errors δ with entries of size 1/d_out, of which that of
    each example keeps its direction and changes its size from step to step. Parameters stay where
    they are. With u the last update and gradients c times as large,

    .. math::
      \eta \propto 1 / \operatorname{RMS}(X u), \qquad
      h = \frac{d \log \operatorname{RMS}(X u)}{d \log c}

    at c so large that no ε matters. Where c is so small that only ε matters, RMS(X u) has another
    degree, and ε is compared with the gradient where the two power laws meet: relative to the
    gradient, that has to be the same at all widths.

    Inputs, and errors, are orthogonal but for what they have in common, as those of wide layers
    nearly are: the law of large widths shows at small ones.

    Args:
      inner: any transformation that needs gradients and parameters only, with or without a
        learning rate. One that takes no tree, as Optax's `scale_by_muon` without dimension numbers,
        gets each layer alone.
      widths: at least three, above 24. Where matrices are cut into blocks, all above the block
        size.
      steps: how many updates, of which the last is measured; some optimizers begin differently.
      examples: B, the rank of all gradients. Where matrices are cut into blocks, more than the
        block size, as in training; of whole matrices, fewer than the widths for the law of a fixed
        rank, and several times as many for that of gradients of full rank.
      initial_std: standard deviation of the parameters as a function of d_in, for any of the
        layers; by default 0.1 for embeddings, 1/√d_in hidden, 1/d_in for readouts. Trust ratios see
        it.

    Returns:
      What was measured, with the `Rule` for `mup`.

    Raises:
      ValueError: widths, steps or examples that measure nothing; an unknown layer in `initial_std`;
        `inner` fails, as do those that need more than gradients and parameters.

    Example:
      >>> derived = mup_jax.derive_rule(optax.scale_by_adam(), widths=(32, 64, 128))
      >>> round(derived.exponents["hidden"])
      -1

    References:
      the condition of Qiu et al., `Hyperparameter transfer <https://arxiv.org/abs/2512.05620>`_,
      2025, section 3, and Yang et al., `A spectral condition <https://arxiv.org/abs/2310.17813>`_,
      2023.
    """
    widths = sorted(set(widths))
    if len(widths) < 3 or widths[0] <= VOCABULARY:
        raise ValueError(f"widths={widths}: give at least three, all above {VOCABULARY}")
    if steps < 1 or examples < 1:
        raise ValueError(f"steps={steps}, examples={examples}: give at least one of each")
    unknown = set(initial_std or {}) - set(LAYERS)
    if unknown:
        raise ValueError(f"initial_std of {', '.join(unknown)}: choose from {', '.join(LAYERS)}")
    std = INITIAL_STD | dict(initial_std or {})
    first = widths[0]
    probe = _probe(_runnable(inner, first), steps, examples, std)
    changes = [probe(width, LARGE) for width in widths]
    exponents, residuals = _fit(widths, [{r: -change[r] for r in LAYERS} for change in changes])

    silent = [role for role in LAYERS if math.isnan(exponents[role])]
    if silent:
        problem = f"updates of {' and '.join(silent)} are zero or not finite after {steps} steps"
        return DerivedRule(exponents, None, math.nan, residuals, (problem,))

    degrees = _degrees(probe, first, LARGE, changes[0])
    problems = [
        f"updates of {role} miss width^{-exponents[role]:.2f} by {residuals[role]:.0%}; where they "
        "are made in blocks, give widths above the block size and more examples than that"
        for role in LAYERS
        if residuals[role] > LARGEST_RESIDUAL
    ]
    if max(degrees.values()) - min(degrees.values()) > TOLERANCE:
        found = ", ".join(f"{role} {degree:.2f}" for role, degree in degrees.items())
        problems.append(f"the layers have different degrees of homogeneity: {found}")

    notes = []
    epsilon_exponents = None
    louder = probe(first, LARGE, embedding=100 * LARGE)
    if max(abs(louder[r] - changes[0][r]) for r in LAYERS[1:]) > math.log(LARGEST_COUPLING):
        notes.append(
            "all layers share a scale, so the rule holds for as long as the same layer dominates "
            "it, and no ε is looked for; if it is a clip by the global norm, put that before `mup` "
            "and derive the rule of the rest"
        )
    elif not problems:
        epsilon_exponents = _epsilon_exponents(probe, widths[:3], changes[:3], degrees)
    if epsilon_exponents:
        embedding, hidden, readout = (epsilon_exponents[role] for role in LAYERS)
        if abs(hidden - embedding - readout) > 2 * TOLERANCE:
            notes.append(f"ε of readouts wants width^{readout:.2f}, for which a rule has no place")
    return DerivedRule(
        exponents, epsilon_exponents, degrees["hidden"], residuals, tuple(problems), tuple(notes)
    )


def _sides(width: int) -> dict[str, tuple[int, int]]:
    return {
        "embedding": (VOCABULARY, width),
        "hidden": (width, width),
        "readout": (width, VOCABULARY),
    }


def _runnable(inner: optax.GradientTransformation, width: int) -> optax.GradientTransformation:
    """`inner`, or where it takes no tree of layers, `inner` for each layer."""
    layers = {r: jax.ShapeDtypeStruct(sides, np.float32) for r, sides in _sides(width).items()}
    failure = None
    for candidate in (inner, _layer_by_layer(inner)):
        try:
            updates, _ = jax.eval_shape(lambda x, q=candidate: q.update(x, q.init(x), x), layers)
            if any(updates[role].shape != layers[role].shape for role in LAYERS):
                raise ValueError("its updates have not the shapes of the gradients")
        except Exception as error:  # whatever a transformation raises
            failure = failure or error
        else:
            return candidate
    raise ValueError(
        "the transformation does not run on gradients and parameters alone: "
        f"{type(failure).__name__}: {failure}. If it needs more, bind it: "
        "optax.GradientTransformation(inner.init, lambda updates, state, params: "
        "inner.update(updates, state, params, value=...))"
    ) from failure


def _layer_by_layer(inner: optax.GradientTransformation) -> optax.GradientTransformation:
    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        pairs = {r: inner.update(updates[r], state[r], params[r]) for r in LAYERS}
        return {r: u for r, (u, _) in pairs.items()}, {r: s for r, (_, s) in pairs.items()}

    return optax.GradientTransformation(
        lambda params: {r: inner.init(params[r]) for r in LAYERS}, update
    )


def _probe(
    inner: optax.GradientTransformation,
    steps: int,
    examples: int,
    initial_std: Mapping[str, Callable[[int], float]],
) -> Probe:
    """How much the last of some updates changes each layer's outputs: log RMS, or NaN."""
    init = jax.jit(inner.init)

    @jax.jit
    def step(params: Any, state: Any, inputs: Any, errors: Any, scales: Any) -> tuple[Any, Any]:
        gradients = {r: scales[r] * matmul(inputs[r].T, errors[r]) / examples for r in LAYERS}
        updates, state = inner.update(gradients, state, params)
        return {r: _rms(matmul(inputs[r], updates[r])) for r in LAYERS}, state

    def probe(width: int, scale: float, **scales: float) -> PerLayer:
        params, inputs, errors = _draw(width, steps, examples, initial_std)
        every_scale = {r: np.float32(scales.get(r, scale)) for r in LAYERS}
        state, changes = init(params), {}
        for i in range(steps):
            now = {r: errors[r][i] for r in LAYERS}
            changes, state = jax.block_until_ready(step(params, state, inputs, now, every_scale))
        with np.errstate(divide="ignore"):
            logs = {r: float(np.log(changes[r])) for r in LAYERS}
        return {r: log if math.isfinite(log) else math.nan for r, log in logs.items()}

    return probe


def _rms(x: jax.Array) -> jax.Array:
    """Of entries whose squares may be out of range."""
    largest = jnp.max(jnp.abs(x))
    return largest * jnp.sqrt(jnp.mean(jnp.square(x / jnp.where(largest > 0, largest, 1))))


def _draw(
    width: int, steps: int, examples: int, initial_std: Mapping[str, Callable[[int], float]]
) -> tuple[Any, Any, Any]:
    """Parameters, inputs `(examples, d_in)` and errors `(steps, examples, d_out)` of each layer.

    What does not grow with the width is the same at all widths.
    """
    fixed, growing = np.random.default_rng(0), np.random.default_rng(width)
    params, inputs, errors = {}, {}, {}
    for role, (d_in, d_out) in _sides(width).items():
        params[role] = initial_std[role](d_in) * growing.normal(size=(d_in, d_out))
        if role == "embedding":
            tokens = np.resize(fixed.permutation(d_in), examples)
            inputs[role] = np.eye(d_in)[tokens]
        else:
            shared, *own = _frame(growing, 1 + examples, d_in)
            inputs[role] = shared + np.stack(own)
        directions = _frame(fixed if role == "readout" else growing, examples, d_out)
        sizes = 1 + fixed.normal(size=(steps, examples, 1))
        errors[role] = sizes * directions / d_out
    return jax.tree.map(np.float32, (params, inputs, errors))


def _frame(rng: np.random.Generator, number: int, d: int) -> np.ndarray:
    """Vectors `(number, d)` of RMS 1; each d of them are orthogonal."""
    frames = [
        np.linalg.qr(rng.normal(size=(d, min(d, number - start))))[0].T
        for start in range(0, number, d)
    ]
    return math.sqrt(d) * np.concatenate(frames)


def _fit(widths: Sequence[int], logs: Sequence[PerLayer]) -> tuple[PerLayer, PerLayer]:
    """Slopes of the lines through the logs, and the largest relative distance from each line."""
    x, slopes, residuals = np.log(widths), {}, {}
    for role in LAYERS:
        y = np.array([log[role] for log in logs])
        slope, offset = np.polyfit(x, y, 1) if np.isfinite(y).all() else (math.nan, math.nan)
        slopes[role] = float(slope)
        residuals[role] = float(np.expm1(np.max(np.abs(y - slope * x - offset))))
    return slopes, residuals


def _degrees(probe: Probe, width: int, scale: float, changes: PerLayer) -> PerLayer:
    """d log RMS(X u) / d log c at a scale, whose changes are known."""
    doubled = probe(width, 2 * scale)
    return {role: (doubled[role] - changes[role]) / math.log(2) for role in LAYERS}


def _epsilon_exponents(
    probe: Probe, widths: Sequence[int], large: Sequence[PerLayer], degrees: PerLayer
) -> PerLayer | None:
    """Of ε ∝ width^a, from where the power laws of large and of small gradients meet."""
    small = [probe(width, SMALL) for width in widths]
    small_degrees = _degrees(probe, widths[0], SMALL, small[0])
    spread = max(small_degrees.values()) - min(small_degrees.values())
    nearest = min(abs(small_degrees[role] - degrees[role]) for role in LAYERS)
    if not (spread < TOLERANCE < nearest):
        return None

    def meeting(role: str, above: PerLayer, below: PerLayer) -> float:
        at_one = lambda log, degree, scale: log - degree * math.log(scale)
        a = at_one(above[role], degrees[role], LARGE)
        b = at_one(below[role], small_degrees[role], SMALL)
        return (a - b) / (small_degrees[role] - degrees[role])

    # Gradients are divided by the factor of ε, which keeps the meeting where it was.
    pairs = list(zip(large, small, strict=True))
    exponents, residuals = _fit(widths, [{r: -meeting(r, *pair) for r in LAYERS} for pair in pairs])
    return exponents if max(residuals.values()) < LARGEST_RESIDUAL else None


def _snapped(exponent: float) -> float:
    """The nearest multiple of 1/3 or 1/4, or the exponent itself where none is near."""
    nearest = min((round(n * exponent) / n for n in (3, 4)), key=lambda x: abs(x - exponent))
    return nearest if abs(nearest - exponent) <= TOLERANCE else exponent
