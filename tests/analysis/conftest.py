"""A made-up ladder: power laws with known multipliers, one optimum per optimizer, little noise."""

import numpy as np
import pytest

WIDTHS = (24, 32, 48, 64)
TUNED = 2.0**-6
MULTIPLIERS = {"adamw": 1.0, "muon": 1.4, "soap": 1.3, "shampoo": 1.01}


def cell(rung, optimizer, learning_rate, seed, loss):
    width = int(rung[1:])
    flops = 1e12 * (width / 24) ** 4
    return {
        "cell": f"{optimizer}-{rung}-{learning_rate:g}-{seed}",
        "rung": rung,
        "width": width,
        "depth": 2,
        "parameters": 70 * width**2,
        "tokens": 1400 * width**2,
        "steps": 2 * width**2,
        "batch_size": 8,
        "optimizer": optimizer,
        "learning_rate": learning_rate,
        "weight_decay": 0.1,
        "seed": seed,
        "flops": {"model": flops, "optimizer": flops / 99},
        "seconds": {"total": 12.0, "compile": 2.0, "optimizer_share": 0.25},
        "loss_curve": [[0, 4.5], [width, loss]],
        "validation_loss": loss,
        "coordinate_check": {"feature_change_rms": 0.3 * (width / 24) ** 0.1},
        "device": "cpu",
        "versions": {"jax": "0.10.2"},
        "corpus": {"fingerprint": "abc"},
        "config": {},
    }


@pytest.fixture
def ladder():
    """Lines of results.jsonl: grids of five at the smallest rung, checks at 2 and ½ above it."""
    random = np.random.default_rng(0)
    lines = []
    for optimizer, multiplier in MULTIPLIERS.items():
        for width in WIDTHS:
            base = width == WIDTHS[0]
            for power in range(-2, 3) if base else range(-1, 2):
                for seed in range(3 if base or power == 0 else 1):
                    flops = multiplier * (width / 24) ** 4
                    loss = 3 * flops**-0.06 * (1 + 0.01 * power**2)
                    loss *= 1 + 0.001 * random.normal()
                    rate = TUNED * 2.0**power
                    lines.append(cell(f"w{width}", optimizer, rate, seed, float(loss)))
    return lines
