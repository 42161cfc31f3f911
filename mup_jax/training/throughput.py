"""How fast a run trains, against what its devices could do."""

from typing import NamedTuple

import jax
from ml_collections import ConfigDict

from mup_jax.models.llama import LlamaConfig, forward_flops_per_token

# Dense bf16 operations per second of one device, by how its kind begins (vendors' data sheets).
_PEAK_FLOPS = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5": 459e12,
    "TPU v6 lite": 918e12,
    "NVIDIA A100": 312e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H200": 989e12,
    "NVIDIA B200": 2250e12,
}


class Progress(NamedTuple):
    """Where a run stands.

    Attributes:
      step: of the last line of metrics.
      steps: of the whole run.
      loss: training loss in nats per token; None where it is not finite.
      tokens_per_second: since the last report, on all devices.
      mfu: model FLOPs utilization: the part of the devices' dense bf16 peak that model FLOPs make
        up (forward and twice that backward, nothing computed again counted); None where the
        peak is not known.
    """

    step: int
    steps: int
    loss: float | None
    tokens_per_second: float
    mfu: float | None


def peak_flops(device_kind: str) -> float | None:
    """Dense bf16 operations per second of a device, or None where that is not known."""
    matching = [kind for kind in _PEAK_FLOPS if device_kind.startswith(kind)]
    return _PEAK_FLOPS[max(matching, key=len)] if matching else None


def utilization(model: LlamaConfig, config: ConfigDict, tokens_per_second: float) -> float | None:
    """Model FLOPs utilization of all devices; see `Progress`."""
    peak = peak_flops(jax.devices()[0].device_kind)
    if peak is None:
        return None
    flops_per_token = 3 * forward_flops_per_token(model, config.context)
    return tokens_per_second * flops_per_token / (peak * jax.device_count())
