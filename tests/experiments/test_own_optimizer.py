"""An optimizer from a file trains, and goes into a ladder: the example of the docs."""

import copy
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from absl import flags

from configs import ladder_cpu
from experiments import command, scale_ladder, train
from experiments.cells.cell import Cell
from experiments.ladder.added import add_optimizers, without_added
from experiments.ladder.describe import describe
from experiments.ladder.plan import Ladder, Series
from experiments.ladder.report import read_results, result_lines
from experiments.ladder.schedule import missing_tasks
from mup_jax.training import identity
from mup_jax.training.loop import claim_workdir
from tests.experiments.test_ladder import results_of, small_ladder
from tests.training.tiny import tiny_config

ROOT = Path(__file__).parents[2]
DOCS = (ROOT / "docs" / "your_own_optimizer.md").read_text()
EXAMPLE = re.search(r"```python\n(.*?)```", DOCS, re.DOTALL)[1]
OWN = Series("my_optimizer")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The working directory, with the file of the docs in it."""
    (tmp_path / "my_optimizer.py").write_text(EXAMPLE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(ROOT))
    return tmp_path


def ladder_with(*names, **changes):
    config = small_ladder(**changes)
    add_optimizers(config, names or ("my_optimizer.py:make",))
    return config


TINY = """
from tests.training.tiny import tiny_config

def get_config():
    return tiny_config(tokens=12 * 128, warmup_tokens=128, eval_every=0)
"""


@pytest.mark.slow
def test_the_example_trains(folder, run_command, capsys, monkeypatch):
    (folder / "tiny.py").write_text(TINY)
    name = "--config.optimizer.name=my_optimizer.py:make"
    arguments = ["--config=tiny.py", name, "--config.optimizer.options.beta=0.9"]
    arguments += ["--config.optimizer.learning_rate=0.03"]
    entry_point = lambda: command.run(
        train.main, config="tiny.py", workdir="unused", define_flags=train.define_flags
    )
    assert run_command(entry_point, *arguments, "--workdir=run") == 0
    assert capsys.readouterr().out.startswith("my_optimizer.py:make, whose rule was measured: η ∝")
    result = json.loads((folder / "run" / "result.json").read_text())
    first, last = result["loss_curve"][0][1], result["loss_curve"][-1][1]
    assert last < first - 0.3
    assert result["optimizer"] == "my_optimizer"
    assert "whose rule was measured" in result["rule"]
    given = result["config"]["optimizer"]
    assert (given["name"], given["source"]) == ("my_optimizer.py:make", EXAMPLE)
    assert given["options"] == {"beta": 0.9}
    # The run is that of this text, wherever the file is.
    (folder / "elsewhere").mkdir()
    (folder / "my_optimizer.py").rename(folder / "elsewhere" / "my_optimizer.py")
    arguments[1] = "--config.optimizer.name=elsewhere/my_optimizer.py:make"
    assert run_command(entry_point, *arguments, "--workdir=run") == 0
    (folder / "elsewhere" / "my_optimizer.py").write_text(EXAMPLE.replace("norm 1", "norm one"))
    assert run_command(entry_point, *arguments, "--workdir=run") == 2
    assert re.search(
        r"config.optimizer.source, line 7, was .* norm 1.* and is now .* norm one",
        capsys.readouterr().err,
    )


def test_a_row_is_tuned_as_the_others(folder):
    ladder = Ladder(ladder_with())
    assert [series.name for series in ladder.series] == ["adamw", "muon", "my_optimizer"]
    grid, of_adamw = ladder.grid(OWN), ladder.grid(Series("adamw"))
    assert [len(axis) for axis in grid] == [len(axis) for axis in of_adamw]
    # Columns of norm 1 are of 8 entries, which are 1/√8; those of AdamW about as large.
    ratio = grid.learning_rates[0] / of_adamw.learning_rates[0]
    assert ratio in (0.5, 1.0, 2.0)
    assert grid.embedding_readout_factors == tuple(
        factor / ratio for factor in of_adamw.embedding_readout_factors
    )
    tasks = {task.name: task for task in missing_tasks(ladder, {})}
    adamw, own = (tasks[f"{name}, tuning"].cells for name in ("adamw", "my_optimizer"))
    assert len(own) == len(adamw)
    assert own[0].label.startswith("w8 my_optimizer lr")
    given = own[0].config.optimizer
    assert (given.name, given.source) == ("my_optimizer.py:make", EXAMPLE)
    assert "my_optimizer: my_optimizer.py:make, whose rule was measured" in describe(ladder)


def test_an_update_twice_as_large_has_half_the_rates(folder):
    text = EXAMPLE.replace("return update /", "return 64 * update /")
    (folder / "larger.py").write_text(text)
    ladder = Ladder(ladder_with("my_optimizer.py:make", "larger.py:make"))
    small, large = ladder.grid(OWN), ladder.grid(Series("larger"))
    assert large.learning_rates == pytest.approx([x / 64 for x in small.learning_rates])
    factors = [64 * x for x in small.embedding_readout_factors]
    assert large.embedding_readout_factors == pytest.approx(factors)


MUON = """
import mup_jax

def make(weight_dimension_numbers):
    direction = mup_jax.scale_by_muon(weight_dimension_numbers=weight_dimension_numbers)
    return direction, mup_jax.rules.muon()
"""


def test_the_grid_of_muon_is_the_one_chosen_by_hand(folder):
    (folder / "mine.py").write_text(MUON)
    config = ladder_cpu.get_config("full")
    add_optimizers(config, ["mine.py:make"])
    ladder = Ladder(config)
    assert ladder.grid(Series("mine")) == ladder.grid(Series("muon"))


def test_what_is_given_of_a_row_stays(folder):
    config = ladder_with(parametrizations=("mup", "sp"))
    row = config.optimizers.my_optimizer
    row.learning_rates, row.weight_decay, row.options.beta = (0.5, 1.0), 0.1, 0.5
    ladder = Ladder(config)
    assert ladder.grid(OWN).learning_rates == (0.5, 1.0)
    cell = ladder.cell(ladder.rungs[1], Series("my_optimizer", "sp"), ladder.grid(OWN).points[0], 0)
    given = cell.config.optimizer
    assert (given.weight_decay, given.options.beta) == (0.1, 0.5)
    assert given.options.learning_rate_scaling == "constant"
    row.options.betta = 0.5
    with pytest.raises(
        ValueError, match=r"my_optimizer.py:make.options.betta: did you mean 'beta'"
    ):
        Ladder(config)


def test_a_changed_file_has_other_cells(folder):
    first = {cell.name for task in missing_tasks(Ladder(ladder_with()), {}) for cell in task.cells}
    (folder / "my_optimizer.py").write_text(EXAMPLE + "# changed\n")
    config = ladder_with()
    second = {cell.name for task in missing_tasks(Ladder(config), {}) for cell in task.cells}
    # Those of AdamW and Muon.
    assert len(first & second) == 8
    assert len(first) == len(second) == 12
    # The folder of a ladder without it is the same, and may be used.
    claim_workdir(folder / "run", without_added(small_ladder()))
    claim_workdir(folder / "run", without_added(config))
    assert "my_optimizer" in config.optimizers


def test_results_of_another_version_of_the_file_are_left_out(folder):
    def lines_of(ladder):
        cells = [cell for task in missing_tasks(ladder, {}) for cell in task.cells]
        results = results_of(cells, lambda _: 2.0)
        for cell in cells:
            name = cell.config.optimizer.name.removesuffix(".py:make")
            results[cell.name] |= {"optimizer": name, "parameters": 8, "weight_decay": 0.0}
            results[cell.name] |= {key: cell.config[key] for key in ("seed",)}
            for key in ("learning_rate", "embedding_readout_factor"):
                results[cell.name][key] = cell.config.optimizer[key]
        return result_lines(ladder, results)

    old = lines_of(Ladder(ladder_with()))
    (folder / "results.jsonl").write_text("".join(json.dumps(line) + "\n" for line in old))
    assert read_results(Ladder(ladder_with()), folder) == old
    (folder / "my_optimizer.py").write_text(EXAMPLE + "# changed\n")
    left = read_results(Ladder(ladder_with()), folder)
    assert {line["optimizer"] for line in left} == {"adamw", "muon"}
    # Who does not ask for it sees it still.
    assert read_results(Ladder(small_ladder()), folder) == old


def test_a_cell_needs_the_file_no_more(folder):
    cell = Cell("w8", "label", tiny_config(optimizer__name="my_optimizer.py:make"))
    name = cell.name
    (folder / "my_optimizer.py").unlink()
    again = Cell("w8", "label", copy.deepcopy(cell.config))
    assert again.name == name == identity(again.config)


def parsed(run_command, *arguments):
    """The configuration of a command line of the ladder."""
    seen = []
    run = lambda: command.run(
        lambda values: seen.append(values.config),
        config="ladder.py",
        workdir="unused",
        define_flags=scale_ladder.define_flags,
        amend=scale_ladder.amend,
    )
    return run_command(run, "--config=ladder.py", *arguments), seen


SMALL = """
from tests.experiments.test_ladder import small_ladder

def get_config():
    few = {"seeds": (0,), "tuning_seeds": 1, "checks": (), "max_extensions": 0}
    return small_ladder(platform="cpu", tokens_per_parameter=2.0, vectorized=False, **few)
"""


def test_added_on_the_command_line(folder, run_command):
    (folder / "ladder.py").write_text(SMALL)
    for name in ("b", "c"):
        (folder / f"{name}.py").write_text(EXAMPLE)
    code, (config,) = parsed(
        run_command,
        "--add=my_optimizer.py:make,b.py:make",
        "--add",
        f"{folder}/c.py:make",
        "--config.optimizers.b.learning_rates=(0.5,1.0)",
        "--config.optimizers.b.options.beta=0.5",
    )
    assert code == 0
    assert list(config.optimizers) == ["adamw", "b", "c", "muon", "my_optimizer"]
    assert config.optimizers.b.learning_rates == (0.5, 1.0)
    assert config.optimizers.b.options.to_dict() == {"beta": 0.5}
    assert config.optimizers.c.name == "c.py:make"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--add=muon"], "--add=muon: give FILE.py:FUNCTION"),
        (["--add=nowhere.py:make"], "optimizer 'nowhere.py:make': there is no file"),
        (["--add=muon.py:make"], "--add=muon.py:make: 'muon' is another optimizer, give the"),
        (["--add=my_optimizer.py:make"] * 2, "'my_optimizer' is another optimizer"),
        (["--add=my_optimizer.py:made"], "my_optimizer.py has no function 'made': it has make"),
    ],
)
def test_what_cannot_be_added(folder, run_command, capsys, arguments, message):
    (folder / "ladder.py").write_text(SMALL)
    (folder / "muon.py").write_text(EXAMPLE)
    code, seen = parsed(run_command, *arguments)
    if code == 0:  # what is in a file is known when the ladder is planned
        with pytest.raises(ValueError, match=message):
            Ladder(seen[0])
        return
    assert code == 2
    assert message in capsys.readouterr().err
    flags.FLAGS.unparse_flags()


@pytest.mark.slow
def test_an_optimizer_of_one_block_trains(folder, run_command, capsys):
    """That of docs/design.md, which gets all layers at once."""
    design = (ROOT / "docs" / "design.md").read_text()
    (folder / "one_sided.py").write_text(re.search(r"```python\n(.*?)```", design, re.DOTALL)[1])
    (folder / "tiny.py").write_text(TINY)
    arguments = ["--config=tiny.py", "--config.optimizer.name=one_sided.py:make"]
    arguments += ["--config.optimizer.learning_rate=0.1", "--workdir=run"]
    entry_point = lambda: command.run(
        train.main, config="tiny.py", workdir="unused", define_flags=train.define_flags
    )
    assert run_command(entry_point, *arguments) == 0, capsys.readouterr().err
    curve = json.loads((folder / "run" / "result.json").read_text())["loss_curve"]
    assert curve[-1][1] < curve[0][1] - 0.3


@pytest.mark.slow
def test_the_example_on_a_ladder(folder):
    (folder / "ladder.py").write_text(SMALL)
    command_line = [sys.executable, "-m", "experiments.scale_ladder", "--config=ladder.py"]
    command_line += ["--workdir=run", "--config.optimizers.muon.learning_rates=(1e-2,)"]

    def run(*arguments):
        done = subprocess.run(
            [*command_line, *arguments],
            capture_output=True,
            text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    own = "--add=my_optimizer.py:make"
    run()
    output = run(own)
    assert "validation loss" in output
    assert "adamw lr" not in output  # what was trained without it stays
    report = json.loads((folder / "run" / "report.json").read_text())
    found = report["optimizers"]["my_optimizer"]
    assert set(found["final_loss"]) == set(found["compute_multiplier"]) == {"w8", "w16"}
    assert set(found["optimizer_flops_share"]) == set(found["optimizer_seconds_share"])
    assert len(found["optimizer_flops_share"]) == 2
    assert any("whose rule was measured" in note for note in report["notes"])
    assert f"{own} --mode=report" in (folder / "run" / "report.md").read_text()
    rows = run(own, "--mode=status")
    assert rows.splitlines()[-1].split()[2:] == ["0", "0"]
