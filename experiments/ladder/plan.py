"""From a ladder's configuration to the training runs (cells) that it consists of."""

import copy
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from ml_collections import ConfigDict

from experiments.cells.cell import Cell, check_workers
from experiments.ladder.parametrizations import PARAMETRIZATIONS
from mup_jax import data
from mup_jax.analysis import series_name
from mup_jax.models.llama import forward_flops_per_token, num_parameters
from mup_jax.training import config as config_lib
from mup_jax.training import default_config, validate

# Every fraction of a learning rate that is tried is a power of this.
GRID_STEP = 2.0


class Series(NamedTuple):
    """One optimizer in one parametrization, at all rungs."""

    optimizer: str
    parametrization: str = "mup"

    @property
    def name(self) -> str:
        return series_name(self.optimizer, self.parametrization)

    @property
    def tuned(self) -> "Series":
        """The series whose base cells this one's learning rate is tuned on."""
        alone = PARAMETRIZATIONS[self.parametrization].tuned_alone
        return self if alone else Series(self.optimizer)


class Rung(NamedTuple):
    """One model size of a ladder.

    `flops` are those of training the model on all `tokens`, of which a last incomplete batch is
    left out.
    """

    name: str
    width: int
    depth: int
    parameters: int
    tokens: int
    steps: int
    flops: int


def default_ladder() -> ConfigDict:
    """Every key that a ladder has.

    `widths` ascend; the first is the base, where each optimizer's learning rate is tuned on its
    `learning_rates` (powers of two apart; the grid extends itself while the best is at an edge, at
    most `max_extensions` times), and its warm-up is `warmup_tokens` at every rung, None for that of
    `train`. From there `parametrizations` (see `PARAMETRIZATIONS`) carry it to the others, for each
    optimizer those that it has; "mup" is always one. One that counts at the base too is tuned
    there on its own, on `learning_rates_of` its name where the optimizer has that.

    `checks` are factors of the transferred learning rate, and of the weight decay where there is
    one, that µP tries with the first seed at the largest rung, to see whether the optimum moved.
    All cells are `train` but for model, tokens, optimizer and seed. `workers` processes run side by
    side, each with one core where `platform` is "cpu"; an empty platform is JAX's choice. With
    `vectorized` the cells of the base are trained by one program (`train_vectorized`).
    """
    return ConfigDict(
        {
            "train": default_config(),
            "widths": (32, 64),
            "depth": 2,
            "tokens_per_parameter": 8.0,
            "seeds": (0, 1),
            "optimizers": {"adamw": default_optimizer()},
            "parametrizations": ("mup",),
            "checks": (0.5, 2.0),
            "max_extensions": 4,
            "workers": 1,
            "platform": "",
            "vectorized": True,
        }
    )


def default_optimizer() -> ConfigDict:
    """Every key of one of a ladder's optimizers."""
    return ConfigDict(
        {
            "learning_rates": (1e-2,),
            "learning_rates_of": ConfigDict(),
            "weight_decay": 0.0,
            "warmup_tokens": None,
            "options": ConfigDict(),
        }
    )


def rung_name(width: int) -> str:
    """The rungs of a ladder differ in width alone."""
    return f"w{width}"


class Ladder:
    """The rungs and cells of a configuration.

    Attributes:
      config: the configuration.
      vocab_size: of its models.
      rungs: ascending.
      series: of every optimizer "mup" first.

    Raises:
      ValueError: the configuration is not one of a ladder, or a cell of it would not train.
    """

    def __init__(self, config: ConfigDict):
        self.config = config
        self._check()
        self.vocab_size = data.vocab_size(config.train.data.source, config.train.data.tokenizer)
        self._cells: dict[tuple[str, Series, float, int, float], Cell] = {}
        self.rungs = [self._rung(width) for width in config.widths]
        self.series = [
            Series(optimizer, parametrization)
            for optimizer in config.optimizers
            for parametrization in PARAMETRIZATIONS
            if parametrization in config.parametrizations
            and PARAMETRIZATIONS[parametrization].options_of(optimizer) is not None
        ]
        for rung in self.rungs:
            for series in self.series:
                rate = self.learning_rates(series)[0]
                validate(self.cell(rung, series, rate, config.seeds[0]).config)

    def learning_rates(self, series: Series) -> list[float]:
        """The grid on which a series begins to be tuned."""
        settings = self.config.optimizers[series.optimizer]
        own = settings.learning_rates_of.get(series.parametrization)
        return list(settings.learning_rates if own is None else own)

    def cell(
        self,
        rung: Rung,
        series: Series,
        learning_rate: float,
        seed: int,
        *,
        decay_factor: float = 1.0,
    ) -> Cell:
        """The run of one series at one rung; the learning rate is that of the base."""
        if rung == self.rungs[0]:
            series = series.tuned
        key = (rung.name, series, learning_rate, seed, decay_factor)
        if key not in self._cells:  # a schedule asks again and again
            self._cells[key] = self._make_cell(rung, series, learning_rate, seed, decay_factor)
        return self._cells[key]

    def _make_cell(
        self, rung: Rung, series: Series, learning_rate: float, seed: int, decay_factor: float
    ) -> Cell:
        settings = self.config.optimizers[series.optimizer]
        scaling = PARAMETRIZATIONS[series.parametrization].options_of(series.optimizer) or {}
        config = copy.deepcopy(self.config.train)
        config.seed = seed
        config.tokens = rung.tokens
        config.model.width, config.model.depth = rung.width, rung.depth
        config.base.width, config.base.depth = self.config.widths[0], self.config.depth
        if settings.warmup_tokens is not None:
            config.warmup_tokens = settings.warmup_tokens
        config.optimizer = {
            "name": series.optimizer,
            "learning_rate": learning_rate,
            "weight_decay": decay_factor * settings.weight_decay,
            "epsilon": None,
            "options": settings.options.to_dict() | scaling,
        }
        decay = "" if decay_factor == 1 else f" wd x{decay_factor:g}"
        label = f"{rung.name} {series.name} lr {learning_rate:g}{decay} seed {seed}"
        return Cell(rung.name, label, config)

    def tuning_cells(self, series: Series, learning_rates: Sequence[float]) -> list[Cell]:
        """The cells of these learning rates at the base, every seed."""
        return [
            self.cell(self.rungs[0], series, rate, seed)
            for rate in learning_rates
            for seed in self.config.seeds
        ]

    def transfer_cells(self, rung: Rung, series: Series, learning_rate: float) -> list[Cell]:
        """The cells above the base: the transferred learning rate and, at the largest, checks."""
        seeds, checks = self.config.seeds, self.config.checks
        cells = [self.cell(rung, series, learning_rate, seed) for seed in seeds]
        if rung == self.rungs[-1] and series.parametrization == "mup":
            cells += [self.cell(rung, series, x * learning_rate, seeds[0]) for x in checks]
            if self.config.optimizers[series.optimizer].weight_decay:
                cells += [
                    self.cell(rung, series, learning_rate, seeds[0], decay_factor=x) for x in checks
                ]
        return cells

    def _check(self) -> None:
        config = self.config
        defaults = default_ladder()
        config_lib.check_known(config, defaults, "config")
        for key in defaults:
            if key not in config:
                raise ValueError(f"missing key config.{key}: see experiments/ladder/plan.py")
        for name, settings in config.optimizers.items():
            config_lib.check_optimizer(name, settings.options)
            config_lib.check_keys(settings, default_optimizer(), f"config.optimizers.{name}")
            grids = {"learning_rates": settings.learning_rates}
            for parametrization, rates in settings.learning_rates_of.items():
                _check_parametrization(parametrization, f"config.optimizers.{name}")
                if not PARAMETRIZATIONS[parametrization].tuned_alone:
                    raise ValueError(
                        f"config.optimizers.{name}.learning_rates_of.{parametrization}: it shares "
                        "the learning rate of mup, leave it out"
                    )
                grids[f"learning_rates_of.{parametrization}"] = rates
            for key, rates in grids.items():
                if not rates or list(rates) != sorted(rates) or rates[0] <= 0:
                    raise ValueError(
                        f"config.optimizers.{name}.{key}={rates}: give ascending rates > 0"
                    )
        if "adamw" not in config.optimizers:
            raise ValueError("config.optimizers lacks 'adamw', the baseline of all multipliers")
        for parametrization in config.parametrizations:
            _check_parametrization(parametrization, "config.parametrizations")
        if "mup" not in config.parametrizations:
            raise ValueError(
                f"config.parametrizations={config.parametrizations} lacks 'mup', that of the "
                "baseline of all multipliers"
            )
        widths = list(config.widths)
        if len(widths) < 2 or widths != sorted(set(widths)):
            raise ValueError(f"config.widths={widths}: give at least two, ascending")
        if not config.seeds or len(set(config.seeds)) < len(config.seeds):
            raise ValueError(f"config.seeds={config.seeds}: give at least one, each once")
        if config.tokens_per_parameter <= 0:
            raise ValueError(
                f"config.tokens_per_parameter={config.tokens_per_parameter}: give a value > 0"
            )
        checks = list(config.checks)
        if len({1.0, *checks}) <= len(checks) or any(factor <= 0 for factor in checks):
            raise ValueError(f"config.checks={checks}: give factors > 0 but 1, each once")
        check_workers(config.workers, config.platform)

    def _rung(self, width: int) -> Rung:
        config = copy.deepcopy(self.config.train)
        config.model.width, config.model.depth = width, self.config.depth
        model = config_lib.model_config(config, self.vocab_size)
        parameters = num_parameters(model)
        config.tokens = int(self.config.tokens_per_parameter * parameters)
        steps = config_lib.steps_of(config)
        flops = 3 * forward_flops_per_token(model, config.context) * config.tokens
        return Rung(
            rung_name(width), width, self.config.depth, parameters, config.tokens, steps, flops
        )


def _check_parametrization(name: str, key: str) -> None:
    if name not in PARAMETRIZATIONS:
        raise ValueError(
            f"{key}: unknown parametrization {name!r}, choose of {', '.join(PARAMETRIZATIONS)}"
        )


def planned_cells(ladder: Ladder) -> Iterator[tuple[Rung, Series, list[Cell]]]:
    """The cells known before tuning; those above the base stand at the first learning rate."""
    for series in ladder.series:
        rates = ladder.learning_rates(series)
        if series == series.tuned:
            yield ladder.rungs[0], series, ladder.tuning_cells(series, rates)
        for rung in ladder.rungs[1:]:
            yield rung, series, ladder.transfer_cells(rung, series, rates[0])
