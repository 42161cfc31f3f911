"""Part (e): a ladder of three rungs, as large as the minutes allow, by the ladder's own command.

It is a process of its own, which goes on from its checkpoints with the next invocation.
"""

import functools
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from experiments.accelerator.report import number, words
from experiments.accelerator.session import Case, Cut, Part, Row, Unavailable

ROOT = Path(__file__).parents[2]

# Module and package of what a ladder needs beside JAX, Flax and Optax.
_PACKAGES = {
    "grain": "grain",
    "ml_collections": "ml-collections",
    "orbax.checkpoint": "orbax-checkpoint",
    "matplotlib": "matplotlib",
    "scipy": "scipy",
    "markdown_it": "markdown-it-py",
}
CONFIGS = {"full": "configs/ladder_gpu.py", "tiny": "configs/ladder_cpu.py"}
# From so many seconds on: widths, tokens per parameter. Compiling takes most of a short one.
SIZES = (
    (1500.0, (64, 128, 256), 8.0),
    (500.0, (64, 128, 192), 6.0),
    (0.0, (64, 128, 192), 2.0),
)
# Those that the last of them takes, mostly of compiling.
_SECONDS = 240.0
# What is kept for the report and for an orderly end.
_REPORT_SECONDS = 25.0


def part(scale: str, output: Path) -> Part:
    """The part at the scale "full" or "tiny", in a folder of `output`."""
    measure = functools.partial(_measure, scale, output / "ladder")
    seconds = 0.0 if _missing_packages() else _SECONDS
    return Part(
        "ladder",
        "A ladder of three rungs",
        share=0.2,
        cases=[Case("ladder", seconds, measure)],
        columns=[
            words("widths", "widths"),
            number("cells", "cells", "{:.0f}"),
            words("final losses", "losses"),
            words("compute multiplier over AdamW", "multipliers"),
            words("", "note"),
        ],
    )


def _measure(scale: str, workdir: Path, seconds: float) -> Row:
    end = time.monotonic() + seconds - _REPORT_SECONDS
    if missing := _missing_packages():
        raise Unavailable(f"missing {', '.join(missing)}: pip install '.[train]'")
    if jax.default_backend() == "tpu":
        raise Unavailable(
            "a TPU belongs to one process: python -m experiments.scale_ladder "
            "--config=configs/ladder_gpu.py, when this one has ended"
        )
    arguments = _arguments(scale, workdir, seconds)
    if _run([*arguments, "--mode=run"], max(1.0, end - time.monotonic())):
        return _summary(workdir)
    try:
        _run([*arguments, "--mode=report"], _REPORT_SECONDS, {"JAX_PLATFORMS": "cpu"})
    except RuntimeError as error:  # no cell has finished yet
        raise Cut({"note": str(error)}) from None
    raise Cut(_summary(workdir))


def _missing_packages() -> list[str]:
    return [package for module, package in _PACKAGES.items() if not _is_there(module)]


def _is_there(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except (ModuleNotFoundError, ValueError):  # no parent, or None in sys.modules
        return False


def _arguments(scale: str, workdir: Path, seconds: float) -> Sequence[str]:
    """Those with which the ladder of the folder was begun, or that fit into the seconds."""
    kept = workdir.with_name("ladder_command.json")
    if kept.exists():
        return json.loads(kept.read_text())
    _, widths, tokens = next(size for size in SIZES if seconds >= size[0])
    more: dict[str, Any] = {}
    if scale == "tiny":
        widths, tokens = (8, 16, 24), 1.0
        more = {"depth": 1, "workers": 1, "train.model.head_dim": 8, "train.context": 16}
        more |= {"train.batch_size": 8, "train.warmup_tokens": 128, "train.eval_batches": 2}
    overrides: dict[str, Any] = {
        "widths": widths,
        "tokens_per_parameter": tokens,
        "seeds": (0,),
        "tuning_seeds": 1,
        "parametrizations": ("mup",),
        "checks": (),
        "decay_checks": (),
        "max_extensions": 0,
        **more,
    }
    arguments = [f"--config={CONFIGS[scale]}", f"--workdir={workdir.absolute()}"]
    arguments += [f"--config.{key}={value}" for key, value in overrides.items()]
    kept.write_text(json.dumps(arguments) + "\n")
    return arguments


def _run(
    arguments: Sequence[str], seconds: float, environment: dict[str, str] | None = None
) -> bool:
    """Whether the ladder's command ended by itself within the seconds."""
    process = subprocess.Popen(
        [sys.executable, "-m", "experiments.scale_ladder", *arguments],
        cwd=ROOT,
        env=os.environ | (environment or {}),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        return False
    finally:
        if process.poll() is None:
            # Its workers too, which end by themselves when it has.
            os.killpg(process.pid, signal.SIGTERM)
            try:
                process.communicate(timeout=5)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.communicate()
    if process.returncode:
        last = output.strip().splitlines() or [f"exit code {process.returncode}"]
        raise RuntimeError(f"the ladder: {last[-1]}")
    return True


def _summary(workdir: Path) -> Row:
    """What the ladder's own report says, in short; nothing where there is none yet."""
    path = workdir / "report.json"
    if not path.exists():
        return {}
    report = json.loads(path.read_text())
    results = (workdir / "results.jsonl").read_text().splitlines()
    by_optimizer: dict[str, dict[str, Any]] = report["optimizers"]
    losses, multipliers = [], []
    for name, found in by_optimizer.items():
        final = [f"{x:.2f}" for x in found["final_loss"].values() if x is not None]
        losses.append(f"{name} {' '.join(final)}")
        times = [m["value"] for m in found.get("compute_multiplier", {}).values() if m]
        multipliers.append(f"{name} {' '.join(f'{x:.2f}' for x in times if x is not None)}")
    return {
        "widths": " ".join(str(rung["width"]) for rung in report["rungs"]),
        "cells": len(results),
        "losses": "; ".join(losses),
        "multipliers": "; ".join(multipliers),
        "optimizers": by_optimizer,
    }
