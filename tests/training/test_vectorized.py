"""Many runs by one program end as each would alone."""

import json

import jax
import numpy as np
import pytest

from mup_jax.training import claim_workdir, train
from mup_jax.training.vectorized import _chunks, most_runs, train_vectorized
from tests.training.tiny import STEPS, program_of, tiny_config

# Rounding differs, and training amplifies it.
CLOSE = {"rtol": 1e-3}


def sweep(name, rates=(2e-3, 8e-3), seeds=(0, 1), **changes):
    configs = []
    for rate in rates:
        for seed in seeds:
            config = tiny_config(eval_every=0, checkpoint_every=0, **changes)
            config.optimizer.update(name=name, learning_rate=rate)
            config.seed = seed
            configs.append(config)
    return configs


@pytest.mark.parametrize(
    ("name", "lanes"),
    [
        ("adamw", None),
        pytest.param("muon", 2, marks=pytest.mark.slow),
        pytest.param("shampoo", None, marks=pytest.mark.slow),
    ],
)
def test_results_are_those_of_separate_runs(name, lanes, tmp_path):
    configs = sweep(name)[:3]  # no multiple of the devices
    together = train_vectorized(configs, [tmp_path / f"v{i}" for i in range(3)], lanes=lanes)
    for i, (config, result) in enumerate(zip(configs, together, strict=True)):
        alone = train(config, tmp_path / f"s{i}")
        np.testing.assert_allclose(result["validation_loss"], alone["validation_loss"], **CLOSE)
        np.testing.assert_allclose(result["loss_curve"], alone["loss_curve"], **CLOSE)
        changes = [x["coordinate_check"]["feature_change_rms"] for x in (result, alone)]
        np.testing.assert_allclose(*changes, **CLOSE)
        lines = [
            [json.loads(line) for line in (tmp_path / f / "metrics.jsonl").read_text().splitlines()]
            for f in (f"v{i}", f"s{i}")
        ]
        for here, there in zip(*lines, strict=True):
            assert here.keys() == {key for key in there if key in here}
            assert {"step", "seconds", "loss", "gradient_norm", "learning_rate"} <= here.keys()
            for key in here.keys() - {"seconds"}:
                np.testing.assert_allclose(here[key], there[key], rtol=0.02, err_msg=key)
        flops = program_of(1, optimizer__name=name).optimizer_flops * result["steps"]
        assert result["flops"]["optimizer"] == flops
        differ = {"seconds", "loss_curve", "validation_loss", "coordinate_check", "flops"}
        assert {k: v for k, v in result.items() if k not in differ} == {
            k: v for k, v in alone.items() if k not in differ
        }
        assert json.loads((tmp_path / f"v{i}" / "result.json").read_text()) == result
        # A finished run is not trained again, whoever trained it.
        assert train(config, tmp_path / f"v{i}") == result


def test_a_run_that_diverges_leaves_the_others_alone(tmp_path):
    configs = sweep("adamw", rates=(1e30, 8e-3), seeds=(0,), measure_optimizer=False)
    lost, healthy = train_vectorized(configs, [tmp_path / "lost", tmp_path / "healthy"])
    assert lost["validation_loss"] is None
    assert lost["skipped_steps"] == 20
    lines = (tmp_path / "lost" / "metrics.jsonl").read_text().splitlines()
    assert json.loads(lines[-1])["step"] == len(lines) < STEPS
    assert healthy["validation_loss"] < 4
    assert healthy["seconds"]["together"] == 2


def test_runs_of_different_programs_are_refused(tmp_path):
    configs = sweep("adamw", rates=(1e-3,))
    configs[1].context = 32
    with pytest.raises(ValueError, match=r"config.context was 16 and is now 32.*give those"):
        train_vectorized(configs, [tmp_path / "a", tmp_path / "b"])
    assert not list(tmp_path.iterdir())


def test_folders_of_finished_and_of_other_runs_are_refused(tmp_path):
    configs = sweep("adamw", rates=(1e-3, 2e-3), seeds=(0,))
    folders = tmp_path / "a", tmp_path / "b"
    claim_workdir(folders[1], configs[0])
    with pytest.raises(ValueError, match="belongs to another configuration"):
        train_vectorized(configs, folders)
    (folders[0] / "result.json").touch()
    with pytest.raises(ValueError, match="a has finished: leave it out"):
        train_vectorized(configs, folders)


def test_how_many_fit():
    config = tiny_config()
    few, many = (most_runs(config, 96, memory) for memory in (10**7, 10**8))
    assert few >= 1
    assert many >= 8 * few
    assert most_runs(config, 96, 0) == jax.local_device_count()


def test_the_coordinate_check_has_a_chunk_of_its_own():
    assert list(_chunks(70)) == [(0, 9), (9, 10), (10, 42), (42, 70)]
    assert list(_chunks(5)) == [(0, 5)]
    assert list(_chunks(10)) == [(0, 9), (9, 10)]
