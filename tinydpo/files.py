"""Files that are written whole or not at all, and read with one sentence where they are damaged all the same."""

import json
import os
from collections.abc import Mapping, Set
from pathlib import Path
from typing import Any

import yaml

from tinydpo.errors import UserError

RUN_CONFIG = "run_config.yaml"  # in a run's folder: every key of it as it came to run


def write_json(path: Path, value: Any) -> None:
    """Write JSON whole or not at all."""
    write_atomic(path, json.dumps(value, indent=2) + "\n")


def write_atomic(path: Path, content: str | bytes) -> None:
    """Write a file whole or not at all; half a character, which a tokenizer may leave, as a question mark."""
    half = path.with_name(f".{path.name}.half")
    half.write_bytes(content.encode("utf-8", errors="replace") if isinstance(content, str) else content)
    os.replace(half, path)


def read_json(path: Path, *needed: str) -> dict[str, Any]:
    """A JSON object, or {} where there is no such file.

    Raises:
        UserError: it cannot be read, is no object, or lacks one of the keys `needed`.
    """
    return _parse_object(path, _read_text(path), needed) if path.is_file() else {}


def find_difference(before: Mapping[str, Any], now: Mapping[str, Any], but: Set[str] = frozenset()) -> str | None:
    """The first key by the alphabet, none of `but`, that two records do not hold alike; None where there is none."""
    return next((key for key in sorted({*before, *now} - but) if before.get(key) != now.get(key)), None)


def read_jsonl(path: Path, *needed: str) -> list[dict[str, Any]]:
    """Objects, one a line, or [] where there is no such file.

    Raises:
        UserError: as `read_json`, naming the line.
    """
    if not path.is_file():
        return []
    lines = _read_text(path).split("\n")  # not splitlines, which also cuts at other characters of a text
    return [_parse_object(f"{path}, line {number}", line, needed) for number, line in enumerate(lines, 1) if line]


def read_run_config(model: str) -> dict[str, Any]:
    """Every key of the run that made `model` (its `run_config.yaml`), or {}."""
    path = find_run_folder(model) / RUN_CONFIG
    try:
        return yaml.safe_load(path.read_text()) or {} if path.is_file() else {}
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not valid YAML: {error}") from None


def find_run_folder(model: str) -> Path:
    """The folder of the run that made a local `model`: its own, or for a checkpoint the one above."""
    folder = Path(model)
    of_checkpoint = folder.name.startswith("checkpoint-") and not (folder / RUN_CONFIG).is_file()
    return folder.parent if of_checkpoint else folder


def public_name(name: str, revision: str | None = None) -> str:
    """A model's or data set's name for a page that may be passed on: of a local folder only its own name."""
    path = Path(name)
    name = path.name if path.is_absolute() or {"..", "~"} & set(path.parts) else name
    return name + (f" at {revision}" if revision and revision != "main" else "")


def damaged_file_error(where: Path | str, why: str) -> UserError:
    """The sentence for a file of the project's own that is not as it was written."""
    return UserError(f"{where} is damaged ({why}); run again what wrote it, or delete it")


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None


def _parse_object(where: Path | str, text: str, needed: tuple[str, ...]) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise damaged_file_error(where, str(error)) from None
    if not isinstance(value, dict):
        raise damaged_file_error(where, "it holds no JSON object")
    for key in needed:
        if key not in value:
            raise damaged_file_error(where, f"it lacks {key!r}")
    return value
