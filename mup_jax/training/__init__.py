"""Mesh, train step, loop, checkpoints and metrics.

Names are imported when they are first used, so that `Program` needs neither Grain nor
ml_collections.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mup_jax.training.checkpoint import CheckpointError
    from mup_jax.training.config import default_config, identity, validate
    from mup_jax.training.loop import Preempted, claim_workdir, train
    from mup_jax.training.program import Program
    from mup_jax.training.vectorized import train_vectorized

__all__ = [
    "CheckpointError",
    "Preempted",
    "Program",
    "claim_workdir",
    "default_config",
    "identity",
    "train",
    "train_vectorized",
    "validate",
]

_MODULES = {
    "CheckpointError": "checkpoint",
    "Preempted": "loop",
    "Program": "program",
    "claim_workdir": "loop",
    "default_config": "config",
    "identity": "config",
    "train": "loop",
    "train_vectorized": "vectorized",
    "validate": "config",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
