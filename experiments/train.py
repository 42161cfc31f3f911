"""Trains one model.

    python -m experiments.train --config=configs/tiny.py --workdir=DIR [--config.model.width=64 ...]

Writes DIR/metrics.jsonl (a line per step), DIR/checkpoints and DIR/result.json. Started again after
any interruption it goes on, and ends with the same numbers.
"""

import time
from typing import Any

from experiments import command
from mup_jax.training import train


def main(flags: Any) -> None:
    start = time.perf_counter()

    def show(step: int, steps: int, loss: float | None) -> None:
        seconds = time.perf_counter() - start
        print(f"step {step}/{steps}  loss {loss:.4f}  {seconds:.0f} s", flush=True)

    result = train(flags.config, flags.workdir, on_progress=show)
    loss = result["validation_loss"]
    outcome = "diverged" if loss is None else f"validation loss {loss:.4f} nats per token"
    print(f"{result['parameters']:,} parameters, {result['tokens']:,} tokens: {outcome}")
    print(f"metrics, checkpoints and result.json are in {flags.workdir}")


if __name__ == "__main__":
    command.run(main, config="configs/tiny.py", workdir="runs/train")
