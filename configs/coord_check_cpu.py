"""Coordinate check of all optimizers on GPT-2 like networks, minutes on two CPU cores.

    python -m experiments.coord_check --config=configs/coord_check_cpu.py \\
        --workdir=runs/coord_check_cpu
    python -m experiments.coord_check --config=configs/coord_check_cpu.py:depth \\
        --workdir=runs/coord_check_depth_cpu

Over an 8-fold width, or depth. Learning rates are those of short runs at the base; step 10 is half
way up the warm-up. Expected (results/coord_check_cpu, results/coord_check_depth_cpu): in µP all
pass but, over width, SOAP without blocks (exponent +0.4) and AdaMuon (-0.3), and the exit code is
0. Updates of both become dense: their stable rank grows with the width. AdaMuon's does up to the
number of different inputs, here 96 characters + 64 positions, which [Q]'s widths are beyond.
Blocks, or spectral normalization, help.

[Q] is Qiu et al., arXiv 2512.05620; its figure 2 is configs/coord_check_paper.py.
"""

from typing import Any

from ml_collections import ConfigDict

from experiments.coord_check import default_check, default_optimizer

_MOMENTS = {"b1": 0.9, "b2": 0.95}
_MUON = {"adam_b1": 0.9, "adam_b2": 0.95}
_PRECONDITIONED = {**_MOMENTS, "precondition_frequency": 1}
_ADAMUON = {**_MOMENTS, "hidden_only": False}
_BLOCKS, _WHOLE = {"block_size": 32}, {"block_size": None}
_NORM = {"spectral_norm": True}
# Label -> name, learning rate of the base, options. "#" is grafted to Adam.
Optimizers = dict[str, tuple[str, float, dict[str, Any]]]
OVER_WIDTH: Optimizers = {
    "AdamW": ("adamw", 1.6e-2, _MOMENTS),
    "Muon-Adam": ("muon", 3.2e-2, _MUON),
    "#Shampoo² in blocks": ("shampoo", 1.6e-2, {**_PRECONDITIONED, **_BLOCKS}),
    "SOAP in blocks": ("soap", 1.6e-2, {**_PRECONDITIONED, **_BLOCKS}),
    "SOAP": ("soap", 1.6e-2, {**_PRECONDITIONED, **_WHOLE}),
    "SOAP normalized": ("soap", 6.4e-2, {**_PRECONDITIONED, **_WHOLE, **_NORM}),
    "AdaMuon": ("adamuon", 4e-3, _ADAMUON),
    "AdaMuon normalized": ("adamuon", 6.4e-2, {**_ADAMUON, **_NORM}),
}
# At the width of a block.
OVER_DEPTH: Optimizers = {
    label: OVER_WIDTH[label]
    for label in ("AdamW", "Muon-Adam", "SOAP", "SOAP normalized", "AdaMuon")
} | {"#Shampoo²": OVER_WIDTH["#Shampoo² in blocks"]}
# Their updates become dense with the width, of which their rules know nothing.
DENSE = ("SOAP", "AdaMuon")


def get_config(vary: str = "width") -> ConfigDict:
    # Even depths, which have a block in the middle.
    sizes = {"width": (32, 64, 128, 256), "depth": (4, 8, 16, 32)}
    if vary not in sizes:
        raise ValueError(f"no variant {vary!r}: choose width or depth")
    config = default_check()
    config.vary = vary
    config.sizes = sizes[vary]
    train = config.train
    train.model.update(width=32, depth=3, head_dim=16, mlp_ratio=1, mlp="gelu", positions="learned")
    train.update(context=64, batch_size=16, tokens=100 * 1024, warmup_tokens=40 * 1024)
    train.clip_norm = 0.0
    config.optimizers = {}
    chosen = OVER_WIDTH if vary == "width" else OVER_DEPTH
    for label, (name, learning_rate, options) in chosen.items():
        optimizer = default_optimizer()
        optimizer.update(name=name, learning_rate=learning_rate)
        if name == "muon":
            optimizer.embedding_readout_factor = 0.5
        optimizer.options = ConfigDict(options)
        optimizer.expected_to_fail = vary == "width" and label in DENSE
        config.optimizers[label] = optimizer
    return config
