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
    "Shampoo": (
        "shampoo",
        # The size of the updates is that of the roots: old ones are of other gradients.
        {
            **_EVERYWHERE,
            **_UNBLOCKED,
            "exponent": 0.25,
            "grafted": False,
            "precondition_frequency": 1,
        },
    ),
    "#Shampoo": ("shampoo", {**_EVERYWHERE, **_UNBLOCKED, "exponent": 0.25}),
    "#Shampoo²": ("shampoo", {**_EVERYWHERE, **_UNBLOCKED}),
    "SOAP": ("soap", _UNBLOCKED),
    "AdaMuon": ("adamuon", _EVERYWHERE),
    "LAMB": ("lamb", {}),
}


# Options of the optimizers of `mup_jax.optimizers`, by their names there.
Options = Mapping[str, Mapping[str, Any]]


def curve(label: str, learning_rate: float, common: Options, **settings: Any) -> ConfigDict:
    """The curve of an optimizer.

    Args:
      label: of `OPTIMIZERS`.
      learning_rate: of the base.
      common: options that all curves share.
      settings: keys of a curve; any others are further options of this one.
    """
    name, own = OPTIMIZERS[label]
    chosen = default_curve()
    options = {key: settings.pop(key) for key in list(settings) if key not in chosen}
    chosen.update(optimizer=name, learning_rate=learning_rate, **settings)
    chosen.options = ConfigDict({**own, **common.get(name, {}), **options})
    return chosen


def width_curves(
    rates: Mapping[str, float],
    common: Options,
    *,
    blocked: Sequence[str],
    block_size: int,
    normalized: Mapping[str, float],
) -> ConfigDict:
    """Curves in SP and µP, and repaired by blocks or by spectral normalization.

    Args:
      rates: base learning rate of each optimizer, by label.
      common: options that all curves share.
      blocked: labels of those that are tried with blocks too.
      block_size: of these.
      normalized: base learning rates of those that are tried with spectral normalization.
    """
    curves: dict[str, dict[str, ConfigDict]] = {}
    for label, rate in rates.items():
        curves[label] = {
            "SP": curve(label, rate, common, parametrization="sp"),
            "µP": curve(label, rate, common),
        }
        if label in blocked:
            of_blocks = curve(label, rate, common, block_size=block_size)
            curves[label][f"µP, blocks of {block_size}"] = of_blocks
        if label in normalized:
            normal = curve(label, normalized[label], common, spectral_norm=True)
            curves[label]["µP, spectral norm"] = normal
    return ConfigDict(curves)


def lamb_curves(rates: Mapping[str, float]) -> ConfigDict:
    """LAMB in SP, and by the rule of Gupta et al. (arXiv 2602.20937) and the measured one."""
    return ConfigDict(
        {
            label: {
                "SP": curve(label, rate, {}, parametrization="sp"),
                "rule of Gupta": curve(label, rate, {}, variant="gupta"),
                "rule as measured": curve(label, rate, {}, variant="measured"),
            }
            for label, rate in rates.items()
        }
    )


def depth_curves(rates: Mapping[str, float], common: Options) -> ConfigDict:
    """Residual branches times 1/depth with the rule's depth factors (α = 1), or neither (α = 0)."""
    parametrizations = {"α = 0": "sp", "α = 1": "mup"}
    return ConfigDict(
        {
            label: {
                name: curve(label, rate, common, parametrization=parametrization)
                for name, parametrization in parametrizations.items()
            }
            for label, rate in rates.items()
        }
    )


def batch_curves(rates: Mapping[str, float], common: Options) -> ConfigDict:
    """Optimizers as they are at every batch size."""
    return ConfigDict(
        {label: {"all batches": curve(label, rate, common)} for label, rate in rates.items()}
    )


def weight_decay_curves(
    rates: Mapping[str, float], common: Options, *, weight_decay: float
) -> ConfigDict:
    """Independent weight decay as it is at every width, around `weight_decay`."""
    settings: dict[str, Any] = {"weight_decay": weight_decay, "weight_decay_scaling": "constant"}
    return ConfigDict(
        {label: {"µP": curve(label, rate, common, **settings)} for label, rate in rates.items()}
    )


def epsilon_curves(
    rates: Mapping[str, float], common: Options, epsilons: Mapping[str, float]
) -> ConfigDict:
    """Every absolute ε, around that of the optimizer's label, scaled by its rule and not.

    Constant is what Gupta et al. (arXiv 2602.20937) have for Shampoo's.
    """
    scalings = {"ε constant": False, "ε by its rule": True}
    return ConfigDict(
        {
            label: {
                name: curve(label, rate, common, epsilon=epsilons[label], scale_epsilon=scale)
                for name, scale in scalings.items()
            }
            for label, rate in rates.items()
        }
    )
