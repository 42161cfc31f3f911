"""How fast a run trains, against what its devices could do."""

import statistics
import time
from typing import NamedTuple

import jax

from mup_jax.models.llama import LlamaConfig, forward_flops_per_token
from mup_jax.training.config import Config
from mup_jax.training.program import Hyperparameters, Program, TrainState

# Dense bf16 operations per second of one device, by how its kind begins (vendors' data sheets).
_PEAK_FLOPS = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5": 459e12,
    "TPU v6 lite": 918e12,
    "NVIDIA L4": 121e12,
    "NVIDIA L40": 181e12,
    "NVIDIA L40S": 362e12,
    "NVIDIA A100": 312e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H200": 989e12,
    "NVIDIA GH200": 989e12,
    "NVIDIA B200": 2250e12,
    "NVIDIA GB200": 2500e12,
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


def utilization(model: LlamaConfig, config: Config, tokens_per_second: float) -> float | None:
    """Model FLOPs utilization of all devices; see `Progress`."""
    peak = peak_flops(jax.devices()[0].device_kind)
    if peak is None:
        return None
    flops_per_token = 3 * forward_flops_per_token(model, config.context)
    return tokens_per_second * flops_per_token / (peak * jax.device_count())


def step_times(
    program: Program,
    state: TrainState,
    batch: dict[str, jax.Array],
    hyperparameters: Hyperparameters,
    repeats: int = 15,
) -> dict[str, float]:
    """Seconds for loss and gradient, and the part of a step that is not spent on them.

    Medians, taken in turn. Donates `state`.
    """
    jax.block_until_ready(program.loss_and_gradient(state.params, batch))
    full, gradient_only = [], []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(program.loss_and_gradient(state.params, batch))
        gradient_only.append(time.perf_counter() - start)
        start = time.perf_counter()
        state, _ = jax.block_until_ready(program.step(state, batch, hyperparameters))
        full.append(time.perf_counter() - start)
    gradient = statistics.median(gradient_only)
    share = max(0.0, 1 - gradient / statistics.median(full))
    return {"gradient": gradient, "optimizer_share": share}
