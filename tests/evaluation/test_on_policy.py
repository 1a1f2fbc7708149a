"""On-policy pairs and rounds: the better answer is chosen, and an interruption changes nothing."""

import json
import os
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import datasets
import dpo
import evaluate
import pytest
import round as round_script
import sample_pairs
import yaml
from hypothesis import given
from hypothesis import strategies as st
from running import ROOT, run
from toys import say, steer, write_rows
from transformers import AutoTokenizer

from tinydpo.config.arguments import DataArguments
from tinydpo.data.pairs import load_pairs
from tinydpo.errors import UserError
from tinydpo.evaluation import on_policy, sampling
from tinydpo.evaluation.arguments import RoundArguments
from tinydpo.evaluation.on_policy import ScoredAnswer, make_pairs
from tinydpo.files import read_jsonl
from tinydpo.toy_task import gold_reward

pytestmark = pytest.mark.usefixtures("one_thread")
FILES = ("train.jsonl", "test.jsonl", "README.md", "rewards.png")
TEMPLATE = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
ANSWERS = st.lists(
    st.builds(ScoredAnswer, st.sampled_from(["a", "b", "c", "d", " "]), st.booleans(), st.integers(-2, 2).map(float)),
    max_size=8,
)


@pytest.fixture(scope="module")
def policy(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny random model, made to end an answer after some twenty tokens."""
    folder = Path(shutil.copytree(tiny_model, tmp_path_factory.mktemp("policy") / "sft"))
    steer(folder, AutoTokenizer.from_pretrained(folder).eos_token_id, 4.3)
    return folder


def sample(policy: Path, data: Path | None, folder: Path, *flags: str) -> dict[str, list[dict[str, Any]]]:
    """The rows that scripts/sample_pairs.py writes, by split."""
    given = {"model_name_or_path": policy, "output_dir": folder, "num_prompts": 24, "samples_per_prompt": 4,
             "held_out_prompts": 0.25, "max_length": 96}  # fmt: skip
    argv = [part for name, value in given.items() for part in (f"--{name}", str(value))]
    if data:
        argv += ["--dataset_name", str(data)]
    if "--reward_funcs" not in flags:
        argv += ["--reward_funcs", "tinydpo.toy_task.gold_reward"]
    sample_pairs.main([*argv, *flags])
    return {split: read_jsonl(folder / f"{split}.jsonl") for split in ("train", "test")}


@given(ANSWERS)
def test_a_pair_has_two_different_answers_the_better_one_first(answers: list[ScoredAnswer]):
    every = make_pairs(answers, "all")
    for better, worse in every:
        assert better.reward > worse.reward, "the worse answer is the chosen one"
        assert better.ended, "chosen is an answer that ran out of room: training would put an end in its middle"
        assert better.text != worse.text and better.text.strip() and worse.text.strip()
    assert not [pair for pair, count in Counter((b.text, w.text) for b, w in every).items() if count > 1]
    best = make_pairs(answers, "best_worst")
    assert len(best) == bool(every), "a prompt with different answers gives no pair, or several"
    widest = max((better.reward - worse.reward for better, worse in every), default=None)
    assert not best or best[0][0].reward - best[0][1].reward == widest, "not the best against the worst"


def test_pairs_are_right_and_train(policy: Path, task: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    folder = tmp_path / "pairs"
    rows = sample(policy, task / "data", folder)
    assert len(rows["train"]) > 8 and len(rows["test"]) > 2, "too few pairs to show anything"
    asked = [row["chosen"] for row in read_jsonl(task / "data/train.jsonl")]
    for row in (*rows["train"], *rows["test"]):
        scores = gold_reward([row["prompt"]] * 2, [row["chosen"], row["rejected"]])
        assert scores == pytest.approx([row["reward_chosen"], row["reward_rejected"]]), "not the answers' own rewards"
        assert scores[0] > scores[1], "the worse answer is the chosen one"
        assert any(dialogue.startswith(row["prompt"]) for dialogue in asked), "not a prompt of the train split"
    prompts = {split: [row["prompt"] for row in rows[split]] for split in rows}
    assert not set(prompts["train"]) & set(prompts["test"]), "a prompt is trained on and held out"
    assert len(set(prompts["train"])) == len(prompts["train"]), "best against worst gave a prompt several pairs"

    card = (folder / "README.md").read_text()
    results = json.loads((folder / on_policy.PAIRS_RESULTS).read_text())
    assert "gold_reward" in card and results["settings"]["weights"][:12] in card and "seed 0" in card
    assert str(tmp_path) not in card, "the card leaks a path"
    assert results["counts"]["train_pairs"] == len(rows["train"]) and results["counts"]["answers"] == 24 * 4

    again = load_pairs(DataArguments(dataset_name=str(folder)), AutoTokenizer.from_pretrained(policy), 96)
    assert [again[split].summary["pairs_kept"] for split in rows] == [len(rows[split]) for split in rows]
    assert not again["train"].summary["notes"], "a column of these pairs is not read"
    assert not any("train split" in note for note in again["test"].summary["notes"])
    run("dpo", "--model_name_or_path", policy, "--dataset_name", folder, "--output_dir", tmp_path / "dpo",
        "--max_steps", "1", "--save_strategy", "no")  # fmt: skip

    capsys.readouterr()
    sample(policy, task / "data", folder)
    assert "has these pairs already" in capsys.readouterr().out, "finished pairs were made again"
    with pytest.raises(UserError, match=r"a different seed \(0, not 1\).*--output_dir"):
        sample(policy, task / "data", folder, "--seed", "1")


def test_the_same_seed_gives_the_same_files_also_after_ctrl_c(
    policy: Path, task: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(on_policy, "PROMPTS_AT_ONCE", 8)
    sample_answers = sampling.sample_answers
    batches = []

    def count_batches(*args: Any, **kwargs: Any) -> Any:
        if len(batches) == 2 and interrupt:
            raise KeyboardInterrupt
        batches.append(1)
        return sample_answers(*args, **kwargs)

    monkeypatch.setattr(sampling, "sample_answers", count_batches)
    flags = ["--seed", "7", "--pair_by", "all"]
    interrupt = True
    with pytest.raises(KeyboardInterrupt):
        sample(policy, task / "data", tmp_path / "one/pairs", *flags)
    assert not (tmp_path / "one/pairs").exists(), "half of the pairs were written"
    interrupt = False
    rows = sample(policy, task / "data", tmp_path / "one/pairs", *flags)
    assert len(batches) == 3, "what was sampled before Ctrl-C was sampled again"
    assert len(rows["train"]) > 24, "no prompt has more than one pair"
    shutil.rmtree(Path(datasets.config.HF_DATASETS_CACHE) / "tinydpo-answers")
    sample(policy, task / "data", tmp_path / "two/pairs", *flags)
    assert len(batches) == 6, "the second run was to sample for itself"
    for name in FILES:
        one = (tmp_path / "one/pairs" / name).read_bytes()
        two = (tmp_path / "two/pairs" / name).read_bytes()
        assert one.replace(b"one/", b"two/") == two, f"{name} differs between two runs of one seed"


@pytest.mark.parametrize("template", [None, TEMPLATE], ids=["HH's form", "chat template"])
def test_messages_stay_messages(template: str | None, policy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    policy = Path(shutil.copytree(policy, tmp_path / "policy"))
    tokenizer = AutoTokenizer.from_pretrained(policy)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(policy)
    (tmp_path / "my_rewards.py").write_text(
        "def words(prompts, completions, **kwargs):\n    return [float(len(c[0]['content'])) for c in completions]\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    asked = [[say("system", "Be brief."), say("user", f"Is {i} odd?")] for i in range(24)]
    answers = {"chosen": [say("assistant", "Yes.")], "rejected": [say("assistant", "No.")]}
    data = write_rows(tmp_path / "data", [{"prompt": prompt, **answers} for prompt in asked])
    (policy / "run_config.yaml").write_text(yaml.safe_dump({"dataset_name": str(data)}))
    (policy / "train_results.json").write_text("{}")
    rows = sample(policy, None, tmp_path / "pairs", "--reward_funcs", "my_rewards.words")  # the policy's own data
    for row in (*rows["train"], *rows["test"]):
        assert row["prompt"] in asked, "a conversation became a text"
        for side in ("chosen", "rejected"):
            [message] = row[side]
            assert message["role"] == "assistant" and len(message["content"]) == row[f"reward_{side}"]
    again = load_pairs(DataArguments(dataset_name=str(tmp_path / "pairs")), tokenizer, 96)["train"]
    assert again.summary["pairs_kept"] == len(rows["train"]) and bool(again.summary["templated"]) == bool(template)


def test_rewards_that_do_not_differ_give_no_pairs(
    policy: Path, task: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "my_flat.py").write_text("def flat(prompts, **kwargs):\n    return [1.0] * len(prompts)\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match=r"24 prompts gave 0 pairs to train on"):
        sample(policy, task / "data", tmp_path / "pairs", "--reward_funcs", "my_flat.flat")
    assert not list((tmp_path / "pairs").glob("*")), "something half-made was left behind"


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """The recipes of a round, as small as they get."""
    small = {
        "pairs": {"num_prompts": 24, "samples_per_prompt": 4, "held_out_prompts": 0.25, "max_length": 96},
        "dpo-on-policy": {"max_steps": 2, "learning_rate": 1e-3},
        "evaluate": {"num_prompts": 8, "max_length": 96},
    }
    for name, changed in small.items():
        keys = yaml.safe_load((ROOT / f"recipes/quickstart/{name}.yaml").read_text())
        if "reward_funcs" in keys:
            changed["reward_funcs"] = ["tinydpo.toy_task.gold_reward"]
        (tmp_path / f"recipe/{name}.yaml").parent.mkdir(exist_ok=True)
        (tmp_path / f"recipe/{name}.yaml").write_text(yaml.safe_dump(keys | changed))
    return tmp_path / "recipe"


def test_rounds_continue_and_keep_their_first_reference(
    policy: Path, task: Path, recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
):
    runs = tmp_path / "runs"
    argv = ["--recipe", recipe, "--output_dir", runs, "--seed", "3", "--model_name_or_path", policy]
    argv = [*map(str, argv), "--dataset_name", str(task / "data")]
    monkeypatch.setattr(evaluate, "write_report", lambda *folders: None)  # its figures take most of the time
    round_script.main([*argv, "--rounds", "1"])
    first_files = [runs / "round-1" / name for name in ("pairs/train.jsonl", "dpo/model.safetensors")]
    written = [path.stat().st_mtime_ns for path in first_files]
    evaluated: list[str] = []
    run_evaluation = evaluate.main
    monkeypatch.setattr(evaluate, "main", lambda argv: (evaluated.append(" ".join(argv)), run_evaluation(argv)))
    os.utime(recipe / "evaluate.yaml")  # as if a reward had been added
    round_script.main([*argv, "--rounds", "1"])
    assert len(evaluated) == 1, "the table has figures of an older evaluate.yaml"
    evaluated.clear()
    capsys.readouterr()
    round_script.main([*argv, "--rounds", "2"])
    out = capsys.readouterr().out
    assert [path.stat().st_mtime_ns for path in first_files] == written, "a finished round was made again"
    assert len(evaluated) == 2 and "round-1/evaluation" not in " ".join(evaluated)

    config = yaml.safe_load((runs / "round-2/dpo/run_config.yaml").read_text())
    assert config["model_name_or_path"] == str(runs / "round-1/dpo"), "it does not continue from the last policy"
    assert config["ref_model_name_or_path"] == str(policy), "the reference moves with the rounds"
    assert config["dataset_name"] == str(runs / "round-2/pairs"), "it trains on another policy's answers"
    assert config["seed"] == 3
    pairs = json.loads((runs / "round-2/pairs" / on_policy.PAIRS_RESULTS).read_text())["settings"]
    assert pairs["model_name_or_path"] == str(runs / "round-1/dpo"), "not the last policy's answers"
    assert pairs["dataset_name"] == str(task / "data"), "not the prompts of the data"

    result = json.loads((runs / "rounds.json").read_text())
    assert result["reward"] == "gold_reward" and (runs / "rounds.png").stat().st_size > 10_000
    lines = result["rounds"]
    assert [line["name"] for line in lines] == ["SFT", "round-1", "round-2"]
    for line in lines[1:]:
        evaluation = json.loads((runs / line["name"] / "evaluation/eval_results.json").read_text())
        assert evaluation["settings"]["ref_model_name_or_path"] == str(policy), "KL is not from the SFT model"
        assert line["kl"] == evaluation["kl_per_sequence"] and line["reward"] == evaluation["reward_policy"]
    over = json.loads((runs / "round-2/evaluation-before/eval_results.json").read_text())
    assert over["settings"]["ref_model_name_or_path"] == str(runs / "round-1/dpo")
    assert lines[2]["over_before"] == over["win_rate_vs_ref"], "not the win rate over the round before"
    assert all(line["name"] in out for line in lines), "the table lacks a round"


def test_all_rounds_use_the_splits_of_the_first_model(recipe: Path, tmp_path: Path):
    config = {"dataset_name": "runs/quickstart/data", "dataset_test_split": "validation", "max_train_pairs": 900}
    config["dataset_train_split"] = "train[:2000]"
    read = {"column": ["question=prompt"], "dataset_data_dir": "helpful-base", "on_bad_row": "skip"}
    config |= read
    (tmp_path / "run_config.yaml").write_text(yaml.safe_dump(config))
    first = {"model_name_or_path": str(tmp_path)}
    for stage in ("pairs", "evaluate"):
        flags = round_script.get_data_flags(RoundArguments(recipe=str(recipe)), stage, first)
        splits = {"dataset_train_split": "train[:2000]", "dataset_test_split": "validation", "max_train_pairs": 900}
        assert flags == splits | read, "from round 2 on, other rows would be held out, or read in another way"
        args = RoundArguments(recipe=str(recipe), dataset_name="other.jsonl")
        assert round_script.get_data_flags(args, stage, first) == splits | {
            "dataset_name": "other.jsonl", "dataset_train_split": "train",
        }  # fmt: skip


def test_rounds_without_data_or_recipe_are_one_sentence(policy: Path, recipe: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(dpo, "main", lambda argv: pytest.fail("it trains"))
    keys = yaml.safe_load((recipe / "evaluate.yaml").read_text())
    del keys["dataset_name"]  # the default would be the policy's data: its own answers
    (recipe / "evaluate.yaml").write_text(yaml.safe_dump(keys))
    argv = ["--recipe", str(recipe), "--model_name_or_path", str(policy)]
    with pytest.raises(UserError, match=r"evaluate.yaml names no dataset; pass --dataset_name"):
        round_script.main(argv)
    (recipe / "evaluate.yaml").unlink()
    with pytest.raises(UserError, match=r"no file .*evaluate.yaml"):
        round_script.main(argv)
