"""Where rows come from: files, folders and the Hub; splits, subsets and several datasets; held-out prompts; caches."""

import gzip
import json
import os
import random
import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import pytest
from datasets import Dataset, Features, Json, List, Value
from examples import BAD, CHATML, GOOD, THINKING, TOOLS, TURNS, encode_lines, with_template

from tinydpo.config import launch
from tinydpo.config.arguments import DataArguments
from tinydpo.data.inspect import format_data_notes
from tinydpo.data.pairs import FittedSplit, load_pairs, load_split
from tinydpo.data.splits import FILE_SUFFIXES, load_rows
from tinydpo.errors import UserError


def make_rows(count: int, word: str = "word", prompts: int | None = None) -> list[dict[str, str]]:
    """Rows as HH writes them, about `prompts` different prompts (by default one each)."""
    rows = []
    for i in range(count):
        prompt = f"\n\nHuman: é {word} {i % (prompts or count)}?\n\nAssistant:"
        rows.append({"chosen": f"{prompt} yes {i} {word}", "rejected": f"{prompt} no {i} {word}"})
    return rows


def read(name: Path | str, **options: Any) -> dict[str, list[dict]]:
    """Both splits, with each row's chosen answer in place of the whole row."""
    splits = load_rows(DataArguments(dataset_name=str(name), **options))
    read = {}
    for split, rows in splits.items():
        read[split] = [{**row, "chosen": json.loads(row["parsed"])["answers"]["chosen"]} for row in rows]
    return read


def write_folder(folder: Path, **files: list) -> Path:
    """A folder of .jsonl.gz files; `__` stands for a slash."""
    for name, rows in files.items():
        path = folder / f"{name.replace('__', '/')}.jsonl.gz"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(gzip.compress(encode_lines(rows)))
    return folder


TEN = make_rows(10)
FILES = {
    "a.jsonl": encode_lines(TEN),
    "a.jsonl.gz": gzip.compress(encode_lines(TEN)),
    "a.json": json.dumps(TEN, indent=2).encode(),
    "a.json.gz": gzip.compress(json.dumps(TEN).encode()),
    "bom.json": b"\xef\xbb\xbf" + json.dumps(TEN).encode(),
    "lines.json": encode_lines(TEN),
    "a.csv": pandas.DataFrame(TEN).to_csv(index=False).encode(),
    "a.parquet": None,
}


@pytest.mark.parametrize("name", FILES)
def test_every_kind_of_file(name: str, tmp_path: Path):
    if FILES[name]:
        (tmp_path / name).write_bytes(FILES[name])
    else:
        Dataset.from_list(TEN).to_parquet(tmp_path / name)
    splits = read(tmp_path / name)
    rows = sorted((row for split in splits.values() for row in split), key=lambda row: row["row"])
    assert [row["chosen"] for row in rows] == [f" yes {i} word" for i in range(10)], "rows are lost or changed"
    assert [row["row"] for row in rows] == list(range(1, 11)), "rows are misnumbered"
    assert {(row["file"], row["subset"]) for row in rows} == {(str(tmp_path / name), None)}


def test_texts_in_binary_columns_of_parquet(tmp_path: Path):
    binary = [{"prompt": b"q", "chosen": "é".encode(), "rejected": "no"}] * 2
    Dataset.from_list(binary).to_parquet(tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet")["train"][0]["chosen"] == "é"


def test_csv_cells_are_texts_or_conversations(tmp_path: Path, tiny_tokenizer: Any):
    answers = [json.dumps([{"role": "assistant", "content": text}]) for text in ("Yes", "No")]
    table = {
        "prompt": [json.dumps(TURNS), "One\nor two?"],
        "chosen": [answers[0], "12"],
        "rejected": [answers[1], "NA"],
        "notes": ["", "a long column " * 10_000],
    }
    for split in ("train", "test"):
        pandas.DataFrame(table).to_csv(tmp_path / f"{split}.csv", index=False)
    texts = load_pairs(DataArguments(dataset_name=str(tmp_path)), tiny_tokenizer, 128)["train"].texts
    assert texts["chosen"][:] == [" Yes", "12"] and texts["rejected"][:] == [" No", "NA"], "cells are garbled or lost"
    assert texts["prompt"][1] == "One\nor two?"


JSON_FEATURES = Features(
    {
        "prompt": List({"role": Value("string"), "content": Value("string"), "tool_calls": List(Json())}),
        "tools": List(Json()),
        **dict.fromkeys(("chosen", "rejected"), List({"role": Value("string"), "content": Value("string")})),
    }
)


@pytest.mark.parametrize("features", [None, JSON_FEATURES], ids=["structs", "Json"])
def test_parquet_is_read_as_the_json_lines_it_was_made_of(
    features: Features | None, tmp_path: Path, tiny_tokenizer: Any
):
    """Without Json features, Parquet gives every tool and every call the parameters of all others, as null."""
    clock = {"type": "function", "function": {"name": "clock", "parameters": {"properties": {"zone": {"type": "a"}}}}}
    if features:
        clock["function"]["parameters"]["properties"]["zone"]["default"] = None  # of the data, not of the format
    calls = [
        {"function": {"name": name, "arguments": arguments}}
        for name, arguments in (("weather", {"city": "Rome"}), ("clock", {"zone": 1}))
    ]
    turns = [
        TURNS[0],
        {"role": "assistant", "content": None, "tool_calls": calls},
        {"role": "tool", "content": "Sun."},
    ]
    rows = [{"prompt": turns, "tools": [*TOOLS, clock], "chosen": GOOD, "rejected": BAD}] * 2
    Dataset.from_list(rows, features=features).to_parquet(tmp_path / "a.parquet")
    (tmp_path / "a.jsonl").write_bytes(encode_lines(rows))
    prompts = []
    for name in ("a.jsonl", "a.parquet"):
        data = DataArguments(dataset_name=str(tmp_path / name))
        prompts.append(load_pairs(data, with_template(tiny_tokenizer, THINKING), 128)["train"].texts["prompt"][0])
    assert prompts[0] == prompts[1], "Parquet changes the prompt"


CONFIGS = b"---\nconfigs:\n- {config_name: a, data_files: a.jsonl}\n- {config_name: b, data_files: a.jsonl}\n---\n"
OUTSIDE = b"---\nconfigs:\n- {config_name: a, data_files: ../one.jsonl}\n---\n"
# what is read: (content of one file, or files of a folder; part of the message)
UNREADABLE = {
    "short.jsonl.gz": (gzip.compress(encode_lines(make_rows(99)))[:-300], "cut or damaged"),
    "short.parquet": (b"PAR1 and then nothing", "cut or damaged"),
    "short.json": (json.dumps(make_rows(9)).encode()[:-100], "cut or damaged"),
    "empty.jsonl": (b"", "no rows"),
    "one.jsonl": (encode_lines(make_rows(1)), r"has 1 row\(s\), too few to hold out a share of 0.05"),
    "table.tsv": (b"a\tb\n", "is not a .jsonl"),
    "table.csv": (b"a,b\n\xff,c\n", "cut or damaged"),
    "empty": ({}, "is not a dataset that can be read"),
    "broken_readme": ({"README.md": b"---\nconfigs: [a\n---\n", "train.jsonl": b""}, "(?s)is not a dataset .*README"),
    "configurations": ({"README.md": CONFIGS, "a.jsonl": b""}, r"(?s)\['a', 'b'\].*--dataset_config"),
    "outside": ({"README.md": OUTSIDE, "a.jsonl": b""}, r"README.md names \S+/one.jsonl, outside the folder"),
    "missing.jsonl": (None, "there is no file or folder"),  # and no Hub id
}


@pytest.mark.parametrize("name", UNREADABLE)
def test_data_that_cannot_be_read_are_named(name: str, tmp_path: Path):
    content, expected = UNREADABLE[name]
    (tmp_path / "one.jsonl").write_bytes(encode_lines(make_rows(1)))
    if isinstance(content, bytes):
        (tmp_path / name).write_bytes(content)
    elif content is not None:
        (tmp_path / name).mkdir()
        for file, inside in content.items():
            (tmp_path / name / file).write_bytes(inside)
    with pytest.raises(UserError, match=expected) as caught:
        load_rows(DataArguments(dataset_name=str(tmp_path / name)))
    assert name in str(caught.value), "the message does not name the data"


def test_splits_by_name(tmp_path: Path):
    write_folder(tmp_path, train=make_rows(40), test=make_rows(3), validation=make_rows(2))
    (tmp_path / "README.md").write_text("# Some pairs\n")
    splits = read(tmp_path)
    assert [len(splits[split]) for split in ("train", "test")] == [40, 3], "a folder's own splits are not used"
    assert splits["test"][0]["file"] == f"{tmp_path}/test.jsonl.gz"
    splits = read(tmp_path, dataset_train_split="test", dataset_test_split="validation")
    assert [len(splits[split]) for split in ("train", "test")] == [3, 2], "the split flags have no effect"
    (tmp_path / "test.jsonl.gz").unlink()
    assert len(read(tmp_path)["test"]) == 2, "without a test split 5 % of train are not held out"
    for side in ("test", "train"):
        with pytest.raises(UserError, match=f"no split 'dev', only train, validation; check --dataset_{side}_split"):
            load_rows(DataArguments(dataset_name=str(tmp_path), **{f"dataset_{side}_split": "dev"}))


def test_slices_of_a_split_share_no_row_and_have_every_subset(tmp_path: Path):
    write_folder(tmp_path, a__train=make_rows(8, "a"), b__train=make_rows(4, "b"), a__test=TEN)
    for first, second in (("train[:25%]", "train[25%:]"), ("train[:2]", "train[2:]"), ("train[-1:]", "train[:-1]")):
        taken = [read(tmp_path, dataset_train_split=split)["train"] for split in (first, second)]
        rows = [(row["subset"], row["row"]) for part in taken for row in part]
        assert sorted(rows) == [("a", i) for i in range(1, 9)] + [("b", i) for i in range(1, 5)]
        assert all({row["subset"] for row in part} == {"a", "b"} for part in taken), f"{first} lost a subset"
    with pytest.raises(UserError, match=r"train\[9:\] has none of the 12 rows of train"):
        read(tmp_path, dataset_train_split="train[9:]")
    for mistake in ("train[:a]", "train[:2]+test"):
        with pytest.raises(ValueError, match=r"\[.*is not a slice such as train"):
            DataArguments(dataset_train_split=mistake)
    with pytest.raises(ValueError, match="is a whole split"):
        DataArguments(dataset_test_split="test[:2]")


def test_training_rows_are_never_the_held_out_ones(tmp_path: Path, tiny_tokenizer: Any):
    file = str(write_folder(tmp_path, train=make_rows(4)) / "train.jsonl.gz")
    with pytest.raises(UserError, match="both 'test'"):
        load_pairs(DataArguments(file, dataset_train_split="test"), tiny_tokenizer, 128)
    whole = load_split(DataArguments(file, dataset_test_split="train"), tiny_tokenizer, 128, "test")
    assert len(whole.pairs) == 4, "evaluation cannot be asked to use every row of a file"


def test_a_folder_whose_name_is_a_pattern_is_refused_and_a_file_is_read(tmp_path: Path):
    """`datasets` would read day1 as day?."""
    write_folder(tmp_path, **{f"{name}__train": make_rows(40, name) for name in ("day?", "day1")})
    for options in ({"name": tmp_path / "day?"}, {"name": tmp_path, "dataset_data_dir": "day?"}):
        with pytest.raises(UserError, match=r"day\?: .* rename it"):
            read(**options)
    assert "day?" in read(tmp_path / "day?/train.jsonl.gz")["train"][0]["parsed"]


def test_a_folder_named_like_a_format_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """`datasets` takes the name json for its reader of JSON files."""
    write_folder(tmp_path / "json", train=make_rows(40))
    monkeypatch.chdir(tmp_path)
    assert len(read("json")["train"]) > 30


def test_files_that_are_not_read_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    write_folder(tmp_path, train=make_rows(4), test=make_rows(2))
    (tmp_path / "pairs_results.json").write_text("{}")
    read(tmp_path)
    assert capsys.readouterr().out == "", "a line is printed about nothing"
    write_folder(tmp_path, **{name: make_rows(1) for name in ("more", "validation", "\x1b[31m")})
    read(tmp_path)
    said = "are not read: \\x1b[31m.jsonl.gz, more.jsonl.gz, validation.jsonl.gz\n"
    assert capsys.readouterr().out.endswith(said), "rows are left out without a word"
    read(tmp_path, dataset_test_split="validation", dataset_data_dir=".")
    assert "test.jsonl.gz" in capsys.readouterr().out, "a split that the flags leave out is not named"


HH = {f"{topic}__{split}": make_rows(3, topic) for topic in ("harmless", "helpful") for split in ("train", "test")}


def test_folders_of_one_dataset_are_subsets(tmp_path: Path, tiny_tokenizer: Any):
    write_folder(tmp_path, **HH)
    for split, rows in read(tmp_path).items():
        assert [row["subset"] for row in rows] == ["harmless"] * 3 + ["helpful"] * 3
        assert all(row["chosen"].endswith(row["subset"]) for row in rows), "subsets are mixed up"
        assert rows[-1]["file"] == f"{tmp_path}/helpful/{split}.jsonl.gz"
    pairs = load_pairs(DataArguments(dataset_name=f"{tmp_path}/"), tiny_tokenizer, 128)["train"].pairs
    assert pairs["subset"][:] == ["harmless"] * 3 + ["helpful"] * 3, "fitted pairs lose their subset"
    one = read(tmp_path, dataset_data_dir="helpful")["test"]
    assert [row["subset"] for row in one] == ["helpful"] * 3, "--dataset_data_dir loses the subset"
    with pytest.raises(UserError, match="no folder 'online'; check --dataset_data_dir"):
        load_rows(DataArguments(dataset_name=str(tmp_path), dataset_data_dir="online"))
    splits_only = write_folder(tmp_path / "splits", train__a=make_rows(4), test__a=make_rows(3))
    pairs = load_split(DataArguments(str(splits_only)), tiny_tokenizer, 128, "test").pairs
    assert "subset" not in pairs.column_names, "folders that only part train from test are taken for subsets"


def test_dataset_on_the_hub_is_read_like_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for split in ("train", "test"):  # the Hub's cache: links to files named by their hash
        blob = tmp_path / f"hash_of_{split}"
        blob.write_bytes(gzip.compress(encode_lines(make_rows(3))))
        link = tmp_path / "snapshot" / "harmless" / f"{split}.jsonl.gz"
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(blob)
    asked = []
    monkeypatch.setattr("tinydpo.data.splits.download_dataset", lambda *a: asked.append(a) or tmp_path / "snapshot")
    rows = read("someone/pairs", dataset_revision="abc", dataset_data_dir="harmless")["train"]
    assert asked == [("someone/pairs", "abc", "harmless", FILE_SUFFIXES)], (
        "another dataset is downloaded than the one asked for"
    )
    assert [row["subset"] for row in rows] == ["harmless"] * 3
    assert rows[0]["file"] == "someone/pairs/harmless/train.jsonl.gz", "a message would name the Hub's cache"


# Held-out prompts


def make_talk(prompt: int, answer: int) -> dict:
    """A row about a numbered prompt."""
    turns = [*TURNS[:2], {"role": "user", "content": f"Why {prompt}?"}]
    return {"prompt": turns, "chosen": [{"role": "assistant", "content": f"So {answer}."}], "rejected": BAD}


def test_held_out_rows_stay_the_same(tmp_path: Path):
    """Other rows under a later version would leak trained prompts into the evaluation of earlier models."""
    talks = [make_talk(i % 13, i) for i in range(60)]
    for name, rows in (("rows.jsonl", make_rows(60, prompts=13)), ("talks.jsonl", talks)):
        for seed in (0, 1):
            random.seed(seed)
            np.random.seed(seed)
            (tmp_path / f"{seed}{name}").write_bytes(encode_lines(rows))  # another name: not from the cache
            splits = read(tmp_path / f"{seed}{name}", test_split_size=0.2)
            assert [row["row"] for row in splits["test"]] == [29, 56, 30, 43, 55, 16, 17, 4, 42, 3], name
            assert [row["row"] for row in splits["train"]][:6] == [19, 25, 8, 18, 28, 51], name
            assert sorted(row["row"] for split in splits.values() for row in split) == list(range(1, 61))


@pytest.mark.parametrize("form", ["texts", "conversations"])
def test_whole_prompts_are_held_out(form: str, tmp_path: Path, tiny_tokenizer: Any):
    rows = make_rows(200, prompts=40)
    if form == "conversations":
        rows = [make_talk(prompt, answer) for answer in range(5) for prompt in range(40)]
    (tmp_path / "a.jsonl").write_bytes(encode_lines(rows))
    data = DataArguments(dataset_name=str(tmp_path / "a.jsonl"))
    splits = load_pairs(data, with_template(tiny_tokenizer, CHATML), 128)
    prompts = {split: Counter(splits[split].texts["prompt"][:]) for split in splits}
    assert not prompts["train"].keys() & prompts["test"].keys(), "a held-out prompt was trained on"
    assert list(prompts["test"].values()) == [5, 5], "not 5 % are held out, as whole prompts"
    assert prompts["train"].total() == 190, "rows are lost"
    again = load_pairs(data, tiny_tokenizer, 100, need_pairs=False)["test"].texts["prompt"][:]
    numbers = [[re.findall(r"\d+\?", prompt) for prompt in texts] for texts in (again, splits["test"].texts["prompt"])]
    assert numbers[0] == numbers[1], "another template, stage or budget holds out other rows"


@pytest.mark.parametrize(
    ("sizes", "share", "held_out"),
    [([90, 6, 4], 0.1, {10}), ([50, 50], 0.05, {50}), ([30, 30, 40], 0.5, {30, 40}), ([40], 0.05, {2})],
)
def test_prompts_of_any_size_are_held_out(sizes: list[int], share: float, held_out: set, tmp_path: Path):
    rows = [make_talk(prompt, answer) for prompt, size in enumerate(sizes) for answer in range(size)]
    (tmp_path / "a.jsonl").write_bytes(encode_lines(rows))
    splits = load_rows(DataArguments(dataset_name=str(tmp_path / "a.jsonl"), test_split_size=share))
    assert len(splits["test"]) in held_out, f"{len(splits['test'])} are held out"
    assert len(splits["train"]) + len(splits["test"]) == sum(sizes), "a row is in both splits or in none"


def test_prompts_in_both_splits_are_noted(tmp_path: Path, tiny_tokenizer: Any):
    train = [make_talk(prompt, 0) for prompt in range(20)]
    test = [make_talk(prompt, answer) for prompt in range(18, 25) for answer in (1, 2, 3)]
    write_folder(tmp_path, train=train, test=test)
    splits = load_pairs(DataArguments(dataset_name=str(tmp_path)), with_template(tiny_tokenizer, CHATML), 128)
    assert len(splits["test"].texts) == 21, "rows of a given split are taken out"
    line = format_data_notes({name: split.summary for name, split in splits.items()})
    assert line == "Data: test: the prompt is also in the train split (6 rows)"


# Several datasets


@pytest.fixture
def two(tmp_path: Path) -> list[str]:
    for name, count in (("peas", 40), ("beans", 20)):
        write_folder(tmp_path / name, train=make_rows(count, name), test=make_rows(3, f"other {name}"))
    return [str(tmp_path / "peas"), str(tmp_path / "beans")]


def load(tokenizer: Any, need_pairs: bool = True, **settings: Any) -> dict[str, FittedSplit]:
    return load_pairs(DataArguments(**settings), tokenizer, 128, need_pairs)


def test_several_datasets_are_read_one_after_the_other(two: list[str], tmp_path: Path, tiny_tokenizer: Any):
    splits = load(tiny_tokenizer, dataset_name=two)
    assert splits["train"].pairs["subset"][:] == ["peas"] * 40 + ["beans"] * 20
    assert splits["test"].pairs["subset"][:] == ["peas"] * 3 + ["beans"] * 3
    for row, text in zip(splits["train"].pairs, splits["train"].texts, strict=True):
        assert row["subset"] in text["prompt"], "rows are under a different dataset's name"
    alike = [write_folder(tmp_path / side / "peas", train=make_rows(4), test=make_rows(1)) for side in "ab"]
    subsets = Counter(load(tiny_tokenizer, dataset_name=[*map(str, alike)])["train"].pairs["subset"][:])
    assert subsets == {str(name): 4 for name in alike}, "datasets whose names end alike count as one"
    (alike[0] / "README.md").write_bytes(CONFIGS.replace(b"a.jsonl", b"train.jsonl.gz"))
    configs = load(tiny_tokenizer, dataset_name=[str(alike[0])] * 2, dataset_config=["a", "b"])["train"].pairs
    assert set(configs["subset"][:]) == {f"{alike[0]}/{config}" for config in "ab"}, "configurations count as one"


def test_weights_draw_a_share_of_each_dataset(two: list[str], tmp_path: Path, tiny_tokenizer: Any):
    settings = {"dataset_name": [str(tmp_path)] * 2, "dataset_data_dir": ["peas", "beans"]}
    weights = {"dataset_weights": [0.25, 1.0]}
    whole, part = load(tiny_tokenizer, **settings), load(tiny_tokenizer, **settings, **weights)
    assert Counter(whole["train"].pairs["subset"][:]) == {"peas": 40, "beans": 20}
    assert Counter(part["train"].pairs["subset"][:]) == {"peas": 10, "beans": 20}, "not a quarter and the whole"
    assert part["test"].summary["sha256"] == whole["test"].summary["sha256"], "weights change what is held out"


def test_fewer_pairs_are_the_same_in_every_stage(two: list[str], tiny_tokenizer: Any):
    settings = {"dataset_name": two, "max_train_pairs": 24, "max_test_pairs": 2}
    sft, dpo = (load(tiny_tokenizer, need_pairs=need, **settings) for need in (False, True))
    prompts = dpo["train"].texts["prompt"][:]
    assert len(set(prompts)) == 24 and len(dpo["test"].pairs) == 2, "another number of pairs is drawn"
    assert sft["train"].texts["prompt"][:] == prompts, "SFT and DPO draw other rows"
    held_out = load_split(DataArguments(**settings), tiny_tokenizer, 128, "test")
    assert held_out.summary == dpo["test"].summary, "evaluation draws other rows than training"
    line = format_data_notes({name: split.summary for name, split in dpo.items()})
    assert "train: 24 of 60 rows drawn (--max_train_pairs)" in line and "test: 2 of 6 rows drawn" in line, line


# Caches and processes


def test_cache_goes_by_content(tmp_path: Path, tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch):
    file = tmp_path / "a.jsonl"
    data = DataArguments(dataset_name=str(file))

    def load_first(word: str) -> str:
        file.write_bytes(encode_lines(make_rows(20, word)))
        os.utime(file, (1, 1))
        return load_pairs(data, tiny_tokenizer, 128)["train"].texts[0]["chosen"]

    before = load_first("old")
    with monkeypatch.context() as patch:
        patch.delattr("tinydpo.data.splits.read_row")
        assert load_pairs(data, tiny_tokenizer, 128, need_pairs=False), "SFT and DPO do not share the parsed rows"
        patch.delattr("tinydpo.data.text.render_row")
        patch.delattr("tinydpo.data.fitting.tokenize_pairs")
        assert load_first("old") == before, "the same content gives other pairs"
    assert load_first("new").endswith("new"), "a changed file is not read again"  # of the same length and date
    data.column = ["rejected=chosen", "chosen=rejected"]
    assert " no " in load_first("new"), "other column names get the old pairs"


def test_number_of_processes_changes_nothing(tmp_path: Path, tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    splits = []
    for workers in (1, 2):
        file = tmp_path / f"{workers}.jsonl"
        file.write_bytes(encode_lines(make_rows(40)))
        splits.append(load_pairs(DataArguments(dataset_name=str(file)), tiny_tokenizer, 128, workers=workers)["train"])
    assert splits[0].pairs[:] == splits[1].pairs[:] and splits[0].summary == splits[1].summary


def test_quota_of_a_container_bounds_the_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(8)), raising=False)
    monkeypatch.setattr(launch, "CPU_QUOTA", tmp_path / "cpu.max")
    assert launch.count_cores() == 8
    for quota, expected in (("max 100000", 8), ("150000 100000", 2), ("50000 100000", 1), ("9000000 100000", 8)):
        (tmp_path / "cpu.max").write_text(quota + "\n")
        assert launch.count_cores() == expected, quota
