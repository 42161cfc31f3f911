"""Does the best learning rate stay where it is when the width grows?

    python -m experiments.lr_transfer --config=configs/lr_transfer_cpu.py --workdir=DIR

Sweeps the learning rate of every optimizer at every width, in standard parametrization (SP), in µP,
and in µP with blocks or spectral normalization. DIR ends with report.md, results.json and
figure.png. Every run is trained once: started again, the sweep goes on where it was interrupted.
With --mode=plan it only says what it would run, with --mode=report it reads DIR/results.json again.
"""

from experiments.sweeps.run import main

if __name__ == "__main__":
    main("lr_transfer", "Does the best learning rate stay where it is when the width grows?")
