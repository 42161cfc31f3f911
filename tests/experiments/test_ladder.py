"""The ladder: planning and scheduling without training, and one tiny ladder for real."""

import importlib.util
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import jax
import pytest

from configs import ladder_cpu, ladder_paper
from experiments.cells.cell import FinishedCells, folder_of
from experiments.cells.claims import held
from experiments.collectives import Traffic
from experiments.ladder import describe as describe_lib
from experiments.ladder import fit
from experiments.ladder.describe import describe, describe_scaling, estimate
from experiments.ladder.plan import Ladder, Rates, Series, default_ladder, default_optimizer
from experiments.ladder.report import read_results, result_lines
from experiments.ladder.schedule import missing_tasks, remaining_cells, tune
from experiments.ladder.status import status
from experiments.topologies import Topology
from mup_jax.training.program import Program

ADAMW, MUON = Series("adamw"), Series("muon")


def small_ladder(**changes):
    config = default_ladder()
    config.widths = (8, 16)
    config.depth = 1
    config.tokens_per_parameter = 4.0
    config.train.model.head_dim = 8
    config.train.context = 16
    config.train.batch_size = 8
    config.train.warmup_tokens = 3 * 128
    config.train.eval_batches = 4
    config.optimizers = {
        "adamw": {**default_optimizer(), "learning_rates": (4e-3, 8e-3)},
        "muon": {**default_optimizer(), "learning_rates": (1e-2, 2e-2)},
    }
    config.max_extensions = 1
    config.tuning_seeds = 2
    for key, value in changes.items():
        config[key] = value
    return config


def results_of(cells, loss):
    return {cell.name: {"validation_loss": loss(cell.config)} for cell in cells}


def log_parabola(optimum):
    return lambda config: 2 + math.log2(config.optimizer.learning_rate / optimum) ** 2


def test_same_tokens_per_parameter_at_every_rung():
    ladder = Ladder(ladder_cpu.get_config())
    assert len(ladder.rungs) >= 3
    for rung in ladder.rungs:
        ratio = rung.tokens / rung.parameters
        assert ratio == pytest.approx(ladder.config.tokens_per_parameter, rel=1e-3)
    for smaller, larger in zip(ladder.rungs, ladder.rungs[1:], strict=False):
        assert larger.flops >= 1.9 * smaller.flops
    assert f"{ladder.rungs[-1].parameters:,}" in describe(ladder)


def test_cells_differ_only_where_a_ladder_varies():
    ladder = Ladder(small_ladder())
    points = ladder.grid(ADAMW).points
    cells = ladder.tuning_cells(ADAMW, points)
    assert len({cell.name for cell in cells}) == 4
    assert cells[0].name == ladder.tuning_cells(ADAMW, points[:1])[0].name
    base, large = (ladder.cells(rung, ADAMW, points[0]) for rung in ladder.rungs)
    assert [c.config.optimizer.learning_rate for c in base] == [4e-3, 4e-3]
    assert [c.config.optimizer.learning_rate for c in large] == [4e-3, 4e-3, 2e-3, 8e-3]
    assert {c.config.base.width for c in large} == {8}
    assert {c.config.model.width for c in large} == {16}


@pytest.mark.parametrize(
    ("optimum", "best", "tried"),
    [
        (8e-3, 8e-3, [4e-3, 8e-3, 1.6e-2]),  # at the upper edge: one more, which is worse
        (1e-2, 1e-2, [4e-3, 8e-3, 1.6e-2]),  # between two of the grid
        (4e-3, 4e-3, [2e-3, 4e-3, 8e-3]),
        (6.4e-2, 1.6e-2, [4e-3, 8e-3, 1.6e-2]),  # extensions used up
    ],
)
def test_the_grid_extends_itself(optimum, best, tried):
    ladder = Ladder(small_ladder())
    loss = log_parabola(optimum)
    results = {}
    for _ in range(3):
        cells, found = tune(ladder, ADAMW, results)
        if found is not None:
            break
        results |= results_of(cells, loss)
    assert found.learning_rate == pytest.approx(best, rel=0.01)
    assert found.embedding_readout_factor == 1
    assert sorted({c.config.optimizer.learning_rate for c in cells}) == pytest.approx(tried)


def test_a_diverged_seed_rules_a_learning_rate_out():
    ladder = Ladder(small_ladder(max_extensions=0))
    cells, _ = tune(ladder, ADAMW, {})
    diverges = lambda config: None if config.optimizer.learning_rate == 8e-3 else 2.0
    assert tune(ladder, ADAMW, results_of(cells, diverges))[1].learning_rate == 4e-3


def test_both_rates_are_tuned_with_the_same_trials_for_every_optimizer():
    config = small_ladder()
    for settings in config.optimizers.values():
        settings.embedding_readout_factors = (1, 2, 4)  # whole numbers are numbers
        settings.learning_rates = (4e-3, 8e-3, 1.6e-2)
    ladder = Ladder(config)

    def bowl(config):
        given = config.optimizer
        x, y = math.log2(given.learning_rate / 9e-3), math.log2(given.embedding_readout_factor / 5)
        return 2 + x**2 + 0.5 * y**2 + 0.3 * x * y

    tried = {}
    for series in (ADAMW, MUON):
        results, found = {}, None
        while found is None:
            cells, found = tune(ladder, series, results)
            results |= results_of(cells, bowl)
        assert found == pytest.approx(Rates(9e-3, 5.0), rel=0.01)  # 5 is beyond the grid
        tried[series] = len(cells)
    assert tried[ADAMW] == tried[MUON] == 2 * 3 * 4


def test_a_grid_of_one_pair_is_not_tuned():
    config = small_ladder()
    config.optimizers.adamw.learning_rates = (8e-3,)
    assert tune(Ladder(config), ADAMW, {}) == ([], Rates(8e-3, 1.0))


def test_an_optimizer_that_diverges_everywhere_stops_no_other():
    ladder = Ladder(small_ladder(max_extensions=0))
    lost = results_of(tune(ladder, MUON, {})[0], lambda _: None)
    assert tune(ladder, MUON, lost)[1] is None
    found = results_of(tune(ladder, ADAMW, {})[0], log_parabola(8e-3))
    assert [(t.size, t.name) for t in missing_tasks(ladder, lost | found)] == [
        ("w8", "adamw"),
        ("w16", "adamw"),
    ]
    assert remaining(ladder, lost | found) == {"w8": 2, "w16": 4}


def test_tasks_appear_as_results_do():
    ladder = Ladder(small_ladder(max_extensions=0))
    tasks = missing_tasks(ladder, {})
    assert [(t.size, t.name, len(t.cells)) for t in tasks] == [
        ("w8", "adamw, tuning", 4),
        ("w8", "muon, tuning", 4),
    ]
    assert remaining(ladder, {}) == {"w8": 12, "w16": 8}
    results = results_of(tasks[0].cells, log_parabola(8e-3))
    tasks = missing_tasks(ladder, results)
    # What the first optimizer can have at the smallest sizes, before the next is tuned.
    assert [(t.size, t.name) for t in tasks] == [
        ("w8", "adamw"),
        ("w16", "adamw"),
        ("w8", "muon, tuning"),
    ]
    assert remaining(ladder, results) == {"w8": 8, "w16": 8}
    results |= results_of(tasks[1].cells, lambda _: 2.0)
    assert remaining(ladder, results) == {"w8": 8, "w16": 4}
    results |= results_of(tasks[0].cells + tasks[2].cells, log_parabola(1e-2))
    base, task = missing_tasks(ladder, results)
    assert {c.config.optimizer.learning_rate for c in base.cells} == {1e-2}
    assert {c.config.optimizer.learning_rate for c in task.cells} == {5e-3, 1e-2, 2e-2}
    last = results_of(base.cells + task.cells, lambda _: 2.0)
    assert missing_tasks(ladder, results | last) == []


def test_a_size_ends_before_the_next_begins():
    ladder = Ladder(small_ladder(widths=(8, 16, 24, 32), max_extensions=0))
    results = {}
    for series in (ADAMW, MUON):
        results |= results_of(tune(ladder, series, {})[0], lambda _: 2.0)
    sizes = [task.size for task in missing_tasks(ladder, results)]
    assert sizes == ["w8", "w16", "w8", "w16", "w24", "w24", "w32", "w32"]


def remaining(ladder, results):
    """Cells by rung."""
    counts = dict.fromkeys((rung.name for rung in ladder.rungs), 0)
    for (rung, _), count in remaining_cells(ladder, results).items():
        counts[rung] += count
    return counts


def test_parametrizations_share_the_base_and_the_largest_rung_has_checks():
    config = small_ladder(
        widths=(8, 16, 24), parametrizations=("mup", "sp", "spectral_norm"), max_extensions=0
    )
    config.optimizers.muon.weight_decay = 0.1
    config.optimizers.muon.learning_rates_of = {"spectral_norm": (0.1, 0.2)}
    ladder = Ladder(config)
    names = ["adamw", "adamw, sp", "muon", "muon, sp", "muon, spectral_norm"]
    assert [series.name for series in ladder.series] == names
    tuning = [t for t in missing_tasks(ladder, {}) if t.vectorized]
    assert [(t.name, len(t.cells)) for t in tuning] == [
        ("adamw, tuning", 4), ("muon, tuning", 4), ("muon, spectral_norm, tuning", 4),
    ]  # fmt: skip
    rates = [{c.config.optimizer.learning_rate for c in t.cells} for t in tuning]
    assert rates == [{4e-3, 8e-3}, {1e-2, 2e-2}, {0.1, 0.2}]
    results = {}
    for task in tuning:
        results |= results_of(task.cells, lambda config: config.optimizer.learning_rate)
    tasks = {(t.size, t.name): t.cells for t in missing_tasks(ladder, results)}
    assert len(tasks) == 2 * len(names) + 3
    options = tasks["w16", "muon, sp"][0].config.optimizer.options
    assert options.learning_rate_scaling == options.weight_decay_scaling == "constant"
    checks = [
        (c.config.optimizer.learning_rate, c.config.optimizer.weight_decay)
        for c in tasks["w24", "muon"]
    ]
    assert checks == [(1e-2, 0.1)] * 2 + [(5e-3, 0.1), (2e-2, 0.1), (1e-2, 0.05), (1e-2, 0.2)]
    assert [len(tasks["w24", name]) for name in names] == [4, 2, 6, 2, 2]
    assert [len(tasks["w16", name]) for name in names] == [2] * 5
    results = {cell.name: result_for(cell) for task in tuning for cell in task.cells}
    lines = result_lines(ladder, results)
    assert [line["parametrization"] for line in lines].count("spectral_norm") == 4


def test_a_plan_says_what_it_costs_and_scales():
    config = small_ladder(parametrizations=("mup", "sp"))
    config.optimizers.muon.weight_decay = 0.1
    ladder = Ladder(config)
    scaling = [line.split("  ") for line in describe_scaling(ladder).splitlines()]
    cells = {line[0]: line[-1].strip() for line in scaling if len(line) > 1}
    assert cells["adamw"] == "1, 0.5, 0.5; 0.5"
    assert cells["adamw, sp"] == "1, 1, 1; 1"
    assert cells["muon"] == "1, 1, 0.5; 0.5"
    assert cells["muon, sp"] == "1, 1, 1; 1"


@pytest.mark.slow
def test_an_estimate_of_the_time():
    ladder = Ladder(small_ladder(parametrizations=("mup", "sp")))
    assert re.match(
        r"about \d+ min here with 1 worker, .* \(from steps of w8, w16\)", estimate(ladder)
    )


def test_no_estimate_where_a_step_is_too_long(monkeypatch):
    monkeypatch.setattr(describe_lib, "_peak", lambda: 1e3)
    assert "too long to be timed here" in estimate(Ladder(small_ladder()))


def test_status_counts_what_others_do(tmp_path):
    ladder = Ladder(small_ladder(max_extensions=0))
    first, second, *_ = missing_tasks(ladder, {})[0].cells
    folder = folder_of(first, tmp_path)
    folder.mkdir(parents=True)
    (folder / "result.json").write_text(json.dumps(result_for(first)))
    with held(folder_of(second, tmp_path), 0):
        rows = [line.split() for line in status(ladder, tmp_path).splitlines()]
    assert rows == [
        ["rung", "finished", "claimed", "left"],
        ["w8", "1", "1", "10"],
        ["w16", "0", "0", "8"],
        ["all", "1", "1", "18"],
    ]


def result_for(cell):
    """What a report needs of a result."""
    given = cell.config.optimizer
    return {
        "validation_loss": 2.0, "parameters": cell.config.model.width, "seed": cell.config.seed,
        "optimizer": given.name, "learning_rate": given.learning_rate,
        "weight_decay": given.weight_decay,
        "embedding_readout_factor": given.embedding_readout_factor,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"parametrizations": ("sp",)}, "lacks 'mup'"),
        ({"parametrizations": ("mup", "pm")}, "unknown parametrization 'pm'.*wd_only"),
        ({"checks": (1.0, 2.0)}, "factors > 0 but 1"),
        ({"checks": (2.0, 2.0)}, "each once"),
        ({"decay_checks": (-2.0,)}, "config.decay_checks"),
        ({"widths": (8,)}, "at least two"),
        ({"widths": (16, 8)}, "ascending"),
        ({"widths": (8, 20)}, "20 is not a multiple of head_dim=8"),
        ({"seeds": ()}, "seeds"),
        ({"tuning_seeds": 3}, "tuning_seeds=3: give 1 to 2"),
        ({"tokens_per_parameter": 0.0}, "tokens_per_parameter=0.0"),
        ({"workers": 0}, "workers=0"),
    ],
)
def test_bad_ladders_are_refused_before_anything_runs(changes, message):
    with pytest.raises(ValueError, match=message):
        Ladder(small_ladder(**changes))


@pytest.mark.parametrize("tokens", ["many", 5e3, -1])
def test_a_warm_up_that_is_no_number_of_tokens(tokens):
    config = small_ladder()
    with config.ignore_type():
        config.optimizers.muon.warmup_tokens = tokens
    with pytest.raises(ValueError, match=f"muon.warmup_tokens={tokens!r}: give a whole number"):
        Ladder(config)


def test_unknown_names_are_refused_with_a_suggestion():
    config = small_ladder()
    config.optimizers.mun = config.optimizers.muon
    with pytest.raises(ValueError, match="unknown optimizer 'mun'"):
        Ladder(config)
    config = small_ladder()
    config.optimizers.muon.options.betaa = 0.9
    with pytest.raises(ValueError, match="did you mean 'beta'"):
        Ladder(config)
    config = small_ladder()
    config.wdiths = (8, 16)
    with pytest.raises(ValueError, match="did you mean 'widths'"):
        Ladder(config)
    config = small_ladder()
    del config.optimizers.adamw
    with pytest.raises(ValueError, match="baseline"):
        Ladder(config)


CONFIG_FILE = """
from tests.experiments.test_ladder import small_ladder

def get_config():
    return small_ladder(workers=2, platform="cpu", max_extensions=0, tokens_per_parameter=2.0)
"""


def start(config, workdir):
    command = [sys.executable, "-m", "experiments.scale_ladder"]
    return subprocess.Popen(
        [*command, f"--config={config}", f"--workdir={workdir}"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.mark.slow
def test_a_ladder_from_the_command_line_survives_a_kill(tmp_path):
    config = tmp_path / "ladder.py"
    config.write_text(CONFIG_FILE)
    workdir = tmp_path / "run"
    first = start(config, workdir)
    while not list(workdir.glob("cells/*/result.json")):
        assert first.poll() is None, first.stdout.read()
        time.sleep(0.2)
    first.send_signal(signal.SIGKILL)
    first.wait()
    before = {name: os.path.getmtime(workdir / "cells" / name / "result.json")
              for name in FinishedCells(workdir)()}  # fmt: skip

    second = start(config, workdir)
    output, _ = second.communicate(timeout=400)
    assert second.returncode == 0, output
    for name, time_written in before.items():
        assert os.path.getmtime(workdir / "cells" / name / "result.json") == time_written
    assert "left" in output
    assert "muon" in output.splitlines()[-5:][0] or "muon" in output

    report = json.loads((workdir / "report.json").read_text())
    assert [rung["name"] for rung in report["rungs"]] == ["w8", "w16"]
    for optimizer in ("adamw", "muon"):
        found = report["optimizers"][optimizer]
        assert set(found["final_loss"]) == {"w8", "w16"}
        assert found["final_loss"]["w16"] < math.log(96)
        interval = found["compute_multiplier"]["w16"]
        assert interval["low"] <= interval["value"] <= interval["high"]
    lines = [json.loads(line) for line in (workdir / "results.jsonl").read_text().splitlines()]
    assert len(lines) == len(FinishedCells(workdir)())
    for line in lines:
        assert {"cell", "rung", "config", "versions", "device", "flops", "seconds"} <= set(line)
    for figure in ("loss_vs_compute", "multiplier_vs_compute", "learning_rate_sweeps"):
        assert (workdir / f"{figure}.png").stat().st_size > 5_000
    assert (workdir / "report.md").read_text().startswith("#")

    third = start(config, workdir)
    output, _ = third.communicate(timeout=60)
    assert third.returncode == 0
    assert "validation loss" not in output  # nothing was trained again


def test_a_report_keeps_the_lines_whose_folders_are_gone(tmp_path):
    ladder = Ladder(small_ladder(max_extensions=0))
    cells = missing_tasks(ladder, {})[0].cells
    lines = result_lines(ladder, {cell.name: result_for(cell) for cell in cells[1:]})
    (tmp_path / "results.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    folder = folder_of(cells[0], tmp_path)
    folder.mkdir(parents=True)
    (folder / "result.json").write_text(json.dumps(result_for(cells[0])))
    assert {x["cell"] for x in read_results(ladder, tmp_path)} == {cell.name for cell in cells}


@pytest.mark.slow
def test_workers_share_a_folder(tmp_path):
    """Two commands at once, one killed: every cell is trained once, and the other reports."""
    config = tmp_path / "ladder.py"
    config.write_text(CONFIG_FILE)
    workdir = tmp_path / "run"
    both = [start(config, workdir), start(config, workdir)]
    while not list(workdir.glob("cells/*/result.json")):
        assert all(process.poll() is None for process in both)
        time.sleep(0.2)
    both[0].send_signal(signal.SIGKILL)
    output, _ = both[1].communicate(timeout=400)
    assert both[1].returncode == 0, output
    assert json.loads((workdir / "report.json").read_text())["optimizers"]["muon"]["final_loss"]
    for cell in workdir.glob("cells/*"):
        steps = [json.loads(x)["step"] for x in (cell / "metrics.jsonl").read_text().splitlines()]
        assert steps == list(range(1, len(steps) + 1))


def test_a_report_needs_results(tmp_path):
    with pytest.raises(ValueError, match="run the ladder"):
        read_results(Ladder(small_ladder()), tmp_path)


# arXiv 2512.05620, table 3.
PUBLISHED = {
    512: (185_680_896, 3_713_617_920, 28_332, 4.3204e18),
    768: (379_184_640, 7_583_692_800, 57_858, 1.7814e19),
    1024: (639_797_248, 12_795_944_960, 97_625, 5.0382e19),
    1536: (1_362_349_056, 27_246_981_120, 207_877, 2.2675e20),
}


def test_the_ladder_of_the_paper():
    ladder = Ladder(ladder_paper.get_config())
    assert [rung.width for rung in ladder.rungs] == [*PUBLISHED]
    for rung in ladder.rungs:
        assert (rung.parameters, rung.tokens, rung.steps) == PUBLISHED[rung.width][:3]
        assert f"{rung.flops:.4e}" == f"{PUBLISHED[rung.width][3]:.4e}"
    muon = ladder.cell(ladder.rungs[-1], MUON, ladder.grid(MUON).points[0], 0).config
    assert muon.warmup_tokens == 11_140_854
    assert muon.optimizer.weight_decay * muon.base.width == pytest.approx(0.16384)
    assert muon.optimizer.embedding_readout_factor == pytest.approx(1.6)
    adamw = ladder.cell(ladder.rungs[-1], ADAMW, ladder.grid(ADAMW).points[0], 0).config
    assert adamw.warmup_tokens == 742_723_584
    assert adamw.optimizer.options.eps == 1e-20


ROW = {
    "rung": "w8", "optimizer": "muon", "parameters": 1234, "tokens": 5678, "remat": "dots",
    "mesh": {"data": 1, "fsdp": 4, "tensor": 2}, "model_flops": 9e9, "optimizer_flops": 1e9,
}  # fmt: skip


def test_rows_of_a_plan_for_a_slice():
    adamw = {"least_seconds": {"model": {"products": 6e-3}, "optimizer": {"memory": 1e-3}}}
    measured = {
        "state_gibibytes": 0.5,
        "gibibytes": 3.25,
        "collectives": {"all-reduce": Traffic(6, 2**29, 0.0)},
        "least_seconds": {"model": {"products": 6e-3, "links": 1e-3}, "optimizer": {"links": 4e-3}},
    }
    cells = fit.line(ROW | measured | {"fits": True}, adamw).strip("| ").split(" | ")
    assert cells == [
        "w8", "muon", "1,234", "5,678", "9.00e+09", "10.0%", "0.50", "3.2", "yes",
        "fsdp 4 tensor 2", "products", "6 all-reduce 0.5", "10.0", "4.00 (links)", "× 0.70",
    ]  # fmt: skip
    unknown = fit.line(ROW | {"fits": False}, adamw)
    assert " | ? | ? | no | fsdp 4 tensor 2 | products |  | ? | ? | ? |" in unknown


def test_arrangements_need_less_and_less_memory():
    config = small_ladder().train
    config.update(batch_size=8)
    config.model.width = 24
    tpus = Topology("", "tpu", (4, 4), [None] * 16, 16.0)
    arranged = lambda topology: [
        (a.mesh.fsdp, a.remat, a.attention) for a in fit._arrangements(config, topology)
    ]
    assert arranged(tpus) == [(8, remat, "auto") for remat in ("none", "dots", "full")]
    # Within a host of GPUs first.
    hosts = tpus._replace(platform="gpu", sizes=(4, 4))
    assert arranged(hosts)[:3] == [(4, "none", "xla"), (8, "none", "xla"), (4, "dots", "xla")]
    config.mesh.update(data=2, tensor=4)
    config.remat = "full"
    assert [(a.mesh, a.remat) for a in fit._arrangements(config, tpus)] == [(config.mesh, "full")]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("topology", "compiler"), [("h100:2x2", "jax_plugins.xla_cuda13"), ("v5e:2x2", "libtpu")]
)
def test_a_rung_is_planned_for_devices_that_are_not_there(tmp_path, topology, compiler):
    if importlib.util.find_spec("jax_plugins") is None and compiler.startswith("jax_plugins"):
        pytest.skip("needs the extra plan-gpu")
    if importlib.util.find_spec(compiler) is None:
        pytest.skip(f"needs {compiler}")
    command = [
        *(sys.executable, "-m", "experiments.scale_ladder", "--mode=plan"),
        *(f"--topology={topology}", f"--workdir={tmp_path}", "--config.widths=(64,128)"),
        *("--config.train.context=128", "--config.train.batch_size=16"),
    ]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    run = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert run.returncode == 0, run.stderr
    rows = [line for line in run.stdout.splitlines() if line.startswith(("| w64 ", "| w128 "))]
    table = [row for row in rows if "fsdp" in row]
    assert len(table) == 8
    assert all("| yes |" in row and "all-gather" in row for row in table)


class Compiled:
    """What is asked of a compiled program."""

    def memory_analysis(self):
        sizes = {f"{kind}_size_in_bytes": 2**30 for kind in ("argument", "output", "temp", "alias")}
        return SimpleNamespace(**sizes, generated_code_size_in_bytes=0)

    def as_text(self):
        line = "x = f32[] all-reduce(y), replica_groups={{0,1}}"
        return f"ENTRY %main (y: f32[]) -> f32[] {{\n  {line}\n}}\n"


@pytest.mark.parametrize("gigabytes", [1.5, 2.5])
def test_what_does_not_fit_keeps_less(monkeypatch, gigabytes):
    """On devices of this machine, with a compiler that at first finds no room."""
    tried = []

    def step(program):
        tried.append(program.model.remat)
        if program.model.remat == "none":
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Ran out of memory")
        return Compiled()

    monkeypatch.setattr(Program, "step", property(step))
    monkeypatch.setattr(fit, "least_seconds", lambda *_: {"products": 1.0})
    slice_ = Topology("v5e:2x4", "tpu", (2, 4), jax.devices(), gigabytes)
    rows = list(fit.fit(Ladder(small_ladder(widths=(8, 16))), slice_))
    assert [(row["rung"], row["optimizer"]) for row in rows] == [
        ("w8", "adamw"), ("w8", "muon"), ("w16", "adamw"), ("w16", "muon"),
    ]  # fmt: skip
    fits = gigabytes > 2
    assert tried[:3] == (["none", "dots", "none"] if fits else ["none", "dots", "full"])
    for row in rows:
        assert row["fits"] == fits
        assert row["gibibytes"] == 2.0
        assert row["mesh"] == {"data": 1, "fsdp": 8, "tensor": 1}
        assert row["collectives"] == {"all-reduce": (1, 4.0, 0.0)}
        assert (row["optimizer_flops"] > 0) == (row["optimizer"] == "muon")
