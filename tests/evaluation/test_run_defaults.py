"""A policy is evaluated on the held-out rows of its own run, unless a flag or the recipe says otherwise."""

import importlib
import json
from pathlib import Path

import pytest
from running import run

from tinydpo.config.arguments import DataArguments
from tinydpo.config.recipe import parse_args
from tinydpo.data.pairs import load_pairs
from tinydpo.errors import UserError
from tinydpo.evaluation.arguments import EvaluateArguments
from tinydpo.models.loading import load_tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 rows in columns of another name, without a test split."""
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    lines = [{"question": f"How is {i}?", "chosen": f"Good {i}.", "rejected": f"Bad {i}!"} for i in range(40)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture(scope="module")
def policy(rows: Path, tiny_model: Path) -> Path:
    """A DPO run on 70 % of the rows."""
    folder = rows.parent / "dpo"
    run("dpo", "--model_name_or_path", tiny_model, "--dataset_name", rows, "--column", "question=prompt",
        "--test_split_size", "0.3", "--max_length", "96", "--beta", "0.4", "--max_steps", "1", "--eval_strategy", "no",
        "--output_dir", folder)  # fmt: skip
    return folder


def evaluate(policy: Path, ref: Path, output_dir: Path, *flags: str) -> dict:
    argv = ["--model_name_or_path", policy, "--ref_model_name_or_path", ref, "--output_dir", output_dir, *flags]
    importlib.import_module("evaluate").main([str(part) for part in argv])
    return json.loads((output_dir / "eval_results.json").read_text())


def test_policy_is_evaluated_on_the_held_out_rows_of_its_run(policy: Path, tiny_model: Path, tmp_path: Path):
    results = evaluate(policy, tiny_model, tmp_path / "out")
    settings = results["settings"]
    data = DataArguments(settings["dataset_name"], column=["question=prompt"], test_split_size=0.3)
    held_out = load_pairs(data, load_tokenizer(str(policy)), 96)["test"].texts["prompt"][:]
    samples = [json.loads(line) for line in (tmp_path / "out/samples.jsonl").read_text().splitlines()]
    assert sorted(sample["prompt"] for sample in samples) == sorted(held_out), "other rows than training held out"
    assert results["pairs"] == len(held_out) == 12
    assert (results["beta"], settings["max_length"]) == (0.4, 96)


def test_flags_and_recipe_win_over_the_run(policy: Path, rows: Path, tmp_path: Path):
    recipe = tmp_path / "evaluate.yaml"
    recipe.write_text("max_length: 64\nmax_question_length: 20\nref_model_name_or_path: sft\noutput_dir: out\n")
    argv = ["--config", str(recipe), "--model_name_or_path", str(policy / "checkpoint-1"), "--beta", "0.2"]

    def parse(*flags: str) -> tuple[EvaluateArguments, DataArguments]:
        types = (EvaluateArguments, DataArguments)
        return parse_args(*types, argv=[*argv, *flags], defaults_from_run="model_name_or_path")

    args, data = parse()
    assert (args.beta, args.max_length, data.max_question_length) == (0.2, 64, 20)
    assert (data.dataset_name, data.test_split_size) == (str(rows), 0.3), "a checkpoint's run is the folder above"
    _, other = parse("--dataset_name", "other.jsonl")
    assert other.column is None, "the run's columns are taken for other data"


def test_model_without_a_run_needs_a_dataset(tiny_model: Path, tmp_path: Path):
    with pytest.raises(UserError, match="dataset_name is not set"):
        evaluate(tiny_model, tiny_model, tmp_path / "out")
    args, _ = parse_args(
        EvaluateArguments, DataArguments, defaults_from_run="model_name_or_path",
        argv=["--model_name_or_path", str(tiny_model), "--ref_model_name_or_path", "sft", "--output_dir", "out"],
    )  # fmt: skip
    assert (args.beta, args.max_length) == (0.1, 128)


@pytest.mark.parametrize("missing", ["model_name_or_path", "ref_model_name_or_path", "output_dir"])
def test_missing_flag_is_named(missing: str):
    given = {"model_name_or_path": "dpo", "ref_model_name_or_path": "sft", "output_dir": "out"}
    with pytest.raises(ValueError, match=f"--{missing} is missing"):
        EvaluateArguments(**given | {missing: None})
