"""Reward models: packed rows give TRL's own scores, losses and gradients, one value however pairs come in batches."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from engines import (
    ROW_LENGTH,
    Gradients,
    assert_close,
    assert_same_log,
    first_batch,
    gradients,
    tiny_gpt2,
    uneven_pairs,
)
from transformers import AutoModelForSequenceClassification, LlamaConfig, LlamaForCausalLM
from trl import RewardConfig, RewardTrainer

from tinydpo.errors import UserError
from tinydpo.training.reward_trainer import FittedRewardTrainer, PackedRewardTrainer

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def pairs(tiny_tokenizer: Any) -> Dataset:
    """Most answers come to their end, whose token pads; one is nothing but that, one prompt ends with it too."""
    rows, end = uneven_pairs(9, len(tiny_tokenizer)).to_list(), tiny_tokenizer.eos_token_id
    for row in rows[:6]:
        row["chosen_ids"] += [end]
        row["rejected_ids"] += [end]
    rows[1]["chosen_ids"] = [end]
    rows[2] |= {"prompt_ids": [*rows[2]["prompt_ids"], end], "rejected_ids": [end]}
    return Dataset.from_list(rows)


@pytest.fixture(scope="module")
def models(tiny_tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    torch.manual_seed(0)
    llama = tmp_path_factory.mktemp("llama")
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=len(tiny_tokenizer), max_position_embeddings=160, initializer_range=0.3, **shape)
    LlamaForCausalLM(config).save_pretrained(llama)
    return {"gpt2": tiny_gpt2(tiny_tokenizer, tmp_path_factory.mktemp("gpt2")), "llama": str(llama)}


@pytest.fixture
def trainer(models: dict[str, str], tiny_tokenizer: Any, tmp_path: Path) -> Callable:
    def make(engine: type, data: Dataset, model: Any = "gpt2", **settings: Any) -> Any:
        defaults = {
            "per_device_train_batch_size": len(data), "max_steps": 1, "learning_rate": 1e-2, "max_grad_norm": 0.0,
            "max_length": 128, "gradient_checkpointing": False, "use_cpu": True, "bf16": False, "logging_steps": 1,
            "save_strategy": "no", "report_to": "none", "disable_tqdm": True, "output_dir": str(tmp_path),
        }  # fmt: skip
        tiny_tokenizer.pad_token = tiny_tokenizer.eos_token
        held_out = settings.pop("eval_dataset", None)
        return engine(
            model=models.get(model, model) if isinstance(model, str) else model,
            args=RewardConfig(**defaults | settings),
            train_dataset=data,
            eval_dataset=held_out,
            processing_class=tiny_tokenizer,
            callbacks=[Gradients()],
            **({"row_length": ROW_LENGTH} if engine is PackedRewardTrainer else {}),
        )

    return make


def joined(pairs: Dataset) -> Dataset:
    """As TRL's own trainer takes tokens: each answer behind its prompt."""
    both = ("chosen_ids", "rejected_ids")
    return pairs.map(lambda row: {name: row["prompt_ids"] + row[name] for name in both}).select_columns(list(both))


@pytest.mark.parametrize("center", [None, 0.01], ids=["plain", "centered"])
@pytest.mark.parametrize("model", ["gpt2", "llama"])
def test_a_step_is_that_of_trl(model: str, center: float | None, trainer: Callable, pairs: Dataset):
    settings = {"model": model, "center_rewards_coefficient": center}
    stock = trainer(RewardTrainer, joined(pairs), **settings)
    ours = {engine: trainer(engine, pairs, **settings) for engine in (PackedRewardTrainer, FittedRewardTrainer)}
    with torch.no_grad():
        theirs = stock.model(**first_batch(stock)).logits
    assert theirs.std() > 0.1, "all answers are scored alike: nothing is compared"
    for engine, made in ours.items():
        with torch.no_grad():
            assert_close(made.model(**inputs(made)).logits, theirs, f"{engine.__name__}: scores")
    for made in (stock, *ours.values()):
        made.train()
    log = figures(stock.state.log_history[0])
    assert log["accuracy"] not in (0, 1) and log["loss"] > 0.1, f"nothing is compared: {log}"
    for engine, made in ours.items():
        assert figures(made.state.log_history[0]) == pytest.approx(log, rel=1e-4, abs=1e-5), f"{engine.__name__} logs"
        assert set(gradients(made)) == set(gradients(stock)), "other parameters are trained"
        whole = torch.stack([gradient.norm() for gradient in gradients(stock).values()]).norm()
        for name, gradient in gradients(stock).items():  # that of GPT-2's last bias is 0: it moves both scores alike
            off = (gradients(made)[name] - gradient).norm() / gradient.norm().clamp(min=1e-4 * whole)
            assert off <= 1e-4, f"{engine.__name__}: the gradient of {name} is off TRL's by {off:.1e} of its norm"


def test_no_prompt_is_computed_twice(trainer: Callable, pairs: Dataset):
    packed = first_batch(trainer(PackedRewardTrainer, pairs))["packed"]
    rows = pairs.to_list()
    once = sum(len(row["prompt_ids"]) + len(row["chosen_ids"]) + len(row["rejected_ids"]) for row in rows)
    assert 0 < packed["tokens"] <= once and int((packed["segment_ids"] >= 0).sum()) == packed["tokens"]


def inputs(made: Any) -> dict[str, Any]:
    return {name: value for name, value in first_batch(made).items() if name != "tokens"}


def figures(entry: dict[str, float]) -> dict[str, float]:
    off = ("runtime", "per_second", "preparation_time", "total_flos")
    return {name: value for name, value in entry.items() if not name.endswith(off)}


@pytest.mark.parametrize("engine", [PackedRewardTrainer, FittedRewardTrainer], ids=["packed", "padded"])
def test_figures_do_not_depend_on_the_batch(engine: type, trainer: Callable, pairs: Dataset):
    def evaluated(batch: int) -> dict[str, float]:
        return figures(trainer(engine, pairs, eval_dataset=pairs, per_device_eval_batch_size=batch).evaluate())

    whole = evaluated(16)
    scores = trainer(engine, pairs).model(**inputs(trainer(engine, pairs))).logits.flatten().detach()
    margins = scores[:9] - scores[9:]
    for name, value in {
        "loss": -torch.nn.functional.logsigmoid(margins).mean(), "accuracy": (margins > 0).float().mean(),
        "margin": margins.mean(), "min_reward": scores.min(), "max_reward": scores.max(),
    }.items():  # fmt: skip
        assert whole[f"eval_{name}"] == pytest.approx(value.item(), rel=1e-4), f"{name} is not what its name says"
    for batch in (1, 2, 4):
        assert evaluated(batch) == pytest.approx(whole, rel=1e-4, abs=1e-5), f"others with batches of {batch}"


def test_a_step_does_not_depend_on_its_micro_batches(trainer: Callable, pairs: Dataset):
    """Over 6 pairs: one batch of 8; or 4 and 2, or 2 and 2 and 2, or one at a time."""
    steps = {}
    for batch in (8, 4, 2, 1):
        steps[batch] = trainer(
            PackedRewardTrainer, pairs.select(range(6)), per_device_train_batch_size=batch,
            gradient_accumulation_steps=8 // batch,
        )  # fmt: skip
        steps[batch].train()
        assert_same_log(*([figures(entry) for entry in steps[b].state.log_history] for b in (batch, 8)))
        for name, gradient in gradients(steps[8]).items():
            off = (gradients(steps[batch])[name] - gradient).norm() / gradient.norm().clamp(min=1e-6)
            assert off < 1e-3, f"{batch} pairs at a time train otherwise: {name}'s gradient is off by {off:.1e}"


def test_scores_are_float32_whatever_the_blocks_compute_in(trainer: Callable, pairs: Dataset):
    made = trainer(PackedRewardTrainer, pairs, bf16=True)
    with torch.no_grad(), made.accelerator.autocast():
        scores = made.model(**inputs(made)).logits
    assert scores.dtype == torch.float32, f"two scores differ by steps of {scores.dtype}"
    exact = trainer(PackedRewardTrainer, pairs)
    with torch.no_grad():
        assert 0 < (scores - exact.model(**inputs(exact)).logits).abs().max() < 0.1, "nothing was in bfloat16, or all"


def test_a_model_that_ignores_positions_is_refused(models: dict[str, str], trainer: Callable, pairs: Dataset):
    model = AutoModelForSequenceClassification.from_pretrained(models["gpt2"], num_labels=1)
    plain = model.transformer.forward
    model.transformer.forward = lambda *args, position_ids=None, **kwargs: plain(*args, **kwargs)
    with pytest.raises(UserError, match="position"):
        trainer(PackedRewardTrainer, pairs, model=model)
