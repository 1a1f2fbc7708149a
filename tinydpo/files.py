"""Files that are written whole or not at all; damaged ones are a `UserError` when they are read."""

import json
import os
from collections.abc import Mapping, Set
from pathlib import Path
from typing import Any

import yaml

from tinydpo.errors import UserError


def write_json(path: Path, value: Any) -> None:
    """Write JSON whole or not at all."""
    write_atomic(path, json.dumps(value, indent=2) + "\n")


def write_atomic(path: Path, content: str | bytes) -> None:
    """Write a file whole or not at all."""
    if isinstance(content, str):
        content = content.encode("utf-8", errors="replace")  # a tokenizer may cut a character in half
    half = path.with_name(f".{path.name}.half")
    half.write_bytes(content)
    os.replace(half, path)


def read_json(path: Path, *needed: str) -> dict[str, Any]:
    """A JSON object, or {} where the file does not exist.

    Raises:
        UserError: it cannot be read, is no object, or lacks one of the keys `needed`.
    """
    return _parse_object(path, _read_text(path), needed) if path.is_file() else {}


def read_jsonl(path: Path, *needed: str) -> list[dict[str, Any]]:
    """JSON objects, one per line, or [] where the file does not exist (UserError: as `read_json`, with the line)."""
    if not path.is_file():
        return []
    lines = _read_text(path).split("\n")  # splitlines would also split at other characters
    return [_parse_object(f"{path}, line {number}", line, needed) for number, line in enumerate(lines, 1) if line]


def read_yaml(path: str | Path) -> dict[str, Any]:
    """A YAML file of `key: value` lines (UserError: it is no such file, or a key stands there twice)."""
    try:
        value = yaml.load(Path(path).read_text(encoding="utf-8"), _NoDuplicatesLoader) or {}
    except (yaml.YAMLError, OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid YAML: {error}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} must hold `key: value` lines")
    return value


class _NoDuplicatesLoader(yaml.SafeLoader):
    """Refuses a key that stands twice, of which PyYAML silently takes the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen = set()
        for key, _ in node.value:
            if key.value in seen:
                raise yaml.MarkedYAMLError(
                    problem=f"the key {key.value!r} stands there twice", problem_mark=key.start_mark
                )
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def find_difference(before: Mapping[str, Any], now: Mapping[str, Any], ignored: Set[str] = frozenset()) -> str | None:
    """The first key in alphabetical order with different values, or None."""
    for key in sorted({*before, *now} - ignored):
        if before.get(key) != now.get(key):
            return key
    return None


def public_name(name: str, revision: str | None = None) -> str:
    """A model's or dataset's name for a page that others may read: of a local folder only its own name."""
    path = Path(name)
    if path.is_absolute() or {"..", "~"} & set(path.parts):
        name = path.name
    return f"{name} at {revision}" if revision and revision != "main" else name


def damaged_file_error(where: Path | str, reason: str) -> UserError:
    """The error for a file of a run or an evaluation that is not as it was written."""
    return UserError(f"{where} is damaged ({reason}); run the command that wrote it again, or delete it")


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
            raise damaged_file_error(where, f"{key!r} is missing")
    return value


RUN_CONFIG = "run_config.yaml"


def read_run_config(model: str) -> dict[str, Any]:
    """Every key of the run that made `model`, or {}. `RunFolder` replaces it."""
    path = find_run_folder(model) / RUN_CONFIG
    return read_yaml(path) if path.is_file() else {}


def find_run_folder(model: str) -> Path:
    """The folder of the run that made a local `model`. `RunFolder` replaces it."""
    folder = Path(model)
    of_checkpoint = folder.name.startswith("checkpoint-") and not (folder / RUN_CONFIG).is_file()
    return folder.parent if of_checkpoint else folder
