"""From a ladder's configuration to the training runs (cells) that it consists of."""

import copy
import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from experiments.cells.cell import Cell, check_warmup, check_workers
from experiments.ladder.added import added, default_grid, name_and_source
from experiments.ladder.parametrizations import PARAMETRIZATIONS
from mup_jax import data
from mup_jax.analysis import series_name
from mup_jax.models.llama import forward_flops_per_token, num_parameters
from mup_jax.optimizers import find_optimizer
from mup_jax.training import config as config_lib
from mup_jax.training import default_config, validate


class Rates(NamedTuple):
    """What is tuned at the base: of hidden matrices, and times the factor of all else."""

    learning_rate: float
    embedding_readout_factor: float


class Grid(NamedTuple):
    """The rates that are tried at the base: every factor at every learning rate, all ascending."""

    learning_rates: tuple[float, ...]
    embedding_readout_factors: tuple[float, ...]

    @property
    def points(self) -> list[Rates]:
        return [Rates(*pair) for pair in itertools.product(*self)]

    def around(self, best: Rates) -> "Grid":
        """This grid with one more value at each end where the best stands, of axes that vary."""
        axes = []
        for axis, value in zip(self, best, strict=True):
            if len(axis) > 1 and value == axis[0]:
                axis = (axis[0] ** 2 / axis[1], *axis)
            elif len(axis) > 1 and value == axis[-1]:
                axis = (*axis, axis[-1] ** 2 / axis[-2])
            axes.append(axis)
        return Grid(*axes)


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

    `widths` ascend; the first is the base, where each optimizer is tuned on all pairs of its
    `learning_rates`, those of hidden matrices, and `embedding_readout_factors`, with the first
    `tuning_seeds` seeds: a parabola through nine pairs needs few.
    Both are spaced by a constant factor, and extend themselves while the best pair is at an edge,
    at most `max_extensions` times. Tuned is the minimum of a parabola in log2 through the best pair
    and its neighbours; a single pair is not tuned. The warm-up is `warmup_tokens` at every rung,
    None for that of `train`. From the base `parametrizations` (see `PARAMETRIZATIONS`) carry the
    tuned rates to the other rungs, for each optimizer those that it has; "mup" is always one. One
    that counts at the base too is tuned there on its own, on `learning_rates_of` its name where the
    optimizer has that.

    `checks` are factors of the transferred rates, and `decay_checks` of the weight decay where
    there is one, that µP tries with the first seed at the largest rung, to see whether the optimum
    moved. All cells are `train` but for model, tokens, optimizer and seed. `workers` processes run
    side by side, each with one core where `platform` is "cpu"; an empty platform is JAX's choice.
    With `vectorized` an optimizer is tuned by one program (`train_vectorized`).
    """
    return ConfigDict(
        {
            "train": default_config(),
            "widths": (32, 64),
            "depth": 2,
            "tokens_per_parameter": 8.0,
            "seeds": (0, 1),
            "tuning_seeds": 1,
            "optimizers": {"adamw": default_optimizer()},
            "parametrizations": ("mup",),
            "checks": (0.5, 2.0),
            "decay_checks": (0.5, 2.0),
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
            "embedding_readout_factors": (1.0,),
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
        self.config = copy.deepcopy(config)
        self._check()
        self.vocab_size = data.vocab_size(config.train.data.source, config.train.data.tokenizer)
        self._cells: dict[tuple[str, Series, Rates, int, float, bool], Cell] = {}
        self.rungs = [self._rung(width) for width in config.widths]
        for label in added(self.config):
            self._complete_grid(label)
        self.series = [
            Series(optimizer, parametrization)
            for optimizer in config.optimizers
            for parametrization in PARAMETRIZATIONS
            if parametrization in config.parametrizations
            and self._scaling(optimizer, parametrization) is not None
        ]
        for rung in self.rungs:
            for series in self.series:
                rates = self.grid(series).points[0]
                validate(self.cell(rung, series, rates, config.seeds[0]).config)

    def make(self, optimizer: str) -> Callable[..., Any]:
        """What makes one of its optimizers."""
        return find_optimizer(*name_and_source(self.config, optimizer))

    def _scaling(self, optimizer: str, parametrization: str) -> dict[str, Any] | None:
        return PARAMETRIZATIONS[parametrization].options_of(optimizer, self.make(optimizer))

    def _complete_grid(self, label: str) -> None:
        """What is not given of the grid of an optimizer from a file."""
        row = self.config.optimizers[label]
        if not (row.learning_rates and row.embedding_readout_factors):
            chosen = default_grid(self.config, label, self.rungs[0].parameters)
            row.update({key: values for key, values in chosen.items() if not row[key]})

    def grid(self, series: Series) -> Grid:
        """The grid on which a series begins to be tuned."""
        settings = self.config.optimizers[series.optimizer]
        own = settings.learning_rates_of.get(series.parametrization)
        rates = settings.learning_rates if own is None else own
        factors = settings.embedding_readout_factors
        return Grid(tuple(map(float, rates)), tuple(map(float, factors)))

    def cell(
        self,
        rung: Rung,
        series: Series,
        rates: Rates,
        seed: int,
        *,
        decay_factor: float = 1.0,
        is_tuning: bool = False,
    ) -> Cell:
        """The run of one series at one rung; the rates are those of the base."""
        if rung == self.rungs[0]:
            series = series.tuned
        key = (rung.name, series, rates, seed, decay_factor, is_tuning)
        if key not in self._cells:  # a schedule asks again and again
            self._cells[key] = self._make_cell(*key[1:], rung=rung)
        return self._cells[key]

    def _make_cell(
        self,
        series: Series,
        rates: Rates,
        seed: int,
        decay_factor: float,
        is_tuning: bool,
        *,
        rung: Rung,
    ) -> Cell:
        settings = self.config.optimizers[series.optimizer]
        scaling = self._scaling(series.optimizer, series.parametrization) or {}
        name, source = name_and_source(self.config, series.optimizer)
        config = copy.deepcopy(self.config.train)
        config.seed = seed
        config.tokens = rung.tokens
        config.model.width, config.model.depth = rung.width, rung.depth
        config.base.width, config.base.depth = self.config.widths[0], self.config.depth
        if settings.warmup_tokens is not None:
            config.warmup_tokens = settings.warmup_tokens
        config.optimizer = {
            "name": name,
            **({"source": source} if source else {}),
            **rates._asdict(),
            "weight_decay": decay_factor * settings.weight_decay,
            "epsilon": None,
            "options": settings.options.to_dict() | scaling,
        }
        # Times are measured on the cells that count.
        config.measure_optimizer &= not is_tuning
        decay = "" if decay_factor == 1 else f" wd x{decay_factor:g}"
        factor = f" x{rates.embedding_readout_factor:g}"
        label = f"{rung.name} {series.name} lr {rates.learning_rate:g}{factor}{decay} seed {seed}"
        return Cell(rung.name, f"{label}, tuning" if is_tuning else label, config)

    def tuning_cells(self, series: Series, points: Iterable[Rates]) -> list[Cell]:
        """The cells of these rates at the base."""
        base, seeds = self.rungs[0], self.config.seeds[: self.config.tuning_seeds]
        return [
            self.cell(base, series, rates, seed, is_tuning=True)
            for rates in points
            for seed in seeds
        ]

    def cells(self, rung: Rung, series: Series, rates: Rates) -> list[Cell]:
        """The cells of a rung: every seed at the tuned rates and, at the largest rung, checks."""
        config = self.config
        first = config.seeds[0]
        cells = [self.cell(rung, series, rates, seed) for seed in config.seeds]
        if rung == self.rungs[-1] and series.parametrization == "mup":
            for x in config.checks:
                checked = rates._replace(learning_rate=x * rates.learning_rate)
                cells.append(self.cell(rung, series, checked, first))
            if config.optimizers[series.optimizer].weight_decay:
                cells += [
                    self.cell(rung, series, rates, first, decay_factor=x)
                    for x in config.decay_checks
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
            full_name, source = name_and_source(config, name)
            reference = default_optimizer()
            if source:
                reference.update(name=full_name, source=source)
            config_lib.check_optimizer(full_name, settings.options, source)
            config_lib.check_keys(settings, reference, f"config.optimizers.{name}")
            check_warmup(settings.warmup_tokens, f"config.optimizers.{name}")
            grids = {key: settings[key] for key in ("learning_rates", "embedding_readout_factors")}
            for parametrization, rates in settings.learning_rates_of.items():
                _check_parametrization(parametrization, f"config.optimizers.{name}")
                if not PARAMETRIZATIONS[parametrization].tuned_alone:
                    raise ValueError(
                        f"config.optimizers.{name}.learning_rates_of.{parametrization}: it shares "
                        "the learning rate of mup, leave it out"
                    )
                grids[f"learning_rates_of.{parametrization}"] = rates
            for key, rates in grids.items():
                if source and not rates:
                    continue  # `default_grid` has them
                if not rates or list(rates) != sorted(rates) or rates[0] <= 0:
                    raise ValueError(
                        f"config.optimizers.{name}.{key}={rates}: give ascending values > 0"
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
        if not 1 <= config.tuning_seeds <= len(config.seeds):
            raise ValueError(
                f"config.tuning_seeds={config.tuning_seeds}: give 1 to {len(config.seeds)}, as "
                "many as there are seeds"
            )
        if config.tokens_per_parameter <= 0:
            raise ValueError(
                f"config.tokens_per_parameter={config.tokens_per_parameter}: give a value > 0"
            )
        for key in ("checks", "decay_checks"):
            checks = list(config[key])
            if len({1.0, *checks}) <= len(checks) or any(factor <= 0 for factor in checks):
                raise ValueError(f"config.{key}={checks}: give factors > 0 but 1, each once")
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


class Part(NamedTuple):
    """Cells of one rung that belong together: they tune a series, or are its result there."""

    rung: Rung
    series: Series
    cells: list[Cell]
    is_tuning: bool


def planned_parts(ladder: Ladder) -> Iterator[Part]:
    """What is known before tuning; all results stand at the first rates of the grid."""
    base = ladder.rungs[0]
    for series in ladder.series:
        points = ladder.grid(series).points
        alone = series == series.tuned
        if alone and len(points) > 1:
            yield Part(base, series, ladder.tuning_cells(series, points), True)
        for rung in ladder.rungs if alone else ladder.rungs[1:]:
            yield Part(rung, series, ladder.cells(rung, series, points[0]), False)
