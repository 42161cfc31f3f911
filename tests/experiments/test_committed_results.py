"""The results in the repository are what their command gives."""

import copy
import json
import re
import subprocess
import sys
from decimal import Decimal
from pathlib import Path

import pytest

from experiments import scale_ladder
from experiments.sweeps import run as sweep_run
from mup_jax import data
from mup_jax.analysis import sweeps
from mup_jax.analysis.sweep_figure import write_sweep_figure

RESULTS = Path("results/ladder_cpu/results.jsonl")
# In a process of its own: the tests' eight devices would not divide the ladder's batch.
TRAIN = """
import json, sys
from ml_collections import ConfigDict
from mup_jax.training import default_config, train
config = default_config()  # of keys that are younger than the results
config.update(ConfigDict(json.loads(sys.argv[1])))
print(train(config, sys.argv[2])["validation_loss"])
"""


def lines_at_the_base():
    lines = [json.loads(line) for line in RESULTS.read_text().splitlines()]
    return [
        line
        for line in lines
        if line["rung"] == "w48" and line["seed"] == 0 and not line["is_tuning"]
    ]


def sweep_results():
    folders = sorted(path.parent for path in Path("results").glob("*_transfer*/results.json"))
    return [pytest.param(folder, id=folder.name) for folder in folders]


@pytest.mark.parametrize("folder", sweep_results())
def test_reports_of_sweeps_follow_from_their_losses(folder, tmp_path):
    results = json.loads((folder / "results.json").read_text())
    again = copy.deepcopy(results)
    del again["summaries"]
    sweeps.add_summaries(again)
    assert_same_numbers(json.loads(json.dumps(again["summaries"])), results["summaries"])
    report = (folder / "report.md").read_text()
    title = report.splitlines()[0].removeprefix("# ")
    command = next(line.strip() for line in report.splitlines() if line.startswith("    python"))
    assert_same_text(sweeps.markdown(results, title, "figure.png", command), report)
    write_sweep_figure(results, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 20_000


def test_the_ladder_is_reported_again_from_its_lines_alone(tmp_path, run_command):
    (tmp_path / "results.jsonl").write_text(RESULTS.read_text())
    arguments = "--config=configs/ladder_cpu.py:full", f"--workdir={tmp_path}", "--mode=report"
    assert run_command(scale_ladder.run, *arguments) == 0
    assert (tmp_path / "results.jsonl").read_text() == RESULTS.read_text()
    assert_same_text(*((folder / "report.md").read_text() for folder in (tmp_path, RESULTS.parent)))
    assert_same_numbers(*(json.loads((folder / "report.json").read_text())
                          for folder in (tmp_path, RESULTS.parent)))  # fmt: skip
    page = (tmp_path / "report.html").read_text()
    figures = sorted(path.name for path in RESULTS.parent.glob("*.png"))
    assert sorted(path.name for path in tmp_path.glob("*.png")) == figures
    assert page.count('src="data:image/png;base64,') == len(figures) == 4
    assert "http" not in page  # nothing is loaded from elsewhere


def test_the_sweep_of_the_readme_is_reported_again(tmp_path, run_command):
    folder = Path("results/lr_transfer_cpu")
    (tmp_path / "results.json").write_text((folder / "results.json").read_text())
    program = lambda: sweep_run.main(
        "lr_transfer", "Does the best learning rate stay where it is when the width grows?"
    )
    assert run_command(program, f"--workdir={tmp_path}", "--mode=report") == 0
    assert_same_text(*((f / "report.md").read_text() for f in (tmp_path, folder)))
    assert (tmp_path / "figure.png").stat().st_size > 20_000


def assert_same_numbers(here, there, path=""):
    """Equal but for the last digits, which processors disagree on."""
    assert type(here) is type(there), path
    if isinstance(here, dict):
        assert here.keys() == there.keys(), path
        for key in here:
            assert_same_numbers(here[key], there[key], f"{path}.{key}")
    elif isinstance(here, list):
        assert len(here) == len(there), path
        for i, pair in enumerate(zip(here, there, strict=True)):
            assert_same_numbers(*pair, f"{path}[{i}]")
    elif isinstance(here, float):
        # Where a difference is next to nothing, all of its digits are last ones.
        assert here == pytest.approx(there, rel=1e-6, abs=1e-9), path
    else:
        assert here == there, path


NUMBER = re.compile(r"(?<![\w.])[-+]?\d[\d,]*(?:\.\d+)?(?:e[-+]?\d+)?(?![\w.]*\w)")


def assert_same_text(here, there):
    """The same words and integers, and other numbers that differ by one of their last digits.

    What is rounded for print may lie between two of them, and processors round it either way.
    """
    assert NUMBER.split(here) == NUMBER.split(there)
    for a, b in zip(NUMBER.findall(here), NUMBER.findall(there), strict=True):
        numbers = [Decimal(x.replace(",", "")) for x in (a, b)]
        last = min(x.as_tuple().exponent for x in numbers)
        apart = 0 if last == 0 else Decimal(1).scaleb(last)
        assert abs(numbers[0] - numbers[1]) <= apart, (a, b)


@pytest.mark.parametrize(
    ("here", "there", "alike"),
    [
        ("a 0.50 b", "a 0.51 b", True),
        ("a 0.50 b", "a 0.52 b", False),
        ("a 0.50 b", "a 0.50 c", False),
        ("1,234 of -1.9e-05", "1,234 of -2e-05", True),
        ("1,234 of 1.9e-05", "1,234 of 2.1e-05", False),
        ("1,234", "1,235", False),
        ("0.99*, 9.9", "1*, 10", True),
        ("0.9", "1.1", False),
        ("w24 of 0.10.2", "w25 of 0.10.2", False),
        ("[+0.01]", "[-0.00]", True),
    ],
)
def test_texts_are_the_same_up_to_one_of_a_last_digit(here, there, alike):
    if alike:
        assert_same_text(here, there)
    else:
        with pytest.raises(AssertionError):
            assert_same_text(here, there)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["adamw", "muon", "shampoo", "soap"])
def test_the_ladders_base_cells_are_reproduced(name, tmp_path):
    lines = [line for line in lines_at_the_base() if line["optimizer"] == name]
    line = min(lines, key=lambda line: line["validation_loss"])
    if data.load("stdlib", "char").fingerprint != line["corpus"]["fingerprint"]:
        pytest.skip("this Python's standard library is not the one that the results are of")
    command = [sys.executable, "-c", TRAIN, json.dumps(line["config"]), str(tmp_path / "run")]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    # Another processor adds in another order, which training amplifies to the noise of a seed.
    assert float(output) == pytest.approx(line["validation_loss"], rel=0.03)
