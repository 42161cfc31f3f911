"""Ways to carry hyperparameters from a ladder's base to its other rungs, by name."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from mup_jax.optimizers import OPTIMIZERS
from mup_jax.training.config import TRANSFER_OPTIONS


@dataclass(frozen=True)
class Parametrization:
    """Options of an optimizer that say how it depends on the size of the model.

    Attributes:
      description: what it does, for reports.
      options: of the optimizer.
      optimizer: the only one that has it; empty for all that have the options.
      same_as_mup: optimizers for which it would be no other than "mup", and that do not have it.
      tuned_alone: whether the options count at the base too, so that it has a learning rate of its
        own; otherwise all parametrizations are one there.
    """

    description: str
    options: dict[str, Any] = field(default_factory=dict)
    optimizer: str = ""
    same_as_mup: tuple[str, ...] = ()
    tuned_alone: bool = False

    def options_of(
        self, optimizer: str, make: Callable[..., Any] | None = None
    ) -> dict[str, Any] | None:
        """The options for an optimizer; None where it does not have this parametrization.

        Args:
          optimizer: its name.
          make: what makes it, where that is none of ours.
        """
        known = {*inspect.signature(make or OPTIMIZERS[optimizer]).parameters, *TRANSFER_OPTIONS}
        excluded = self.optimizer not in ("", optimizer) or optimizer in self.same_as_mup
        return None if excluded or not self.options.keys() <= known else self.options


_CONSTANT = {"learning_rate_scaling": "constant", "scale_epsilon": False}

# "mup" comes first: it is the one that the others are compared with.
PARAMETRIZATIONS = {
    "mup": Parametrization("η and ε by the rule of the optimizer, λ ∝ 1/width"),
    "sp": Parametrization(
        "η, ε and λ the same at every size", _CONSTANT | {"weight_decay_scaling": "constant"}
    ),
    "mup_lr_only": Parametrization(
        "η and ε by the rule, λ the same at every size", {"weight_decay_scaling": "constant"}
    ),
    "wd_only": Parametrization("η and ε the same at every size, λ ∝ 1/width", _CONSTANT),
    "lr_and_wd_1/width": Parametrization(
        "η by Adam's rule for every optimizer (Muon with 1/d_in), λ ∝ 1/width",
        {"learning_rate_scaling": "1/width"},
        same_as_mup=("adamw", "adopt", "lion"),
    ),
    "spectral_norm": Parametrization(
        "matrix updates of a fixed spectral norm, η the same at every size, λ ∝ 1/width",
        {"spectral_norm": True},
        tuned_alone=True,
    ),
    "muon_rms_matching": Parametrization(
        "η of Muon ∝ √max(d_in, d_out), which fixes the RMS of its updates; the rest as in mup",
        {"variant": "rms_matching"},
        optimizer="muon",
    ),
}
