"""The page, the sentence and the figure of coordinate checks."""

import numpy as np
import pytest

from mup_jax.analysis.coordinate_figure import write_coordinates
from mup_jax.analysis.coordinates import feature_changes, finding, markdown, steepest, verdict

SIZES = (32, 64, 256)


def check(optimizer, parametrization, exponent, *, expected=None, logits=0.0):
    """Of an optimizer whose features move ∝ size^exponent in a step, None: not finite."""

    def values(exponent):
        if exponent is None:
            return [[1.0, 1.0], [1.0, 1.0], [1.0, None]]
        return np.outer(np.float64(SIZES) ** exponent, [0.5, 2.0]).tolist()

    exponents = {"last block": exponent, "logits": logits}
    return {
        "optimizer": optimizer,
        "parametrization": parametrization,
        "passed": all(x is not None and abs(x) <= 0.15 for x in exponents.values()),
        "expected_to_pass": parametrization == "mup" if expected is None else expected,
        "activation_slopes": {name: {"step_change": x} for name, x in exponents.items()},
        "activations": {name: {"step_change": values(x)} for name, x in exponents.items()},
    }


def results(*checks, vary="width"):
    return {
        "vary": vary,
        "sizes": list(SIZES),
        "steps": 10,
        "tolerance": 0.15,
        "checks": list(checks),
        "device": "cpu",
        "versions": {"jax": "0.10.2"},
        "corpus": {"source": "stdlib", "fingerprint": "abc"},
    }


ALL = results(
    check("AdamW", "mup", 0.05),
    check("AdamW", "sp", 0.9),
    check("Muon", "mup", -0.02, logits=-0.11),
    check("Muon", "sp", 0.1),
    check("SOAP", "mup", 0.4, expected=False),
    check("SOAP", "sp", None),
)


def test_finding():
    assert finding(ALL) == (
        "Over 8x width, in µP AdamW and Muon move every layer equally far in a step (|exponent| at "
        "most 0.11); SOAP fails as expected (+0.40, last block). In SP 2 of 3 optimizers fail."
    )


def test_finding_of_surprises():
    surprising = results(
        check("AdamW", "mup", 0.3), check("SOAP", "mup", 0.0, expected=False), vary="depth"
    )
    assert finding(surprising) == (
        "Over 8x depth, in µP SOAP moves every layer equally far in a step (|exponent| at most "
        "0.00); AdamW fails unexpectedly (+0.30, last block). In SP 0 of 0 optimizers fail."
    )


@pytest.mark.parametrize(
    ("exponent", "expected", "text"),
    [
        (0.0, True, "passes"),
        (0.0, False, "passes unexpectedly"),
        (0.3, True, "fails unexpectedly"),
        (0.3, False, "fails as expected"),
    ],
)
def test_verdict(exponent, expected, text):
    assert verdict(check("AdamW", "mup", exponent, expected=expected)) == text
    assert verdict(check("AdamW", "sp", exponent)) == text.split()[0]


def test_feature_changes_are_relative_to_the_smallest():
    np.testing.assert_allclose(
        feature_changes(check("AdamW", "mup", 0.5)), [1, 2**0.5, 8**0.5], rtol=1e-12
    )
    np.testing.assert_array_equal(feature_changes(check("SOAP", "sp", None)), [1, 1, np.nan])


def test_steepest():
    assert steepest(check("AdamW", "mup", 0.1, logits=-0.2)) == ("logits", -0.2)
    name, slope = steepest(check("AdamW", "mup", None, logits=-0.2))
    assert name == "last block"
    assert np.isnan(slope)


def test_page():
    page = markdown(ALL, "figure.png", ["### Details"], "python -m something")
    assert page.startswith("# Does every layer move equally far in a step, whatever the width?\n")
    assert f"**{finding(ALL)}**" in page
    assert "![Coordinate check](figure.png)" in page
    assert "| AdamW | µP | +0.05 | +0.00 | +0.05 (last block) | 1.11 | passes |" in page
    assert "| Muon | µP | -0.02 | -0.11 | -0.11 (logits) | 0.96 | passes |" in page
    assert "| SOAP | µP | +0.40 | +0.00 | +0.40 (last block) | 2.30 | fails as expected |" in page
    assert "| SOAP | SP | +nan | +0.00 | +nan (last block) | nan | fails |" in page
    assert "    python -m something\n" in page
    assert page.endswith("### Details\n")


@pytest.mark.parametrize("vary", ["width", "depth"])
def test_figure(tmp_path, vary):
    path = tmp_path / "figure.png"
    write_coordinates(ALL | {"vary": vary}, path)
    assert path.read_bytes().startswith(b"\x89PNG")
