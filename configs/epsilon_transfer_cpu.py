"""ε of three optimizers over an 8-fold width, minutes on two CPU cores.

    python -m experiments.epsilon_transfer --config=configs/epsilon_transfer_cpu.py \\
        --workdir=runs/epsilon_transfer_cpu

Expected (results/epsilon_transfer_cpu): from width 16 to 128 the largest ε that costs less than .05
nats moves by factors of .92 (AdamW), .60 (Muon-Adam) and .66 (Shampoo) by the rules, and of .64,
.32 and 1.1 where ε is constant. An ε of .04 costs Shampoo .26 nats at width 16 and .23 at width 128
by its rule, .12 where it is constant.
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
    epsilons = {"AdamW": 1e-3, "Muon-Adam": 1e-3, "Shampoo": 64 * 1e-5}
    rates = {label: RATES[label] for label in epsilons}
    options = OPTIONS | {"shampoo": OPTIONS["shampoo"] | {"relative_eps": False}}
    config.curves = epsilon_curves(rates, options, epsilons)
    return config
