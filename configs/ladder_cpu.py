"""A ladder of three Llamas on the standard library's source, minutes on two CPU cores.

    python -m experiments.scale_ladder --config=configs/ladder_cpu.py --workdir=runs/ladder_cpu

Expected (results/ladder_cpu, Python 3.11's library): validation losses of 2.50, 2.08, 1.72 with
AdamW, 2.35, 1.78, 1.49 with Muon, 2.32, 1.81, 1.53 with Shampoo² and 2.32, 1.80, 1.55 with SOAP.
"""

import os

from ml_collections import ConfigDict

from experiments.ladder.plan import default_ladder, default_optimizer


def get_config() -> ConfigDict:
    config = default_ladder()
    config.widths = (24, 48, 72)
    config.depth = 2
    config.tokens_per_parameter = 4.0
    config.seeds = (0, 1)
    config.workers = min(os.cpu_count() or 1, 8)
    config.platform = "cpu"

    train = config.train
    train.model.head_dim = 24
    train.context = 128
    train.batch_size = 4
    train.warmup_tokens = 20 * 512
    train.eval_batches = 64
    train.checkpoint_every = 500

    # Embedding and readout of Muon and Shampoo: Adam, at a learning rate of its own.
    adam = {"adam_learning_rate": 3.2e-2}
    blocks = {"block_size": 24}
    options = {
        "adamw": {},
        "muon": adam,
        "shampoo": adam | blocks,
        "soap": blocks | {"exact_steps": 50},
    }
    config.optimizers = {
        name: {
            **default_optimizer(),
            "learning_rates": (8e-3, 1.6e-2, 3.2e-2),
            "options": ConfigDict(chosen),
        }
        for name, chosen in options.items()
    }
    return config
