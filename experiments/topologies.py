"""TPU slices that are not there: their devices for the compiler, and the memory of their chips.

Needs libtpu (`pip install 'jax[tpu]'`), and JAX_PLATFORMS=cpu.
"""

import collections
import os
import re
from typing import Any, NamedTuple

from jax.experimental import topologies

COLLECTIVES = "all-to-all|all-gather|all-reduce|collective-permute|reduce-scatter"


class _Chip(NamedTuple):
    accelerator: str  # how Cloud TPU names slices of it, before the number of cores
    cores: int
    gigabytes: float  # what the runtime leaves to programs


_CHIPS = {
    "v4": _Chip("v4", 2, 30.7),
    "v5e": _Chip("v5litepod", 1, 15.7),
    "v5p": _Chip("v5p", 2, 95.7),
    "v6e": _Chip("v6e", 1, 31.2),
}


class Slice(NamedTuple):
    """A TPU slice.

    Attributes:
      sizes: chips along each side.
      devices: for a mesh; nothing can run on them.
      gigabytes: 2³⁰ bytes of memory that a program can have on a device.
    """

    sizes: tuple[int, ...]
    devices: list[Any]
    gigabytes: float


def tpu_slice(topology: str) -> Slice:
    """The slice of a topology like "v5e:8x8".

    Raises:
      ValueError: an unknown chip or another text, or libtpu is missing.
    """
    chip, _, sides = topology.partition(":")
    if chip not in _CHIPS or not re.fullmatch(r"\d+(x\d+){1,2}", sides):
        raise ValueError(f"--topology={topology}: give one like v5e:8x8, of {', '.join(_CHIPS)}")
    sizes = tuple(map(int, sides.split("x")))
    accelerator, cores, gigabytes = _CHIPS[chip]
    chips = 1
    for size in sizes:
        chips *= size
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", f"{accelerator}-{chips * cores}")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    try:
        devices = topologies.get_topology_desc(topology, platform="tpu").devices
    except Exception as error:
        raise ValueError(
            f"--topology={topology} cannot be had ({type(error).__name__}: {error}): it needs "
            "`pip install 'jax[tpu]'` and JAX_PLATFORMS=cpu"
        ) from error
    return Slice(sizes, list(devices), gigabytes)


def count_collectives(text: str) -> dict[str, int]:
    """How often each collective stands in a compiled program; bodies of loops count once."""
    found = re.findall(rf" ({COLLECTIVES})(-start)?\(", text)
    return dict(sorted(collections.Counter(operation for operation, _ in found).items()))
