"""Mesh, train step, loop, checkpoints and metrics."""

from mup_jax.training.checkpoint import CheckpointError
from mup_jax.training.config import default_config, identity, validate
from mup_jax.training.loop import Preempted, claim_workdir, train
from mup_jax.training.vectorized import train_vectorized

__all__ = [
    "CheckpointError",
    "Preempted",
    "claim_workdir",
    "default_config",
    "identity",
    "train",
    "train_vectorized",
    "validate",
]
