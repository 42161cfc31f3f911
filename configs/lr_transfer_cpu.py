"""Learning rates of seven optimizers over an 8-fold width, minutes on two CPU cores.

    python -m experiments.lr_transfer --config=configs/lr_transfer_cpu.py \\
        --workdir=runs/lr_transfer_cpu
    python -m experiments.lr_transfer --config=configs/lr_transfer_cpu.py:repaired \\
        --workdir=runs/lr_transfer_repaired_cpu
    python -m experiments.lr_transfer --config=configs/lr_transfer_cpu.py:lamb \\
        --workdir=runs/lr_transfer_lamb_cpu

The first compares standard parametrization (SP) with µP; the second is µP with blocks of 16, or
with spectral normalization, of the optimizers whose updates become dense without; the third is LAMB
by the rule of Gupta et al. and by the measured one.

Expected (results/lr_transfer_cpu and its neighbours): from width 16 to 128 the best learning rate
moves by factors of .96 (Muon), 1.4 (Muon-Adam), .65 (Shampoo), .70 (AdamW), .51 (SOAP), 2.8
(#Shampoo²) and 2.2 (AdaMuon) in µP, and of .25 to .44 in SP; with blocks by 1.1 (SOAP and
#Shampoo²), with spectral normalization by .87 to 1.5; of LAMB by .80, and .63 by the rule of Gupta
et al., whose best loss at width 128 is 2.59 instead of 2.42.
"""

import os

from ml_collections import ConfigDict

from experiments.sweeps.curves import lamb_curves, width_curves
from experiments.sweeps.plan import default_sweep

RATES = {
    "AdamW": 3.2e-2,
    "Muon": 6.4e-2,
    "Muon-Adam": 6.4e-2,
    "Shampoo": 0.256,
    "#Shampoo²": 3.2e-2,
    "SOAP": 3.2e-2,
    "AdaMuon": 8e-3,
}
MOMENTS = {"b1": 0.9, "b2": 0.95}
OPTIONS = dict.fromkeys(("adamw", "shampoo", "soap"), MOMENTS)


def small_sweep(steps: int) -> ConfigDict:
    """The network and the budget that the CPU's sweeps share, in steps of 512 characters."""
    config = default_sweep()
    config.workers = min(os.cpu_count() or 1, 8)
    config.platform = "cpu"
    config.vectorized = True
    train = config.train
    train.model.update(depth=2, head_dim=16, mlp_ratio=1, mlp="gelu", positions="learned")
    train.base.update(width=16, depth=2)
    train.update(context=64, batch_size=8, tokens=steps * 512, warmup_tokens=steps // 10 * 512)
    train.update(clip_norm=0.0, eval_batches=64, checkpoint_every=0, measure_optimizer=False)
    return config


def get_config(which: str = "plain") -> ConfigDict:
    config = small_sweep(steps=200)
    config.sizes = (16, 32, 64, 128)
    config.reach = 1
    if which == "lamb":
        config.curves = lamb_curves({"LAMB": 1.6e-2})
        return config
    curves = width_curves(
        RATES,
        OPTIONS,
        blocked=("#Shampoo²", "SOAP"),
        block_size=16,
        normalized={"Shampoo": 6.4e-2, "SOAP": 6.4e-2, "AdaMuon": 6.4e-2},
    )
    chosen = {"plain": ("SP", "µP"), "repaired": ("µP, blocks of 16", "µP, spectral norm")}
    if which not in chosen:
        raise ValueError(f"no variant {which!r}: choose plain, repaired or lamb after the colon")
    config.curves = {
        label: {name: curve for name, curve in variants.items() if name in chosen[which]}
        for label, variants in curves.items()
        if any(name in chosen[which] for name in variants)
    }
    return config
