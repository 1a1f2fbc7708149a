"""One record, the JSON bytes of a row: decoded, and under the names used here. What is wrong is a `BrokenRow`."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from tinydpo.launching.arguments import MESSAGE_KEYS, DataArguments, parse_renames

MESSAGE_COLUMNS = ("prompt", "chosen", "rejected", "completion", "response", "messages")
OPENAI_COLUMNS = {"preferred_output": "chosen", "non_preferred_output": "rejected"}


class BrokenRow(Exception):
    """What was expected of a row, without its file and number."""


def decode_row(record: bytes) -> dict[str, Any]:
    """A row of a JSON-lines file, or what is wrong with it (`BrokenRow`)."""
    try:
        row = parse_json(record)
    except UnicodeDecodeError:
        raise BrokenRow("expected UTF-8 text, found other bytes") from None
    except (ValueError, RecursionError) as error:
        raise BrokenRow(f"expected one JSON object, found {_preview(record)} ({error})") from None
    if not isinstance(row, dict):
        raise BrokenRow(f"expected a JSON object with keys, found {describe_type(row)}")
    return row


def parse_json(text: bytes) -> Any:
    """Parse JSON in UTF-8, with a byte-order mark or without.

    Raises:
        UnicodeDecodeError: if it is not UTF-8 (`json` would also take a row in UTF-16, which lines do not survive).
        ValueError: if it is not JSON, or an object has a key twice (Python would take the last, others the first).
        RecursionError: if it is nested without end.
    """
    return json.loads(text.decode("utf-8-sig"), object_pairs_hook=_reject_duplicate_keys)


@dataclass(frozen=True)
class ColumnNames:
    """What the data call their columns, keys of messages and roles, each with the name that it has here."""

    columns: Mapping[str, str] = field(default_factory=dict)
    roles: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, data: DataArguments) -> "ColumnNames":
        """What `--column` and `--role` say."""
        return cls(parse_renames(data.column), parse_renames(data.role))


NO_RENAMES = ColumnNames()


def rename_columns(row: dict[str, Any], names: ColumnNames) -> dict[str, Any]:
    """The row with the data's names exchanged for those read here, in its messages too.

    Raises:
        BrokenRow: two columns claim one name.
    """
    row = unwrap_openai_row(row)
    if not (names.columns or names.roles):
        return row
    row = _rename_keys(row, {theirs: ours for theirs, ours in names.columns.items() if ours not in MESSAGE_KEYS})
    inside = {theirs: ours for theirs, ours in names.columns.items() if ours in MESSAGE_KEYS}

    def message(value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        value = _rename_keys(value, inside)
        role = value.get("role")
        return {**value, "role": names.roles.get(role, role)} if isinstance(role, str) else value

    for key in MESSAGE_COLUMNS:
        if isinstance(row.get(key), list):
            row[key] = [message(value) for value in row[key]]
        elif isinstance(row.get(key), dict):
            row[key] = message(row[key])
    return row


def unwrap_openai_row(row: dict[str, Any]) -> dict[str, Any]:
    """OpenAI's preference form under the usual names; another row as it is."""
    asked = row.get("input")
    if not (isinstance(asked, dict) and "messages" in asked and OPENAI_COLUMNS.keys() & row):
        return row
    rest = {f"input.{key}": value for key, value in asked.items() if key not in ("messages", "tools")}
    kept = {OPENAI_COLUMNS.get(key, key): value for key, value in row.items() if key != "input"}
    return {"prompt": asked["messages"], "tools": asked.get("tools"), **rest, **kept}


def describe_type(value: Any) -> str:
    """A value as a message names it."""
    return {type(None): "null", str: "a string", dict: "an object", list: "a list"}.get(type(value), repr(value)[:40])


def printable(name: str) -> str:
    """A name out of the data as a message can hold it."""
    return repr(name)[1:-1][:40]


def _rename_keys(mapping: dict[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    renamed: dict[str, Any] = {}
    for key, value in mapping.items():
        name = names.get(key, key)
        if renamed.get(name) is not None and value is not None:
            raise BrokenRow(f"expected one column for {name!r}, found two, {printable(key)!r} and another one")
        if value is not None or name not in renamed:
            renamed[name] = value
    return renamed


def _reject_duplicate_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {next(name for name in names if names.count(name) > 1)!r} stands there twice")
    return row


def _preview(record: bytes) -> str:
    """How a record starts, to tell an HTML page from a table from a cut row."""
    text = record[:80].decode("utf-8-sig", errors="replace").strip()
    return repr(text[:30]) + "…" * (len(text) > 30)
