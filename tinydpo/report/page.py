"""The report as HTML: one page, no script, nothing loaded; every text that a person or a model wrote is escaped."""

from collections.abc import Sequence
from html import escape
from typing import Any, NamedTuple

import numpy as np

from tinydpo.data.notice import CONTENT_NOTICE, is_hh
from tinydpo.evaluation.table import Estimate, Row, headline
from tinydpo.report import figures
from tinydpo.report.answers import answers
from tinydpo.report.facts import provenance, public_name, table
from tinydpo.report.figures import Group, svg

MOST_SUBSETS = 20
CSS = """
:root { color-scheme: light dark; --ink: #1b1b1b; --paper: #fff; --soft: #f3f3f1; --line: #d5d5d0;
  --blue: #0072b2; --orange: #d55e00; --green: #00805d; --pink: #b0548a; --grey: #666; }
@media (prefers-color-scheme: dark) { :root { --ink: #e8e8e4; --paper: #16181b; --soft: #202327; --line: #3a3e44;
  --blue: #56b4e9; --orange: #f58a42; --green: #20c495; --pink: #dd9cc0; --grey: #a3a3a3; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 64rem; padding: 1rem; background: var(--paper); color: var(--ink);
  font: 1rem/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1, h2, h3 { line-height: 1.2; margin: 2rem 0 .5rem; }
h1 { margin-top: 0; }
p, figcaption { max-width: 44rem; }
a { color: var(--blue); }
nav { margin: 1rem 0; }
nav a { margin-right: 1rem; white-space: nowrap; }
aside { border-left: .25rem solid var(--orange); padding: .5rem 1rem; background: var(--soft); max-width: 44rem; }
.headline { display: grid; grid-template-columns: repeat(auto-fill, minmax(17rem, 1fr)); gap: .75rem; padding: 0; }
.headline li { list-style: none; background: var(--soft); border-radius: .5rem; padding: .75rem 1rem; }
.headline b { display: block; font-size: 1.6rem; line-height: 1.2; }
.headline i { display: block; font-style: normal; color: var(--grey); }
.noise { border: 1px solid var(--orange); }
.figures { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 22rem), 1fr)); gap: 1rem; }
figure { margin: 1rem 0; max-width: 34rem; }
.chart { width: 100%; height: auto; fill: currentColor; }
.chart text { font-family: system-ui, sans-serif !important; }
figcaption, .meta { font-size: .875rem; color: var(--grey); }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .9rem; }
th, td { text-align: left; vertical-align: top; padding: .25rem .75rem .25rem 0; border-bottom: 1px solid var(--line);
  font-variant-numeric: tabular-nums; }
th, .wide td { white-space: nowrap; }
article { border-top: 1px solid var(--line); padding-top: .5rem; margin-top: 1.5rem; }
.answers { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 18rem), 1fr)); gap: .75rem; }
.answers section { background: var(--soft); border-radius: .5rem; padding: .5rem .75rem; }
h4 { margin: 0; font-size: .875rem; }
.text { white-space: pre-wrap; margin: .25rem 0; }
.prompt { max-width: 44rem; border-left: .25rem solid var(--line); padding-left: .75rem; }
summary { cursor: pointer; }
.token { border-radius: .15rem; }
"""


class Material(NamedTuple):
    """What a report is made of; what was not there is empty."""

    name: str
    results: dict[str, Any]
    samples: list[dict[str, Any]]
    pairs: list[dict[str, Any]]
    frontier: dict[str, Any]
    winrate: dict[str, Any]
    runs: dict[str, dict[str, Any]]


def page(material: Material) -> str:
    """The whole page."""
    sections = [
        ("Headline figures", _headline(material)),
        ("Held-out pairs", _pairs(material.pairs)),
        ("Frontier", _frontier(material.frontier)),
        ("Win rates", _win_rates(material.winrate)),
        ("Training", _training(material.runs)),
        ("Answers", answers(material.samples)),
        ("How it was made", provenance(material.results, material.frontier, material.runs)),
    ]
    there = [(title, title.lower().replace(" ", "-"), body) for title, body in sections if body]
    parts = [
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{escape(material.name)}: report</title>\n<style>{CSS}</style>\n</head>\n<body>",
        f"<header>\n<h1>{escape(material.name)}</h1>\n{_introduction(material)}",
        "<nav>"
        + " ".join(f'<a href="#{anchor}">{title}</a>' for title, anchor, _ in there)
        + "</nav>\n</header>\n<main>",
        *(f'<section id="{anchor}">\n<h2>{title}</h2>\n{body}\n</section>' for title, anchor, body in there),
        "</main>\n</body>\n</html>\n",
    ]
    return "\n".join(parts)


def _introduction(material: Material) -> str:
    settings, text = material.results.get("settings"), ""
    if settings:
        text = (
            f"<p>The policy <b>{escape(public_name(settings['model_name_or_path']))}</b> against its reference "
            f"<b>{escape(public_name(settings['ref_model_name_or_path']))}</b>, on held-out pairs and prompts.</p>\n"
        )
    if any(is_hh(dataset) for dataset in _datasets(material)):
        text += f"<aside><b>Content notice.</b> {escape(CONTENT_NOTICE)}</aside>\n"
    return text


def _datasets(material: Material) -> list[str]:
    """Every data set that the folder's parts name."""
    settings = [part.get("settings", {}) for part in (material.results, material.frontier, material.winrate)]
    settings += [run["config"] for run in material.runs.values()]
    return [str(each["dataset_name"]) for each in settings if each.get("dataset_name")]


def _headline(material: Material) -> str:
    results = material.results
    rows = [*(headline(results) if results else []), *_judged(material.winrate)]
    if not rows:
        return ""
    told = (
        "<p>Intervals are over held-out pairs and prompts: Wilson's for shares, 1.96 standard errors for means. "
        "Another seed of training may change more.</p>\n"
    )
    return told + '<ul class="headline">\n' + "\n".join(map(_card, rows)) + "\n</ul>"


def _judged(winrate: dict[str, Any]) -> list[Row]:
    """Win rates by the judge as headline figures: for each opponent the temperature nearest to 1."""
    nearest: dict[str, dict[str, Any]] = {}
    for row in sorted(winrate.get("comparisons", []), key=lambda row: -abs(row["temperature"] - 1)):
        nearest[row["opponent"]] = row
    return [
        Row(
            f"win rate against the {figures.opponent(row)[0]}",
            f"how often {public_name(winrate['judge'])} prefers the policy's answer at temperature "
            f"{row['temperature']:g}, ties half; raw, and judges like length: see the length-controlled rate below",
            Estimate(row["win_rate"], *row["win_rate_ci95"]),
            chance=0.5,
        )
        for row in nearest.values()
    ]


def _card(row: Row) -> str:
    value, low, high = row.policy
    beside = [] if low is None else [f"95 %: {low:.3f} to {high:.3f}"]
    beside += [f"reference: {row.ref}"] if row.ref else []
    meaning = row.meaning.replace("\n", " ")
    meaning = escape(meaning[0].upper() + meaning[1:]) + "."
    if row.says_nothing():
        meaning += f" <strong>The interval holds {row.chance:g}: no winner can be named.</strong>"
    noise = ' class="noise"' if row.says_nothing() else ""
    told = f"<b>{value:.3f} {row.unit}</b><i>{'<br>'.join(beside)}</i>"
    return f"<li{noise}>{escape(row.label)} {told}{meaning}</li>"


def _pairs(pairs: list[dict[str, Any]]) -> str:
    if not pairs:
        return ""
    drawn = [
        _figure(
            figures.margin_histogram([pair["margin"] for pair in pairs]),
            "margins",
            f"Reward margins of {len(pairs):,} held-out pairs. Right of zero the implicit reward prefers chosen; the "
            "outermost bars hold what lies beyond.",
        ),
        _figure(
            figures.accuracy_by(by_length(pairs)),
            "lengths",
            "Reward accuracy by the length of a pair's longer completion, in tokens: a quarter of the pairs each, as "
            "near as ties allow. Lines are 95 % Wilson intervals.",
        ),
    ]
    if subsets := by_subset(pairs):
        left_out = f" The {MOST_SUBSETS} largest of {len(subsets)}." * (len(subsets) > MOST_SUBSETS)
        caption = f"Reward accuracy by subset, with 95 % Wilson intervals.{left_out}"
        drawn.append(_figure(figures.accuracy_by(subsets[:MOST_SUBSETS]), "subsets", caption))
    return f'<div class="figures">\n{"".join(drawn)}</div>'


def by_subset(pairs: Sequence[dict[str, Any]]) -> list[Group]:
    """Pairs by their `subset`, the largest first; [] where none has one."""
    names = sorted({str(pair["subset"]) for pair in pairs if pair.get("subset")})
    groups = [_group(name, [pair for pair in pairs if str(pair.get("subset")) == name]) for name in names]
    return sorted(groups, key=lambda group: -group.n)


def by_length(pairs: Sequence[dict[str, Any]]) -> list[Group]:
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


def _frontier(result: dict[str, Any]) -> str:
    if not result:
        return ""
    points, failed = result["points"], result.get("failed", [])
    seeds = sorted({point["seed"] for point in points})
    caption = (
        "What the answers earn against how far the policy has moved from its reference: a curve from the SFT model "
        "through each β's last checkpoint (faint: earlier ones), bars of 95 % over prompts. Upper left is "
        "better. Best of N takes the highest reward of N reference answers: a ceiling that no policy is expected to "
        "pass at the same KL. Shuffled labels teach nothing and must not rise."
    )
    told = f"<p>{len({(p['curve'], p['beta'], p['seed']) for p in points})} runs, seed {', '.join(map(str, seeds))}. "
    told += "Where bars overlap, no method can be named the better one"
    told += ", and one seed does not show what another would change.</p>" if len(seeds) < 2 else ".</p>"
    if failed:
        names = escape(", ".join(run["name"] for run in failed))
        told += f"<p><strong>Failed and missing:</strong> {names}; frontier.json says why.</p>"
    return told + _figure(figures.frontier(result), "frontier", caption)


def _win_rates(winrate: dict[str, Any]) -> str:
    if not winrate:
        return ""
    comparisons = winrate["comparisons"]
    caption = (
        "How often the judge prefers the policy's answer, ties half, with 95 % intervals; hollow: with the effect of "
        "length taken out. An interval that holds 0.5 names no winner."
    )
    head = ("against", "at", "win rate", "length-controlled", "wins", "ties", "losses", "invalid", "words")
    rows = []
    for r in comparisons:
        controlled = r.get("length_controlled_win_rate")
        held = "–" if controlled is None else Estimate(controlled, *r["length_controlled_ci95"])
        words = f"{r['mean_length_policy']:.0f} to {r['mean_length_opponent']:.0f}"
        counts = (r[kind] for kind in ("wins", "ties", "losses", "invalid"))
        raw = Estimate(r["win_rate"], *r["win_rate_ci95"])
        rows.append((figures.opponent(r)[0], f"{r['temperature']:g}", raw, held, *counts, words))
    told = f"<p>The judge is {escape(public_name(winrate['judge']))}. At: sampling temperature. Words: the policy's "
    told += "mean answer, to the opponent's.</p>"
    return told + _figure(figures.win_rates(comparisons), "winrates", caption) + table(rows, head)


def _training(runs: dict[str, dict[str, Any]]) -> str:
    parts = []
    for title, run in runs.items():
        if charts := figures.curves(run["log"]):
            drawn = "".join(
                _figure(chart, f"{title.lower()}{number}", "", chart.axes[0].get_title())
                for number, chart in enumerate(charts)
            )
            parts.append(f'<h3>{title}</h3>\n<div class="figures">\n{drawn}</div>')
    return "\n".join(parts)


def _figure(figure: Any, prefix: str, caption: str, alt: str = "") -> str:
    told = f"<figcaption>{escape(caption)}</figcaption>" if caption else ""
    return f"<figure>{svg(figure, prefix, alt or caption)}{told}</figure>\n"
