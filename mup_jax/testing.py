"""What should hold for every Optax transformation of matrices, checked on any.

Needs no framework of tests: call `check_transformation` in one of your own.
"""

import math
from collections.abc import Callable, Collection
from functools import cached_property
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType
from optax.contrib import MuonDimensionNumbers

# Leaves by name.
Tree: TypeAlias = dict[str, Any]
Make: TypeAlias = Callable[[Any], optax.GradientTransformation]

# Of the gradients of each step: enough steps for momentum, refreshes, and what comes after harm.
_SIZES = (1.0, 2.0, 0.5, 1.5)
_STEPS = len(_SIZES)


class _Property(NamedTuple):
    check: Callable[["_Subject"], None]
    says: str
    usually: str  # wrong where it does not hold
    by_default: bool


_PROPERTIES: dict[str, _Property] = {}


def _property(usually: str, *, by_default: bool = True) -> Callable[[Any], Any]:
    """Makes a property of a check, which is named as it and says what its docstring says."""

    def register(check: Callable[["_Subject"], None]) -> Callable[["_Subject"], None]:
        name = check.__name__.removeprefix("_")
        says = (check.__doc__ or "").removesuffix(".")
        _PROPERTIES[name] = _Property(check, says, usually, by_default)
        return check

    return register


class _NotApplicable(Exception):
    """A property says nothing of this transformation, or on this machine."""


class _Subject:
    """A transformation, and gradients for it; most checks share one compiled program."""

    def __init__(
        self,
        transformation: optax.GradientTransformation | Make,
        shape: tuple[int, int],
        tolerance: float,
    ):
        self.make = transformation if callable(transformation) else None
        self.transformation: Any = self.make(None) if self.make else transformation
        self.compiled = _jitted(self.transformation)
        self.tolerance = tolerance
        self.shapes = {"a": shape, "b": shape, "wide": (shape[0], 2 * shape[1])}
        self.params, *self.gradients = self.draw(seed=0)

    def draw(self, seed: int) -> list[Tree]:
        """Parameters, and gradients for `_STEPS` steps.

        Their singular values are between 1 and 3 before noise and apart from each other: what
        rounding can turn, such as the eigenvectors of a multiple of the identity, says nothing.
        """
        rng = np.random.default_rng(seed)

        def matrix(shape: tuple[int, int]) -> np.ndarray:
            u, s, v = np.linalg.svd(rng.normal(size=shape), full_matrices=False)
            return u * np.linspace(3, 1, len(s)) @ v

        mean = {name: matrix(shape) for name, shape in self.shapes.items()}
        near = lambda size: {
            name: np.float32(size * (x + 0.1 * matrix(x.shape))) for name, x in mean.items()
        }
        return [near(size) for size in (1.0, *_SIZES)]

    def run(
        self,
        gradients: list[Tree],
        transformation: Any = None,
        params: Tree | None = None,
    ) -> list[Tree]:
        """The updates of all steps, by this transformation or by one made of it."""
        transformation = transformation or self.compiled
        params = self.params if params is None else params
        state = transformation.init(params)
        updates = []
        for gradient in gradients:
            update, state = transformation.update(gradient, state, params)
            updates.append(update)
        return updates

    @cached_property
    def want(self) -> list[Tree]:
        return self.run(self.gradients)

    def expect(self, got: list[Tree], want: list[Tree], tolerance: float | None = None) -> None:
        """Asserts that updates are alike: at every step, in terms of the largest of a leaf."""
        tolerance = self.tolerance if tolerance is None else tolerance
        for name in want[0]:
            a, b = (np.stack([np.asarray(u[name], np.float64) for u in run]) for run in (got, want))
            norms = _norms(b)
            errors = _norms(a - b) / (norms.max() or 1.0)
            for step, error in enumerate(errors, start=1):
                assert error <= tolerance, (
                    f"the update of {name!r} at step {step} is off by {error:.2g} of its norm, "
                    f"where {tolerance:.2g} is allowed"
                )


def _jitted(transformation: Any) -> Any:
    update = jax.jit(transformation.update)
    return optax.GradientTransformationExtraArgs(transformation.init, update)


def _norms(x: np.ndarray) -> np.ndarray:
    return np.sqrt(np.sum(np.square(x), axis=tuple(range(1, x.ndim))))


def _described(tree: Any) -> Any:
    return jax.tree.map(lambda x: f"{x.dtype}{list(x.shape)}", tree)


def _expect_types(got: Any, want: Any, of: str) -> None:
    """Asserts that two trees have the structure, shapes and dtypes in common."""
    a, b = (jax.tree.leaves_with_path(_described(tree)) for tree in (got, want))
    for (path, x), (other, y) in zip(a, b, strict=False):
        assert (path, x) == (other, y), (
            f"{of}: {x} at {jax.tree_util.keystr(path)} in place of "
            f"{y} at {jax.tree_util.keystr(other)}"
        )
    structure, expected = (str(jax.tree.structure(tree)) for tree in (got, want))
    assert structure == expected, f"{of}: {structure} in place of {expected}"


def _expect_finite(updates: list[Tree], when: str) -> None:
    for step, update in enumerate(updates, start=1):
        for name, x in update.items():
            number = np.sum(~np.isfinite(np.asarray(x, np.float64)))
            assert number == 0, (
                f"{when}, {number} of {x.size} entries of the update of {name!r} at step {step} "
                "are not finite"
            )


def _expect_alive(updates: list[Tree], when: str) -> None:
    for name, x in updates[-1].items():
        assert np.any(x), f"{when}, the update of {name!r} is still zero at step {len(updates)}"


# Types and programs


@_property("a float32 constant that promotes bfloat16, or a cast left out")
def _types(subject: _Subject) -> None:
    """Updates have the shapes and dtypes of gradients, and a state keeps its own."""
    update = subject.transformation.update
    for dtype in (jnp.float32, jnp.bfloat16):
        tree = jax.tree.map(lambda x, dtype=dtype: x.astype(dtype), subject.params)
        state = jax.eval_shape(subject.transformation.init, tree)
        for step in (1, 2):
            updates, new = jax.eval_shape(update, tree, state, tree)
            _expect_types(updates, tree, f"updates of {dtype.__name__} gradients")
            _expect_types(new, state, f"the state after step {step} in {dtype.__name__}")


@_property("a product, root or average taken in bfloat16 rather than in float32")
def _bfloat16(subject: _Subject) -> None:
    """Updates of bfloat16 gradients are near those of the same numbers in float32."""
    rounded = jax.tree.map(lambda x: x.astype(jnp.bfloat16), subject.gradients)
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), subject.params)
    want = subject.run(jax.tree.map(np.float32, rounded))
    subject.expect(subject.run(rounded, params=params), want, 10 * subject.tolerance)


@_property("Python that looks at values, or that remembers something from call to call")
def _jit(subject: _Subject) -> None:
    """Updates without jit are those with it."""
    subject.expect(subject.run(subject.gradients[:2], subject.transformation), subject.want[:2])


@_property("a state that depends on the values of parameters, or has numbers of Python in it")
def _abstract_init(subject: _Subject) -> None:
    """`jax.eval_shape` of init gives the structure, shapes and dtypes of a state."""
    init = subject.transformation.init
    _expect_types(jax.eval_shape(init, subject.params), init(subject.params), "the state")


@_property("`update(updates, state, params)` without `**extra_args`, under the type that has them")
def _extra_args(subject: _Subject) -> None:
    """What is a `GradientTransformationExtraArgs` takes arguments that it does not know."""
    transformation = optax.with_extra_args_support(subject.transformation)
    state = jax.eval_shape(transformation.init, subject.params)
    update = lambda g, state, p: transformation.update(g, state, p, value=jnp.zeros(()))
    jax.eval_shape(update, subject.params, state, subject.params)


@_property("something kept outside of the arrays of the state")
def _checkpoint(subject: _Subject) -> None:
    """A state goes on from its leaves as NumPy arrays, in the structure of a new one."""
    is_key = lambda x: jnp.issubdtype(jnp.result_type(x), jax.dtypes.prng_key)

    def update(gradient: Tree, state: Any, params: Tree) -> tuple[Tree, Any]:
        new = jax.tree.structure(subject.transformation.init(params))
        saved = [x if is_key(x) else np.asarray(x) for x in jax.tree.leaves(state)]
        return subject.compiled.update(gradient, jax.tree.unflatten(new, saved), params)

    restoring = subject.compiled._replace(update=update)
    subject.expect(subject.run(subject.gradients, restoring), subject.want)


# Leaves and stacks


@_property("a norm, mean or product over all axes rather than over those of a matrix")
def _stack(subject: _Subject) -> None:
    """A stack of matrices gets what its matrices get as leaves of their own."""
    if subject.make is None:
        raise _NotApplicable
    stacked = lambda tree: {"stack": np.stack([tree["a"], tree["b"]])}
    got = subject.run(
        [stacked(gradient) for gradient in subject.gradients],
        subject.make(MuonDimensionNumbers(-2, -1)),
        stacked(subject.params),
    )
    subject.expect(got, [stacked(update) for update in subject.want])


@_property("a norm over all leaves, or leaves of one shape that share a statistic")
def _independence(subject: _Subject) -> None:
    """The updates of a leaf do not depend on the other leaves."""
    others, *gradients = subject.draw(seed=1)
    only_a = lambda own, others: {name: 3 * x for name, x in others.items()} | {"a": own["a"]}
    got = subject.run(
        list(map(only_a, subject.gradients, gradients)), params=only_a(subject.params, others)
    )
    subject.expect([{"a": u["a"]} for u in got], [{"a": u["a"]} for u in subject.want])


@_property("leaves and states paired by position, or refreshes that take turns by position")
def _order(subject: _Subject) -> None:
    """The order of leaves changes nothing."""
    renamed = {"a": "wide", "b": "b", "wide": "a"}
    rename = lambda tree: {new: tree[old] for new, old in renamed.items()}
    got = subject.run(list(map(rename, subject.gradients)), params=rename(subject.params))
    subject.expect(got, list(map(rename, subject.want)))


# Gradients that say little, or nothing


@_property("0 / 0: an ε left out; or weight decay, which is then to be left out of the check")
def _zero(subject: _Subject) -> None:
    """Gradients of zeros give updates of zeros."""
    updates = subject.run([jax.tree.map(np.zeros_like, subject.params)] * _STEPS)
    _expect_finite(updates, "from gradients of zeros")
    for step, update in enumerate(updates, start=1):
        for name, x in update.items():
            assert not np.any(x), f"the update of {name!r} at step {step} is not zero"


@_property("a preconditioner made of the first gradient alone, whatever it is")
def _first_zero(subject: _Subject) -> None:
    """Training may begin with gradients of zeros, which most hidden matrices get."""
    first, *others = subject.gradients
    updates = subject.run([jax.tree.map(np.zeros_like, first), *others])
    when = "after a first gradient of zeros"
    _expect_finite(updates, when)
    _expect_alive(updates, when)


@_property("an inverse of a singular matrix: an ε left out, or one below its rounding errors")
def _rank_one(subject: _Subject) -> None:
    """Gradients of rank one, the same at every step, give finite updates."""
    gradient = {name: x[:, :1] * x[:1] for name, x in subject.params.items()}
    updates = subject.run([gradient] * _STEPS)
    _expect_finite(updates, "from gradients of rank one")
    _expect_alive(updates, "from gradients of rank one")


@_property("an average that takes in what overflows or is no number, and does not forget it")
def _nonfinite(subject: _Subject) -> None:
    """A NaN, an infinity or a factor of 1e±20 harms its matrix for a step, and no other."""
    entry = np.zeros_like(subject.params["a"])
    entry[0, 0] = 1
    with np.errstate(invalid="ignore"):
        factors = {
            "a NaN": np.where(entry, np.nan, 1),
            "an infinity": np.where(entry, np.inf, 1),
            "a gradient times 1e20": np.full_like(entry, 1e20),
            "a gradient times 1e-20": np.full_like(entry, 1e-20),
        }
    rest = lambda run: [{name: u[name] for name in u if name != "a"} for u in run]
    for what, factor in factors.items():
        for step in (1, 2):
            gradients = list(subject.gradients)
            bad = np.float32(gradients[step - 1]["a"] * factor)
            gradients[step - 1] = {**gradients[step - 1], "a": bad}
            when = f"with {what} for 'a' at step {step}"
            updates = subject.run(gradients)
            _expect_finite(updates, when)
            _expect_alive(updates, when)
            try:
                subject.expect(rest(updates), rest(subject.want))
            except AssertionError as error:
                raise AssertionError(f"{when}, {error}") from None


# Inside transformations of Optax and of JAX


def _with_gain(tree: Tree) -> Tree:
    return {**tree, "gain": np.array([2, -3], np.float32)}


def _expect_routed(subject: _Subject, routed: Any) -> None:
    """Asserts that matrices are updated as they are alone, and that the vector passes."""
    gradients = list(map(_with_gain, subject.gradients))
    got = subject.run(gradients, _jitted(routed), _with_gain(subject.params))
    subject.expect(got, list(map(_with_gain, subject.want)))


@_property("something that Python keeps from call to call")
def _chain(subject: _Subject) -> None:
    """`optax.chain` composes it."""
    chained = optax.chain(optax.identity(), subject.transformation, optax.scale(-0.5))
    got = subject.run(subject.gradients, _jitted(chained))
    subject.expect(got, jax.tree.map(lambda x: -0.5 * x, subject.want))


@_property("leaves that are found by name or position, where `optax.MaskedNode`s are in between")
def _masked(subject: _Subject) -> None:
    """`optax.masked` keeps other leaves from it."""
    is_matrix = lambda tree: {name: x.ndim == 2 for name, x in tree.items()}
    _expect_routed(subject, optax.masked(subject.transformation, is_matrix))


@_property("leaves that are found by name or position, where `optax.MaskedNode`s are in between")
def _partition(subject: _Subject) -> None:
    """`optax.partition` gives it the matrices, and others to another."""
    kinds = {"matrix": subject.transformation, "other": optax.identity()}
    label = lambda tree: {name: "matrix" if x.ndim == 2 else "other" for name, x in tree.items()}
    _expect_routed(subject, optax.partition(kinds, label))


@_property("a state whose structure or shapes change, or in which are no plain arrays")
def _multi_steps(subject: _Subject) -> None:
    """`optax.MultiSteps` gives it the means of two gradients."""
    noise = subject.draw(seed=1)[0]
    pairs = [
        jax.tree.map(lambda x, n, sign=sign: x + sign * n, gradient, noise)
        for gradient in subject.gradients
        for sign in (1, -1)
    ]
    got = subject.run(pairs, _jitted(optax.MultiSteps(subject.transformation, 2)))
    subject.expect(got[1::2], subject.want)


@_property("something that Python keeps from call to call, or a state that is no tree of arrays")
def _inject_hyperparams(subject: _Subject) -> None:
    """`optax.inject_hyperparams` gives it a learning rate that can be set in the state."""
    make = lambda rate: optax.chain(subject.transformation, optax.scale_by_learning_rate(rate))
    injected = optax.inject_hyperparams(make)(rate=0.5)
    got = subject.run(subject.gradients, _jitted(injected))
    subject.expect(got, jax.tree.map(lambda x: -0.5 * x, subject.want))


@_property("a state whose structure, shapes or dtypes change, or Python that counts steps")
def _scan(subject: _Subject) -> None:
    """`jax.lax.scan` takes all steps in one program."""

    def step(state: Any, gradient: Tree) -> tuple[Any, Tree]:
        updates, state = subject.transformation.update(gradient, state, subject.params)
        return state, updates

    state = subject.transformation.init(subject.params)
    stacked = jax.tree.map(lambda *x: np.stack(x), *subject.gradients)
    _, updates = jax.jit(lambda state, stacked: jax.lax.scan(step, state, stacked))(state, stacked)
    got = [jax.tree.map(lambda x, i=i: x[i], updates) for i in range(_STEPS)]
    subject.expect(got, subject.want)


@_property("a callback, or a branch by value, for which no batching is defined")
def _vmap(subject: _Subject) -> None:
    """`jax.vmap` over init and update gives each member of a batch what it gets alone."""
    params, *gradients = subject.draw(seed=1)
    batch = lambda *trees: jax.tree.map(lambda *x: np.stack(x), *trees)
    batched = optax.GradientTransformationExtraArgs(
        jax.vmap(subject.transformation.init), jax.jit(jax.vmap(subject.transformation.update))
    )
    both = list(map(batch, subject.gradients, gradients))
    got = subject.run(both, batched, batch(subject.params, params))
    for i, want in enumerate([subject.want, subject.run(gradients, params=params)]):
        subject.expect([jax.tree.map(lambda x, i=i: x[i], u) for u in got], want)


@_property("a norm or product of each device's part alone, or an operation whose sharding is open")
def _sharding(subject: _Subject) -> None:
    """Updates of matrices on a mesh are those of one device, on explicit and automatic axes."""
    devices = jax.local_devices()
    number = math.gcd(len(devices), *subject.shapes["a"])
    if number == 1:
        raise _NotApplicable
    specs = {"a": jax.P("data", None), "b": jax.P(None, "data"), "wide": jax.P()}
    for axis_type in (AxisType.Explicit, AxisType.Auto):
        axes = {"axis_types": (axis_type,), "devices": devices[:number]}
        mesh = jax.make_mesh((number,), ("data",), **axes)
        put = lambda tree, mesh=mesh: {
            name: jax.device_put(x, jax.NamedSharding(mesh, specs[name]))
            for name, x in tree.items()
        }
        jitted = _jitted(subject.transformation)._replace(init=jax.jit(subject.transformation.init))
        with jax.set_mesh(mesh):
            got = subject.run(list(map(put, subject.gradients)), jitted, put(subject.params))
        try:
            subject.expect(got, subject.want)
        except AssertionError as error:
            raise AssertionError(f"on {number} devices, {axis_type.name}: {error}") from None


# Symmetries that only some have


@_property("an operation on single entries, or on blocks smaller than the matrix", by_default=False)
def _rotation(subject: _Subject) -> None:
    """Gradients U G Vᵀ give updates U u Vᵀ, for orthogonal U and V."""
    rng = np.random.default_rng(2)
    orthogonal = lambda n: np.linalg.qr(rng.normal(size=(n, n)))[0]
    sides = {name: tuple(map(orthogonal, shape)) for name, shape in subject.shapes.items()}
    rotate = lambda tree: {n: np.float32(u @ tree[n] @ v.T) for n, (u, v) in sides.items()}
    got = subject.run(list(map(rotate, subject.gradients)), params=rotate(subject.params))
    subject.expect(got, list(map(rotate, subject.want)))


@_property("an operation on one side only, or a factor of the shape", by_default=False)
def _transposition(subject: _Subject) -> None:
    """Transposed gradients give transposed updates."""
    transpose = lambda tree: jax.tree.map(np.transpose, tree)
    got = subject.run(list(map(transpose, subject.gradients)), params=transpose(subject.params))
    subject.expect(got, list(map(transpose, subject.want)))


# Last, as what is donated by mistake is gone


@_property("one array twice in the first state, or one that is not the state's own")
def _donation(subject: _Subject) -> None:
    """A state can be donated to the update from the first one on, and another one be made."""
    params = jax.tree.map(jnp.array, subject.params)
    update = jax.jit(subject.transformation.update, donate_argnums=1)
    donating = subject.compiled._replace(update=update)
    for _ in range(2):
        subject.expect(subject.run(subject.gradients, donating, params), subject.want)
        assert not any(x.is_deleted() for x in params.values()), "the parameters were donated too"


PROPERTIES = {name: p.says for name, p in _PROPERTIES.items()}


def check_transformation(
    transformation: optax.GradientTransformation | Make,
    *,
    skip: Collection[str] = (),
    also: Collection[str] = (),
    only: Collection[str] | None = None,
    shape: tuple[int, int] = (8, 8),
    tolerance: float = 1e-2,
) -> tuple[str, ...]:
    """Checks that an Optax transformation of matrices does what people will do with it.

    It is run for a few steps on a tree of three small matrices, in many ways whose results should
    be alike. `PROPERTIES` has all that is checked, by name.

    Of the transformations of Optax few have every property: those that work entry by entry are
    never well again after a NaN ("nonfinite"), and those that clip by a norm of all leaves have no
    "independence". Where refreshes take turns, as those of `scale_by_blocks` do, a matrix has
    another turn in another place: check it with `stagger=False`.

    Args:
      transformation: ready, or a function `weight_dimension_numbers -> transformation`. Of a ready
        one "stack" is not checked: nothing says which axes of a stack are those of the matrices.
      skip: names of properties that are not to be checked.
      also: names of properties that are checked on demand: "rotation" and "transposition".
      only: if given, the names of all properties that are to be checked, but for `skip`.
      shape: `(d_in, d_out)` of two of the matrices; the third is twice as wide. A few gradients of
        a longer matrix leave eigenvectors that rounding chooses, which SOAP's updates depend on.
      tolerance: largest difference of two updates that should be alike, in Frobenius norm and
        relative to the largest update of the leaf; of bfloat16 gradients ten times that.

    Returns:
      The names of the properties that were checked. Without another device, "sharding" is not.

    Raises:
      AssertionError: at least one property does not hold. The message says of each what was found,
        and what is usually wrong.
      ValueError: there is no property of a given name.

    Example:
      >>> import mup_jax
      >>> import optax
      >>> checked = mup_jax.testing.check_transformation(
      ...     lambda numbers: mup_jax.scale_by_muon(weight_dimension_numbers=numbers),
      ...     also=["rotation", "transposition"],
      ... )
      >>> checked = mup_jax.testing.check_transformation(
      ...     optax.scale_by_adam(), skip=["nonfinite"]
      ... )
    """
    if unknown := {*skip, *also, *(only or ())} - set(_PROPERTIES):
        raise ValueError(f"no property {min(unknown)!r}: choose from {', '.join(_PROPERTIES)}")
    default = [name for name, p in _PROPERTIES.items() if p.by_default]
    chosen = {*(default if only is None else only), *also} - set(skip)
    subject = _Subject(transformation, shape, tolerance)
    try:
        _expect_finite(subject.want, "from ordinary gradients")
    except Exception as error:
        raise AssertionError(
            f"nothing can be checked, as jitted updates of matrices of shapes "
            f"{', '.join(map(str, subject.shapes.values()))} fail: {_in_one_line(error)}"
        ) from error
    checked, failures = [], []
    for name, prop in _PROPERTIES.items():
        if name not in chosen:
            continue
        try:
            prop.check(subject)
        except _NotApplicable:
            continue
        except Exception as error:
            found = _in_one_line(error)
            failures.append(f"{name}: {prop.says}.\n  Found: {found}.\n  Usually: {prop.usually}.")
        checked.append(name)
    if failures:
        raise AssertionError(
            f"{len(failures)} of {len(checked)} properties do not hold\n" + "\n".join(failures)
        )
    return tuple(checked)


def _in_one_line(error: Exception) -> str:
    line = str(error).strip().split("\n")[0].removesuffix(".")
    return line if isinstance(error, AssertionError) else f"{type(error).__name__}: {line}"
