"""Figures are written for every state of a ladder."""

import pytest

from mup_jax.analysis import summarize
from mup_jax.analysis.figures import write_figures

NAMES = [
    "loss_vs_compute.png",
    "multiplier_vs_compute.png",
    "learning_rate_sweeps.png",
    "coordinate_check.png",
]


def test_a_finished_ladder_has_four_figures(ladder, tmp_path):
    ladder[0]["validation_loss"] = None
    paths = write_figures(summarize(ladder), ladder, tmp_path)
    assert [path.name for path in paths] == NAMES
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in paths)


@pytest.mark.parametrize(
    ("optimizers", "rungs", "checked", "names"),
    [
        (["muon"], ["w24"], True, [NAMES[0], NAMES[2], NAMES[3]]),
        (["adamw", "muon", "soap"], ["w24", "w32"], False, NAMES[:3]),
    ],
)
def test_figures_without_data_are_left_out(ladder, tmp_path, optimizers, rungs, checked, names):
    lines = [x for x in ladder if x["optimizer"] in optimizers and x["rung"] in rungs]
    for line in lines:
        line["coordinate_check"] = line["coordinate_check"] if checked else None
    paths = write_figures(summarize(lines), lines, tmp_path)
    assert [path.name for path in paths] == names
