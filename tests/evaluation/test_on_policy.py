"""On-policy pairs: the better above the worse by a known reward, prompts on one side, the same bytes however cut."""

import json
import shutil
import sys
from collections import Counter
from pathlib import Path
from runpy import run_path
from typing import Any

import datasets
import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from running import ROOT, call, run
from transformers import AutoModelForCausalLM, AutoTokenizer

from tinydpo.config.arguments import DataArguments
from tinydpo.data.pairs import load_pairs
from tinydpo.data.splits import SHARED_PROMPT_NOTE
from tinydpo.errors import UserError
from tinydpo.evaluation import on_policy, sampling
from tinydpo.evaluation.on_policy import ScoredAnswer, make_pairs
from tinydpo.report.page import write_report
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
    model, folder = AutoModelForCausalLM.from_pretrained(tiny_model), tmp_path_factory.mktemp("policy") / "sft"
    end = model.transformer.wte.weight[model.config.eos_token_id]
    with torch.no_grad():
        model.transformer.ln_f.bias.copy_(4.3 * end / end.square().sum())
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(folder)
    return folder


def sample_pairs(policy: Path, data: Path, folder: Path, *flags: str) -> dict[str, list[dict[str, Any]]]:
    given = {"model_name_or_path": policy, "dataset_name": data, "output_dir": folder, "num_prompts": 24,
             "samples_per_prompt": 4, "test_split_size": 0.25, "max_length": 96}  # fmt: skip
    argv = [part for name, value in given.items() for part in (f"--{name}", str(value))]
    reward = [] if "--reward_funcs" in flags else ["--reward_funcs", "tinydpo.toy_task.gold_reward"]
    run_path(str(ROOT / "scripts/sample_pairs.py"))["main"]([*argv, *reward, *flags])
    read = {split: (folder / f"{split}.jsonl").read_text().splitlines() for split in ("train", "test")}
    return {split: [*map(json.loads, lines)] for split, lines in read.items()}


@given(ANSWERS)
def test_a_pair_is_of_unlike_answers_the_better_first(answers: list[ScoredAnswer]):
    every = make_pairs(answers, "all")
    for better, worse in every:
        assert better.reward > worse.reward, "the worse answer is the chosen one"
        assert better.ended, "chosen is an answer that ran out of room: training would put an end in its middle"
        assert better.text != worse.text and better.text.strip() and worse.text.strip()
    assert not [pair for pair, count in Counter((b.text, w.text) for b, w in every).items() if count > 1]
    best = make_pairs(answers, "best_worst")
    assert len(best) == bool(every), "a prompt with unlike answers gives no pair, or several"
    widest = max((better.reward - worse.reward for better, worse in every), default=None)
    assert not best or best[0][0].reward - best[0][1].reward == widest, "not the best against the worst"


def test_pairs_are_right_and_train(policy: Path, task: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    rows = sample_pairs(policy, task / "data", tmp_path / "pairs")
    assert len(rows["train"]) > 8 and len(rows["test"]) > 2, "too few pairs to show anything"
    for row in (*rows["train"], *rows["test"]):
        scores = gold_reward([row["prompt"]] * 2, [row["chosen"], row["rejected"]])
        assert scores == pytest.approx([row["reward_chosen"], row["reward_rejected"]]), "not the answers' own rewards"
        assert scores[0] > scores[1], "the worse answer is the chosen one"
    prompts = {split: [row["prompt"] for row in rows[split]] for split in rows}
    assert not set(prompts["train"]) & set(prompts["test"]), "a prompt is trained on and held out"
    assert len(set(prompts["train"])) == len(prompts["train"]), "best against worst gave a prompt several pairs"
    asked = [json.loads(line)["chosen"] for line in (task / "data/train.jsonl").read_text().splitlines()]
    for prompt in prompts["train"] + prompts["test"]:
        assert any(dialogue.startswith(prompt) for dialogue in asked), "a prompt is not one of the train split"
    card, made = (
        (tmp_path / "pairs/README.md").read_text(),
        json.loads((tmp_path / "pairs" / on_policy.PAIRS_RESULTS).read_text()),
    )
    assert "gold_reward" in card and made["settings"]["weights"][:12] in card and "seed 0" in card
    assert str(tmp_path) not in card, "the card leaks a path"
    assert made["counts"]["train_pairs"] == len(rows["train"]) and made["counts"]["answers"] == 24 * 4
    again = load_pairs(DataArguments(dataset_name=str(tmp_path / "pairs")), AutoTokenizer.from_pretrained(policy), 96)
    assert [again[split].summary["pairs_kept"] for split in rows] == [len(rows[split]) for split in rows]
    assert not again["train"].summary["notes"], "pairs made here are told to hold what is not read"
    assert SHARED_PROMPT_NOTE not in again["test"].summary["notes"]
    run("dpo", "--model_name_or_path", policy, "--dataset_name", tmp_path / "pairs", "--output_dir", tmp_path / "dpo",
        "--max_steps", "1", "--save_strategy", "no")  # fmt: skip
    capsys.readouterr()
    sample_pairs(policy, task / "data", tmp_path / "pairs")
    assert "holds these pairs" in capsys.readouterr().out, "whole pairs were made again"
    with pytest.raises(UserError, match=r"seed: 0.*seed: 1.*--output_dir"):
        sample_pairs(policy, task / "data", tmp_path / "pairs", "--seed", "1")


def test_the_same_seed_gives_the_same_bytes_however_often_it_is_cut(
    policy: Path, task: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(on_policy, "AT_ONCE", 8)
    answer, made = sampling.sample_answers, []

    def counting(*args: Any, **kwargs: Any) -> Any:
        if len(made) == 2 and cut:
            raise KeyboardInterrupt
        made.append(1)
        return answer(*args, **kwargs)

    monkeypatch.setattr(sampling, "sample_answers", counting)
    flags, cut = ["--seed", "7", "--pair_by", "all"], True
    with pytest.raises(KeyboardInterrupt):
        sample_pairs(policy, task / "data", tmp_path / "one/pairs", *flags)
    assert not [name for name in FILES if (tmp_path / "one/pairs" / name).exists()], "half of the pairs were written"
    cut = False
    rows = sample_pairs(policy, task / "data", tmp_path / "one/pairs", *flags)
    assert len(made) == 3, "what was sampled before the cut was sampled again"
    assert len(rows["train"]) > 24, "all pairs are no more than one a prompt"
    shutil.rmtree(Path(datasets.config.HF_DATASETS_CACHE) / "tinydpo-answers")
    sample_pairs(policy, task / "data", tmp_path / "two/pairs", *flags)
    assert len(made) == 6, "the second run was to sample for itself"
    for name in FILES:
        one, two = ((tmp_path / folder / "pairs" / name).read_bytes() for folder in ("one", "two"))
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
    said = [[{"role": "assistant", "content": word}] for word in ("Yes.", "No.")]
    asked = [
        [{"role": "system", "content": "Be brief."}, {"role": "user", "content": f"Is {i} odd?"}] for i in range(24)
    ]
    lines = [json.dumps({"prompt": prompt, "chosen": said[0], "rejected": said[1]}) for prompt in asked]
    (tmp_path / "data.jsonl").write_text("\n".join(lines))
    flags = ["--reward_funcs", "my_rewards.words"]
    rows = sample_pairs(policy, tmp_path / "data.jsonl", tmp_path / "pairs", *flags)
    for row in (*rows["train"], *rows["test"]):
        assert row["prompt"] in asked, "a conversation became a text"
        for side in ("chosen", "rejected"):
            [message] = row[side]
            assert message["role"] == "assistant" and len(message["content"]) == row[f"reward_{side}"]
    again = load_pairs(DataArguments(dataset_name=str(tmp_path / "pairs")), tokenizer, 96)["train"]
    assert again.summary["pairs_kept"] == len(rows["train"]) and bool(again.summary["templated"]) == bool(template)


def test_what_gives_no_pairs_is_one_sentence(
    policy: Path, task: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "my_flat.py").write_text("def flat(prompts, **kwargs):\n    return [1.0] * len(prompts)\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match=r"24 prompts gave 0 pairs to train on"):
        sample_pairs(policy, task / "data", tmp_path / "pairs", "--reward_funcs", "my_flat.flat")
    with pytest.raises(UserError, match=r"samples_per_prompt must be at least 2"):
        sample_pairs(policy, task / "data", tmp_path / "pairs", "--samples_per_prompt", "1")
    assert not list((tmp_path / "pairs").glob("*")), "something half-made was left behind"


def test_ctrl_c_is_one_sentence_and_leaves_no_half(policy: Path, task: Path, tmp_path: Path):
    (tmp_path / "my_stop.py").write_text(
        "import os, signal, time\n"
        "def stop(prompts, **kwargs):\n    os.kill(os.getpid(), signal.SIGINT)\n    time.sleep(9)\n"
    )
    given = ["--model_name_or_path", policy, "--dataset_name", task / "data", "--output_dir", tmp_path / "pairs"]
    given += ["--num_prompts", "4", "--samples_per_prompt", "2", "--reward_funcs", "my_stop.stop"]
    done = call(sys.executable, "scripts/sample_pairs.py", *given, PYTHONPATH=f"{ROOT}:{tmp_path}")
    assert done.returncode == 130 and "Traceback" not in done.stderr, f"Ctrl-C shows {done.stderr}"
    assert "stopped by Ctrl-C" in done.stderr and not list((tmp_path / "pairs").glob("*")), "half-made pairs are left"


@pytest.mark.slow
def test_rounds_go_on_and_keep_their_first_reference(
    policy: Path, task: Path, tmp_path: Path, capsys: pytest.CaptureFixture
):
    recipe = tmp_path / "recipe"
    recipe.mkdir()
    small = {"pairs": {"num_prompts": 24, "samples_per_prompt": 4, "test_split_size": 0.25, "batch_size": 64},
             "dpo-on-policy": {"max_steps": 2, "learning_rate": 1e-3},
             "evaluate": {"num_prompts": 16}}  # fmt: skip
    for name, changed in small.items():
        given = yaml.safe_load((ROOT / f"recipes/quickstart/{name}.yaml").read_text())
        (recipe / f"{name}.yaml").write_text(yaml.safe_dump(given | changed))

    def rounds(count: int) -> str:
        argv = ["--recipe", recipe, "--rounds", count, "--output_dir", tmp_path / "runs", "--seed", "3"]
        argv += ["--model_name_or_path", policy, "--dataset_name", task / "data"]
        run_path(str(ROOT / "scripts/round.py"))["main"]([*map(str, argv)])
        return capsys.readouterr().out

    rounds(1)
    files = ["pairs/train.jsonl", "dpo/model.safetensors", "evaluation/eval_results.json"]
    before = [(tmp_path / "runs/round-1" / name).stat().st_mtime_ns for name in files]
    told = rounds(2)
    assert [(tmp_path / "runs/round-1" / name).stat().st_mtime_ns for name in files] == before, "a round came twice"
    second = yaml.safe_load((tmp_path / "runs/round-2/dpo/run_config.yaml").read_text())
    assert second["model_name_or_path"] == str(tmp_path / "runs/round-1/dpo"), "it does not go on from the last policy"
    assert second["ref_model_name_or_path"] == str(policy), "the reference moves with the rounds"
    assert second["dataset_name"] == str(tmp_path / "runs/round-2/pairs"), "it trains on another policy's answers"
    asked = json.loads((tmp_path / "runs/round-2/pairs" / on_policy.PAIRS_RESULTS).read_text())["settings"]
    assert asked["model_name_or_path"] == str(tmp_path / "runs/round-1/dpo"), "not the last policy's answers"
    made = json.loads((tmp_path / "runs/rounds.json").read_text())
    assert made["reward"] == "gold_reward" and (tmp_path / "runs/rounds.png").stat().st_size > 10_000
    lines = made["rounds"]
    assert [line["name"] for line in lines] == ["SFT", "round-1", "round-2"]
    for line in lines[1:]:
        of_sft = json.loads((tmp_path / "runs" / line["name"] / "evaluation/eval_results.json").read_text())
        assert of_sft["settings"]["ref_model_name_or_path"] == str(policy), "KL is not from the SFT model"
        assert line["kl"] == of_sft["kl_per_sequence"] and line["reward"] == of_sft["reward_policy"]
    over = json.loads((tmp_path / "runs/round-2/evaluation-before/eval_results.json").read_text())
    assert over["settings"]["ref_model_name_or_path"] == str(tmp_path / "runs/round-1/dpo")
    assert lines[2]["over_before"] == over["win_rate_vs_ref"], "not the win rate over the round before"
    assert all(line["name"] in told for line in lines), "the table lacks a round"
    assert "on-policy rounds" in write_report(tmp_path / "runs").read_text(), "the report lacks the rounds"
