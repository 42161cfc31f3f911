import itertools
import json
import shutil

import jax
import pytest

from mup_jax.data import pipeline
from mup_jax.training import CheckpointError, loop, train
from mup_jax.training.feed import Feed
from mup_jax.training.files import read_lines
from tests.training.tiny import STEPS, mesh_of, tiny_config

# What mup_jax.analysis reads of a cell; the ladder adds "cell" and "rung".
RESULT_KEYS = {
    "width", "depth", "parameters", "tokens", "steps", "optimizer", "learning_rate",
    "weight_decay", "seed", "validation_loss", "loss_curve", "coordinate_check", "flops",
    "seconds", "device", "versions", "corpus", "config",
}  # fmt: skip


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
    """Shares the compiled steps of the other tests."""
    monkeypatch.setattr(loop, "make_mesh", lambda config: mesh_of(1))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A workdir in which `tiny_config()` has been trained, and what `train` returned."""
    workdir = tmp_path_factory.mktemp("finished") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "make_mesh", lambda config: mesh_of(1))
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
    assert result["seconds"].keys() == {
        "total", "compile", "input", "gradient", "optimizer_share",
    }  # fmt: skip
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
    def on_progress(progress):
        assert progress.steps == STEPS
        if progress.step >= steps:
            raise Interruption

    return on_progress


@pytest.mark.parametrize("name", ["adamw", pytest.param("soap", marks=pytest.mark.slow)])
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

    def interrupt(progress):
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


def test_a_damaged_checkpoint_is_set_aside(finished, tmp_path, caplog):
    workdir, result = finished
    copy = tmp_path / "copy"
    shutil.copytree(workdir, copy)
    (copy / "result.json").unlink()
    (copy / "checkpoints" / "40" / "state" / "manifest.ocdbt").write_bytes(b"")
    assert train(tiny_config(), copy)["validation_loss"] == result["validation_loss"]
    assert numbers(copy) == numbers(workdir)
    assert "the checkpoint of step 40 is damaged (state/manifest.ocdbt)" in caplog.text
    (aside,) = (copy / "damaged").iterdir()
    assert (aside / "digests.json").exists()


def test_a_run_may_begin_with_the_weights_of_another(finished, tmp_path):
    workdir, _ = finished
    changed = tiny_config(optimizer__name="lion", init_from=str(workdir))
    train(changed, tmp_path / "run")
    first, before = (read_lines(w / "metrics.jsonl") for w in (tmp_path / "run", workdir))
    # Where the other run ended, but at the beginning of the schedule and of the data.
    assert first[0]["loss"] < before[0]["loss"] - 0.5
    assert first[0]["learning_rate"] == 0
    with pytest.raises(CheckpointError, match=r"there is no checkpoint in .*nowhere"):
        train(tiny_config(init_from=str(tmp_path / "nowhere")), tmp_path / "other")


def test_steps_with_bad_gradients_are_skipped_and_counted(finished, tmp_path, monkeypatch):
    real_next, taken = Feed.__next__, []

    def next_batch(feed):
        taken.append(len(taken))
        batch = real_next(feed)
        # An id that is out of range reads NaN from the embedding.
        return jax.tree.map(lambda x: x * 0 + 10**6, batch) if len(taken) in (5, 6, 30) else batch

    monkeypatch.setattr(Feed, "__next__", next_batch)
    result = train(tiny_config(), tmp_path / "run")
    lines = read_lines(tmp_path / "run" / "metrics.jsonl")
    assert [line["step"] for line in lines if line["loss"] is None] == [5, 6, 30]
    assert [line["skipped"] for line in lines] == [0] * 4 + [1] + [2] * 24 + [3] * 11
    assert lines[4]["parameter_norm"] == lines[5]["parameter_norm"] == lines[3]["parameter_norm"]
    assert result["validation_loss"] == pytest.approx(finished[1]["validation_loss"], abs=0.2)
    assert result["skipped_steps"] == 3


def test_progress(tmp_path):
    calls = []
    observed = []
    train(tiny_config(), tmp_path / "run", calls.append, observers=[observed.append])
    lines = read_lines(tmp_path / "run" / "metrics.jsonl")
    assert observed == lines
    losses = {line["step"]: line["loss"] for line in lines}
    assert calls
    assert [(call.step, call.steps, call.loss) for call in calls] == [
        (call.step, STEPS, losses[call.step]) for call in calls
    ]
    assert all(b.step - a.step >= 16 for a, b in itertools.pairwise(calls))
    seconds = {line["step"]: line["seconds"] for line in lines}
    a, b = calls
    rate = (b.step - a.step) * 128 / (seconds[b.step] - seconds[a.step])
    assert b.tokens_per_second == pytest.approx(rate)
    assert b.mfu is None  # a CPU's peak is not known


def test_a_workdir_of_another_configuration(finished):
    workdir, _ = finished
    before = contents(workdir)
    config = tiny_config(seed=5, optimizer__learning_rate=0.5)
    with pytest.raises(ValueError, match="belongs to another configuration") as error:
        train(config, workdir)
    assert "config.seed was 0 and is now 5" in str(error.value)
    assert "config.optimizer.learning_rate was 0.01 and is now 0.5" in str(error.value)
    assert contents(workdir) == before


def test_other_text_is_refused(finished, tmp_path, monkeypatch):
    workdir = tmp_path / "copy"
    shutil.copytree(finished[0], workdir)
    (workdir / "result.json").unlink()
    other = loop.load_tokens("stdlib", "char")._replace(fingerprint="other")
    monkeypatch.setattr(loop, "load_tokens", lambda *_: other)
    with pytest.raises(ValueError, match=r"was begun on other text \(.*, now other\)"):
        train(tiny_config(), workdir)


def test_an_observer_that_fails_is_left_out(tmp_path, caplog):
    seen = []

    def failing(line):
        seen.append(line["step"])
        raise ConnectionError("no route")

    result = train(tiny_config(measure_optimizer=False), tmp_path / "run", observers=[failing])
    assert seen == [1]
    assert result["validation_loss"] is not None
    assert "an observer failed and is left out" in caplog.text


@pytest.mark.slow
def test_a_trace(tmp_path):
    config = tiny_config(measure_optimizer=False)
    workdir = tmp_path / "run"
    with pytest.raises(Interruption):
        train(config, workdir, interrupt_at(16), profile=range(10, 13))
    assert list(workdir.glob("profile/**/*.xplane.pb"))
    # Begun within the steps to trace, and ended before their end.
    shutil.rmtree(workdir / "profile")
    train(config, workdir, profile=range(5, 100))
    assert list(workdir.glob("profile/**/*.xplane.pb"))


def test_health(tmp_path):
    config = tiny_config(optimizer__name="shampoo", health_every=20, measure_optimizer=False)
    workdir = tmp_path / "run"
    train(config, workdir)
    lines = {line["step"]: line for line in read_lines(workdir / "metrics.jsonl")}
    assert [step for step, line in lines.items() if "nonfinite" in line] == [20, 40]
    conditions = [key for key in lines[40] if key.startswith("condition/")]
    assert conditions
    assert all(lines[40][key] >= 1 for key in conditions)


def test_a_run_that_is_lost_has_no_loss_though_it_was_validated(tmp_path, monkeypatch):
    real_next, taken = Feed.__next__, []

    def next_batch(feed):
        taken.append(len(taken))
        batch = real_next(feed)
        return jax.tree.map(lambda x: x * 0 + 10**6, batch) if len(taken) > 15 else batch

    monkeypatch.setattr(Feed, "__next__", next_batch)
    config = tiny_config(eval_every=5, checkpoint_every=5, tokens=100 * 128)
    result = train(config, tmp_path / "run")
    lines = read_lines(tmp_path / "run" / "metrics.jsonl")
    assert len(lines) < 100
    assert lines[-1]["validation_loss"] is not None
    assert result["validation_loss"] is None


def test_divergence_ends_a_run(tmp_path, caplog):
    steps = 3 * STEPS
    config = tiny_config(
        tokens=steps * 128, warmup_tokens=0, optimizer__learning_rate=1e38, clip_norm=1e38
    )
    result = train(config, tmp_path)
    lines = strict_json(f"[{','.join((tmp_path / 'metrics.jsonl').read_text().splitlines())}]")
    first = next(line["step"] for line in lines if line["loss"] is None)
    assert first <= 10
    assert len(lines) < steps
    skipped = [line["skipped"] for line in lines]
    assert skipped[-20:] == [*range(skipped[-1] - 19, skipped[-1] + 1)]
    assert "the run has ended: no gradient was finite" in caplog.text
    assert result["skipped_steps"] == lines[-1]["skipped"]
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
    loop.load_tokens.cache_clear()
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
        ({"batch_size": 12}, r"batch_size=12 cannot be divided over data \* fsdp = 8 devices"),
    ],
)
def test_errors_leave_no_workdir(tmp_path, monkeypatch, changes, message):
    monkeypatch.undo()  # the mesh of all eight devices
    assert jax.device_count() == 8
    forbid_programs(monkeypatch)
    with pytest.raises(ValueError, match=message):
        train(tiny_config(**changes), tmp_path / "run")
    assert not (tmp_path / "run").exists()
