"""The coordinate check of the trainer's own models and optimizers."""

import json

import numpy as np
import pytest

from configs import coord_check_cpu, coord_check_paper
from experiments import command, coord_check
from experiments.coord_check import check_config, default_check, run_config
from mup_jax import CoordinateCheck
from mup_jax.training.config import model_config
from tests.training.tiny import mesh_of

CONFIG_FILE = """
from experiments.coord_check import default_check


def get_config():
    config = default_check()
    config.sizes, config.steps, config.seeds = (8, 16), 2, (0,)
    config.train.model.update(width=8, depth=1, mlp_ratio=1)
    config.train.update(context=16, batch_size=8, tokens=1280, warmup_tokens=0)
    return config
"""
NAMES = ("embedding", "middle block", "last block", "logits")


@pytest.fixture
def run(run_command, tmp_path):
    """Runs the command on a tiny configuration: `run(*flags) -> exit code`."""
    path = tmp_path / "config.py"
    path.write_text(CONFIG_FILE)

    def entry_point():
        command.run(coord_check.main, config=str(path), workdir=str(tmp_path / "out"))

    return lambda *flags: run_command(entry_point, *flags)


def made_up_check(slope, config):
    sizes = config.sizes
    x = np.float64(sizes)[:, None, None] ** slope * np.ones((1, 1, 2))
    of_activation = {"rms": x, "change": x, "step_change": x}
    of_parameter = dict.fromkeys(
        ("update_rms", "spectral_norm", "stable_rank", "alignment"), x[..., -1]
    )
    return CoordinateCheck(
        sizes, config.tolerance, dict.fromkeys(NAMES, of_activation), {"w": of_parameter}, x
    )


@pytest.fixture
def run_made_up(run, monkeypatch):
    """As `run`, with the exponents that are given in place of training."""

    def run_with(slopes, *flags):
        def run_checks(config, batches, vocab_size):
            for parametrization, slope in slopes.items():
                yield "AdamW", parametrization, made_up_check(slope, config)

        monkeypatch.setattr(coord_check, "run_checks", run_checks)
        return run(*flags)

    return run_with


def test_files(run, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(coord_check, "make_mesh", lambda config: mesh_of(1))
    # Nothing passes at this tolerance.
    assert run("--config.tolerance=1e-9") == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == ["AdamW, µP: fails unexpectedly", "AdamW, SP: fails"]
    out = tmp_path / "out"
    assert {path.name for path in out.iterdir()} == {"report.md", "results.json", "figure.png"}
    results = json.loads((out / "results.json").read_text())
    assert results["sizes"] == [8, 16]
    assert results["config"]["tolerance"] == 1e-9
    in_mup, in_sp = results["checks"]
    assert set(in_mup["activations"]) == set(NAMES)
    assert np.shape(in_mup["activations"]["logits"]["step_change"]) == (2, 1)
    assert np.shape(in_mup["loss"]) == (2, 1, 2)
    for check in (in_mup, in_sp):
        # The first logits are zero: a loss of log 96.
        np.testing.assert_allclose(np.array(check["loss"])[..., 0], np.log(96), rtol=1e-3)
    # Only the base is the same model in both.
    values = [check["parameters"]["layers/mlp/up"]["update_rms"] for check in (in_mup, in_sp)]
    assert values[0][0] == values[1][0]
    np.testing.assert_allclose(2 * values[0][1][0], values[1][1][0], rtol=0.2)
    report = (out / "report.md").read_text()
    assert "--config.tolerance=1e-09" in report
    assert "### AdamW, µP\n" in report
    assert "| layers/attention/query |" in report


@pytest.mark.parametrize(
    ("slopes", "flags", "code"),
    [
        ({"mup": 0.1, "sp": 0.9}, (), 0),
        ({"mup": 0.1, "sp": 0.0}, (), 0),
        ({"mup": 0.3, "sp": 0.9}, (), 1),
        ({"mup": 0.3, "sp": 0.9}, ("--config.optimizers.AdamW.expected_to_fail",), 0),
        ({"mup": 0.1, "sp": 0.9}, ("--config.optimizers.AdamW.expected_to_fail",), 0),
        ({"mup": np.nan, "sp": 0.9}, (), 1),
    ],
)
def test_exit_code(run_made_up, slopes, flags, code):
    assert run_made_up(slopes, *flags) == code


def test_depth(run_made_up, tmp_path):
    flags = ("--config.vary=depth", "--config.sizes=(1,2)")
    assert run_made_up({"mup": 0.1, "sp": np.nan}, *flags) == 0
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert (results["vary"], results["sizes"]) == ("depth", [1, 2])
    assert results["checks"][1]["activation_slopes"]["logits"]["step_change"] is None


@pytest.mark.parametrize(
    ("vary", "parametrization", "base"),
    [
        ("width", "mup", {"width": 32, "depth": 3}),
        ("width", "sp", {"width": 64, "depth": 3}),
        ("depth", "mup", {"width": 48, "depth": 2}),
        ("depth", "sp", {"width": 48, "depth": 64}),
    ],
)
def test_base_model(vary, parametrization, base):
    config = default_check()
    config.vary = vary
    config.sizes = (32, 64) if vary == "width" else (2, 64)
    config.train.model.update(width=48, depth=3)
    run = run_config(config, config.optimizers.AdamW, parametrization, 64)
    assert run.base.to_dict() == base
    assert run.model[vary] == 64
    assert run.optimizer.name == "adamw"
    multiplier = model_config(run, vocab_size=96).residual_multiplier
    assert multiplier == (1 / 32 if (vary, parametrization) == ("depth", "mup") else 1)


@pytest.mark.parametrize("preset", [coord_check_cpu, coord_check_paper])
@pytest.mark.parametrize("vary", ["width", "depth"])
def test_presets(preset, vary):
    config = preset.get_config(vary)
    check_config(config)
    assert config.vary == vary
    assert config.optimizers.SOAP.expected_to_fail == (vary == "width")
    with pytest.raises(ValueError, match="no variant 'batch': choose width or depth"):
        preset.get_config("batch")


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("vary=batch", "config.vary='batch': choose 'width' or 'depth'"),
        ("sizes=(8,12)", "width=12 is not a multiple of head_dim=8"),
        ("sizes=(8,)", "sizes=(8,): give at least two"),
        ("steps=0", "steps=0"),
        ("train.batch_size=12", "config.batch_size=12 cannot be divided over data * fsdp = 8"),
        ("optimizers.AdamW.name=adam", "unknown optimizer 'adam'"),
    ],
)
def test_bad_flags_end_in_one_line(run, tmp_path, capsys, flag, message):
    assert run(f"--config.{flag}") == 2
    output, errors = capsys.readouterr()
    assert output == ""
    assert errors.startswith("error: ")
    assert errors.count("\n") == 1
    assert message in errors
    assert not list(tmp_path.glob("out/*"))


def test_missing_and_unknown_keys():
    config = default_check()
    config.optimizers = {}
    with pytest.raises(ValueError, match=r"config\.optimizers is empty: give at least one"):
        check_config(config)
    config = default_check()
    config.unlock()
    del config.seeds
    with pytest.raises(ValueError, match=r"missing key config\.seeds: the default is \(0, 1\)"):
        check_config(config)
    config = default_check()
    config.stpes = 3
    with pytest.raises(ValueError, match=r"unknown key config\.stpes: did you mean 'steps'"):
        check_config(config)
