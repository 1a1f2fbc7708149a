"""Which rows are held out where data bring no test split: whole prompts, so that no answer to a trained one is scored.

Votes, several samples a prompt and on-policy data hold each prompt many times.
"""

import hashlib
import json
from pathlib import Path

import numpy as np
from datasets import Dataset, Features, Value
from datasets.fingerprint import Hasher

from tinydpo.data.dialogues import MADE_BY
from tinydpo.data.forms import read_row
from tinydpo.data.records import BrokenRow, ColumnNames, decode_row, rename_columns

SHARED_PROMPT_NOTE = "the prompt stands in the train split too"
PROMPT_FEATURES = Features({"prompt": Value("int64")})


def hold_out(records: Dataset, size: float, names: ColumnNames, seed: int) -> tuple[Dataset, Dataset]:
    """Split records into train and held-out ones, prompt by prompt, the same way for the same records.

    Where there is but one prompt, rows are held out.

    Args:
        records: as `sources.load_records` gives them.
        size: the share of rows to hold out; as many as fit whole prompts, at least one.
        names: what the data call their columns and roles.
        seed: of the draw.

    Returns:
        The train and the held-out records, each in the order of the draw.

    Raises:
        ValueError: one of them would be empty.
    """
    prompts = _number_prompts(records, names)
    wanted = int(np.ceil(size * len(records)))
    if not 0 < wanted < len(records):
        raise ValueError(f"{wanted} of {len(records)} rows cannot be held out")
    order = np.random.default_rng(seed).permutation(len(records))
    numbers, rows = np.unique(prompts, return_inverse=True, return_counts=True)[1:]
    if len(rows) == 1:
        numbers, rows = np.arange(len(records)), np.ones(len(records), dtype=int)
    drawn = numbers[order]
    in_turn = drawn[np.sort(np.unique(drawn, return_index=True)[1])]  # each prompt where its first row is drawn
    held, count = np.zeros(len(rows), dtype=bool), 0
    for prompt in in_turn.tolist():
        if count + rows[prompt] <= wanted:
            held[prompt], count = True, count + rows[prompt]
    if not count:
        held[min(in_turn.tolist(), key=lambda prompt: rows[prompt])] = True
    chosen = held[drawn]
    return _select_rows(records, order[~chosen], "train", names), _select_rows(records, order[chosen], "test", names)


def count_shared_prompts(train: Dataset, test: Dataset) -> int:
    """How many rows of `test` have a `prompt` that is one of `train`'s, both the columns of `dialogues.TEXTS`."""
    asked = [hash(prompt) for prompt in test["prompt"][:]]  # not the texts themselves: they may be gigabytes
    trained, left = set(), set(asked)
    for batch in train.select_columns("prompt").iter(1_000):
        trained.update(left.intersection(map(hash, batch["prompt"])))
    return sum(prompt in trained for prompt in asked)


def _number_prompts(records: Dataset, names: ColumnNames) -> np.ndarray:
    """A number for each row's prompt; a row that cannot be read has one of its own."""

    def number(batch: dict[str, list]) -> dict[str, list]:
        places = zip(batch["file"], batch["row"], batch["record"], strict=True)
        return {"prompt": [_hash_prompt(file, row, record, names) for file, row, record in places]}

    fingerprint = Hasher.hash((records._fingerprint, "prompts", *_made_by(names)))
    numbered = records.map(
        number, batched=True, remove_columns=records.column_names, features=PROMPT_FEATURES, new_fingerprint=fingerprint,
        desc="Finding prompts",
    )  # fmt: skip
    return numbered.with_format("numpy")[:]["prompt"]


def _hash_prompt(file: str, row: int, record: bytes, names: ColumnNames) -> int:
    try:
        form = read_row(rename_columns(decode_row(record), names), need_pairs=None)
        of = (form.system, form.prompt)
    except BrokenRow:
        of = (file, row)
    digest = hashlib.blake2b(json.dumps(of, sort_keys=True).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big", signed=True)


def _select_rows(records: Dataset, rows: np.ndarray, split: str, names: ColumnNames) -> Dataset:
    """These rows, with the choice on disk."""
    fingerprint = Hasher.hash((records._fingerprint, split, rows.tobytes(), *_made_by(names)))
    path = records._get_cache_file_path(fingerprint)
    return records.select(rows, indices_cache_file_name=path, new_fingerprint=fingerprint)


def _made_by(names: ColumnNames) -> list:
    sources = [Path(__file__).with_name(f"{name}.py").read_bytes() for name in (*MADE_BY, "held_out")]
    return [sorted(names.columns.items()), sorted(names.roles.items()), *sources]
