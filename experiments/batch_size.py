"""Which batch size is best for a fixed number of tokens, and does the learning rate go as its root?

    python -m experiments.batch_size --config=configs/batch_size_cpu.py --workdir=DIR

Sweeps the learning rate at every batch size and reads the same runs in two ways: against the rate
times √(batch ratio) (`mup_jax.rules.budget_factor`), and against the rate as it is. Files are those
of `experiments.lr_transfer`, and batches.png: what a larger batch costs, and where its best
learning rate is.
"""

from experiments.sweeps.run import main

if __name__ == "__main__":
    main("batch_size", "What is the best batch size, and does η go as its root?")
