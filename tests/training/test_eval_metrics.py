"""Evaluation during training: the same numbers as scripts/evaluate.py, whatever the batch."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from engines import build, first_batch, nudge, tiny_gpt2, uneven_pairs, without_clocks
from peft import LoraConfig
from transformers import AutoModelForCausalLM

from tinydpo.evaluation.metrics import pair_metrics
from tinydpo.models.precision import set_compute_dtype
from tinydpo.training.logps import pair_logps
from tinydpo.training.reward_trainer import FittedRewardTrainer, PackedRewardTrainer
from tinydpo.training.trainers import (
    FittedDPOTrainer,
    FittedSFTTrainer,
    PackedSFTTrainer,
    SharedPrefixDPOTrainer,
    build_sft_rows,
)

BATCHES = (17, 7, 1)  # 17 pairs: in one batch, in batches with a short last one, one by one
LORA = LoraConfig(r=4, target_modules=["c_attn"], fan_in_fan_out=True, task_type="CAUSAL_LM")


@pytest.fixture(scope="module")
def gpt2(tiny_tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_gpt2(tiny_tokenizer, tmp_path_factory.mktemp("gpt2"), initializer_range=0.1)


@pytest.fixture(scope="module")
def pairs(tiny_tokenizer: Any) -> Dataset:
    return uneven_pairs(17, len(tiny_tokenizer))


@pytest.fixture
def trainer(gpt2: str, tiny_tokenizer: Any, pairs: Dataset, tmp_path: Path) -> Callable:
    def make(engine: type, rows: Dataset = pairs, **settings: Any) -> Any:
        tiny_tokenizer.pad_token = tiny_tokenizer.eos_token
        made = build(engine, gpt2, tiny_tokenizer, rows, tmp_path, eval_dataset=rows, **settings)
        nudge(made.model)
        return made

    return make


def evaluate(made: Any, batch: int = 17) -> dict[str, float]:
    made.args.per_device_eval_batch_size = batch
    metrics = without_clocks(made.evaluate())
    del metrics["epoch"]
    return metrics


@pytest.mark.parametrize(
    "settings",
    [{}, {"precompute_ref_log_probs": True}, {"peft_config": LORA}, {"loss_type": ["sigmoid", "sft"]}],
    ids=["reference model", "reference first", "LoRA", "RPO"],
)
@pytest.mark.parametrize("engine", [SharedPrefixDPOTrainer, FittedDPOTrainer])
def test_dpo_metrics_are_those_of_evaluate(engine: type, settings: dict, trainer: Callable, gpt2: str, pairs: Dataset):
    made = trainer(engine, **settings)
    if "peft_config" in settings:
        nudge(made.model, 0.1)  # an adapter is small
    policy = made.model.eval()
    reference = AutoModelForCausalLM.from_pretrained(gpt2).eval()
    logps, ref_logps = pair_logps(policy, pairs), pair_logps(reference, pairs)
    expected = pair_metrics(logps, ref_logps, made.beta)
    assert (logps.chosen - ref_logps.chosen).std() > 0.1, "policy and reference are the same here"
    expected = {
        "eval_loss": expected["dpo_loss"],
        "eval_rewards/accuracies": expected["reward_accuracy"],
        "eval_rewards/margins": expected["reward_margin"],
        "eval_rewards/chosen": made.beta * (logps.chosen - ref_logps.chosen).mean(),
        "eval_rewards/rejected": made.beta * (logps.rejected - ref_logps.rejected).mean(),
        "eval_logps/chosen": logps.chosen.mean(),
        "eval_logps/rejected": logps.rejected.mean(),
    }
    for batch in BATCHES:
        assert evaluate(made, batch) == pytest.approx(expected, rel=1e-4, abs=1e-5), f"in batches of {batch}"


def test_dpo_metrics_with_ld_alpha_are_those_that_trl_logs_of_one_batch(trainer: Callable):
    made = trainer(SharedPrefixDPOTrainer, precompute_ref_log_probs=True, ld_alpha=0.5)
    metrics = evaluate(made)
    made.train()
    logged = made.state.log_history[0]
    for name in ("rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies", "logps/chosen"):
        assert metrics[f"eval_{name}"] == pytest.approx(logged[name], rel=1e-4), name
    assert metrics["eval_loss"] == pytest.approx(logged["loss"], rel=1e-4)


@pytest.mark.parametrize("engine", [PackedSFTTrainer, FittedSFTTrainer])
def test_sft_loss_is_the_nll_of_evaluate(engine: type, trainer: Callable, pairs: Dataset):
    made = trainer(engine, build_sft_rows(pairs), loss_type="dft")
    logps = pair_logps(made.model.eval(), pairs)
    nll = -logps.chosen.sum() / logps.chosen_tokens.sum()
    for batch in BATCHES:
        assert evaluate(made, batch) == pytest.approx({"eval_loss": nll}, rel=1e-4)


@pytest.mark.parametrize("engine", [PackedRewardTrainer, FittedRewardTrainer])
def test_reward_metrics_are_means_over_pairs(engine: type, trainer: Callable):
    made = trainer(engine, center_rewards_coefficient=0.01)
    made.model.eval()
    with torch.no_grad():
        scores = made.model(**first_batch(made)).logits.flatten()
    margins = scores[:17] - scores[17:]
    expected = {
        "eval_loss": -torch.nn.functional.logsigmoid(margins).mean(), "eval_accuracy": (margins > 0).float().mean(),
        "eval_margin": margins.mean(), "eval_min_reward": scores.min(), "eval_mean_reward": scores.mean(),
        "eval_max_reward": scores.max(),
    }  # fmt: skip
    for batch in BATCHES:
        assert evaluate(made, batch) == pytest.approx({k: v.item() for k, v in expected.items()}, rel=1e-4, abs=1e-5)


def test_metrics_in_bf16_are_those_of_evaluate_in_bf16(trainer: Callable, gpt2: str, pairs: Dataset):
    """Blocks round in a different order in rows that are packed differently; head and softmax are float32 in both."""
    made = trainer(SharedPrefixDPOTrainer, bf16=True)
    metrics = evaluate(made)
    policy, reference = (AutoModelForCausalLM.from_pretrained(gpt2).eval() for _ in range(2))
    nudge(policy)
    for model in (policy, reference):
        set_compute_dtype(model, torch.bfloat16)
    expected = pair_metrics(pair_logps(policy, pairs), pair_logps(reference, pairs), made.beta)
    assert metrics["eval_rewards/margins"] == pytest.approx(expected["reward_margin"], abs=5e-3)
    assert metrics["eval_logps/chosen"] == pytest.approx(pair_logps(policy, pairs).chosen.mean(), rel=1e-4)


def test_training_evaluates_and_keeps_the_best_checkpoint(trainer: Callable):
    """Callbacks and `load_best_model_at_end` read what the evaluation returns."""
    made = trainer(
        SharedPrefixDPOTrainer, max_steps=6, eval_strategy="steps", eval_steps=2, save_strategy="steps", save_steps=2,
        load_best_model_at_end=True, metric_for_best_model="eval_loss", learning_rate=1e-3,
    )  # fmt: skip
    made.train()
    losses = [entry["eval_loss"] for entry in made.state.log_history if "eval_loss" in entry]
    assert len(losses) == 3 and made.state.best_metric == min(losses)
    assert evaluate(made)["eval_loss"] == pytest.approx(min(losses), rel=1e-4), "not the best checkpoint's weights"
