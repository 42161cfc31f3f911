import json
from pathlib import Path

import jax.numpy as jnp
import pytest

from experiments import command, train
from mup_jax.training import Preempted, checkpoint
from mup_jax.training.config import to_json
from mup_jax.training.loop import claim_workdir
from mup_jax.training.throughput import Progress
from tests.training.tiny import tiny_config

ROOT = Path(__file__).parents[2]

CONFIG_FILE = """
from tests.training.tiny import tiny_config


def get_config():
    return tiny_config()
"""


def entry_point():
    command.run(
        train.main,
        config=str(ROOT / "configs" / "tiny.py"),
        workdir="unused",
        define_flags=train.define_flags,
    )


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
        ("--config.optimizer.learning_rate=nan", "config.optimizer.learning_rate=nan: give a pos"),
        ("--config.optimizer.learning_rate=-1", "config.optimizer.learning_rate=-1.0: give a pos"),
        ("--config.optimizer.weight_decay=inf", "config.optimizer.weight_decay=inf: give a pos"),
        ("--config.optimizer.epsilon=0", "config.optimizer.epsilon=0: give a positive, finite"),
        (
            "--config.optimizer.options.b_1=1",
            "adamw.options.b_1: did you mean 'b1'? known are b1, b2",
        ),
        ("--config.optimizer.options.b1=nan", "adamw.options.b1='nan': give float"),
        ("--config.mesh.fsdp=0", "config.mesh=data=-1, fsdp=0, tensor=1: give positive sizes"),
        ("--config.optimizer.name=adam", "unknown optimizer 'adam': choose one of adamw, muon"),
        ("--config.tokens=5", "config.tokens=5 is less than one batch of 128 tokens"),
        ("--config.batch_size=4", "config.batch_size=4 cannot be divided over data * fsdp = 8"),
        ("--config.data.source=nowhere", "unknown text source 'nowhere'"),
        ("--config=nowhere.py", "nowhere.py"),
        ("--unknown=1", "unknown"),
        ("--profile=5", "--profile=5: give the first and the last step, like 100:105"),
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
    assert f"no checkpoint in {workdir / 'checkpoints'} is whole" in error
    assert f"delete {workdir} to begin again" in error
    assert not (workdir / "damaged").exists()


def test_workdir_is_a_file(fail, tmp_path):
    (tmp_path / "file").write_text("mine")
    workdir = f"--workdir={tmp_path / 'file'}"
    assert fail(workdir) == f"error: {workdir} is a file: give a folder\n"
    assert (tmp_path / "file").read_text() == "mine"


def test_output(run_command, config_file, tmp_path, monkeypatch, capsys):
    calls = []

    def fake_train(config, workdir, on_progress, *, observers, profile):
        calls.append((json.loads(to_json(config)), workdir, observers, profile))
        on_progress(Progress(16, 40, 4.25, 12345.6, mfu=0.5))
        on_progress(Progress(32, 40, None, 12345.6, mfu=None))
        return {"validation_loss": 1.23456, "parameters": 1234, "tokens": 5678}

    monkeypatch.setattr(train, "train", fake_train)
    arguments = [f"--config={config_file}", f"--workdir={tmp_path}", "--config.seed=3"]
    assert run_command(entry_point, *arguments, "--profile=5:7") == 0
    progress, lost, summary, files = capsys.readouterr().out.splitlines()
    assert progress == "step 16/40  loss 4.2500  12,346 tokens/s  MFU 50.0%"
    assert lost == "step 32/40  loss not finite  12,346 tokens/s"
    assert summary == "1,234 parameters, 5,678 tokens: validation loss 1.2346 nats per token"
    assert files.endswith(str(tmp_path))
    assert calls == [(json.loads(to_json(tiny_config(seed=3))), tmp_path, [], range(5, 8))]


def test_a_run_that_gave_up(run_command, config_file, tmp_path, monkeypatch, capsys):
    def fake_train(*args, **options):
        return {"validation_loss": None, "parameters": 1234, "tokens": 5678}

    monkeypatch.setattr(train, "train", fake_train)
    arguments = [f"--config={config_file}", f"--workdir={tmp_path}"]
    assert run_command(entry_point, *arguments) == 3
    output, errors = capsys.readouterr()
    assert output == ""
    assert errors == (
        f"diverged: the norms in {tmp_path / 'metrics.jsonl'} show where it began; try a lower "
        "learning rate or a longer warm-up, in another --workdir\n"
    )


def test_preemption(run_command, config_file, tmp_path, monkeypatch, capsys):
    def preempted(*args, **options):
        raise Preempted("asked to stop: step 3 of 40 is saved")

    monkeypatch.setattr(train, "train", preempted)
    arguments = [f"--config={config_file}", f"--workdir={tmp_path}"]
    assert run_command(entry_point, *arguments) == 143
    assert capsys.readouterr().err == (
        "asked to stop: step 3 of 40 is saved: the same command goes on from there\n"
    )
