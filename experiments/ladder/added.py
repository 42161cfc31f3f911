"""Optimizers of the user's own as further rows of a ladder (`--add`)."""

import copy
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from absl import flags
from ml_collections import ConfigDict

from mup_jax.analysis.runs import BASELINE
from mup_jax.optimizers import OPTIMIZERS, find_optimizer
from mup_jax.optimizers.from_file import is_file, label_of, read_file
from mup_jax.transfer import ParamShape

_STEPS = 20


def amend(config: ConfigDict, argv: list[str]) -> None:
    """Adds the optimizers of `--add` on a command line; see `add_optimizers`."""
    values: Any = flags.FlagValues()
    flags.DEFINE_multi_string("add", [], "", flag_values=values)
    values(argv, known_only=True)
    add_optimizers(config, (name for names in values.add for name in names.split(",")))


def add_optimizers(config: ConfigDict, names: Iterable[str]) -> None:
    """Adds optimizers from files to a ladder's configuration, each as a row like the baseline's.

    The row of my_optimizer.py:make is `config.optimizers.my_optimizer`. It has the weight decay and
    the warm-up of the baseline; its learning rates and factors are empty, for those of
    `default_grid`.

    Args:
      config: of a ladder.
      names: FILE.py:FUNCTION each; see `mup_jax.optimizers.from_file`.

    Raises:
      ValueError: there is no such file, or two rows would have one name.
    """
    for given in names:
        if not is_file(given):
            raise ValueError(f"--add={given}: give FILE.py:FUNCTION, or a row in the configuration")
        name, source = read_file(given)
        label = label_of(name)
        if label in config.optimizers or label in OPTIMIZERS:
            raise ValueError(
                f"--add={given}: {label!r} is another optimizer, give the file another name"
            )
        if BASELINE not in config.optimizers:
            raise ValueError(f"--add={given}: config.optimizers lacks {BASELINE!r}, its baseline")
        row = copy.deepcopy(config.optimizers[BASELINE])
        row.update(learning_rates=(), embedding_readout_factors=())
        row.learning_rates_of, row.options = ConfigDict(), ConfigDict()
        row.update(name=name, source=source)
        config.optimizers[label] = row


def name_and_source(config: ConfigDict, label: str) -> tuple[str, str]:
    """Of the optimizer of a row, for `find_optimizer`."""
    row = config.optimizers[label]
    return row.get("name", label), row.get("source", "")


def without_added(config: ConfigDict) -> ConfigDict:
    """A copy of a ladder's configuration without the rows from files."""
    same = copy.deepcopy(config)
    with same.unlocked():
        for label in added(config):
            del same.optimizers[label]
    return same


def added(config: ConfigDict) -> list[str]:
    """The rows that are from files."""
    return [label for label, row in config.optimizers.items() if "source" in row]


def default_grid(config: ConfigDict, label: str, parameters: int) -> dict[str, tuple[float, ...]]:
    """Learning rates and factors for a row, such that its updates are as large as the baseline's.

    The baseline's learning rates are multiplied by a power of two, so that the RMS of updates of a
    hidden matrix at the base is about the baseline's, for gradients that are noise of norm 1; the
    factors are divided by it, which leaves Adam on embedding and readout where the baseline has it.

    Args:
      config: of the ladder.
      label: of the row.
      parameters: of the model at the base.
    """
    width, entry = config.widths[0], 1 / math.sqrt(parameters)
    rms = [
        _rms_of_updates(find_optimizer(*name_and_source(config, x)), options, width, entry)
        for x, options in ((x, config.optimizers[x].options) for x in (BASELINE, label))
    ]
    ratio = 2.0 ** round(math.log2(rms[0] / rms[1])) if min(rms) > 0 else 1.0
    baseline = config.optimizers[BASELINE]
    return {
        "learning_rates": tuple(ratio * x for x in baseline.learning_rates),
        "embedding_readout_factors": tuple(x / ratio for x in baseline.embedding_readout_factors),
    }


def _rms_of_updates(
    make: Callable[..., Any], options: Mapping[str, Any], width: int, entry: float
) -> float:
    """At a learning rate of 1, after some steps of gradients with entries of this size."""
    shapes = {"w": ParamShape("hidden", width, width, width, width)}
    optimizer = make(1.0, shapes=shapes, **options)
    functions = {"obj_fn": lambda tree: tree["w"].sum(), "logits_fn": lambda tree: tree["w"]}
    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        update = jax.jit(lambda g, state, w: optimizer.update(g, state, w, **functions))
        draw = lambda i: {"w": jax.random.normal(jax.random.key(i), (width, width))}
        weights = jax.tree.map(lambda x: x / math.sqrt(width), draw(0))
        state = optimizer.init(weights)
        for i in range(1, _STEPS + 1):
            gradient = jax.tree.map(lambda x: entry * x, draw(i))
            updates, state = update(gradient, state, weights)
        return float(jnp.sqrt(jnp.mean(jnp.square(updates["w"]))))
