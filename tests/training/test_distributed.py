"""How a process finds the others of its run, and how it is asked to leave."""

import os
import signal
import threading

import jax
import pytest

from mup_jax.training import distributed
from mup_jax.training.distributed import Preemption

GIVEN = {
    "JAX_COORDINATOR_ADDRESS": "host:1234",
    "JAX_NUM_PROCESSES": "4",
    "JAX_PROCESS_ID": "2",
}
# What other tests, or the machine that runs them, may have set.
OF_CLUSTERS = (
    "SLURM_NTASKS", "SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "TPU_WORKER_HOSTNAMES",
    "KUBERNETES_SERVICE_HOST", "JOB_COMPLETION_INDEX",
)  # fmt: skip
IN_A_JOB = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "2"}


@pytest.fixture
def initialize(monkeypatch):
    """Calls `initialize` in an environment and returns the arguments that JAX was given, if any."""
    for name in (*GIVEN, *OF_CLUSTERS):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(jax.distributed, "is_initialized", lambda: False)
    monkeypatch.setattr(distributed, "_is_cloud_tpu", lambda: False)

    def call(environment):
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        calls = []
        monkeypatch.setattr(jax.distributed, "initialize", lambda *args: calls.append(args))
        distributed.initialize()
        return calls

    return call


def test_variables_of_jax(initialize):
    assert initialize(GIVEN) == [("host:1234", 4, 2)]


def test_only_once(initialize, monkeypatch):
    monkeypatch.setattr(jax.distributed, "is_initialized", lambda: True)
    assert initialize(GIVEN) == []


@pytest.mark.parametrize("missing", GIVEN)
@pytest.mark.parametrize("how", ["unset", "empty"])
def test_missing_variables(initialize, missing, how):
    environment = {name: x for name, x in GIVEN.items() if name != missing}
    if how == "empty":
        environment[missing] = ""
    with pytest.raises(ValueError, match=f"given without {missing}: set all three"):
        initialize(environment)


@pytest.mark.parametrize("name", ["JAX_NUM_PROCESSES", "JAX_PROCESS_ID"])
def test_no_numbers(initialize, name):
    with pytest.raises(ValueError, match=f"{name}.*'two'.*give whole numbers"):
        initialize(GIVEN | {name: "two"})


ALONE = {
    "nothing set": {},
    "one task of Slurm": IN_A_JOB | {"SLURM_NTASKS": "1", "SLURM_STEP_NUM_TASKS": "1"},
    "the script of a job of Slurm": IN_A_JOB,
    "one task in a job of two": IN_A_JOB | {"SLURM_STEP_NUM_TASKS": "1"},
    "one rank": {"OMPI_COMM_WORLD_SIZE": "1"},
    "one TPU host": {"TPU_WORKER_HOSTNAMES": "localhost"},
    "a pod that is no indexed job": {"KUBERNETES_SERVICE_HOST": "10.0.0.1"},
}
SEVERAL = {
    "two tasks of Slurm": IN_A_JOB | {"SLURM_STEP_NUM_TASKS": "2"},
    "two ranks": {"OMPI_COMM_WORLD_SIZE": "2"},
    "two TPU hosts": {"TPU_WORKER_HOSTNAMES": "t1k-0,t1k-1"},
    "an indexed job": {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "0"},
}


@pytest.mark.parametrize("environment", ALONE.values(), ids=ALONE)
def test_one_process(initialize, environment):
    assert initialize(environment) == []


@pytest.mark.parametrize("environment", SEVERAL.values(), ids=SEVERAL)
def test_several_processes(initialize, environment):
    assert initialize(environment) == [()]


def test_variables_of_jax_come_first(initialize):
    assert initialize(GIVEN | SEVERAL["two tasks of Slurm"]) == [("host:1234", 4, 2)]


@pytest.mark.parametrize(
    ("chips", "platforms", "libtpu", "is_one"),
    [
        (["/dev/accel0"], "", True, True),
        (["/dev/accel0"], "cpu", True, False),
        (["/dev/accel0"], "", False, False),
        ([], "", True, False),
    ],
)
def test_cloud_tpu(monkeypatch, chips, platforms, libtpu, is_one):
    monkeypatch.setattr(distributed.glob, "glob", lambda _: chips)
    monkeypatch.setattr(distributed.importlib.util, "find_spec", lambda _: libtpu or None)
    monkeypatch.setenv("JAX_PLATFORMS", platforms)
    assert distributed._is_cloud_tpu() == is_one


def test_one_process_is_the_first_and_waits_for_nobody():
    assert distributed.is_first()
    distributed.wait_for_all("a point")


@pytest.fixture
def received():
    """What a handler from before has got."""
    numbers = []
    before = signal.signal(signal.SIGTERM, lambda number, _: numbers.append(number))
    yield numbers
    signal.signal(signal.SIGTERM, before)


def terminate():
    os.kill(os.getpid(), signal.SIGTERM)


def test_sigterm_is_a_request(received):
    with Preemption() as preemption:
        assert not preemption.requested(1)
        terminate()
        assert preemption.requested(2)
        assert preemption.requested(3)
    assert received == []
    with Preemption() as preemption:
        assert not preemption.requested(1)


def test_the_handler_from_before_is_back(received):
    with pytest.raises(KeyError), Preemption():
        raise KeyError
    terminate()
    assert received == [signal.SIGTERM]


def test_requests_can_be_nested(received):
    with Preemption() as outer:
        with Preemption() as inner:
            terminate()
        assert inner.requested(1)
        assert not outer.requested(1)
        terminate()
        assert outer.requested(2)
    assert received == []


def test_other_threads_leave_the_handler_alone(received):
    requested = []

    def run():
        with Preemption() as preemption:
            terminate()
            requested.append(preemption.requested(1))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert requested == [False]
    assert received == [signal.SIGTERM]


def test_several_processes_ask_jax(monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(
        distributed.multihost_utils, "reached_preemption_sync_point", lambda step: step == 3
    )
    before = signal.getsignal(signal.SIGTERM)
    with Preemption() as preemption:
        assert signal.getsignal(signal.SIGTERM) is before
        assert [preemption.requested(step) for step in (1, 2, 3)] == [False, False, True]
