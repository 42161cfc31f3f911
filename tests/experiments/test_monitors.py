"""Where the lines of metrics.jsonl go besides, and which steps are traced."""

import struct
import sys
import types

import pytest

from experiments import monitors
from experiments.train import parse_steps
from mup_jax.training import distributed, identity
from mup_jax.training.files import read_lines
from mup_jax.training.metrics import MetricsWriter
from tests.training.tiny import tiny_config

LINES = {
    1: {"loss": 4.5, "skipped": 0, "condition/8x8": 3.0},
    2: {"loss": float("nan"), "skipped": 1},
    3: {"loss": 4.25, "skipped": 1, "validation_loss": 4.75},
}
# As both show them: what is not a number is left out.
SHOWN = {step: {key: x for key, x in line.items() if x == x} for step, line in LINES.items()}


def write(workdir, observers):
    """As a run does."""
    writer = MetricsWriter(workdir / "metrics.jsonl", 0, observers)
    for step, line in LINES.items():
        writer.add(step, **line)
    writer.close()


def open_all(workdir, tensorboard=False, wandb_project=""):
    return monitors.opened(tiny_config(), workdir, tensorboard, wandb_project)


def read_records(path):
    """The records of a TFRecord file: length and its checksum, the bytes and theirs."""
    content = path.read_bytes()
    while content:
        (length,) = struct.unpack_from("<Q", content)
        yield content[12 : 12 + length]
        content = content[16 + length :]


def read_scalars(folder):
    """`{step: {tag: value}}` of TensorBoard's files."""
    event_pb2 = pytest.importorskip("tensorboardX.proto.event_pb2")
    scalars = {}
    for path in folder.iterdir():
        for record in read_records(path):
            event = event_pb2.Event.FromString(record)
            for value in event.summary.value:
                scalars.setdefault(event.step, {})[value.tag] = value.simple_value
    return scalars


def without_seconds(lines):
    assert all("seconds" in line for line in lines.values())
    return {
        step: {key: x for key, x in line.items() if key != "seconds"}
        for step, line in lines.items()
    }


class FakeRun:
    def __init__(self, **settings):
        self.settings, self.logged, self.finished = settings, {}, 0

    def log(self, values, step):
        assert not self.finished
        self.logged[step] = values

    def finish(self, exit_code):
        self.finished += 1
        self.exit_code = exit_code


@pytest.fixture
def wandb_runs(monkeypatch):
    """The runs that a stand-in for Weights & Biases was asked to begin."""
    runs = []

    def init(**settings):
        runs.append(FakeRun(**settings))
        return runs[-1]

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
    return runs


def test_nothing_is_asked_for(tmp_path, wandb_runs):
    with open_all(tmp_path) as observers:
        assert observers == []
    assert list(tmp_path.iterdir()) == wandb_runs == []


def test_tensorboard(tmp_path):
    pytest.importorskip("tensorboardX")
    with open_all(tmp_path, tensorboard=True) as observers:
        write(tmp_path, observers)
    assert without_seconds(read_scalars(tmp_path / "tensorboard")) == SHOWN
    assert [line["loss"] for line in read_lines(tmp_path / "metrics.jsonl")] == [4.5, None, 4.25]


def test_tensorboard_of_a_run_that_fails(tmp_path):
    pytest.importorskip("tensorboardX")

    def run():
        with open_all(tmp_path, tensorboard=True) as (observe,):
            observe({"step": 1, "loss": 4.5})
            raise KeyError

    with pytest.raises(KeyError):
        run()
    assert read_scalars(tmp_path / "tensorboard") == {1: {"loss": 4.5}}


def test_wandb(tmp_path, wandb_runs, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "a secret")
    workdir = tmp_path / "new"
    with open_all(workdir, wandb_project="mine") as observers:
        write(workdir, observers)
        assert not wandb_runs[0].finished
    (run,) = wandb_runs
    assert (run.finished, run.exit_code) == (1, 0)
    assert without_seconds(run.logged) == SHOWN
    # Nothing but these: what is secret, the package finds by itself.
    assert run.settings == {
        "project": "mine",
        "id": identity(tiny_config()),
        "resume": "allow",
        "config": tiny_config().to_dict(),
        "dir": workdir,
    }


def test_wandb_goes_on_with_the_same_run(tmp_path, wandb_runs):
    for changes in ({}, {"mesh__fsdp": 2}, {"seed": 1}):
        with (
            pytest.raises(KeyError),
            monitors.opened(tiny_config(**changes), tmp_path, False, "mine"),
        ):
            raise KeyError
    first, elsewhere, other = (run.settings["id"] for run in wandb_runs)
    assert first == elsewhere != other
    assert [run.exit_code for run in wandb_runs] == [1, 1, 1]


def test_other_processes_do_not_write(tmp_path, wandb_runs, monkeypatch):
    monkeypatch.setattr(distributed, "is_first", lambda: False)
    with open_all(tmp_path, tensorboard=True, wandb_project="mine") as observers:
        assert observers == []
    assert list(tmp_path.iterdir()) == wandb_runs == []


@pytest.mark.parametrize(
    ("package", "options"),
    [("tensorboardX", {"tensorboard": True}), ("wandb", {"wandb_project": "mine"})],
)
def test_missing_package(tmp_path, monkeypatch, package, options):
    monkeypatch.setitem(sys.modules, package, None)
    with (
        pytest.raises(ValueError, match=f"needs a package: pip install {package}$"),
        open_all(tmp_path, **options),
    ):
        pass
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("text", "steps"), [("", []), ("3:5", [3, 4, 5]), ("7:7", [7]), ("9:10", [9, 10])]
)
def test_steps(text, steps):
    assert list(parse_steps(text)) == steps


BAD_STEPS = ("5", "5:", ":5", ":", "0:5", "6:5", "-1:5", "1:-5", "1:2:3", "a:b", "1.5:2", "²:³")


@pytest.mark.parametrize("text", BAD_STEPS)
def test_bad_steps(text):
    with pytest.raises(ValueError, match=r"--profile=.*: give the first and the last step"):
        parse_steps(text)
