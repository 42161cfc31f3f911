"""The ladder of Qiu et al. (arXiv 2512.05620), figure 6 and tables 3 and 4: 190M to 1.4B.

    python -m mup_jax.data.prepare --source=hf:HuggingFaceFW/fineweb:sample-100BT \\
        --tokenizer=gpt2 --out=data/fineweb
    python -m experiments.scale_ladder --config=configs/ladder_paper.py --workdir=DIR

Llamas of 32 layers, 20 tokens per parameter, each optimizer at the rate that was tuned at the
smallest. For TPU pods: what of it fits where is shown by `--mode=plan --topology=v5e:8x8`
(results/ladder_paper_v5e_8x8.md). Not run yet; the losses to expect are 3.24, 3.01, 2.86, 2.68 with
AdamW, 3.18, 2.96, 2.82, 2.64 with Muon, 3.18, 2.96, 2.83, 2.65 with Shampoo² and 3.18, 2.96, 2.83
with SOAP.
"""

from typing import Any

from ml_collections import ConfigDict

from experiments.ladder.plan import default_ladder, default_optimizer

BASE_WIDTH = 512


def get_config() -> ConfigDict:
    config = default_ladder()
    config.widths = (BASE_WIDTH, 768, 1024, 1536)
    config.depth = 32
    config.tokens_per_parameter = 20.0
    config.seeds = (0,)
    config.checks = config.decay_checks = ()

    train = config.train
    train.data.update(source="prepared:data/fineweb", tokenizer="gpt2")
    train.model.head_dim = 64
    train.update(context=1024, batch_size=128, dtype="bfloat16", clip_norm=1.0)
    train.update(eval_batches=64, eval_every=1000, checkpoint_every=1000, health_every=1000)

    config.optimizers = {
        "adamw": _optimizer(4e-3, 742_723_584, 0.1024, eps=1e-20),
        "muon": _optimizer(
            8e-3,
            11_140_854,
            0.16384,
            orthogonalizer="newton_schulz",
            ns_steps=5,
            eps=1e-5,
            adam_eps=1e-15,
            factor=1.6,
        ),
        "shampoo": _optimizer(2e-3, 185_680_896, 0.1024, b1=0.95, factor=32.0),
        "soap": _optimizer(3.2e-2, 23_210_112, 0.1024, b2=0.999, spectral_norm=True),
    }
    return config


def _optimizer(
    learning_rate: float,
    warmup_tokens: int,
    decay_times_width: float,
    factor: float = 1.0,
    **options: Any,
) -> ConfigDict:
    return ConfigDict(
        {
            **default_optimizer(),
            "learning_rates": (learning_rate,),
            "embedding_readout_factors": (factor,),
            "weight_decay": decay_times_width / BASE_WIDTH,
            "warmup_tokens": warmup_tokens,
            "options": ConfigDict(options),
        }
    )
