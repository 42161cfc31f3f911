"""Where else the lines of metrics.jsonl go: TensorBoard, and Weights & Biases."""

import contextlib
import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from mup_jax.training import distributed, identity
from mup_jax.training.metrics import Line, Observer


@contextlib.contextmanager
def opened(
    config: ConfigDict, workdir: Path, tensorboard: bool, wandb_project: str
) -> Iterator[list[Observer]]:
    """The observers asked for, in the first process; they are closed at the end.

    Raises:
      ValueError: a package is missing.
    """
    for package, flag in (("tensorboardX", tensorboard), ("wandb", wandb_project)):
        if flag:
            _require(package)
    with contextlib.ExitStack() as stack:
        observers: list[Observer] = []
        if distributed.is_first() and tensorboard:
            observers.append(_to_tensorboard(workdir, stack))
        if distributed.is_first() and wandb_project:
            observers.append(_to_wandb(config, workdir, wandb_project, stack))
        yield observers


def _require(package: str) -> None:
    try:
        importlib.import_module(package)
    except ImportError:
        raise ValueError(
            f"--{package.removesuffix('X')} needs a package: pip install {package}"
        ) from None


def _numbers(line: Line) -> dict[str, Any]:
    return {key: x for key, x in line.items() if key != "step" and x is not None}


def _to_tensorboard(workdir: Path, stack: contextlib.ExitStack) -> Observer:
    from tensorboardX import SummaryWriter

    writer = SummaryWriter(str(workdir / "tensorboard"))
    stack.callback(writer.close)

    def observe(line: Line) -> None:
        for key, value in _numbers(line).items():
            writer.add_scalar(key, value, line["step"])

    return observe


def _to_wandb(
    config: ConfigDict, workdir: Path, project: str, stack: contextlib.ExitStack
) -> Observer:
    import wandb

    workdir.mkdir(parents=True, exist_ok=True)
    # A run that goes on is the same one there.
    run = wandb.init(
        project=project,
        id=identity(config),
        resume="allow",
        config=config.to_dict(),
        dir=workdir,
    )
    stack.push(lambda kind, *_: run.finish(exit_code=int(kind is not None)))
    return lambda line: run.log(_numbers(line), step=line["step"])
