"""The report: everything in a recipe's run folder, on one HTML page that loads nothing.

`write_report` reads the folder and fills in `templates/page.html`, which has the text and draws the figures.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup, escape

from tinydpo.config.arguments import list_sources
from tinydpo.data.notice import CONTENT_NOTICE, is_hh
from tinydpo.errors import UserError
from tinydpo.evaluation.arguments import is_same_model
from tinydpo.evaluation.frontier import get_run_key
from tinydpo.evaluation.on_policy import add_rounds_to_frontier
from tinydpo.evaluation.table import Row, headline_rows, summarize_results
from tinydpo.evaluation.winrate import winrate_rows
from tinydpo.files import check_writable, public_name, read_json, read_jsonl, write_atomic
from tinydpo.report import figures
from tinydpo.report.tokens import color_tokens, render_template
from tinydpo.run_folder import RunFolder
from tinydpo.training.curves import describe_rewards

# Rows of an evaluation's table that are shown at the top of the page
HEAD = ("reward accuracy", "win rate", "KL per sequence", "ended on their own", "NLL of chosen")
ANSWERS = 20  # held-out prompts on the page
SETTINGS = (  # shown of each run and evaluation, where they have them
    "seed", "sample_seed", "loss_type", "beta", "learning_rate", "num_train_epochs", "pairs_per_step", "max_length",
    "num_prompts", "temperature", "temperatures", "top_k", "top_p", "dtype",
)  # fmt: skip


def write_report(folder: Path, evaluation: Path | None = None, policy: str | None = None) -> Path:
    """Write `report.html` into `runs/<recipe folder>` and return its path; the same files give the same page.

    Args:
        folder: the recipe's run folder.
        evaluation: the folder of the evaluation to show; by default one of a DPO run, by preference `evaluation`.
        policy: show this policy's evaluation, if it has one.

    Raises:
        UserError: the folder has nothing to report, or a file in it is damaged.
    """
    path = check_page(folder)
    evaluation = evaluation or _find_evaluation(folder, policy)
    results: dict[str, Any] = {}
    margins: list[float] = []
    samples: list[dict[str, Any]] = []
    if evaluation:
        results = read_json(evaluation / "eval_results.json", "pairs", "reward_accuracy", "settings")
        margins = [pair["margin"] for pair in read_jsonl(evaluation / "pairs.jsonl", "margin")]
        samples = read_jsonl(evaluation / "samples.jsonl", "prompt", "policy", "ref", "pieces", "token_rewards")
    if results:
        policy = results["settings"]["model_name_or_path"]
    frontier = _read_results(folder, "frontier/frontier.json", "points", "reward")
    if not frontier.get("points"):  # none before its first run ends
        frontier = {}
    frontier = add_rounds_to_frontier(frontier, read_json(folder / "rounds.json", "rounds"))
    winrate = _read_results(folder, "winrate/winrate.json", "comparisons", "judge", policy=policy)
    runs = _find_runs(folder, results or winrate)
    if not any((results, margins, samples, frontier, winrate, runs)):
        raise UserError(f"{folder} has no run or result to report; run `make evaluate` first")
    rows = headline_rows(results) if results else []
    evaluations = collect_evaluations(folder)
    page = render_template(
        "report/templates/page.html",
        name=folder.resolve().name,
        notice=CONTENT_NOTICE if _shows_hh([results, frontier, winrate], runs) else "",
        compared=describe_models(results) if results else "",
        summary=summarize_results(results) if results else "",
        evaluations=evaluations,
        compared_labels=[label for label in HEAD if any(label in rows for rows in evaluations.values())],
        made=[describe_training(title, run) for title, run in runs.items() if "date" in run.read_environment()],
        is_toy_task="tinydpo.toy_task.gold_reward" in (results.get("settings", {}).get("reward_funcs") or ()),
        head=select_head(rows) + _select_judged(winrate),
        rows=[row for row in rows if row.label not in HEAD],
        margins=margins,
        subsets=results.get("subsets"),
        frontier=frontier,
        frontier_runs=len({get_run_key(point) for point in frontier.get("points", [])}),
        winrate=winrate,
        trained={title: run for title, run in runs.items() if run.read_log()},
        answers=select_answers(samples),
        provenance=collect_provenance(runs, {"Evaluation": results, "Frontier": frontier, "Win rates": winrate}),
        # What the template calls
        figures=figures,
        describe_rewards=describe_rewards,
        winrate_rows=winrate_rows,
        typeset=typeset,
        color_tokens=color_tokens,
    )
    write_atomic(path, page)
    return path


def check_page(folder: Path) -> Path:
    """The page's path in a folder (UserError: it cannot be written there, or is another program's)."""
    check_writable(folder)
    page = folder / "report.html"
    if page.exists() and ": report</title>" not in page.read_text(encoding="utf-8", errors="replace"):
        raise UserError(f"{page} is not a report of tinydpo's and would be replaced; rename it")
    return page


def _find_evaluation(folder: Path, policy: str | None) -> Path | None:
    """The evaluation to show, by what its results say of the policy: a copied folder has any name and date.

    None if `policy` is given and has no evaluation.
    """
    found = []
    for path in sorted(folder.glob("*/eval_results.json")):
        evaluated = read_json(path).get("settings", {}).get("model_name_or_path", "")
        if policy is None or is_same_model(policy, evaluated):
            is_dpo = "beta" in RunFolder.of_model(evaluated).read_config()
            found.append((is_dpo, path.parent.name == "evaluation", path.parent))
    if found:
        return max(found)[-1]
    return None if policy else folder / "evaluation"


def _read_results(folder: Path, default: str, *keys: str, policy: str | None = None) -> dict[str, Any]:
    """The results at `default`, or else in the last file of its name in any subfolder (--output_dir).

    Only those of `policy` if it is given; {} if there are none.
    """
    default_path = folder / default
    found = folder.glob(f"*/{default_path.name}")
    for path in sorted(found, key=lambda path: (path == default_path, path), reverse=True):
        results = read_json(path, *keys)
        if policy is None or is_same_model(policy, results.get("settings", {}).get("model_name_or_path", "")):
            return results
    return {}


def _find_runs(folder: Path, results: dict[str, Any]) -> dict[str, RunFolder]:
    """The runs that trained the evaluated models, or else those in the recipe's own folder, by what they trained."""
    settings = results.get("settings", {})
    runs: dict[str, RunFolder] = {}
    for key, name in (("model_name_or_path", "dpo"), ("ref_model_name_or_path", "sft")):
        model = settings.get(key, "")
        run = RunFolder.of_model(model)
        if not run.is_started:  # nothing was evaluated, or the recipe's folder was moved
            run = RunFolder(folder / (Path(model).name or name))
        if run.is_started:
            title = "DPO" if "beta" in run.read_config() else "SFT"
            runs.setdefault(title, run)  # the policy's run comes first
    return runs


def _shows_hh(results: Sequence[dict[str, Any]], runs: dict[str, RunFolder]) -> bool:
    settings = [one.get("settings", {}) for one in results] + [run.read_config() for run in runs.values()]
    return any(is_hh(source.name) for one in settings for source in list_sources(one))


def describe_models(results: dict[str, Any]) -> str:
    """Which policy an evaluation compared with which reference, without local paths."""
    settings = results["settings"]
    policy, reference = (public_name(settings[f"{role}model_name_or_path"]) for role in ("", "ref_"))
    return f"{policy} against {reference}, β {results['beta']:g}"


def collect_evaluations(folder: Path) -> dict[str, dict[str, Row]]:
    """The main figures of every evaluation in a recipe's run folder, by its folder and models and by label."""
    evaluations = {}
    for path in sorted(folder.glob("*/eval_results.json")):
        results = read_json(path, "pairs", "reward_accuracy", "settings")
        head = {row.label: row for row in select_head(headline_rows(results))}
        evaluations[f"{path.parent.name}: {describe_models(results)}"] = head
    return evaluations


def select_head(rows: Sequence[Row]) -> list[Row]:
    """The rows of an evaluation's table that `HEAD` names, in its order."""
    return [row for label in HEAD for row in rows if row.label == label]


def describe_training(title: str, run: RunFolder) -> str:
    """When, how long (unknown if it was resumed) and on what a run was trained."""
    environment = run.read_environment()
    seconds = run.read_results().get("train_runtime")
    duration = f" in {seconds / 60:.1f} minutes" if seconds else ""
    return f"{title} trained on {environment['date']}{duration} on {environment['device']}"


def typeset(text: str) -> Markup:
    """Text for the page, with π_ref as it is written in formulas."""
    return escape(text).replace("π_ref", Markup("π<sub>ref</sub>"))


def _select_judged(winrate: dict[str, Any]) -> list[Row]:
    """The judge's win rate for the top of the page: the first at the temperature nearest to 1."""
    if not winrate:
        return []
    nearest = min(winrate["comparisons"], key=lambda comparison: abs(comparison["temperature"] - 1))
    return winrate_rows(winrate | {"comparisons": [nearest]})[-1:]


def select_answers(samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Evenly spaced rows of `samples.jsonl`, and the token reward that has the strongest colour on all of them."""
    count = min(ANSWERS, len(samples))
    shown = [samples[i * len(samples) // count] for i in range(count)]
    sizes = [abs(reward) for sample in shown for reward in sample["token_rewards"]]
    scale = float(np.quantile(sizes, 0.98)) if sizes else 0.0  # scaled to the largest, all others would be pale
    return {"shown": shown, "total": len(samples), "scale": scale}


def collect_provenance(runs: dict[str, RunFolder], results: dict[str, Any]) -> dict[str, list[tuple[str, Any]]]:
    """What the runs and results depend on, as (name, value) rows for each."""
    tables = {title: _list_settings(result.get("settings", {})) for title, result in results.items()}
    for title, run in runs.items():
        environment = run.read_environment()
        kept = run.read_summary().get("train", {})
        speed = run.read_results()
        tables[title] = _list_settings(run.read_config()) | {
            "pairs": f"{kept['pairs_kept']:,} of {kept['pairs_in']:,} kept" if kept else None,
            "pairs per second": speed.get("pairs_per_second"),
            "MFU": speed.get("mfu"),
            "device": environment.get("device"),
            "commit": environment.get("git_commit"),
            "versions": ", ".join(f"{name} {version}" for name, version in environment.get("packages", {}).items()),
        }
    return {title: [(k, v) for k, v in table.items() if v not in (None, "")] for title, table in tables.items()}


def _list_settings(settings: dict[str, Any]) -> dict[str, Any]:
    facts = {
        "model": public_name(settings.get("model_name_or_path") or "", settings.get("model_revision")),
        "reference": public_name(settings.get("ref_model_name_or_path") or "", settings.get("ref_model_revision")),
        "data": ", ".join(source.describe() for source in list_sources(settings)),
    }
    for key in SETTINGS:
        value = settings.get(key)
        facts[key] = " ".join(map(str, value)) if isinstance(value, list) else value
    return facts
