"""The references against facts that can be worked out by hand."""

import numpy as np
import pytest

from . import (
    JORDAN,
    Adam,
    AdaMuon,
    Graft,
    Hyperball,
    KLFactors,
    KLShampoo,
    KLSoap,
    Muon,
    NorMuon,
    Shampoo,
    Soap,
    SophiaG,
    SpectralNorm,
    bartlett_estimate,
    early,
    every,
    gauss_newton_diagonal,
)
from .blocks import cut

RNG = np.random.default_rng(0)
RANK_ONE = np.outer(RNG.normal(size=5), RNG.normal(size=3))
MOVING = list(RNG.normal(size=(6, 5, 3)))


def run(optimizer, gradients):
    return [optimizer.update(G) for G in gradients]


def test_adam_first_step_is_the_sign():
    np.testing.assert_allclose(Adam(eps=0.0).update(MOVING[0]), np.sign(MOVING[0]))


def test_adam_second_step_by_hand():
    adam = Adam(b1=0.5, b2=0.5, eps=0.0)
    adam.update(np.array([[1.0]]))
    # m = .25 + 1.5, v = .25 + 4.5, both divided by 1 - .25
    assert adam.update(np.array([[3.0]]))[0, 0] == pytest.approx((7 / 3) / np.sqrt(19 / 3))


def test_exact_muon_is_the_polar_factor():
    U, _, Vt = np.linalg.svd(MOVING[0], full_matrices=False)
    np.testing.assert_allclose(Muon(coefficients=None).update(MOVING[0]), U @ Vt, atol=1e-12)


def test_exact_muon_of_rank_one():
    expected = RANK_ONE / np.linalg.norm(RANK_ONE)
    np.testing.assert_allclose(Muon(coefficients=None).update(RANK_ONE), expected, atol=1e-12)


def test_newton_schulz_acts_on_each_singular_value():
    U, s, Vt = np.linalg.svd(MOVING[0], full_matrices=False)
    s = s / np.linalg.norm(s)
    for a, b, c in JORDAN:
        s = a * s + b * s**3 + c * s**5
    np.testing.assert_allclose(Muon(eps=0.0).update(MOVING[0]), (U * s) @ Vt, atol=1e-12)


def test_nesterov_of_a_second_gradient():
    muon = Muon(beta=0.5, coefficients=[(1.0, 0.0, 0.0)], eps=0.0)
    first, second = MOVING[:2]
    muon.update(first)
    expected = 0.125 * first + 0.25 * second + 0.5 * second
    np.testing.assert_allclose(muon.update(second), expected / np.linalg.norm(expected))


@pytest.mark.parametrize(("exponent", "power"), [(0.5, 1.0), (0.25, 0.0)])
def test_shampoo_of_a_rank_one_gradient(exponent, power):
    # The one singular value σ becomes σ · (σ²(1+ε))^(-2e): 1/σ for ½,½ and 1 for ¼,¼.
    size = np.linalg.norm(RANK_ONE)
    u = Shampoo(e_in=exponent, e_out=exponent).update(RANK_ONE)
    np.testing.assert_allclose(u, RANK_ONE / size / size**power, rtol=2e-5)


def test_shampoo_with_absolute_epsilon():
    u = Shampoo(eps=2.0, relative_eps=False).update(np.diag([1.0, 3.0]))
    np.testing.assert_allclose(u, np.diag([1 / 3, 3 / 11]), atol=1e-12)


def test_shampoo_exponents_belong_to_their_sides():
    G = np.array([[3.0, 0.0], [0.0, 0.0]])
    u = Shampoo(eps=1.0, relative_eps=False, e_in=1.0, e_out=0.0).update(G)
    np.testing.assert_allclose(u, G / 10, atol=1e-12)
    np.testing.assert_allclose(
        Shampoo(eps=1.0, relative_eps=False, e_in=1.0, sides="in").update(G), u
    )


def test_one_side_whitens_that_side():
    u = Shampoo(eps=0.0, sides="out").update(MOVING[0])
    np.testing.assert_allclose(u.T @ u, np.eye(3), atol=1e-12)


def test_shampoo_keeps_its_roots_between_refreshes():
    rare = run(Shampoo(b1=0.0, refresh=every(3)), [MOVING[0]] * 3)
    scaled = run(Shampoo(b1=0.0, refresh=every(3)), [MOVING[0], 2 * MOVING[0], 3 * MOVING[0]])
    np.testing.assert_allclose(scaled[1], 2 * rare[0])
    np.testing.assert_allclose(scaled[2], 3 * rare[0])


def test_cut_covers_the_matrix_with_smaller_edge_blocks():
    blocks = cut((5, 3), (True, True), 2)
    assert [(rows.stop - rows.start, cols.stop - cols.start) for rows, cols in blocks] == [
        (2, 2),
        (2, 1),
        (2, 2),
        (2, 1),
        (1, 2),
        (1, 1),
    ]
    seen = np.zeros((5, 3))
    for where in blocks:
        seen[where] += 1
    np.testing.assert_array_equal(seen, 1)


@pytest.mark.parametrize("optimizer", [Shampoo, Soap])
def test_each_block_is_a_matrix_of_its_own(optimizer):
    whole = run(optimizer(block_size=2), MOVING)
    for where in cut((5, 3), (True, True), 2):
        alone = run(optimizer(), [G[where] for G in MOVING])
        np.testing.assert_allclose([u[where] for u in whole], alone, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("optimizer", [Shampoo, Soap])
def test_a_long_side_is_left_alone_and_not_cut(optimizer):
    long = run(optimizer(block_size=3, max_preconditioner_dim=3), MOVING)
    np.testing.assert_allclose(long, run(optimizer(sides="out"), MOVING))


@pytest.mark.parametrize("optimizer", [Shampoo, Soap])
def test_staggered_blocks_refresh_at_their_own_steps(optimizer):
    def staggered(step, block):
        return step % 3 == block % 3

    whole = run(optimizer(block_size=3, refresh=staggered), MOVING)
    second = run(optimizer(refresh=lambda step, block: step % 3 == 1), [G[3:] for G in MOVING])
    np.testing.assert_allclose([u[3:] for u in whole], second)


@pytest.mark.parametrize("soap", [Soap, KLSoap])
@pytest.mark.parametrize("exact_steps", [1, 100])
def test_soap_of_diagonal_gradients_is_adam(soap, exact_steps):
    # Off the diagonal both are 0/ε; on it the basis is the axes, however they are permuted. They
    # add ε before and after the correction of the bias, which must not show.
    gradients = [np.diag(d) for d in RNG.normal(size=(8, 4)) * [1.0, 3.0, 2.0, 0.5]]
    soap = run(soap(eps=1e-10, exact=early(1, exact_steps)), gradients)
    np.testing.assert_allclose(soap, run(Adam(eps=1e-10), gradients), atol=1e-6)


def test_soap_first_step_of_a_square_gradient_is_orthogonal():
    # In its own singular basis the gradient is diagonal, and Adam makes it a sign matrix.
    U, _, Vt = np.linalg.svd(MOVING[0][:3])
    np.testing.assert_allclose(Soap().update(MOVING[0][:3]), U @ Vt, atol=1e-6)


def test_soap_without_a_side_to_rotate_is_adam():
    soap = run(Soap(max_preconditioner_dim=2, eps=0.0), MOVING)
    np.testing.assert_allclose(soap, run(Adam(eps=0.0), MOVING))


@pytest.mark.parametrize("optimizer", [Shampoo, Soap, KLShampoo, KLSoap, Muon])
def test_rotating_the_gradient_rotates_the_update(optimizer):
    # Square gradients: rank-deficient factors would leave the null space of the basis arbitrary.
    gradients = [G[:3] for G in MOVING]
    U = np.linalg.qr(RNG.normal(size=(3, 3)))[0]
    V = np.linalg.qr(RNG.normal(size=(3, 3)))[0]
    plain = run(optimizer(), gradients)
    rotated = run(optimizer(), [U @ G @ V for G in gradients])
    np.testing.assert_allclose(rotated, [U @ u @ V for u in plain], rtol=1e-6, atol=1e-7)


def test_soap_of_the_transpose_is_the_transpose():
    square = [G[:3] for G in MOVING]
    transposed = run(Soap(), [G.T for G in square])
    np.testing.assert_allclose(transposed, [u.T for u in run(Soap(), square)], atol=1e-7)


def rotation(d):
    return np.linalg.qr(RNG.normal(size=(d, d)))[0]


@pytest.mark.parametrize(
    "refresh", [{"exact": every(1)}, {"exact": early(1, 1), "refresh": every(5)}]
)
@pytest.mark.parametrize("scale", [1.0, 1e-6])
def test_kl_factors_recover_a_kronecker_covariance(refresh, scale):
    root_in = rotation(6) * np.geomspace(1, 0.1, 6) @ rotation(6)
    root_out = rotation(4) * np.geomspace(1, 0.1, 4) @ rotation(4)
    factors = KLFactors(0.999, 1e-5, **{"refresh": every(1)} | refresh)
    for Z in RNG.normal(size=(2000, 6, 4)):
        factors.update(scale * root_in @ Z @ root_out.T)
    # In units of the true one, the estimated covariance is the identity.
    got = np.kron(factors.power(0, 1), factors.power(1, 1)) / scale**2
    inverse = np.linalg.inv(np.kron(root_in, root_out))
    np.testing.assert_allclose(np.linalg.eigvalsh(inverse @ got @ inverse.T), 1, atol=0.15)


def test_kl_eigenvalues_are_averages_in_the_basis():
    factors = KLFactors(0.5, 0.0, exact=early(1, 1), refresh=every(4))
    for G in MOVING[:2]:
        factors.update(G)
    before_in, before_out = factors.eigenvalues(0), factors.eigenvalues(1)
    rotated = factors.Q[0].T @ MOVING[2] @ factors.Q[1]
    factors.update(MOVING[2])
    # The weights of three gradients and what came before them: 1/2, 1/4, 1/8 and 1/16 of 15/16.
    want_in = (7 / 16 * before_in + np.mean(rotated**2 / before_out, axis=1) / 2) * 16 / 15
    want_out = (7 / 16 * before_out + np.mean(rotated.T**2 / before_in, axis=1) / 2) * 16 / 15
    np.testing.assert_allclose(factors.eigenvalues(0), want_in)
    np.testing.assert_allclose(factors.eigenvalues(1), want_out)


def test_kl_shampoo_first_step_by_hand():
    G = np.diag([3.0, 4.0])
    # Its entries have size 2.5, as both factors before, of which half is kept.
    S = (2.5 / 2 + np.array([9.0, 16.0]) / (2 * 2.5)) / 1.5
    u = KLShampoo(b2=0.5, eps=0.0).update(G)
    np.testing.assert_allclose(u, np.diag(np.array([3.0, 4.0]) / S), atol=1e-12)


@pytest.mark.parametrize(("sides", "power"), [("both", 1.0), ("in", 0.5), ("out", 0.5)])
def test_kl_shampoo_divides_out_the_size_of_gradients(sides, power):
    plain = run(KLShampoo(sides=sides), MOVING)
    np.testing.assert_allclose(run(KLShampoo(sides=sides), [1e-8 * G for G in MOVING]), plain)
    # Entries of the gradient are about 1, and those of the update.
    assert 0.3 < np.std(plain) < 3


def test_kl_shampoo_one_side_is_shampoo_of_that_side_in_time():
    gradients = [MOVING[t % 6] for t in range(600)]
    got = run(KLShampoo(sides="out", eps=0.0), gradients)[-1]
    # The factor is a mean over the inputs, not a sum.
    want = np.sqrt(5) * run(Shampoo(sides="out", eps=0.0), gradients)[-1]
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


def test_kl_soap_has_the_bases_of_kl_factors():
    options = {"exact": early(1, 1), "refresh": every(2)}
    soap, factors = KLSoap(b1=0.0, factor_eps=1e-5, **options), KLFactors(0.98, 1e-5, **options)
    for G in MOVING:
        u = soap.update(G)
        factors.update(G)
    Q_in, Q_out = factors.Q
    rotated = Q_in.T @ MOVING[-1] @ Q_out
    np.testing.assert_allclose(np.sign(Q_in.T @ u @ Q_out), np.sign(rotated))


def test_normuon_keeps_the_norm_and_evens_out_the_neurons():
    muon, normuon = run(Muon(), MOVING), run(NorMuon(), MOVING)
    norms = lambda updates: np.linalg.norm(updates, axis=(1, 2))
    np.testing.assert_allclose(norms(normuon), norms(muon))
    # After one step every output neuron has moved as far; MOVING is (d_in, d_out).
    of_neurons = np.linalg.norm(normuon[0], axis=0)
    np.testing.assert_allclose(of_neurons, of_neurons[0], rtol=1e-6)
    ratio = normuon[0] / muon[0]
    np.testing.assert_allclose(ratio, ratio[:1].repeat(5, axis=0))


def test_normuon_second_step_by_hand():
    still = NorMuon(b1=0.0, b2=0.5, eps=0.0, nesterov=False, coefficients=[(1.0, 0.0, 0.0)])
    first, second = np.array([[3.0, 4.0]]) / 5, np.array([[4.0, 3.0]]) / 5
    still.update(first)
    # v = (9/4 + 16/2, 16/4 + 9/2) / 25.
    want = second / np.sqrt([10.25, 8.5])
    np.testing.assert_allclose(still.update(second), want / np.linalg.norm(want), rtol=1e-6)


def test_hyperball_by_hand():
    ball = Hyperball(Adam(eps=0.0), np.array([[3.0, 4.0]]), [0.5])
    # The update (1, -1) gets the norm 5; half of it is taken, and (1.232, 5.768) the norm 5 again.
    moved = np.array([[3.0, 4.0]]) - 0.5 * 5 * np.array([[1.0, -1.0]]) / np.sqrt(2)
    got = ball.update(np.array([[0.1, -7.0]]))
    np.testing.assert_allclose(got, 5 * moved / np.linalg.norm(moved))


def test_graft_has_the_magnitude_of_one_and_the_direction_of_the_other():
    u = Graft(Adam(), Shampoo(block_size=2)).update(MOVING[0])
    direction = Shampoo(block_size=2).update(MOVING[0])
    assert np.linalg.norm(u) == pytest.approx(np.linalg.norm(Adam().update(MOVING[0])))
    np.testing.assert_allclose(u / np.linalg.norm(u), direction / np.linalg.norm(direction))


def test_graft_epsilon_by_hand():
    one = np.ones((1, 1))
    graft = Graft(Adam(eps=0.0), Muon(coefficients=[(1.0, 0.0, 0.0)], eps=0.0), eps=1.0)
    assert graft.update(one)[0, 0] == pytest.approx(0.5)


def test_adamuon_divides_by_what_muon_usually_gives():
    # The same gradient again and again: O does not move, and O/|O| is its sign.
    ada = run(AdaMuon(eps=0.0), [MOVING[0]] * 3)
    np.testing.assert_allclose(ada[-1], np.sign(Muon().update(MOVING[0])))
    # And the first update is a sign in any case.
    np.testing.assert_allclose(ada[0], ada[-1])


def test_adamuon_second_step_by_hand():
    still = AdaMuon(b2=0.5, eps=0.0, nesterov=False, coefficients=[(2.0, 0.0, 0.0)])
    still.update(np.array([[1.0]]))
    # O = 2 both times but for its sign: V̂ = 4.
    assert still.update(np.array([[-100.0]]))[0, 0] == pytest.approx(-1.0)


def test_spectral_norm_of_a_still_direction():
    V = np.linalg.svd(MOVING[0].T)[2]
    normalized = SpectralNorm(Muon(coefficients=[(1.0, 0.0, 0.0)]), V.mean(axis=0), [30])
    u = normalized.update(MOVING[0])
    assert np.linalg.norm(u, 2) == pytest.approx(np.sqrt(3 / 5))
    np.testing.assert_allclose(u / np.linalg.norm(u), MOVING[0] / np.linalg.norm(MOVING[0]))
    np.testing.assert_allclose(np.abs(normalized.v @ V[0]), 1)


def test_sophia_clips_and_divides():
    sophia = SophiaG(b1=0.5, b2=0.5, gamma=2.0, eps=1.0)
    G = np.array([4.0, -4.0, 0.5])
    # m = G/2 and γh = (1, 20, 0): divided by (1, 20, 1).
    estimate = np.array([1.0, 20.0, 0.0])
    np.testing.assert_allclose(sophia.update(G, estimate), [1.0, -0.1, 0.25])
    # Without a new estimate only the momentum moves.
    np.testing.assert_allclose(sophia.update(G), [1.0, -0.15, 0.375])


def test_bartlett_estimate_is_the_gauss_newton_diagonal_on_average():
    # One position, two labels: the average over both, by their probabilities.
    x, W = np.array([[1.0, -2.0]]), np.array([[0.3, 0.0], [0.1, 0.5]])
    p = np.exp(x @ W)[0] / np.exp(x @ W).sum()
    mean = sum(p[y] * bartlett_estimate(x, W, np.array([y])) for y in range(2))
    np.testing.assert_allclose(mean, gauss_newton_diagonal(x, W))
