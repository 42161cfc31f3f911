"""Notes in a program for `mup_jax.training.flops`, which counts operations without running it."""

from collections.abc import Callable
from typing import Any

import jax
from jax.extend.core import Jaxpr, Primitive
from jax.interpreters import ad, batching, mlir

# The identity, of which nothing is left in a compiled program.
_counted_p = Primitive("mup_jax_counted")
_counted_p.def_impl(lambda x, times: x)
_counted_p.def_abstract_eval(lambda x, times: x)
mlir.register_lowering(_counted_p, lambda context, x, times: [x])
batching.defvectorized(_counted_p)
ad.deflinear2(_counted_p, lambda cotangent, x, times: (cotangent,))


def counted(times: float, function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, the body of a loop or a branch of a condition, which runs so often per step."""

    def noted(*args: Any) -> Any:
        (first, *rest), treedef = jax.tree.flatten(args)
        return function(*jax.tree.unflatten(treedef, [_counted_p.bind(first, times=times), *rest]))

    return noted


def times_of(body: Jaxpr) -> float:
    """How often a body or branch counts: once, where nothing is noted."""
    notes = [e.params["times"] for e in body.eqns if e.primitive is _counted_p]
    return float(notes[0]) if notes else 1.0
