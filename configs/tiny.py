"""One small Llama with Muon on the standard library's source, a character at a time.

python -m experiments.train --config=configs/tiny.py --workdir=runs/tiny
"""

from ml_collections import ConfigDict

from mup_jax.training import default_config


def get_config() -> ConfigDict:
    return default_config()
