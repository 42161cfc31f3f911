import jax
import pytest

from mup_jax.models.llama import LlamaConfig, forward_flops_per_token
from mup_jax.training import throughput
from mup_jax.training.throughput import peak_flops, utilization
from tests.training.tiny import tiny_config

MODEL = LlamaConfig(vocab_size=96, width=16, depth=1, head_dim=8)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("TPU v4", 275e12),
        ("TPU v5 lite", 197e12),
        ("TPU v5", 459e12),
        ("TPU v5p", 459e12),
        ("TPU v6 lite", 918e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA B200", 2250e12),
        ("NVIDIA GB200", 2500e12),
    ],
)
def test_peak_is_that_of_the_longest_match(kind, expected):
    assert peak_flops(kind) == expected


@pytest.mark.parametrize("kind", ["cpu", "TPU v2", "NVIDIA GeForce RTX 4090", "", "v5", "tpu v5"])
def test_peak_of_unknown_devices(kind):
    assert peak_flops(kind) is None


def test_utilization_is_of_all_devices(monkeypatch):
    config, kinds = tiny_config(), []
    monkeypatch.setattr(throughput, "peak_flops", lambda kind: kinds.append(kind) or 1e9)
    # Forward and twice that backward.
    per_second = 1000 * 3 * forward_flops_per_token(MODEL, config.context)
    assert utilization(MODEL, config, 1000.0) == pytest.approx(
        per_second / (jax.device_count() * 1e9)
    )
    assert kinds == [jax.devices()[0].device_kind]


def test_utilization_where_the_peak_is_not_known(monkeypatch):
    monkeypatch.setattr(throughput, "peak_flops", lambda kind: None)
    assert utilization(MODEL, tiny_config(), 1000.0) is None
