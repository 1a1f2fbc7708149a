"""Held-out rows: whole prompts, the same ones for every stage, and one line where two given splits share some."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from test_dialogues import BAD, CHATML, GOOD, TURNS, with_template

from tinydpo.config.arguments import DataArguments
from tinydpo.data.inspect import format_data_notes
from tinydpo.data.pairs import load_pairs
from tinydpo.data.splits import load_records


def texts(prompt: int, answer: int) -> dict:
    start = f"\n\nHuman: Why {prompt}?\n\nAssistant:"
    return {"prompt": start, "chosen": f" So {answer}.", "rejected": f" Not {answer}."}


def dialogues(prompt: int, answer: int) -> dict:
    row = texts(prompt, answer)
    return {side: row["prompt"] + row[side] for side in ("chosen", "rejected")}


def messages(prompt: int, answer: int) -> dict:
    asked = [*TURNS[:2], {"role": "user", "content": f"Why {prompt}?"}]
    return {"chosen": [*asked, {"role": "assistant", "content": f"So {answer}."}], "rejected": [*asked, *BAD]}


def sft(prompt: int, answer: int) -> dict:
    return {"messages": messages(prompt, answer)["chosen"]}


def renamed(prompt: int, answer: int) -> dict:
    row = texts(prompt, answer)
    return {"question": row.pop("prompt"), **row}


FORMS = {f.__name__: f for f in (texts, dialogues, messages, sft, renamed)}


def write(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("name", FORMS)
def test_whole_prompts_are_held_out(name: str, tmp_path: Path, tiny_tokenizer: Any):
    rows = [FORMS[name](prompt, answer) for answer in range(5) for prompt in range(40)]
    data = DataArguments(dataset_name=str(write(tmp_path / "a.jsonl", rows)))
    data.column = ["question=prompt"] if name == "renamed" else None
    need_pairs = name != "sft"
    splits = load_pairs(data, with_template(tiny_tokenizer, CHATML), 128, need_pairs)
    prompts = {split: Counter(splits[split].texts["prompt"][:]) for split in splits}
    assert not prompts["train"].keys() & prompts["test"].keys(), f"{name}: a held-out prompt was trained on"
    assert set(prompts["test"].values()) == {5} and len(prompts["test"]) == 2, f"{name}: not 5 % are held out, whole"
    assert prompts["train"].total() == 190, f"{name}: rows are lost"
    plain = load_pairs(data, tiny_tokenizer, 100, None)["test"]
    records = load_records(data)["test"]["row"][:]
    assert len(plain.texts) == len(records) == 10, f"{name}: another template or budget holds out other rows"


def test_prompts_of_any_size(tmp_path: Path):
    """As many whole prompts as the share has room for, one at least, and never all."""
    for sizes, share, held in (
        ([90, 6, 4], 0.1, {10}),
        ([50, 50], 0.05, {50}),
        ([97, 1, 1, 1], 0.05, {3}),
        ([1] * 100, 0.2, {20}),
        ([30, 30, 40], 0.5, {30, 40}),
    ):
        rows = [texts(prompt, answer) for prompt, size in enumerate(sizes) for answer in range(size)]
        data = DataArguments(dataset_name=str(write(tmp_path / "a.jsonl", rows)), test_split_size=share)
        splits = load_records(data)
        assert len(splits["test"]) in held, f"prompts of {sizes} rows: {len(splits['test'])} are held out"
        assert len(splits["train"]) + len(splits["test"]) == sum(sizes), "a row is in both splits or in none"


def test_one_prompt_alone_is_held_out_by_rows_and_told(tmp_path: Path, tiny_tokenizer: Any):
    data = DataArguments(dataset_name=str(write(tmp_path / "a.jsonl", [texts(0, answer) for answer in range(40)])))
    splits = load_pairs(data, tiny_tokenizer, 128)
    assert [len(splits[split].texts) for split in ("train", "test")] == [38, 2], "data of one prompt are refused"
    line = format_data_notes({name: split.summary for name, split in splits.items()})
    assert line == "Data: test: the prompt stands in the train split too (2 rows)", f"the leak is not told: {line!r}"


def test_given_splits_that_share_prompts_are_told(tmp_path: Path, tiny_tokenizer: Any):
    write(tmp_path / "train.jsonl", [messages(prompt, 0) for prompt in range(20)])
    write(tmp_path / "test.jsonl", [messages(prompt, answer) for prompt in range(18, 25) for answer in (1, 2, 3)])
    splits = load_pairs(DataArguments(dataset_name=str(tmp_path)), with_template(tiny_tokenizer, CHATML), 128)
    assert splits["test"].summary["notes"] == {"the prompt stands in the train split too": 6}, (
        "shared prompts: miscounted"
    )
    assert len(splits["test"].texts) == 21, "rows of a given split are taken out"
    write(tmp_path / "train.jsonl", [{"prompt": TURNS, "chosen": GOOD, "rejected": BAD}])
    splits = load_pairs(DataArguments(dataset_name=str(tmp_path)), with_template(tiny_tokenizer, CHATML), 128)
    assert splits["test"].summary["notes"] == {}, "splits that share nothing are said to"
