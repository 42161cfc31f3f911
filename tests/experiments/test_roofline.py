"""The least time of a step, by hand."""

from types import SimpleNamespace

import pytest

from experiments.collectives import Traffic
from experiments.ladder.roofline import PEAKS, Phase, least_seconds
from experiments.topologies import CHIPS, Topology

H100 = SimpleNamespace(device_kind="NVIDIA H100 80GB HBM3")
HOSTS = Topology("h100:2x8", "gpu", (2, 8), [H100] * 16, 78.6)


def test_every_chip_has_peaks():
    assert PEAKS.keys() == set(CHIPS)


def test_each_resource():
    flops = {"16 bit": 989e12, "default": 495e12, "float32": 134e12}
    traffic = {"all-gather": Traffic(3, 900e9, 25e9), "all-to-all": Traffic(1, 450e9, 0.0)}
    seconds = least_seconds(Phase(flops, 6.7e12, traffic), HOSTS)
    assert seconds == pytest.approx({"products": 4, "memory": 2, "links": 3, "network": 0.5})


def test_a_tpu_slice_needs_no_network():
    v5e = SimpleNamespace(device_kind="TPU v5 lite")
    slice_ = Topology("v5e:4x4", "tpu", (4, 4), [v5e] * 16, 15.7)
    assert slice_.per_host == 16
    seconds = least_seconds(Phase({"float32": 197e12}, 0, {}), slice_)
    assert seconds == pytest.approx({"products": 6, "memory": 0, "links": 0, "network": 0})
