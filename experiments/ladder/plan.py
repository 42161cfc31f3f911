"""From a ladder's configuration to the training runs (cells) that it consists of."""

import copy
from collections.abc import Sequence
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from experiments.cells.cell import Cell, check_workers
from mup_jax import data
from mup_jax.models.llama import forward_flops_per_token, num_parameters
from mup_jax.training import config as config_lib
from mup_jax.training import default_config, validate

# Every fraction of a learning rate that is tried is a power of this.
GRID_STEP = 2.0


class Rung(NamedTuple):
    """One model size of a ladder; `flops` are those of model training, per run."""

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
    `train`. `checks` are factors of the transferred learning rate tried with
    the first seed at the second rung, to see whether the optimum moved. All cells are `train` but
    for model, tokens, optimizer and seed. `workers` processes run side by side, each with one core
    where `platform` is "cpu"; an empty platform is JAX's choice.
    """
    return ConfigDict(
        {
            "train": default_config(),
            "widths": (32, 64),
            "depth": 2,
            "tokens_per_parameter": 8.0,
            "seeds": (0, 1),
            "optimizers": {"adamw": default_optimizer()},
            "checks": (0.5, 2.0),
            "max_extensions": 4,
            "workers": 1,
            "platform": "",
        }
    )


def default_optimizer() -> ConfigDict:
    """Every key of one of a ladder's optimizers."""
    return ConfigDict(
        {
            "learning_rates": (1e-2,),
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

    Raises:
      ValueError: the configuration is not one of a ladder, or a cell of it would not train.
    """

    def __init__(self, config: ConfigDict):
        self.config = config
        self._check()
        self.vocab_size = data.vocab_size(config.train.data.source, config.train.data.tokenizer)
        self.rungs = [self._rung(width) for width in config.widths]
        for rung in self.rungs:
            for optimizer in config.optimizers:
                rate = config.optimizers[optimizer].learning_rates[0]
                validate(self.cell(rung, optimizer, rate, config.seeds[0]).config)

    @property
    def optimizers(self) -> list[str]:
        return list(self.config.optimizers)

    def cell(self, rung: Rung, optimizer: str, learning_rate: float, seed: int) -> Cell:
        """The run of one optimizer at one rung; the learning rate is that of the base."""
        settings = self.config.optimizers[optimizer]
        config = copy.deepcopy(self.config.train)
        config.seed = seed
        config.tokens = rung.tokens
        config.model.width, config.model.depth = rung.width, rung.depth
        config.base.width, config.base.depth = self.config.widths[0], self.config.depth
        if settings.warmup_tokens is not None:
            config.warmup_tokens = settings.warmup_tokens
        config.optimizer = {
            "name": optimizer,
            "learning_rate": learning_rate,
            "weight_decay": settings.weight_decay,
            "epsilon": None,
            "options": settings.options.to_dict(),
        }
        label = f"{rung.name} {optimizer} lr {learning_rate:g} seed {seed}"
        return Cell(rung.name, label, config)

    def tuning_cells(self, optimizer: str, learning_rates: Sequence[float]) -> list[Cell]:
        """The cells of these learning rates at the base, every seed."""
        return [
            self.cell(self.rungs[0], optimizer, rate, seed)
            for rate in learning_rates
            for seed in self.config.seeds
        ]

    def transfer_cells(self, rung: Rung, optimizer: str, learning_rate: float) -> list[Cell]:
        """The cells above the base: the transferred learning rate and, at one rung, its checks."""
        cells = [self.cell(rung, optimizer, learning_rate, seed) for seed in self.config.seeds]
        if rung == self.rungs[1]:
            first_seed = self.config.seeds[0]
            cells += [
                self.cell(rung, optimizer, factor * learning_rate, first_seed)
                for factor in self.config.checks
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
            rates = list(settings.learning_rates)
            if not rates or rates != sorted(rates) or rates[0] <= 0:
                raise ValueError(
                    f"config.optimizers.{name}.learning_rates={rates}: give ascending rates > 0"
                )
        if "adamw" not in config.optimizers:
            raise ValueError("config.optimizers lacks 'adamw', the baseline of all multipliers")
        widths = list(config.widths)
        if len(widths) < 2 or widths != sorted(set(widths)):
            raise ValueError(f"config.widths={widths}: give at least two, ascending")
        if not config.seeds or len(set(config.seeds)) < len(config.seeds):
            raise ValueError(f"config.seeds={config.seeds}: give at least one, each once")
        if config.tokens_per_parameter <= 0:
            raise ValueError(
                f"config.tokens_per_parameter={config.tokens_per_parameter}: give a value > 0"
            )
        check_workers(config.workers, config.platform)

    def _rung(self, width: int) -> Rung:
        config = copy.deepcopy(self.config.train)
        config.model.width, config.model.depth = width, self.config.depth
        model = config_lib.model_config(config, self.vocab_size)
        parameters = num_parameters(model)
        per_step = config.batch_size * config.context
        config.tokens = int(self.config.tokens_per_parameter * parameters)
        steps = config_lib.steps_of(config)
        flops = 3 * forward_flops_per_token(model, config.context) * steps * per_step
        return Rung(
            rung_name(width), width, self.config.depth, parameters, config.tokens, steps, flops
        )


def describe(ladder: Ladder) -> str:
    """The plan as text: rungs, and how many cells each optimizer needs at least."""
    lines = [f"{'rung':>8} {'parameters':>12} {'tokens':>14} {'steps':>8} {'FLOPs per run':>14}"]
    lines += [
        f"{r.name:>8} {r.parameters:>12,} {r.tokens:>14,} {r.steps:>8,} {r.flops:>14.3e}"
        for r in ladder.rungs
    ]
    for optimizer in ladder.optimizers:
        rates = ladder.config.optimizers[optimizer].learning_rates
        lines.append(f"{optimizer}: tuned on {', '.join(f'{rate:g}' for rate in rates)}")
    return "\n".join([*lines, f"at least {len(planned_cells(ladder))} cells"])


def planned_cells(ladder: Ladder) -> list[Cell]:
    """The cells known before tuning; those above the base stand at the first learning rate."""
    cells: list[Cell] = []
    for optimizer in ladder.optimizers:
        rates: Any = ladder.config.optimizers[optimizer].learning_rates
        cells += ladder.tuning_cells(optimizer, rates)
        for rung in ladder.rungs[1:]:
            cells += ladder.transfer_cells(rung, optimizer, rates[0])
    return cells
