"""ε of two optimizers over an 8-fold width, minutes on two CPU cores.

    python -m experiments.epsilon_transfer --config=configs/epsilon_transfer_cpu.py \\
        --workdir=runs/epsilon_transfer_cpu
"""

from ml_collections import ConfigDict

from configs.lr_transfer_cpu import OPTIONS, RATES, small_sweep
from experiments.sweeps.curves import epsilon_curves


def get_config() -> ConfigDict:
    config = small_sweep(steps=200)
    config.sizes = (16, 32, 64, 128)
    config.swept = "epsilon"
    config.step = 4.0
    config.reach = 3
    config.follow = False
    rates = {label: RATES[label] for label in ("AdamW", "Muon-Adam")}
    config.curves = epsilon_curves(rates, OPTIONS, epsilon=1e-3)
    return config
