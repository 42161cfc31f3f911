"""Does the best learning rate stay where it is when the depth grows?

    python -m experiments.depth_transfer --config=configs/depth_transfer_cpu.py --workdir=DIR

As `experiments.lr_transfer`, over depths, with residual branches multiplied by 1/depth (α = 1) and
not (α = 0).
"""

from experiments.sweeps.run import main

if __name__ == "__main__":
    main("depth_transfer", "Does the best learning rate stay where it is when the depth grows?")
