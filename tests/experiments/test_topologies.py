"""TPU slices that are not there."""

import importlib.util
import os

import pytest

from experiments import topologies
from experiments.topologies import count_collectives, tpu_slice

PROGRAM = """
HloModule jit_step, entry_computation_layout={(f32[8]{0})->f32[8]{0}}

%body (x: f32[8]) -> f32[8] {
  %x = f32[8]{0} parameter(0)
  ROOT %all-reduce.1 = f32[8]{0} all-reduce(%x), replica_groups={}, to_apply=%add
}

ENTRY %main (x: f32[8]) -> f32[8] {
  %x = f32[8]{0} parameter(0)
  %ag-start = (f32[8]{0}, f32[64]{0}) all-gather-start(%x), dimensions={0}
  %ag-done = f32[64]{0} all-gather-done(%ag-start)
  %rs = f32[8]{0} reduce-scatter(%ag-done), dimensions={0}, to_apply=%add
  %a2a = (f32[4]{0}, f32[4]{0}) all-to-all(%x, %x)
  %a2a.2 = f32[8]{0} all-to-all(%x), dimensions={0}
  %cp = f32[8]{0} collective-permute-start(%x), source_target_pairs={{0,1}}
  %cp-done = f32[8]{0} collective-permute-done(%cp)
  %fusion = f32[8]{0} fusion(%x), kind=kLoop, calls=%fused, metadata={op_name="all-gather"}
  ROOT %tuple = f32[8]{0} while(%rs), body=%body
}
"""


@pytest.fixture
def environment(monkeypatch):
    """Without what a slice sets, which is forgotten again."""
    names = ("TPU_SKIP_MDS_QUERY", "TPU_ACCELERATOR_TYPE", "TPU_WORKER_HOSTNAMES")
    for name in names:
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    return lambda: [os.environ.get(name) for name in names]


def test_count_collectives():
    assert count_collectives(PROGRAM) == {
        "all-gather": 1,
        "all-reduce": 1,
        "all-to-all": 2,
        "collective-permute": 1,
        "reduce-scatter": 1,
    }
    assert count_collectives("ROOT %dot = f32[8,8]{1,0} dot(%x, %y)") == {}


@pytest.mark.parametrize(
    "topology", ["", "v5e", "v5e:", "v5e:8", "v5e:8x", "v5e:8xa", "v5e:2x2x2x2", "v3:2x2", "8x8"]
)
def test_bad_topologies(environment, topology):
    with pytest.raises(ValueError, match=f"--topology={topology}: give one like v5e:8x8, of v4, "):
        tpu_slice(topology)
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
    of_slice = tpu_slice(topology)
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
        tpu_slice("v5e:2x2")


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu")
def test_slice(environment):
    of_slice = tpu_slice("v5e:2x4")
    assert of_slice.sizes == (2, 4)
    assert len(of_slice.devices) == 8
    assert {device.platform for device in of_slice.devices} == {"tpu"}
