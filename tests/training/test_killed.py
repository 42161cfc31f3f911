"""Runs that are killed, told to stop, out of disk, or spread over processes."""

import contextlib
import random
import re
import shutil
import signal
import subprocess
import time

import numpy as np
import pytest

from tests.training.processes import (
    finish,
    free_port,
    newest_checkpoint,
    numbers,
    result_of,
    start,
    wait_for_checkpoint,
)

# Each of the processes takes seconds to start; test_loop.py interrupts runs within its own.
pytestmark = pytest.mark.slow

CONFIG_FILE = """
from tests.training.tiny import tiny_config


def get_config(which="adamw,400"):
    optimizer, steps = which.split(",")
    return tiny_config(
        tokens=int(steps) * 128, eval_every=100, checkpoint_every=20, optimizer__name=optimizer,
        measure_optimizer=False,
    )
"""


@pytest.fixture(scope="module")
def config_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("config") / "config.py"
    path.write_text(CONFIG_FILE)
    return path


@pytest.fixture(scope="module")
def undisturbed(config_file):
    """The run that the others are compared with, which find in the cache what it has compiled."""
    workdir = config_file.parent / "undisturbed"
    finish(start(config_file, workdir))
    return workdir


def assert_same_run(workdir, expected, steps=400):
    assert [line["step"] for line in numbers(workdir)] == list(range(1, steps + 1))
    assert numbers(workdir) == numbers(expected)
    for key in ("validation_loss", "loss_curve"):
        assert result_of(workdir)[key] == result_of(expected)[key]
    assert not list(workdir.rglob("*tmp*"))


def kill_again_and_again(config, workdir, kills):
    """Kills each of so many processes at a moment of its own, then lets one end; its output."""
    clock, seen = random.Random(0), 0
    for _ in range(kills):
        process = start(config, workdir)
        # Half of them at any moment of starting, compiling and training, the others of saving.
        if clock.random() < 0.5:
            wait_for_checkpoint(process, workdir, seen)
            time.sleep(clock.uniform(0, 0.2))
        else:
            time.sleep(clock.uniform(0, 3))
        process.kill()
        process.communicate()
        assert process.returncode == -signal.SIGKILL
        seen = newest_checkpoint(workdir)
    return finish(start(config, workdir))


def test_killed_runs_end_with_the_same_numbers(config_file, undisturbed):
    workdir = config_file.parent / "killed"
    output, errors = kill_again_and_again(config_file, workdir, 3)
    assert errors == ""
    assert "validation loss" in output
    assert_same_run(workdir, undisturbed)


def test_twenty_kills_of_a_preconditioned_run(config_file):
    config, folder = f"{config_file}:soap,2000", config_file.parent
    finish(start(config, folder / "soap"))
    kill_again_and_again(config, folder / "killed soap", 20)
    assert_same_run(folder / "killed soap", folder / "soap", steps=2000)


def test_sigterm_saves_and_ends(config_file, undisturbed):
    workdir = config_file.parent / "preempted"
    process = start(config_file, workdir)
    wait_for_checkpoint(process, workdir, 20)
    process.terminate()
    _, errors = finish(process, expected=143)
    last = newest_checkpoint(workdir)
    assert errors == (
        f"asked to stop: step {last} of 400 is saved: the same command goes on from there\n"
    )
    assert len(numbers(workdir)) == last
    finish(start(config_file, workdir))
    assert_same_run(workdir, undisturbed)


def mounted(folder, megabytes):
    """A file system of its own in a namespace of its own is more than some machines allow."""
    folder.mkdir()
    size = f"size={megabytes}m"
    command = ["mount", "-t", "tmpfs", "-o", size, "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("this machine does not let us make a small disk")


def fill(path):
    with path.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(1 << 12))


def test_a_full_disk_stops_the_run_and_keeps_its_checkpoint(config_file, undisturbed):
    disk = config_file.parent / "disk"
    mounted(disk, 8)
    try:
        workdir, filler = disk / "run", disk / "filler"
        process = start(config_file, workdir)
        wait_for_checkpoint(process, workdir, 40)
        fill(filler)
        _, errors = finish(process, expected=2)
        # Orbax has its say before.
        assert re.match("error: .*the disk is full.*[Mm]ake room", errors.splitlines()[-1])
        filler.unlink()
        assert newest_checkpoint(workdir) >= 40
        finish(start(config_file, workdir))
        assert_same_run(workdir, undisturbed)
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_two_processes(config_file, undisturbed):
    """Four devices each, on a mesh that crosses them; one is killed, both start again."""
    workdir = config_file.parent / "two"
    begin_in_two_processes(config_file, workdir, wait=False)
    processes = start_both(config_file, workdir)
    before = newest_checkpoint(workdir)
    wait_for_checkpoint(processes[0], workdir, before + 20)
    processes[0].terminate()
    for process in processes:
        finish(process, expected=143)
    assert before < newest_checkpoint(workdir) < 400
    assert_similar(workdir, undisturbed, newest_checkpoint(workdir))


# It notices after 100 seconds.
def test_a_process_whose_partner_is_killed_ends(config_file, undisturbed):
    workdir = config_file.parent / "left"
    begin_in_two_processes(config_file, workdir, wait=True)
    # The rest in one process, on one device.
    finish(start(config_file, workdir))
    assert_similar(workdir, undisturbed, 400)


def start_both(config_file, workdir):
    port = free_port()
    mesh = ["--config.mesh.data=4", "--config.mesh.fsdp=2"]
    return [start(config_file, workdir, *mesh, devices=4, process=(port, i, 2)) for i in (0, 1)]


def begin_in_two_processes(config_file, workdir, wait):
    """Trains until one process is killed, and the other ends by itself or, too, by force."""
    processes = start_both(config_file, workdir)
    wait_for_checkpoint(processes[0], workdir, 20)
    processes[1].kill()
    if not wait:
        processes[0].kill()  # as a scheduler does
    for process in processes:
        process.communicate(timeout=300)
    assert processes[0].returncode != 0
    assert 0 < newest_checkpoint(workdir) < 400


def assert_similar(workdir, undisturbed, steps):
    """The losses of one device but for rounding, which training amplifies."""
    losses, expected = (
        np.array([line["loss"] for line in numbers(w)][:steps]) for w in (workdir, undisturbed)
    )
    assert len(losses) == len(expected) == steps
    np.testing.assert_allclose(losses[:5], expected[:5], rtol=1e-5)
    np.testing.assert_allclose(losses[-1], expected[-1], rtol=0.05)
