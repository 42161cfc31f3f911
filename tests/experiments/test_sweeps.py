"""Sweeps: planning, scheduling and reporting without training, and one tiny sweep for real."""

import importlib
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
from ml_collections import ConfigDict

from experiments.cells.cell import FinishedCells
from experiments.sweeps.curves import OPTIMIZERS, curve
from experiments.sweeps.plan import Sweep, default_curve, default_sweep, describe
from experiments.sweeps.run import results_of, write_report
from experiments.sweeps.schedule import missing_tasks, remaining_cells, tried
from mup_jax.analysis.sweeps import finding

CONFIGS = sorted(path.stem for path in Path("configs").glob("*_transfer_*.py"))


def small_sweep(**changes):
    config = default_sweep()
    config.train.model.update(depth=1, head_dim=8)
    config.train.base.update(depth=1)
    config.train.update(context=16, batch_size=8, tokens=12 * 128, warmup_tokens=2 * 128)
    config.train.update(eval_batches=4, checkpoint_every=0, measure_optimizer=False)
    config.sizes = (8, 16, 32)
    config.reach = 1
    config.curves = {"AdamW": {"µP": curve("AdamW", 1e-2, {})}}
    for key, value in changes.items():
        config[key] = value
    return config


def provenance():
    return {
        "device": "cpu",
        "versions": {"jax": "0"},
        "corpus": {"source": "s", "fingerprint": "f"},
    }


def run(sweep, loss):
    """Does what is missing until nothing is; `loss(config)` stands for training."""
    results, rounds = {}, 0
    while tasks := missing_tasks(sweep, results):
        for cell in tasks[0].cells:
            results[cell.name] = {"validation_loss": loss(cell.config), **provenance()}
        rounds += 1
        assert rounds < 50
    assert set(remaining_cells(sweep, results).values()) == {0}
    return results


def around(optimum):
    """Loss 2 + log2(rate / optimum(width))², a little more with each seed."""

    def loss(config):
        rate = config.optimizer.learning_rate
        return 2 + math.log2(rate / optimum(config.model.width)) ** 2 + config.seed / 100

    return loss


@pytest.mark.parametrize("exponent", [0.0, -1.0, 2.0])
def test_the_grid_follows_the_optimum(exponent):
    sweep = Sweep(small_sweep())
    results = run(sweep, around(lambda width: 1e-2 * (width / 8) ** exponent))
    powers, complete = tried(sweep, sweep.curves[0], results)
    assert complete
    for size, of_size in powers.items():
        best = round(exponent * math.log2(size / 8))
        assert {best - 1, best, best + 1} <= set(of_size)
        assert 0 in of_size  # what tuning at the base would have taken
    assert sum(map(len, powers.values())) <= 3 + 2 * 7
    [summary] = results_of(sweep, results)["summaries"]
    assert summary["drift"] == pytest.approx(exponent, abs=1e-6)
    assert summary["lost"][32] == pytest.approx((2 * exponent) ** 2, abs=1e-6)


def test_extensions_end():
    sweep = Sweep(small_sweep(max_extensions=1))
    powers, _ = tried(sweep, sweep.curves[0], run(sweep, around(lambda width: 1.0)))
    assert powers[8] == [-1, 0, 1, 2]
    [summary] = results_of(sweep, run(sweep, around(lambda width: 1.0)))["summaries"]
    assert summary["best"][8]["at_edge"]


def test_diverged_runs_do_not_end_a_sweep():
    sweep = Sweep(small_sweep())
    loss = around(lambda width: 1e-2)
    diverges = lambda c: None if c.optimizer.learning_rate > 1.5e-2 else loss(c)
    [summary] = results_of(sweep, run(sweep, diverges))["summaries"]
    assert summary["best"][32]["value"] == pytest.approx(1e-2)


def test_a_fixed_grid():
    sweep = Sweep(small_sweep(follow=False, reach=2, step=4.0))
    results = run(sweep, around(lambda width: 1.0))
    powers, _ = tried(sweep, sweep.curves[0], results)
    assert set(map(tuple, powers.values())) == {(-2, -1, 0, 1, 2)}
    assert len(results) == 3 * 5 * 2
    rates = {cell.config.optimizer.learning_rate for cell in missing_tasks(sweep, {})[0].cells}
    assert sorted(rates) == pytest.approx([1e-2 * 4.0**i for i in range(-2, 3)])


def test_carried_values_are_tried_everywhere():
    decay = {"AdamW": {"µP": curve("AdamW", 1e-2, {}, weight_decay=1e-2)}}
    sweep = Sweep(
        small_sweep(swept="weight_decay", curves=decay, carried={"1/width": -1.0, "same": 0.0},
                    also=(0.0,))
    )  # fmt: skip
    loss = lambda c: 2 + (math.log2(c.optimizer.weight_decay / 1e-2) ** 2
                          if c.optimizer.weight_decay else 5)  # fmt: skip
    results = results_of(sweep, run(sweep, loss))
    [points] = [curve["points"] for curve in results["curves"]]
    for size, shift in ((8, 0), (16, 1), (32, 2)):
        values = [value for value, _ in points[str(size)]]
        assert values[0] == 0
        assert {1e-2, 1e-2 * 2.0**-shift} <= set(values)
    by_width, same = results["summaries"]
    assert (by_width["variant"], same["variant"]) == ("1/width", "same")
    assert by_width["drift"] == pytest.approx(1.0)
    assert same["drift"] == pytest.approx(0.0)
    assert by_width["lost"][32] == pytest.approx(4.0)


def test_parametrizations_choose_the_base():
    sp, mup = (
        Sweep(small_sweep(curves={"AdamW": {"x": curve("AdamW", 1e-2, {}, parametrization=p)}}))
        for p in ("sp", "mup")
    )
    of = lambda sweep: sweep.cells(sweep.curves[0], 32, 1e-2)[0].config
    assert of(mup).base.width == 8
    assert of(sp).base.width == of(sp).model.width == 32
    depth = small_sweep(vary="depth", sizes=(1, 2))
    depth.train.model.width = depth.train.base.width = 8
    sweep = Sweep(depth)
    config = sweep.cells(sweep.curves[0], 2, 1e-2)[0].config
    assert (config.model.depth, config.base.depth, config.model.width) == (2, 1, 8)


def test_tokens_per_parameter():
    sweep = Sweep(small_sweep(tokens_per_parameter=20.0))
    cells = [sweep.cells(sweep.curves[0], size, 1e-2)[0].config for size in sweep.sizes]
    assert cells[0].tokens == 20 * (8 * 8 * 16 + 2 * 96 * 8)
    assert cells[0].tokens < cells[1].tokens < cells[2].tokens


@pytest.mark.parametrize("name", CONFIGS)
def test_configurations_can_be_planned(name):
    module = importlib.import_module(f"configs.{name}")
    config = module.get_config()
    sweep = Sweep(config)
    assert sweep.sizes[-1] >= 8 * sweep.sizes[0]
    for one in sweep.curves:
        assert one.name in describe(sweep)
    assert Path(f"experiments/{name.rpartition('_')[0]}.py").exists()


def test_optimizers_have_the_names_of_the_paper():
    for label, (name, options) in OPTIMIZERS.items():
        assert (name == "shampoo") == ("Shampoo" in label)
        if name == "shampoo":
            assert options.get("grafted", True) == label.startswith("#")
            assert (options.get("exponent", 0.5) == 0.5) == label.endswith("²")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sizes": (8,)}, "at least two, ascending"),
        ({"sizes": (8, 12)}, "12 is not a multiple of head_dim=8"),
        ({"vary": "heads"}, "config.vary='heads': choose one of"),
        ({"swept": "beta"}, "config.swept='beta': choose one of"),
        ({"swept": "weight_decay"}, "weight_decay=0.0: it is swept over its multiples"),
        ({"swept": "epsilon"}, "epsilon=None: it is swept"),
        (
            {"swept": "epsilon", "curves": {"A": {"x": {**default_curve(), "epsilon": "small"}}}},
            "epsilon='small': it is swept",
        ),
        ({"step": 1.0}, "config.step=1.0: give at least 1.1"),
        ({"seeds": (0, 0)}, "seeds"),
        ({"workers": 0}, "workers=0"),
        ({"curves": {}}, "config.curves is empty"),
        ({"curves": {"A": {"x": {**default_curve(), "parametrization": "ntk"}}}}, "'ntk'"),
        ({"curves": {"A": {"x": {**default_curve(), "optimiser": "sgd"}}}}, "mean 'optimizer'"),
        ({"curves": {"A": {"x": {**default_curve(), "optimizer": "sgd"}}}}, "unknown optimizer"),
    ],
)
def test_bad_sweeps_are_refused_before_anything_runs(changes, message):
    with pytest.raises(ValueError, match=message):
        Sweep(small_sweep(**{k: ConfigDict(v) if k == "curves" else v for k, v in changes.items()}))


def test_report_of_what_diverged(tmp_path):
    sweep = Sweep(small_sweep())
    results = results_of(sweep, run(sweep, lambda config: None))
    write_report(results, tmp_path, "A question?", "python -m x")
    assert "unknown (AdamW)" in finding(results)
    assert "| AdamW | µP | diverged |" in (tmp_path / "report.md").read_text()


CONFIG_FILE = """
from experiments.sweeps.curves import curve
from tests.experiments.test_sweeps import small_sweep

def get_config():
    curves = {"AdamW": {"SP": curve("AdamW", 1e-2, {}, parametrization="sp"),
                        "µP": curve("AdamW", 1e-2, {})}}
    return small_sweep(sizes=(8, 16), max_extensions=0, workers=2, platform="cpu", curves=curves)
"""


@pytest.mark.slow  # the ladder's own goes the same way
def test_a_sweep_from_the_command_line(tmp_path):
    config, workdir = tmp_path / "sweep.py", tmp_path / "run"
    config.write_text(CONFIG_FILE)
    command = [sys.executable, "-m", "experiments.lr_transfer"]
    command += [f"--config={config}", f"--workdir={workdir}"]
    first = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert first.returncode == 0, first.stderr
    finished = FinishedCells(workdir)()
    results = json.loads((workdir / "results.json").read_text())
    points = [curve["points"] for curve in results["curves"]]
    assert len(finished) == 2 * 3 * (1 + 2)  # the base's runs serve both variants
    # At the base µP is standard parametrization.
    assert points[0]["8"] == points[1]["8"]
    assert points[0]["16"] != points[1]["16"]
    assert (workdir / "figure.png").stat().st_size > 10_000
    report = (workdir / "report.md").read_text()
    assert f"python -m experiments.lr_transfer --config={config}" in report
    again = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    assert "validation loss" not in again.stdout  # nothing was trained again
    assert json.loads((workdir / "results.json").read_text()) == results
