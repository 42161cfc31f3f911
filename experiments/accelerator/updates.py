"""Part (b): step times and memory of every optimizer beside Optax's Adam and Muon, and torch's."""

import functools
import importlib.util
import itertools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax

from experiments.accelerator.report import COMPILER, number, ratio
from experiments.accelerator.session import Case, Part, Row, Unavailable
from experiments.accelerator.timing import time_steps
from experiments.optimizer_cases import (
    FREQUENCY,
    REFERENCE,
    compile_update,
    gradients,
    optimizer_cases,
    orthogonality_error,
)

ROOT = Path(__file__).parents[2]

# Layers, width D and side of blocks.
_SIZES = {"full": (32, 1024, 512), "tiny": (2, 32, 16)}
# Two different gradients, as statistics of one alone are of a kind that training does not know.
_INPUTS = 2
# QR factorizations of torch's SOAP come one after another: seconds on all layers.
_SOAP_PART = 8
_MUON_IN_TORCH, _SOAP_IN_TORCH = "torch.optim.Muon", "textbook SOAP in torch, eager, ours"

# What tells most comes first; seconds on a GPU, mostly of compiling.
_SECONDS = {
    "optax adam": 6,
    REFERENCE: 12,
    "muon": 12,
    "shampoo²": 25,
    "soap": 25,
    _MUON_IN_TORCH: 20,
    "muon, 5 steps": 12,
    "muon, bf16 gradients": 12,
    _SOAP_IN_TORCH: 25,
    "shampoo², all at once": 25,
    "soap, all at once": 25,
    "shampoo² # adam": 25,
    "adamuon": 12,
    "soap, spectral norm": 30,
    "soap, bf16 bases": 25,
    "shampoo², bf16 roots": 25,
    "muon, 5 steps, separate": 30,
    f"{REFERENCE}, separate": 90,
    "soap, separate": 40,
    "shampoo², separate": 40,
    "shampoo² every step": 25,
}


def part(scale: str) -> Part:
    """The part at the scale "full" or "tiny"."""
    layers, width, block = _SIZES[scale]
    measures = {
        name: functools.partial(_measure, name, layers, width, block)
        for name in optimizer_cases(block)
    }
    few = max(1, layers // _SOAP_PART)
    measures[_MUON_IN_TORCH] = functools.partial(_in_torch, "muon", layers, width, block)
    measures[_SOAP_IN_TORCH] = functools.partial(_in_torch, "soap", few, width, block)
    seconds: dict[str, float] = {**_SECONDS}
    if not _has_torch():
        seconds |= dict.fromkeys((_MUON_IN_TORCH, _SOAP_IN_TORCH), 0.0)
    return Part(
        "updates",
        f"Steps of optimizers: {layers} layers of D = {width}, blocks of {block}, refreshed every "
        f"{FREQUENCY} steps",
        share=0.3,
        cases=[Case(name, seconds[name], measures[name]) for name in _SECONDS],
        columns=[
            number("layers", "layers", "{:.0f}"),
            number("step, ms", "step_ms", "{:.2f}"),
            ratio(f"/ {REFERENCE}", "step_ms", REFERENCE),
            number("single, ms", "single_ms", "{:.2f}"),
            number("worst, ms", "worst_ms", "{:.2f}"),
            number("temporary, GB", "temporary_megabytes", "{:.2f}", 1e-3),
            number("floats / parameter", "state_floats", "{:.2f}"),
            *COMPILER,
            number("orthogonality error", "orthogonality_error", "{:.3f}"),
        ],
    )


def _measure(name: str, layers: int, width: int, block: int, _: float) -> Row:
    case = optimizer_cases(block)[name]
    inputs = gradients(layers, width, case.layout, _INPUTS, case.dtype)
    step, state, facts = compile_update(case.transformation, inputs[0])
    turn = itertools.cycle(inputs)
    times, (updates, _) = time_steps(
        lambda pair: step(next(turn), pair[1]), (None, state), steps=FREQUENCY
    )
    row: Row = {"layers": layers, **times, **facts}
    if "muon" in name and "ada" not in name:
        row["orthogonality_error"] = orthogonality_error(updates)
    return row


def _has_torch() -> bool:
    return importlib.util.find_spec("torch") is not None


def _in_torch(peer: str, layers: int, width: int, block: int, seconds: float) -> Row:
    if not _has_torch():
        raise Unavailable("torch is not installed: pip install torch")
    device = "cuda" if jax.default_backend() == "gpu" else "cpu"
    module = "experiments.accelerator.torch_peers"
    arguments = [peer, *map(str, (layers, width, block)), device]
    try:
        done = subprocess.run(
            [sys.executable, "-m", module, *arguments],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=seconds,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise Unavailable(f"torch took longer than the {seconds:.0f} s that were left") from None
    if done.returncode:
        last: Any = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        if "has no attribute 'Muon'" in last[-1] or "not compiled with CUDA" in last[-1]:
            raise Unavailable(f"{last[-1]}: install torch 2.9 or newer, with CUDA for GPUs")
        if "out of memory" in last[-1]:
            raise Unavailable(f"beside what JAX holds there is too little memory: {last[-1]}")
        raise RuntimeError(f"torch: {last[-1]}")
    return json.loads(done.stdout.splitlines()[-1])
