"""Floating-point operations of any JAX function, counted from its program.

Counted are matrix products (two per multiply-add) and factorizations; elementwise work is not. The
count depends on shapes alone, never on the machine.
"""

import collections
import math
from collections.abc import Callable
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr

from mup_jax.transforms.accounting import times_of
from mup_jax.transforms.platforms import use_paths_of

# Multiples of d³ for a d x d matrix, of m·n² for m x n with n <= m (Golub and Van Loan, Matrix
# Computations, 4th ed., sections 4.2, 5.2, 8.3 and 8.6).
_FACTORIZATIONS = {"eigh": 11.0, "svd": 22.0, "geqrf": 4 / 3, "qr": 8 / 3, "cholesky": 1 / 3}


def count_flops(function: Callable[..., Any], *args: Any, platform: str | None = None) -> float:
    """Operations of one call of `function` on arguments of these shapes (abstract ones will do).

    Of the branches of a conditional the cheapest nonempty one counts, refreshes of preconditioners
    for the share of the steps in which they are due. Iterations until convergence count as often as
    is usual, other `while` loops once. Work that is divided over a mesh counts on all its devices.

    Args:
      function: any.
      *args: its arguments.
      platform: whose path counts; by default the default backend's.
    """
    return sum(count_flops_by_precision(function, *args, platform=platform).values())


def count_flops_by_precision(
    function: Callable[..., Any], *args: Any, platform: str | None = None
) -> dict[str, float]:
    """The operations of `count_flops` by the units that they need.

    "16 bit" for products of bfloat16 and float16, "default" for products of float32 that
    accelerators take in fewer digits, and "float32" for those that ask for all digits, and for
    factorizations.
    """
    with use_paths_of(platform or jax.default_backend()):
        return dict(_count(jax.make_jaxpr(function)(*args).jaxpr))


_Counts = collections.Counter[str]


def _times(factor: float, counts: _Counts) -> _Counts:
    return collections.Counter({key: factor * flops for key, flops in counts.items()})


def _count(jaxpr: Jaxpr) -> _Counts:
    counts = (_count_equation(equation) for equation in jaxpr.eqns)
    return _times(times_of(jaxpr), sum(counts, collections.Counter()))


def _precision(equation: Any) -> str:
    """Of a product."""
    if all(x.aval.dtype.itemsize == 2 for x in equation.invars):
        return "16 bit"
    precision = equation.params["precision"]
    asked = precision if isinstance(precision, tuple) else (precision,)
    return "float32" if jax.lax.Precision.HIGHEST in asked else "default"


def _count_equation(equation: Any) -> _Counts:
    name, params = equation.primitive.name, equation.params
    if name == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        depth = math.prod(equation.invars[0].aval.shape[axis] for axis in contracted)
        flops = 2.0 * depth * math.prod(equation.outvars[0].aval.shape)
        return collections.Counter({_precision(equation): flops})
    if name in (*_FACTORIZATIONS, "householder_product"):
        *batch, m, n = equation.invars[0].aval.shape
        if name == "householder_product":
            flops = 4 / 3 * math.prod(batch) * m * n**2
        else:
            flops = _FACTORIZATIONS[name] * math.prod(batch) * max(m, n) * min(m, n) ** 2
        return collections.Counter({"float32": flops})
    if name == "cond":
        branches = [_count(branch.jaxpr) for branch in params["branches"]]
        return min((c for c in branches if c.total()), key=_Counts.total, default=_Counts())
    inner = [
        _count(value.jaxpr if isinstance(value, ClosedJaxpr) else value)
        for parameter in params.values()
        for value in (parameter if isinstance(parameter, (tuple, list)) else [parameter])
        if isinstance(value, (ClosedJaxpr, Jaxpr))
    ]
    times = {
        "scan": params.get("length"),
        "shard_map": getattr(params.get("mesh"), "size", None),
    }
    factor = times.get(name)
    return _times(1 if factor is None else factor, sum(inner, collections.Counter()))
