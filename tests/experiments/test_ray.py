"""The launcher "ray", on a cluster of two nodes that both are this machine."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from experiments.cells import run
from experiments.cells.cell import FinishedCells, Task, Work

psutil = pytest.importorskip("psutil")
ray_cluster = pytest.importorskip("experiments.cells.ray_cluster")
cluster_utils = pytest.importorskip("ray.cluster_utils")

CONFIG_FILE = """
from tests.experiments.test_ladder import small_ladder

def get_config():
    optimizers = {"adamw": small_ladder().optimizers.adamw}
    few = {"seeds": (0,), "tuning_seeds": 1, "checks": (), "max_extensions": 0}
    few["optimizers"] = optimizers
    return small_ladder(workers=2, platform="cpu", **few)
"""


@pytest.fixture(scope="module")
def cluster():
    cluster = cluster_utils.Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    for _ in range(2):
        cluster.add_node(num_cpus=1)
    yield cluster
    cluster.shutdown()


@pytest.fixture
def ladder(tmp_path):
    path = tmp_path / "ladder.py"
    path.write_text(CONFIG_FILE)
    return path


def start(config, workdir, launcher, **environment):
    command = [sys.executable, "-m", "experiments.scale_ladder", f"--launcher={launcher}"]
    return subprocess.Popen(
        [*command, f"--config={config}", f"--workdir={workdir}"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, **environment},
    )


def losses(workdir):
    return {name: result["validation_loss"] for name, result in FinishedCells(workdir)().items()}


def kill_a_task(workdir, command):
    """Kills a process of the cluster that has begun to train."""
    while not list(workdir.glob("cells/*/metrics.jsonl")):
        assert command.poll() is None, command.stdout.read()
        time.sleep(0.02)
    tasks = [
        process
        for process in psutil.Process().children(recursive=True)
        if "ray::_run_task" in " ".join(process.cmdline())
    ]
    assert tasks
    tasks[0].send_signal(signal.SIGKILL)


@pytest.mark.slow
def test_results_are_those_of_the_local_launcher_though_a_process_is_killed(
    cluster, ladder, tmp_path
):
    on_ray = start(ladder, tmp_path / "ray", "ray", RAY_ADDRESS=cluster.address)
    kill_a_task(tmp_path / "ray", on_ray)
    output, _ = on_ray.communicate(timeout=200)
    assert on_ray.returncode == 0, output
    local = start(ladder, tmp_path / "local", "local")
    assert local.wait(timeout=200) == 0
    assert losses(tmp_path / "ray") == losses(tmp_path / "local")
    assert json.loads((tmp_path / "ray" / "report.json").read_text())["rungs"]
    assert "validation loss" in output
    assert not list((tmp_path / "ray").glob(".seen-by*"))


def work(workers=1, platform="cpu"):
    task = Task("size", "name", [])
    return Work(lambda _: [task], lambda _: {("size", "name"): 1}, {"size": 1.0}, workers, platform)


def test_a_folder_that_a_node_does_not_see(cluster, tmp_path, monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", cluster.address)
    check = ray_cluster._check_sees
    monkeypatch.setattr(ray_cluster, "_check_sees", lambda marker: check(f"{marker}-elsewhere"))
    with pytest.raises(OSError, match=r"does not see .* on a file system that all nodes"):
        run.run_cells(work(), tmp_path, "ray")


def test_a_cluster_without_accelerators(cluster, tmp_path, monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", cluster.address)
    with pytest.raises(ValueError, match="no GPU or TPU in the Ray cluster"):
        run.run_cells(work(platform=""), tmp_path, "ray")


@pytest.mark.parametrize(
    ("platform", "resource"), [("cpu", "CPU"), ("cuda", "GPU"), ("gpu", "GPU"), ("tpu", "TPU")]
)
def test_one_device_for_each_task(platform, resource):
    assert ray_cluster._resource(platform) == resource
    key = {"CPU": "num_cpus", "GPU": "num_gpus", "TPU": "resources"}[resource]
    assert ray_cluster._options(resource)[key] in (1, {"TPU": 1})


def test_no_cluster(tmp_path, monkeypatch):
    def init(**_):
        raise ConnectionError("Could not find any running Ray instance.")

    monkeypatch.setattr(ray_cluster.ray, "init", init)
    with pytest.raises(ConnectionError, match="ray start --head"):
        run.run_cells(work(), tmp_path, "ray")


def test_ray_that_is_not_installed(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.delitem(sys.modules, "experiments.cells.ray_cluster")
    with pytest.raises(ValueError, match=r"pip install 'mup_jax\[ray\]'"):
        run.run_cells(work(), tmp_path, "ray")


def test_local_workers_do_not_share_an_accelerator(tmp_path):
    with pytest.raises(ValueError, match=r"config\.workers=2 .* --launcher=ray"):
        run.run_cells(work(workers=2, platform="cuda"), tmp_path)
