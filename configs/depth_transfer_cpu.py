"""Learning rates of three optimizers over an 8-fold depth, minutes on two CPU cores.

    python -m experiments.depth_transfer --config=configs/depth_transfer_cpu.py \\
        --workdir=runs/depth_transfer_cpu

Expected (results/depth_transfer_cpu): from 3 to 24 blocks the best learning rate moves by factors
of 1.1 (#Shampoo²) and 1.6 (Muon-Adam and AdamW) with α = 1. #Shampoo²'s deeper models are better
with α = 1 and gain nothing with α = 0, where Muon-Adam's and AdamW's are worse.
"""

from ml_collections import ConfigDict

from configs.lr_transfer_cpu import OPTIONS, RATES, small_sweep
from experiments.sweeps.curves import depth_curves


def get_config() -> ConfigDict:
    config = small_sweep(steps=120)
    config.vary = "depth"
    config.sizes = (3, 6, 12, 24)
    config.reach = 1
    config.train.model.width = config.train.base.width = 32
    labels = ("AdamW", "Muon-Adam", "#Shampoo²")
    config.curves = depth_curves({label: RATES[label] for label in labels}, OPTIONS)
    return config
