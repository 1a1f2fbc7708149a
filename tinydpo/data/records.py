"""One record, the JSON bytes of a row, decoded; what is wrong with it is a `BrokenRow`."""

import json
from typing import Any


class BrokenRow(Exception):
    """What was expected of a row, without its file and number."""


def decode(record: bytes) -> dict[str, Any]:
    """A row of a JSON-lines file, or what is wrong with it (`BrokenRow`)."""
    try:
        row = parse(record)
    except UnicodeDecodeError:
        raise BrokenRow("expected UTF-8 text, found other bytes") from None
    except (ValueError, RecursionError) as error:
        raise BrokenRow(f"expected one JSON object, found {_start(record)} ({error})") from None
    if not isinstance(row, dict):
        raise BrokenRow(f"expected a JSON object with keys, found {kind(row)}")
    return row


def parse(text: bytes) -> Any:
    """Parse JSON in UTF-8, with a byte-order mark or without.

    Raises:
        UnicodeDecodeError: if it is not UTF-8 (`json` would also take a row in UTF-16, which lines do not survive).
        ValueError: if it is not JSON, or an object has a key twice (Python would take the last, others the first).
        RecursionError: if it is nested without end.
    """
    return json.loads(text.decode("utf-8-sig"), object_pairs_hook=_once)


def kind(value: Any) -> str:
    """A value as a message names it."""
    return {type(None): "null", str: "a string", dict: "an object", list: "a list"}.get(type(value), repr(value)[:40])


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {next(name for name in names if names.count(name) > 1)!r} stands there twice")
    return row


def _start(record: bytes) -> str:
    """How a record starts, to tell an HTML page from a table from a cut row."""
    text = record[:80].decode("utf-8-sig", errors="replace").strip()
    return repr(text[:30]) + "…" * (len(text) > 30)
