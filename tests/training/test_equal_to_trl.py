"""Packed rows give TRL's own numbers: log-probs, losses, metrics and gradients, for every loss and model family."""

import gc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from datasets import Dataset
from engines import (
    ROW_LENGTH,
    StockDPOTrainer,
    assert_close,
    assert_same_log,
    assert_same_step,
    build,
    first_batch,
    nudge,
    tiny_gpt2,
    uneven_pairs,
)
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
from trl import RewardTrainer, SFTTrainer

from tinydpo.training.reward_trainer import FittedRewardTrainer, PackedRewardTrainer
from tinydpo.training.trainers import (
    FittedDPOTrainer,
    FittedSFTTrainer,
    PackedSFTTrainer,
    SharedPrefixDPOTrainer,
    build_sft_rows,
)

pytestmark = pytest.mark.usefixtures("one_thread")
LORA = LoraConfig(r=4, target_modules=["c_attn", "c_fc"], fan_in_fan_out=True, task_type="CAUSAL_LM")
PLAIN_LOSSES = ("sigmoid", "hinge", "ipo", "nca_pair", "bco_pair", "sppo_hard", "aot", "aot_unpaired", "apo_zero",
                "apo_down", "sft", "sigmoid_norm")  # fmt: skip
SETTINGS = {
    **{loss: {"loss_type": [loss]} for loss in PLAIN_LOSSES},
    **{loss: {"loss_type": [loss], "label_smoothing": 0.1} for loss in ("exo_pair", "robust")},
    "discopop": {"loss_type": ["discopop"], "discopop_tau": 1.0},  # at 0.05 it magnifies rounding 20 times
    **{f: {"f_divergence_type": f} for f in ("forward_kl", "js_divergence", "alpha_divergence")},
    "ld_alpha": {"ld_alpha": 0.5, "precompute_ref_log_probs": True},
    "use_weighting": {"use_weighting": True},
    "two losses": {"loss_type": ["sigmoid", "sft"], "loss_weights": [0.7, 0.3]},
    "cached": {"precompute_ref_log_probs": True},
    "new LoRA": {"peft_config": LORA},
    "LoRA continued": {"precompute_ref_log_probs": True},
}
SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 256}  # fmt: skip
FAMILIES = {  # attention is sdpa in one half and eager in the other
    "Llama": ("sdpa", SMALL),
    "Qwen2": ("eager", SMALL),
    "GPTNeoX": ("sdpa", SMALL),
    "Gemma3Text": ("eager", SMALL | {"sliding_window": ROW_LENGTH}),
}


@pytest.fixture(scope="module", autouse=True)
def quick_gc() -> Iterator[None]:
    """`train` collects garbage; what the imports left need not be gone through every time."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="module")
def gpt2(tiny_tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_gpt2(tiny_tokenizer, tmp_path_factory.mktemp("gpt2"))


@pytest.fixture(scope="module")
def pairs(tiny_tokenizer: Any) -> Dataset:
    return uneven_pairs(8, len(tiny_tokenizer))


@pytest.fixture
def trainer(gpt2: str, tiny_tokenizer: Any, pairs: Dataset, tmp_path: Path) -> Callable:
    """Build a trainer whose policy is not its reference."""

    def make(engine: type, rows: Dataset = pairs, model: Any = gpt2, **settings: Any) -> Any:
        made = build(engine, model, tiny_tokenizer, rows, tmp_path, **settings)
        nudge(made.model)
        return made

    return make


def continue_adapter(base: str) -> Any:
    torch.manual_seed(0)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LORA)
    nudge(model, 0.1)
    return model


@pytest.mark.parametrize("name", SETTINGS)
def test_a_dpo_step_is_that_of_trl(name: str, trainer: Callable, gpt2: str):
    stock, packed = (
        trainer(engine, model=continue_adapter(gpt2) if name == "LoRA continued" else gpt2, **SETTINGS[name])
        for engine in (StockDPOTrainer, SharedPrefixDPOTrainer)
    )
    if "precompute_ref_log_probs" in SETTINGS[name]:
        for column in ("ref_chosen_logps", "ref_rejected_logps"):
            assert_close(*(torch.tensor(made.train_dataset[column][:]) for made in (packed, stock)), column)
    assert_same_step(packed, stock)
    assert abs(stock.state.log_history[0]["rewards/chosen"]) > 1e-3, "policy and reference are the same here"


@pytest.mark.parametrize("family", FAMILIES)
def test_a_step_of_every_family_is_that_of_trl(family: str, trainer: Callable, tiny_tokenizer: Any):
    attention, settings = FAMILIES[family]

    def make(engine: type) -> Any:
        torch.manual_seed(0)
        config = getattr(transformers, f"{family}Config")(
            vocab_size=len(tiny_tokenizer), initializer_range=0.3, **settings
        )
        model = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
        made = trainer(engine, model=model, precompute_ref_log_probs=True)
        nudge(made.model, 0.1)
        return made

    stock, packed = (make(engine) for engine in (StockDPOTrainer, SharedPrefixDPOTrainer))
    batch = first_batch(packed)
    with torch.no_grad():
        right = torch.cat(packed.compute_ref_log_probs(packed.model, batch))
        one_segment = torch.zeros_like(batch["packed"]["segment_ids"])
        for wrong in (
            {"segment_ids": one_segment, "prefix_ids": one_segment},
            {"position_ids": one_segment},
        ):
            moved = torch.cat(packed.compute_ref_log_probs(packed.model, batch | {"packed": batch["packed"] | wrong}))
            assert (moved - right).abs().median() > 1e-2, f"this model does not show whether {[*wrong]} matter"
    assert_same_step(packed, stock)


@pytest.mark.parametrize("completion_only", [True, False])
@pytest.mark.parametrize("loss_type", ["nll", "dft"])
def test_an_sft_step_is_that_of_trl(loss_type: str, completion_only: bool, trainer: Callable, pairs: Dataset):
    rows = build_sft_rows(pairs, completion_only)
    stock, packed = (trainer(engine, rows, loss_type=loss_type) for engine in (SFTTrainer, PackedSFTTrainer))
    assert_same_step(packed, stock)


@pytest.mark.parametrize("center", [None, 0.01])
@pytest.mark.parametrize("family", ["GPT2", "Llama"])
def test_a_reward_step_is_that_of_trl(
    family: str, center: float | None, trainer: Callable, gpt2: str, pairs: Dataset, tiny_tokenizer: Any
):
    """Most answers come to their end, whose token pads; one is nothing but that, one prompt ends with it too."""
    rows, end = pairs.to_list(), tiny_tokenizer.eos_token_id
    tiny_tokenizer.pad_token = tiny_tokenizer.eos_token
    for row in rows[:6]:
        row["chosen_ids"] += [end]
        row["rejected_ids"] += [end]
    rows[1]["chosen_ids"] = [end]
    rows[2] |= {"prompt_ids": [*rows[2]["prompt_ids"], end], "rejected_ids": [end]}
    both = ("chosen_ids", "rejected_ids")
    joined = [{name: row["prompt_ids"] + row[name] for name in both} for row in rows]  # as TRL takes them

    def make(engine: type) -> Any:
        torch.manual_seed(0)
        if family == "GPT2":
            model = AutoModelForSequenceClassification.from_pretrained(gpt2, num_labels=1)
        else:
            config = transformers.LlamaConfig(
                vocab_size=len(tiny_tokenizer), initializer_range=0.3, num_labels=1, **SMALL
            )
            model = AutoModelForSequenceClassification.from_config(config)
        data = Dataset.from_list(joined if engine is RewardTrainer else rows)
        return trainer(engine, data, model=model, center_rewards_coefficient=center)

    stock = make(RewardTrainer)
    for engine in (PackedRewardTrainer, FittedRewardTrainer):
        ours = make(engine)
        with torch.no_grad():
            scores = [made.model(**first_batch(made)).logits for made in (ours, stock)]
        assert_close(*scores, f"{engine.__name__}: scores")
        assert scores[0].std() > 0.1, "all answers have the same score: nothing is compared"
        assert_same_step(ours, make(RewardTrainer))


def test_sft_examples_of_one_row_do_not_see_each_other(trainer: Callable, pairs: Dataset):
    packed = trainer(PackedSFTTrainer, build_sft_rows(pairs))

    def token_logps(rows: Dataset) -> torch.Tensor:
        with torch.no_grad():
            return packed.model(**packed.data_collator(list(rows)), fused_lm_head=True).log_probs

    rows = packed.train_dataset
    together = token_logps(rows)
    assert len(packed.data_collator(list(rows))["packed"]["input_ids"]) < len(rows), "no row holds two examples"
    for i in range(len(rows)):
        alone = token_logps(rows.select([i]))[0]
        torch.testing.assert_close(together[i, : len(alone)], alone, rtol=1e-4, atol=1e-5, msg="neighbours leak")


ENGINES = {
    "dpo": (StockDPOTrainer, SharedPrefixDPOTrainer, FittedDPOTrainer),
    "sft": (SFTTrainer, PackedSFTTrainer, FittedSFTTrainer),
}


@pytest.mark.parametrize("stage", ENGINES)
def test_a_run_is_that_of_trl(stage: str, trainer: Callable, tiny_tokenizer: Any):
    """Several epochs of uneven batches, accumulated, recomputed in the backward pass; padded rows as well as packed."""
    rows = uneven_pairs(24, len(tiny_tokenizer), seed=1)
    rows = build_sft_rows(rows) if stage == "sft" else rows
    logs = []
    for engine in ENGINES[stage]:
        made = trainer(
            engine, rows, max_steps=12, learning_rate=2e-3, per_device_train_batch_size=4,
            gradient_accumulation_steps=2, activation_checkpointing=True, gradient_checkpointing=True,
        )  # fmt: skip
        made.train()
        logs.append(made.state.log_history)
    stock, packed, padded = logs
    assert stock[11]["loss"] < 0.9 * stock[0]["loss"], "too little is learnt to compare"
    assert_same_log(packed, stock, rel=1e-3, small=5e-5)
    assert_same_log(padded, stock, rel=1e-3, small=5e-5)


@pytest.mark.parametrize("autocast", [False, True], ids=["weights in bfloat16", "autocast"])
def test_bfloat16_rounds_no_worse_than_padded_rows(
    autocast: bool, trainer: Callable, tiny_tokenizer: Any, tmp_path: Path
):
    folder = tiny_gpt2(tiny_tokenizer, tmp_path / "model", initializer_range=0.1)
    pairs = uneven_pairs(60, len(tiny_tokenizer))

    def ref_logps(engine: type, low: bool) -> torch.Tensor:
        """Of the same weights, rounded to bfloat16, whatever computes."""
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
        model = model if low and not autocast else model.float()
        made = trainer(engine, pairs, model=model, bf16=low and autocast, precompute_ref_log_probs=True,
                       precompute_ref_batch_size=16)  # fmt: skip
        return torch.tensor([made.train_dataset[f"ref_{part}_logps"][:] for part in ("chosen", "rejected")])

    exact = ref_logps(FittedDPOTrainer, low=False)
    padded, packed = (
        (ref_logps(engine, low=True) - exact).abs().median() for engine in (FittedDPOTrainer, SharedPrefixDPOTrainer)
    )
    assert padded > 1e-3, "nothing was computed in bfloat16"
    assert packed <= 1.5 * padded, f"packed rows lose precision: {packed:.2e} in the median, padded {padded:.2e}"


def test_each_engine_has_its_own_reference_cache(trainer: Callable, task: Path, tiny_tokenizer: Any):
    from tinydpo.config.arguments import DataArguments
    from tinydpo.data.pairs import load_pairs

    data = load_pairs(DataArguments(dataset_name=str(task / "data")), tiny_tokenizer, 128)["test"].pairs

    def cached(engine: type) -> set[str]:
        made = trainer(engine, data, precompute_ref_log_probs=True)
        return {file["filename"] for file in made.train_dataset.cache_files}

    padded, packed, again = (
        cached(engine) for engine in (FittedDPOTrainer, SharedPrefixDPOTrainer, SharedPrefixDPOTrainer)
    )
    assert padded != packed, "one engine reads the reference log-probs that the other computed"
    assert again == packed, "the reference pass runs again although nothing changed"
