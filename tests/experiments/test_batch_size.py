"""Sweeps over batch sizes: planning and reporting without training, and one tiny one for real."""

import importlib
import json
import math
from pathlib import Path

import pytest

from experiments.cells.cell import FinishedCells
from experiments.cells.run import run_cells
from experiments.sweeps.curves import batch_curves
from experiments.sweeps.plan import Sweep
from experiments.sweeps.run import results_of, write_report
from experiments.sweeps.schedule import tried, work_of
from mup_jax import rules
from mup_jax.analysis import sweeps
from mup_jax.analysis.batch_figure import write_batch_figure
from tests.experiments.test_committed_results import assert_same_text
from tests.experiments.test_sweeps import run
from tests.experiments.test_sweeps import small_sweep as width_sweep

RESULTS = sorted(path.parent for path in Path("results").glob("batch_size*/results.json"))


def small(**changes):
    config = width_sweep(
        vary="batch_size",
        sizes=(2, 8, 32),
        carried={"η·√κ": 0.5, "η the same": 0.0},
        curves=batch_curves({"AdamW": 1e-2}, {}),
    )
    config.train.model.width = config.train.base.width = 8
    config.train.update(tokens=32 * 16 * 8, warmup_tokens=32 * 16, eval_batches=16)
    for key, value in changes.items():
        config[key] = value
    return config


def around(exponent):
    """Loss 2, more with the batch, and more away from the best rate."""

    def loss(config):
        best = 1e-2 * (config.batch_size / 2) ** exponent
        octaves = math.log2(config.optimizer.learning_rate / best)
        return 2 + 0.005 * config.batch_size + 0.1 * octaves**2 + config.seed / 1e4

    return loss


def test_batches_differ_in_nothing_but_their_rows():
    sweep = Sweep(small())
    configs = [sweep.cells(sweep.curves[0], size, 1e-2)[0].config for size in sweep.sizes]
    for size, config in zip(sweep.sizes, configs, strict=True):
        assert config.batch_size == size
        assert config.eval_batches * size == 16 * 2
        assert config.model.width == config.base.width == 8
        config.update(batch_size=1, eval_batches=1)
    assert configs[0] == configs[1] == configs[2]
    assert len(set(sweep.flops.values())) == 1


def test_rates_by_the_rule_and_unchanged_are_tried_at_every_batch():
    sweep = Sweep(small())
    powers, complete = tried(sweep, sweep.curves[0], run(sweep, around(0.25)))
    assert complete
    for size, of_size in powers.items():
        rates = [sweep.value(sweep.curves[0], power) for power in of_size]
        assert 1e-2 in rates
        assert 1e-2 * rules.budget_factor(batch_ratio=size / 2) in rates


@pytest.mark.parametrize(("exponent", "says"), [(0.5, "as the root would"), (1.0, "not as its")])
def test_what_the_page_says(exponent, says, tmp_path):
    sweep = Sweep(small())
    results = results_of(sweep, run(sweep, around(exponent)))
    write_report(results, tmp_path, "A question?", "python -m x")
    report = (tmp_path / "report.md").read_text()
    assert f"batch^{exponent:.2f}" in report
    assert says in report
    assert "the best batch is 2, one of 10 loses 0.05 nats more" in report
    assert "of the smallest batch" in report
    assert (tmp_path / "batches.png").stat().st_size > 10_000
    same, by_root = results["summaries"]
    assert by_root["drift"] == pytest.approx(exponent - 0.5)
    assert same["drift"] == pytest.approx(exponent)


def test_what_diverged_is_reported(tmp_path):
    sweep = Sweep(small())
    loss = lambda config: None if config.batch_size == 32 else around(0.5)(config)
    write_report(results_of(sweep, run(sweep, loss)), tmp_path, "A question?", "python -m x")
    assert "a batch size trained with no learning rate" in (tmp_path / "report.md").read_text()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sizes": (2, 24)}, "tokens=4096 is no whole number of batches of 24 rows of 16"),
        ({"sizes": (2, 64)}, "eval_batches=16 of 2 rows are no whole number of batches of 64"),
        ({"tokens_per_parameter": 20.0}, "tokens_per_parameter=20.0: batches of all sizes"),
    ],
)
def test_bad_sweeps_are_refused_before_anything_runs(changes, message):
    with pytest.raises(ValueError, match=message):
        Sweep(small(**changes))


@pytest.mark.parametrize("name", ["batch_size_cpu", "batch_size_paper"])
def test_configurations_can_be_planned(name):
    sweep = Sweep(importlib.import_module(f"configs.{name}").get_config())
    assert sweep.sizes[-1] == 64 * sweep.sizes[0]


@pytest.mark.parametrize("folder", RESULTS, ids=lambda folder: folder.name)
def test_committed_reports_follow_from_their_losses(folder, tmp_path):
    results = json.loads((folder / "results.json").read_text())
    report = (folder / "report.md").read_text()
    title = report.splitlines()[0].removeprefix("# ")
    command = next(line.strip() for line in report.splitlines() if line.startswith("    python"))
    sweeps.add_summaries(results)
    results = json.loads(json.dumps(results))
    assert_same_text(sweeps.markdown(results, title, "figure.png", command), report)
    write_batch_figure(results, tmp_path / "batches.png")
    assert (tmp_path / "batches.png").stat().st_size > 20_000


@pytest.mark.slow  # the ladder's own goes the same way
def test_a_sweep_for_real(tmp_path):
    sweep = Sweep(small(sizes=(2, 8), seeds=(0,), max_extensions=0, platform="cpu"))
    results = results_of(sweep, run_cells(work_of(sweep), tmp_path))
    write_report(results, tmp_path, "A question?", "python -m x")
    assert len(FinishedCells(tmp_path)()) >= 6
    losses = [x for _, xs in results["curves"][0]["points"]["8"] for x in xs]
    assert all(1 < loss < 5 for loss in losses)
