"""The notebooks run from top to bottom, and are stored with the figures of a full run."""

import itertools
import json
import re

import nbformat
import pytest

from mup_jax import analysis
from notebooks.execute import NOTEBOOKS, execute, without_noise

SMALL = {
    "transfer_in_five_minutes": """
        WIDTHS, LEARNING_RATES, STEPS, BATCH = (8, 16, 32), [2**-6, 2**-4, 2**-2], 10, 16
    """,
    "your_own_optimizer": """
        CHECK_WIDTHS, WIDTHS, LEARNING_RATES, STEPS, BATCH = (8, 16), (8, 32), [2**-4, 0.5], 12, 16
    """,
    "compose_a_chain": "BASE_WIDTH, WIDTH, LAYERS, STEPS, BATCH = 8, 16, 1, 10, 16",
    "read_a_ladder": 'FOLDER = "results/ladder_cpu"',  # trains nothing
}

every_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
QUICK = ("read_a_ladder",)  # the others train
one_notebook = pytest.mark.parametrize(
    "path",
    [
        pytest.param(
            path,
            id=path.stem,
            marks=[] if path.stem in QUICK else [pytest.mark.slow],
        )
        for path in NOTEBOOKS
    ],
)


def stored(name):
    (path,) = (path for path in NOTEBOOKS if path.stem == name)
    return nbformat.read(path, as_version=4)


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def outputs(notebook):
    return [output for cell in code_cells(notebook) for output in cell.outputs]


def figures(notebook):
    return [output for output in outputs(notebook) if "image/png" in output.get("data", {})]


def kinds(notebook):
    """Of the outputs of each cell; what is printed may come in any number of pieces."""
    of_cells = [[output.output_type for output in cell.outputs] for cell in code_cells(notebook)]
    return [[kind for kind, _ in itertools.groupby(of_cell)] for of_cell in of_cells]


def printed(notebook):
    """All text of the outputs."""
    texts = [output.get("text", "") for output in outputs(notebook)]
    texts += [output.get("data", {}).get("text/markdown", "") for output in outputs(notebook)]
    return "\n".join(texts)


@one_notebook
def test_runs_from_top_to_bottom(path):
    small = execute(path, parameters=SMALL[path.stem].strip())
    of_full_run = stored(path.stem)
    assert len(figures(small)) == len(figures(of_full_run)) > 0
    assert kinds(small) == kinds(of_full_run)


@every_notebook
def test_stored_outputs_are_of_one_run_in_order(path):
    cells = code_cells(stored(path.stem))
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))


@every_notebook
def test_nothing_failed_or_warned(path):
    for output in outputs(stored(path.stem)):
        assert output.output_type != "error"
        assert output.get("name") != "stderr", output.text


@every_notebook
def test_is_stored_small_and_without_traces_of_a_machine(path):
    assert path.stat().st_size < 400_000
    notebook = stored(path.stem)
    assert without_noise(stored(path.stem)) == notebook
    for output in figures(notebook):
        del output.data["image/png"]  # base64 may spell anything
    assert not re.search(r"/(home|root|work|tmp|usr|opt|Users)/|[A-Z]:\\\\", str(notebook))


@every_notebook
def test_begins_with_installation_and_ends_with_what_next(path):
    notebook = stored(path.stem)
    assert code_cells(notebook)[0].source.startswith(
        'import sys\n\nif "google.colab" in sys.modules'
    )
    assert notebook.cells[-1].source.startswith("## What next")


def test_links_lead_to_notebooks():
    names = {path.name for path in NOTEBOOKS}
    assert len(names) == 4
    for path in NOTEBOOKS:
        links = re.findall(r"\]\((\w+\.ipynb)\)", stored(path.stem).cells[-1].source)
        assert links
        assert set(links) <= names - {path.name}


def test_learning_rate_transfers_under_mup_alone():
    text = printed(stored("transfer_in_five_minutes"))
    number = r"(\d+\.\d+)"
    found = re.findall(rf"is {number} at .* and {number} at .* loses {number} nats", text)
    (base, sp, lost_sp), (same_base, mup, lost_mup) = (map(float, line) for line in found)
    assert base == same_base
    assert base / sp >= 4
    assert 0.5 <= base / mup <= 2
    assert lost_mup < 0.05 < lost_sp


def test_derived_rule_passes_where_sp_fails():
    text = printed(stored("your_own_optimizer"))
    assert "SP: failed" in text
    assert "µP: passed" in text
    exponents = [float(x) for x in re.findall(r"\| (?:embedding|hidden|readout) \| (\S+) ", text)]
    assert exponents[:3] == pytest.approx([0, -0.5, -0.5], abs=0.1)
    base, sp, mup = map(float, re.findall(r"best learning rate (\S+)", text))
    assert base == mup
    assert base / sp == pytest.approx(4)


def test_chain_says_what_is_missing():
    text = printed(stored("compose_a_chain"))
    for advice in ("MuonDimensionNumbers(-2, -1)", "optax.partition", "no dimension of params"):
        assert advice in text


def test_ladder_is_the_one_of_the_report():
    (path,) = (path for path in NOTEBOOKS if path.stem == "read_a_ladder")
    folder = path.parent.parent / "results" / "ladder_cpu"
    report = json.loads((folder / "report.json").read_text())
    text = printed(stored("read_a_ladder"))
    assert f"of {len(report['optimizers'])} series" in text
    for sentence in (analysis.finding(report), *analysis.claims(report)):
        assert sentence in text
