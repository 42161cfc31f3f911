"""From a ladder's results to numbers, tables and figures: numpy in, no jax.

Figures need matplotlib and are therefore imported from `mup_jax.analysis.figures`.
"""

from mup_jax.analysis.findings import claims, finding
from mup_jax.analysis.multiplier import (
    MultiplierInterval,
    compute_multiplier,
    is_extrapolated,
    multiplier_interval,
    pooled_noise,
)
from mup_jax.analysis.report import markdown, terminal_table
from mup_jax.analysis.runs import series_name
from mup_jax.analysis.summary import summarize

__all__ = [
    "MultiplierInterval",
    "claims",
    "compute_multiplier",
    "finding",
    "is_extrapolated",
    "markdown",
    "multiplier_interval",
    "pooled_noise",
    "series_name",
    "summarize",
    "terminal_table",
]
