"""Coordinate check of eight optimizers on GPT-2 like networks, minutes on two CPU cores.

    python -m experiments.coord_check --config=configs/coord_check_cpu.py \\
        --workdir=runs/coord_check_cpu
    python -m experiments.coord_check --config=configs/coord_check_cpu.py --config.vary=depth \\
        --workdir=runs/coord_check_depth_cpu

Eight optimizers over an 8-fold size, in µP and in standard parametrization.
"""

from ml_collections import ConfigDict

from experiments.coord_check import default_check, default_optimizer

_MOMENTS = {"b1": 0.9, "b2": 0.95}
_MUON = {"adam_learning_rate": 1.6e-2, "adam_b1": 0.9, "adam_b2": 0.95}
_SHAMPOO = {**_MOMENTS, "precondition_frequency": 1}
_SOAP = {**_MOMENTS, "precondition_frequency": 1, "exact_steps": 10}
_ADAMUON = {**_MOMENTS, "hidden_only": False}
_BLOCKS, _WHOLE = {"block_size": 32}, {"block_size": None}
_NORM = {"spectral_norm": True}
# Label -> name, learning rate of the base, options. "#" is grafted to Adam.
OPTIMIZERS = {
    "AdamW": ("adamw", 1.6e-2, _MOMENTS),
    "Muon-Adam": ("muon", 3.2e-2, _MUON),
    "#Shampoo², blocks": ("shampoo", 1.6e-2, {**_SHAMPOO, **_BLOCKS}),
    "SOAP, blocks": ("soap", 1.6e-2, {**_SOAP, **_BLOCKS}),
    "SOAP": ("soap", 1.6e-2, {**_SOAP, **_WHOLE}),
    "SOAP, spectral norm": ("soap", 6.4e-2, {**_SOAP, **_WHOLE, **_NORM}),
    "AdaMuon": ("adamuon", 4e-3, _ADAMUON),
    "AdaMuon, spectral norm": ("adamuon", 6.4e-2, {**_ADAMUON, **_NORM}),
}


def get_config() -> ConfigDict:
    config = default_check()
    config.widths = (32, 64, 128, 256)
    config.depths = (2, 4, 8, 16)
    train = config.train
    train.model.update(width=32, depth=3, head_dim=16, mlp_ratio=1, mlp="gelu", positions="learned")
    # Step 10 is half way up.
    train.update(context=64, batch_size=16, tokens=100 * 1024, warmup_tokens=20 * 1024)
    train.clip_norm = 0.0
    config.optimizers = {}
    for label, (name, learning_rate, options) in OPTIMIZERS.items():
        optimizer = default_optimizer()
        optimizer.update(name=name, learning_rate=learning_rate)
        optimizer.options = ConfigDict(options)
        # Their updates become dense, which their rules do not know.
        if label in ("SOAP", "AdaMuon"):
            optimizer.expected_failure = "width"
        config.optimizers[label] = optimizer
    return config
