import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import pytest

from mup_jax.data import pipeline
from mup_jax.training import CheckpointError, loop, train
from mup_jax.training.metrics import read_lines
from tests.training.tiny import STEPS, mesh_of, tiny_config

ROOT = Path(__file__).parents[2]

# What mup_jax.analysis reads of a cell; the ladder adds "cell" and "rung".
RESULT_KEYS = {
    "width", "depth", "parameters", "tokens", "steps", "optimizer", "learning_rate",
    "weight_decay", "seed", "validation_loss", "loss_curve", "coordinate_check", "flops",
    "seconds", "device", "versions", "corpus", "config",
}  # fmt: skip


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
    """Shares the compiled steps of the other tests."""
    monkeypatch.setattr(loop, "data_parallel_mesh", lambda batch_size: mesh_of(1))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A workdir in which `tiny_config()` has been trained, and what `train` returned."""
    workdir = tmp_path_factory.mktemp("finished") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "data_parallel_mesh", lambda batch_size: mesh_of(1))
        return workdir, train(tiny_config(), workdir)


def contents(folder):
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder): path.read_bytes() for path in files}


def numbers(workdir):
    """All that is measured but the clock."""
    return [
        {key: value for key, value in line.items() if key != "seconds"}
        for line in read_lines(workdir / "metrics.jsonl")
    ]


def strict_json(text):
    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    return json.loads(text, parse_constant=refuse)


def test_result(finished):
    workdir, result = finished
    assert strict_json((workdir / "result.json").read_text()) == result
    assert result.keys() >= RESULT_KEYS
    assert result["flops"].keys() == {"model", "optimizer"}
    assert result["seconds"].keys() == {"total", "compile", "optimizer_share"}
    assert 0 <= result["seconds"]["optimizer_share"] < 1
    assert result["corpus"].keys() >= {"source", "tokenizer", "fingerprint"}
    assert result["coordinate_check"]["feature_change_rms"] > 0
    assert result["config"] == tiny_config().to_dict()
    assert result["steps"] == STEPS
    assert result["tokens"] == STEPS * 128
    # 2 operations forward and 4 backward per token and parameter of a matrix, and attention.
    matrices = 16 * (16 * 16 + 96)
    attention = 4 * 16 * 16 + 3 * 16 * 2
    assert result["flops"]["model"] == 3 * (2 * matrices + attention) * STEPS * 128
    assert result["flops"]["optimizer"] == 0
    lines = read_lines(workdir / "metrics.jsonl")
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    assert [line["step"] for line in lines if "validation_loss" in line] == [20, 40]
    assert [line["step"] for line in lines if "feature_change_rms" in line] == [10]
    assert result["validation_loss"] == lines[-1]["validation_loss"] < lines[0]["loss"]
    assert result["loss_curve"] == [[line["step"], line["loss"]] for line in lines]
    # Not only until the last step was handed to the device.
    assert result["seconds"]["total"] - result["seconds"]["compile"] >= lines[-1]["seconds"]
    assert sorted(path.name for path in (workdir / "checkpoints").iterdir()) == ["30", "40"]


def test_a_finished_run_returns_at_once(finished, monkeypatch):
    workdir, result = finished
    before = contents(workdir)
    monkeypatch.setattr(loop, "make_program", None)
    assert train(tiny_config(), workdir) == result
    assert contents(workdir) == before


def test_results_depend_on_the_seed_and_nothing_else(finished, tmp_path):
    workdir, result = finished
    again = train(tiny_config(), tmp_path / "again")
    other = train(tiny_config(seed=1), tmp_path / "other")
    assert numbers(tmp_path / "again") == numbers(workdir)
    assert again["validation_loss"] == result["validation_loss"]
    assert other["validation_loss"] != result["validation_loss"]


class Interruption(Exception):
    pass


def interrupt_at(steps):
    def on_progress(step, total, loss):
        assert total == STEPS
        if step >= steps:
            raise Interruption

    return on_progress


@pytest.mark.parametrize("name", ["adamw", "soap"])
def test_interrupted_runs_end_with_the_same_numbers(tmp_path, name):
    config = tiny_config(optimizer__name=name)
    expected = train(config, tmp_path / "undisturbed")
    workdir = tmp_path / "interrupted"
    for steps in (16, 30):
        with pytest.raises(Interruption):
            train(config, workdir, interrupt_at(steps))
        assert not (workdir / "result.json").exists()
    result = train(config, workdir)
    assert numbers(workdir) == numbers(tmp_path / "undisturbed")
    assert result["loss_curve"] == expected["loss_curve"]
    assert result["validation_loss"] == expected["validation_loss"]


def test_a_run_without_checkpoints_begins_again(tmp_path):
    config = tiny_config(checkpoint_every=0, measure_optimizer=False, tokens=60 * 128)
    expected = train(config, tmp_path / "undisturbed")
    workdir = tmp_path / "interrupted"

    def interrupt(step, total, loss):
        raise Interruption

    with pytest.raises(Interruption):
        train(config, workdir, interrupt)
    result = train(config, workdir)
    assert numbers(workdir) == numbers(tmp_path / "undisturbed")
    assert result["validation_loss"] == expected["validation_loss"]
    assert not (workdir / "checkpoints").exists()
    assert result["flops"]["optimizer"] is None
    assert result["seconds"]["optimizer_share"] is None


def test_going_on_from_an_older_checkpoint(finished, tmp_path):
    workdir, result = finished
    copy = tmp_path / "copy"
    shutil.copytree(workdir, copy)
    (copy / "result.json").unlink()
    shutil.rmtree(copy / "checkpoints" / "40")
    assert train(tiny_config(), copy)["validation_loss"] == result["validation_loss"]
    assert numbers(copy) == numbers(workdir)


def test_going_on_after_the_last_step(finished, tmp_path):
    workdir, result = finished
    shutil.copytree(workdir, tmp_path / "copy")
    (tmp_path / "copy" / "result.json").unlink()
    again = train(tiny_config(), tmp_path / "copy")
    assert again | {"seconds": None} == result | {"seconds": None}


@pytest.mark.filterwarnings("ignore:coroutine:RuntimeWarning")
def test_a_damaged_checkpoint_is_refused(finished, tmp_path):
    workdir, _ = finished
    copy = tmp_path / "copy"
    shutil.copytree(workdir, copy)
    (copy / "result.json").unlink()
    (copy / "checkpoints" / "40" / "state" / "manifest.ocdbt").write_bytes(b"")
    before = contents(copy)
    with pytest.raises(CheckpointError, match="delete that folder to go on from step 30"):
        train(tiny_config(), copy)
    assert contents(copy) == before


def test_progress(tmp_path):
    calls = []
    train(tiny_config(), tmp_path / "run", lambda *call: calls.append(call))
    losses = {line["step"]: line["loss"] for line in read_lines(tmp_path / "run" / "metrics.jsonl")}
    assert calls
    assert [(step, STEPS, losses[step]) for step, _, _ in calls] == calls
    assert all(b[0] - a[0] >= 16 for a, b in itertools.pairwise(calls))


def test_a_workdir_of_another_configuration(finished):
    workdir, _ = finished
    before = contents(workdir)
    config = tiny_config(seed=5, optimizer__learning_rate=0.5)
    with pytest.raises(ValueError, match="belongs to another configuration") as error:
        train(config, workdir)
    assert "config.seed was 0 and is now 5" in str(error.value)
    assert "config.optimizer.learning_rate was 0.01 and is now 0.5" in str(error.value)
    assert contents(workdir) == before


def test_divergence_ends_a_run(tmp_path):
    steps = 3 * STEPS
    config = tiny_config(
        tokens=steps * 128, warmup_tokens=0, optimizer__learning_rate=1e38, clip_norm=1e38
    )
    result = train(config, tmp_path)
    lines = strict_json(f"[{','.join((tmp_path / 'metrics.jsonl').read_text().splitlines())}]")
    first = next(line["step"] for line in lines if line["loss"] is None)
    assert first <= 10
    assert len(lines) < steps / 2
    assert result["validation_loss"] is None
    assert result["seconds"]["optimizer_share"] is None
    assert strict_json((tmp_path / "result.json").read_text()) == result
    assert train(config, tmp_path) == result


def forbid_programs(monkeypatch):
    def make_program(*args):
        raise AssertionError("too late for an error")

    monkeypatch.setattr(loop, "make_program", make_program)


@pytest.mark.parametrize(
    ("documents", "message"),
    [
        ([], "the corpus of 0 documents has no text: add documents"),
        ([pipeline.Document("a", "")], "the corpus of 1 documents has no text"),
        ([pipeline.Document("a", "text")], "no validation text in 1 documents"),
        (
            [pipeline.Document(str(i), "x") for i in range(100)],
            "tokens are fewer than one window of context",
        ),
    ],
)
def test_too_little_text(tmp_path, monkeypatch, documents, message):
    monkeypatch.setitem(pipeline._SOURCES, "test", lambda pattern: documents)
    loop._load_tokens.cache_clear()
    forbid_programs(monkeypatch)
    with pytest.raises(ValueError, match=message):
        train(tiny_config(data__source="test"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data__source": "nowhere"}, "unknown text source 'nowhere': choose"),
        ({"data__tokenizer": "words"}, "unknown tokenizer 'words'"),
        ({"model__width": 17}, "width=17 is not a multiple"),
        ({"batch_size": 12}, "batch_size=12 cannot be divided over 8 devices"),
    ],
)
def test_errors_leave_no_workdir(tmp_path, monkeypatch, changes, message):
    monkeypatch.undo()  # the mesh of all eight devices
    assert jax.device_count() == 8
    forbid_programs(monkeypatch)
    with pytest.raises(ValueError, match=message):
        train(tiny_config(**changes), tmp_path / "run")
    assert not (tmp_path / "run").exists()


# Killed at any moment

CONFIG_FILE = """
from tests.training.tiny import tiny_config


def get_config():
    return tiny_config(tokens=400 * 128, eval_every=100, checkpoint_every=20)
"""


def start(config_file, workdir):
    command = [sys.executable, "-m", "experiments.train"]
    flags = [f"--config={config_file}", f"--workdir={workdir}"]
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        "JAX_COMPILATION_CACHE_DIR": str(workdir.parent / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    return subprocess.Popen(
        command + flags,
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def newest_checkpoint(workdir):
    names = [path.name for path in (workdir / "checkpoints").glob("*")]
    return max((int(name) for name in names if name.isdigit()), default=0)


def test_killed_runs_end_with_the_same_numbers(tmp_path):
    config_file = tmp_path / "config.py"
    config_file.write_text(CONFIG_FILE)
    undisturbed, killed = tmp_path / "undisturbed", tmp_path / "killed"
    # The others find in the cache what this one has compiled.
    reference = start(config_file, undisturbed)
    assert reference.wait(timeout=300) == 0

    clock = random.Random(0)
    kills = []
    while True:
        process = start(config_file, killed)
        if len(kills) < 3:
            # One checkpoint more than the last time, and then at any moment of saving the next.
            while process.poll() is None and newest_checkpoint(killed) <= (kills or [0])[-1]:
                time.sleep(0.002)
            time.sleep(clock.uniform(0, 0.2))
            process.send_signal(signal.SIGKILL)
        output, errors = process.communicate(timeout=300)
        if process.returncode != -signal.SIGKILL:
            break
        kills.append(newest_checkpoint(killed))
    assert process.returncode == 0, errors
    assert errors == ""
    assert "validation loss" in output
    assert kills == sorted(set(kills))
    assert kills
    assert [line["step"] for line in numbers(killed)] == list(range(1, 401))
    assert numbers(killed) == numbers(undisturbed)
    results = [json.loads((w / "result.json").read_text()) for w in (undisturbed, killed)]
    assert results[0]["validation_loss"] == results[1]["validation_loss"]
    assert results[0]["loss_curve"] == results[1]["loss_curve"]
    assert not list(killed.rglob("*tmp*"))
