import json
import time

import jax.numpy as jnp
import pytest

from mup_jax.training.files import read_lines, write_atomically
from mup_jax.training.metrics import MetricsWriter, finite_or_none


def steps_in(path):
    return [line["step"] for line in read_lines(path)]


@pytest.fixture
def path(tmp_path):
    return tmp_path / "metrics.jsonl"


def test_lines_lag_behind_and_flush_writes_them(path):
    writer = MetricsWriter(path, last_step=0)
    for step in range(1, 33):
        writer.add(step, loss=jnp.float32(step))
    assert writer.lines == []
    writer.add(33, loss=jnp.float32(33))
    assert writer.lines == [{"step": 1, "loss": 1.0, "seconds": 0.0}]
    writer.flush()
    assert [line["step"] for line in writer.lines] == list(range(1, 34))
    assert read_lines(path) == writer.lines
    writer.add(34, loss=0.5)
    writer.close()
    assert read_lines(path)[-1] == {"step": 34, "loss": 0.5, "seconds": 0.0}


def test_values(path):
    writer = MetricsWriter(path, last_step=0)
    values = {"a": float("nan"), "b": jnp.inf, "c": jnp.float32(0.1), "d": -jnp.inf, "e": 7}
    writer.add(1, **values)
    writer.close()

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    line = json.loads(path.read_text(), parse_constant=refuse)
    # A float32 survives the way through JSON bit by bit.
    assert line == {
        "step": 1,
        "a": None,
        "b": None,
        "c": float(jnp.float32(0.1)),
        "d": None,
        "e": 7,
        "seconds": 0.0,
    }
    assert isinstance(line["e"], int)
    assert finite_or_none(2) == 2.0


def write_steps(path, last):
    writer = MetricsWriter(path, last_step=0)
    for step in range(1, last + 1):
        writer.add(step, loss=float(step))
    writer.close()


def test_going_on_drops_what_is_beyond_the_checkpoint(path):
    write_steps(path, 5)
    writer = MetricsWriter(path, last_step=3)
    assert steps_in(path) == [1, 2, 3]
    writer.add(4, loss=-4.0)
    writer.close()
    assert [line["loss"] for line in read_lines(path)[2:]] == [3.0, -4.0]
    assert writer.lines == read_lines(path)


def test_the_clock_goes_on(path):
    write_steps(path, 2)
    path.write_text(path.read_text().replace('"seconds": 0.0', '"seconds": 100.0'))
    writer = MetricsWriter(path, last_step=2)
    assert writer.seconds == 100.0
    writer.start()
    writer.add(3, loss=3.0)
    time.sleep(0.01)
    writer.close()
    # When the device had it, not when it was asked to.
    assert 100.01 <= writer.lines[-1]["seconds"] <= writer.seconds < 110


def test_a_new_run_drops_all(path):
    write_steps(path, 5)
    MetricsWriter(path, last_step=0).close()
    assert path.read_text() == ""


def test_torn_last_line(path):
    write_steps(path, 3)
    text = path.read_text()
    complete = len(text.splitlines(keepends=True)[0]) * 2
    for length in range(complete, len(text)):
        path.write_text(text[:length])
        assert steps_in(path) == [1, 2]
    with pytest.raises(ValueError, match="has 2 of the 3 steps"):
        MetricsWriter(path, last_step=3)
    writer = MetricsWriter(path, last_step=2)
    writer.add(3, loss=3.0)
    writer.close()
    assert path.read_text() == text


def test_no_file(path):
    assert read_lines(path) == []


def test_atomic_write_replaces_at_once(tmp_path, monkeypatch):
    path = tmp_path / "result.json"
    write_atomically(path, "old")
    seen = []
    real_replace = type(path).replace

    def replace(partial, target):
        seen.append((target.read_text(), partial.read_text()))
        return real_replace(partial, target)

    monkeypatch.setattr(type(path), "replace", replace)
    write_atomically(path, "new")
    assert seen == [("old", "new")]
    assert path.read_text() == "new"
    assert [p.name for p in tmp_path.iterdir()] == ["result.json"]
