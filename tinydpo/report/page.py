"""The report: one page, no script, nothing loaded. Here is what stands on it; `templates/` says how it looks."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from markupsafe import Markup

from tinydpo.data.notice import CONTENT_NOTICE, is_hh
from tinydpo.evaluation import winrate as winrates
from tinydpo.evaluation.frontier_points import get_run_key
from tinydpo.evaluation.table import Estimate, Row, headline_rows
from tinydpo.files import public_name, write_atomic
from tinydpo.launching.arguments import list_sources
from tinydpo.report import figures
from tinydpo.report.answers import render_answers
from tinydpo.report.facts import collect_provenance
from tinydpo.report.figures import Group, to_svg
from tinydpo.report.material import ReportData, gather_report_data
from tinydpo.report.templating import render_template
from tinydpo.training.reward_trend import describe_rewards

REPORT = "report.html"
MOST_SUBSETS = 20
ROUNDS = " Rounds train on the policy's own answers, each from the one before."
CONTROLS = dict.fromkeys((*range(9), 11, 12, *range(14, 32), 127), "\N{REPLACEMENT CHARACTER}")

TITLES = {
    "headline": "Headline figures",
    "pairs": "Held-out pairs",
    "frontier": "Frontier",
    "win_rates": "Win rates",
    "training": "Training",
    "answers": "Answers",
    "provenance": "How it was made",
}


class Drawn(NamedTuple):
    """A figure on the page, and the words below it."""

    svg: Markup
    caption: str


def write_report(folder: Path) -> Path:
    """Write `report.html` into a recipe's run folder, whole or not at all: the same bytes for the same files.

    Args:
        folder: `runs/<recipe folder>`, with any of an evaluation, a frontier, win rates and runs in it.

    Returns:
        The page's path.

    Raises:
        UserError: nothing to report lies there, or a file there is damaged.
    """
    # HTML knows no control characters; what models write may hold them.
    write_atomic(folder / REPORT, page(gather_report_data(folder)).translate(CONTROLS))
    return folder / REPORT


def page(material: ReportData) -> str:
    """The whole page."""
    settings = material.results.get("settings")
    parts = {
        "headline": [_card(row) for row in _headline(material)],
        "pairs": _pairs(material.pairs),
        "frontier": _frontier(material.frontier),
        "win_rates": _win_rates(material.winrate),
        "training": _training(material.runs, material.results.get("kl_per_sequence")),
        "answers": render_answers(material.samples),
        "provenance": collect_provenance(material.results, material.frontier, material.runs),
    }
    return render_template(
        "report/templates/page.html",
        name=material.name,
        policy=settings and public_name(settings["model_name_or_path"]),
        reference=settings and public_name(settings["ref_model_name_or_path"]),
        notice=CONTENT_NOTICE if any(map(is_hh, _datasets(material))) else "",
        titles=[title for part, title in TITLES.items() if parts[part] or part == "provenance"],
        **parts,
    )


def _datasets(material: ReportData) -> list[str]:
    """Every data set that the folder's parts name."""
    settings = [part.get("settings", {}) for part in (material.results, material.frontier, material.winrate)]
    settings += [run["config"] for run in material.runs.values()]
    return [one.name for each in settings for one in list_sources(each)]


def _headline(material: ReportData) -> list[Row]:
    return [*(headline_rows(material.results) if material.results else []), *_judged(material.winrate)]


def _judged(winrate: dict[str, Any]) -> list[Row]:
    """Win rates by the judge as headline figures: for each opponent the temperature nearest to 1."""
    if not winrate:
        return []
    nearest: dict[str, dict[str, Any]] = {}
    for row in sorted(winrate["comparisons"], key=lambda row: -abs(row["temperature"] - 1)):
        nearest[row["opponent"]] = row
    return winrates.winrate_rows(winrate | {"comparisons": [*nearest.values()]})


def _card(row: Row) -> dict[str, Any]:
    value, low, high = row.policy
    beside = [] if low is None else [f"95 %: {low:.3f} to {high:.3f}"]
    beside += [f"reference: {row.ref}"] if row.ref else []
    meaning = row.meaning.replace("\n", " ")
    return {
        "label": row.label,
        "value": f"{value:.3f} {row.unit}",
        "beside": beside,
        "meaning": f"{meaning[0].upper()}{meaning[1:]}.",
        "noise": row.says_nothing(),
        "nothing": row.nothing,
        "chance": None if row.chance is None else f"{row.chance:g}",
    }


def _pairs(pairs: list[dict[str, Any]]) -> list[Drawn]:
    if not pairs:
        return []
    drawn = [
        _drawn(
            figures.draw_margin_histogram([pair["margin"] for pair in pairs]),
            "margins",
            f"Reward margins of {len(pairs):,} held-out pairs. Right of zero the implicit reward prefers chosen; the "
            "outermost bars hold what lies beyond.",
        ),
        _drawn(
            figures.draw_accuracy(group_pairs_by_length(pairs)),
            "lengths",
            "Reward accuracy by the length of a pair's longer completion, in tokens: a quarter of the pairs each, as "
            "near as ties allow. Lines are 95 % Wilson intervals.",
        ),
    ]
    if subsets := group_pairs_by_subset(pairs):
        left_out = f" The {MOST_SUBSETS} largest of {len(subsets)}." * (len(subsets) > MOST_SUBSETS)
        caption = f"Reward accuracy by subset, with 95 % Wilson intervals.{left_out}"
        drawn.append(_drawn(figures.draw_accuracy(subsets[:MOST_SUBSETS]), "subsets", caption))
    return drawn


def group_pairs_by_subset(pairs: Sequence[dict[str, Any]]) -> list[Group]:
    """Pairs by their `subset`, the largest first; [] where none has one."""
    names = sorted({str(pair["subset"]) for pair in pairs if pair.get("subset")})
    groups = [_group(name, [pair for pair in pairs if str(pair.get("subset")) == name]) for name in names]
    return sorted(groups, key=lambda group: -group.n)


def group_pairs_by_length(pairs: Sequence[dict[str, Any]]) -> list[Group]:
    """Pairs by the quartile that the tokens of their longer completion lie in."""
    lengths = np.array([max(pair["chosen_tokens"], pair["rejected_tokens"]) for pair in pairs])
    ends = np.unique(np.quantile(lengths, [0.25, 0.5, 0.75, 1], method="lower"))
    groups, above = [], -1
    for end in ends.tolist():
        inside = (lengths > above) & (lengths <= end)
        groups.append(_group(f"{int(lengths[inside].min())} to {end}", [pairs[i] for i in np.flatnonzero(inside)]))
        above = end
    return groups


def _group(name: str, pairs: Sequence[dict[str, Any]]) -> Group:
    return Group(name, sum(pair["margin"] > 0 for pair in pairs), len(pairs))


def _frontier(result: dict[str, Any]) -> dict[str, Any]:
    if not result:
        return {}
    points = result["points"]
    caption = (
        "What the answers earn against how far the policy has moved from its reference: a curve from the SFT model "
        "through each β's last checkpoint (faint: earlier ones), bars of 95 % over prompts. Upper left is "
        "better. Best of N takes the highest reward of N reference answers: a ceiling that no policy is expected to "
        "pass at the same KL. Shuffled labels teach nothing and must not rise."
    ) + ROUNDS * ("rounds" in result)
    return {
        "runs": len({get_run_key(point) for point in points}),
        "seeds": sorted({point["seed"] for point in points}),
        "failed": ", ".join(run["name"] for run in result.get("failed", [])),
        "drawn": _drawn(figures.draw_frontier(result), "frontier", caption),
    }


def _win_rates(winrate: dict[str, Any]) -> dict[str, Any]:
    if not winrate:
        return {}
    rows = []
    for r in winrate["comparisons"]:
        controlled = r.get("length_controlled_win_rate")
        held = "–" if controlled is None else Estimate(controlled, *r["length_controlled_ci95"])
        words = f"{r['mean_length_policy']:.0f} to {r['mean_length_opponent']:.0f}"
        counts = (r[kind] for kind in ("wins", "ties", "losses", "invalid"))
        raw = f"{Estimate(r['win_rate'], *r['win_rate_ci95'])}{winrates.format_caveats(winrate, r)}"
        rows.append((figures.name_opponent(r)[0], f"{r['temperature']:g}", raw, held, *counts, words))
    caption = (
        "How often the judge prefers the policy's answer, ties half, with 95 % intervals; hollow: with the effect of "
        "length taken out. An interval that holds 0.5 names no winner."
    )
    drawn = _drawn(figures.draw_win_rates(winrate["comparisons"]), "winrates", caption)
    itself = winrates.describe_judge(winrate["calibration"]) if winrate.get("calibration") else ""
    return {"judge": public_name(winrate["judge"]), "itself": itself, "drawn": drawn, "rows": rows}


def _training(runs: dict[str, dict[str, Any]], kl: float | None) -> dict[str, tuple[list[Drawn], str]]:
    """By run, its curves and what its rewards did; `kl` is what the evaluation measured of the last of them."""
    drawn = {}
    for title, run in runs.items():
        if charts := figures.draw_training_curves(run["log"]):
            named = [(chart, f"{title.lower()}{number}") for number, chart in enumerate(charts)]
            curves = [_drawn(chart, prefix, "", chart.axes[0].get_title()) for chart, prefix in named]
            beta = run["config"].get("beta")
            drawn[title] = curves, describe_rewards(run["log"], beta, kl) if beta else ""
    return drawn


def _drawn(figure: Any, prefix: str, caption: str, alt: str = "") -> Drawn:
    return Drawn(to_svg(figure, prefix, alt or caption), caption)
