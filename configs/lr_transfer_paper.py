"""Qiu et al., figures 2 and 3: learning rates over a 32-fold width, on OpenWebText.

    python -m experiments.lr_transfer --config=configs/lr_transfer_paper.py --workdir=DIR \\
        --config.train.data.source='files:/data/openwebtext/**/*.txt'

GPT-2 like networks of 3 blocks, width 128 (the base) to 4096, MLP expansion 1, 96 characters, 100M
of them in batches of 512 rows of 128; nine learning rates to each curve, one seed: some 1,100 runs
of 1525 steps, of which the widest have 300M parameters. For accelerators. Not run yet; the same
sweep at a small size is configs/lr_transfer_cpu.py.
"""

from ml_collections import ConfigDict

from experiments.sweeps.curves import width_curves
from experiments.sweeps.plan import default_sweep

# Base learning rates, arXiv 2512.05620.
RATES = {
    "Muon": 4e-2,
    "Muon-Adam": 4e-2,
    "Shampoo": 1e-1,
    "#Shampoo": 1e-2,
    "#Shampoo²": 2e-2,
    "SOAP": 1e-2,
    "AdaMuon": 2.5e-3,
}
NORMALIZED_RATES = {"Shampoo": 0.08, "#Shampoo²": 0.32, "SOAP": 0.2, "AdaMuon": 0.1}
_MOMENTS = {"b1": 0.9, "b2": 0.95}
_EVERY_STEP = {"precondition_frequency": 1}
_JORDAN = {"orthogonalizer": "newton_schulz", "ns_steps": 5}
OPTIONS = {
    "muon": {**_JORDAN, "adam_b1": 0.9, "adam_b2": 0.95},
    "adamuon": {**_JORDAN, **_MOMENTS},
    "shampoo": {**_MOMENTS, **_EVERY_STEP},
    "soap": {**_MOMENTS, **_EVERY_STEP},
}


def paper_sweep() -> ConfigDict:
    """The network, the text and the budget of figures 2 to 4."""
    config = default_sweep()
    config.reach = 4
    config.follow = False
    config.seeds = (0,)
    train = config.train
    train.data.source = "files:data/openwebtext/**/*.txt"
    train.model.update(
        width=128, depth=3, head_dim=64, mlp_ratio=1, mlp="gelu", positions="learned"
    )
    train.base.update(width=128, depth=3)
    train.update(context=128, batch_size=512, tokens=100_000_000, warmup_tokens=10_000_000)
    train.update(clip_norm=0.0, eval_batches=64, checkpoint_every=200, measure_optimizer=False)
    return config


def get_config() -> ConfigDict:
    config = paper_sweep()
    config.sizes = (128, 256, 512, 1024, 2048, 4096)
    config.curves = width_curves(
        RATES,
        OPTIONS,
        blocked=("Shampoo", "#Shampoo", "#Shampoo²", "SOAP"),
        block_size=128,
        normalized=NORMALIZED_RATES,
    )
    return config
