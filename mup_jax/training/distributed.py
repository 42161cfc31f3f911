"""Several processes that train one model: one per host of a TPU pod, one or more per GPU node."""

import glob
import hashlib
import importlib.util
import os
import signal
import sys
import threading
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any, Self

import jax
import numpy as np
from jax.experimental import multihost_utils

_GIVEN = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")


def initialize() -> None:
    """Joins the other processes of a run, where the environment says that there are any.

    Call it before JAX is used. Recognized are the variables JAX_COORDINATOR_ADDRESS,
    JAX_NUM_PROCESSES and JAX_PROCESS_ID, and what JAX itself finds out about the processes of
    Slurm, Open MPI, Cloud TPUs and Kubernetes' indexed jobs.

    Raises:
      ValueError: some of the three variables are missing, or are no numbers.
    """
    if jax.distributed.is_initialized():
        return
    given = {name: os.environ[name] for name in _GIVEN if os.environ.get(name)}
    if len(given) == len(_GIVEN):
        address, *numbers = given.values()
        try:
            count, index = map(int, numbers)
        except ValueError:
            raise ValueError(f"{_GIVEN[1:]}={numbers}: give whole numbers") from None
        jax.distributed.initialize(address, count, index)
    elif given:
        missing = [name for name in _GIVEN if name not in given]
        raise ValueError(f"{', '.join(given)} given without {', '.join(missing)}: set all three")
    elif _is_one_of_several():
        jax.distributed.initialize()


def _is_one_of_several() -> bool:
    environment = os.environ
    # SLURM_NTASKS is that of the job, also in a script of which there is one process.
    sizes = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE")
    return (
        any(int(environment.get(name, "1")) > 1 for name in sizes)
        or "," in environment.get("TPU_WORKER_HOSTNAMES", "")
        or {"KUBERNETES_SERVICE_HOST", "JOB_COMPLETION_INDEX"} <= environment.keys()
        or _is_cloud_tpu()
    )


def _is_cloud_tpu() -> bool:
    """A host with chips of its own; JAX asks its metadata server whether there are others."""
    chips = glob.glob("/dev/accel*") + glob.glob("/dev/vfio/[0-9]*")
    on_cpu = os.environ.get("JAX_PLATFORMS") == "cpu"
    return bool(chips) and not on_cpu and importlib.util.find_spec("libtpu") is not None


def is_first() -> bool:
    """Whether this process is the one that writes files and speaks to people."""
    return jax.process_index() == 0


def in_first(function: Callable[[], None]) -> None:
    """Calls a function in the first process, and returns in all when it has returned.

    Raises:
      What it raises, in the first process; RuntimeError in the others.
    """
    error: Exception | None = None
    if is_first():
        try:
            function()
        except Exception as raised:
            error = raised
    failed = multihost_utils.broadcast_one_to_all(np.int32(error is not None))
    if error is not None:
        raise error
    if failed:
        raise RuntimeError("the first process has stopped: see its message")


def leave(error: Exception) -> None:
    """Ends this process where there are others: they would wait for it, and it for them.

    The others end when they miss it.
    """
    if jax.process_count() > 1:
        print(f"error: {error}", file=sys.stderr, flush=True)
        os._exit(2)


def check_equal(text: str, what: str) -> None:
    """Raises ValueError, in all processes, where they do not all have the same text."""
    try:
        digest = hashlib.sha256(text.encode()).digest()
        multihost_utils.assert_equal(np.frombuffer(digest, np.uint8), what)
    except AssertionError:
        raise ValueError(
            f"{what} is not the same in all processes: {text!r} in process {jax.process_index()}"
        ) from None


def wait_for_all(name: str) -> None:
    """Returns when all processes have come to the point of this name."""
    multihost_utils.sync_global_devices(name)


class Preemption:
    """A context in which SIGTERM is a request to save and leave.

    With several processes, all of them agree on the step after which they do.
    """

    def __enter__(self) -> Self:
        self._requested = False
        self._before: Any = None
        # JAX listens for several processes; handlers belong to the main thread.
        self._listens = (
            jax.process_count() == 1 and threading.current_thread() is threading.main_thread()
        )
        if self._listens:
            self._before = signal.signal(signal.SIGTERM, self._request)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        if self._listens:
            signal.signal(signal.SIGTERM, self._before)

    def _request(self, number: int, frame: FrameType | None) -> None:
        self._requested = True

    def requested(self, step: int) -> bool:
        """Whether to save and leave after this step; ask at every step."""
        if jax.process_count() == 1:
            return self._requested
        return multihost_utils.reached_preemption_sync_point(step)
