"""Packed rows give TRL's own numbers: log-probs, losses, metrics and gradients, for every loss and model family."""

import gc
import inspect
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from datasets import Dataset
from engines import (
    ENGINES,
    ROW_LENGTH,
    StockDPOTrainer,
    assert_close,
    assert_same_log,
    assert_same_step,
    build,
    first_batch,
    join_prompts,
    nudge,
    uneven_pairs,
)
from peft import LoraConfig, get_peft_model
from running import ROOT
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, HfArgumentParser
from trl import DPOConfig, DPOTrainer, RewardTrainer, SFTTrainer
from trl.trainer.utils import add_fused_lm_head

from tinydpo.training.reward_trainer import FittedRewardTrainer, PackedRewardTrainer
from tinydpo.training.trainers import PackedSFTTrainer, SharedPrefixDPOTrainer, build_sft_rows

LORA = LoraConfig(r=4, target_modules=["c_attn", "c_fc"], fan_in_fan_out=True, task_type="CAUSAL_LM")
# The rows of docs/losses.md: the flags in their first column -> the first loss in their last.
PAGE = (ROOT / "docs/losses.md").read_text(encoding="utf-8")


def read_flags(cell: str) -> str:
    """What to type: a bare name is a loss."""
    names = re.findall(r"`([^`]+)`", cell)
    return " ".join(name if name.startswith("--") else f"--loss_type {name}" for name in names)


ROWS = [re.split(r"(?<!\\)\|", line)[1:-1] for line in PAGE.splitlines() if line.startswith("| `")]
FIRST_LOSS = {read_flags(row[0]): row[-1].strip() for row in ROWS if "`--loss_type`" not in row[0]}
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
def pairs(tiny_tokenizer: Any) -> Dataset:
    return uneven_pairs(8, len(tiny_tokenizer))


@pytest.fixture
def trainer(gpt2: str, tiny_tokenizer: Any, pairs: Dataset, tmp_path: Path) -> Callable:
    def make(engine: type, rows: Dataset = pairs, model: Any = gpt2, **settings: Any) -> Any:
        return build(engine, model, tiny_tokenizer, rows, tmp_path, **settings)

    return make


def find_values_in_source(name: str) -> set[str]:
    """The values that TRL's loss compares `name` with."""
    return set(re.findall(rf'{name} == "(\w+)"', inspect.getsource(DPOTrainer._compute_loss)))


def test_the_page_names_every_loss_of_trl():
    losses = find_values_in_source("loss_type")
    assert len(losses) >= 15, "TRL's losses cannot be read off its source any more"
    assert losses == {flags.split()[1] for flags in FIRST_LOSS if re.match(r"--loss_type \w+( --|$)", flags)}
    divergences = set(re.findall(r"--f_divergence_type (\w+)", PAGE)) | {"reverse_kl"}  # the default
    assert divergences == find_values_in_source("f_divergence_type")


def test_trl_still_reads_the_size_of_its_tiles():
    """The package sets it for speed alone: no result would show that it has a new name."""
    assert "_CHUNKED_LOGPROB_CHUNK_SIZE" in inspect.getsource(add_fused_lm_head), "setting it has no effect any more"


def parse_flags(flags: str) -> dict[str, Any]:
    args = [*flags.split(), "--output_dir", "unused", "--bf16", "false", "--use_cpu", "true"]
    (config,) = HfArgumentParser(DPOConfig).parse_args_into_dataclasses(args)
    names = [flag.removeprefix("--") for flag in flags.split() if flag.startswith("--")]
    return {name: getattr(config, name) for name in names}


@pytest.mark.parametrize("flags", FIRST_LOSS)
def test_every_row_of_the_page_is_as_it_says_and_as_trl_has_it(flags: str, trainer: Callable):
    settings = parse_flags(flags)
    if "discopop_tau" in settings:
        settings["discopop_tau"] = 1.0  # 0.05 magnifies rounding 20 times
    stock, packed = (trainer(engine, **settings) for engine in (StockDPOTrainer, SharedPrefixDPOTrainer))
    if FIRST_LOSS[flags] and "discopop" not in flags:
        with torch.no_grad():
            loss = packed.compute_loss(packed.model.train(), first_batch(packed))
        packed._metrics["train"].clear()
        packed._total_train_tokens = 0
        assert loss.item() == pytest.approx(float(FIRST_LOSS[flags]), abs=6e-4), "the page has a different first loss"
    for made in (stock, packed):
        nudge(made.model)
    assert_same_step(packed, stock)
    assert abs(stock.state.log_history[0]["rewards/chosen"]) > 1e-3, "policy and reference are the same here"


def continue_adapter(base: str) -> Any:
    torch.manual_seed(0)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LORA)
    nudge(model, 0.1)
    return model


@pytest.mark.parametrize("adapter", ["none", "new", "continued"])
@pytest.mark.parametrize("ld_alpha", [None, 0.5])
def test_a_step_with_cached_log_probs_matches_trl(adapter: str, ld_alpha: float | None, trainer: Callable, gpt2: str):
    def make(engine: type) -> Any:
        model = continue_adapter(gpt2) if adapter == "continued" else gpt2
        settings = {"peft_config": LORA} if adapter == "new" else {}
        return trainer(engine, model=model, precompute_ref_log_probs=True, ld_alpha=ld_alpha, **settings)

    stock, packed = make(StockDPOTrainer), make(SharedPrefixDPOTrainer)
    for column in ("ref_chosen_logps", "ref_rejected_logps"):
        assert_close(*(torch.tensor(made.train_dataset[column][:]) for made in (packed, stock)), column)
    for made in (stock, packed):
        nudge(made.model)
    assert_same_step(packed, stock)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_step_of_every_family_matches_trl(family: str, trainer: Callable, tiny_tokenizer: Any):
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
        for wrong in ({"segment_ids": one_segment, "prefix_ids": one_segment}, {"position_ids": one_segment}):
            moved = torch.cat(packed.compute_ref_log_probs(packed.model, batch | {"packed": batch["packed"] | wrong}))
            assert (moved - right).abs().median() > 1e-2, f"this model does not show whether {[*wrong]} matter"
    assert_same_step(packed, stock)


@pytest.mark.parametrize("completion_only", [True, False])
@pytest.mark.parametrize("loss_type", ["nll", "dft"])
def test_an_sft_step_matches_trl(loss_type: str, completion_only: bool, trainer: Callable, pairs: Dataset):
    rows = build_sft_rows(pairs, completion_only)
    stock, packed = (trainer(engine, rows, loss_type=loss_type) for engine in (SFTTrainer, PackedSFTTrainer))
    assert_same_step(packed, stock)


@pytest.mark.parametrize("center", [None, 0.01])
def test_a_reward_step_matches_trl(
    center: float | None, trainer: Callable, gpt2: str, pairs: Dataset, tiny_tokenizer: Any
):
    """Most answers come to their end, whose token pads; one is nothing but that, one prompt ends with it too."""
    rows, end = pairs.to_list(), tiny_tokenizer.eos_token_id
    tiny_tokenizer.pad_token = tiny_tokenizer.eos_token
    for row in rows[:6]:
        row["chosen_ids"] += [end]
        row["rejected_ids"] += [end]
    rows[1]["chosen_ids"] = [end]
    rows[2] |= {"prompt_ids": [*rows[2]["prompt_ids"], end], "rejected_ids": [end]}
    rows = Dataset.from_list(rows)

    def make(engine: type) -> Any:
        torch.manual_seed(0)
        model = AutoModelForSequenceClassification.from_pretrained(gpt2, num_labels=1)
        data = join_prompts(rows) if engine is RewardTrainer else rows
        return trainer(engine, data, model=model, center_rewards_coefficient=center)

    stock = make(RewardTrainer)
    for engine in (PackedRewardTrainer, FittedRewardTrainer):
        ours = make(engine)
        with torch.no_grad():
            scores = [made.model(**first_batch(made)).logits for made in (ours, stock)]
        assert_close(*scores, f"{engine.__name__}: scores")
        assert scores[0].std() > 0.1, "all answers have the same score: nothing is compared"
        assert_same_step(ours, make(RewardTrainer))


@pytest.mark.parametrize("stage", ["dpo", "sft"])
def test_a_run_matches_trl(stage: str, trainer: Callable, tiny_tokenizer: Any):
    """Several epochs of uneven batches, accumulated, recomputed in the backward pass; padded rows too."""
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
    stock, padded, packed = logs
    assert stock[11]["loss"] < 0.9 * stock[0]["loss"], "too little is learnt to compare"
    assert_same_log(packed, stock, rel=1e-3, small=5e-5)
    assert_same_log(padded, stock, rel=1e-3, small=5e-5)
