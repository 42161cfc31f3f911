"""The launcher "ray": tasks of a Ray cluster, so that a sweep outgrows one machine.

The code travels to the nodes. They need the packages of `mup_jax[train,ray]`, and the workdir at
the same path: a folder of a file system that all of them share.
"""

import logging
import os
import platform
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError
from ray.util.queue import Queue
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

import experiments
import mup_jax
from experiments.cells import worker
from experiments.cells.cell import FinishedCells, Task, Work
from experiments.cells.progress import Progress
from experiments.cells.run import Submit
from mup_jax.training import Preempted

# How often a task is begun again whose process or node was lost; its cells go on from their
# checkpoints.
_RETRIES = 20


@contextmanager
def launch(work: Work, workdir: Path, finished: FinishedCells) -> Iterator[Submit]:
    """See `run.Launcher`; each task has one CPU, GPU or TPU chip to itself.

    Raises:
      ConnectionError: there is no cluster.
      ValueError: it has no accelerator.
      OSError: a node does not see `workdir`, or processes were lost again and again.
    """
    try:
        ray.init(
            address="auto",
            runtime_env={"py_modules": [experiments, mup_jax]},
            logging_level=logging.WARNING,
        )
    except ConnectionError as error:
        raise ConnectionError(
            "no Ray cluster found: start one on this machine with `ray start --head`, or set "
            f"RAY_ADDRESS ({os.environ.get('RAY_ADDRESS', 'not set')}) to that of one"
        ) from error
    try:
        with tempfile.NamedTemporaryFile(prefix=".seen-by-all-nodes-", dir=workdir) as marker:
            resource = _resource(work.platform)
            _check_nodes(resource, marker.name)
            # On this node: it is the one that cannot be lost before the sweep is.
            here = _on_node(ray.get_runtime_context().get_node_id())
            reports = Queue(actor_options={"num_cpus": 0, "scheduling_strategy": here})
            run = ray.remote(**_options(resource))(_run_task)
            arguments = work.platform, workdir, marker.name, reports
            with Progress(work, reports, finished):
                yield lambda task: run.remote(task, *arguments).future()
    except RayError as error:
        cause = error.cause if isinstance(error, RayTaskError) else error
        if not isinstance(cause, (Preempted, RayError)):
            raise cause from error
        raise OSError(
            f"the process of a task was lost {_RETRIES + 1} times: see its messages above; the "
            "same command goes on from here"
        ) from error
    finally:
        ray.shutdown()


def _resource(platform_name: str) -> str:
    """What of Ray's resources a task needs one of."""
    if platform_name:
        return {"cpu": "CPU", "tpu": "TPU"}.get(platform_name, "GPU")
    for resource in ("GPU", "TPU"):
        if ray.cluster_resources().get(resource, 0) >= 1:
            return resource
    raise ValueError(
        "config.platform='' and no GPU or TPU in the Ray cluster: set config.platform='cpu', or "
        "that of the accelerators it will have"
    )


def _options(resource: str) -> dict[str, Any]:
    one: dict[str, dict[str, Any]] = {
        "CPU": {"num_cpus": 1},
        "GPU": {"num_gpus": 1},
        "TPU": {"resources": {"TPU": 1}},
    }
    return {
        **one[resource],
        "max_calls": 1,  # a process for each task, so that its accelerator is free after it
        "max_retries": _RETRIES,
        "retry_exceptions": [Preempted],
    }


def _check_nodes(resource: str, marker: str) -> None:
    """Raises OSError where a node that will run tasks does not see the workdir."""
    check = ray.remote(_check_sees)
    nodes = [n["NodeID"] for n in ray.nodes() if n["Alive"] and n["Resources"].get(resource)]
    strategies = [_on_node(node) for node in nodes]
    ray.get([check.options(num_cpus=0, scheduling_strategy=s).remote(marker) for s in strategies])


def _on_node(node: str) -> NodeAffinitySchedulingStrategy:
    return NodeAffinitySchedulingStrategy(node, soft=False)


def _check_sees(marker: str) -> None:
    if not os.path.exists(marker):
        raise OSError(
            f"node {platform.node()} does not see {os.path.dirname(marker)}: choose a --workdir on "
            "a file system that all nodes of the Ray cluster mount at the same path"
        )


def _run_task(task: Task, platform_name: str, workdir: Path, marker: str, reports: Any) -> None:
    _check_sees(marker)  # the node may have come after the others were checked
    if platform_name == "cpu":
        os.environ["NPROC"] = "1"  # XLA: one thread, because Ray gave one CPU
    # A folder for each node: what was compiled for the CPU of one may not run on that of another.
    worker.configure(platform_name, workdir / "compiled" / platform.node())
    worker.run_task(task, workdir, reports)
