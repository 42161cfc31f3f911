"""Every path of every matrix function against numpy float64, well and ill conditioned."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mup_jax.transforms.linalg import (
    check_orthogonalizer,
    eigenbasis,
    inverse_root,
    orthogonalize,
    refine_eigenbasis,
    use_paths_of,
)

pytestmark = pytest.mark.usefixtures("with_and_without_optimizations")

# GPUs take each function from one of these.
PATHS = ("cpu", "tpu")
RNG = np.random.default_rng(0)


def orthogonal(n):
    return np.linalg.qr(RNG.normal(size=(n, n)))[0]


def with_singular_values(values, m, n):
    values = np.asarray(values)
    k = len(values)
    return orthogonal(m)[:, :k] * values @ orthogonal(n)[:k]


def semidefinite(values):
    q = orthogonal(len(values))
    return q * values @ q.T


def norm(x):
    return np.linalg.norm(np.asarray(x, np.float64), axis=(-2, -1))


@functools.cache
def compiled(path, function, **options):
    f = jax.jit(functools.partial(function, **options))

    def call(*matrices):
        with use_paths_of(path):
            return np.asarray(f(*(np.asarray(x, np.float32) for x in matrices)), np.float64)

    return call


# Orthogonalization


def polar(x):
    u, s, vt = np.linalg.svd(np.asarray(x, np.float64), full_matrices=False)
    alive = s > 1e-6 * s[..., :1]
    return (u * alive[..., None, :]) @ vt


def polar_error(x, got):
    """The error that a singular value of 1 has, in the root mean square."""
    want = polar(x)
    return np.linalg.norm(np.asarray(got) - want) / np.linalg.norm(want)


def orthogonalizer(method, steps=None, gram_form=None):
    return compiled("cpu", orthogonalize, method=method, ns_steps=steps, gram_form=gram_form)


# Error bounds for κ = 30.
ERRORS = {
    ("svd", None, None): 1e-5,
    ("tuned", 6, False): 0.004,
    ("tuned", 6, True): 0.004,
    ("tuned", 5, True): 0.06,
    ("polar_express", 8, False): 1e-3,
    ("polar_express", 8, True): 1e-3,
    ("newton_schulz", 5, False): 0.3,
}
STACK = np.stack([with_singular_values(np.geomspace(1, 30, 12), 12, 20) for _ in range(3)])


@pytest.mark.parametrize("how", ERRORS)
def test_distance_from_the_polar_factor(how):
    f, bound = orthogonalizer(*how), ERRORS[how]
    wide = f(STACK)
    assert polar_error(STACK, wide) < bound
    tall = f(STACK.swapaxes(-1, -2))
    np.testing.assert_allclose(tall.swapaxes(-1, -2), wide, atol=2e-5)
    # The approximate methods agree on singular vectors, and bound the singular values.
    assert np.linalg.svd(wide, compute_uv=False).max() < 1 + 2 * bound
    u, v = orthogonal(12), orthogonal(20)
    np.testing.assert_allclose(f(u @ STACK @ v), u @ wide @ v, atol=5e-5)


@pytest.mark.parametrize("how", ERRORS)
def test_any_scale_and_rank(how):
    f, bound = orthogonalizer(*how), ERRORS[how]
    deficient = with_singular_values([1.0, 0.5, 0.25], 12, 20)
    stack = np.stack([np.zeros((12, 20)), deficient, STACK[0]])
    zero, low_rank, full = f(stack)
    np.testing.assert_array_equal(zero, 0)
    assert polar_error(deficient, low_rank) < bound
    large = f(1e20 * stack)
    np.testing.assert_allclose(large, np.stack([zero, low_rank, full]), atol=2e-4)
    # Far below ε the result is small, and never larger than at scale 1.
    small = f(1e-20 * stack)
    assert np.isfinite(small).all()
    assert (norm(small) <= 1.0001 * norm(large)).all()


@pytest.mark.parametrize("method", ["svd", "tuned"])
def test_small_scales_without_eps(method):
    f = compiled("cpu", orthogonalize, method=method, eps=0.0)
    assert polar_error(STACK, f(1e-20 * STACK)) < 0.004


@pytest.mark.parametrize("condition", [1e2, 1e4])
def test_more_steps_and_tuned_steps_are_more_accurate(condition):
    x = with_singular_values(np.geomspace(1, condition, 20), 20, 20)
    error = lambda *how: polar_error(x, orthogonalizer(*how)(x))
    assert error("svd") < 1e-3
    assert error("polar_express", 8) < error("polar_express", 5) < error("newton_schulz", 5)
    assert error("tuned", 6) < error("tuned", 5) < error("newton_schulz", 5)


def hard_spectra(m, n):
    """Singular values whose squares are rounding noise."""
    yield RNG.normal(size=(m, n))
    for decay in (1.0, 2.0):
        yield with_singular_values(np.arange(1, m + 1) ** -decay, m, n)
    for condition in (1e2, 1e4, 1e6, 1e8):
        yield with_singular_values(np.geomspace(1, 1 / condition, m), m, n)
    yield with_singular_values([1.0, 0.5, 0.25], m, n)
    yield with_singular_values(np.geomspace(1, 1e-2, m // 2), m, n)
    yield np.ones((m, n))
    yield np.outer(np.eye(m)[0], RNG.normal(size=n)) + 1e-7 * RNG.normal(size=(m, n))


@functools.cache
def hard_stack():
    stack = np.float32(list(hard_spectra(32, 100)))
    return stack, polar(stack)


@pytest.mark.parametrize(
    ("method", "steps"),
    [
        ("tuned", 6),
        ("tuned", 5),
        ("polar_express", 5),
        ("polar_express", 10),
        ("newton_schulz", 1),
    ],
)
def test_gram_form_is_as_accurate_as_the_plain_form(method, steps):
    stack, want = hard_stack()
    plain = orthogonalizer(method, steps, False)(stack)
    gram = orthogonalizer(method, steps, True)(stack)
    assert (norm(gram - plain) / 32**0.5 < 1e-3).all()
    assert (norm(gram - want) < norm(plain - want) + 3e-4 * 32**0.5).all()


@pytest.mark.parametrize(
    ("path", "shape", "products"),
    [
        ("cpu", (16, 24), 4 * 5 - 3 + 2),
        ("cpu", (24, 16), 4 * 5 - 3 + 2),
        ("cpu", (16, 23), 3 * 5),
        ("gpu", (16, 64), 3 * 5),
        ("tpu", (16, 64), 3 * 5),
    ],
)
def test_gram_form_is_taken_where_it_has_fewer_operations(path, shape, products):
    with use_paths_of(path):
        program = jax.make_jaxpr(lambda x: orthogonalize(x, "tuned", ns_steps=5))(jnp.zeros(shape))
    assert str(program).count("dot_general[") == products


def test_bfloat16_is_read_as_float32():
    x = jnp.asarray(STACK, jnp.bfloat16)
    got = jax.jit(orthogonalize)(x)
    assert got.dtype == jnp.float32
    np.testing.assert_array_equal(got, jax.jit(orthogonalize)(x.astype(jnp.float32)))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("qr", None), "orthogonalizer='qr'.*'polar_express'"),
        (("tuned", 0), "ns_steps=0"),
        (("tuned", 8), "ns_steps=8: .* 5 and 6 .* 'polar_express'"),
        (("newton_schulz", 0), "ns_steps=0"),
    ],
)
def test_bad_orthogonalizers_are_refused(arguments, message):
    for check in (check_orthogonalizer, functools.partial(orthogonalize, jnp.eye(2))):
        method, steps = arguments
        with pytest.raises(ValueError, match=message):
            check(method, ns_steps=steps)


# Inverse roots


def root(path, exponent, eps=1e-5, relative_eps=True):
    return compiled(path, inverse_root, exponent=exponent, eps=eps, relative_eps=relative_eps)


def exact_root(statistics, exponent, eps=1e-5):
    values, q = np.linalg.eigh(statistics)
    return q * (np.maximum(values, 0) + eps * values[-1]) ** -exponent @ q.T


NO_ROOTS = np.full((4, 20, 20), 7.0)
# The last is not one over an integer.
EXPONENTS = (1.0, 0.5, 0.25, 0.4)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    ("exponent", "eps"), [*((e, 1e-5) for e in EXPONENTS), (0.5, 1e-6), (0.25, 1e-6)]
)
def test_inverse_root_agrees_with_float64(path, exponent, eps):
    conditions = np.array([1e2, 1e4, 1e8])
    stack = [semidefinite(np.geomspace(1, 1 / c, 20)) for c in conditions]
    stack.append(semidefinite(np.arange(20) < 5))
    stack = np.float32(stack).astype(np.float64)
    for scale in (1.0, 1e-12, 1e12):
        got = root(path, exponent, eps)(scale * stack, NO_ROOTS)
        want = np.stack([exact_root(x, exponent, eps) for x in scale * stack])
        error = norm(got - want) / norm(want)
        # Rounding moves eigenvalues by 1e-7 of the largest; the ridge bounds what that can do.
        bounds = 3e-7 * exponent * np.minimum(np.append(conditions, np.inf), 1 / eps) + 3e-6
        assert (error < bounds).all(), (error, bounds)


@pytest.mark.parametrize("path", PATHS)
def test_inverse_root_turns_with_its_matrix(path):
    statistics = semidefinite(np.geomspace(1, 1e-3, 20))
    u = orthogonal(20)
    got = root(path, 0.5)(np.stack([statistics, u @ statistics @ u.T] * 2), NO_ROOTS)
    np.testing.assert_allclose(got[1], u @ got[0] @ u.T, atol=3e-4 * norm(got[0]))


@pytest.mark.parametrize("path", PATHS)
def test_inverse_root_with_absolute_eps(path):
    diagonal = np.diag([7.0, 2.0, 0.0])
    got = root(path, 0.5, eps=2.0, relative_eps=False)(diagonal, 0 * diagonal)
    np.testing.assert_allclose(got, np.diag([1 / 3, 1 / 2, 1 / np.sqrt(2)]), atol=1e-6)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("relative_eps", [True, False])
def test_the_root_of_nothing_is_zero(path, relative_eps):
    stack = np.stack([np.zeros((3, 3)), 1e-38 * np.eye(3)])
    got = root(path, 0.5, 1e-12, relative_eps)(stack, np.ones_like(stack))
    np.testing.assert_array_equal(got, 0)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("exponent", EXPONENTS)
def test_previous_roots_replace_bad_ones(path, exponent):
    hard, easy = semidefinite(np.geomspace(1, 1e-8, 20)), np.eye(20)
    nan, infinite = np.full((20, 20), np.nan), hard.copy()
    infinite[3, 4] = np.inf
    got = root(path, exponent)(np.stack([hard, nan, infinite, easy]), NO_ROOTS)
    np.testing.assert_array_equal(got[1:3], NO_ROOTS[1:3])
    # The good ones are what they are among equals, though one converges sooner.
    for x, statistics in ((got[0], hard), (got[3], easy)):
        among_equals = root(path, exponent)(np.stack([statistics] * 4), NO_ROOTS)
        np.testing.assert_allclose(x, among_equals[0], atol=1e-3 * norm(x))
    np.testing.assert_allclose(got[3], (1 + 1e-5) ** -exponent * easy, atol=1e-5)


def test_newton_says_where_it_does_not_converge():
    indefinite = np.diag([2.0, 1.0, -1.0])
    np.testing.assert_array_equal(root("tpu", 0.5)(indefinite, np.eye(3)), np.eye(3))


# Bases


def rotated(basis, statistics):
    """Qᵀ A Q / max A, its diagonal, and the norm of the rest."""
    scale = np.maximum(np.abs(statistics).max(axis=(-2, -1), keepdims=True), 1e-300)
    x = basis.swapaxes(-1, -2) @ (statistics / scale) @ basis
    diagonal = np.diagonal(x, axis1=-2, axis2=-1)
    return diagonal, norm(x - diagonal[..., None] * np.eye(x.shape[-1]))


def assert_orthogonal(basis, atol=2e-6):
    identity = np.broadcast_to(np.eye(basis.shape[-1]), basis.shape)
    np.testing.assert_allclose(basis.swapaxes(-1, -2) @ basis, identity, atol=atol)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("d", [1, 2, 5, 12])
def test_eigenbasis(path, d):
    stack = [semidefinite(np.geomspace(1, 1 / c, d)) for c in (1e2, 1e4, 1e8)]
    gaussian = RNG.normal(size=(d, 2 * d))
    stack += [gaussian @ gaussian.T, np.ones((d, d)), np.eye(d), np.diag(np.arange(d) * 1.0)]
    stack += [1e30 * stack[0], 1e-25 * stack[0], np.zeros((d, d))]
    stack = np.float32(stack).astype(np.float64)
    basis = compiled(path, eigenbasis)(stack)
    assert_orthogonal(basis)
    values, off_diagonal = rotated(basis, stack)
    assert (off_diagonal < 5e-6 * d**0.5).all()
    assert (np.diff(values, axis=-1) < 1e-5).all()


@pytest.mark.parametrize("path", PATHS)
def test_refinement_converges_and_stays_orthogonal(path):
    statistics = np.stack([semidefinite(np.geomspace(1, 1 / c, 12)) for c in (1e4, 1e6, 1e8)])
    basis = np.stack([orthogonal(12), np.eye(12), orthogonal(12)])
    masses = []
    for _ in range(60):
        basis = compiled(path, refine_eigenbasis)(statistics, basis)
        values, mass = rotated(basis, statistics)
        masses.append(mass)
        assert_orthogonal(basis, 1e-5)
    assert masses[0].min() > 1e-3
    assert masses[-1].max() < 1e-5
    top = np.stack([np.linalg.eigvalsh(x)[:-5:-1] / np.abs(x).max() for x in statistics])
    np.testing.assert_allclose(values[:, :4], top, rtol=1e-4)


def test_all_paths_follow_a_drifting_covariance_alike():
    d, sizes = 24, np.arange(1, 25) ** -1.0
    left = orthogonal(d) * sizes
    statistics = left @ left.T
    bases = dict.fromkeys(("cpu", "gpu", "tpu"), np.linalg.eigh(statistics)[1][:, ::-1])
    masses = {path: [] for path in bases}
    for _ in range(40):
        left = left + 0.05 * RNG.normal(size=(d, d)) * sizes / d**0.5
        gradient = left @ RNG.normal(size=(d, d))
        statistics = 0.9 * statistics + 0.1 * gradient @ gradient.T
        for path in bases:
            bases[path] = compiled(path, refine_eigenbasis)(statistics, bases[path])
            masses[path].append(rotated(bases[path], statistics)[1])
    assert 1e-3 < np.mean(masses["cpu"]) < 0.3
    for path in ("gpu", "tpu"):
        np.testing.assert_allclose(masses[path], masses["cpu"], rtol=0.02)


@pytest.mark.parametrize("path", PATHS)
def test_refinement_follows_eigenvalues_that_swap(path):
    refined = compiled(path, refine_eigenbasis)(np.diag([1.0, 5.0, 2.0]), np.eye(3))
    np.testing.assert_allclose(np.abs(refined), np.eye(3)[[2, 0, 1]], atol=1e-6)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("scale", [1.0, 1e30, 1e-25])
def test_refinement_by_deficient_statistics_gives_an_orthogonal_basis(path, scale):
    column = RNG.normal(size=(20, 1))
    deficient = [np.diag(np.arange(20) < 7), np.ones((20, 20)), column @ column.T]
    stack = scale * np.stack([*deficient, semidefinite(np.geomspace(1, 1e-8, 20))])
    for basis in (orthogonal(20), np.eye(20)):
        refined = compiled(path, refine_eigenbasis)(stack, np.broadcast_to(basis, stack.shape))
        assert_orthogonal(refined, 1e-5)
        # One step finds the one direction of rank one.
        np.testing.assert_allclose(np.abs(refined[1, :, 0]), 20**-0.5, atol=1e-5)


@pytest.mark.parametrize("path", PATHS)
def test_refinement_by_what_says_nothing_keeps_the_basis(path):
    basis = np.float32(np.stack([orthogonal(5)] * 4))
    nan, one_entry = np.full((5, 5), np.nan), semidefinite(np.arange(1, 6))
    one_entry[1, 1] = np.inf
    stack = np.stack([np.zeros((5, 5)), 1e-38 * np.eye(5), nan, one_entry])
    np.testing.assert_array_equal(compiled(path, refine_eigenbasis)(stack, basis), basis)


# Stacks, platforms and meshes


FUNCTIONS = {
    "orthogonalize": lambda x, _: orthogonalize(x),
    "inverse_root": functools.partial(inverse_root, exponent=0.5, eps=1e-5, relative_eps=True),
    "eigenbasis": lambda x, _: eigenbasis(x),
    "refine_eigenbasis": refine_eigenbasis,
}
CALLS = {
    "cpu": {
        "inverse_root": {"lapack_ssyevd_ffi"},
        "eigenbasis": {"lapack_ssyevd_ffi"},
        "refine_eigenbasis": {"lapack_sgeqrf_ffi", "lapack_sorgqr_ffi"},
    },
    "cuda": {
        "inverse_root": {"cusolver_syevd_ffi"},
        "eigenbasis": {"cusolver_syevd_ffi"},
        "refine_eigenbasis": {"cusolver_potrf_ffi"},
    },
    "tpu": {},
}


@pytest.mark.parametrize("platform", CALLS)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_programs_call_only_what_is_fast_on_their_platform(name, platform):
    x = jax.ShapeDtypeStruct((2, 8, 8), jnp.float32)
    lowered = jax.jit(FUNCTIONS[name]).trace(x, x).lower(lowering_platforms=(platform,))
    calls = set(re.findall(r"custom_call @(\w+)", lowered.as_text()))
    assert calls == CALLS[platform].get(name, set())


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_inside_vmap_cond_and_shard_map(name, path):
    function = FUNCTIONS[name]
    x = np.float32([semidefinite(np.geomspace(1, 1e-2, 4)) for _ in range(8)])
    basis = np.float32([orthogonal(4)] * 8)
    if_any = lambda x, y: jax.lax.cond(jnp.sum(x) > -1, function, lambda x, y: 0 * x, x, y)
    mesh = jax.make_mesh((8,), ("data",))
    with use_paths_of(path), jax.set_mesh(mesh):
        want = jax.jit(function)(x, basis)
        split = [jax.device_put(a, jax.NamedSharding(mesh, jax.P("data"))) for a in (x, basis)]
        for inner, check_vma in ((if_any, True), (jax.vmap(function), False)):
            mapped = jax.shard_map(inner, out_specs=jax.P("data"), check_vma=check_vma)
            program = jax.jit(mapped).lower(*split).compile()
            assert not re.search("all-gather|all-reduce|all-to-all", program.as_text())
            np.testing.assert_allclose(program(*split), want, atol=1e-4)
