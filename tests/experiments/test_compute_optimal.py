"""Compute-optimal training: planning and reporting without training, and one tiny run for real."""

import copy
import importlib
import json
import math
from pathlib import Path

import pytest
from ml_collections import ConfigDict

from experiments import command, compute_optimal
from experiments.cells.cell import FinishedCells
from experiments.isoflop.plan import IsoFlop, default_isoflop, default_optimizer, describe, work_of
from experiments.isoflop.report import results_of, write_report
from mup_jax.analysis.isoflop_figure import write_isoflop_figure
from mup_jax.analysis.isoflop_report import add_summaries, finding, markdown

RESULTS = sorted(path.parent for path in Path("results").glob("compute_optimal*/results.json"))
BEST = 5.0


def small(**changes):
    config = default_isoflop()
    config.train.model.update(depth=1, head_dim=8)
    config.train.base.update(width=8, depth=1)
    config.train.update(context=16, batch_size=8, warmup_tokens=2 * 128)
    config.train.update(eval_batches=4, checkpoint_every=0, measure_optimizer=False)
    config.budgets = (2e9, 4e9)
    config.widths = (8, 16, 24, 32, 40, 48)
    config.optimizers = {
        "AdamW": {**default_optimizer(), "weight_decay": 1e-3},
        "Muon": {**default_optimizer(), "optimizer": "muon", "learning_rate": 2e-2},
    }
    for key, value in changes.items():
        config[key] = value
    return config


def finished_with(plan, loss):
    """The results of all cells; `loss(model, cell)` stands for training."""
    results = {}
    while tasks := work_of(plan).missing_tasks(results):
        for cell in tasks[0].cells:
            [model] = [m for models in plan.models for m in models if m.name == cell.size]
            results[cell.name] = {
                "validation_loss": loss(model, cell),
                "device": "cpu",
                "versions": {"jax": "0"},
                "corpus": {"source": "s", "fingerprint": "f"},
            }
    assert not any(work_of(plan).remaining_cells(results).values())
    return results


def parabola(model, cell):
    return 2 + 0.1 * math.log(model.tokens_per_parameter / BEST) ** 2 + cell.config.seed / 1e4


def test_budgets_are_spent_to_within_a_step():
    plan = IsoFlop(small())
    for budget, models in zip(plan.config.budgets, plan.models, strict=True):
        for model in models:
            assert abs(model.flops - budget) <= model.flops / model.steps / 2
            assert model.tokens == model.steps * 128
        ratios = [model.tokens_per_parameter for model in models]
        assert ratios == sorted(ratios, reverse=True)


def test_learning_rate_and_weight_decay_are_the_same_at_all_widths():
    plan = IsoFlop(small())
    cells = [cell for models in plan.models for m in models for cell in plan.cells(m, "AdamW")]
    for cell in cells:
        config = cell.config
        assert config.optimizer.options.weight_decay_scaling == "constant"
        assert config.optimizer.weight_decay == 1e-3
        assert config.optimizer.learning_rate == 1e-2  # the base's: the trainer scales it
        assert config.base.width == 8
    assert {cell.config.model.width for cell in cells} == {8, 16, 24, 32, 40, 48}
    assert len({cell.name for cell in cells}) == len(cells) == 2 * 6 * 2


def test_models_of_too_few_or_many_tokens_are_left_out():
    plan = IsoFlop(small(tokens_per_parameter=(0.5, 200.0)))
    assert all(0.5 <= m.tokens_per_parameter <= 200 for models in plan.models for m in models)
    assert len(plan.models[0]) < 6


def test_the_best_of_a_parabola_is_reported(tmp_path):
    plan = IsoFlop(small())
    results = results_of(plan, finished_with(plan, parabola))
    for summary in results["summaries"]:
        assert summary["combined"]["value"] == pytest.approx(BEST)
        assert all(v["low"] <= BEST * 1.01 and v["high"] >= BEST * 0.99 for v in summary["budgets"])
    write_report(results, tmp_path, "python -m x")
    report = (tmp_path / "report.md").read_text()
    assert "with AdamW; 5 [" in report
    assert "    python -m x" in report
    assert (tmp_path / "figure.png").stat().st_size > 10_000


def test_nothing_is_claimed_at_the_edge_or_of_what_diverged(tmp_path):
    plan = IsoFlop(small())
    falls = lambda model, cell: 2 + 1 / model.tokens_per_parameter
    loss = lambda model, cell: falls(model, cell) if "AdamW" in cell.label else None
    results = results_of(plan, finished_with(plan, loss))
    write_report(results, tmp_path, "python -m x")
    text = finding(results)
    assert "not known with AdamW (" in text
    assert "not known with Muon (fewer than three models trained)" in text


def test_a_report_of_what_has_finished():
    plan = IsoFlop(small())
    finished = finished_with(plan, parabola)
    some = dict(list(finished.items())[:20])
    assert results_of(plan, some)["summaries"][1]["combined"]["value"] is None
    with pytest.raises(ValueError, match="no run has finished yet: start with --mode=run"):
        results_of(plan, {})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"budgets": ()}, "config.budgets="),
        ({"budgets": (4e9, 2e9)}, "at least 1, ascending"),
        ({"widths": (8, 16)}, "config.widths=.8, 16.: give at least 3"),
        ({"widths": (8, 12, 16)}, "12 is not a multiple of head_dim=8"),
        ({"tokens_per_parameter": (2.0, 1.0)}, "least and greatest"),
        ({"tokens_per_parameter": (1e3, 2e3)}, "budget 2e.09 trains 0 models"),
        ({"seeds": (0, 0)}, "seeds"),
        ({"workers": 0}, "workers=0"),
        ({"optimizers": {}}, "config.optimizers is empty"),
        ({"optimizers": {"A": {**default_optimizer(), "optimizer": "sgd"}}}, "unknown optimizer"),
        ({"optimizers": {"A": {**default_optimizer(), "rate": 1.0}}}, "unknown key"),
        (
            {"optimizers": {"A": {**default_optimizer(), "warmup_tokens": 0.5}}},
            "config.optimizers.A.warmup_tokens=0.5: give a whole number of tokens",
        ),
        (
            {
                "optimizers": {
                    "A": {
                        **default_optimizer(),
                        "options": ConfigDict({"weight_decay_scaling": "1/width"}),
                    }
                }
            },
            "'1/width': leave it out",
        ),
    ],
)
def test_bad_plans_are_refused_before_anything_runs(changes, message):
    changes = {k: ConfigDict(v) if k == "optimizers" else v for k, v in changes.items()}
    with pytest.raises(ValueError, match=message):
        IsoFlop(small(**changes))


@pytest.mark.parametrize("name", ["compute_optimal_cpu", "compute_optimal_paper"])
def test_configurations_can_be_planned(name):
    plan = IsoFlop(importlib.import_module(f"configs.{name}").get_config())
    assert len(plan.models) == 3
    assert all(len(models) >= 5 for models in plan.models)
    assert "AdamW: learning rate" in describe(plan)


@pytest.mark.parametrize("folder", RESULTS, ids=lambda folder: folder.name)
def test_committed_reports_follow_from_their_losses(folder, tmp_path):
    results = json.loads((folder / "results.json").read_text())
    again = copy.deepcopy(results)
    del again["summaries"]
    add_summaries(again)
    for now, before in zip(again["summaries"], results["summaries"], strict=True):
        assert now["combined"] == pytest.approx(before["combined"], rel=1e-6)
    report = (folder / "report.md").read_text()
    command = next(line.strip() for line in report.splitlines() if line.startswith("    python"))
    assert markdown(results, "figure.png", command) == report
    write_isoflop_figure(results, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 20_000


CONFIG_FILE = """
from tests.experiments.test_compute_optimal import small

def get_config():
    config = small(budgets=(3e8,), widths=(8, 16, 24), seeds=(0,), platform="cpu")
    del config.optimizers["Muon"]
    return config
"""


@pytest.mark.slow  # the ladder's own goes the same way
def test_from_the_command_line(tmp_path, run_command, capsys):
    config, workdir = tmp_path / "config.py", tmp_path / "run"
    config.write_text(CONFIG_FILE)

    def main():
        command.run(
            compute_optimal.main,
            config=str(config),
            workdir=str(workdir),
            define_flags=compute_optimal.define_flags,
        )

    assert run_command(main, "--mode=plan") == 0
    assert "3 cells" in capsys.readouterr().out
    assert run_command(main, "--mode=report") == 2
    assert "no run has finished yet" in capsys.readouterr().err
    assert run_command(main) == 0
    assert len(FinishedCells(workdir)()) == 3
    results = json.loads((workdir / "results.json").read_text())
    losses = [model["losses"] for model in results["optimizers"][0]["budgets"][0]]
    assert all(0 < loss < 5 for [loss] in losses)
    assert (workdir / "figure.png").stat().st_size > 10_000
    assert f"experiments.compute_optimal --config={config}" in (workdir / "report.md").read_text()
    capsys.readouterr()
    assert run_command(main, "--mode=report") == 0
    assert "validation loss" not in capsys.readouterr().out
