"""From result lines to report.json: what is chosen, measured, left out and said."""

import json
import re

import numpy as np
import pytest

from mup_jax.analysis import (
    claims,
    compute_multiplier,
    finding,
    markdown,
    summarize,
    terminal_table,
)

from .conftest import MULTIPLIERS, TUNED, WIDTHS, cell

RUNGS = [f"w{width}" for width in WIDTHS]


def of(lines, **want):
    return [line for line in lines if all(line[key] == value for key, value in want.items())]


def test_a_finished_ladder(ladder):
    report = summarize(ladder)
    json.dumps(report, allow_nan=False)
    assert [rung["name"] for rung in report["rungs"]] == RUNGS
    assert list(report["optimizers"]) == list(MULTIPLIERS)
    for name, multiplier in MULTIPLIERS.items():
        summary = report["optimizers"][name]
        assert summary["best_learning_rate"]["w24"] == TUNED
        for rung in RUNGS:
            entry = summary["compute_multiplier"][rung]
            assert entry["value"] == pytest.approx(multiplier, abs=0.05)
            assert entry["low"] <= entry["value"] <= entry["high"]
            assert len(summary["final_loss_by_seed"][rung]) == 3
            assert summary["optimizer_flops_share"][rung] == pytest.approx(0.01)
            assert summary["optimizer_seconds_share"][rung] == pytest.approx(0.25)
        assert summary["seconds_per_run"]["w24"] == pytest.approx(2 * 24**2 * 3e-3 / 0.75)
        assert summary["coordinate_check"]["w48"] == pytest.approx(2**0.1)
        assert [len(sweep) for sweep in summary["learning_rate_sweep"].values()] == [5, 3, 3, 3]
    assert report["seed_noise"] == pytest.approx(0.001, rel=0.5)


def test_multipliers_come_from_the_reported_losses(ladder):
    report = summarize(ladder)
    compute = [rung["flops"] for rung in report["rungs"]]
    muon, adamw = (report["optimizers"][name] for name in ("muon", "adamw"))
    np.testing.assert_allclose(
        [entry["value"] for entry in muon["compute_multiplier"].values()],
        compute_multiplier(
            compute,
            list(muon["final_loss"].values()),
            baseline_compute=compute,
            baseline_loss=list(adamw["final_loss"].values()),
        ),
    )


def test_the_order_of_lines_does_not_matter(ladder):
    shuffled = [ladder[i] for i in np.random.default_rng(0).permutation(len(ladder))]
    report, same = summarize(ladder), summarize(shuffled)
    assert report["optimizers"] == same["optimizers"]
    assert sorted(report["notes"]) == sorted(same["notes"])


def test_larger_rungs_report_the_transferred_rate_and_note_a_better_one(ladder):
    for line in of(ladder, optimizer="muon", rung="w64", learning_rate=TUNED / 2):
        line["validation_loss"] *= 0.97
    report = summarize(ladder)
    muon = report["optimizers"]["muon"]
    transferred = of(ladder, optimizer="muon", rung="w64", learning_rate=TUNED)
    expected = np.mean([line["validation_loss"] for line in transferred])
    assert muon["final_loss"]["w64"] == pytest.approx(expected)
    assert muon["best_learning_rate"]["w64"] == TUNED / 2
    assert any("muon at w64: the transferred learning rate" in note for note in report["notes"])


def test_a_rate_better_within_the_noise_is_not_noted(ladder):
    transferred = of(ladder, optimizer="muon", rung="w64", learning_rate=TUNED)
    mean = np.mean([line["validation_loss"] for line in transferred])
    for line in of(ladder, optimizer="muon", rung="w64", learning_rate=TUNED / 2):
        line["validation_loss"] = mean * 0.9999
    report = summarize(ladder)
    assert report["optimizers"]["muon"]["best_learning_rate"]["w64"] == TUNED / 2
    assert not any("transferred" in note for note in report["notes"])


def test_a_diverged_rate_is_never_the_best(ladder):
    of(ladder, optimizer="soap", rung="w24", learning_rate=TUNED)[0]["validation_loss"] = None
    report = summarize(ladder)
    soap = report["optimizers"]["soap"]
    assert soap["best_learning_rate"]["w24"] != TUNED
    assert [TUNED, None] in soap["learning_rate_sweep"]["w24"]
    assert any("soap at w24: 1 of 3 runs diverged" in note for note in report["notes"])


def test_a_diverged_transfer_has_no_loss_and_no_multiplier(ladder):
    of(ladder, optimizer="soap", rung="w48", learning_rate=TUNED)[0]["validation_loss"] = None
    report = summarize(ladder)
    soap = report["optimizers"]["soap"]
    assert list(soap["final_loss"]) == list(soap["compute_multiplier"]) == ["w24", "w32", "w64"]
    assert soap["final_loss_by_seed"]["w48"][0] is None
    assert "diverged in 1 of 3" in markdown(report)


def test_notes_on_extrapolation_parity_and_the_edge_of_a_grid(ladder):
    for line in of(ladder, optimizer="muon", rung="w24"):
        line["validation_loss"] *= 0.9 if line["learning_rate"] == TUNED * 4 else 1
    notes = "\n".join(summarize(ladder)["notes"])
    assert "muon: the best learning rate at w24, 0.0625, is the upper end" in notes
    assert "muon has no result yet at w32, w48 and w64" in notes
    assert "soap: the multiplier at w64 extrapolates adamw's curve" in notes
    assert "shampoo: the multiplier's 90% interval at" in notes


@pytest.mark.parametrize(
    ("keep", "note"),
    [
        ({"optimizer": "muon"}, "no adamw run has finished"),
        ({"rung": "w24"}, "the baseline has 1 point"),
        ({"seed": 0}, "has a rung of one seed"),
        ({"seed": 0, "rung": "w24", "learning_rate": TUNED}, "was not tuned"),
        ({"rung": "w64", "optimizer": "adamw", "seed": 2}, "the baseline has 1 point"),
    ],
)
def test_an_unfinished_ladder_reports_what_is_there(ladder, keep, note):
    report = summarize(of(ladder, **keep))
    json.dumps(report, allow_nan=False)
    assert note in "\n".join(report["notes"])
    assert finding(report) in markdown(report)
    assert terminal_table(report)


def test_one_seed_gives_multipliers_without_intervals(ladder):
    report = summarize(of(ladder, seed=0))
    entry = report["optimizers"]["muon"]["compute_multiplier"]["w48"]
    assert set(entry) == {"value", "extrapolated", "noise_band", "without_a_rung"}
    assert report["seed_noise"] is None
    assert "may be noise between seeds" in finding(report)


def test_a_baseline_that_gets_worse_gives_no_multipliers(ladder):
    for line in of(ladder, optimizer="adamw", rung="w64"):
        line["validation_loss"] = 2.9
    report = summarize(ladder)
    assert "must decrease" in report["notes"][0]
    assert finding(report).startswith("No compute multiplier")


def test_everything_diverged():
    report = summarize([cell("w24", name, TUNED, 0, None) for name in ("adamw", "muon")])
    assert report["optimizers"]["muon"]["final_loss"] == {}
    assert "muon has no finished learning rate at w24" in "\n".join(report["notes"])


def test_finding_says_where(ladder):
    sentence = finding(summarize(ladder))
    assert "muon needs less compute at every rung (multiplier 1.3" in sentence
    assert "shampoo needs less compute at 2 of 4 rungs" in sentence


def test_finding_says_when_an_optimizer_is_worse(ladder):
    for line in of(ladder, optimizer="shampoo"):
        line["validation_loss"] *= 1.02
    sentence = finding(summarize(ladder))
    assert "shampoo needs no less compute at any rung, and more at w24, w32, w48, w64" in sentence


def test_markdown_has_tables_figures_and_notes(ladder):
    page = markdown(summarize(ladder), ["loss_vs_compute.png"])
    for part in ("## Compute multiplier over adamw", "![Loss vs compute](loss_vs_compute.png)"):
        assert part in page
    assert "*e*" in page
    assert "| fingerprint | abc |" in page.replace("corpus: ", "")


def test_parametrizations_are_compared_above_the_base_that_they_share(ladder_with_sp):
    report = summarize(ladder_with_sp)
    mup, sp = (report["optimizers"][name] for name in ("muon", "muon, sp"))
    assert sp["final_loss"]["w24"] == mup["final_loss"]["w24"]
    assert sp["best_learning_rate"]["w24"] == TUNED
    assert sp["compute_multiplier"]["w64"]["value"] == pytest.approx(0.7, abs=0.05)
    assert mup["compute_multiplier"]["w64"]["value"] == pytest.approx(1.4, abs=0.05)
    first, second = claims(report)
    assert "muon at 4 of 4 rungs" in first
    assert "**holds in part**" in first  # shampoo's 1.01 cannot be told from 1
    assert "muon **loses all of it** (0.69 [0.68, 0.71] against 1.38" in second
    assert len(report["notes"]) == len(set(report["notes"]))


def test_checks_are_compared_with_the_same_seed(ladder_with_sp):
    checks = summarize(ladder_with_sp)["optimizers"]["muon"]["checks"]["w64"]
    assert [factor for factor, _ in checks["learning_rate"]] == [0.5, 2.0]
    (half, higher), (twice, lower) = checks["weight_decay"]
    assert (half, twice) == (0.5, 2.0)
    assert (higher, lower) == (pytest.approx(0.02), pytest.approx(-0.01))
    page = markdown(summarize(ladder_with_sp))
    assert "better by 0.0100 nats with 2 times the transferred weight decay" in page
    assert "| muon | w64 | weight decay | ×0.5: +0.0200, ×2: -0.0100 |" in page


def test_three_costs(ladder):
    """Twice the time per step halves the gain in seconds, and nothing else."""
    for line in of(ladder, optimizer="muon"):
        line["seconds"]["optimizer_share"] = 0.625  # a step of 8 ms in place of 4
    muon = summarize(ladder)["optimizers"]["muon"]["multipliers"]
    for rung in RUNGS[:-1]:
        by_cost = {cost: muon[cost][rung]["value"] for cost in muon}
        assert by_cost["flops"] == pytest.approx(1.4, abs=0.06)
        # On a ladder of a fixed number of tokens per parameter.
        assert by_cost["tokens"] == pytest.approx(by_cost["flops"] ** 0.5, abs=0.02)
        # Steps, of a constant time each, grow as tokens do.
        assert by_cost["seconds"] == pytest.approx(by_cost["tokens"] / 2, abs=0.02)


def test_the_law_is_a_second_estimator(ladder):
    report = summarize(ladder)
    assert report["law"]["points"] == 4
    assert "one degree of freedom" in report["law"]["doubt"]
    entry = report["optimizers"]["muon"]["law_multiplier"]["w48"]
    assert entry["low"] < 1.4 < entry["high"]
    few = summarize([line for line in ladder if line["rung"] != "w32"])
    assert few["optimizers"]["muon"]["law_multiplier"] == {}
    assert "There is no law: compute has 3 different values" in few["law"]["doubt"]


def test_what_would_change_the_conclusion(ladder):
    page = markdown(summarize(ladder))
    assert re.search(r"shampoo at w\d\d.*: more seeds could put it on either side of 1", page)
    for line in of(ladder, seed=1):
        line["validation_loss"] *= 1.01
    assert "seeds a cell with this noise (power 80%)" in markdown(summarize(ladder))


@pytest.mark.parametrize(
    ("there", "here", "verdict"),
    [
        ((0.5, 0.4, 0.6), (2.0, 1.8, 2.2), "**loses all of it**"),
        ((1.4, 0.95, 1.7), (2.0, 1.8, 2.2), "**loses a part or all**"),
        ((1.4, 1.3, 1.5), (2.0, 1.8, 2.2), "**loses a part**"),
        ((1.4, 1.3, 1.9), (2.0, 1.8, 2.2), "is **undecided**"),
        ((0.4, 0.3, 0.5), (0.85, 0.8, 0.9), "has **no gain** to lose"),
    ],
)
def test_what_is_lost_without_rules(there, here, verdict):
    entry = lambda numbers: {"w64": dict(zip(("value", "low", "high"), numbers, strict=True))}
    summaries = {
        name: {
            "optimizer": "muon",
            "parametrization": parametrization,
            "compute_multiplier": {r: x | {"extrapolated": False} for r, x in entry(of).items()},
        }
        for name, parametrization, of in (("muon", "mup", here), ("muon, sp", "sp", there))
    }
    report = {"baseline": "adamw", "rungs": [{"name": "w64"}], "optimizers": summaries}
    assert f"muon {verdict}" in claims(report)[1]


def test_learning_rates_are_compared_on_equal_seeds(ladder):
    """A check of the first seed, which is a lucky one, against three of the transferred rate."""
    for line in of(ladder, optimizer="muon", rung="w64", seed=0):
        line["validation_loss"] *= 0.9
    for line in of(ladder, optimizer="muon", rung="w64", learning_rate=TUNED * 2):
        line["validation_loss"] *= 1.001
    assert summarize(ladder)["optimizers"]["muon"]["best_learning_rate"]["w64"] == TUNED


def test_times_of_different_machines_cost_the_seconds_only(ladder):
    for line in of(ladder, rung="w64"):
        line["seconds"]["gradient"] = 1e-9
    report = summarize(ladder)
    assert report["optimizers"]["muon"]["multipliers"]["seconds"] == {}
    assert report["optimizers"]["muon"]["compute_multiplier"]["w64"]
    assert "no multipliers by seconds" in report["notes"][0]


def test_a_flat_end_of_the_baseline_is_survived(ladder):
    losses = [line["validation_loss"] for line in of(ladder, optimizer="adamw", rung="w48")]
    flat = of(ladder, optimizer="adamw", rung="w64", learning_rate=TUNED)
    for line, loss in zip(flat, losses[1:], strict=False):
        line["validation_loss"] = loss * (1 - 1e-7)
    report = summarize(ladder)
    json.dumps(report, allow_nan=False)
    assert report["optimizers"]["muon"]["compute_multiplier"].keys() >= {"w24", "w32"}


def test_features_that_are_not_finite_are_left_out(ladder):
    of(ladder, optimizer="muon", rung="w48", learning_rate=TUNED)[0]["coordinate_check"] = {
        "feature_change_rms": None
    }
    assert summarize(ladder)["optimizers"]["muon"]["coordinate_check"]["w48"] > 0


def test_cells_of_two_configurations_are_refused(ladder):
    with pytest.raises(ValueError, match=r"both muon at w24, learning rate 0\.015625, seed 1"):
        summarize([*ladder, cell("w24", "muon", TUNED, 1, 2.0)])


def test_no_results_are_refused():
    with pytest.raises(ValueError, match="0 cells"):
        summarize([])


def test_mixed_devices_are_noted(ladder):
    ladder[3]["device"] = "gpu"
    assert "differ in their device" in summarize(ladder)["notes"][0]


def tuned_on_two_rates(ladder):
    """The ladder with runs that tuned, a rate between those of their grid, and no sweep of old."""
    lines = [
        line | {"embedding_readout_factor": 2.5, "is_tuning": False}
        for line in ladder
        if line["rung"] != "w24" or line["learning_rate"] == TUNED
    ]
    for optimizer in MULTIPLIERS:
        for power in (-1, 0, 1):
            for factor in (1.0, 2.0, 4.0):
                loss = 3.0 + 0.1 * power**2 + 0.1 * (factor - 2.0) ** 2
                one = cell("w24", optimizer, TUNED * 2.0**power, 0, loss)
                one |= {"embedding_readout_factor": factor, "is_tuning": True}
                lines.append(one | {"cell": f"{one['cell']} x{factor:g}"})
    return lines


def test_runs_that_tune_are_no_results(ladder):
    report = summarize(tuned_on_two_rates(ladder))
    for name in MULTIPLIERS:
        summary, before = report["optimizers"][name], summarize(ladder)["optimizers"][name]
        assert summary["final_loss"] == before["final_loss"]
        assert summary["tuning"]["cells"] == 9
        # Of each rate the best factor.
        sweep = {TUNED / 2: 3.1, TUNED: 3.0, 2 * TUNED: 3.1}
        assert dict(map(tuple, summary["learning_rate_sweep"]["w24"])) == pytest.approx(sweep)
    page = markdown(report)
    assert "| adamw | 0.0078125, 0.015625, 0.03125 | ×1, ×2, ×4 | 9 | 0.015625 | ×2.5 |" in page
    assert "0.015625 x2.5" in terminal_table(report)
    assert not [note for note in report["notes"] if "end of its grid" in note]


def test_a_best_pair_at_the_end_of_its_grid_is_noted(ladder):
    lines = tuned_on_two_rates(ladder)
    kept = [line for line in lines if not line["is_tuning"] or line["embedding_readout_factor"] > 1]
    (note,) = {n for n in summarize(kept)["notes"] if "muon" in n and "end of its grid" in n}
    assert "muon: the best factor of embedding and readout at w24, 2, is the lower end" in note


def test_nothing_but_tuning_is_no_report(ladder):
    lines = [line for line in tuned_on_two_rates(ladder) if line["is_tuning"]]
    with pytest.raises(ValueError, match="36 cells, none of them beyond tuning"):
        summarize(lines)
