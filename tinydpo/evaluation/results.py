"""Where an evaluation's results go: tables and figures into its folder, the headline into the policy's card."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tinydpo.errors import UserError
from tinydpo.evaluation import winrate
from tinydpo.evaluation.table import Row, format_trained_share, headline_rows
from tinydpo.files import write_atomic, write_json


def make_output_folder(output_dir: str) -> Path:
    """The folder for results, made if missing; UserError where that cannot be."""
    try:
        (folder := Path(output_dir)).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output_dir {output_dir}: {error.strerror}; choose another folder") from None
    return folder


def columns_to_rows(columns: dict[str, Sequence[Any]]) -> list[dict[str, Any]]:
    """Columns of n values as n rows, NumPy's numbers as Python's."""
    plain = [column.tolist() if isinstance(column, np.ndarray) else column for column in columns.values()]
    return [dict(zip(columns, row, strict=True)) for row in zip(*plain, strict=True)]


def save_evaluation(output_dir: Path, results: dict[str, Any], **tables: Sequence[dict[str, Any]]) -> None:
    """Write each table as `<name>.jsonl`, then `eval_results.json`: where that one stands, the evaluation is complete.

    All replace what an earlier run left, whole or not at all. The headline figures go into the policy's card too.
    """
    for name, rows in tables.items():
        write_atomic(output_dir / f"{name}.jsonl", "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    write_json(output_dir / "eval_results.json", results)
    add_evaluation_to_card(Path(results["settings"]["model_name_or_path"]), results)


def add_evaluation_to_card(run: Path, results: dict[str, Any]) -> None:
    """Put an evaluation's headline figures into a policy's model card, in place of an earlier evaluation's.

    Args:
        run: the policy; where it is no finished run's folder, nothing is written.
        results: `eval_results.json`.
    """
    settings = results["settings"]
    lines = [f"{results['pairs']} held-out pairs, {settings['num_prompts']} held-out prompts, β"]
    lines[-1] += f" {results['beta']:g}, seed {settings['seed']}; in brackets 95 % intervals."
    lines += ["", format_trained_share(results)] if format_trained_share(results) else []
    lines += ["", "| | policy | reference | |", "| --- | --- | --- | --- |"]
    lines += [f"| {row.label} | {row.policy} | {row.ref or ''} | {_meaning(row)} |" for row in headline_rows(results)]
    _put_section(run, "## Evaluation", lines)


def add_win_rates_to_card(run: Path, results: dict[str, Any]) -> None:
    """Put a judge's win rates, and how far it can be trusted, into a policy's model card, as `add_evaluation` does.

    Args:
        run: the policy.
        results: `winrate.json`.
    """
    settings = results["settings"]
    lines = [f"{settings['num_prompts']} held-out prompts, seed {settings['seed']}; in brackets 95 % intervals."]
    lines += ["", "| | | |", "| --- | --- | --- |"]
    lines += [f"| {row.label} | {row.policy} | {_meaning(row)} |" for row in winrate.winrate_rows(results)]
    _put_section(run, "## Win rates by a judge", lines)


def _meaning(row: Row) -> str:
    return (row.meaning.replace("\n", " ") + f"; {row.nothing}" * row.says_nothing()).replace("|", "/")


def _put_section(run: Path, heading: str, lines: Sequence[str]) -> None:
    card = run / "README.md"
    if not (card.is_file() and (run / "train_results.json").is_file()):
        return
    before, _, after = card.read_text(encoding="utf-8").partition(f"{heading}\n")
    kept = "".join(after.partition("\n## ")[1:])
    write_atomic(card, "\n".join([before.rstrip("\n"), "", heading, "", *lines]) + "\n" + kept)
