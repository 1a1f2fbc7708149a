"""Preference rows to fitted token pairs, in one call: records, texts, tokens, each cached in Arrow on disk."""

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow.compute as pc
from datasets import Dataset
from trl.trainer.utils import global_then_local_main_first

from tinydpo.config.arguments import DataArguments
from tinydpo.config.launch import count_cores
from tinydpo.data.fitting import WHOLE, fit_pairs
from tinydpo.data.rows import ColumnNames
from tinydpo.data.splits import SHARED_PROMPT_NOTE, count_shared_prompts, draw_rows, hide_progress_bars, load_records
from tinydpo.data.text import render_texts
from tinydpo.errors import UserError

MANY_ROWS = 8_000  # rows from which more processes are worth their start


@dataclass
class FittedSplit:
    """One split: `texts` (the columns of `dialogues.TEXTS`, kept pairs only), `pairs` in the same order with columns
    `prompt_ids`, `chosen_ids`, `rejected_ids`, `whole` and, where there are some, `subset`; and what fitting did."""

    texts: Dataset
    pairs: Dataset
    summary: dict[str, Any]


def load_pairs(
    data: DataArguments,
    tokenizer: Any,
    max_length: int,
    need_pairs: bool | None = True,
    workers: int | None = None,
) -> dict[str, FittedSplit]:
    """Load, read and fit the train and test split.

    Args:
        data: which dataset, and how to fit it.
        tokenizer: the model's.
        max_length: tokens of prompt and one completion together.
        need_pairs: whether every row must have a rejected answer. False is for SFT, which does without; None takes
            pairs as DPO does, and other rows too.
        workers: processes to read and fit with; by default one, or for large data as many as may run.

    Returns:
        `{"train": …, "test": …}`.

    Raises:
        UserError: if the data cannot be read, a row is broken, or a split keeps no pair.
    """
    if data.dataset_train_split == data.dataset_test_split:
        raise UserError(
            f"dataset_train_split and dataset_test_split are both {data.dataset_train_split!r}, so evaluation would "
            "see trained rows; name two splits"
        )
    with global_then_local_main_first():  # the others find the cache that the first process wrote
        records = load_records(data)
        splits = {
            split: _fit_split(split, rows, data, tokenizer, max_length, need_pairs, workers)
            for split, rows in records.items()
        }
    if shared := count_shared_prompts(splits["train"].texts, splits["test"].texts):
        splits["test"].summary["notes"][SHARED_PROMPT_NOTE] = shared
    return splits


def load_split(data: DataArguments, tokenizer: Any, max_length: int, split: str) -> FittedSplit:
    """`load_pairs`, one split of it; the other is not fitted, and may be the same (`--dataset_test_split train`)."""
    with global_then_local_main_first():
        return _fit_split(split, load_records(data)[split], data, tokenizer, max_length, need_pairs=True)


def _fit_split(
    split: str,
    records: Dataset,
    data: DataArguments,
    tokenizer: Any,
    max_length: int,
    need_pairs: bool | None,
    workers: int | None = None,
) -> FittedSplit:
    rows = len(records)
    records = draw_rows(records, data.max_train_pairs if split == "train" else data.max_test_pairs)
    large = len(records) >= MANY_ROWS
    workers = workers or (count_cores() if large else 1)
    if workers > 1:
        os.environ["TOKENIZERS_PARALLELISM"] = "false"  # processes share the cores already
    with hide_progress_bars(small=not large), _explain_lost_workers(data.names, workers):
        texts = render_texts(records, tokenizer, need_pairs, data.on_bad_row, workers, ColumnNames.of(data))
        fitted = fit_pairs(texts, tokenizer, max_length, data.max_question_length, workers)
    notes = pc.value_counts(pc.list_flatten(texts.with_format("arrow")[:]["notes"])).to_pylist()
    summary = summarize(fitted, max_length)
    summary["notes"] = {
        note["values"]: note["counts"] for note in sorted(notes, key=lambda n: (-n["counts"], n["values"]))
    }
    if rows > len(records):
        summary["drawn_from"] = rows
    summary["templated"] = pc.sum(texts.with_format("arrow")[:]["templated"]).as_py() or 0  # rows, by a chat template
    kept = np.flatnonzero(pc.is_null(fitted.with_format("arrow")[:]["dropped"]))
    if not len(kept):
        raise UserError(f"{data.names}: no pair of the {split} split is left, dropped: {summary['dropped']}")
    columns = ["prompt_ids", "chosen_ids", "rejected_ids", "whole"]
    if any(subset is not None for subset in fitted.unique("subset")):
        columns.append("subset")
    return FittedSplit(texts.select(kept), fitted.select(kept).select_columns(columns), summary)


@contextmanager
def _explain_lost_workers(name: str, workers: int) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        if "abruptly died" not in str(error):  # by `datasets`, which knows no more of it
            raise
        raise UserError(
            f"{name}: one of the {workers} processes that read it was killed, as the system does where memory runs "
            f"out; free some, or pass --dataset_num_proc {workers // 2} to training"
        ) from None


def summarize(fitted: Dataset, max_length: int) -> dict[str, Any]:
    """What fitting kept and dropped, and what the stock rule would have.

    Args:
        fitted: the columns of `fitting.FITTED`.
        max_length: the budget it was fitted to, in tokens.

    Returns:
        Counts (`pairs_in`, `pairs_kept`, `dropped` by reason), shares from 0 to 1 of what all pairs held before
        (dropped pairs count as 0, end tokens count), `answers_whole` (shares of kept pairs), `sha256` of all tokens in
        order, `tokens_per_pair` in token
        positions, `stock`, and `lengths`.
    """
    table = fitted.with_format("arrow")[:]  # on disk: 160,000 pairs as Python lists are gigabytes
    reasons, kept = pc.value_counts(table["dropped"].drop_null()).to_pylist(), pc.is_null(table["dropped"]).to_numpy()
    prompt, chosen, rejected = (
        pc.list_value_length(table[f"{part}_ids"]).to_numpy() for part in ("prompt", "chosen", "rejected")
    )
    before, longest, all_tokens = (table[f"{n}_tokens"].to_numpy() for n in ("prompt", "longest", "completion"))
    stock_kept, whole = table["stock_kept"].to_numpy(), table["question_whole"].to_numpy()
    answers_whole = table["whole"].filter(table["dropped"].is_null()).drop_null().to_numpy()
    answers = 1 + (rejected[kept] > 0)  # SFT rows may have one completion
    longest = longest[all_tokens > 0]  # broken rows have no length

    def mean(values: np.ndarray) -> float:
        return float(values.mean()) if len(values) else 0.0

    def share(part: np.ndarray, of: np.ndarray) -> float:
        return float(part.sum() / of.sum()) if of.sum() else 0.0

    digest = hashlib.sha256()
    for part in ("prompt_ids", "chosen_ids", "rejected_ids"):
        for values in (pc.list_value_length(table[part]), pc.list_flatten(table[part])):
            digest.update(values.to_numpy())

    edges = (0, 32, 64, 96, 128, 192, 256, 384, 512, 768, 1024)
    return {
        "sha256": digest.hexdigest(),
        "pairs_in": len(fitted),
        "pairs_kept": int(kept.sum()),
        "dropped": {reason["values"]: reason["counts"] for reason in sorted(reasons, key=lambda r: r["values"])},
        "completion_tokens_kept": share((chosen + rejected)[kept], all_tokens),
        "prompt_tokens_kept": share(prompt[kept], before),
        "questions_whole": mean(kept & whole),
        "answers_whole": {name: mean(answers_whole == name) for name in WHOLE.values()} if len(answers_whole) else {},
        "tokens_per_pair": {
            "padded": mean(answers * max_length),
            "unpadded": mean(answers * prompt[kept] + (chosen + rejected)[kept]),
            "shared_prefix": mean((prompt + chosen + rejected)[kept]),
        },
        "stock": {
            "pairs_kept": int(stock_kept.sum()),
            "completion_tokens_kept": share(table["stock_completion_tokens"].to_numpy()[stock_kept], all_tokens),
            "questions_whole": mean(stock_kept & (before <= max_length)),
        },
        "lengths": {  # pairs by the tokens of prompt and longer completion, before fitting
            f"{low}-{high - 1}" if high else f"{low}+": int(np.sum((longest >= low) & (longest < (high or np.inf))))
            for low, high in zip(edges, (*edges[1:], None), strict=True)
        },
    }
