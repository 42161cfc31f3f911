"""TPU slices and hosts of GPUs that are not there."""

import importlib.util
import os

import pytest

from experiments import topologies
from experiments.topologies import find_topology


@pytest.fixture
def environment(monkeypatch):
    """Without what a slice sets, which is forgotten again."""
    names = ("TPU_SKIP_MDS_QUERY", "TPU_ACCELERATOR_TYPE", "TPU_WORKER_HOSTNAMES")
    for name in names:
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    return lambda: [os.environ.get(name) for name in names]


@pytest.mark.parametrize(
    "topology",
    [
        "", "v5e", "v5e:", "v5e:8", "v5e:8x", "v5e:8xa", "v5e:2x2x2x2", "v3:2x2", "8x8",
        "h100:8", "h100:0x8", "h100:1x2x8", "v100:1x8",
    ],
)  # fmt: skip
def test_bad_topologies(environment, topology):
    with pytest.raises(ValueError, match=f"--topology={topology}: give a TPU slice like v5e"):
        find_topology(topology)
    assert environment() == [None] * 3


@pytest.mark.parametrize(
    ("topology", "accelerator", "sizes"),
    [
        ("v5e:8x8", "v5litepod-64", (8, 8)),
        ("v6e:2x4", "v6e-8", (2, 4)),
        # Two cores a chip.
        ("v4:2x2x4", "v4-32", (2, 2, 4)),
        ("v5p:4x4x4", "v5p-128", (4, 4, 4)),
    ],
)
def test_what_the_compiler_is_told(environment, monkeypatch, topology, accelerator, sizes):
    class Description:
        devices = ("a device",)

    def describe(name, platform):
        assert (name, platform) == (topology, "tpu")
        return Description

    monkeypatch.setattr(topologies.topologies, "get_topology_desc", describe)
    of_slice = find_topology(topology)
    assert (of_slice.sizes, of_slice.devices) == (sizes, ["a device"])
    assert of_slice.gigabytes > 15
    assert environment() == ["1", accelerator, "localhost"]


def test_slice_that_cannot_be_had(environment, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("no libtpu")

    monkeypatch.setattr(topologies.topologies, "get_topology_desc", fail)
    with pytest.raises(
        ValueError, match=r"cannot be had \(RuntimeError: no libtpu\): .*jax\[tpu\]"
    ):
        find_topology("v5e:2x2")


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu")
def test_slice(environment):
    of_slice = find_topology("v5e:2x4")
    assert of_slice.sizes == (2, 4)
    assert len(of_slice.devices) == 8
    assert {device.platform for device in of_slice.devices} == {"tpu"}


def test_what_the_compiler_is_told_of_gpus(monkeypatch):
    class Description:
        devices = ("a device",)

    told = {}
    describe = lambda **options: told.update(options) or Description
    monkeypatch.setattr(topologies.topologies, "get_topology_desc", describe)
    hosts = find_topology("h100:2x8")
    assert (hosts.name, hosts.platform, hosts.sizes) == ("h100:2x8", "gpu", (2, 8))
    assert (told["platform"], told["topology"]) == ("cuda", "1x2x8")
    assert 'description_str: "NVIDIA H100 80GB HBM3"' in told["target_config"]
    assert "device_memory_size: 84900000000" in told["target_config"]
    assert hosts.gigabytes == pytest.approx(78.6, abs=0.1)
    assert find_topology("gb200:1x4").gigabytes > 180


def test_hosts_that_cannot_be_had(monkeypatch):
    def fail(**_):
        raise RuntimeError("no plugin")

    monkeypatch.setattr(topologies.topologies, "get_topology_desc", fail)
    with pytest.raises(ValueError, match=r"cannot be had \(RuntimeError: no plugin\): .*plan-gpu"):
        find_topology("a100:1x8")
