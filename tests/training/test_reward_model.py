"""A reward model through its script: it learns, loads as what it is, and evaluation takes it at once."""

import json
from pathlib import Path

import evaluate
import pytest
import torch
from running import log, run
from toys import CHATML, say, write_family
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from tinydpo.config.arguments import DataArguments
from tinydpo.data.pairs import load_split
from tinydpo.evaluation.arguments import RewardArguments
from tinydpo.evaluation.rewards import load_rewards


def train(tiny_model: Path, task: Path, folder: Path, *flags: str) -> Path:
    run("reward", "--model_name_or_path", tiny_model, "--dataset_name", task / "data", "--output_dir", folder,
        "--learning_rate", "3e-3", "--max_steps", "12", "--eval_pairs", "32", *flags)  # fmt: skip
    return folder


@pytest.fixture(scope="module")
def reward(task: Path, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(tiny_model, task, tmp_path_factory.mktemp("runs") / "reward")


def test_it_learns_and_loads_as_a_reward_model(reward: Path):
    losses = log(reward, "loss")
    assert sum(losses[-3:]) < sum(losses[:3]), f"it does not learn: {losses}"
    model, info = AutoModelForSequenceClassification.from_pretrained(reward, output_loading_info=True)
    assert model.config.num_labels == 1 and not info["missing_keys"]
    assert AutoTokenizer.from_pretrained(reward).pad_token_id == model.config.pad_token_id
    card = (reward / "README.md").read_text()
    assert "reward model" in card and "supervised" not in card and "DPO (" not in card


def test_evaluation_takes_it_at_once(reward: Path, task: Path, tiny_model: Path, tmp_path: Path):
    evaluate.main([str(part) for part in (
        "--model_name_or_path", tiny_model, "--ref_model_name_or_path", tiny_model, "--dataset_name", task / "data",
        "--num_prompts", "8", "--output_dir", tmp_path / "runs/evaluation", "--reward_model_name_or_path", reward,
    )])  # fmt: skip
    results = json.loads((tmp_path / "runs/evaluation/eval_results.json").read_text())
    trained = json.loads((reward / "train_results.json").read_text())
    assert results["explicit_accuracy"] == pytest.approx(trained["eval_accuracy"]), "training scores pairs otherwise"


@pytest.mark.parametrize("chat", [False, True], ids=["texts", "chat template"])
def test_an_answer_is_scored_where_training_read_it(chat: bool, tiny_model: Path, tmp_path: Path):
    """By its last word: at the very token, in its own template, with no word after it."""
    start = write_family(tiny_model, tmp_path / "start", CHATML) if chat else tiny_model
    tokenizer = AutoTokenizer.from_pretrained(start)
    prompt = [say("user", "How do I make soup?")]
    answers = {"chosen": [say("assistant", "With carrots.")], "rejected": [say("assistant", "No.")]}
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"prompt": prompt, **answers, "subset": str(i)}) + "\n" for i in range(40)))
    run("reward", "--model_name_or_path", start, "--dataset_name", rows, "--output_dir", tmp_path / "run",
        "--max_steps", "1", "--learning_rate", "3e-3", "--eval_strategy", "no")  # fmt: skip

    (score,) = load_rewards(RewardArguments(reward_model_name_or_path=str(tmp_path / "run")), "cpu", batch_size=2)
    scored = score(prompts=[prompt] * 2, completions=list(answers.values()))
    pair = load_split(DataArguments(dataset_name=str(rows), test_split_size=0.5), tokenizer, 128, "train").pairs[0]
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "run").eval()
    with torch.no_grad():
        trained = [model(torch.tensor([pair["prompt_ids"] + pair[f"{side}_ids"]])).logits.item() for side in answers]
    assert scored == pytest.approx(trained, abs=1e-5), "evaluation reads the score at a different token from training"
