"""How large an ε does a model tolerate when the width grows?

    python -m experiments.epsilon_transfer --config=configs/epsilon_transfer_cpu.py --workdir=DIR

Sweeps ε at every width, scaled by its rule and constant. A small ε costs nothing: what should
transfer is where it begins to. Files are those of `experiments.lr_transfer`.
"""

from experiments.sweeps.run import main

if __name__ == "__main__":
    main("epsilon_transfer", "How large an ε does a model tolerate when the width grows?")
