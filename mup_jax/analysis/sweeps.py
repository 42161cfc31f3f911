"""The results of a sweep over model sizes, for people: a page, a sentence, and rows of a table."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from mup_jax.analysis.batch_report import batch_sections
from mup_jax.analysis.report import table
from mup_jax.analysis.transfer import MARGIN, Curve, summarize_sweep

NAMES = {"learning_rate": "learning rate", "weight_decay": "weight decay", "epsilon": "ε"}
BATCH_FIGURE = "batches.png"
SIZES = {"width": "width", "depth": "depth", "batch_size": "batch size"}


def add_summaries(results: dict[str, Any]) -> None:
    """Adds "summaries" to the results of a sweep: one for each curve and way to carry it.

    Args:
      results: with "swept", "vary", "sizes", "carried" (name -> exponent) and "curves", each of
        them with "optimizer", "variant" and "points" (size as text -> `Curve`).
    """
    results["summaries"] = [
        {
            "optimizer": curve["optimizer"],
            "variant": view,
            "carried": carried,
            "points": curve["points"],
            **(
                summarize_sweep(points_of(curve), carried=carried, harmless=wants_harmless(results))
                or {"best": None}
            ),
        }
        for curve in results["curves"]
        for view, carried in _views(results, curve)
    ]


def points_of(curve: Mapping[str, Any]) -> dict[float, Curve]:
    """By size, ascending."""
    return {float(size): points for size, points in curve["points"].items()}


def _views(results: Mapping[str, Any], curve: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    several = len(results["carried"]) > 1
    for name, carried in results["carried"].items():
        yield (name if several else curve["variant"]), carried


def wants_harmless(results: Mapping[str, Any]) -> bool:
    """Whether what should transfer is the largest harmless value, rather than the best."""
    # A small ε costs nothing; what a model tolerates is what has to transfer.
    return results["swept"] == "epsilon"


def is_of_batches(results: Mapping[str, Any]) -> bool:
    """Whether the page has a part, and a figure, about batch sizes."""
    return results["vary"] == "batch_size" and results["swept"] == "learning_rate"


def base_of(results: Mapping[str, Any]) -> str:
    """What the swept values are given for."""
    return "the smallest batch" if results["vary"] == "batch_size" else "the base model"


def finding(results: Mapping[str, Any]) -> str:
    """One sentence for each variant: how far the best value of each optimizer moves.

    A star marks where one was at the edge of what was tried, so that the factor says little.
    """
    best = "largest harmless ε" if wants_harmless(results) else f"best {NAMES[results['swept']]}"
    sizes = results["sizes"]
    span = f"over {sizes[-1] / sizes[0]:g}x {SIZES[results['vary']]}"
    variants = dict.fromkeys(summary["variant"] for summary in results["summaries"])
    return " ".join(
        f"{variant}: the {best} moves {span} by a factor of {_movements(results, variant)}."
        for variant in variants
    )


def _movements(results: Mapping[str, Any], variant: str) -> str:
    def movement(summary: Mapping[str, Any]) -> str:
        if not summary["best"]:
            return "unknown"
        edge = any(best["at_edge"] for best in summary["best"].values())
        return f"{summary['drift_factor']:.2g}{'*' * edge}"

    return ", ".join(
        f"{movement(summary)} ({summary['optimizer']})"
        for summary in results["summaries"]
        if summary["variant"] == variant
    )


def markdown(results: Mapping[str, Any], title: str, figure: str, command: str) -> str:
    """The page report.md.

    Args:
      results: with the summaries of `add_summaries`.
      title: the question.
      figure: path of the image relative to the page.
      command: what gives these results.
    """
    name, vary = NAMES[results["swept"]], SIZES[results["vary"]]
    legend = f"Dashed: what the smallest {vary} has in the table."
    if wants_harmless(results):
        best = f"The largest {name} that costs less than {MARGIN:g} nats, interpolated in log2"
    else:
        legend = f"Ring: the best tried. {legend}"
        best = f"The best {name}, from a parabola in log2 through the best tried and its neighbours"
    sections = [
        f"# {title}",
        f"**{finding(results)}**",
        f"![{title}]({figure})",
        f"*Validation loss in nats per token, mean of {len(results['config']['seeds'])} seeds, "
        f"against the {name} of {base_of(results)}. {legend}*",
        f"{best}, for each {vary} (*: at the edge of what was tried). Drift: its exponent in the "
        f"{vary} beyond the rule, in brackets the range over seeds. Lost: how much more the value "
        f"tuned at the smallest {vary} loses at the largest than the best tried there.",
        table(
            [
                *("optimizer", "variant"),
                *(f"{size:g}" for size in results["sizes"]),
                *("drift", "factor over all", "lost (nats)", "best loss"),
            ],
            [_row(results, summary) for summary in results["summaries"]],
        ),
        *(batch_sections(results, BATCH_FIGURE) if is_of_batches(results) else ()),
        f"    {command}",
        f"{results['device']}, jax {results['versions']['jax']}; text "
        f"{results['corpus']['source']} ({results['corpus']['fingerprint']}); settings and all "
        "losses are in results.json.",
    ]
    return "\n\n".join(sections) + "\n"


def _row(results: Mapping[str, Any], summary: Mapping[str, Any]) -> Sequence[Any]:
    head = [summary["optimizer"], summary["variant"]]
    if not summary["best"]:
        return [*head, *("diverged" for _ in results["sizes"]), "", "", "", ""]
    *_, (largest, last) = summary["best"].items()
    lost = summary["lost"][largest]
    return [
        *head,
        *(
            f"{best['value'] * (float(size) / results['sizes'][0]) ** -summary['carried']:.2g}"
            + "*" * best["at_edge"]
            for size, best in summary["best"].items()
        ),
        f"{summary['drift']:+.2f} [{summary['drift_low']:+.2f}, {summary['drift_high']:+.2f}]",
        f"{summary['drift_factor']:.2f}",
        "diverged" if lost is None else f"{lost:.3f}",
        f"{last['loss']:.3f}",
    ]
