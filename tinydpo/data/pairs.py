"""Preference rows to fitted token pairs in one call: rows, texts and tokens, each cached in Arrow on disk."""

import hashlib
import os
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow.compute as pc
from datasets import Dataset
from trl.trainer.utils import global_then_local_main_first

from tinydpo.config.arguments import DataArguments
from tinydpo.config.launch import count_cores
from tinydpo.data.fitting import fit_pairs
from tinydpo.data.splits import count_shared_prompts, draw_rows, hide_progress_bars, load_rows
from tinydpo.data.text import render_texts
from tinydpo.errors import UserError

MANY_ROWS = 8_000  # rows from which more processes are worth their start


@dataclass
class FittedSplit:
    """The kept pairs of one split."""

    texts: Dataset  # columns of `text.TEXT_FEATURES`
    pairs: Dataset  # as tokens: `prompt_ids`, `chosen_ids`, `rejected_ids`, `whole` and, if there are any, `subset`
    summary: dict[str, Any]  # what reading and fitting did, see `summarize`


def load_pairs(
    data: DataArguments, tokenizer: Any, max_length: int, need_pairs: bool | None = True, workers: int | None = None
) -> dict[str, FittedSplit]:
    """Load, read and fit the train and the test split to `max_length` tokens of prompt and one completion.

    `need_pairs` says whether every row must have a rejected answer: False for SFT, which learns the chosen one alone;
    None takes pairs as DPO does and other rows as SFT does. `workers` are processes: by default one, or all cores for
    large data. Data that cannot be read, a broken row and a split that keeps no pair are a UserError.
    """
    if data.train_split_name == data.dataset_test_split:
        raise UserError(
            f"dataset_train_split and dataset_test_split are both {data.train_split_name!r}, so evaluation would "
            "see trained rows; name two splits"
        )
    with global_then_local_main_first():  # the first process writes the cache, the others read it
        rows = load_rows(data)
        splits = {
            split: _fit_split(split, rows, data, tokenizer, max_length, need_pairs, workers)
            for split in ("train", "test")
        }
    shared = count_shared_prompts(splits["train"].texts, splits["test"].texts)
    if shared:
        splits["test"].summary["notes"]["the prompt is also in the train split"] = shared
    return splits


def load_split(data: DataArguments, tokenizer: Any, max_length: int, split: str) -> FittedSplit:
    """Load one split alone; evaluation may name the train split as `--dataset_test_split`."""
    with global_then_local_main_first():
        return _fit_split(split, load_rows(data), data, tokenizer, max_length)


def _fit_split(
    split: str,
    splits: dict[str, Dataset],
    data: DataArguments,
    tokenizer: Any,
    max_length: int,
    need_pairs: bool | None = True,
    workers: int | None = None,
) -> FittedSplit:
    rows = splits[split]
    most = data.max_train_pairs if split == "train" else data.max_test_pairs
    if most is not None:
        rows = draw_rows(rows, most)
    is_large = len(rows) >= MANY_ROWS
    if workers is None:
        workers = count_cores() if is_large else 1
    if workers > 1:
        os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes share the cores already
    with hide_progress_bars(small=not is_large):
        texts = render_texts(rows, tokenizer, need_pairs, data.on_bad_row, workers, data.chat)
        fitted = fit_pairs(texts, tokenizer, max_length, data.max_question_length, workers)
    summary = summarize(texts, fitted)
    if len(rows) < len(splits[split]):
        summary["drawn_from"] = len(splits[split])
    kept = np.flatnonzero(pc.is_null(fitted.with_format("arrow")[:]["dropped"]))
    if not len(kept):
        dropped = ", ".join(f"{count:,} {reason}" for reason, count in summary["dropped"].items())
        raise UserError(f"{data.names}: no pair of the {split} split is left; dropped: {dropped}")
    columns = ["prompt_ids", "chosen_ids", "rejected_ids", "whole"]
    if any(subset is not None for subset in fitted.unique("subset")):
        columns.append("subset")
    return FittedSplit(texts.select(kept), fitted.select(kept).select_columns(columns), summary)


def summarize(texts: Dataset, fitted: Dataset) -> dict[str, Any]:
    """Summarize what reading and fitting did to a split, dropped rows included.

    `completion_tokens` are counted before fitting, `completion_tokens_kept` is the share left, `templated` are rows
    that a chat template wrote, and `sha256` is of all fitted tokens in order.
    """
    table = fitted.with_format("arrow")[:]  # not as Python lists: 160,000 pairs would take gigabytes
    kept = table.filter(pc.is_null(table["dropped"]))
    tokens_in = pc.sum(table["completion_tokens"]).as_py()
    tokens_kept = sum(len(pc.list_flatten(kept[name])) for name in ("chosen_ids", "rejected_ids"))
    digest = hashlib.sha256()
    for name in ("prompt_ids", "chosen_ids", "rejected_ids"):
        digest.update(pc.list_value_length(table[name]).to_numpy())
        digest.update(pc.list_flatten(table[name]).to_numpy())
    text_table = texts.select_columns(["notes", "templated"]).with_format("arrow")[:]
    notes = _count_values(pc.list_flatten(text_table["notes"]))
    return {
        "sha256": digest.hexdigest(),
        "pairs_in": len(table),
        "pairs_kept": len(kept),
        "dropped": dict(sorted(_count_values(table["dropped"].drop_null()).items())),
        "completion_tokens": tokens_in,
        "completion_tokens_kept": tokens_kept / tokens_in if tokens_in else 0.0,
        "notes": dict(sorted(notes.items(), key=lambda note: (-note[1], note[0]))),
        "templated": pc.sum(text_table["templated"]).as_py() or 0,
    }


def _count_values(column: Any) -> dict[str, int]:
    return {count["values"]: count["counts"] for count in pc.value_counts(column).to_pylist()}
