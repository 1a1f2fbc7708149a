"""Where results go: JSON into their folder, the headline figures into the policy's model card."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard

from tinydpo.config.arguments import list_sources
from tinydpo.errors import UserError
from tinydpo.evaluation.table import Row, has_own_samples, headline_rows
from tinydpo.files import find_difference, public_name, read_json, write_atomic, write_json
from tinydpo.run_folder import RunFolder


def check_settings(path: Path, settings: dict[str, Any]) -> None:
    """Refuse to add to results that were made with different settings."""
    before = read_json(path, "settings").get("settings", settings)
    key = find_difference(before, settings)
    if key:
        change = f"a different {key} ({before.get(key)}, not {settings.get(key)})"
        raise UserError(f"{path} was made with {change}; pass a different --output_dir, or delete its folder")


def save_evaluation(output_dir: Path, results: dict[str, Any], **tables: Sequence[dict[str, Any]]) -> None:
    """Write tables as `<name>.jsonl`, then `eval_results.json`, then the headline figures into the policy's card."""
    output_dir.mkdir(parents=True, exist_ok=True)
    for name, rows in tables.items():
        write_jsonl(output_dir / f"{name}.jsonl", rows)
    write_json(output_dir / "eval_results.json", results)
    add_to_card(results, "Evaluation", headline_rows(results))


def write_jsonl(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Write rows as JSON lines, whole or not at all."""
    write_atomic(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def add_to_card(results: dict[str, Any], heading: str, rows: Sequence[Row]) -> None:
    """Replace a section of the policy's model card, or add it at the end; only a finished run has a card."""
    settings = results["settings"]
    run = RunFolder(settings["model_name_or_path"])
    if not (run.card_file.is_file() and run.is_finished):
        return
    facts = [f"{settings['num_prompts']} held-out prompts", f"seed {settings['seed']}"]
    if "beta" in results:
        facts += [f"{results['pairs']} held-out pairs", f"β {results['beta']:g}"]
        if not has_own_samples(settings):
            facts += [f"{name} {settings[name]:g}" for name in ("temperature", "top_k", "top_p")]
    facts.append(f"reference {public_name(settings['ref_model_name_or_path'], settings['ref_model_revision'])}")
    lines = [
        f"{escape_markdown(', '.join(facts))}; 95 % intervals in brackets.",
        "",
        "| | policy | reference | |",
        "| --- | --- | --- | --- |",
    ]
    for row in rows:
        meaning = row.meaning.replace("\n", " ")
        if row.verdict:
            meaning += f"; {row.verdict}"
        lines.append(f"| {escape_markdown(row.label)} | {row.policy} | {row.ref or ''} | {escape_markdown(meaning)} |")
    before, _, after = run.card_file.read_text(encoding="utf-8").partition(f"## {heading}\n")
    _, next_heading, rest = after.partition("\n## ")
    section = "\n".join([before.rstrip("\n"), "", f"## {heading}", "", *lines, ""])
    card = ModelCard(section + next_heading + rest)
    if "reward_accuracy" in results:  # also in the header, where the Hub looks for it
        dataset = public_name(list_sources(settings)[0].name)
        card.data.model_name = run.path.name
        card.data.eval_results = [
            EvalResult(
                task_type="text-generation",
                dataset_type=dataset,
                dataset_name=dataset,
                metric_type="accuracy",
                metric_name="reward accuracy",
                metric_value=results["reward_accuracy"],
                metric_args={"ci95": results["reward_accuracy_ci95"], "pairs": results["pairs"]},
            )
        ]
    write_atomic(run.card_file, str(card))


def escape_markdown(text: str) -> str:
    """Text as Markdown shows it unchanged, in a table too: it may hold names from the data."""
    return re.sub(r"[\\`*_\[\]<>|&~$]", r"\\\g<0>", text)
