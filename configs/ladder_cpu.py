"""A ladder of Llamas on the standard library's source, on two CPU cores.

    python -m experiments.scale_ladder --config=configs/ladder_cpu.py --workdir=runs/ladder_cpu
    python -m experiments.scale_ladder --config=configs/ladder_cpu.py:full --workdir=DIR

The first has three rungs and two seeds and takes minutes. The full one has four rungs, three seeds,
and standard parametrization beside µP, and takes an hour.

Expected of the full one (results/ladder_cpu, Python 3.11's library): validation losses of 2.48,
2.05, 1.69, 1.48 with AdamW, 2.33, 1.76, 1.49, 1.35 with Muon, 2.32, 1.79, 1.52, 1.38 with Shampoo²
and 2.31, 1.81, 1.54, 1.40 with SOAP; without rules, at the largest, 1.66, 1.42, 1.45 and 1.51.
"""

import os

from ml_collections import ConfigDict

from experiments.ladder.plan import default_ladder, default_optimizer

_SIZES = {
    "small": {"widths": (24, 48, 72), "seeds": (0, 1), "parametrizations": ("mup",)},
    "full": {"widths": (24, 48, 72, 96), "seeds": (0, 1, 2), "parametrizations": ("mup", "sp")},
}


def get_config(size: str = "small") -> ConfigDict:
    if size not in _SIZES:
        raise ValueError(f"configs/ladder_cpu.py:{size}: choose {' or '.join(_SIZES)}")
    config = default_ladder()
    config.update(_SIZES[size])
    config.depth = 2
    config.tokens_per_parameter = 4.0
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
            "weight_decay": 0.1 / 24,  # λ·D as in the paper, about
            "options": ConfigDict(chosen),
        }
        for name, chosen in options.items()
    }
    return config
