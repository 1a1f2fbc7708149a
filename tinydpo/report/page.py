"""What a report is made of: all that lies in a recipe's run folder. Every part is optional."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from markupsafe import Markup

from tinydpo.config.arguments import list_sources
from tinydpo.data.notice import CONTENT_NOTICE, is_hh
from tinydpo.errors import UserError
from tinydpo.evaluation import winrate as winrates
from tinydpo.evaluation.frontier import get_run_key
from tinydpo.evaluation.on_policy import add_rounds_to_frontier
from tinydpo.evaluation.table import Estimate, Row, headline_rows
from tinydpo.files import damaged_file_error, public_name, read_json, read_jsonl, read_run_config, write_atomic
from tinydpo.report import figures
from tinydpo.report.figures import Group, to_svg
from tinydpo.report.tokens import color_tokens, render_template
from tinydpo.training.curves import describe_rewards


class ReportData(NamedTuple):
    """What a report is made of; what was not there is empty."""

    name: str
    results: dict[str, Any]
    samples: list[dict[str, Any]]
    pairs: list[dict[str, Any]]
    frontier: dict[str, Any]
    winrate: dict[str, Any]
    runs: dict[str, dict[str, Any]]


def gather_report_data(folder: Path) -> ReportData:
    """Read what lies in a recipe's run folder.

    Raises:
        UserError: nothing to report lies there, or a file there is damaged.
    """
    evaluation = _find_stage_folder(folder, "evaluation", "eval_results.json")
    results = read_json(evaluation / "eval_results.json")
    try:
        if results:
            headline_rows(results)
    except (KeyError, TypeError, ValueError) as error:
        raise damaged_file_error(evaluation / "eval_results.json", f"{error!r} in it") from None
    frontier = read_json(_find_stage_folder(folder, "frontier", "frontier.json") / "frontier.json", "points", "reward")
    rounds = read_json(folder / "rounds.json", "rounds")
    winrate = read_json(_find_stage_folder(folder, "winrate", "winrate.json") / "winrate.json", "comparisons", "judge")
    settings = results.get("settings", {})
    material = ReportData(
        name=folder.resolve().name,
        results=results,
        samples=read_jsonl(evaluation / "samples.jsonl", "prompt", "policy", "ref"),
        pairs=read_jsonl(evaluation / "pairs.jsonl", "margin", "chosen_tokens", "rejected_tokens"),
        frontier=add_rounds_to_frontier(frontier if frontier.get("points") else {}, rounds),
        winrate=winrate if winrate.get("comparisons") else {},
        runs={
            title: run
            for title, role, name in (("DPO", "model", "dpo"), ("SFT", "ref_model", "sft"))
            if (run := _read_run(folder, settings.get(f"{role}_name_or_path"), name))
        },
    )
    if not any(material[1:]):
        raise UserError(
            f"{folder} holds no run, evaluation, frontier or win rates to report; `make evaluate` writes one into "
            "runs/<recipe folder>/evaluation"
        )
    return material


def _find_stage_folder(folder: Path, name: str, file: str) -> Path:
    """The subfolder that holds a stage's `file`, the one written last: `name`, or where --output_dir sent it."""
    found = sorted(folder.glob(f"*/{file}"), key=lambda path: (path.stat().st_mtime, path))
    return found[-1].parent if found else folder / name


def _read_run(folder: Path, model: str | None, name: str) -> dict[str, Any]:
    """What the run that trained `model` left beside it, or else the one in `folder`/`name`; {} where there is none."""
    run = Path(model) if model and Path(model).is_dir() else folder / name
    if run.name.startswith("checkpoint-"):
        run = run.parent
    found = {
        "config": read_run_config(str(run)),
        "log": read_json(run / "trainer_state.json").get("log_history", []),
        "environment": read_json(run / "environment.json"),
        "data": read_json(run / "data_summary.json"),
        "results": read_json(run / "train_results.json"),
    }
    return found if any(found.values()) else {}


def collect_provenance(
    results: dict[str, Any], frontier: dict[str, Any], runs: dict[str, dict[str, Any]]
) -> dict[str, list]:
    """For each run, the evaluation and the frontier a table, in (name, value) rows, of what it depends on."""
    settings = results.get("settings", {})
    columns = {title: _run_facts(run) for title, run in runs.items()}
    if settings:
        columns["Evaluation"] = {
            "seed": settings["seed"],
            "data": _data(settings),
            "pairs": f"{results['pairs']:,} held out",
            "sampling": f"{settings['num_prompts']} prompts at temperature {settings['temperature']:g}, "
            f"top_k {settings['top_k']}, top_p {settings['top_p']:g}",
            "β": f"{results['beta']:g}",
            "tokens": f"{settings['max_length']} of prompt and answer",
            "dtype": settings["dtype"],
        }
    if common := frontier.get("settings"):
        facts = {"prompts": common.get("num_prompts"), "sampling seed": common.get("sample_seed")}
        columns["Frontier"] = facts | {"data": _data(common)}
    return {
        title: [(name, value) for name, value in facts.items() if value not in (None, "")]
        for title, facts in columns.items()
    }


def _run_facts(run: dict[str, Any]) -> dict[str, Any]:
    config, environment, train = run["config"], run["environment"], run["data"].get("train", {})
    packages = environment.get("packages", {})
    return {
        "seed": config.get("seed", environment.get("seed")),
        "starts from": public_name(config.get("model_name_or_path") or "", config.get("model_revision")),
        "data": _data(config),
        "pairs": f"{train['pairs_kept']:,} of {train['pairs_in']:,} kept" if "pairs_kept" in train else None,
        "loss": " + ".join(config.get("loss_type") or ()) if "beta" in config else None,
        "β": config.get("beta"),
        "learning rate": config.get("learning_rate"),
        "epochs": config.get("num_train_epochs"),
        "pairs per step": config.get("pairs_per_step"),
        "tokens": config.get("max_length"),
        "speed": _speed(run["results"]),
        "commit": environment.get("git_commit"),
        "device": environment.get("device"),
        "versions": ", ".join(f"{name} {version}" for name, version in packages.items()),
    }


def _speed(results: dict[str, Any]) -> str:
    told = {
        "pairs_per_second": "{:.3g} pairs a second",
        "tokens_per_second": "{:,.0f} tokens a second",
        "padding": "{:.1%} of the positions padding",
        "mfu": "{:.1%} of the devices' peak (MFU)",
    }
    return ", ".join(text.format(results[name]) for name, text in told.items() if name in results)


def _data(settings: dict[str, Any]) -> str:
    told = (filter(None, (public_name(one.name, one.revision), one.data_dir)) for one in list_sources(settings))
    return ", ".join(map(" ".join, told))


SHOWN, ROOM = 20, 2_000_000  # prompts, and the most bytes that they may take
LONGEST, MOST_TOKENS, FOLDED = 10_000, 1_000, 1_200  # of a text: characters, coloured tokens, characters in sight


class FoldedText(NamedTuple):
    """What is in sight of a text, and where that is not all of it, the whole one to unfold and what `told` of it."""

    shown: str | Markup
    whole: str = ""
    told: str = ""


def render_answers(samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Twenty rows of `samples.jsonl` as articles (`shown`, of how many: `of`) and the `key` to their colours, or {}.

    Tokens share one scale of colour, which is full at the 98th percentile of the rewards shown. Long texts are folded,
    longer ones cut, and fewer rows are shown where twenty would be too large.
    """
    if not samples:
        return {}
    shown = [samples[i * len(samples) // SHOWN] for i in range(SHOWN)] if len(samples) > SHOWN else samples
    sizes = np.abs([reward for sample in shown for reward in sample.get("token_rewards") or ()])
    scale = float(np.quantile(sizes, 0.98)) if len(sizes) and np.isfinite(sizes).all() else 0.0
    articles, size = [], 0
    for number, sample in enumerate(shown, 1):
        articles.append(_article(number, sample, scale))
        size += len(articles[-1].encode("utf-8", errors="replace"))
        if size > ROOM:
            articles.pop()
            break
    steps = [-scale, -scale / 2, 0.0, scale / 2, scale]
    key = color_tokens([f" {step:+.2f} " for step in steps], steps, scale) if scale else ""
    return {"shown": articles, "of": f"{len(samples):,}", "key": key}


def _article(number: int, sample: dict[str, Any], scale: float) -> Markup:
    columns, pieces = [], sample.get("pieces")
    for title, role in (("Policy", "policy"), ("Reference", "ref"), ("Dataset, preferred", "chosen")):
        if role not in sample:
            continue
        text, more = _text(sample[role]), False
        if role == "policy" and pieces and scale:
            text = FoldedText(color_tokens(pieces[:MOST_TOKENS], sample["token_rewards"][:MOST_TOKENS], scale))
            more = len(pieces) > MOST_TOKENS
        facts = [f"reward {sample[f'reward_{role}']:.2f}"] if f"reward_{role}" in sample else []
        facts += ["cut off"] if sample.get(f"ended_{role}") is False else []
        columns.append({"title": title, "facts": ", ".join(facts), "text": text, "more": more})
    return render_template(
        "report/templates/article.html", number=number, prompt=_text(sample["prompt"], tail=True), answers=columns
    )


def _text(text: str, tail: bool = False) -> FoldedText:
    """A text, folded where it is long: in sight is its end (`tail`) or its beginning."""
    text, told = text.strip(), f"all {len(text.strip()):,} characters"
    if len(text) > LONGEST:
        told = f"{LONGEST:,} of {len(text):,} characters"
        text = f"… {text[-LONGEST:]}" if tail else f"{text[:LONGEST]} …"
    if len(text) <= FOLDED:
        return FoldedText(text)
    return FoldedText(f"… {text[-FOLDED // 2 :]}" if tail else f"{text[: FOLDED // 2]} …", text, told)


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
            drawn[title] = curves, describe_rewards(run["log"], beta) if beta else ""
    return drawn


def _drawn(figure: Any, prefix: str, caption: str, alt: str = "") -> Drawn:
    return Drawn(to_svg(figure, prefix, alt or caption), caption)
