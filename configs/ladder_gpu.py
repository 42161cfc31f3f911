"""A ladder of four Llamas for one large GPU, 0.3M to 4M parameters.

    python -m experiments.scale_ladder --config=configs/ladder_gpu.py --workdir=DIR

On the standard library's source, in bfloat16, in µP and in standard parametrization; sized for half
an hour on an H100 by its FLOPs and the number of its programs. Not run yet: look at what
`--mode=plan` says on yours first.
"""

from ml_collections import ConfigDict

from experiments.ladder.plan import default_ladder, default_optimizer

BASE_WIDTH = 64


def get_config() -> ConfigDict:
    config = default_ladder()
    config.widths = (BASE_WIDTH, 128, 192, 256)
    config.depth = 4
    config.tokens_per_parameter = 8.0
    config.seeds = (0, 1)
    config.parametrizations = ("mup", "sp")

    train = config.train
    train.model.head_dim = 64
    train.update(context=256, batch_size=64, dtype="bfloat16", clip_norm=1.0)
    train.update(warmup_tokens=10 * 64 * 256, eval_batches=32, checkpoint_every=500)

    blocks = {"block_size": BASE_WIDTH}
    options = {"adamw": {}, "muon": {}, "shampoo": {"b1": 0.95, **blocks}, "soap": blocks}
    config.optimizers = {
        name: {
            **default_optimizer(),
            "learning_rates": (4e-3, 8e-3, 1.6e-2),
            "embedding_readout_factors": (1.0, 2.0, 4.0),
            "weight_decay": 0.1 / BASE_WIDTH,
            "options": ConfigDict(chosen),
        }
        for name, chosen in options.items()
    }
    return config
