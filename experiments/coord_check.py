"""Does every layer move equally far in a step of training, whatever the size of the model?

    python -m experiments.coord_check --config=configs/coord_check_cpu.py --workdir=DIR

Takes the first steps of training with each optimizer, at several widths or depths, in µP and in
standard parametrization (SP: at every size the learning rates that the base model has). DIR ends
with report.md, results.json and figure.png. The exit code is 1 where a check in µP fails that is
not expected to.
"""

import copy
import functools
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import flags as absl_flags
from ml_collections import ConfigDict, config_flags

import mup_jax
from experiments import command
from mup_jax import data
from mup_jax.analysis.coordinate_figure import write_coordinates
from mup_jax.analysis.coordinates import finding, markdown, title, verdict
from mup_jax.models.llama import LlamaConfig
from mup_jax.training import config as config_lib
from mup_jax.training import default_config, validate
from mup_jax.training.files import write_atomically
from mup_jax.training.mesh import make_mesh
from mup_jax.training.metrics import finite_or_none
from mup_jax.training.program import WEIGHT_DIMENSION_NUMBERS, Hyperparameters, make_program
from mup_jax.training.record import provenance

PARAMETRIZATIONS = ("mup", "sp")
VARIED = ("width", "depth")


def default_optimizer() -> ConfigDict:
    """Every key of an optimizer to check.

    `name` and `options` are those of `mup_jax.<name>`, `learning_rate` is that of the base model's
    hidden matrices, times `embedding_readout_factor` that of all else, `expected_to_fail` whether
    µP is known to.
    """
    return ConfigDict(
        {
            "name": "adamw",
            "learning_rate": 1e-2,
            "embedding_readout_factor": 1.0,
            "options": ConfigDict(),
            "expected_to_fail": False,
        }
    )


def default_check() -> ConfigDict:
    """Every key that a check has.

    `vary` is "width" or "depth", of which `sizes` ascend; the first is the base. Runs are the first
    `steps` of `train` but for size, base, optimizer and seed. `optimizers` have any labels.
    """
    return ConfigDict(
        {
            "train": default_config(),
            "vary": "width",
            "sizes": (32, 64),
            "steps": 10,
            "seeds": (0, 1),
            "tolerance": 0.15,
            "optimizers": {"AdamW": default_optimizer()},
        }
    )


def run_config(
    config: ConfigDict, optimizer: ConfigDict, parametrization: str, size: int
) -> ConfigDict:
    """The training run of one optimizer at one size."""
    run = copy.deepcopy(config.train)
    run.model[config.vary] = size
    run.base = {key: run.model[key] for key in VARIED}
    if parametrization == "mup":
        run.base[config.vary] = config.sizes[0]
    for key in ("name", "learning_rate", "embedding_readout_factor", "options"):
        run.optimizer[key] = optimizer[key]
    return run


def check_config(config: ConfigDict) -> None:
    """Raises ValueError, naming key, value and remedy, before anything is loaded or compiled."""
    defaults = default_check()
    config_lib.check_known(config, defaults, "config")
    for key in defaults:
        if key not in config:
            raise ValueError(f"missing key config.{key}: the default is {defaults[key]!r}")
    if config.vary not in VARIED:
        raise ValueError(f"config.vary={config.vary!r}: choose 'width' or 'depth'")
    if not config.optimizers:
        raise ValueError("config.optimizers is empty: give at least one")
    for label, optimizer in config.optimizers.items():
        config_lib.check_keys(optimizer, default_optimizer(), f"config.optimizers.{label}")
        for size in config.sizes:
            validate(run_config(config, optimizer, "mup", size))


def first_batches(config: ConfigDict, tokens: data.Tokens, mesh: Any) -> list[data.Batch]:
    """The batches of the first steps of training, divided over the mesh."""
    stream: Iterator[data.Batch] = iter(
        data.training_batches(
            tokens.train,
            context=config.train.context,
            batch_size=config.train.batch_size,
            seed=config.train.seed,
        )
    )
    sharding = jax.NamedSharding(mesh, jax.P("data"))
    return [jax.device_put(next(stream), sharding) for _ in range(config.steps)]


def run_checks(
    config: ConfigDict, batches: list[data.Batch], vocab_size: int
) -> Iterator[tuple[str, str, mup_jax.CoordinateCheck]]:
    """Each optimizer by its label, in each parametrization, at all sizes."""
    # Of each model, what all optimizers share: drawn and compiled once.
    shared: dict[LlamaConfig, tuple[Any, Any]] = {}

    def subject(optimizer: ConfigDict, parametrization: str, size: int) -> Any:
        run = run_config(config, optimizer, parametrization, size)
        program = make_program(run, vocab_size)
        if program.model not in shared:
            init = functools.cache(lambda seed: program.init(seed).params)
            shared[program.model] = init, jax.jit(program.activations)
        init, activations = shared[program.model]
        return init, program.optimizer(Hyperparameters.of(run)), program.loss, activations

    for label, optimizer in config.optimizers.items():
        for parametrization in PARAMETRIZATIONS:
            check = mup_jax.coord_check(
                functools.partial(subject, optimizer, parametrization),
                config.sizes,
                batches,
                steps=config.steps,
                seeds=config.seeds,
                tolerance=config.tolerance,
                weight_dimension_numbers=WEIGHT_DIMENSION_NUMBERS,
            )
            yield label, parametrization, check


def record_of(check: mup_jax.CoordinateCheck) -> dict[str, Any]:
    """The check as plain data; but for the loss of the last step only."""
    last = {name: {q: x[..., -1] for q, x in of.items()} for name, of in check.activations.items()}
    return {
        "passed": check.passed,
        "activation_slopes": _plain(check.activation_slopes),
        "parameter_slopes": _plain(check.parameter_slopes),
        "activations": _plain(last),
        "parameters": _plain(check.parameters),
        "loss": _plain(check.loss),
    }


def _plain(values: Any) -> Any:
    """Nested lists and dicts of numbers with four digits; null where one is not finite."""
    if isinstance(values, dict):
        return {key: _plain(value) for key, value in values.items()}
    if isinstance(values, np.ndarray):
        return _plain(values.tolist())
    if isinstance(values, list):
        return [_plain(value) for value in values]
    return float(f"{values:.4g}") if math.isfinite(values) else finite_or_none(values)


def command_line() -> str:
    """What gives these results again."""
    flag = absl_flags.FLAGS["config"]
    overrides = config_flags.get_override_values(flag)
    return " ".join(
        [
            "python -m experiments.coord_check",
            f"--config={config_flags.get_config_filename(flag)}",
            *(f"--config.{key}={value}" for key, value in overrides.items()),
        ]
    )


def main(flags: Any) -> int:
    config, workdir = flags.config, Path(flags.workdir)
    check_config(config)
    mesh = make_mesh(config.train)
    tokens = data.load(config.train.data.source, config.train.data.tokenizer)
    batches = first_batches(config, tokens, mesh)
    workdir.mkdir(parents=True, exist_ok=True)

    checks, details = [], []
    with jax.set_mesh(mesh):
        for label, parametrization, check in run_checks(config, batches, tokens.vocab_size):
            known_to_fail = config.optimizers[label].expected_to_fail
            record = {
                "optimizer": label,
                "parametrization": parametrization,
                "expected_to_pass": parametrization == "mup" and not known_to_fail,
                **record_of(check),
            }
            checks.append(record)
            details.append(f"### {title(record)}\n\n{check}")
            print(f"{title(record)}: {verdict(record)}", flush=True)
    results = {
        "vary": config.vary,
        "sizes": config.sizes,
        "steps": config.steps,
        "tolerance": config.tolerance,
        "checks": checks,
        **provenance(config.train, tokens),
        "config": config.to_dict(),
    }
    write_coordinates(results, workdir / "figure.png")
    write_atomically(workdir / "results.json", json.dumps(results) + "\n")
    write_atomically(
        workdir / "report.md", markdown(results, "figure.png", details, command_line())
    )
    print(finding(results))
    print(f"report.md, results.json and figure.png are in {flags.workdir}")
    return int(any(check["expected_to_pass"] and not check["passed"] for check in checks))


if __name__ == "__main__":
    command.run(main, config="configs/coord_check_cpu.py", workdir="runs/coord_check_cpu")
