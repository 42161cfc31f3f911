"""Batch sizes of two optimizers over a factor of 64, on the network of Qiu et al., figure 2.

    python -m experiments.batch_size --config=configs/batch_size_paper.py --workdir=DIR \\
        --config.train.data.source='files:/data/openwebtext/**/*.txt'

The network, text and learning rates of configs/lr_transfer_paper.py at width 512, whose batch of
512 rows is the second of four, for 100M tokens. The paper has no such sweep: the rule to test is
that of Mlodozeniec et al., arXiv 2512.22382. For accelerators. Not run yet; the same sweep at a
small size is configs/batch_size_cpu.py.
"""

from ml_collections import ConfigDict

from configs.lr_transfer_paper import OPTIONS, RATES, paper_sweep
from experiments.sweeps.curves import batch_curves


def get_config() -> ConfigDict:
    config = paper_sweep()
    config.vary = "batch_size"
    config.sizes = (128, 512, 2048, 8192)
    config.carried = {"η·√κ": 0.5, "η the same": 0.0}
    config.follow = True
    config.reach = 2
    config.seeds = (0, 1)
    config.train.model.width = 512
    config.train.tokens = 96 * 8192 * 128
    config.train.eval_batches = 256
    # Those of batches of 512.
    rates = {label: RATES[label] / 2 for label in ("Muon", "Muon-Adam")}
    config.curves = batch_curves(rates, OPTIONS)
    return config
