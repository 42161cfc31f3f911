"""From a configuration of budgets and widths to the training runs (cells) that it consists of."""

import copy
from typing import NamedTuple

from ml_collections import ConfigDict

from experiments.cells.cell import Cell, Results, Task, Work, check_warmup, check_workers
from mup_jax import data
from mup_jax.models.llama import forward_flops_per_token, num_parameters
from mup_jax.training import config as config_lib
from mup_jax.training import default_config, validate


def default_isoflop() -> ConfigDict:
    """Every key that a comparison of widths at equal compute has.

    At each of the `budgets`, training FLOPs that ascend, the models of all `widths` are trained for
    as many tokens as it buys, but for those whose tokens per parameter are not between the two of
    `tokens_per_parameter`. All runs are `train` but for width, tokens, optimizer and seed; the
    learning rate is carried by µP from the width of `train.base`. `optimizers` are
    `default_optimizer`s by label. `workers` and `platform` are those of a ladder.
    """
    return ConfigDict(
        {
            "train": default_config(),
            "budgets": (1e10, 2e10),
            "widths": (16, 24, 32, 48),
            "tokens_per_parameter": (0.1, 1000.0),
            "seeds": (0, 1),
            "optimizers": {"AdamW": default_optimizer()},
            "workers": 1,
            "platform": "",
        }
    )


def default_optimizer() -> ConfigDict:
    """Every key of an optimizer; `warmup_tokens` None is that of `train`.

    `weight_decay` is the independent λ of every width: within a budget it is not scaled.
    """
    return ConfigDict(
        {
            "optimizer": "adamw",
            "learning_rate": 1e-2,
            "weight_decay": 0.0,
            "warmup_tokens": None,
            "options": ConfigDict(),
        }
    )


class Model(NamedTuple):
    """A model and the tokens that a budget buys for it; `flops` are those of its training."""

    name: str
    budget: float
    width: int
    parameters: int
    tokens: int
    steps: int
    flops: int

    @property
    def tokens_per_parameter(self) -> float:
        return self.tokens / self.parameters


class IsoFlop:
    """The models and cells of a configuration.

    Attributes:
      config: the configuration.
      models: of each budget, by width.

    Raises:
      ValueError: the configuration is not one of a comparison, or a cell of it would not train.
    """

    def __init__(self, config: ConfigDict):
        self.config = config
        self._check()
        train = config.train
        self._vocab_size = data.vocab_size(train.data.source, train.data.tokenizer)
        self.models = [self._models(budget) for budget in config.budgets]
        for of_budget in self.models:
            for label in config.optimizers:
                for model in of_budget:
                    self._validate(model, label)

    def cells(self, model: Model, label: str) -> list[Cell]:
        """The runs of one model with one optimizer, a cell for each seed."""
        settings = self.config.optimizers[label]
        cells = []
        for seed in self.config.seeds:
            config = copy.deepcopy(self.config.train)
            config.seed = seed
            config.tokens = model.tokens
            config.model.width = model.width
            if settings.warmup_tokens is not None:
                config.warmup_tokens = settings.warmup_tokens
            config.optimizer = {
                **config.optimizer,
                "name": settings.optimizer,
                "learning_rate": settings.learning_rate,
                "weight_decay": settings.weight_decay,
                "options": {**settings.options.to_dict(), "weight_decay_scaling": "constant"},
            }
            cells.append(Cell(model.name, f"{model.name} {label} seed {seed}", config))
        return cells

    def _check(self) -> None:
        config, defaults = self.config, default_isoflop()
        config_lib.check_known(config, defaults, "config")
        for key in defaults:
            if key not in config:
                raise ValueError(f"missing key config.{key}: the default is {defaults[key]!r}")
        for key, least in (("budgets", 1), ("widths", 3)):
            values = list(config[key])
            if len(values) < least or values != sorted(set(values)) or values[0] <= 0:
                raise ValueError(f"config.{key}={values}: give at least {least}, ascending")
        low, high = config.tokens_per_parameter
        if not 0 < low < high:
            raise ValueError(
                f"config.tokens_per_parameter={(low, high)}: give the least and greatest to train"
            )
        if not config.seeds or len(set(config.seeds)) < len(config.seeds):
            raise ValueError(f"config.seeds={config.seeds}: give at least one, each once")
        if not config.optimizers:
            raise ValueError("config.optimizers is empty: give at least one")
        for label, settings in config.optimizers.items():
            path = f"config.optimizers.{label}"
            config_lib.check_keys(settings, default_optimizer(), path)
            check_warmup(settings.warmup_tokens, path)
            if "weight_decay_scaling" in settings.options:
                raise ValueError(
                    f"{path}.options.weight_decay_scaling="
                    f"{settings.options.weight_decay_scaling!r}: leave it out, λ is constant here"
                )
        check_workers(config.workers, config.platform)

    def _validate(self, model: Model, label: str) -> None:
        try:
            validate(self.cells(model, label)[0].config)
        except ValueError as error:
            raise ValueError(f"{model.name}, {label}: {error}") from error

    def _models(self, budget: float) -> list[Model]:
        low, high = self.config.tokens_per_parameter
        models = [self._model(budget, width) for width in self.config.widths]
        inside = [model for model in models if low <= model.tokens_per_parameter <= high]
        if len(inside) < 3:
            ratios = ", ".join(f"{m.tokens_per_parameter:.3g} (w{m.width})" for m in models)
            raise ValueError(
                f"budget {budget:g} trains {len(inside)} models, and a parabola needs three: its "
                f"tokens per parameter are {ratios}, choose other widths or another budget"
            )
        return inside

    def _model(self, budget: float, width: int) -> Model:
        config = copy.deepcopy(self.config.train)
        config.model.width = width
        model = config_lib.model_config(config, self._vocab_size)
        parameters = num_parameters(model)
        per_step = config.batch_size * config.context
        flops_per_step = 3 * forward_flops_per_token(model, config.context) * per_step
        steps = max(round(budget / flops_per_step), 1)
        name = f"w{width} at {budget:.2g}"
        return Model(
            name, budget, width, parameters, steps * per_step, steps, steps * flops_per_step
        )


def describe(plan: IsoFlop) -> str:
    """The plan as text."""
    lines = [
        f"{'FLOPs':>10} {'width':>6} {'parameters':>14} {'tokens':>16} {'steps':>9} "
        f"{'tokens/parameter':>17}"
    ]
    lines += [
        f"{m.flops:>10.3e} {m.width:>6} {m.parameters:>14,} {m.tokens:>16,} {m.steps:>9,} "
        f"{m.tokens_per_parameter:>17.3g}"
        for of_budget in plan.models
        for m in of_budget
    ]
    for label, settings in plan.config.optimizers.items():
        lines.append(
            f"{label}: learning rate {settings.learning_rate:g} at width "
            f"{plan.config.train.base.width}, λ {settings.weight_decay:g} at every width"
        )
    runs = sum(map(len, plan.models)) * len(plan.config.optimizers) * len(plan.config.seeds)
    return "\n".join([*lines, f"{runs} cells"])


def work_of(plan: IsoFlop) -> Work:
    """All of it, for `run_cells`."""
    models = {model.name: model for of_budget in plan.models for model in of_budget}

    def missing_tasks(results: Results) -> list[Task]:
        tasks = []
        for model in models.values():
            for label in plan.config.optimizers:
                missing = [c for c in plan.cells(model, label) if c.name not in results]
                if missing:
                    tasks.append(Task(model.name, label, missing))
        return sorted(tasks, key=lambda task: -models[task.size].flops * len(task.cells))

    def remaining_cells(results: Results) -> dict[tuple[str, str], int]:
        return {(task.size, task.name): len(task.cells) for task in missing_tasks(results)}

    return Work(
        missing_tasks=missing_tasks,
        remaining_cells=remaining_cells,
        flops={name: model.flops for name, model in models.items()},
        workers=plan.config.workers,
        platform=plan.config.platform,
    )
