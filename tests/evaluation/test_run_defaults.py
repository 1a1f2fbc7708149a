"""A policy is evaluated on the held-out rows of its own run."""

import json
from pathlib import Path

import evaluate
import pytest
from running import run

from tinydpo.config.arguments import DataArguments
from tinydpo.data.pairs import load_pairs
from tinydpo.errors import UserError
from tinydpo.files import read_jsonl
from tinydpo.models.loading import load_tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")


def test_policy_is_evaluated_on_the_held_out_rows_of_its_run(tiny_model: Path, tmp_path: Path):
    rows = [{"question": f"How is {i}?", "chosen": f"Good {i}.", "rejected": f"Bad {i}!"} for i in range(40)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run("dpo", "--model_name_or_path", tiny_model, "--dataset_name", tmp_path / "rows.jsonl",
        "--column", "question=prompt", "--test_split_size", "0.3", "--max_length", "96", "--beta", "0.4",
        "--max_steps", "1", "--bf16", "true", "--eval_strategy", "no", "--output_dir", tmp_path / "dpo")  # fmt: skip
    models = ["--model_name_or_path", str(tmp_path / "dpo"), "--ref_model_name_or_path", str(tiny_model)]
    evaluate.main([*models, "--output_dir", str(tmp_path / "out")])
    data = DataArguments(str(tmp_path / "rows.jsonl"), column=["question=prompt"], test_split_size=0.3)
    held_out = load_pairs(data, load_tokenizer(str(tiny_model)), 96)["test"].texts["prompt"][:]
    prompts = [sample["prompt"] for sample in read_jsonl(tmp_path / "out/samples.jsonl")]
    assert sorted(prompts) == sorted(held_out), "other rows than training held out"
    results = json.loads((tmp_path / "out/eval_results.json").read_text())
    assert results["pairs"] == len(held_out) == 12
    assert (results["beta"], results["settings"]["max_length"]) == (0.4, 96)
    assert results["settings"]["dtype"] == "bfloat16", "evaluation computes in another precision than the run"
    with pytest.raises(UserError, match=r"max_length is 4096.*192 positions"):
        evaluate.main([*models, "--output_dir", str(tmp_path / "out"), "--max_length", "4096"])


def test_model_without_a_run_needs_a_reference_and_a_dataset(tiny_model: Path, tmp_path: Path):
    models = ["--model_name_or_path", str(tiny_model)]
    with pytest.raises(UserError, match=r"no run_config\.yaml.*--ref_model_name_or_path"):
        evaluate.main([*models, "--output_dir", str(tmp_path)])
    models += ["--ref_model_name_or_path", str(tiny_model)]
    with pytest.raises(UserError, match="dataset_name is not set"):
        evaluate.main([*models, "--output_dir", str(tmp_path)])
