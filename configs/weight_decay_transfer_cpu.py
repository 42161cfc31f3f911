"""Weight decay of two optimizers over an 8-fold width, minutes on two CPU cores.

    python -m experiments.weight_decay_transfer --config=configs/weight_decay_transfer_cpu.py \\
        --workdir=runs/weight_decay_transfer_cpu

Expected (results/weight_decay_transfer_cpu): at a fixed number of steps the best λ hardly moves
from width 16 to 128, by factors of .65 (AdamW) and .49 (Muon-Adam); λ ∝ 1/width would be .125. It
is worth .02 (AdamW) and .01 nats at width 128.
"""

from ml_collections import ConfigDict

from configs.lr_transfer_cpu import OPTIONS, RATES, small_sweep
from experiments.sweeps.curves import weight_decay_curves


def get_config() -> ConfigDict:
    config = small_sweep(steps=500)
    config.sizes = (16, 32, 64, 128)
    config.swept = "weight_decay"
    config.carried = {"λ·width the same": -1.0, "λ the same": 0.0}
    config.also = (0.0,)
    rates = {label: RATES[label] for label in ("AdamW", "Muon-Adam")}
    config.curves = weight_decay_curves(rates, OPTIONS, weight_decay=4e-3)
    return config
