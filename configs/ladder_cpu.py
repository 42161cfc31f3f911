"""A ladder of Llamas on the standard library's source, on two CPU cores.

    python -m experiments.scale_ladder --config=configs/ladder_cpu.py --workdir=runs/ladder_cpu
    python -m experiments.scale_ladder --config=configs/ladder_cpu.py:full --workdir=DIR

Both have three rungs and two seeds. The first takes three or four minutes; the full one has larger
models, standard parametrization beside µP, and takes an hour.

Expected of the first, with Python 3.11's library: validation losses of 2.36, 2.27, 2.18 with AdamW,
2.28, 2.16, 2.04 with Muon, 2.31, 2.21, 2.09 with Shampoo² and 2.28, 2.20, 2.09 with SOAP.
Of the full one (results/ladder_cpu): 2.08, 1.78, 1.54 with AdamW, 1.84, 1.56, 1.40 with Muon, 1.88,
1.59, 1.44 with Shampoo² and 1.85, 1.60, 1.44 with SOAP; without rules, at the largest, 1.60, 1.42,
1.48 and 1.48.
"""

import os

from ml_collections import ConfigDict

from experiments.ladder.plan import default_ladder, default_optimizer

_SIZES = {
    "small": {
        "widths": (32, 40, 48),
        "tokens_per_parameter": 2.0,
        "tuning_seeds": 2,
        "parametrizations": ("mup",),
    },
    "full": {
        "widths": (48, 72, 96),
        "tokens_per_parameter": 3.0,
        "parametrizations": ("mup", "sp"),
    },
}
_HEAD_DIMS = {"small": 8, "full": 24}
_CONTEXTS = {"small": 64, "full": 128}
_BLOCK_SIZES = {"small": 16, "full": 24}
# The middle of each grid, whose values are twice as large from one to the next.
_MIDDLES = {
    "small": {
        "adamw": (8e-3, 8.0),
        "muon": (2.4e-2, 3.0),
        "shampoo": (1.6e-2, 4.0),
        "soap": (1.2e-2, 6.0),
    },
    "full": {
        "adamw": (1.6e-2, 4.0),
        "muon": (3.2e-2, 2.0),
        "shampoo": (1.6e-2, 4.0),
        "soap": (1.6e-2, 4.0),
    },
}


def get_config(size: str = "small") -> ConfigDict:
    if size not in _SIZES:
        raise ValueError(f"no variant {size!r}: choose {' or '.join(_SIZES)}")
    config = default_ladder()
    config.update(_SIZES[size])
    config.depth = 2
    config.seeds = (0, 1)
    config.decay_checks = ()
    config.workers = min(os.cpu_count() or 1, 8)
    config.platform = "cpu"
    # One program of many runs takes longer to compile than these take to train.
    config.vectorized = False

    train = config.train
    train.model.head_dim = _HEAD_DIMS[size]
    train.context = _CONTEXTS[size]
    train.batch_size = 4
    train.warmup_tokens = 20 * 512
    train.eval_batches = 64
    # A run of seconds begins again.
    train.checkpoint_every = 500 if size == "full" else 0

    blocks = {"block_size": _BLOCK_SIZES[size]}
    options = {"adamw": {}, "muon": {}, "shampoo": {"b1": 0.95, **blocks}, "soap": blocks}
    config.optimizers = {
        name: {
            **default_optimizer(),
            "learning_rates": (rate / 2, rate, 2 * rate),
            "embedding_readout_factors": (factor / 2, factor, 2 * factor),
            "weight_decay": 0.1 / config.widths[0],  # λ·D as in the paper, about
            "options": ConfigDict(options[name]),
        }
        for name, (rate, factor) in _MIDDLES[size].items()
    }
    return config
