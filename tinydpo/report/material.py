"""A run's report: what lies in its folder, gathered, and written as one page that needs nothing else.

`report_page` writes the HTML and `figures` draws. Every part is optional: the page shows what is there.
"""

import json
from pathlib import Path
from typing import Any

from tinydpo.errors import UserError
from tinydpo.evaluation.table import headline
from tinydpo.files import write_whole
from tinydpo.report.page import Material, page
from tinydpo.training.runs import read_run_config

REPORT = "report.html"


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
    write_whole(folder / REPORT, page(gather(folder)).translate(_CONTROLS))
    return folder / REPORT


_CONTROLS = dict.fromkeys((*range(9), 11, 12, *range(14, 32), 127), "\N{REPLACEMENT CHARACTER}")


def gather(folder: Path) -> Material:
    """Read what lies in a recipe's run folder.

    Raises:
        UserError: nothing to report lies there, or a file there is damaged.
    """
    evaluation = _stage(folder, "evaluation", "eval_results.json")
    results = _json(evaluation / "eval_results.json")
    try:
        if results:
            headline(results)
    except (KeyError, TypeError, ValueError) as error:
        raise _damaged(evaluation / "eval_results.json", f"{error!r} in it") from None
    frontier = _json(_stage(folder, "frontier", "frontier.json") / "frontier.json", "points", "reward")
    winrate = _json(_stage(folder, "winrate", "winrate.json") / "winrate.json", "comparisons", "judge")
    settings = results.get("settings", {})
    material = Material(
        name=folder.resolve().name,
        results=results,
        samples=_jsonl(evaluation / "samples.jsonl", "prompt", "policy", "ref"),
        pairs=_jsonl(evaluation / "pairs.jsonl", "margin", "chosen_tokens", "rejected_tokens"),
        frontier=frontier if frontier.get("points") else {},
        winrate=winrate if winrate.get("comparisons") else {},
        runs={
            title: run
            for title, role, name in (("DPO", "model", "dpo"), ("SFT", "ref_model", "sft"))
            if (run := _run(folder, settings.get(f"{role}_name_or_path"), name))
        },
    )
    if not any(material[1:]):
        raise UserError(
            f"{folder} holds no run, evaluation, frontier or win rates to report; `make evaluate` writes one into "
            "runs/<recipe folder>/evaluation"
        )
    return material


def _stage(folder: Path, name: str, file: str) -> Path:
    """The subfolder that holds a stage's `file`, the one written last: `name`, or where --output_dir sent it."""
    found = sorted(folder.glob(f"*/{file}"), key=lambda path: (path.stat().st_mtime, path))
    return found[-1].parent if found else folder / name


def _run(folder: Path, model: str | None, name: str) -> dict[str, Any]:
    """What the run that trained `model` left beside it, or else the one in `folder`/`name`; {} where there is none."""
    run = Path(model) if model and Path(model).is_dir() else folder / name
    if run.name.startswith("checkpoint-"):
        run = run.parent
    found = {
        "config": read_run_config(str(run)),
        "log": _json(run / "trainer_state.json").get("log_history", []),
        "environment": _json(run / "environment.json"),
        "data": _json(run / "data_summary.json"),
    }
    return found if any(found.values()) else {}


def _json(path: Path, *needed: str) -> dict[str, Any]:
    """A JSON object with the keys needed, or {} where there is no such file."""
    return _object(path, _text(path), needed) if path.is_file() else {}


def _jsonl(path: Path, *needed: str) -> list[dict[str, Any]]:
    """Objects with the keys needed, one a line, or [] where there is no such file."""
    if not path.is_file():
        return []
    lines = _text(path).split("\n")  # not splitlines, which also cuts at other characters of a text
    return [_object(f"{path}, line {number}", line, needed) for number, line in enumerate(lines, 1) if line]


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None


def _object(where: Path | str, text: str, needed: tuple[str, ...]) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise _damaged(where, str(error)) from None
    if not isinstance(value, dict):
        raise _damaged(where, "it holds no JSON object")
    for key in needed:
        if key not in value:
            raise _damaged(where, f"it lacks {key!r}")
    return value


def _damaged(where: Path | str, why: str) -> UserError:
    return UserError(f"{where} is damaged ({why}); run again what wrote it, or delete it")
