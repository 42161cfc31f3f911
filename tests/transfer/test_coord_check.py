"""The coordinate check: what passes and fails, and what is measured, against float64."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optax.contrib import MuonDimensionNumbers

import mup_jax
from mup_jax import CoordinateCheck, coord_check, infer_shapes

WIDTHS = (32, 64, 128)
INPUTS, CLASSES = 8, 10


def batches(n=3, rows=32):
    rng = np.random.default_rng(0)
    inputs = rng.standard_normal((n, rows, INPUTS), np.float32)
    return [{"x": x, "y": np.argmax(x @ np.eye(INPUTS, CLASSES), axis=1)} for x in inputs]


def init_mlp(seed, width, depth=1):
    """Residual blocks of two matrices; what ends a branch and the readout start at zero."""
    keys = jax.random.split(jax.random.key(seed))
    return {
        "embedding": jax.random.normal(keys[0], (INPUTS, width)),
        "up": jax.random.normal(keys[1], (depth, width, width)) / math.sqrt(width),
        "down": jnp.zeros((depth, width, width)),
        "readout": jnp.zeros((width, CLASSES)),
    }


def activations_of_mlp(params, batch, base_depth=1):
    multiplier = base_depth / len(params["up"])
    stream = batch["x"] @ params["embedding"] / math.sqrt(INPUTS)
    found = {"embedding": stream}
    for up, down in zip(params["up"], params["down"], strict=True):
        stream += multiplier * jax.nn.relu(stream @ up) @ down
    return found | {"features": stream, "logits": stream @ params["readout"]}


def loss_of_mlp(params, batch, **options):
    logits = activations_of_mlp(params, batch, **options)["logits"]
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"]).mean()


def check_mlp(make_optimizer, sizes=WIDTHS, *, vary="width", scaled=True, **options):
    """In µP from the smallest size, or else in SP; `make_optimizer(shapes)`."""
    numbers = MuonDimensionNumbers(-2, -1)
    roles = {"embedding": "embedding", "up": "hidden", "down": "hidden", "readout": "readout"}

    def make(size):
        given = {"width": 32, "depth": 1, vary: size}
        base = {"width": 32, "depth": 1, vary: sizes[0]} if scaled else given
        shapes = infer_shapes(
            *(jax.eval_shape(functools.partial(init_mlp, 0, **s)) for s in (base, given)),
            weight_dimension_numbers=numbers,
            depth_ratio=given["depth"] / base["depth"],
            roles=roles,
        )
        # The base depth of SP is its own: no multiplier.
        model = functools.partial(activations_of_mlp, base_depth=base["depth"])
        loss = functools.partial(loss_of_mlp, base_depth=base["depth"])
        return lambda seed: init_mlp(seed, **given), make_optimizer(shapes), loss, model

    return coord_check(make, sizes, batches(), weight_dimension_numbers=numbers, **options)


def adam(shapes):
    return mup_jax.adamw(0.01, shapes=shapes)


def muon(shapes):
    numbers = MuonDimensionNumbers(-2, -1)
    return mup_jax.muon(0.02, shapes=shapes, weight_dimension_numbers=numbers)


@pytest.mark.parametrize("optimizer", [adam, muon])
def test_passes_in_mup(optimizer):
    check = check_mlp(optimizer)
    assert check.passed, check
    assert check.failed == ()
    assert "Passed: the change in one step may have ±0.15" in str(check)
    slopes = check.parameter_slopes
    # Muon's updates of hidden matrices have the same norm at every width, and Adam's entries of
    # embeddings; a readout's update has to shrink.
    assert abs(slopes["up"]["spectral_norm"]) < 0.1
    assert abs(slopes["embedding"]["update_rms"]) < 0.1
    assert slopes["readout"]["update_rms"] == pytest.approx(-1, abs=0.1)


def test_adam_fails_in_sp():
    # Far apart: at small widths what the embedding's change adds hides part of the growth.
    check = check_mlp(adam, (32, 512), scaled=False)
    assert not check.passed
    assert {"features", "logits"} <= set(check.failed)
    assert check.activation_slopes["features"]["step_change"] > 0.3
    assert "Failed by " in str(check)


def test_muon_fails_in_sp():
    check = check_mlp(muon, scaled=False)
    # Muon moves hidden layers equally far without any rule; the readout is Adam's.
    assert "logits" in check.failed


@pytest.mark.slow
def test_depth():
    depths = (1, 2, 4)
    check = check_mlp(adam, depths, vary="depth", steps=5)
    assert check.passed, check
    assert not check_mlp(adam, depths, vary="depth", steps=5, scaled=False).passed


def test_layers_that_are_not_stacked():
    """Parameters that only deeper models have are left out."""

    def make(depth):
        def init(seed):
            stacked = init_mlp(seed, 16, depth)
            for name in ("up", "down"):
                stacked[name] = {f"layer {i}": x for i, x in enumerate(stacked[name])}
            return stacked

        def restacked(params):
            stacked = {name: jnp.stack([*params[name].values()]) for name in ("up", "down")}
            return params | stacked

        loss = lambda params, batch: loss_of_mlp(restacked(params), batch)
        activations = lambda params, batch: activations_of_mlp(restacked(params), batch)
        return init, optax.adam(0.01), loss, activations

    check = coord_check(make, (1, 2), batches(), steps=1, seeds=[0])
    assert set(check.parameters) == {"embedding", "readout", "up/layer 0", "down/layer 0"}


def linear_subject(width, updates):
    """W and a bias with a gradient and updates that are known: activations are x·W and b."""

    def init(seed):
        return jax.tree.map(lambda u: seed + jnp.zeros_like(u), updates(width)[0])

    def update(gradient, state, params, *, obj_fn):
        assert obj_fn(params).shape == ()
        return updates(width)[0], state

    def loss(params, batch):
        gradient = updates(width)[1]
        terms = jax.tree.map(lambda p, g: jnp.sum(p * g), params, gradient)
        return batch["scale"] * sum(jax.tree.leaves(terms))

    def activations(params, batch):
        return {"product": batch["scale"] * params["w"].sum(0), "bias": params["b"]}

    optimizer = optax.GradientTransformationExtraArgs(lambda params: (), update)
    return init, optimizer, loss, activations


def random_updates(width):
    """Updates and gradients of a stack of two matrices, of rank three, and of a bias."""
    rng = np.random.default_rng(width)

    def draw():
        left, right = rng.standard_normal((2, 5, 3)), rng.standard_normal((2, 3, width))
        return {"w": jnp.float32(left @ right), "b": jnp.float32(rng.standard_normal(width))}

    return draw(), draw()


def test_measured_quantities():
    scales = (1.0, 3.0)
    check = coord_check(
        lambda width: linear_subject(width, random_updates),
        (4, 16),
        [{"scale": np.float32(s)} for s in scales],
        steps=3,
        seeds=(0, 2),
        weight_dimension_numbers=MuonDimensionNumbers(-2, -1),
    )
    rms = lambda x: np.sqrt(np.mean(np.square(x)))
    for i, width in enumerate(check.sizes):
        u, g = jax.tree.map(np.float64, random_updates(width))
        singular = np.linalg.svd(u["w"], compute_uv=False)
        met = [
            np.linalg.norm(b.T @ a) / np.linalg.norm(b) / s[0]
            for a, b, s in zip(u["w"], 3 * g["w"], singular, strict=True)
        ]
        expected = {
            "update_rms": rms(u["w"]),
            "spectral_norm": singular[:, 0].mean(),
            "stable_rank": np.mean((singular**2).sum(1) / singular[:, 0] ** 2),
            "alignment": np.mean(met),
        }
        for quantity, value in expected.items():
            np.testing.assert_allclose(check.parameters["w"][quantity][i], value, rtol=2e-3)
        vector = check.parameters["b"]
        np.testing.assert_allclose(vector["spectral_norm"][i], np.linalg.norm(u["b"]), rtol=1e-5)
        np.testing.assert_allclose(vector["stable_rank"][i], 1.0, rtol=1e-5)

        for j, start in enumerate((0.0, 2.0)):
            steps = np.arange(3)
            products = np.array([(start + n * u["w"]).sum(0) for n in range(4)])
            found = {q: x[i, j] for q, x in check.activations["product"].items()}
            np.testing.assert_allclose(
                found["rms"], [rms(products[n + 1]) for n in steps], rtol=1e-5
            )
            np.testing.assert_allclose(
                found["change"], [rms(products[n + 1] - products[0]) for n in steps], rtol=1e-5
            )
            np.testing.assert_allclose(
                found["step_change"], [rms(products[1] - products[0])] * 3, rtol=1e-5
            )
            # Batches take turns.
            losses = [
                scales[n % 2] * sum(((start + n * u[k]) * g[k]).sum() for k in u) for n in steps
            ]
            np.testing.assert_allclose(check.loss[i, j], losses, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(("value", "slope_of_rms"), [(0.0, 0.0), (np.nan, np.nan)])
def test_updates_that_are_zero_or_not_finite_fail(value, slope_of_rms):
    def updates(width):
        return jax.tree.map(lambda x: jnp.full_like(x, value), random_updates(width))

    check = coord_check(
        lambda width: linear_subject(width, updates),
        (4, 16),
        [{"scale": 1.0}],
        steps=1,
        seeds=(1,),
        weight_dimension_numbers=MuonDimensionNumbers(-2, -1),
    )
    assert check.failed == ("bias", "product")
    assert math.isnan(check.activation_slopes["bias"]["step_change"])
    np.testing.assert_allclose(check.activation_slopes["bias"]["rms"], slope_of_rms, atol=1e-12)
    assert all(math.isnan(x) for x in check.parameter_slopes["w"].values())
    assert "nan" in str(check)


def power_laws(exponents, tolerance=0.15, noise=(1.0, 1.0)):
    """A check whose step changes are powers of the size, times a factor for each seed."""
    sizes = (2, 4, 16)
    activations = {}
    for name, exponent in exponents.items():
        at_last = np.outer(np.float64(sizes) ** exponent, noise)
        # The step before says something else.
        x = np.stack([np.ones_like(at_last), at_last], axis=-1)
        activations[name] = {"rms": x, "change": x, "step_change": x}
    return CoordinateCheck(sizes, tolerance, activations, {}, np.zeros((3, 2, 2)))


def test_slopes_are_those_of_the_last_step_over_all_seeds():
    check = power_laws({"a": 0.1, "b": -0.4}, noise=(0.5, 7.0))
    slopes = check.activation_slopes
    np.testing.assert_allclose([slopes[n]["step_change"] for n in "ab"], [0.1, -0.4], atol=1e-12)


@pytest.mark.parametrize(
    ("exponents", "failed"),
    [
        ({"a": 0.14, "b": -0.14}, ()),
        ({"a": 0.14, "b": -0.16}, ("b",)),
        ({"a": 0.16, "b": 0.0}, ("a",)),
        ({"a": math.nan, "b": 0.0}, ("a",)),
    ],
)
def test_verdict(exponents, failed):
    check = power_laws(exponents)
    assert check.failed == failed
    assert check.passed == (not failed)


def test_tolerance_decides():
    assert power_laws({"a": 0.3}, tolerance=0.31).passed
    assert not power_laws({"a": 0.3}, tolerance=0.29).passed


def test_text():
    text = str(power_laws({"a": 0.1, "b": -0.4}))
    assert text.splitlines()[0] == (
        "Exponents of the size (2, 4, 16) at step 2, mean of 2 seeds. Failed by b: the change in "
        "one step may have ±0.15."
    )
    assert "| activation | RMS | change since the start | change in one step |" in text
    assert "| b | -0.40 | -0.40 | -0.40 |" in text


def make_mlp(width):
    return functools.partial(init_mlp, width=width), optax.sgd(0.1), loss_of_mlp, activations_of_mlp


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sizes": (32,)}, r"sizes=\(32,\): give at least two, ascending"),
        ({"sizes": (64, 32)}, r"sizes=\(64, 32\)"),
        ({"sizes": (32, 32)}, r"sizes=\(32, 32\)"),
        ({"sizes": (0, 32)}, r"sizes=\(0, 32\)"),
        ({"steps": 0}, "steps=0, 2 seeds, 3 batches: give at least one of each"),
        ({"seeds": ()}, "0 seeds"),
        ({"batches": []}, "0 batches"),
        ({"tolerance": 0.0}, r"tolerance=0.0: give the largest \|slope\| that passes"),
        ({"make": lambda width: make_mlp(32)}, r"make\(32\) and make\(64\) .* same shapes"),
        (
            {"make": lambda width: (*make_mlp(width)[:3], lambda *_: {})},
            "activations_fn gives {}: return a dict of at least one array",
        ),
        (
            {"make": lambda width: (*make_mlp(width)[:3], lambda *_: jnp.zeros(3))},
            "return a dict of at least one array",
        ),
        (
            {"make": lambda width: (*make_mlp(width)[:3], lambda *_: {f"{width}": jnp.zeros(3)})},
            r"names \['32'\] at size 32 and \['64'\] at 64: return the same names",
        ),
        ({"weight_dimension_numbers": None}, r"down of shape \(1, 32, 32\) is not a matrix"),
    ],
)
def test_errors(changes, message):
    arguments = {
        "make": make_mlp,
        "sizes": (32, 64),
        "batches": batches(),
        "weight_dimension_numbers": MuonDimensionNumbers(-2, -1),
    }
    with pytest.raises(ValueError, match=message):
        coord_check(**(arguments | changes))
