"""Records from every kind of file and folder, each with its file and row; one sentence for what cannot be read."""

import gzip
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import are_progress_bars_disabled

from tinydpo.config.arguments import DataArguments
from tinydpo.data.pairs import load_pairs, load_split
from tinydpo.data.splits import hide_progress_bars, load_records
from tinydpo.errors import UserError


def rows(count: int, name: str = "row") -> list[dict[str, str]]:
    start = "\n\nHuman: é {}?\n\nAssistant:"
    return [{side: f"{start.format(i)} {side} {name}" for side in ("chosen", "rejected")} for i in range(count)]


def lines(values: list) -> bytes:
    return "".join(json.dumps(value, ensure_ascii=False) + "\n" for value in values).encode()


def read(name: Path | str, **options: Any) -> dict[str, list[dict]]:
    """Both splits, records decoded."""
    splits = load_records(DataArguments(dataset_name=str(name), **options))
    return {split: [{**row, "record": json.loads(row["record"])} for row in rows] for split, rows in splits.items()}


def everything(name: Path | str, **options: Any) -> list[dict]:
    """All records in the order of their file."""
    return sorted((row for rows in read(name, **options).values() for row in rows), key=lambda row: row["row"])


def write_parquet(path: Path, values: list) -> None:
    pq.write_table(pa.Table.from_pylist(values), path)


FILES: dict[str, Callable[[Path, list], Any]] = {
    "a.jsonl": lambda path, values: path.write_bytes(lines(values)),
    "a.jsonl.gz": lambda path, values: path.write_bytes(gzip.compress(lines(values))),
    "a.json": lambda path, values: path.write_text(json.dumps(values, indent=2)),
    "lines.json": lambda path, values: path.write_bytes(lines(values)),
    "bom.json": lambda path, values: path.write_bytes(b"\xef\xbb\xbf" + json.dumps(values).encode()),
    "a.parquet": write_parquet,
    "bom.jsonl": lambda path, values: path.write_bytes(b"\xef\xbb\xbf" + lines(values)),
    "crlf.jsonl": lambda path, values: path.write_bytes(lines(values).replace(b"\n", b"\r\n")),
    "no_last_newline.jsonl": lambda path, values: path.write_bytes(lines(values).rstrip()),
    "not_zipped.jsonl.gz": lambda path, values: path.write_bytes(lines(values)),
    "zipped_without_gz.jsonl": lambda path, values: path.write_bytes(gzip.compress(lines(values))),
    "two_members.jsonl.gz": lambda path, values: path.write_bytes(
        gzip.compress(lines(values[:3])) + gzip.compress(lines(values[3:]))
    ),
}


@pytest.mark.parametrize("name", FILES)
def test_every_kind_of_file(name: str, tmp_path: Path):
    FILES[name](tmp_path / name, rows(10))
    records = everything(tmp_path / name)
    assert [record["record"] for record in records] == rows(10), f"{name}: rows are lost or changed"
    assert [record["row"] for record in records] == list(range(1, 11)), f"{name}: rows are misnumbered"
    assert {record["file"] for record in records} == {str(tmp_path / name)}, f"{name}: the file is misnamed"
    assert {record["subset"] for record in records} == {None}, f"{name}: a lone file has no subset"


def test_folder_names_say_nothing_about_the_kind_of_a_file(tmp_path: Path):
    folder = tmp_path / "my.parquet-export.json"
    folder.mkdir()
    (folder / "a.jsonl").write_bytes(lines(rows(4)))
    assert len(everything(folder / "a.jsonl")) == 4, "a folder's name decides how its files are read"


def test_blank_lines_count_as_rows_of_the_file(tmp_path: Path):
    file = tmp_path / "a.jsonl"
    first, *rest = lines(rows(4)).splitlines(keepends=True)
    file.write_bytes(b"\n" + first + b" \r\n\t\n" + b"".join(rest) + b"\n\n")
    numbers = [record["row"] for record in everything(file)]
    assert numbers == [2, 5, 6, 7], "rows are not numbered as an editor numbers the file's lines"


def test_parquet_conversations_and_bytes(tmp_path: Path):
    turn = {"role": "user", "content": "Hi"}
    write_parquet(tmp_path / "a.parquet", [{"chosen": [turn], "rejected": "é".encode(), "score": None}] * 3)
    record = everything(tmp_path / "a.parquet")[0]["record"]
    assert record == {"chosen": [turn], "rejected": "é", "score": None}, "Parquet's values are garbled"


BAD_FILES = {  # tests/data/test_bad_datasets.py has the others
    "damaged.jsonl.gz": (b"\x1f\x8b\x08\x00" + bytes(range(200)), "cut or damaged"),
    "cut.parquet": (b"PAR1 and then nothing", "cut or damaged"),
    "cut.json": (json.dumps(rows(9), indent=1).encode()[:-100], "cut or damaged"),
    "deep.json": (b"[" * 100_000, "cut or damaged"),
    "rows.parquet.gz": (b"", "is not a .jsonl"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_file_that_cannot_be_read_is_named(name: str, tmp_path: Path):
    content, expected = BAD_FILES[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=expected) as caught:
        load_records(DataArguments(dataset_name=str(tmp_path / name)))
    assert name in str(caught.value), "the message does not name the file"


def test_no_file_and_no_name(tmp_path: Path):
    with pytest.raises(UserError, match="dataset_name is not set"):
        load_records(DataArguments())
    for name in (tmp_path / "missing.jsonl", tmp_path / "missing", "missing.jsonl", "../missing", "here/missing.json"):
        with pytest.raises(UserError, match=r"there is no file or folder .*missing"):
            load_records(DataArguments(dataset_name=str(name)))


def test_hold_out_is_the_same_under_any_seed(tmp_path: Path):
    import random

    import numpy as np
    import torch

    (tmp_path / "a.jsonl").write_bytes(lines(rows(100)))
    held_out = []
    for seed in (0, 1):
        random.seed(seed), np.random.seed(seed), torch.manual_seed(seed)
        (tmp_path / f"copy{seed}.jsonl").write_bytes(lines(rows(100)))  # not from the cache
        for name in ("a.jsonl", f"copy{seed}.jsonl"):
            splits = read(tmp_path / name)
            held_out.append([record["row"] for record in splits["test"]])
            assert len(splits["test"]) == 5, "not 5 % are held out"
            both = [record["row"] for rows in splits.values() for record in rows]
            assert sorted(both) == list(range(1, 101)), "a row is in both splits or in none"
    assert all(chosen == held_out[0] for chosen in held_out), "SFT, DPO and evaluation hold out different rows"
    assert len(read(tmp_path / "a.jsonl", test_split_size=0.2)["test"]) == 20, "--test_split_size has no effect"
    with pytest.raises(UserError, match="too few to hold out"):
        load_records(DataArguments(dataset_name=str(tmp_path / "a.jsonl"), test_split_size=0.999))


def write_folder(folder: Path, **files: list) -> Path:
    for name, values in files.items():
        path = folder / f"{name.replace('__', '/')}.jsonl.gz"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(gzip.compress(lines(values)))
    return folder


def test_splits_by_name(tmp_path: Path):
    write_folder(tmp_path, train=rows(4, "train"), test=rows(3, "test"), validation=rows(2, "validation"))
    (tmp_path / "LICENSE").write_text("Anyone may read this.")
    (tmp_path / "README.md").write_text("# Some pairs\n")
    splits = read(tmp_path)
    assert [len(splits[split]) for split in ("train", "test")] == [4, 3], "a folder's own splits are not used"
    assert splits["test"][0]["file"] == f"{tmp_path}/test.jsonl.gz", "the file is misnamed"
    splits = read(tmp_path, dataset_train_split="test", dataset_test_split="validation")
    assert [len(splits[split]) for split in ("train", "test")] == [3, 2], "TRL's split flags have no effect"


def test_missing_splits(tmp_path: Path):
    write_folder(tmp_path, train=rows(40), validation=rows(2))
    assert len(read(tmp_path)["test"]) == 2, "without a test split 5 % of train are held out"
    for side in ("test", "train"):
        with pytest.raises(UserError, match=f"no split 'dev', only train, validation; check --dataset_{side}_split"):
            load_records(DataArguments(dataset_name=str(tmp_path), **{f"dataset_{side}_split": "dev"}))
    with pytest.raises(UserError, match="no split 'dev', only train"):
        load_records(DataArguments(dataset_name=f"{tmp_path}/train.jsonl.gz", dataset_test_split="dev"))


def test_training_rows_are_never_the_held_out_ones(tmp_path: Path, tiny_tokenizer: Any):
    write_folder(tmp_path, train=rows(4), test=rows(3))
    for name in (tmp_path, tmp_path / "train.jsonl.gz"):
        with pytest.raises(UserError, match="both 'test'"):
            load_pairs(DataArguments(dataset_name=str(name), dataset_train_split="test"), tiny_tokenizer, 128)
    whole = load_split(DataArguments(dataset_name=str(name), dataset_test_split="train"), tiny_tokenizer, 128, "test")
    assert len(whole.pairs) == 4, "evaluation cannot be asked to use every row of a file"


HH = {
    f"{topic}__{split}": rows(3, topic) for topic in ("harmless-base", "helpful-base") for split in ("train", "test")
}


def test_several_folders_keep_their_name(tmp_path: Path, tiny_tokenizer: Any):
    write_folder(tmp_path, **HH)
    for split, records in read(tmp_path).items():
        assert [record["subset"] for record in records] == ["harmless-base"] * 3 + ["helpful-base"] * 3, (
            "subset is lost"
        )
        assert all(record["record"]["chosen"].endswith(record["subset"]) for record in records), "subsets are mixed up"
        assert records[-1]["file"] == f"{tmp_path}/helpful-base/{split}.jsonl.gz", "the file is misnamed"
    pairs = load_pairs(DataArguments(dataset_name=f"{tmp_path}/"), tiny_tokenizer, 128)["train"].pairs
    assert pairs["subset"][:] == ["harmless-base"] * 3 + ["helpful-base"] * 3, "fitted pairs lose their subset"
    one = read(tmp_path, dataset_data_dir="helpful-base")["test"]
    assert [record["subset"] for record in one] == ["helpful-base"] * 3, "--dataset_data_dir loses the subset"
    with pytest.raises(UserError, match="no folder 'helpful-online'; check --dataset_data_dir"):
        load_records(DataArguments(dataset_name=str(tmp_path), dataset_data_dir="helpful-online"))


def test_folders_of_splits_are_no_subsets(tmp_path: Path, tiny_tokenizer: Any):
    write_folder(tmp_path, train__a=rows(4), test__a=rows(3))
    assert {row["subset"] for rows in read(tmp_path).values() for row in rows} == {None}, "a split is called a subset"
    assert "subset" not in load_split(DataArguments(str(tmp_path)), tiny_tokenizer, 128, "test").pairs.column_names, (
        "data without subsets get a column of them"
    )


def test_a_dataset_on_the_hub_is_read_like_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    write_folder(tmp_path / "blobs", **HH)
    for blob in sorted(tmp_path.rglob("*.gz")):  # the Hub's cache: links to files named by their hash
        link = tmp_path / "snapshot" / blob.relative_to(tmp_path / "blobs")
        link.parent.mkdir(parents=True, exist_ok=True)
        hashed = blob.rename(blob.with_name(f"{hash(str(blob)):x}"))
        link.symlink_to(os.path.relpath(hashed, link.parent))
    asked = []
    monkeypatch.setattr(
        "tinydpo.data.splits.download_dataset", lambda *what: asked.append(what) or tmp_path / "snapshot"
    )
    records = read("someone/pairs", dataset_revision="abc")["train"]
    assert asked == [("someone/pairs", "abc", None)], "another dataset is downloaded than the one asked for"
    assert [record["subset"] for record in records] == ["harmless-base"] * 3 + ["helpful-base"] * 3, "subset is lost"
    assert records[0]["file"] == "someone/pairs/harmless-base/train.jsonl.gz", "a message would name the Hub's cache"


def test_folders_that_hold_no_pairs_are_refused(tmp_path: Path):
    for name, content in (("empty", None), ("table.csv", b"a,b\n1,2\n"), ("notes.txt", b"Nothing here.")):
        folder = tmp_path / f"of_{name}"
        folder.mkdir()
        if content:
            (folder / name).write_bytes(content)
        with pytest.raises(UserError, match=f"of_{name}"):
            load_records(DataArguments(dataset_name=str(folder)))


def test_cached_by_content(tmp_path: Path, tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch):
    def load() -> tuple[str, str]:
        split = load_pairs(data, tiny_tokenizer, 128)["train"]
        return split.pairs._fingerprint, split.texts[0]["chosen"]

    file = tmp_path / "a.jsonl"
    data = DataArguments(dataset_name=str(file))
    file.write_bytes(lines(rows(20, "old")))
    before = load()
    os.utime(file, (1, 1))

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("the same pairs are tokenized a second time")

    with monkeypatch.context() as patch:
        patch.setattr("tinydpo.data.splits._file_records", refuse)
        patch.setattr("tinydpo.data.text.render_row", refuse)
        patch.setattr("tinydpo.data.fitting.tokenize_prompts", refuse)
        assert load() == before, "the same content gives other pairs"
    file.write_bytes(lines(rows(20, "new")))  # of the same length
    os.utime(file, (1, 1))
    after = load()
    assert after[0] != before[0] and after[1].endswith("new"), "a changed file is not read again"


def test_bars_are_hidden_for_small_data_only(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_DISABLE_PROGRESS_BARS", None)
    assert not are_progress_bars_disabled(), "this test needs progress bars as they are by default"
    with hide_progress_bars(small=True):
        assert are_progress_bars_disabled(), "a bar flashes for data that are read in a blink"
    with hide_progress_bars(small=False):
        assert not are_progress_bars_disabled(), "large data are read without a sign of progress"
    assert not are_progress_bars_disabled(), "small data leave later, large data without a sign of progress"
