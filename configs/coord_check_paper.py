"""Qiu et al., figure 2: coordinate check of all optimizers over a 32-fold width, on OpenWebText.

    python -m experiments.coord_check --config=configs/coord_check_paper.py --workdir=DIR \\
        --config.train.data.source='files:/data/openwebtext/**/*.txt'

The network, text and learning rates of configs/lr_transfer_paper.py: step 10 of its runs, at widths
from 128 to 4096; with coord_check_paper.py:depth, at depths from 3 to 192. Expected of the change
in one step, at 4096 over that at 128 (arXiv 2512.05620): Muon 1.14, Muon-Adam 1.03, Shampoo 0.97,
#Shampoo 0.95, AdaMuon 0.72, SOAP 6.7 and with blocks 0.93 to 1.23; in SP #Shampoo 10, #Shampoo²
108, SOAP 7.6, AdaMuon 22.6. Not run yet: it needs OpenWebText as text files, and an accelerator of
80 GB. The same check at a small size is configs/coord_check_cpu.py.
"""

from ml_collections import ConfigDict

from configs.lr_transfer_paper import NORMALIZED_RATES, OPTIONS, RATES, paper_sweep
from experiments.coord_check import default_check, default_optimizer
from experiments.sweeps.curves import OPTIMIZERS

_BLOCKED = ("#Shampoo", "#Shampoo²", "SOAP")


def get_config(vary: str = "width") -> ConfigDict:
    sizes = {"width": (128, 256, 512, 1024, 2048, 4096), "depth": (3, 6, 12, 24, 48, 96, 192)}
    if vary not in sizes:
        raise ValueError(f"no variant {vary!r}: choose width or depth")
    config = default_check()
    config.vary = vary
    config.sizes = sizes[vary]
    config.train = paper_sweep().train
    config.optimizers = {}

    def add(label: str, variant: str, learning_rate: float, **options: object) -> None:
        name, own = OPTIMIZERS[label]
        optimizer = default_optimizer()
        optimizer.update(name=name, learning_rate=learning_rate)
        optimizer.options = ConfigDict({**own, **OPTIONS.get(name, {}), **options})
        if name == "soap":
            optimizer.options.exact_steps = config.steps
        optimizer.expected_to_fail = vary == "width" and (label, variant) == ("SOAP", "")
        config.optimizers[label + variant] = optimizer

    for label, learning_rate in RATES.items():
        add(label, "", learning_rate)
    for label in _BLOCKED:
        add(label, " in blocks", RATES[label], block_size=128)
    for label, learning_rate in NORMALIZED_RATES.items():
        add(label, " normalized", learning_rate, spectral_norm=True)
    return config
