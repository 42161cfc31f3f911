"""ε over a 32-fold width, with the network and budget of Qiu et al., figure 2, on OpenWebText.

    python -m experiments.epsilon_transfer --config=configs/epsilon_transfer_paper.py \\
        --workdir=DIR --config.train.data.source='files:/data/openwebtext/**/*.txt'

For accelerators. Not run yet; the same sweep at a small size is configs/epsilon_transfer_cpu.py.
"""

from ml_collections import ConfigDict

from configs.lr_transfer_paper import OPTIONS, RATES, paper_sweep
from experiments.sweeps.curves import epsilon_curves


def get_config() -> ConfigDict:
    config = paper_sweep()
    config.sizes = (128, 256, 512, 1024, 2048, 4096)
    config.swept = "epsilon"
    config.step = 4.0
    epsilons = {"Muon-Adam": 1e-4, "Shampoo": 1e-6, "SOAP": 1e-4}
    rates = {label: RATES[label] for label in epsilons}
    options = OPTIONS | {"shampoo": {**OPTIONS["shampoo"], "relative_eps": False}}
    config.curves = epsilon_curves(rates, options, epsilons)
    return config
