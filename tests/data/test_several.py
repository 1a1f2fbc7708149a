"""Several datasets in one run, shares of them, and a first try on fewer pairs: the same rows in every stage."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from tinydpo.config.arguments import DataArguments, RunArguments
from tinydpo.config.recipe import parse_args
from tinydpo.data.inspect import format_data_notes
from tinydpo.data.pairs import load_pairs, load_split
from tinydpo.errors import UserError


def write(folder: Path, name: str, count: int) -> Path:
    """A folder of pairs whose words name it and the row, with a held-out split of three."""
    (folder / name).mkdir(parents=True)
    for split, rows in (("train", range(count)), ("test", range(1000, 1003))):
        start = "\n\nHuman: {}?\n\nAssistant:"
        lines = [
            {"prompt": start.format(f"{name} {row}"), "chosen": f" yes {name}", "rejected": f" no {name}"}
            for row in rows
        ]
        (folder / name / f"{split}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder / name


@pytest.fixture
def two(tmp_path: Path) -> list[str]:
    return [str(write(tmp_path, "peas", 40)), str(write(tmp_path, "beans", 20))]


def load(tokenizer: Any, need_pairs: bool = True, **settings: Any) -> dict[str, Any]:
    return load_pairs(DataArguments(**settings), tokenizer, 128, need_pairs)


def test_several_are_read_one_after_the_other(two: list[str], tiny_tokenizer: Any):
    splits = load(tiny_tokenizer, dataset_name=two)
    assert splits["train"].pairs["subset"][:] == ["peas"] * 40 + ["beans"] * 20, "nobody can tell the datasets apart"
    assert splits["test"].pairs["subset"][:] == ["peas"] * 3 + ["beans"] * 3, "held-out rows of one of them are lost"
    for row, text in zip(splits["train"].pairs, splits["train"].texts, strict=True):
        assert row["subset"] in text["prompt"], "rows stand under another dataset's name"


def test_names_that_end_alike_are_told_apart_in_full(tmp_path: Path, tiny_tokenizer: Any):
    names = [str(write(tmp_path / side, "peas", 4)) for side in ("left", "right")]
    subsets = Counter(load(tiny_tokenizer, dataset_name=names)["train"].pairs["subset"][:])
    assert subsets == dict.fromkeys(names, 4), "two datasets count as one"


def test_folders_of_one_dataset_with_a_share_of_each(two: list[str], tmp_path: Path, tiny_tokenizer: Any):
    settings = {"dataset_name": [str(tmp_path)] * 2, "dataset_data_dir": ["peas", "beans"]}
    shares = {"dataset_weights": [0.25, 1.0]}
    whole, part = (load(tiny_tokenizer, **settings, **more) for more in ({}, shares))
    assert Counter(whole["train"].pairs["subset"][:]) == {"peas": 40, "beans": 20}
    assert Counter(part["train"].pairs["subset"][:]) == {"peas": 10, "beans": 20}, "not a quarter and the whole"
    assert part["test"].summary["sha256"] == whole["test"].summary["sha256"], "shares of train change what is held out"
    again = load(tiny_tokenizer, need_pairs=False, **settings, **shares)
    assert again["train"].texts["prompt"][:] == part["train"].texts["prompt"][:], "SFT trains on other rows than DPO"


def test_fewer_pairs_are_the_same_everywhere_and_said(two: list[str], tiny_tokenizer: Any):
    settings = {"dataset_name": two, "max_train_pairs": 24, "max_test_pairs": 2}
    sft, dpo = (load(tiny_tokenizer, need_pairs=need, **settings) for need in (False, True))
    prompts = dpo["train"].texts["prompt"][:]
    assert len(prompts) == len(set(prompts)) == 24 and len(dpo["test"].pairs) == 2, "another number of pairs is drawn"
    assert sft["train"].texts["prompt"][:] == prompts, "SFT and DPO draw other rows"
    assert len(set(dpo["train"].pairs["subset"][:])) == 2, "the first rows are taken, not drawn ones"
    held_out = load_split(DataArguments(**settings), tiny_tokenizer, 128, "test")
    assert held_out.summary == dpo["test"].summary, "evaluation draws other rows than training"
    line = format_data_notes({name: split.summary for name, split in dpo.items()})
    assert "train: 24 of 60 rows drawn (--max_train_pairs)" in line, f"nobody is told: {line!r}"
    assert "test: 2 of 6 rows drawn (--max_test_pairs)" in line, f"nobody is told: {line!r}"


def test_more_pairs_than_there_are_is_all_of_them(two: list[str], tiny_tokenizer: Any):
    splits = load(tiny_tokenizer, dataset_name=two, max_train_pairs=10_000)
    assert len(splits["train"].pairs) == 60 and "drawn_from" not in splits["train"].summary


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--dataset_weights", "0.5", "0.5", "1"], "dataset_weights has 3 values for 2 names in dataset_name"),
        (["--dataset_revision", "a", "b", "c"], "dataset_revision has 3 values for 2 names"),
        (["--dataset_weights", "0", "1"], "dataset_weights are shares above 0 and up to 1"),
        (["--max_train_pairs", "0"], "max_train_pairs must be at least 1"),
    ],
)
def test_what_cannot_be_meant_is_one_sentence(flags: list[str], sentence: str):
    with pytest.raises(UserError, match=sentence):
        parse_args(DataArguments, argv=["--dataset_name", "a", "b", *flags])


def test_a_share_of_one_dataset(two: list[str], tiny_tokenizer: Any):
    (data,) = parse_args(DataArguments, argv=["--dataset_name", two[0], "--dataset_weights", "0.5"])
    assert len(load_pairs(data, tiny_tokenizer, 128)["train"].pairs) == 20, "half of 40 rows is another number"


def test_one_dataset_twice_is_one_sentence(two: list[str], tiny_tokenizer: Any):
    with pytest.raises(UserError, match=r"has .*peas twice, so that its rows would count twice"):
        load(tiny_tokenizer, dataset_name=[two[0], two[0]])


def test_a_recipe_may_name_one_or_several(tmp_path: Path):
    for written, expected in (("one", ["one"]), ("[one, two]", ["one", "two"])):
        (tmp_path / "recipe.yaml").write_text(f"dataset_name: {written}\nmax_train_pairs: 7\n")
        data, _ = parse_args(DataArguments, RunArguments, argv=["--config", str(tmp_path / "recipe.yaml")])
        assert [one.name for one in data.sources()] == expected and data.max_train_pairs == 7, (
            f"{written!r} is read as another dataset"
        )
