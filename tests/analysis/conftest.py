"""A made-up ladder: power laws with known multipliers, one optimum per optimizer, little noise."""

import numpy as np
import pytest

WIDTHS = (24, 32, 48, 64)
TUNED = 2.0**-6
MULTIPLIERS = {"adamw": 1.0, "muon": 1.4, "soap": 1.3, "shampoo": 1.01}


def cell(rung, optimizer, learning_rate, seed, loss, parametrization="mup", weight_decay=0.1):
    width = int(rung[1:])
    flops = 1e12 * (width / 24) ** 4
    return {
        "cell": f"{optimizer}-{parametrization}-{rung}-{learning_rate:g}-{weight_decay:g}-{seed}",
        "rung": rung,
        "parametrization": parametrization,
        "width": width,
        "depth": 2,
        "parameters": 70 * width**2,
        "tokens": 1400 * width**2,
        "steps": 2 * width**2,
        "batch_size": 8,
        "optimizer": optimizer,
        "learning_rate": learning_rate,
        "weight_decay": weight_decay,
        "seed": seed,
        "flops": {"model": flops, "optimizer": flops / 99},
        "seconds": {"total": 12.0, "compile": 2.0, "gradient": 3e-3, "optimizer_share": 0.25},
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


def loss_in_sp(width):
    """Of Muon: its multiplier is 1.4 at the smallest rung, and 0.7 at the largest."""
    multiplier = 1.4 * 0.5 ** (np.log(width / 24) / np.log(64 / 24))
    return 3 * (multiplier * (width / 24) ** 4) ** -0.06


@pytest.fixture
def ladder_with_sp(ladder):
    """And Muon in SP, above the base, with checks of the weight decay in µP at the largest rung."""
    random = np.random.default_rng(1)
    lines = list(ladder)
    for width in WIDTHS[1:]:
        for seed in range(3):
            loss = loss_in_sp(width) * (1 + 0.001 * random.normal())
            lines.append(cell(f"w{width}", "muon", TUNED, seed, float(loss), "sp"))
    transferred = next(
        line
        for line in lines
        if (line["optimizer"], line["rung"], line["learning_rate"], line["seed"])
        == ("muon", "w64", TUNED, 0)
    )
    for factor, gap in ((0.5, 0.02), (2.0, -0.01)):
        loss = transferred["validation_loss"] + gap
        lines.append(cell("w64", "muon", TUNED, 0, loss, weight_decay=0.1 * factor))
    return lines
