"""The contract of every ready-made optimizer, driven by their registry."""

import functools
import inspect
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType

import mup_jax
from mup_jax import infer_shapes, rules
from mup_jax.optimizers import OPTIMIZERS

pytestmark = pytest.mark.usefixtures("with_and_without_optimizations")

cross_entropy = optax.softmax_cross_entropy_with_integer_labels

# Square, as what rounding leaves in a null space is noise.
BASE, WIDTH, VOCABULARY = 8, 16, 16


def params_of(width):
    rng = np.random.default_rng(1)
    normal = lambda *shape: jnp.float32(rng.normal(size=shape))
    return {
        "embed": normal(VOCABULARY, width),
        "hidden": normal(width, width),
        "head": normal(width, VOCABULARY),
        "gain": normal(width),
    }


PARAMS = params_of(WIDTH)
SHAPES = infer_shapes(params_of(BASE), PARAMS, depth_ratio=3.0)
MATRICES = {key: p for key, p in PARAMS.items() if p.ndim > 1}


ROUTED = [
    name for name, make in OPTIMIZERS.items() if "hidden_only" in inspect.signature(make).parameters
]
ALL_MATRICES = [name for name in ROUTED if name != "soap"]  # to which `hidden_only` is the default
ELEMENTWISE = [name for name in OPTIMIZERS if name not in ROUTED]
# What makes them quick to compile.
EXACT = {"orthogonalizer": "svd"}
OPTIONS = {name: EXACT if name in ("adamuon", "muon") else {} for name in OPTIMIZERS}
SCHEDULE = (1.0, 0.0, 0.5)


def loss(params):
    """Separable, so that Hutchinson's estimate of the curvature is exact: p²."""
    return sum(jnp.sum(p**4) / 12 for p in jax.tree.leaves(params))


EXTRA = {name: {} for name in OPTIMIZERS} | {"sophia": {"obj_fn": loss}}


def gradients():
    rng = np.random.default_rng(0)
    for _ in SCHEDULE:
        yield {key: jnp.float32(rng.normal(size=p.shape)) for key, p in PARAMS.items()}


def run(transformation, scale=1.0, **extra_args):
    transformation = optax.with_extra_args_support(transformation)
    state = transformation.init(PARAMS)
    update = jax.jit(lambda g, state: transformation.update(g, state, PARAMS, **extra_args))
    updates = []
    for gradient in gradients():
        u, state = update(gradient, state)
        updates.append(jax.tree.map(lambda x: scale * x, u))
    return updates


@functools.cache
def compiled(name, with_shapes):
    """A step with hyperparameters as arguments: in training programs they are traced."""

    def build(hyperparameters):
        return OPTIMIZERS[name](
            schedule=lambda count: jnp.array(SCHEDULE)[count],
            shapes=SHAPES if with_shapes else None,
            **OPTIONS[name],
            **({"hidden_only": True} if name in ROUTED else {}),
            **hyperparameters,
        )

    step = lambda g, state, hyper: build(hyper).update(g, state, PARAMS, **EXTRA[name])
    return build, jax.jit(step)


@functools.cache
def run_named(name, with_shapes, hidden=0.1, others=0.1, decay=0.0):
    hyperparameters = {"learning_rate": hidden, "embedding_readout_learning_rate": others}
    hyperparameters["independent_weight_decay"] = decay
    parameters = inspect.signature(OPTIMIZERS[name]).parameters
    epsilons = {"eps", "adam_eps", "muon_eps"} & set(parameters)
    hyperparameters |= {key: parameters[key].default for key in epsilons}
    build, update = compiled(name, with_shapes)
    state, updates = build(hyperparameters).init(PARAMS), []
    for gradient in gradients():
        u, state = update(gradient, state, hyperparameters)
        updates.append(u)
    return updates


def assert_trees_close(got, want, tolerance=1e-4):
    scale = max(float(jnp.abs(x).max()) for x in jax.tree.leaves(want))
    close = functools.partial(np.testing.assert_allclose, rtol=tolerance, atol=tolerance * scale)
    jax.tree.map(close, got, want)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_signature(name):
    optimizer = OPTIMIZERS[name]
    assert getattr(mup_jax, name) is optimizer
    parameters = inspect.signature(optimizer).parameters
    first = {
        "schedule": None,
        "weight_decay": 0.0,
        "independent_weight_decay": 0.0,
        "shapes": None,
        "embedding_readout_learning_rate": None,
    }
    assert list(parameters)[: 1 + len(first)] == ["learning_rate", *first]
    assert {key: parameters[key].default for key in first} == first
    kinds = {p.kind for key, p in parameters.items() if key != "learning_rate"}
    assert kinds == {inspect.Parameter.KEYWORD_ONLY}
    arguments = re.search(r"Args:\n(.*?)\n\n", inspect.getdoc(optimizer), re.DOTALL)[1]
    # One or more names before each colon, where nothing is indented further.
    documented = re.findall(r"^  (\w[^:]*):", arguments, re.MULTILINE)
    assert sorted(re.findall(r"\w+", " ".join(documented))) == sorted(parameters)


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("with_shapes", [False, True])
def test_updates_are_minus_schedule_times_learning_rate_and_decay(name, with_shapes):
    plain = run_named(name, with_shapes)
    got = run_named(name, with_shapes, 0.2, 0.2, decay=0.3)
    width_ratio = WIDTH / BASE if with_shapes else 1.0
    for s, u, before in zip(SCHEDULE, got, plain, strict=True):
        for key, w in PARAMS.items():
            decay = 0.0 if key == "gain" else 0.3 / width_ratio
            want = 2 * before[key] - s * decay * w
            np.testing.assert_allclose(u[key], want, rtol=1e-4, atol=1e-6)
    # ADOPT's first gradient is for the second moment alone.
    moves = [np.any(u["gain"]) for u in got]
    assert moves == [name != "adopt", False, True]


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("with_shapes", [False, True])
def test_what_is_not_hidden_has_a_learning_rate_of_its_own(name, with_shapes):
    """AdamW as well as Muon: a comparison in which one of them alone has it is none."""
    faster = run_named(name, with_shapes, others=0.3)
    others = {"embed", "head", "gain"} if with_shapes else {"gain"}
    for u, before in zip(faster, run_named(name, with_shapes), strict=True):
        for key in PARAMS:
            want = (3 if key in others else 1) * before[key]
            np.testing.assert_allclose(u[key], want, rtol=1e-4, atol=1e-7)


RULES = {"adamw": rules.adam(), "lamb": rules.lamb(), "muon": rules.muon()}


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("decay", ["1/width", "constant", "times the learning rate"])
def test_weight_decays(name, decay):
    """Of a parameter without a gradient, decay is all that is left."""
    is_independent = decay != "times the learning rate"
    scaling = {"weight_decay_scaling": decay} if is_independent else {}
    options = {"hidden_only": False, **EXACT} if name == "muon" else {}
    optimizer = OPTIMIZERS[name](
        0.5,
        schedule=lambda count: 0.1,
        shapes=mup_jax.Transfer(SHAPES, **scaling),
        **{"independent_weight_decay" if is_independent else "weight_decay": 0.3},
        **options,
    )
    zero = jax.tree.map(jnp.zeros_like, PARAMS)
    got, _ = optimizer.update(zero, optimizer.init(PARAMS), PARAMS)
    for key, w in PARAMS.items():
        rate = 0.5 * RULES[name].learning_rate(SHAPES[key])
        factors = {"1/width": BASE / WIDTH, "constant": 1.0, "times the learning rate": rate}
        factor = 0.0 if key == "gain" else factors[decay]
        np.testing.assert_allclose(got[key], -0.1 * 0.3 * factor * w, rtol=1e-5, atol=1e-9)


def test_weight_decay_is_that_of_optax():
    """With its name it has its meaning, schedules of the learning rate included."""
    rate = optax.linear_schedule(0.1, 0.0, 3)
    got = run(mup_jax.adamw(rate, b2=0.99, weight_decay=0.3))
    matrices = {key: p.ndim > 1 for key, p in PARAMS.items()}
    reference = run(optax.adamw(rate, b2=0.99, weight_decay=0.3, mask=matrices))
    for u, want in zip(got, reference, strict=True):
        assert_trees_close(u, want)


@pytest.mark.parametrize("key", ["learning_rate_scaling", "weight_decay_scaling"])
def test_unknown_scaling(key):
    with pytest.raises(ValueError, match=rf"{key}='width': choose one of .*'constant'"):
        mup_jax.Transfer(SHAPES, **{key: "width"})


SCALE_BY = {
    "muon": mup_jax.scale_by_muon,
    "adamuon": mup_jax.scale_by_adamuon,
    "shampoo": mup_jax.scale_by_shampoo,
    "soap": mup_jax.scale_by_soap,
    "sophia": mup_jax.scale_by_sophia_g,
}


@pytest.mark.parametrize("name", SCALE_BY)
def test_options_of_the_direction_are_those_of_the_whole(name):
    """All but what roles decide, with their defaults; Sophia's γ is that of its curvature."""
    whole = inspect.signature(OPTIMIZERS[name]).parameters
    for key, parameter in inspect.signature(SCALE_BY[name]).parameters.items():
        if key != "sides":
            assert key in whole
            assert whole[key].default == parameter.default or (name, key) == ("sophia", "gamma")


def test_a_shape_factor_beside_a_rule():
    with pytest.raises(ValueError, match=r"shape_factor='rms' with shapes=: leave it out"):
        mup_jax.muon(0.1, shapes=SHAPES, shape_factor="rms")


@functools.cache
def first_step(name):
    """The first updates by the defaults."""
    return step_once(OPTIMIZERS[name](0.1, shapes=SHAPES, **OPTIONS[name]), **EXTRA[name])


def step_once(optimizer, state=None, params=PARAMS, **extra_args):
    state = optimizer.init(params) if state is None else state
    update = jax.jit(lambda g, state: optimizer.update(g, state, params, **extra_args)[0])
    gradient = next(gradients())
    return update({key: gradient[key] for key in params}, state)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_injected_hyperparameters(name):
    static = [k for k in inspect.signature(OPTIMIZERS[name]).parameters if k != "learning_rate"]
    injected = optax.inject_hyperparams(OPTIMIZERS[name], static_args=static)
    optimizer = injected(learning_rate=0.0, shapes=SHAPES, **OPTIONS[name])
    state = optimizer.init(PARAMS)
    state.hyperparams["learning_rate"] = jnp.float32(0.1)
    assert_trees_close(step_once(optimizer, state, **EXTRA[name]), first_step(name))


# Those that prefer hidden matrices

ADAM_ARGUMENTS = {
    "adamuon": (0.8, 0.98),
    "muon": (0.8, 0.98),
    "shampoo": (0.9, 0.98),
    "soap": (0.9, 0.98),
}


@pytest.mark.parametrize("name", ROUTED)
@pytest.mark.parametrize("with_shapes", [False, True])
def test_adam_has_what_is_not_hidden(name, with_shapes):
    plain = run_named(name, with_shapes)
    adam = run(optax.scale_by_adam(*ADAM_ARGUMENTS[name]), -0.1)
    on_adam = {"embed", "head", "gain"} if with_shapes else {"gain"}
    for step, s in enumerate(SCHEDULE):
        for key in PARAMS:
            factor = rules.adam().learning_rate(SHAPES[key]) if with_shapes else 1.0
            want = s * factor * adam[step][key]
            if key in on_adam:
                np.testing.assert_allclose(plain[step][key], want, rtol=1e-3, atol=1e-6)
            else:
                gap = np.linalg.norm(plain[step][key] - want)
                assert s == 0 or gap > 0.1 * np.linalg.norm(want)


@pytest.mark.parametrize("name", ALL_MATRICES)
def test_adam_has_the_common_learning_rate_by_default(name):
    assert_trees_close(first_step(name), run_named(name, True)[0])


def test_soap_has_the_width_side_of_embedding_and_readout_by_default():
    got, gradient = first_step("soap"), next(gradients())
    for key, sides in {"embed": "out", "head": "in"}.items():
        direction = mup_jax.scale_by_soap(sides=sides)
        u, _ = jax.jit(direction.update)(gradient[key], direction.init(PARAMS[key]))
        want = -0.1 * rules.soap(sides=sides).learning_rate(SHAPES[key]) * u
        assert np.linalg.norm(got[key] - want) <= 2e-3 * np.linalg.norm(want)


DIRECTIONS = {
    "adamuon": (mup_jax.scale_by_adamuon(orthogonalizer="svd"), rules.adamuon()),
    "muon": (mup_jax.scale_by_muon(orthogonalizer="svd"), rules.muon()),
    "shampoo": (
        mup_jax.graft(optax.scale_by_adam(0.9, 0.98), mup_jax.scale_by_shampoo()),
        rules.grafted(rules.adam()),
    ),
    "soap": (mup_jax.scale_by_soap(), rules.soap()),
}


@pytest.mark.parametrize("name", ROUTED)
def test_hidden_matrices_get_the_direction_by_its_rule(name):
    direction, rule = DIRECTIONS[name]
    state, update = direction.init(PARAMS["hidden"]), jax.jit(direction.update)
    for s, gradient, got in zip(SCHEDULE, gradients(), run_named(name, True), strict=True):
        u, state = update(gradient["hidden"], state)
        want = -0.1 * s * rule.learning_rate(SHAPES["hidden"]) * u
        assert np.linalg.norm(got["hidden"] - want) <= 2e-3 * np.linalg.norm(want)


@jax.jit
def normalized(update):
    normalize = mup_jax.normalize_spectral_norm()
    return normalize.update(update, normalize.init(update))[0]


@pytest.mark.parametrize("name", ALL_MATRICES)
@pytest.mark.parametrize("spectral_norm", [False, True])
def test_embedding_and_readout_can_have_the_direction_too(name, spectral_norm):
    make = functools.partial(OPTIMIZERS[name], 0.1, shapes=SHAPES, **OPTIONS[name])
    got = step_once(make(hidden_only=False, spectral_norm=spectral_norm))
    direction, rule = DIRECTIONS[name]
    u = step_once(direction, params=MATRICES)
    by_norm = {key: normalized(u[key]) for key in MATRICES}
    by_norm["embed"] = u["embed"] / jnp.sqrt(jnp.mean(jnp.square(u["embed"])))
    for key in MATRICES:
        by_rule = rule.learning_rate(SHAPES[key]) * u[key]
        want = -0.1 * (by_norm[key] if spectral_norm else by_rule)
        assert np.linalg.norm(got[key] - want) <= 2e-3 * np.linalg.norm(want)
    adam = first_step(name)["gain"]
    np.testing.assert_allclose(got["gain"], adam, rtol=1e-5)


@pytest.mark.parametrize("options", [{"exponent": 0.25, "block_size": None}, {"block_size": 8}])
def test_shampoo_without_grafting(options):
    got = step_once(mup_jax.shampoo(0.1, shapes=SHAPES, grafted=False, **options))["hidden"]
    direction = mup_jax.scale_by_shampoo(**options)
    rate = 0.1 * rules.shampoo(**options).learning_rate(SHAPES["hidden"])
    want = -rate * step_once(direction, params=MATRICES)["hidden"]
    assert np.linalg.norm(got - want) <= 2e-3 * np.linalg.norm(want)


def test_epsilon_of_the_direction_can_be_the_same_at_every_size():
    one_step = {"orthogonalizer": "newton_schulz", "ns_steps": 1}
    scaled, constant = (
        step_once(mup_jax.muon(0.1, shapes=shapes, eps=10.0, **one_step))["hidden"]
        for shapes in (SHAPES, mup_jax.Transfer(SHAPES, scale_epsilon=False))
    )
    for got, eps in ((scaled, 10 * rules.muon().epsilon(SHAPES["hidden"])), (constant, 10.0)):
        direction = mup_jax.scale_by_muon(eps=eps, **one_step)
        want = -0.1 * step_once(direction, params=MATRICES)["hidden"]
        np.testing.assert_allclose(got, want, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("name", ROUTED)
@pytest.mark.parametrize("with_shapes", [False, True])
def test_spectral_normalization_of_the_direction_needs_no_rule(name, with_shapes):
    shapes = SHAPES if with_shapes else None
    make = functools.partial(OPTIMIZERS[name], 0.1, shapes=shapes, **OPTIONS[name])
    got = step_once(make(spectral_norm=True))
    plain = first_step(name) if with_shapes else step_once(make())
    on_spectral = {"hidden"} if with_shapes else {"embed", "hidden", "head"}
    on_spectral |= {"head"} if name == "soap" else set()
    for key in PARAMS:
        want = plain[key]
        if key in on_spectral:
            want = 0.1 * normalized(plain[key])
        elif key == "embed" and name == "soap":
            want = 0.1 * want / jnp.sqrt(jnp.mean(jnp.square(want)))
        assert np.linalg.norm(got[key] - want) <= 2e-3 * np.linalg.norm(want)


def test_soap_with_adam_normalizes_hidden_matrices_only():
    make = functools.partial(mup_jax.soap, 0.1, shapes=SHAPES, hidden_only=True)
    got, plain = step_once(make(spectral_norm=True)), step_once(make())
    same = {key: bool(np.all(got[key] == plain[key])) for key in PARAMS}
    assert same == {"embed": True, "head": True, "gain": True, "hidden": False}


# Those that treat all parameters alike

GAMMA = 100.0  # at which some entries are clipped and others not
BY_EPSILON = {
    "adamw": lambda e: optax.scale_by_adam(0.9, 0.98, eps=e),
    "adopt": lambda e: optax.contrib.scale_by_adopt(eps=e),
    "lamb": lambda e: optax.chain(
        optax.scale_by_adam(0.9, 0.999, eps=e), optax.scale_by_trust_ratio()
    ),
    "lion": lambda e: optax.scale_by_lion(),
    "sophia": lambda e: optax.contrib.sophia(
        -1.0, 0.96, 0.99, eps=e, gamma=GAMMA / e, weight_decay=0.0
    ),
}


@pytest.mark.parametrize(
    ("name", "scale_epsilon"),
    [(name, on) for name in ELEMENTWISE for on in (True, False) if on or name != "lion"],
)
def test_every_parameter_gets_the_direction_by_its_rule(name, scale_epsilon):
    """With ε, and Sophia's γ, in the units of each parameter's gradient."""
    shapes = mup_jax.Transfer(SHAPES, scale_epsilon=scale_epsilon)
    options = {} if name == "lion" else {"eps": 1.0}
    options |= {"gamma": GAMMA} if name == "sophia" else {}
    got = run(OPTIMIZERS[name](0.1, shapes=shapes, **options), **EXTRA[name])
    rule = getattr(rules, {"adamw": "adam"}.get(name, name))()
    for key, shape in SHAPES.items():
        eps = rule.epsilon(shape) if scale_epsilon else 1.0
        want = run(BY_EPSILON[name](eps), **EXTRA[name])
        for u, direction in zip(got, want, strict=True):
            expected = -0.1 * rule.learning_rate(shape) * direction[key]
            np.testing.assert_allclose(u[key], expected, rtol=1e-4, atol=1e-6)


def test_sophia_g_gets_the_same_gamma():
    logits_fn = lambda p: p["embed"] @ (p["hidden"] * p["gain"]) @ p["head"]
    extra_args = {"logits_fn": logits_fn}
    sophia = mup_jax.sophia(0.1, shapes=SHAPES, curvature="gnb", gamma=GAMMA, eps=1e-3, seed=3)
    got = run(sophia, **extra_args)
    for key, shape in SHAPES.items():
        e = rules.sophia().epsilon(shape)
        plain = mup_jax.scale_by_sophia_g(gamma=GAMMA / e, eps=1e-3 * e, seed=3)
        want = run(plain, -0.1 * rules.sophia().learning_rate(shape), **extra_args)
        for u, expected in zip(got, want, strict=True):
            np.testing.assert_allclose(u[key], expected[key], rtol=1e-3, atol=1e-6)


def clipped_by_sophia(width, vocabulary=32, batch=256):
    """The fraction of clipped entries of the hidden matrix of a small network, after 20 steps."""
    rng = np.random.default_rng(width)

    def params_of(width):
        normal = lambda *shape: jnp.float32(rng.normal(size=shape))
        return {
            "embed": 0.5 * normal(vocabulary, width),
            "hidden": normal(width, width) / width**0.5,
            "head": normal(width, vocabulary) / width,
        }

    params = params_of(width)
    shapes = infer_shapes(params_of(16), params)
    sophia = mup_jax.sophia(
        1e-3, shapes=shapes, curvature="gnb", gamma=20.0, b2=0.9, update_interval=2
    )
    next_token = jnp.array(rng.integers(vocabulary, size=vocabulary))

    @jax.jit
    def step(params, state, x):
        model = lambda p: jax.nn.gelu(jax.nn.gelu(p["embed"][x]) @ p["hidden"]) @ p["head"]
        loss = lambda p: cross_entropy(model(p), next_token[x]).mean()
        u, state = sophia.update(jax.grad(loss)(params), state, params, logits_fn=model)
        return optax.apply_updates(params, u), state, u

    state = sophia.init(params)
    for _ in range(20):
        params, state, u = step(params, state, rng.integers(vocabulary, size=batch))
    return np.mean(np.abs(u["hidden"]) > 0.999 * np.abs(u["hidden"]).max())


def test_sophia_clips_as_many_entries_at_every_width():
    few, many = clipped_by_sophia(32), clipped_by_sophia(256)
    # With one γ for all widths it would be three quarters and then all of them.
    assert 0.2 < few < 0.5
    assert many == pytest.approx(few, abs=0.1)


def test_sophia_says_what_it_lacks():
    with pytest.raises(ValueError, match="curvature='fisher'"):
        mup_jax.sophia(0.1, curvature="fisher")
    for curvature, name in {"hutchinson": "obj_fn", "gnb": "logits_fn"}.items():
        for shapes in (None, SHAPES):
            with pytest.raises(ValueError, match=name):
                run(mup_jax.sophia(0.1, curvature=curvature, shapes=shapes))


def test_lamb_has_a_trust_ratio_for_each_matrix_of_a_stack():
    rng = np.random.default_rng(0)
    w = np.float32(rng.normal(size=(3, 4, 5)) * [[[1.0]], [[10.0]], [[0.0]]])
    g = np.float32(rng.normal(size=(3, 4, 5)))
    numbers = optax.contrib.MuonDimensionNumbers(-2, -1)
    lamb = mup_jax.lamb(0.1, weight_dimension_numbers=numbers)
    got, _ = lamb.update(g, lamb.init(w), w)
    for layer in range(3):
        alone = optax.lamb(0.1)
        want, _ = alone.update(g[layer], alone.init(w[layer]), w[layer])
        np.testing.assert_allclose(got[layer], want, rtol=1e-4)
    with pytest.raises(ValueError, match="trust ratios need the parameters"):
        lamb.update(g, lamb.init(w))
    with pytest.raises(ValueError, match="weight_dimension_numbers"):
        mup_jax.lamb(0.1).update(g, lamb.init(w), w)


def test_lamb_by_the_rule_of_gupta_et_al():
    got, measured = (
        step_once(mup_jax.lamb(0.1, shapes=SHAPES, variant=variant))
        for variant in ("gupta", "measured")
    )
    want = {key: measured[key] for key in PARAMS}
    want["hidden"] = measured["hidden"] * (WIDTH / BASE) ** 0.5
    assert_trees_close(got, want)


@pytest.mark.parametrize("kind", [AxisType.Explicit, AxisType.Auto])
@pytest.mark.parametrize("spec", [(None, "data", "model"), ("data", None, "model")])
def test_lamb_of_sharded_stacks(kind, spec):
    rng = np.random.default_rng(0)
    w, g = np.float32(rng.normal(size=(2, 4, 8, 6)))
    numbers = optax.contrib.MuonDimensionNumbers(-2, -1)
    lamb = mup_jax.lamb(0.1, weight_dimension_numbers=numbers)
    step = jax.jit(lambda g, w: lamb.update(g, lamb.init(w), w)[0])
    want = step(g, w)
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(kind, kind))
    with jax.set_mesh(mesh):
        got = step(*jax.device_put((g, w), jax.NamedSharding(mesh, jax.P(*spec))))
    np.testing.assert_allclose(got, want, rtol=1e-5)
    assert got.sharding.spec == jax.P(*spec)


# Where Optax has the optimizer


OF_OPTAX = {
    "adamw": functools.partial(optax.adamw, b2=0.98, weight_decay=0.0),
    "adopt": optax.contrib.adopt,
    "lamb": optax.lamb,
    "lion": functools.partial(optax.lion, weight_decay=0.0),
    "sophia": functools.partial(optax.contrib.sophia, b1=0.96, eps=1e-12, weight_decay=0.0),
}


@pytest.mark.parametrize("name", ELEMENTWISE)
def test_trajectories_are_those_of_optax(name):
    ours, theirs = OPTIMIZERS[name](0.03), OF_OPTAX[name](0.03)

    def train(optimizer):
        @jax.jit
        def step(params, state):
            gradient = jax.grad(loss)(params)
            u, state = optimizer.update(gradient, state, params, **EXTRA[name])
            return optax.apply_updates(params, u), state

        # A readout begins at zero.
        params = PARAMS | {"head": jnp.zeros_like(PARAMS["head"])}
        state = optimizer.init(params)
        for _ in range(12):
            params, state = step(params, state)
        return params

    assert_trees_close(train(ours), train(optax.with_extra_args_support(theirs)), 1e-5)


def test_muon_is_that_of_optax():
    """Without Nesterov, for which Optax corrects the bias of momentum and gradient apart."""
    gradients = np.float32(np.random.default_rng(0).normal(size=(4, 12, 20)))
    ours = mup_jax.scale_by_muon(orthogonalizer="newton_schulz", nesterov=False)
    theirs = optax.contrib.scale_by_muon(nesterov=False)
    state, their_state = ours.init(gradients[0]), theirs.init(gradients[0])
    for gradient in gradients:
        got, state = jax.jit(ours.update)(gradient, state)
        want, their_state = jax.jit(theirs.update)(gradient, their_state)
        np.testing.assert_allclose(got, want, atol=2e-4)
