"""What there is to know of a finished run."""

import functools
import importlib.metadata
import sys
from collections.abc import Sequence
from typing import Any

import jax

from mup_jax.data import Tokens
from mup_jax.models.llama import forward_flops_per_token, num_parameters
from mup_jax.optimizers.from_file import label_of
from mup_jax.training.config import Config, describe_rule
from mup_jax.training.program import Program

_LOSS_CURVE_POINTS = 100
_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")


def run_record(
    config: Config, program: Program, tokens: Tokens, lines: Sequence[dict[str, Any]]
) -> dict[str, Any]:
    """Sizes, losses, FLOPs and provenance of a run, from its configuration and metrics.

    Losses are in nats per token. The validation loss is None where the run gave up, or where it is
    not finite; FLOPs are those of the whole run.
    """
    n_tokens = program.steps * config.batch_size * config.context
    forward_flops = forward_flops_per_token(program.model, config.context)
    stride = -(-len(lines) // _LOSS_CURVE_POINTS)
    changes = [line["feature_change_rms"] for line in lines if "feature_change_rms" in line]
    return {
        "width": config.model.width,
        "depth": config.model.depth,
        "parameters": num_parameters(program.model),
        "tokens": n_tokens,
        "steps": program.steps,
        "batch_size": config.batch_size,
        "optimizer": label_of(config.optimizer.name),
        "rule": describe_rule(config),
        "learning_rate": config.optimizer.learning_rate,
        "embedding_readout_factor": config.optimizer.embedding_readout_factor,
        "weight_decay": config.optimizer.weight_decay,
        "seed": config.seed,
        "validation_loss": lines[-1].get("validation_loss"),
        "skipped_steps": lines[-1]["skipped"],
        "loss_curve": [[line["step"], line["loss"]] for line in lines[::stride]],
        "coordinate_check": {"feature_change_rms": changes[0]} if changes else None,
        "flops": {
            "model": 3 * forward_flops * n_tokens,
            "optimizer": program.optimizer_flops * program.steps
            if config.measure_optimizer
            else None,
        },
        **provenance(config, tokens),
        "config": config.to_dict(),
    }


def provenance(config: Config, tokens: Tokens) -> dict[str, Any]:
    """Device, versions and text: what else the numbers depend on."""
    return {
        "device": jax.devices()[0].device_kind,
        "versions": _versions(),
        "corpus": {
            "source": config.data.source,
            "tokenizer": config.data.tokenizer,
            "fingerprint": tokens.fingerprint,
            "training_tokens": len(tokens.train),
            "validation_tokens": len(tokens.validation),
        },
    }


@functools.cache  # a sweep asks again and again
def _versions() -> dict[str, str]:
    return {
        "python": sys.version.split()[0],
        **{name: importlib.metadata.version(name) for name in _PACKAGES},
    }
