"""A reward model through its script: it learns, is resumed, loads as what it is, and evaluation takes it at once."""

import importlib
import json
import shutil
from pathlib import Path

import pytest
import torch
from running import log, run

from tinydpo.config.arguments import DataArguments
from tinydpo.data.pairs import load_split
from tinydpo.evaluation.rewards import RewardArguments, load_rewards

pytestmark = pytest.mark.usefixtures("one_thread")
CHATML = (
    "{% for message in messages %}<|endoftext|>{{ message['role'] }}\n{{ message['content'] }}<|endoftext|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|endoftext|>assistant\n{% endif %}"
)


def train(tiny_model: Path, task: Path, folder: Path, *flags: str) -> Path:
    run("reward", "--model_name_or_path", tiny_model, "--dataset_name", task / "data", "--output_dir", folder,
        "--learning_rate", "3e-3", "--max_steps", "12", *flags)  # fmt: skip
    return folder


@pytest.fixture(scope="module")
def reward(task: Path, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(tiny_model, task, tmp_path_factory.mktemp("runs") / "reward")


def test_it_learns_and_its_folder_is_a_runs(reward: Path, capsys: pytest.CaptureFixture):
    losses = log(reward, "loss")
    assert sum(losses[-3:]) < sum(losses[:3]), f"it does not learn: {losses}"
    for name in ("run_config.yaml", "data_summary.json", "train_results.json", "environment.json", "curves.png"):
        assert (reward / name).is_file(), f"its folder lacks {name}"
    card = (reward / "README.md").read_text()
    assert "reward model" in card and "supervised" not in card and "DPO (" not in card, card


def test_it_loads_as_a_model_of_one_output(reward: Path):
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    model, told = AutoModelForSequenceClassification.from_pretrained(reward, output_loading_info=True)
    assert model.config.num_labels == 1 and not told["missing_keys"], f"it is no trained reward model: {told}"
    assert AutoTokenizer.from_pretrained(reward).pad_token_id == model.config.pad_token_id


def test_it_goes_on_to_the_same_weights_and_ends_once(
    reward: Path, task: Path, tiny_model: Path, capsys: pytest.CaptureFixture
):
    train(tiny_model, task, reward)
    assert "finished" in capsys.readouterr().out, "a finished run trains again"
    again = reward.parent / "again"
    shutil.copytree(reward, again)
    whole = (again / "model.safetensors").read_bytes()
    for name in ("model.safetensors", "train_results.json"):
        (again / name).unlink()
    shutil.rmtree(again / "checkpoint-12")
    train(tiny_model, task, again)
    assert "checkpoint-8" in capsys.readouterr().out, "the run started again instead of going on"
    assert (again / "model.safetensors").read_bytes() == whole, "a resumed run ends with other weights"


def test_both_engines_train_alike(task: Path, tiny_model: Path, tmp_path: Path):
    packed, padded = (
        train(tiny_model, task, tmp_path / rows, "--shared_prefix", rows, "--bf16", "false")
        for rows in ("true", "false")
    )
    assert log(padded, "loss") == pytest.approx(log(packed, "loss"), rel=1e-3), "packed rows train something else"


def evaluation(sft: Path, task: Path, out: Path, *flags: str | Path) -> dict:
    argv = ["--model_name_or_path", sft, "--ref_model_name_or_path", sft, "--dataset_name", task / "data",
            "--num_prompts", "8", "--output_dir", out, *flags]  # fmt: skip
    importlib.import_module("evaluate").main([str(part) for part in argv])
    return json.loads((out / "eval_results.json").read_text())


def test_evaluation_takes_it_at_once(
    reward: Path, task: Path, tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture
):
    rewards = ["--reward_model_name_or_path", reward, "--reward_funcs", "tinydpo.toy_task.gold_reward"]
    results = evaluation(tiny_model, task, tmp_path / "runs/evaluation", *rewards)
    out = capsys.readouterr().out
    assert results["pairs"] == 32, results["pairs"]
    run("reward", "--model_name_or_path", tiny_model, "--dataset_name", task / "data", "--output_dir",
        tmp_path / "all", "--learning_rate", "3e-3", "--max_steps", "12", "--eval_pairs", "32")  # fmt: skip
    trained = json.loads((tmp_path / "all/train_results.json").read_text())
    assert results["explicit_accuracy"] == pytest.approx(trained["eval_accuracy"]), (
        "evaluation scores the held-out pairs otherwise than training does"
    )
    assert results["implicit_minus_explicit"] == -results["explicit_accuracy"], "policy and reference are the same"
    assert -1 <= results["rank_correlation_ci95"][0] <= results["rank_correlation"] <= 1
    assert list(results["rewards"]) == ["gold_reward", "reward"], "not each reward by its own name"
    alone = [one["reward_policy"] for one in results["rewards"].values()]
    assert sum(alone) == pytest.approx(results["reward_policy"]), "the rewards alone are not those of the sum"
    for row in ("reward model's accuracy", "implicit less explicit", "rank correlation", "… gold_reward"):
        assert row in out, f"the table lacks {row}"
    without = evaluation(tiny_model, task, tmp_path / "runs/without", *rewards[2:])
    assert not [name for name in without if name == "rewards" or "explicit" in name or "rank" in name], (
        "rows without a reward model"
    )


@pytest.mark.parametrize("template", [None, CHATML], ids=["texts", "chat template"])
def test_an_answer_is_scored_where_training_read_it(template: str | None, tiny_model: Path, tmp_path: Path):
    """By its last word: at the very token, in its own template, with no word after it."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    start, rows = tmp_path / "start", tmp_path / "rows.jsonl"
    shutil.copytree(tiny_model, start)
    tokenizer = AutoTokenizer.from_pretrained(start)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(start)
    turns = [{"role": "user", "content": "How do I make soup?"}]
    answers = {"chosen": "With carrots.", "rejected": "No."}
    row = {"prompt": turns} | {name: [{"role": "assistant", "content": text}] for name, text in answers.items()}
    rows.write_text("".join(json.dumps({**row, "subset": str(i)}) + "\n" for i in range(40)))
    run("reward", "--model_name_or_path", start, "--dataset_name", rows, "--output_dir", tmp_path / "run",
        "--max_steps", "1", "--learning_rate", "3e-3", "--eval_strategy", "no")  # fmt: skip
    (score,) = load_rewards(RewardArguments(reward_model_name_or_path=str(tmp_path / "run")), "cpu", batch_size=2)
    scored = score(prompts=[turns] * 2, completions=[row["chosen"], row["rejected"]])
    split = load_split(DataArguments(dataset_name=str(rows), test_split_size=0.5), tokenizer, 128, "train")
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "run").eval()
    pair = split.pairs[0]
    with torch.no_grad():
        trained = [model(torch.tensor([pair["prompt_ids"] + pair[f"{name}_ids"]])).logits.item() for name in answers]
    assert scored == pytest.approx(trained, abs=1e-5), "evaluation reads the score at another token than training"
