"""Files are written whole or not at all. Reading a damaged one is a `UserError`."""

import hashlib
import json
import os
from collections.abc import Mapping, Set
from pathlib import Path
from typing import Any

import yaml

from tinydpo.errors import UserError


def write_json(path: Path, value: Any) -> None:
    """Write indented JSON, as `write_atomic`."""
    write_atomic(path, json.dumps(value, indent=2) + "\n")


def write_atomic(path: Path, content: str | bytes) -> None:
    """Write a file whole or not at all."""
    if isinstance(content, str):
        content = content.encode("utf-8", errors="replace")  # a tokenizer may cut a character in half
    half = path.with_name(f".{path.name}.{os.getpid()}.half")  # two processes may write the same file
    try:
        half.write_bytes(content)
        os.replace(half, path)
    except OSError as error:
        error.filename = str(path)  # a full disk's names none, others the temporary file
        raise
    finally:
        half.unlink(missing_ok=True)


def check_output_folder(output_dir: str | Path, *own_patterns: str) -> Path:
    """Refuse an output folder that cannot be written to, or whose files an earlier run of the command did not write.

    `own_patterns` match what such a run leaves. Hidden files do not count. The folder is not made.
    """
    folder = Path(output_dir)
    check_writable(folder)
    held = sorted(path.name for path in folder.glob("*") if path.name[0] not in "._")
    if held and not any(any(folder.glob(pattern)) for pattern in own_patterns):
        raise UserError(
            f"output_dir {folder} already holds {held[0]}, which this command did not write; choose a new or empty "
            "folder"
        )
    return folder


def check_writable(folder: Path) -> None:
    """Refuse a folder that cannot be made or written to (UserError)."""
    paths = (folder.absolute(), *folder.absolute().parents)
    nearest = next(path for path in paths if path.is_symlink() or path.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK):
        raise UserError(f"output_dir {folder}: {nearest} cannot be written to; choose another folder")


def read_json(path: Path, *needed: str) -> dict[str, Any]:
    """A JSON object, or {} where the file does not exist (UserError: damaged, or without a key of `needed`)."""
    if not path.is_file():
        return {}
    return _parse_object(path, path.read_text(encoding="utf-8", errors="replace"), needed)


def read_jsonl(path: Path, *needed: str) -> list[dict[str, Any]]:
    """JSON objects, one per line, or [] where the file does not exist (UserError: as `read_json`, with the line)."""
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")  # splitlines would split elsewhere too
    return [_parse_object(f"{path}, line {number}", line, needed) for number, line in enumerate(lines, 1) if line]


def _parse_object(where: Path | str, text: str, needed: tuple[str, ...]) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    if not isinstance(value, dict) or not value.keys() >= set(needed):
        raise UserError(
            f"{where} is damaged, or was written by an older version; rerun the command that wrote it, or delete it"
        )
    return value


def read_yaml(path: str | Path) -> dict[str, Any]:
    """A YAML file of `key: value` lines (UserError: there is no such file, or it has a duplicate key)."""
    if not Path(path).is_file():
        raise UserError(f"there is no file {path}")
    try:
        value = yaml.load(Path(path).read_text(encoding="utf-8"), _NoDuplicatesLoader) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid YAML: {error}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} must hold `key: value` lines")
    return value


class _NoDuplicatesLoader(yaml.SafeLoader):
    """Refuses duplicate keys, of which PyYAML silently takes the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen = set()
        for key, _ in node.value:
            if key.value in seen:
                raise yaml.MarkedYAMLError(problem=f"duplicate key {key.value!r}", problem_mark=key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def hash_file(path: Path) -> str:
    """A file's SHA-256."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


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
