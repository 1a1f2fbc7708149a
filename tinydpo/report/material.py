"""What a report is made of: all that lies in a recipe's run folder. Every part is optional."""

from pathlib import Path
from typing import Any, NamedTuple

from tinydpo.errors import UserError
from tinydpo.evaluation.rounds import add_rounds_to_frontier
from tinydpo.evaluation.table import headline_rows
from tinydpo.files import damaged_file_error, read_json, read_jsonl, read_run_config


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
