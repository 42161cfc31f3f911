"""Qiu et al., figure 5: weight decay over a 10-fold width, compute-optimal.

    python -m experiments.weight_decay_transfer --config=configs/weight_decay_transfer_paper.py \\
        --workdir=DIR --config.train.data.source='files:/data/fineweb/**/*.txt'

The network of configs/lr_transfer_paper.py, width 256 (the base) to 2560, at 20 tokens per
parameter, β₂ 0.98, blocks of 512 refreshed every 10 steps, λ·width in powers of two around 2^-3.
Two things differ from the paper: tokens are characters, not GPT-2's, and activations are float32.
For accelerators. Not run yet; the same sweep at a small size is
configs/weight_decay_transfer_cpu.py.
"""

from ml_collections import ConfigDict

from configs.lr_transfer_paper import RATES, paper_sweep
from experiments.sweeps.curves import weight_decay_curves

_BLOCKS = {"b1": 0.9, "b2": 0.98, "block_size": 512, "precondition_frequency": 10}
OPTIONS = {"muon": {"adam_b2": 0.98}, "shampoo": _BLOCKS, "soap": _BLOCKS}


def get_config() -> ConfigDict:
    config = paper_sweep()
    config.train.data.source = "files:data/fineweb/**/*.txt"
    config.train.model.width = config.train.base.width = 256
    config.sizes = (256, 512, 1024, 1536, 2560)
    config.tokens_per_parameter = 20.0
    config.swept = "weight_decay"
    config.follow = True
    config.carried = {"λ·width the same": -1.0, "λ the same": 0.0}
    config.also = (0.0,)
    rates = {label: RATES[label] for label in ("Muon-Adam", "#Shampoo²", "SOAP")}
    config.curves = weight_decay_curves(rates, OPTIONS, weight_decay=2**-3 / 256)
    return config
