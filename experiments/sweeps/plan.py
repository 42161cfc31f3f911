"""From a sweep's configuration to its curves, and to the training runs that they consist of."""

import copy
import math
from collections.abc import Sequence
from typing import NamedTuple

from ml_collections import ConfigDict

from experiments.cells.cell import Cell, check_workers
from mup_jax import data
from mup_jax.models.llama import forward_flops_per_token, num_parameters
from mup_jax.training import config as config_lib
from mup_jax.training import default_config, validate

SWEPT = ("learning_rate", "weight_decay", "epsilon")
VARIED = ("width", "depth", "batch_size")
PARAMETRIZATIONS = ("mup", "sp")


def default_curve() -> ConfigDict:
    """Every key of a curve: an optimizer, and how it is parametrized.

    `parametrization` is "mup" (scaled from the first size by its rules) or "sp" (every size its own
    base model, so that nothing is scaled). `learning_rate`, `weight_decay` and `epsilon` (None: the
    optimizer's own) are those of the base; the one that is swept is the middle of its grid.
    """
    return ConfigDict(
        {
            "optimizer": "adamw",
            "parametrization": "mup",
            "learning_rate": 1e-2,
            "weight_decay": 0.0,
            "epsilon": None,
            "options": ConfigDict(),
        }
    )


def default_sweep() -> ConfigDict:
    """Every key that a sweep has.

    `vary` is "width", "depth" or "batch_size", of which `sizes` ascend; the first is the base. All
    runs are `train` but for size, base, optimizer and seed, and for tokens where
    `tokens_per_parameter` is not 0; batches of all sizes train on as many tokens, and are validated
    on as many as the base. `swept` is "learning_rate", "weight_decay" or "epsilon". `curves` are
    `default_curve`s by the optimizer's label and the variant's.

    At the base, values of `reach` factors of `step` to either side of a curve's own are tried.
    Where `follow` is true, larger sizes try the best of the size before and its neighbours, and
    every size goes on while its best lacks a neighbour, at most `max_extensions` times; otherwise
    every size tries what the base does. `carried` are ways to carry the base's best value to a
    larger size, by exponent of the size: each is tried everywhere. `also` are further values for
    every size. `workers` and `platform` are those of a ladder. With `vectorized` the runs of a
    curve at one size are trained by one program (`train_vectorized`), without checkpoints.
    """
    return ConfigDict(
        {
            "train": default_config(),
            "vary": "width",
            "sizes": (16, 32),
            "tokens_per_parameter": 0.0,
            "swept": "learning_rate",
            "step": 2.0,
            "reach": 2,
            "follow": True,
            "max_extensions": 4,
            "carried": {"as it is": 0.0},
            "also": (),
            "seeds": (0, 1),
            "curves": {"AdamW": {"µP": default_curve()}},
            "workers": 1,
            "platform": "",
            "vectorized": False,
        }
    )


class Curve(NamedTuple):
    """One optimizer in one parametrization, at all sizes."""

    optimizer: str
    variant: str
    settings: ConfigDict

    @property
    def name(self) -> str:
        return f"{self.optimizer}, {self.variant}"


class Sweep:
    """The curves and cells of a configuration.

    Raises:
      ValueError: the configuration is not one of a sweep, or a cell of it would not train.
    """

    def __init__(self, config: ConfigDict):
        self.config = config
        self._check_keys()
        self.sizes: Sequence[int] = tuple(config.sizes)
        self.curves = [
            Curve(optimizer, variant, settings)
            for optimizer, variants in config.curves.items()
            for variant, settings in variants.items()
        ]
        self._check_values()
        vocab_size = data.make_tokenizer(config.train.data.tokenizer).vocab_size
        self._cells: dict[tuple[str, int, float], list[Cell]] = {}
        self.flops = {self.size_name(size): self._flops(size, vocab_size) for size in self.sizes}

    def size_name(self, size: int) -> str:
        """ "w64", "d8" or "b32"."""
        return f"{self.config.vary[0]}{size}"

    def value(self, curve: Curve, power: int) -> float:
        """The value that is so many steps from the base's."""
        return curve.settings[self.config.swept] * self.config.step**power

    def cells(self, curve: Curve, size: int, value: float) -> list[Cell]:
        """The runs of one value, a cell for each seed."""
        key = (curve.name, size, value)
        if key not in self._cells:  # a schedule asks again and again
            self._cells[key] = self._make_cells(curve, size, value)
        return self._cells[key]

    def _make_cells(self, curve: Curve, size: int, value: float) -> list[Cell]:
        settings = curve.settings
        config = self._sized(size)
        mup = settings.parametrization == "mup"
        if self.config.vary != "batch_size":
            config.base[self.config.vary] = self.sizes[0] if mup else size
        config.optimizer = {
            **config.optimizer,
            "name": settings.optimizer,
            "options": settings.options.to_dict(),
            **{name: settings[name] for name in SWEPT},
            self.config.swept: value,
        }
        cells = []
        for seed in self.config.seeds:
            label = (
                f"{self.size_name(size)} {curve.name}, {self.config.swept} {value:g} seed {seed}"
            )
            cells.append(Cell(self.size_name(size), label, copy.deepcopy(config)))
            cells[-1].config.seed = seed
        return cells

    def _check_keys(self) -> None:
        config, defaults = self.config, default_sweep()
        config_lib.check_known(config, defaults, "config")
        for key in defaults:
            if key not in config:
                raise ValueError(f"missing key config.{key}: the default is {defaults[key]!r}")
        if not any(config.curves.values()):
            raise ValueError("config.curves is empty: give at least one optimizer and variant")
        for optimizer, variants in config.curves.items():
            for variant, settings in variants.items():
                path = f"config.curves.{optimizer}.{variant}"
                config_lib.check_keys(settings, default_curve(), path)

    def _check_values(self) -> None:
        config = self.config
        for key, allowed in (("vary", VARIED), ("swept", SWEPT)):
            if config[key] not in allowed:
                raise ValueError(f"config.{key}={config[key]!r}: choose one of {allowed}")
        if len(self.sizes) < 2 or list(self.sizes) != sorted(set(self.sizes)):
            raise ValueError(f"config.sizes={self.sizes}: give at least two, ascending")
        if not config.seeds or len(set(config.seeds)) < len(config.seeds):
            raise ValueError(f"config.seeds={config.seeds}: give at least one, each once")
        if config.vary == "batch_size":
            self._check_batches()
        for key, least in (("step", 1.1), ("reach", 1), ("max_extensions", 0)):
            if config[key] < least:
                raise ValueError(f"config.{key}={config[key]}: give at least {least}")
        check_workers(config.workers, config.platform)
        for curve in self.curves:
            path = f"config.curves.{curve.optimizer}.{curve.variant}"
            if curve.settings.parametrization not in PARAMETRIZATIONS:
                raise ValueError(
                    f"{path}.parametrization={curve.settings.parametrization!r}: choose one of "
                    f"{PARAMETRIZATIONS}"
                )
            middle = curve.settings[config.swept]
            if not (isinstance(middle, (int, float)) and middle > 0):
                raise ValueError(
                    f"{path}.{config.swept}={middle!r}: it is swept over its "
                    "multiples, give a value above 0"
                )
            for size in self.sizes:
                validate(self._make_cells(curve, size, self.value(curve, 0))[0].config)

    def _check_batches(self) -> None:
        train = self.config.train
        if self.config.tokens_per_parameter:
            raise ValueError(
                f"config.tokens_per_parameter={self.config.tokens_per_parameter}: batches of all "
                "sizes train on config.train.tokens, give 0"
            )
        for size in self.sizes:
            if train.tokens % (size * train.context):
                raise ValueError(
                    f"config.train.tokens={train.tokens} is no whole number of batches of {size} "
                    f"rows of {train.context}: give a multiple of {size * train.context}"
                )
            if train.eval_batches * self.sizes[0] % size:
                raise ValueError(
                    f"config.train.eval_batches={train.eval_batches} of {self.sizes[0]} rows are "
                    f"no whole number of batches of {size}: give a multiple of "
                    f"{size // math.gcd(size, self.sizes[0])}"
                )

    def _sized(self, size: int) -> ConfigDict:
        config = copy.deepcopy(self.config.train)
        if self.config.vary == "batch_size":
            config.batch_size = size
            config.eval_batches = self.config.train.eval_batches * self.sizes[0] // size
            return config
        config.model[self.config.vary] = size
        if self.config.tokens_per_parameter:
            vocab_size = data.make_tokenizer(config.data.tokenizer).vocab_size
            parameters = num_parameters(config_lib.model_config(config, vocab_size))
            config.tokens = int(self.config.tokens_per_parameter * parameters)
        return config

    def _flops(self, size: int, vocab_size: int) -> float:
        config = self._sized(size)
        model = config_lib.model_config(config, vocab_size)
        tokens = config_lib.steps_of(config) * config.batch_size * config.context
        return 3 * forward_flops_per_token(model, config.context) * tokens


def describe(sweep: Sweep) -> str:
    """The plan as text."""
    config = sweep.config
    lines = [f"{name:>8} {flops:>10.3e} FLOPs per run" for name, flops in sweep.flops.items()]
    for curve in sweep.curves:
        lines.append(f"{curve.name}: {config.swept} {sweep.value(curve, 0):g}")
    return "\n".join(lines)
