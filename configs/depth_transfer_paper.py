"""Qiu et al., figure 4: learning rates over a 64-fold depth, on OpenWebText.

    python -m experiments.depth_transfer --config=configs/depth_transfer_paper.py --workdir=DIR \\
        --config.train.data.source='files:/data/openwebtext/**/*.txt'

The network and budget of configs/lr_transfer_paper.py at width 128, with 3 (the base) to 192
blocks, residual branches times 1/depth (α = 1) or not (α = 0). For accelerators. Not run yet; the
same sweep at a small size is configs/depth_transfer_cpu.py.
"""

from ml_collections import ConfigDict

from configs.lr_transfer_paper import OPTIONS, RATES, paper_sweep
from experiments.sweeps.curves import depth_curves


def get_config() -> ConfigDict:
    config = paper_sweep()
    config.vary = "depth"
    config.sizes = (3, 6, 12, 24, 48, 96, 192)
    config.curves = depth_curves(RATES, OPTIONS)
    return config
