"""Tokens per parameter of two optimizers at three budgets, minutes on two CPU cores.

    python -m experiments.compute_optimal --config=configs/compute_optimal_cpu.py \\
        --workdir=runs/compute_optimal_cpu

Expected (results/compute_optimal_cpu): 79 [70, 100] tokens per parameter with AdamW, 46 [38, 62]
with Muon, whose 90% intervals hold the noise of two seeds and the misses of the parabolas.
"""

from typing import Any

from ml_collections import ConfigDict

from configs.lr_transfer_cpu import OPTIONS, RATES, small_sweep
from experiments.isoflop.plan import default_isoflop, default_optimizer
from experiments.sweeps.curves import OPTIMIZERS


def get_config() -> ConfigDict:
    small = small_sweep(steps=200)
    config = default_isoflop()
    config.update(workers=small.workers, platform=small.platform, train=small.train)
    config.train.model.head_dim = 8
    config.train.warmup_tokens = 20 * 512
    config.budgets = (3e10, 6e10, 1.2e11)
    config.widths = (8, 16, 24, 32, 48, 64, 96)
    config.tokens_per_parameter = (0.5, 500.0)
    config.optimizers = {label: _optimizer(label) for label in ("AdamW", "Muon-Adam")}
    return config


def _optimizer(label: str) -> ConfigDict:
    name, own = OPTIMIZERS[label]
    options: dict[str, Any] = {**own, **OPTIONS.get(name, {})}
    return ConfigDict(
        {
            **default_optimizer(),
            "optimizer": name,
            "learning_rate": RATES[label],
            "weight_decay": 1e-3,
            "options": ConfigDict(options),
        }
    )
