"""The least time that a step of training can take, from what it computes, moves and sends.

Of a phase it is the longest of three: its products, each at the peak of the units that it needs;
the memory that it reads and writes once; and what it sends, within a host and beyond. The optimizer
is a phase of its own, as it begins when gradients are whole. What is left out makes steps longer:
no product runs at its peak, and factorizations run far below; activations, and whatever the
compiler writes and reads again, pass through memory; kernels and collectives take time to start.
"""

from collections.abc import Mapping
from typing import NamedTuple

from experiments.collectives import Traffic
from experiments.topologies import Topology
from mup_jax.training.throughput import peak_flops


class Peaks(NamedTuple):
    """Of one device, per second.

    Attributes:
      default: operations of float32 products in the precision that is the platform's default.
      float32: operations of float32 products with all their digits.
      memory: bytes to and from its memory.
      within: bytes to other devices of its host, or of a TPU slice.
      beyond: bytes to other hosts.
    """

    default: float
    float32: float
    memory: float
    within: float
    beyond: float


# Google Cloud's pages of each TPU; NVIDIA's data sheets of A100, H100, H200, HGX B200 and GB200
# NVL72, dense, links in one direction, and the network of their DGX: 200 or 400 Gbit/s a GPU. TPUs
# take float32 products in one pass of bfloat16, or in six for all digits.
PEAKS = {
    "v4": Peaks(275e12, 275e12 / 6, 1.23e12, 300e9, 0),
    "v5e": Peaks(197e12, 197e12 / 6, 0.82e12, 200e9, 0),
    "v5p": Peaks(459e12, 459e12 / 6, 2.77e12, 600e9, 0),
    "v6e": Peaks(918e12, 918e12 / 6, 1.64e12, 448e9, 0),
    "a100": Peaks(156e12, 19.5e12, 2.04e12, 300e9, 25e9),
    "h100": Peaks(495e12, 67e12, 3.35e12, 450e9, 50e9),
    "h200": Peaks(495e12, 67e12, 4.8e12, 450e9, 50e9),
    "b200": Peaks(1125e12, 75e12, 7.7e12, 900e9, 50e9),
    "gb200": Peaks(1250e12, 80e12, 8e12, 900e9, 50e9),
}


class Phase(NamedTuple):
    """What a device has to do in a part of a step.

    Attributes:
      flops: operations by precision, as `mup_jax.training.flops` names them.
      bytes: that pass to or from its memory.
      traffic: what it sends.
    """

    flops: Mapping[str, float]
    bytes: float
    traffic: Mapping[str, Traffic]


def least_seconds(phase: Phase, topology: Topology) -> dict[str, float]:
    """Seconds of each resource for a phase of a device: it takes at least the longest of them."""
    bf16 = peak_flops(topology.devices[0].device_kind)
    assert bf16 is not None  # of the chips above
    peaks = PEAKS[topology.chip]
    of_precision = {"16 bit": bf16, "default": peaks.default, "float32": peaks.float32}
    sent = sum(kind.bytes for kind in phase.traffic.values())
    beyond = sum(kind.beyond for kind in phase.traffic.values())
    return {
        "products": sum(flops / of_precision[key] for key, flops in phase.flops.items()),
        "memory": phase.bytes / peaks.memory,
        "links": sent / peaks.within,
        "network": beyond / peaks.beyond if beyond else 0.0,
    }
