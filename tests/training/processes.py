"""Training runs in processes of their own, to be killed."""

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

from mup_jax.training.files import read_lines

ROOT = Path(__file__).parents[2]


def start(config_file, workdir, *flags, devices=1, process=None):
    """Starts `experiments.train`.

    Args:
      config_file: of the run.
      workdir: of the run; what is compiled is kept beside it.
      *flags: further ones.
      devices: CPU devices of the process.
      process: `(port, index, count)` of one process of several.
    """
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": str(devices),
        "JAX_COMPILATION_CACHE_DIR": str(workdir.parent / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    if process:
        port, index, count = process
        environment |= {
            "JAX_COORDINATOR_ADDRESS": f"localhost:{port}",
            "JAX_NUM_PROCESSES": str(count),
            "JAX_PROCESS_ID": str(index),
        }
    run = [f"--config={config_file}", f"--workdir={workdir}", *flags]
    return subprocess.Popen(
        [sys.executable, "-m", "experiments.train", *run],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process, expected=0):
    """Its output and errors."""
    output, errors = process.communicate(timeout=300)
    assert process.returncode == expected, errors
    return output, errors


def free_port():
    with socket.socket() as server:
        server.bind(("localhost", 0))
        return server.getsockname()[1]


def newest_checkpoint(workdir):
    names = [path.name for path in (workdir / "checkpoints").glob("*")]
    return max((int(name) for name in names if name.isdigit()), default=0)


def wait_for_checkpoint(process, workdir, step):
    """Returns when there is a checkpoint after `step`, or the process has ended."""
    while process.poll() is None and newest_checkpoint(workdir) <= step:
        time.sleep(0.002)


def numbers(workdir):
    """All that is measured but the clock."""
    return [
        {key: value for key, value in line.items() if key != "seconds"}
        for line in read_lines(workdir / "metrics.jsonl")
    ]


def result_of(workdir):
    return json.loads((workdir / "result.json").read_text())
