"""Rewards: functions are covered by test_evaluation; here reward models, and what only looks like one."""

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import GPT2Config, GPT2ForSequenceClassification

from tinydpo.errors import UserError
from tinydpo.evaluation.rewards import RewardArguments, load_rewards

pytestmark = pytest.mark.usefixtures("one_thread")


def save(folder: Path, tokenizer: Any, labels: int) -> Any:
    torch.manual_seed(0)
    shape = {"vocab_size": len(tokenizer), "n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 64}
    model = GPT2ForSequenceClassification(GPT2Config(**shape, num_labels=labels, initializer_range=0.3)).eval()
    model.save_pretrained(folder)
    saved = copy.deepcopy(tokenizer)
    saved.padding_side = "left"  # as some are, and GPT-2 counts such padding as positions
    saved.save_pretrained(folder)
    return model


def test_a_reward_model_scores_prompt_and_answer_as_one_text(tmp_path: Path, tiny_tokenizer: Any):
    model = save(tmp_path, tiny_tokenizer, labels=1)
    (reward,) = load_rewards(RewardArguments(reward_model_name_or_path=str(tmp_path)), "cpu", batch_size=2)
    prompts, answers = ["How?", "Why is the sky blue?", "a"], [" So.", " Because it is.", " b" * 200]
    with torch.no_grad():
        alone = [
            model(torch.tensor([tiny_tokenizer(p + a)["input_ids"][-64:]])).logits.item()
            for p, a in zip(prompts, answers, strict=True)
        ]
    assert reward(prompts=prompts, completions=answers) == pytest.approx(alone, abs=1e-4), (
        "padding, or cutting a long text, changes its reward"
    )
    assert RewardArguments(reward_funcs=["a.b"], reward_model_name_or_path="org/model").name() == "b + model"


def test_a_reward_model_computes_as_the_policy_does_and_scores_in_float32(tmp_path: Path, tiny_tokenizer: Any):
    model = save(tmp_path, tiny_tokenizer, labels=1)
    model.score.weight.data *= 100  # scores of tens, where bf16 has steps of an eighth and more
    model.save_pretrained(tmp_path)
    args, texts = RewardArguments(reward_model_name_or_path=str(tmp_path)), [f" {word}." for word in "abcdefgh"]
    exact, short = (
        np.array(load_rewards(args, "cpu", 3, dtype)[0](prompts=["How?"] * 8, completions=texts))
        for dtype in (torch.float32, torch.bfloat16)
    )
    assert 0 < np.abs(short - exact).max() < 0.05 * np.ptp(exact), "blocks are not computed in what was asked for"
    assert (short != torch.tensor(short).bfloat16().double().numpy()).all(), "scores are rounded to bf16"


def test_a_model_that_was_not_trained_to_reward_is_refused(tmp_path: Path, task: Path, tiny_tokenizer: Any):
    save(tmp_path, tiny_tokenizer, labels=2)
    for name, told in ((tmp_path, "2 outputs"), (task / "base", "no trained head")):
        with pytest.raises(UserError, match=told):  # a head of random weights gives random rewards, without a word
            load_rewards(RewardArguments(reward_model_name_or_path=str(name)), "cpu", batch_size=2)
