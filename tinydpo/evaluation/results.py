"""Where an evaluation's results go: JSON into its folder, the headline figures into the policy's model card."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tinydpo.errors import UserError
from tinydpo.evaluation import winrate
from tinydpo.evaluation.table import Row, headline_rows
from tinydpo.files import write_atomic, write_json
from tinydpo.run_folder import RunFolder


def make_output_folder(output_dir: str) -> Path:
    """Make the folder for results, if it is missing (UserError: that is not possible)."""
    folder = Path(output_dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output_dir {output_dir}: {error.strerror}; choose another folder") from None
    return folder


def columns_to_rows(columns: dict[str, Sequence[Any]]) -> list[dict[str, Any]]:
    """Columns of n values as n rows, NumPy's numbers as Python's."""
    plain = [column.tolist() if isinstance(column, np.ndarray) else column for column in columns.values()]
    return [dict(zip(columns, row, strict=True)) for row in zip(*plain, strict=True)]


def save_evaluation(output_dir: Path, results: dict[str, Any], **tables: Sequence[dict[str, Any]]) -> None:
    """Write each table as `<name>.jsonl`, then `eval_results.json`, then the headline figures into the policy's card.

    An evaluation with `eval_results.json` is complete. Files of an earlier evaluation are replaced.
    """
    for name, rows in tables.items():
        lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        write_atomic(output_dir / f"{name}.jsonl", "".join(lines))
    write_json(output_dir / "eval_results.json", results)
    add_evaluation_to_card(Path(results["settings"]["model_name_or_path"]), results)


def add_evaluation_to_card(model: Path, results: dict[str, Any]) -> None:
    """Write the headline figures of `eval_results.json` into a policy's model card."""
    settings = results["settings"]
    prompts = f"{settings['num_prompts']} held-out prompts, β {results['beta']:g}, seed {settings['seed']}"
    _replace_section(model, "Evaluation", f"{results['pairs']} held-out pairs, {prompts}", headline_rows(results))


def add_win_rates_to_card(model: Path, results: dict[str, Any]) -> None:
    """Write the win rates of `winrate.json`, and how well the judge does, into a policy's model card."""
    settings = results["settings"]
    prompts = f"{settings['num_prompts']} held-out prompts, seed {settings['seed']}"
    _replace_section(model, "Win rates by a judge", prompts, winrate.winrate_rows(results))


def _replace_section(model: Path, heading: str, data: str, rows: Sequence[Row]) -> None:
    """Replace a section of the model's card, or add it at the end. A model without a finished run has no such card."""
    run = RunFolder(model)
    if not (run.card_file.is_file() and run.is_finished):
        return
    lines = [f"{data}; in brackets 95 % intervals.", "", "| | policy | reference | |", "| --- | --- | --- | --- |"]
    for row in rows:
        meaning = row.meaning.replace("\n", " ").replace("|", "/")
        if row.says_nothing():
            meaning += f"; {row.warning()}"
        lines.append(f"| {row.label} | {row.policy} | {row.ref or ''} | {meaning} |")
    before, _, after = run.card_file.read_text(encoding="utf-8").partition(f"## {heading}\n")
    _, next_heading, rest = after.partition("\n## ")
    section = "\n".join([before.rstrip("\n"), "", f"## {heading}", "", *lines, ""])
    write_atomic(run.card_file, section + next_heading + rest)
