"""Batch sizes of two optimizers over a factor of 64, minutes on two CPU cores.

    python -m experiments.batch_size --config=configs/batch_size_cpu.py \\
        --workdir=runs/batch_size_cpu

Expected (results/batch_size_cpu): the best batch is 2 rows of 64 tokens; one of 3.4 rows loses 0.05
nats with AdamW, one of 15 with Muon; the best learning rate goes as batch^0.48 [0.32, 0.62] with
AdamW and batch^0.35 [0.23, 0.42] with Muon.
"""

from ml_collections import ConfigDict

from configs.lr_transfer_cpu import OPTIONS, RATES, small_sweep
from experiments.sweeps.curves import batch_curves


def get_config() -> ConfigDict:
    config = small_sweep(steps=512)
    config.vary = "batch_size"
    config.sizes = (2, 8, 32, 128)
    config.carried = {"η·√κ": 0.5, "η the same": 0.0}
    config.reach = 1
    config.train.model.width = config.train.base.width = 32
    config.train.eval_batches = 256
    # Those of batches of 8 at width 16.
    rates = {label: RATES[label] / 2 for label in ("AdamW", "Muon-Adam")}
    config.curves = batch_curves(rates, OPTIONS)
    return config
