"""An optimizer of the user's own: a direction from a Python file, made whole as `muon` is.

`my_optimizer.py:make` names the function `make` of a file. It returns a direction for hidden
matrices, positive and without a learning rate as any `scale_by_*`, or a pair of one and its
`mup_jax.Rule`; without a rule, that is measured. Where `make` has an argument
`weight_dimension_numbers`, its direction gets stacks of matrices and is told so; where it has none,
it gets one matrix `(d_in, d_out)` after the other, and need not know of stacks and meshes.

The text of the file is all that is kept of it, so that it goes wherever a configuration goes.
"""

import functools
import hashlib
import inspect
import json
import re
import sys
import traceback
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, get_type_hints

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from optax.contrib import MuonDimensionNumbers

from mup_jax.optimizers.assembly import EPSILONS
from mup_jax.optimizers.matrix import matrix_optimizer, measure_rule
from mup_jax.transfer.derive import LAYERS, DerivedRule
from mup_jax.transfer.rules import Rule
from mup_jax.transforms.matrices import PyTree, WeightDimensionNumbers, matrix_layouts

_NUMBERS = "weight_dimension_numbers"
_STACKED = MuonDimensionNumbers(-2, -1)
_WHOLE = {
    name: parameter
    for name, parameter in inspect.signature(matrix_optimizer).parameters.items()
    if name not in ("direction", "rule")
}


def is_file(name: str) -> bool:
    """Whether an optimizer's name is that of a function in a file."""
    return ".py" in name


def _split(name: str) -> tuple[Path, str]:
    path, _, function = name.rpartition(":")
    if not (path.endswith(".py") and function.isidentifier()):
        raise ValueError(
            f"optimizer {name!r}: give FILE.py:FUNCTION, for example my_optimizer.py:make"
        )
    return Path(path), function


def read_file(name: str) -> tuple[str, str]:
    """The name without its folder, and the text of the file.

    Raises:
      ValueError: no such file, or no such name.
    """
    path, function = _split(name)
    if not path.is_file():
        raise ValueError(
            f"optimizer {name!r}: there is no file {path.absolute()}, give its path from the "
            "working directory, or the whole path"
        )
    return f"{path.name}:{function}", path.read_text()


def label_of(name: str) -> str:
    """What tables and figures call an optimizer: that of my_optimizer.py:make is my_optimizer.

    Of another function than `make` the name follows that of the file.
    """
    if not is_file(name):
        return name
    path, function = _split(name)
    return re.sub(r"\W", "_", path.stem) + ("" if function == "make" else f"_{function}")


@functools.cache  # a rule is measured once
def from_source(name: str, source: str) -> "FileOptimizer":
    """The optimizer of this name, of `read_file`, in a file with this text."""
    return FileOptimizer(name, source)


class FileOptimizer:
    """Called as the ready-made optimizers are; its options are those of the file's function too.

    Args:
      name: of `read_file`.
      source: likewise.

    Raises:
      ValueError: the file cannot be run, or has no such function.
    """

    def __init__(self, name: str, source: str):
        self.name = name
        self._make = self._load(name, source)
        own = inspect.signature(self._make).parameters
        self._is_told = _NUMBERS in own
        taken = [key for key in own if key in _WHOLE and key != _NUMBERS]
        if taken:
            raise ValueError(
                f"{name} has the argument {taken[0]}, which is one of the whole optimizer: leave "
                "it out, or give it another name"
            )
        any_option = [p for p in own.values() if p.kind is p.VAR_KEYWORD]
        named = [p for p in own.values() if p.name != _NUMBERS and p not in any_option]
        options = [p.replace(kind=p.KEYWORD_ONLY) for p in named]
        self._epsilons = {p.name for p in named if p.name in EPSILONS and p.default is not p.empty}
        rate, *common = _WHOLE.values()
        self.__signature__ = inspect.Signature([rate, *options, *common, *any_option])
        # Those of the file that are text may be of names that only a type checker imports.
        plain = {k: v for k, v in self._make.__annotations__.items() if not isinstance(v, str)}
        self.__annotations__ = get_type_hints(matrix_optimizer) | plain
        self._examined: dict[str, DerivedRule | Rule] = {}

    @staticmethod
    def _load(name: str, source: str) -> Callable[..., Any]:
        file, function = name.rsplit(":", 1)
        module = types.ModuleType(f"optimizer_{hashlib.sha256(source.encode()).hexdigest()[:12]}")
        sys.modules[module.__name__] = module  # dataclasses look themselves up there
        try:
            exec(compile(source, file, "exec"), vars(module))
        except Exception as error:
            raise ValueError(_place(error, file)) from error
        found = getattr(module, function, None)
        if not callable(found):
            known = [key for key, value in vars(module).items() if inspect.isfunction(value)]
            raise ValueError(
                f"{file} has no function {function!r}: it has {', '.join(known) or 'none'}"
            )
        return found

    def __call__(
        self, learning_rate: Any, **arguments: Any
    ) -> optax.GradientTransformationExtraArgs:
        common = {key: arguments.pop(key) for key in _WHOLE if key in arguments}
        rule = self.rule(arguments)
        if isinstance(rule, DerivedRule):
            rule = rule.rule
        direction = self._direction(arguments, common.setdefault(_NUMBERS, _STACKED))[0]
        return matrix_optimizer(learning_rate, direction, rule, **common)

    def rule(self, options: dict[str, Any]) -> DerivedRule | Rule:
        """The rule with these options, or what was measured where the file gives none.

        The direction is checked before.

        Raises:
          ValueError: the function fails, or does not return a direction; no rule was found.
        """
        # ε is a traced argument of compiled programs, and no rule depends on it.
        static = {key: value for key, value in options.items() if key not in self._epsilons}
        key = json.dumps(static, sort_keys=True, default=repr)
        if key not in self._examined:
            direction, rule = self._direction(static, _STACKED)
            with jax.ensure_compile_time_eval():
                self._check(direction)
            try:
                self._examined[key] = rule or measure_rule(direction)
            except ValueError as error:
                raise ValueError(f"{self.name}: {error}") from error
        return self._examined[key]

    def describe_rule(self, options: dict[str, Any]) -> str:
        """One line that says where the rule is from."""
        rule = self.rule(options)
        if isinstance(rule, Rule):
            return f"{self.name}, with the rule {rule.name!r} that it gives"
        exponents = ", ".join(f"{rule.exponents[layer]:+.2f} ({layer})" for layer in LAYERS)
        return (
            f"{self.name}, whose rule was measured: η ∝ width to the power of {exponents}, and ∝ "
            f"depth^{rule.homogeneity:+.2f}"
        )

    def _direction(
        self, options: dict[str, Any], numbers: WeightDimensionNumbers
    ) -> tuple[optax.GradientTransformation, Rule | None]:
        try:
            made = self._make(**options, **({_NUMBERS: numbers} if self._is_told else {}))
        except Exception as error:  # whatever a file raises
            raise ValueError(_place(error, self.name.rsplit(":", 1)[0])) from error
        direction, rule = made, None
        if not isinstance(made, optax.GradientTransformation) and isinstance(made, tuple):
            direction, rule = made if len(made) == 2 else (None, None)
        is_direction = isinstance(direction, optax.GradientTransformation)
        if not (is_direction and isinstance(rule, Rule | None)):
            raise ValueError(
                f"{self.name} returns {_short(made)}: return an optax.GradientTransformation, or "
                "a pair of one and a mup_jax.Rule"
            )
        return (direction if self._is_told else each_matrix(direction, numbers)), rule

    def _check(self, direction: optax.GradientTransformation) -> None:
        """On a stack of two matrices, as layers of a model are."""
        rng = np.random.default_rng(0)
        weights, gradient = (rng.normal(size=(2, 4, 3)).astype(np.float32) for _ in range(2))
        try:
            update = jax.jit(lambda g: direction.update(g, direction.init(weights), weights)[0])
            first, of_zero = update(gradient), update(np.zeros_like(gradient))
            if first.shape != gradient.shape:
                raise ValueError(f"its updates are of the shape {first.shape}")
        except Exception as error:  # whatever a transformation raises
            advice = (
                "; without an argument weight_dimension_numbers it would get one matrix after the "
                "other"
            )
            raise ValueError(
                f"{self.name} fails on a stack of two 4 x 3 matrices{advice * self._is_told}: "
                f"{type(error).__name__}: {error}"
            ) from error
        if not jnp.isfinite(of_zero).all():
            raise ValueError(
                f"{self.name}: the update of a gradient of zeros is not finite, and where a "
                "readout begins at zero hidden matrices have one at the first step: add a small ε "
                "to what it divides by"
            )
        if jnp.vdot(first, gradient) < 0:
            raise ValueError(
                f"{self.name}: its updates point down the gradient: return the positive direction, "
                "without learning rate and sign, as optax.scale_by_* do"
            )


def _place(error: Exception, file: str) -> str:
    """What is wrong with a file, and in which of its lines where that is known."""
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if frame.filename == file]
    if isinstance(error, SyntaxError):
        lines = [error.lineno]
    place = f"{file}, line {lines[-1]}" if lines else file
    return f"{place}: {type(error).__name__}: {error}"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) < 60 else f"{text[:60]}…"


class EachMatrixState(NamedTuple):
    """State of `each_matrix`: of each leaf those of its matrices, stacked."""

    inner: PyTree


def each_matrix(
    inner: optax.GradientTransformation, numbers: WeightDimensionNumbers
) -> optax.GradientTransformation:
    """`inner` for every matrix by itself, whatever stack it is in and however that is sharded."""

    def init(params: PyTree) -> EachMatrixState:
        leaves, treedef = jax.tree.flatten(params)
        states = []
        for leaf, layout in zip(leaves, matrix_layouts(params, numbers), strict=True):
            function = lambda x, to=layout.to_matrices: jax.vmap(inner.init)(to(x))
            of = jax.eval_shape(function, jax.ShapeDtypeStruct(leaf.shape, leaf.dtype))
            like = jax.tree.map(lambda x, leaf=leaf: leaf if x.shape == leaf.shape else None, of)
            states.append(_on_automatic_axes(function, like)(leaf))
        return EachMatrixState(jax.tree.unflatten(treedef, states))

    def update(
        updates: PyTree, state: EachMatrixState, params: PyTree | None = None
    ) -> tuple[PyTree, EachMatrixState]:
        treedef: Any
        leaves, treedef = jax.tree.flatten(updates)
        weights = [None] * len(leaves) if params is None else treedef.flatten_up_to(params)
        states = treedef.flatten_up_to(state.inner)
        layouts = matrix_layouts(updates, numbers)
        results = []
        for leaf, layout, *rest in zip(leaves, layouts, states, weights, strict=True):

            def function(leaf: Any, state: Any, weight: Any, layout: Any = layout) -> Any:
                weight = None if weight is None else layout.to_matrices(weight)
                u, state = jax.vmap(inner.update)(layout.to_matrices(leaf), state, weight)
                return layout.from_matrices(u), state

            results.append(_on_automatic_axes(function, (leaf, rest[0]))(leaf, *rest))
        new, new_states = zip(*results, strict=True) if results else ((), ())
        return (
            jax.tree.unflatten(treedef, new),
            EachMatrixState(jax.tree.unflatten(treedef, new_states)),
        )

    return optax.GradientTransformation(init, update)


def _on_automatic_axes(function: Callable[..., Any], like: PyTree) -> Callable[..., Any]:
    """`function`, of which the compiler divides the work; results are sharded as `like` is.

    On explicit axes most of linear algebra would have to say how. Where `like` has None, the result
    is on every device.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if AxisType.Explicit not in mesh.axis_types:
        return function
    spec = lambda x: PartitionSpec() if x is None else jax.typeof(x).sharding.spec
    out = jax.tree.map(lambda x: NamedSharding(mesh, spec(x)), like, is_leaf=lambda x: x is None)
    return jax.sharding.auto_axes(function, out_sharding=out)
