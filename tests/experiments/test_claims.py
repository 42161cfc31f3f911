"""Workers that share a folder: one at a time has a cell, and none is left behind."""

import contextlib
import json
import os
import queue
import subprocess
import sys
import time
from concurrent.futures import Future, ThreadPoolExecutor

import pytest

from experiments.cells import claims as claims_lib
from experiments.cells import run as run_lib
from experiments.cells import worker
from experiments.cells.cell import Cell, FinishedCells, Task, Work, folder_of
from experiments.cells.claims import ClaimLost, Claims, held, take
from tests.training.tiny import tiny_config


@pytest.fixture
def clock(monkeypatch):
    """Seconds that pass when the test says so."""
    now = [1000.0]
    monkeypatch.setattr(claims_lib.time, "monotonic", lambda: now[0])
    return now


def pretend_another_machine(path):
    owner = json.loads(path.read_text())
    path.write_text(json.dumps(owner | {"machine": "elsewhere"}))


def test_one_of_many_takes_a_cell(tmp_path):
    with ThreadPoolExecutor(16) as pool:
        taken = list(pool.map(lambda _: take(tmp_path, 0), range(64)))
    (claim,) = [claim for claim in taken if claim]
    assert Claims().next_number(tmp_path) is None
    claim.release()
    assert Claims().next_number(tmp_path) == 1
    assert take(tmp_path, 1)


def test_it_is_free_again_whatever_happens(tmp_path):
    def fail():
        with held(tmp_path, 0) as claim:
            assert claim
            raise OSError("disk")

    with pytest.raises(OSError, match="disk"):
        fail()
    assert Claims().next_number(tmp_path) == 1


def test_a_process_of_this_machine_that_is_gone_holds_nothing(tmp_path):
    script = (
        "import os, sys; from pathlib import Path; from experiments.cells.claims import take;"
        "take(Path(sys.argv[1]), 0); os._exit(1)"
    )
    subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=False)
    assert (tmp_path / "claims" / "0").exists()
    assert Claims().next_number(tmp_path) == 1


def test_a_claim_that_stands_still_is_taken_over_and_its_owner_leaves(tmp_path, clock):
    lost = take(tmp_path, 0)
    pretend_another_machine(tmp_path / "claims" / "0")
    other = Claims()
    assert other.next_number(tmp_path) is None
    clock[0] += claims_lib.STALE_SECONDS - 1
    assert other.next_number(tmp_path) is None
    clock[0] += 2
    assert other.next_number(tmp_path) == 1
    assert Claims().next_number(tmp_path) is None  # who has just come cannot know yet
    lost.check()
    assert take(tmp_path, 1)
    with pytest.raises(ClaimLost, match="taken over by another worker"):
        lost.check()


def test_a_claim_that_is_touched_stays(tmp_path, clock):
    assert take(tmp_path, 0)
    path = tmp_path / "claims" / "0"
    pretend_another_machine(path)
    other = Claims()
    for i in range(5):
        os.utime(path, (i, i))
        assert other.next_number(tmp_path) is None
        clock[0] += claims_lib.STALE_SECONDS - 1


def test_two_that_see_the_same_claim_do_not_both_follow_it(tmp_path, clock):
    assert take(tmp_path, 0)
    pretend_another_machine(tmp_path / "claims" / "0")
    first, second = Claims(), Claims()
    for claims in (first, second):
        assert claims.next_number(tmp_path) is None
    clock[0] += claims_lib.STALE_SECONDS + 1
    numbers = [claims.next_number(tmp_path) for claims in (first, second)]
    assert numbers == [1, 1]
    assert [take(tmp_path, number) is not None for number in numbers] == [True, False]


def test_a_schedule_goes_on_with_what_another_machine_has_left(tmp_path, clock, monkeypatch):
    """The whole way: a stale claim, the runner, the worker."""
    cell = Cell("small", "one", tiny_config(seed=1))
    folder = folder_of(cell, tmp_path)
    take(folder, 0)
    pretend_another_machine(folder / "claims" / "0")
    monkeypatch.setattr(worker, "train", write_result)
    monkeypatch.setattr(run_lib.time, "sleep", lambda seconds: clock.__setitem__(0, clock[0] + 60))
    finished = FinishedCells(tmp_path)
    work = Work(
        missing_tasks=lambda results: [] if results else [Task("small", "one", [cell])],
        remaining_cells=lambda results: {("small", "one"): 1 - len(results)},
        flops={"small": 1.0},
        workers=1,
        platform="cpu",
    )
    submitted = []

    @contextlib.contextmanager
    def launch(work, workdir, finished):
        def submit(task):
            submitted.append(task)
            worker.run_task(task, workdir, queue.SimpleQueue())
            future = Future()
            future.set_result(None)
            return future

        yield submit

    monkeypatch.setattr(run_lib, "_find", lambda launcher: launch)
    assert run_lib.run_cells(work, tmp_path)[cell.name]["steps"] == 3
    assert len(submitted) == 1
    assert clock[0] > 1000 + claims_lib.STALE_SECONDS
    assert finished()


def write_result(config, folder, report):
    result = {"steps": 3}
    (folder / "result.json").write_text(json.dumps(result))
    return result


def test_owners_touch_their_claims(tmp_path, monkeypatch):
    monkeypatch.setattr(claims_lib, "_BEAT_SECONDS", 0.01)
    claim = take(tmp_path, 0)
    path = tmp_path / "claims" / "0"
    os.utime(path, (1, 1))
    deadline = time.monotonic() + 30
    while path.stat().st_mtime == 1 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert path.stat().st_mtime > 1
    claim.release()


def test_half_a_claim_counts(tmp_path):
    """Its owner is between creating and writing the file, or was killed there."""
    (tmp_path / "claims").mkdir()
    (tmp_path / "claims" / "0").touch()
    assert Claims().next_number(tmp_path) is None
