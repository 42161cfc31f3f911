"""The optimizers of Qiu et al. (arXiv 2512.05620, figures 2 to 4), by the names they have there."""

from collections.abc import Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from experiments.sweeps.plan import default_curve

_EVERYWHERE = {"hidden_only": False}
_UNBLOCKED = {"block_size": None}
# Label -> optimizer and options. "#" is grafted to Adam, "²" has exponents of 1/2, not 1/4.
OPTIMIZERS: dict[str, tuple[str, dict[str, Any]]] = {
    "AdamW": ("adamw", {}),
    "Muon": ("muon", _EVERYWHERE),
    "Muon-Adam": ("muon", {}),
    "Shampoo": ("shampoo", {**_EVERYWHERE, **_UNBLOCKED, "exponent": 0.25, "grafted": False}),
    "#Shampoo": ("shampoo", {**_EVERYWHERE, **_UNBLOCKED, "exponent": 0.25}),
    "#Shampoo²": ("shampoo", {**_EVERYWHERE, **_UNBLOCKED}),
    "SOAP": ("soap", _UNBLOCKED),
    "AdaMuon": ("adamuon", _EVERYWHERE),
}


def curve(
    label: str, learning_rate: float, options: Mapping[str, Any], **settings: Any
) -> ConfigDict:
    """The curve of an optimizer; `options` add to its own, `settings` to those of the curve."""
    name, own = OPTIMIZERS[label]
    chosen = default_curve()
    chosen.update(optimizer=name, learning_rate=learning_rate, **settings)
    chosen.options = ConfigDict({**own, **options})
    return chosen


def width_curves(
    rates: Mapping[str, float],
    options: Mapping[str, Mapping[str, Any]],
    *,
    blocked: Sequence[str],
    block_size: int,
    normalized: Mapping[str, float],
) -> ConfigDict:
    """Curves in SP and µP, and repaired by blocks or by spectral normalization.

    Args:
      rates: base learning rate of each optimizer, by label.
      options: of the optimizers of `mup_jax.optimizers`, by their names there.
      blocked: labels of those that are tried with blocks too.
      block_size: of these.
      normalized: base learning rates of those that are tried with spectral normalization.
    """

    def of(label: str, rate: float, parametrization: str = "mup", **more: Any) -> ConfigDict:
        common = options.get(OPTIMIZERS[label][0], {})
        return curve(label, rate, {**common, **more}, parametrization=parametrization)

    curves: dict[str, dict[str, ConfigDict]] = {}
    for label, rate in rates.items():
        curves[label] = {"SP": of(label, rate, "sp"), "µP": of(label, rate)}
        if label in blocked:
            curves[label][f"µP, blocks of {block_size}"] = of(label, rate, block_size=block_size)
        if label in normalized:
            normal = of(label, normalized[label], spectral_norm=True)
            curves[label]["µP, spectral norm"] = normal
    return ConfigDict(curves)
