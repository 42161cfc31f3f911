"""Qiu et al. (arXiv 2512.05620): tokens per parameter of AdamW and Muon at three budgets.

    python -m mup_jax.data.prepare --source=hf:HuggingFaceFW/fineweb:sample-100BT \\
        --tokenizer=gpt2 --out=data/fineweb
    python -m experiments.compute_optimal --config=configs/compute_optimal_paper.py --workdir=DIR

The Llamas of configs/ladder_paper.py, 32 layers, width 320 to 1536, at the compute of that ladder's
first three rungs, with its learning rates, tuned at width 512, and its λ of that width. For
accelerators. Not run yet; the paper finds 9.6 tokens per parameter with AdamW and 7.4 with Muon.
The same at a small size is configs/compute_optimal_cpu.py.
"""

from ml_collections import ConfigDict

from configs import ladder_paper
from experiments.isoflop.plan import default_isoflop, default_optimizer


def get_config() -> ConfigDict:
    ladder = ladder_paper.get_config()
    config = default_isoflop()
    config.train = ladder.train
    width = ladder_paper.BASE_WIDTH
    config.train.model.update(width=width, depth=ladder.depth)
    config.train.base.update(width=width, depth=ladder.depth)
    config.budgets = (4.3204e18, 1.7814e19, 5.0382e19)
    config.widths = (320, 384, 448, 512, 640, 768, 896, 1024, 1280, 1536)
    # Below, AdamW's warm-up would be longer than the run.
    config.tokens_per_parameter = (2.0, 100.0)
    config.seeds = (0,)
    names = {"AdamW": "adamw", "Muon-Adam": "muon"}
    config.optimizers = {label: _optimizer(ladder, name) for label, name in names.items()}
    return config


def _optimizer(ladder: ConfigDict, name: str) -> ConfigDict:
    tuned = ladder.optimizers[name]
    return ConfigDict(
        {
            **default_optimizer(),
            "optimizer": name,
            "learning_rate": tuned.learning_rates[0],
            "weight_decay": tuned.weight_decay,
            "warmup_tokens": tuned.warmup_tokens,
            "options": tuned.options,
        }
    )
