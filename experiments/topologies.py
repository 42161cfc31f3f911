"""TPU slices and hosts of GPUs that are not there: devices for the compiler, and their memory.

TPUs need libtpu (`pip install 'jax[tpu]'`), and GPUs the extra `plan-gpu`, which needs no driver.
Both need JAX_PLATFORMS=cpu.
"""

import math
import os
import re
from typing import Any, NamedTuple

import jaxlib
from jax.experimental import topologies

_GIBIBYTE = 2**30
# What a process has on a GPU before its first array.
_CONTEXT = 2**29


class _Tpu(NamedTuple):
    accelerator: str  # how Cloud TPU names slices of it, before the number of cores
    cores: int
    gigabytes: float  # what the runtime leaves to programs


class _Gpu(NamedTuple):
    """What the driver says of a GPU, for the compiler."""

    name: str
    capability: tuple[int, int]
    cores: int
    units_per_core: int  # for float32
    gigahertz: float
    bytes_per_second: float  # of its memory
    bytes: float  # of its memory
    cache_mebibytes: int
    kibibytes_per_core: int  # that the threads of a core share


_TPUS = {
    "v4": _Tpu("v4", 2, 30.7),
    "v5e": _Tpu("v5litepod", 1, 15.7),
    "v5p": _Tpu("v5p", 2, 95.7),
    "v6e": _Tpu("v6e", 1, 31.2),
}
_GPUS = {
    "a100": _Gpu("NVIDIA A100-SXM4-80GB", (8, 0), 108, 64, 1.41, 2.04e12, 85.1e9, 40, 164),
    "h100": _Gpu("NVIDIA H100 80GB HBM3", (9, 0), 132, 128, 1.98, 3.35e12, 84.9e9, 50, 228),
    "h200": _Gpu("NVIDIA H200", (9, 0), 132, 128, 1.98, 4.8e12, 150.1e9, 50, 228),
    "b200": _Gpu("NVIDIA B200", (10, 0), 148, 128, 1.965, 7.67e12, 191.5e9, 126, 228),
    "gb200": _Gpu("NVIDIA GB200", (10, 0), 152, 128, 2.062, 7.93e12, 197.9e9, 129, 228),
}

CHIPS = (*_TPUS, *_GPUS)

# In the compiler's text form, of what it is told about a GPU. What no chip here differs in, such as
# threads of a block, is CUDA's for all of them.
_TARGET = """
gpu_device_info {{
  threads_per_block_limit: 1024
  threads_per_warp: 32
  threads_per_core_limit: 2048
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  thread_dim_limit_x: 1024
  thread_dim_limit_y: 1024
  thread_dim_limit_z: 64
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: {shared_per_block}
  shared_memory_per_core: {shared}
  core_count: {gpu.cores}
  fpus_per_core: {gpu.units_per_core}
  clock_rate_ghz: {gpu.gigahertz}
  memory_bandwidth: {gpu.bytes_per_second:.0f}
  device_memory_size: {gpu.bytes:.0f}
  l2_cache_size: {cache}
  cuda_compute_capability {{ major: {gpu.capability[0]} minor: {gpu.capability[1]} }}
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 patch: 0 }}
runtime_version {{ major: 12 minor: 8 patch: 0 }}
device_description_str: "{gpu.name}"
"""


class Topology(NamedTuple):
    """Devices that are not there.

    Attributes:
      name: its text, as "h100:2x8".
      platform: "tpu" or "gpu".
      sizes: chips along each side of a TPU slice; hosts, and GPUs of each.
      devices: for a mesh; nothing can run on them.
      gigabytes: 2³⁰ bytes of memory that a program can have on a device.
    """

    name: str
    platform: str
    sizes: tuple[int, ...]
    devices: list[Any]
    gigabytes: float

    @property
    def chip(self) -> str:
        return self.name.partition(":")[0]

    @property
    def per_host(self) -> int:
        """How many devices are connected without a network: all of a TPU slice."""
        return self.sizes[-1] if self.platform == "gpu" else len(self.devices)


def find_topology(text: str) -> Topology:
    """The topology of a text like "v5e:8x8", a TPU slice, or "h100:2x8", two hosts of eight GPUs.

    Raises:
      ValueError: an unknown chip or another text, or the chip's compiler is missing.
    """
    chip, _, sides = text.partition(":")
    is_known = re.fullmatch(r"[1-9]\d*(x[1-9]\d*){1,2}", sides)
    sizes = tuple(map(int, sides.split("x"))) if is_known else ()
    if chip in _TPUS and sizes:
        return _tpu_slice(text, _TPUS[chip], sizes)
    if chip in _GPUS and len(sizes) == 2:
        return _gpu_hosts(text, _GPUS[chip], sizes)
    raise ValueError(
        f"--topology={text}: give a TPU slice like v5e:8x8, of {', '.join(_TPUS)}, or hosts of "
        f"GPUs like h100:2x8, of {', '.join(_GPUS)}"
    )


def _tpu_slice(text: str, tpu: _Tpu, sizes: tuple[int, ...]) -> Topology:
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    accelerator = f"{tpu.accelerator}-{math.prod(sizes) * tpu.cores}"
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", accelerator)
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    devices = _devices(text, "pip install 'jax[tpu]'", text, platform="tpu")
    return Topology(text, "tpu", sizes, devices, tpu.gigabytes)


def _gpu_hosts(text: str, gpu: _Gpu, sizes: tuple[int, ...]) -> Topology:
    shared = gpu.kibibytes_per_core << 10
    target = _TARGET.format(
        gpu=gpu, cache=gpu.cache_mebibytes << 20, shared=shared, shared_per_block=shared - 1024
    )
    hosts, gpus = sizes
    devices = _devices(
        text,
        f"pip install 'mup_jax[plan-gpu]' jax-cuda13-plugin=={jaxlib.__version__}",
        platform="cuda",
        topology=f"1x{hosts}x{gpus}",
        target_config=target,
    )
    return Topology(text, "gpu", sizes, devices, (gpu.bytes - _CONTEXT) / _GIBIBYTE)


def _devices(text: str, install: str, *args: Any, **options: Any) -> list[Any]:
    try:
        return list(topologies.get_topology_desc(*args, **options).devices)
    except Exception as error:  # whatever a compiler raises
        raise ValueError(
            f"--topology={text} cannot be had ({type(error).__name__}: {error}): it needs "
            f"`{install}` and JAX_PLATFORMS=cpu"
        ) from error
