"""Every transformation and whole optimizer under the settings that people train with.

Errors of dtype and rank come up where a program is traced, so most of this compiles nothing.
`python -m tests.test_modes` writes the list of what holds to docs/modes.md.
"""

import contextlib
import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import mup_jax

DOCUMENT = Path(__file__).parent.parent / "docs" / "modes.md"
BLOCKS = {"block_size": 4, "precondition_frequency": 2, "exact_steps": 1}


def params_of(width, dtype=np.float32):
    rng = np.random.default_rng(0)
    shapes = {
        "embed": (7, width),
        "up": (width, 3 * width),
        "down": (3 * width, width),
        "gain": (width,),
        "readout": (width, 7),
    }
    return {key: rng.normal(size=shape).astype(dtype) for key, shape in shapes.items()}


def matrices(tree):
    return {key: x for key, x in tree.items() if x.ndim > 1}


SHAPES = mup_jax.infer_shapes(params_of(4), params_of(8))


def loss_fn(params):
    x = params["embed"] * params["gain"][None]
    return jnp.sum(jnp.square(x @ params["up"] @ params["down"] @ params["readout"]))


TRANSFORMATIONS = {
    "muon": mup_jax.scale_by_muon,
    "muon, newton_schulz": lambda: mup_jax.scale_by_muon(orthogonalizer="newton_schulz"),
    "muon, svd": lambda: mup_jax.scale_by_muon(orthogonalizer="svd"),
    "adamuon": mup_jax.scale_by_adamuon,
    # At a smaller ε the smallest eigenvalues carry what each compiler rounds in its own way.
    "shampoo": lambda: mup_jax.scale_by_shampoo(eps=1e-3, **BLOCKS),
    "shampoo to the 0.3": lambda: mup_jax.scale_by_shampoo(exponent=0.3, **BLOCKS),
    "soap": lambda: mup_jax.scale_by_soap(**BLOCKS),
    "soap, one side": lambda: mup_jax.scale_by_soap(sides="in", **BLOCKS),
    "normuon": mup_jax.scale_by_normuon,
    "kl_shampoo": lambda: mup_jax.scale_by_kl_shampoo(**BLOCKS),
    "kl_soap": lambda: mup_jax.scale_by_kl_soap(**BLOCKS),
    "graft": lambda: mup_jax.graft(optax.scale_by_rms(), mup_jax.scale_by_shampoo(**BLOCKS)),
    "hyperball": lambda: mup_jax.hyperball(
        mup_jax.scale_by_muon(), optax.scale_by_learning_rate(0.1)
    ),
    "normalize_spectral_norm": mup_jax.normalize_spectral_norm,
    "normalize_rms": mup_jax.normalize_rms,
    "weight decay": lambda: mup_jax.add_independent_weight_decay(0.1, SHAPES),
    "mup": lambda: mup_jax.mup(mup_jax.scale_by_muon(), mup_jax.rules.muon(), SHAPES),
}


def whole(name):
    options = {"block_size": 4} if name in ("shampoo", "soap") else {}
    return getattr(mup_jax, name)(
        0.1,
        schedule=lambda count: 1 / (1 + count),
        shapes=SHAPES,
        weight_decay=0.1,
        independent_weight_decay=0.01,
        embedding_readout_learning_rate=0.05,
        **options,
    )


NAMES = ("adamw", "muon", "adamuon", "shampoo", "soap", "lamb", "adopt", "lion", "sophia")
OPTIMIZERS = {f"whole {name}": functools.partial(whole, name) for name in NAMES}
SUBJECTS = TRANSFORMATIONS | OPTIMIZERS

# The mode, a context, and the dtypes of parameters.
MODES = {
    "no setting": (contextlib.nullcontext, ["float16", "bfloat16", "float32"]),
    "jax_enable_x64": (lambda: jax.enable_x64(True), ["float32", "float64"]),
    "jax_numpy_dtype_promotion=strict": (
        lambda: jax.numpy_dtype_promotion("strict"),
        ["float32"],
    ),
    "jax_numpy_rank_promotion=raise": (lambda: jax.numpy_rank_promotion("raise"), ["float32"]),
    "jax_check_tracer_leaks": (jax.checking_leaks, ["float32"]),
}
# Where something does not hold, and why.
EXCEPTIONS = {
    ("graft", "jax_numpy_dtype_promotion=strict"): "with a transformation of Optax as magnitude, "
    "most of which need promotion",
    ("whole sophia", "jax_enable_x64"): "the random vectors of its estimate are others",
}
HOLDS = {
    "no setting": "updates have the dtype of the gradients, transformations of matrices keep "
    "their state in float32, and float16 gives "
    "finite updates from gradients whose squares it cannot hold",
    "jax_enable_x64": "the same updates as without it; float64 matrices are computed in float32, "
    "for which the iterations and floors are made, and come back in float64",
    "jax_numpy_dtype_promotion=strict": "as without it; whole optimizers compute with "
    "standard promotion, which Optax needs",
    "jax_numpy_rank_promotion=raise": "as without it",
    "jax_check_tracer_leaks": "nothing leaks",
    "jax_debug_nans": "no step makes a NaN on its way to a finite update",
    "jax.transfer_guard('disallow')": "a jitted update moves nothing; without jit, constants do, "
    "as in all of JAX",
    "jax.disable_jit": "the same update",
    "complex numbers": "refused in one line that names the leaf",
}


def document():
    """What holds under which mode, as Markdown."""
    lines = [
        "# Modes",
        "",
        "What holds for every transformation and whole optimizer of `mup_jax` under the settings "
        "of JAX. The",
        "tests that say so, and write this list, are in [test_modes](../tests/test_modes.py).",
        "",
        "| | holds | but for |",
        "|---|---|---|",
    ]
    for mode, what in HOLDS.items():
        of_mode = {name: why for (name, m), why in EXCEPTIONS.items() if m == mode}
        but = "; ".join(f"`{name.removeprefix('whole ')}`: {why}" for name, why in of_mode.items())
        lines.append(f"| `{mode}` | {what} | {but} |".replace("`no setting`", "no setting"))
    return "\n".join(lines).replace("`complex numbers`", "complex numbers") + "\n"


def start(name, dtype=np.float32):
    """A transformation, and parameters for it."""
    transformation = SUBJECTS[name]()
    params = params_of(8, dtype)
    if name not in OPTIMIZERS:
        params = matrices(params)
    return optax.with_extra_args_support(transformation), params


def types(tree):
    return jax.tree.map(lambda x: (x.shape, x.dtype), tree)


def step(transformation):
    return lambda g, state, p: transformation.update(g, state, p, obj_fn=loss_fn)


def test_the_list_of_modes_is_that_of_the_tests():
    assert DOCUMENT.read_text() == document()


@pytest.mark.parametrize(
    ("mode", "dtype"), [(mode, dtype) for mode, (_, dtypes) in MODES.items() for dtype in dtypes]
)
@pytest.mark.parametrize("name", SUBJECTS)
def test_types_are_kept(name, mode, dtype):
    """Updates have the dtype of the gradients, and the state those that it began with."""
    if (name, mode) == ("graft", "jax_numpy_dtype_promotion=strict"):
        pytest.skip(EXCEPTIONS[name, mode])
    with MODES[mode][0]():
        transformation, params = start(name, dtype)
        state = jax.eval_shape(transformation.init, params)
        updates, new = jax.eval_shape(step(transformation), params, state, params)
    assert types(updates) == types(params)
    assert types(new) == types(state)
    if name in TRANSFORMATIONS and name != "graft":
        kept = {x.dtype for x in jax.tree.leaves(state) if jnp.issubdtype(x.dtype, jnp.floating)}
        assert kept <= {jnp.dtype(jnp.float32)}


def run(name, dtype=np.float32, guard=contextlib.nullcontext):
    transformation, params = start(name, dtype)
    params = jax.tree.map(jnp.asarray, params)
    state = jax.jit(transformation.init)(params)
    update = jax.jit(step(transformation))
    results = []
    for scale in (1.0, -0.5, 2.0):
        gradient = jax.tree.map(lambda x, scale=scale: (scale * x + x**2).astype(x.dtype), params)
        with guard():
            updates, state = update(gradient, state, params)
        results.append(jax.tree.map(np.asarray, updates))
    return results


VALUED = ["muon", "shampoo", "soap", "normalize_spectral_norm"]
LONG = [pytest.param(name, marks=pytest.mark.slow) for name in SUBJECTS if name not in VALUED]


@pytest.mark.parametrize("name", [*VALUED, *LONG])
def test_x64_changes_no_value(name):
    """Float64 matrices are computed in float32, for which iterations and floors are made."""
    if (name, "jax_enable_x64") in EXCEPTIONS:
        pytest.skip(EXCEPTIONS[name, "jax_enable_x64"])
    want = run(name)
    with jax.enable_x64(True):
        same, wide = run(name), run(name, np.float64)
    for got in (same, wide):
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
            assert np.abs(a - b).max() <= 1e-3 * np.abs(b).max()


@pytest.mark.parametrize("name", [*VALUED, *LONG])
def test_numbers_are_finite_and_stay_where_they_are(name):
    with jax.debug_nans(True):
        run(name, guard=lambda: jax.transfer_guard("disallow"))


@pytest.mark.parametrize("name", [*VALUED[:1], *LONG])
def test_without_jit(name):
    with jax.disable_jit():
        transformation, params = start(name)
        state = transformation.init(params)
        updates, _ = step(transformation)(params, state, params)
    want, _ = jax.jit(step(transformation))(params, transformation.init(params), params)
    for a, b in zip(jax.tree.leaves(updates), jax.tree.leaves(want), strict=True):
        assert np.abs(a - b).max() <= 1e-3 * np.abs(b).max()


@pytest.mark.parametrize("name", ["adamw", "muon", "shampoo", "soap", "lamb", "adopt"])
def test_small_float16_gradients_give_finite_updates(name):
    """1e-8, the ε of Adam, is zero in float16, and so are squares of entries of 1e-4."""
    try:
        jax.jit(lambda x: x.astype(jnp.float16))(jnp.ones(2))
    except jax.errors.JaxRuntimeError:
        pytest.skip("XLA has no float16 for processors without F16C")
    params = {"w": jnp.ones((6, 4), jnp.float16)}
    gradient = {"w": (1e-4 * jax.random.normal(jax.random.key(0), (6, 4))).astype(jnp.float16)}
    gradient["w"] = gradient["w"].at[2].set(0)
    optimizer = getattr(mup_jax, name)(0.1)
    state = optimizer.init(params)
    for _ in range(2):
        updates, state = jax.jit(optimizer.update)(gradient, state, params)
    assert updates["w"].dtype == jnp.float16
    assert np.isfinite(updates["w"]).all()
    assert np.abs(updates["w"]).max() > 1e-3


@pytest.mark.parametrize("name", TRANSFORMATIONS)
def test_complex_matrices_are_refused_by_name(name):
    if name in ("weight decay", "mup"):
        pytest.skip("works on any numbers, or leaves them to another")
    gradient = {"w": jnp.eye(3, dtype=complex)}
    transformation = TRANSFORMATIONS[name]()
    with pytest.raises(ValueError, match=r"\['w'\] is complex.*optax\.partition"):
        transformation.update(gradient, transformation.init(gradient), gradient)


# Hyperparameters that are no constants


@pytest.mark.parametrize("name", NAMES[:-1])
def test_a_learning_rate_may_be_a_schedule(name):
    params = matrices(params_of(8))
    decay = lambda count: 0.1 / (1 + count)
    got, want = (
        getattr(mup_jax, name)(rate, schedule=schedule)
        for rate, schedule in ((decay, None), (0.1, lambda count: 1 / (1 + count)))
    )
    states = got.init(params), want.init(params)
    for _ in range(2):
        updates, first = got.update(params, states[0], params)
        expected, second = want.update(params, states[1], params)
        states = first, second
        for a, b in zip(jax.tree.leaves(updates), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", ["scale_by_soap", "scale_by_shampoo", "soap", "shampoo"])
def test_injected_hyperparameters(name):
    make = getattr(mup_jax, name)
    gradient = {"w": jax.random.normal(jax.random.key(0), (6, 4))}
    rates = {} if name.startswith("scale") else {"learning_rate": 0.1}
    with pytest.raises(ValueError, match=r"precondition_frequency.*static_args=\('precond"):
        optax.inject_hyperparams(make)(**rates).init(gradient)
    static = ["precondition_frequency", "exact_steps", "block_size", "max_preconditioner_dim"]
    static += ["preconditioner_dtype"]
    injected = optax.inject_hyperparams(make, static_args=static)(**rates)
    (got, _), (want, _) = (
        tx.update(gradient, tx.init(gradient), gradient) for tx in (injected, make(**rates))
    )
    # A traced exponent or decay is rounded to float32.
    assert np.abs(got["w"] - want["w"]).max() <= 1e-3 * np.abs(want["w"]).max()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: mup_jax.scale_by_muon(beta=1.0), "beta=1.0"),
        (lambda: mup_jax.scale_by_muon(eps=-1), "eps=-1"),
        (lambda: mup_jax.scale_by_adamuon(b2=1.5), "b2=1.5"),
        (lambda: mup_jax.scale_by_adamuon(muon_eps=float("nan")), "muon_eps=nan"),
        (lambda: mup_jax.scale_by_shampoo(exponent=-1), "exponent=-1"),
        (lambda: mup_jax.scale_by_shampoo(b1=-0.1), "b1=-0.1"),
        (lambda: mup_jax.scale_by_shampoo(eps=-1), "eps=-1"),
        (lambda: mup_jax.scale_by_soap(b2=1), "b2=1"),
        (lambda: mup_jax.scale_by_soap(eps=float("inf")), "eps=inf"),
        (lambda: mup_jax.scale_by_sophia_g(gamma=0), "gamma=0"),
        (lambda: mup_jax.graft(optax.identity(), optax.identity(), eps=-1), "eps=-1"),
        (lambda: mup_jax.adamw(0.1, b1=1.0), "b1=1.0"),
        (lambda: mup_jax.muon(0.1, adam_eps=-1e-8), "eps=-1e-08"),
        (lambda: mup_jax.adopt(0.1, b1=1), "b1=1"),
        (lambda: mup_jax.lamb(0.1, eps=-1), "eps=-1"),
        (lambda: mup_jax.lion(0.1, b2=2), "b2=2"),
        (lambda: mup_jax.sophia(0.1, eps=0), "eps=0"),
    ],
)
def test_values_that_mean_nothing_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("name", ["muon", "adamuon", "shampoo"])
def test_an_optimizer_of_hidden_matrices_says_that_it_needs_shapes(name, recwarn):
    with pytest.warns(UserWarning, match=r"without shapes=.*infer_shapes.*hidden_only=False"):
        getattr(mup_jax, name)(0.1)
    recwarn.clear()
    getattr(mup_jax, name)(0.1, shapes=SHAPES)
    getattr(mup_jax, name)(0.1, hidden_only=False)
    assert not recwarn


@pytest.mark.parametrize("name", SUBJECTS)
def test_what_of_a_state_is_like_the_parameters(name):
    """By `optax.tree.map_params`, with which people find the sharding of a state."""
    transformation, params = start(name)
    state = transformation.init(params)
    kinds = optax.tree.map_params(
        transformation, lambda _: "like", state, transform_non_params=lambda _: "other"
    )
    leaves = jax.tree.leaves(kinds)
    assert set(leaves) <= {"like", "other"}
    of_matrices = {"muon": 0, "shampoo": 0, "soap": 0, "adamuon": 0, "graft": 1}
    if name in of_matrices:
        assert leaves.count("like") == of_matrices[name] * len(params)


def test_none_for_a_leaf_is_refused():
    """Optax's Muon leaves such a leaf to Adam; a transformation of matrices has none."""
    numbers = {"embed": None, "w": optax.contrib.MuonDimensionNumbers(0, 1)}
    transformation = mup_jax.scale_by_muon(weight_dimension_numbers=numbers)
    with pytest.raises(ValueError, match=r"None for \['embed'\].*optax\.partition"):
        transformation.init({"embed": jnp.ones((9, 4)), "w": jnp.ones((4, 4))})


if __name__ == "__main__":
    DOCUMENT.write_text(document())
