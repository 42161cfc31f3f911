import json
from pathlib import Path

import jax.numpy as jnp
import pytest

from experiments import command, train
from mup_jax.training import checkpoint
from mup_jax.training.config import to_json
from mup_jax.training.loop import claim_workdir
from tests.training.tiny import tiny_config

ROOT = Path(__file__).parents[2]

CONFIG_FILE = """
from tests.training.tiny import tiny_config


def get_config():
    return tiny_config()
"""


def entry_point():
    command.run(train.main, config=str(ROOT / "configs" / "tiny.py"), workdir="unused")


@pytest.fixture
def config_file(tmp_path):
    path = tmp_path / "config.py"
    path.write_text(CONFIG_FILE)
    return path


@pytest.fixture
def fail(run_command, config_file, capsys):
    """Runs the command, which must end with one line on stderr, and returns it."""

    def run(*arguments):
        assert run_command(entry_point, f"--config={config_file}", *arguments) == 2
        output, errors = capsys.readouterr()
        assert output == ""
        assert errors.startswith("error: ")
        assert errors.count("\n") == 1
        assert errors.endswith("\n")
        return errors

    return run


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--config.model.widht=16", "widht"),
        ("--config.model.width=33", "width=33 is not a multiple of head_dim=8: choose width 32 or"),
        ("--config.optimizer.name=adam", "unknown optimizer 'adam': choose one of adamw, muon"),
        ("--config.tokens=5", "config.tokens=5 is less than one batch of 128 tokens"),
        ("--config.batch_size=4", "config.batch_size=4 cannot be divided over 8 devices"),
        ("--config.data.source=nowhere", "unknown text source 'nowhere'"),
        ("--config=nowhere.py", "nowhere.py"),
        ("--unknown=1", "unknown"),
    ],
)
def test_bad_flags_leave_no_workdir(fail, tmp_path, argument, message):
    workdir = tmp_path / "run"
    assert message in fail(argument, f"--workdir={workdir}")
    assert not workdir.exists()


def test_workdir_of_another_configuration(fail, tmp_path):
    workdir = tmp_path / "run"
    claim_workdir(workdir, tiny_config(seed=7))
    error = fail(f"--workdir={workdir}")
    assert f"{workdir} belongs to another configuration (config.seed was 7 and is now 0)" in error
    assert [path.name for path in workdir.iterdir()] == ["config.json"]
    assert (workdir / "config.json").read_text() == to_json(tiny_config(seed=7)) + "\n"


@pytest.mark.filterwarnings("ignore:coroutine:RuntimeWarning")
def test_damaged_checkpoint(fail, tmp_path):
    workdir = tmp_path / "run"
    claim_workdir(workdir, tiny_config())
    checkpoints = checkpoint.Checkpoints(workdir / "checkpoints")
    checkpoints.save(10, jnp.zeros(3), {"next_index": 10})
    checkpoints.close()
    (workdir / "checkpoints" / "10" / "state" / "manifest.ocdbt").write_bytes(b"")
    error = fail(f"--workdir={workdir}")
    assert f"the checkpoint in {workdir / 'checkpoints' / '10'} is damaged" in error
    assert "delete that folder to go on from the beginning" in error
    assert sorted(path.name for path in workdir.iterdir()) == ["checkpoints", "config.json"]


def test_workdir_is_a_file(fail, tmp_path):
    (tmp_path / "file").write_text("mine")
    assert "file" in fail(f"--workdir={tmp_path / 'file'}")
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize(
    ("loss", "outcome"), [(1.23456, "validation loss 1.2346 nats per token"), (None, "diverged")]
)
def test_output(run_command, config_file, tmp_path, monkeypatch, capsys, loss, outcome):
    calls = []

    def fake_train(config, workdir, on_progress):
        calls.append((json.loads(to_json(config)), workdir))
        on_progress(16, 40, 4.25)
        return {"validation_loss": loss, "parameters": 1234, "tokens": 5678}

    monkeypatch.setattr(train, "train", fake_train)
    arguments = [f"--config={config_file}", f"--workdir={tmp_path}", "--config.seed=3"]
    assert run_command(entry_point, *arguments) == 0
    progress, summary, files = capsys.readouterr().out.splitlines()
    assert progress == "step 16/40  loss 4.2500  0 s"
    assert summary == f"1,234 parameters, 5,678 tokens: {outcome}"
    assert files.endswith(str(tmp_path))
    assert calls == [(json.loads(to_json(tiny_config(seed=3))), str(tmp_path))]
