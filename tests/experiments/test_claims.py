"""Workers that share a folder: one at a time has a cell, and none is left behind."""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

from experiments.cells import claims as claims_lib
from experiments.cells.claims import ClaimLost, Claims


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
        taken = list(pool.map(lambda _: Claims().take(tmp_path), range(64)))
    (claim,) = [claim for claim in taken if claim]
    assert Claims().is_taken(tmp_path)
    claim.release()
    assert not Claims().is_taken(tmp_path)
    assert Claims().take(tmp_path) is not None


def test_it_is_free_again_whatever_happens(tmp_path):
    def fail():
        with Claims().held(tmp_path) as claim:
            assert claim
            raise OSError("disk")

    with pytest.raises(OSError, match="disk"):
        fail()
    assert not Claims().is_taken(tmp_path)


def test_a_process_of_this_machine_that_is_gone_holds_nothing(tmp_path):
    script = (
        "import os, sys; from pathlib import Path; from experiments.cells.claims import Claims;"
        "Claims().take(Path(sys.argv[1])); os._exit(1)"
    )
    subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=False)
    assert (tmp_path / "claims" / "0").exists()
    claim = Claims().take(tmp_path)
    assert claim
    assert (tmp_path / "claims" / "1").exists()


def test_a_claim_that_stands_still_is_taken_over_and_its_owner_leaves(tmp_path, clock):
    lost = Claims().take(tmp_path)
    pretend_another_machine(tmp_path / "claims" / "0")
    other = Claims()
    assert other.is_taken(tmp_path)
    clock[0] += claims_lib.STALE_SECONDS - 1
    assert other.is_taken(tmp_path)
    clock[0] += 2
    assert not other.is_taken(tmp_path)
    assert Claims().is_taken(tmp_path)  # who has just come cannot know yet
    lost.check()
    assert other.take(tmp_path)
    with pytest.raises(ClaimLost, match="taken over by another worker"):
        lost.check()


def test_a_claim_that_is_touched_stays(tmp_path, clock):
    assert Claims().take(tmp_path)
    path = tmp_path / "claims" / "0"
    pretend_another_machine(path)
    other = Claims()
    for i in range(5):
        os.utime(path, (i, i))
        assert other.is_taken(tmp_path)
        clock[0] += claims_lib.STALE_SECONDS - 1


def test_two_that_see_the_same_stale_claim_do_not_both_get_it(tmp_path, clock):
    assert Claims().take(tmp_path)
    pretend_another_machine(tmp_path / "claims" / "0")
    first, second = Claims(), Claims()
    for claims in (first, second):
        claims.is_taken(tmp_path)
    clock[0] += claims_lib.STALE_SECONDS + 1
    assert not first.is_taken(tmp_path)
    assert not second.is_taken(tmp_path)
    assert first.take(tmp_path)
    assert second.take(tmp_path) is None


def test_owners_touch_their_claims(tmp_path, monkeypatch):
    monkeypatch.setattr(claims_lib, "_BEAT_SECONDS", 0.01)
    claim = Claims().take(tmp_path)
    path = tmp_path / "claims" / "0"
    os.utime(path, (1, 1))
    while path.stat().st_mtime == 1:
        pass
    claim.release()


def test_half_a_claim_counts(tmp_path):
    """Its owner is between creating and writing the file, or was killed there."""
    (tmp_path / "claims").mkdir()
    (tmp_path / "claims" / "0").touch()
    assert Claims().is_taken(tmp_path)
