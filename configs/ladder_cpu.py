"""A ladder of three Llamas on the standard library's source, minutes on two CPU cores.

python -m experiments.scale_ladder --config=configs/ladder_cpu.py --workdir=runs/ladder_cpu
"""

import os

from ml_collections import ConfigDict

from experiments.ladder.plan import default_ladder


def get_config() -> ConfigDict:
    config = default_ladder()
    config.widths = (24, 40, 64)
    config.depth = 2
    config.tokens_per_parameter = 8.0
    config.seeds = (0, 1)
    config.workers = min(os.cpu_count() or 1, 8)
    config.platform = "cpu"

    train = config.train
    train.context = 128
    train.batch_size = 4
    train.warmup_tokens = 20 * 512
    train.checkpoint_every = 500

    # Embedding and readout of the matrix optimizers have Adam's tuned learning rate.
    adam = {"adam_learning_rate": 8e-3}
    grids = {
        "adamw": ((4e-3, 8e-3, 1.6e-2), {}),
        "muon": ((8e-3, 1.6e-2, 3.2e-2), adam),
        "shampoo": ((8e-3, 1.6e-2, 3.2e-2), adam),
        "soap": ((8e-3, 1.6e-2, 3.2e-2), adam),
    }
    config.optimizers = {
        name: {"learning_rates": rates, "weight_decay": 0.0, "options": options}
        for name, (rates, options) in grids.items()
    }
    return config
