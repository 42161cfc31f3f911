"""What to run when a GPU or TPU is at hand for ten minutes.

    python -m experiments.accelerator [--minutes=8] [--output=runs/accelerator]
        [--scale=SCALE] [--parts=PART,...]

In this order: the properties of the optimizers on this platform's own paths ("properties"); step
times and memory of every optimizer beside Optax's Adam and Muon, and torch's where torch is
installed ("updates"); tokens per second, MFU and the optimizer's share at the 190M rung of the
paper's ladder in bfloat16 ("training"); compile and run times of the matrix functions alone
("compilation"); and a small ladder ("ladder", which needs the `train` extra). SCALE is "full",
"tiny" (seconds on a CPU), or "auto": full on accelerators.

The output has results.jsonl, a line for everything measured as soon as it is, and report.json and
report.md, which are complete whenever the program is killed. With the same output the same command
goes on with what is missing. The exit code is 1 where a case failed or a property does not hold.
Nothing but JAX, Flax and Optax is needed.
"""

import os
import signal
import sys
from pathlib import Path

import jax
import optax
from absl import app, flags, logging

from experiments.accelerator import (
    compilation,
    ladder,
    properties,
    report,
    training,
    updates,
)
from experiments.accelerator.session import Part, Session

# Of the seconds that full cases take on a GPU.
_TINY_PACE = 0.25

PARTS = ("properties", "updates", "training", "compilation", "ladder")

MINUTES = flags.DEFINE_float("minutes", 8.0, "Minutes that it may take.", lower_bound=0.0)
OUTPUT = flags.DEFINE_string("output", "runs/accelerator", "Folder for all that is written.")
SCALE = flags.DEFINE_enum("scale", "auto", ["auto", "full", "tiny"], "Sizes of everything.")
ONLY = flags.DEFINE_list("parts", list(PARTS), "Parts to run.")


def make_parts(scale: str, output: Path) -> list[Part]:
    """All parts, at the scale "full" or "tiny"."""
    return [
        properties.part(scale),
        updates.part(scale),
        training.part(scale),
        compilation.part(scale),
        ladder.part(scale, output),
    ]


def main(_: list[str]) -> int:
    unknown = [name for name in ONLY.value if name not in PARTS]
    if unknown:
        raise app.UsageError(f"--parts={','.join(unknown)}: choose of {', '.join(PARTS)}")
    logging.set_verbosity(logging.ERROR)
    # Torch and the ladder, in processes of their own, need memory of the GPU too.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    # A kill ends the processes that a case began.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    device = jax.devices()[0]
    scale = SCALE.value
    if scale == "auto":
        scale = "tiny" if device.platform == "cpu" else "full"
    output = Path(OUTPUT.value)
    identity = {
        "device": device.device_kind,
        "jax": jax.__version__,
        "optax": optax.__version__,
        "scale": scale,
    }
    command = f"python -m experiments.accelerator --scale={scale} --output=DIR"
    try:
        session = Session(
            output,
            identity,
            make_parts(scale, output),
            MINUTES.value,
            report.writer(command),
            pace=1.0 if scale == "full" else _TINY_PACE,
        )
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    session.run(ONLY.value)
    print((output / "report.md").read_text())
    print(f"report.md, report.json and results.jsonl are in {output}")
    return int(bool(session.failed))


if __name__ == "__main__":
    app.run(main)
