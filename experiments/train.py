"""Trains one model.

    python -m experiments.train --config=configs/tiny.py --workdir=DIR [--config.model.width=64 ...]

Writes DIR/metrics.jsonl (a line per step), DIR/checkpoints and DIR/result.json. Started again after
any interruption it goes on, and ends with the same numbers. Start it on every host of a TPU pod or
a GPU cluster, with a DIR that all of them see, and they train one model. Exit codes:

    0    trained
    2    refused: one line says what to change
    3    diverged: the loss, or the gradient of many steps in a row, was not finite
    130  interrupted from the keyboard
    143  asked to stop by SIGTERM, and saved: the same command goes on from there

--config.optimizer.name=my_optimizer.py:make is an optimizer of your own: see
`mup_jax.optimizers.from_file`.

    --tensorboard            DIR/tensorboard, for `tensorboard --logdir=DIR`
    --wandb=PROJECT          Weights & Biases; the key comes from `wandb login` or WANDB_API_KEY
    --profile=100:105        a trace of these steps in DIR/profile, for TensorBoard or Perfetto
"""

import sys
from pathlib import Path
from typing import Any

from absl import flags

from experiments import command, monitors
from mup_jax.training import Preempted, distributed, train, validate
from mup_jax.training.config import describe_rule, with_source
from mup_jax.training.throughput import Progress

DIVERGED = 3  # exit code


def main(flags: Any) -> int:
    distributed.initialize()
    workdir = Path(flags.workdir)
    profile = parse_steps(flags.profile)
    config = with_source(flags.config)
    validate(config)  # before a monitor begins a run of its own
    if (rule := describe_rule(config)) and distributed.is_first():
        print(rule)
    with monitors.opened(config, workdir, flags.tensorboard, flags.wandb) as observers:
        try:
            result = train(config, workdir, show, observers=observers, profile=profile)
        except Preempted as stop:
            print(f"{stop}: the same command goes on from there", file=sys.stderr)
            return 143
        except (OSError, ValueError) as error:
            distributed.leave(error)
            raise
    loss = result["validation_loss"]
    if loss is None:
        print(
            f"diverged: the norms in {workdir / 'metrics.jsonl'} show where it began; try a lower "
            "learning rate or a longer warm-up, in another --workdir",
            file=sys.stderr,
        )
        return DIVERGED
    if distributed.is_first():
        size = f"{result['parameters']:,} parameters, {result['tokens']:,} tokens"
        print(f"{size}: validation loss {loss:.4f} nats per token")
        print(f"metrics, checkpoints and result.json are in {flags.workdir}")
    return 0


def show(now: Progress) -> None:
    """One line of progress."""
    loss = "not finite" if now.loss is None else f"{now.loss:.4f}"
    mfu = "" if now.mfu is None else f"  MFU {now.mfu:.1%}"
    print(
        f"step {now.step}/{now.steps}  loss {loss}  {now.tokens_per_second:,.0f} tokens/s{mfu}",
        flush=True,
    )


def parse_steps(text: str) -> range:
    """The steps of "FIRST:LAST", both included; none for an empty text.

    Raises:
      ValueError: another text.
    """
    if not text:
        return range(0)
    first, _, last = text.partition(":")
    if not (first.isdecimal() and last.isdecimal() and 0 < int(first) <= int(last)):
        raise ValueError(f"--profile={text}: give the first and the last step, like 100:105")
    return range(int(first), int(last) + 1)


def define_flags() -> None:
    flags.DEFINE_bool("tensorboard", False, "Write DIR/tensorboard.")
    flags.DEFINE_string("wandb", "", "Project of Weights & Biases to write to.")
    flags.DEFINE_string("profile", "", "Steps FIRST:LAST to trace.")


if __name__ == "__main__":
    command.run(main, config="configs/tiny.py", workdir="runs/train", define_flags=define_flags)
