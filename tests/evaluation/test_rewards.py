"""Rewards: functions in TRL's form, and reward models."""

import copy
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import GPT2Config, GPT2ForSequenceClassification

from tinydpo.errors import UserError
from tinydpo.evaluation.arguments import RewardArguments
from tinydpo.evaluation.rewards import load_reward, load_rewards, score_answers

pytestmark = pytest.mark.usefixtures("one_thread")


def test_reward_functions_are_summed_and_checked():
    texts = Dataset.from_dict({"prompt": ["p", "q"], "messages": [None, None], "templated": [False, False]})

    def length(prompts: list[str], completions: list[str], completion_ids: list, **kwargs: Any) -> list[float]:
        return [float(len(text) + len(ids)) for text, ids in zip(completions, completion_ids, strict=True)]

    assert score_answers([length, length], texts, ["ab", ""], [[1], []]).tolist() == [[3.0, 0.0]] * 2
    for broken in (lambda **_: [1.0], lambda **_: [None, 1.0], lambda **_: [math.nan, 1.0], lambda **_: 1 / 0):
        with pytest.raises(UserError, match="reward function"):
            score_answers([broken], texts, ["ab", ""], [[1], []])


@pytest.mark.parametrize("name", ["no_dot", "no.such.module.f", "json.no_such_function"])
def test_unknown_reward_function_is_one_sentence(name: str):
    with pytest.raises(UserError, match="--reward_funcs") as caught:
        load_reward(name)
    assert "\n" not in str(caught.value) and name in str(caught.value)


def save_classifier(folder: Path, tokenizer: Any, labels: int) -> Any:
    torch.manual_seed(0)
    shape = {"vocab_size": len(tokenizer), "n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 64}
    model = GPT2ForSequenceClassification(GPT2Config(**shape, num_labels=labels, initializer_range=0.3)).eval()
    model.save_pretrained(folder)
    saved = copy.deepcopy(tokenizer)
    saved.padding_side = "left"  # as some are, and GPT-2 counts such padding as positions
    saved.save_pretrained(folder)
    return model


def test_reward_model_scores_prompt_and_answer_as_one_text(tmp_path: Path, tiny_tokenizer: Any):
    model = save_classifier(tmp_path, tiny_tokenizer, labels=1)
    (reward,) = load_rewards(RewardArguments(reward_model_name_or_path=str(tmp_path)), "cpu", batch_size=2)
    prompts, answers = ["How?", "Why is the sky blue?", "a"], [" So.", " Because it is.", " b" * 200]
    ids = [tiny_tokenizer(p + a).input_ids[-64:] for p, a in zip(prompts, answers, strict=True)]
    with torch.no_grad():
        alone = [model(torch.tensor([one])).logits.item() for one in ids]
    scores = reward(prompts=prompts, completions=answers)
    assert scores == pytest.approx(alone, abs=1e-4), "padding, or cutting a long text, changes its reward"
    assert RewardArguments(reward_funcs=["a.b"], reward_model_name_or_path="org/model").name() == "b + model"


def test_reward_model_computes_blocks_in_bf16_and_scores_in_float32(tmp_path: Path, tiny_tokenizer: Any):
    model = save_classifier(tmp_path, tiny_tokenizer, labels=1)
    model.score.weight.data *= 100  # scores of tens, where bf16 has steps of an eighth and more
    model.save_pretrained(tmp_path)
    args, texts = RewardArguments(reward_model_name_or_path=str(tmp_path)), [f" {word}." for word in "abcdefgh"]
    exact, short = (
        np.array(load_rewards(args, "cpu", 3, dtype)[0](prompts=["How?"] * 8, completions=texts))
        for dtype in (torch.float32, torch.bfloat16)
    )
    assert 0 < np.abs(short - exact).max() < 0.05 * np.ptp(exact), "blocks are not computed in bf16"
    assert (short != torch.tensor(short).bfloat16().double().numpy()).all(), "scores are rounded to bf16"


def test_model_that_was_not_trained_to_reward_is_refused(tmp_path: Path, task: Path, tiny_tokenizer: Any):
    save_classifier(tmp_path, tiny_tokenizer, labels=2)
    for name, message in ((tmp_path, "2 outputs"), (task / "base", "lacks score.weight")):
        with pytest.raises(UserError, match=message):
            load_rewards(RewardArguments(reward_model_name_or_path=str(name)), "cpu", batch_size=2)
