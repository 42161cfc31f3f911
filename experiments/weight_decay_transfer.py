"""Does the best weight decay stay where it is, or go as 1/width?

    python -m experiments.weight_decay_transfer --config=configs/weight_decay_transfer_cpu.py \
        --workdir=DIR

Sweeps the independent weight decay λ at every width, with the learning rate carried over by µP, and
reads the same runs in two ways: against λ, and against λ·width. λ = 0 is tried everywhere. Files
are those of `experiments.lr_transfer`.
"""

from experiments.sweeps.run import main

if __name__ == "__main__":
    main("weight_decay_transfer", "Does the best weight decay stay, or go as 1/width?")
