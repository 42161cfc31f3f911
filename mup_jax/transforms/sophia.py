"""Sophia-G: momentum over a diagonal of the Gauss-Newton matrix, clipped."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from mup_jax.transforms.matrices import PyTree
from mup_jax.transforms.options import check_decays, check_positive

Logits = Callable[[PyTree], jax.Array]


class ScaleBySophiaGState(NamedTuple):
    """State of `scale_by_sophia_g`."""

    count: jax.Array  # type: ignore[assignment]  # int32: steps so far
    mu: Any  # float32: momentum
    h: Any  # float32: estimates of the Gauss-Newton diagonal, averaged
    nonfinite: jax.Array  # int32: leaves of gradients and of estimates skipped so far


def _gauss_newton_bartlett(
    logits_fn: Logits, params: PyTree, key: jax.Array, mask: jax.Array | None
) -> PyTree:
    """B·ĝ², where ĝ is the gradient of the mean loss against labels that the model has drawn."""
    logits, pull_back = jax.vjp(logits_fn, params)
    scores = logits.astype(jnp.float32)
    # As sharded as the logits: replicated noise would be the largest array of the step.
    noise = jax.random.gumbel(key, scores.shape, out_sharding=jax.typeof(scores).sharding)
    labels = jnp.argmax(scores + noise, axis=-1)
    error = jax.nn.softmax(scores) - jax.nn.one_hot(labels, scores.shape[-1])
    counted = jnp.ones_like(labels, bool) if mask is None else mask != 0
    b = jnp.sum(counted, dtype=jnp.float32)
    # Without a position that counts this is 0/0, and the estimate is skipped as any other of those.
    error = jnp.where(counted[..., None], error, 0.0) / b
    (gradient,) = pull_back(error.astype(logits.dtype))
    return jax.tree.map(lambda g: b * jnp.square(g.astype(jnp.float32)), gradient)


def _averaged(old: PyTree, new: PyTree, decay: float) -> tuple[PyTree, jax.Array]:
    """The moving average, leaf by leaf where `new` is finite, and the number of other leaves."""
    finite = jax.tree.map(lambda x: jnp.isfinite(x).all(), new)
    average = jax.tree.map(
        lambda ok, a, b: jnp.where(ok, decay * a + (1 - decay) * b.astype(jnp.float32), a),
        finite,
        old,
        new,
    )
    skipped = sum((~ok for ok in jax.tree.leaves(finite)), jnp.zeros((), jnp.int32))
    return average, skipped


def scale_by_sophia_g(
    b1: float = 0.96,
    b2: float = 0.99,
    gamma: float = 0.05,
    eps: float = 1e-12,
    *,
    update_interval: int = 10,
    seed: int = 0,
) -> optax.GradientTransformationExtraArgs:
    r"""Divides the momentum by a Gauss-Newton diagonal and clips to ±1 (Sophia-G).

    .. math::
      m \leftarrow \beta_1 m + (1 - \beta_1) g, \quad
      h \leftarrow \beta_2 h + (1 - \beta_2) B \hat g^2 \text{ every k steps}, \quad
      u = \operatorname{clip}(m / \max(\gamma h, \epsilon), \pm 1)

    ĝ is the gradient of the mean cross-entropy of the B positions of the batch against labels drawn
    from the model's own softmax; the expectation of B·ĝ² is the diagonal of the Gauss-Newton matrix
    of the mean loss (Bartlett's second identity). Neither average is corrected for its bias, as in
    the paper. A leaf whose gradient, or whose estimate, is not finite keeps its average.

    `update` needs the parameters and, as extra arguments,

    - `logits_fn`: the function of the parameters that gives the logits `(..., vocabulary)` of the
      batch. It is called at every k-th step; a mask around the transformation (`optax.partition`,
      `optax.masked`) would hide parameters from it.
    - `mask`, optional: `(...)`, zero for positions that do not count, such as padding.

    Args:
      b1: decay of the momentum.
      b2: decay of h, once in `update_interval` steps.
      gamma: γ, the larger the fewer entries are clipped.
      eps: ε, in units of the gradient, above 0.
      update_interval: k, in steps.
      seed: of the labels; those of step t, from 0, are drawn with `fold_in(key(seed), t)`.

    Returns:
      A transformation of gradients of any shapes into updates of the same shapes and dtypes.

    Raises:
      ValueError: update_interval < 1; at `update`, parameters or `logits_fn` are missing.

    Example:
      >>> x, labels, params = jnp.eye(6, 4), jnp.arange(6) % 5, {"w": jnp.ones((4, 5))}
      >>> logits_fn = lambda params: x @ params["w"]
      >>> cross_entropy = optax.softmax_cross_entropy_with_integer_labels
      >>> loss = lambda params: cross_entropy(logits_fn(params), labels).mean()
      >>> tx = mup_jax.scale_by_sophia_g()
      >>> gradient, state = jax.grad(loss)(params), tx.init(params)
      >>> updates, state = tx.update(gradient, state, params, logits_fn=logits_fn)

    References:
      Liu et al., `Sophia <https://arxiv.org/abs/2305.14342>`_, 2023, algorithms 2 and 3.
    """
    check_decays(b1=b1, b2=b2)
    check_positive(gamma=gamma, eps=eps)
    if update_interval < 1:
        raise ValueError(f"update_interval={update_interval}: give a positive number of steps")

    def init(params: optax.Params) -> ScaleBySophiaGState:
        zeros = lambda: optax.tree.zeros_like(params, dtype=jnp.float32)
        zero = lambda: jnp.zeros((), jnp.int32)
        return ScaleBySophiaGState(count=zero(), mu=zeros(), h=zeros(), nonfinite=zero())

    def update(
        updates: optax.Updates,
        state: ScaleBySophiaGState,
        params: Any = None,
        *,
        logits_fn: Logits | None = None,
        mask: jax.Array | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, ScaleBySophiaGState]:
        del extra_args
        if params is None or logits_fn is None:
            raise ValueError(
                "Sophia-G draws labels from the model: "
                "update(gradients, state, params, logits_fn=lambda params: logits of the batch)"
            )

        def refresh(h: PyTree) -> tuple[PyTree, jax.Array]:
            key = jax.random.fold_in(jax.random.key(seed), state.count)
            return _averaged(h, _gauss_newton_bartlett(logits_fn, params, key, mask), b2)

        mu, bad_gradients = _averaged(state.mu, updates, b1)
        h, bad_estimates = jax.lax.cond(
            state.count % update_interval == 0,
            refresh,
            lambda h: (h, jnp.zeros((), jnp.int32)),
            state.h,
        )
        clipped = jax.tree.map(
            lambda m, d, g: jnp.clip(m / jnp.maximum(gamma * d, eps), -1.0, 1.0).astype(g.dtype),
            mu,
            h,
            updates,
        )
        skipped = state.nonfinite + bad_gradients + bad_estimates
        return clipped, ScaleBySophiaGState(optax.safe_increment(state.count), mu, h, skipped)

    return optax.GradientTransformationExtraArgs(init, update)
