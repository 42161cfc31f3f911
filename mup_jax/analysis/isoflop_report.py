"""Compute-optimal training, for people: a sentence, and a page with tables."""

from collections.abc import Mapping
from typing import Any

from mup_jax.analysis.isoflop import Curve, optima
from mup_jax.analysis.report import table

TITLE = "How many tokens per parameter are compute-optimal?"


def add_summaries(results: dict[str, Any]) -> None:
    """Adds "summaries": of each optimizer the best of every budget, and over all.

    Args:
      results: with "budgets", in FLOPs, and "optimizers", each of them with "optimizer" (its label)
        and "budgets": for each a list of models, with "width", "parameters", "tokens", "flops",
        "tokens_per_parameter" and "losses", one for each seed.
    """
    curves = [
        [
            Curve([m["tokens_per_parameter"] for m in models], [m["losses"] for m in models])
            for models in one["budgets"]
        ]
        for one in results["optimizers"]
    ]
    results["summaries"] = [
        {
            "optimizer": one["optimizer"],
            "budgets": [vertex._asdict() for vertex in vertices],
            "combined": combined._asdict(),
        }
        for one, (vertices, combined) in zip(results["optimizers"], optima(curves), strict=True)
    ]


def finding(results: Mapping[str, Any]) -> str:
    """One sentence: the best tokens per parameter of each optimizer, or that there is none."""
    clauses = [
        f"{_with_interval(summary['combined'])} with {summary['optimizer']}"
        if summary["combined"]["value"] is not None
        else f"not known with {summary['optimizer']} ({_why_not(summary)})"
        for summary in results["summaries"]
    ]
    return (
        f"The best tokens per parameter over {len(results['budgets'])} budgets: "
        f"{'; '.join(clauses)}."
    )


def markdown(results: Mapping[str, Any], figure: str, command: str) -> str:
    """The page report.md.

    Args:
      results: with the summaries of `add_summaries`.
      figure: path of the image relative to the page.
      command: what gives these results.
    """
    budgets = [f"{budget:.2g} FLOPs" for budget in results["budgets"]]
    seeds = len(results["config"]["seeds"])
    sections = [
        f"# {TITLE}",
        f"**{finding(results)}**",
        f"![{TITLE}]({figure})",
        f"*Validation loss in nats per token against tokens per parameter: small models to the "
        f"right. Dots: means of {seeds} seeds. Lines: parabolas in log tokens per parameter "
        "through the lowest and its two neighbours to either side. Diamond and bar: the best and "
        "its 90% interval.*",
        "The best tokens per parameter, and in brackets the 90% interval: for the noise between "
        "seeds, or for the residuals of the parabolas where these are larger. At each budget the "
        "weight decay λ is the same at every width, and the learning rate is carried by µP from "
        "the base width, the same for all numbers of tokens. All parameters count, embedding and "
        "readout included.",
        table(
            ["optimizer", *budgets, "geometric mean"],
            [
                [
                    summary["optimizer"],
                    *(_best(vertex) for vertex in summary["budgets"]),
                    _best(summary["combined"]),
                ]
                for summary in results["summaries"]
            ],
        ),
        "The lowest loss of each parabola.",
        table(
            ["optimizer", *budgets],
            [
                [
                    summary["optimizer"],
                    *(
                        "–" if v["value"] is None else f"{v['loss']:.3f}"
                        for v in summary["budgets"]
                    ),
                ]
                for summary in results["summaries"]
            ],
        ),
        *_models(results),
        f"    {command}",
        f"{results['device']}, jax {results['versions']['jax']}; text "
        f"{results['corpus']['source']} ({results['corpus']['fingerprint']}); settings and all "
        "losses are in results.json.",
    ]
    return "\n\n".join(sections) + "\n"


def _models(results: Mapping[str, Any]) -> list[str]:
    """Tokens per parameter and steps of each width: the same for all optimizers."""
    models = results["optimizers"][0]["budgets"]
    widths = sorted({model["width"] for of_budget in models for model in of_budget})
    rows = []
    for budget, of_budget in zip(results["budgets"], models, strict=True):
        by_width = {model["width"]: model for model in of_budget}
        rows.append(
            [f"{budget:.2g} FLOPs"]
            + [
                f"{by_width[w]['tokens_per_parameter']:.3g} ({by_width[w]['steps']:,})"
                if w in by_width
                else "–"
                for w in widths
            ]
        )
    return [
        "Tokens per parameter of each width, in brackets the steps.",
        table(["", *(f"width {width}" for width in widths)], rows),
    ]


def _best(summary: Mapping[str, Any]) -> str:
    if summary["value"] is None:
        return summary.get("problem") or "–"
    return _with_interval(summary)


def _with_interval(summary: Mapping[str, Any]) -> str:
    value = f"{summary['value']:.3g}"
    if summary["low"] is None:
        return f"{value} (no interval)"
    if summary["low"] == 0:
        return f"{value} [unbounded]"
    return f"{value} [{summary['low']:.3g}, {summary['high']:.3g}]"


def _why_not(summary: Mapping[str, Any]) -> str:
    return "; ".join(dict.fromkeys(v["problem"] for v in summary["budgets"] if v["problem"]))
