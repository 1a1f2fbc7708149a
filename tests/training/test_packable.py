"""Models that cannot take packed rows are refused before the first step, in one sentence that says what to do."""

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from datasets import Dataset
from engines import ROW_LENGTH, build, tiny_gpt2, uneven_pairs
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedModel

from tinydpo.errors import UserError
from tinydpo.models.precision import float32_mode, get_compute_dtype, set_compute_dtype, use_float32_head
from tinydpo.training.logps import pair_logps
from tinydpo.training.reward_trainer import PackedRewardTrainer
from tinydpo.training.trainers import FittedDPOTrainer, PackedSFTTrainer, SharedPrefixDPOTrainer

SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 256}  # fmt: skip
WINDOW = SMALL | {"sliding_window": ROW_LENGTH - 1}
GLOBAL_AND_LOCAL = {"num_layers": 2, "num_heads": 2, "attention_types": [[["global", "local"], 1]], "window_size": 32}
REFUSED = {
    "Mistral": (WINDOW, "attends over 159 tokens, but packed rows have up to 160"),
    "Qwen2": (WINDOW | {"use_sliding_window": True, "max_window_layers": 0}, "attends over 159 tokens"),
    "Gemma2": (WINDOW, "attends over 159 tokens"),
    "GPTNeo": ({"hidden_size": 32} | GLOBAL_AND_LOCAL, "attends over 32 tokens"),
    "Mpt": ({"d_model": 32, "n_layers": 2, "n_heads": 2}, "takes no position ids"),
    "Falcon": ({"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "alibi": True}, "packed rows"),
    "RecurrentGemma": (SMALL | {"attention_window_size": 256}, "gives different results in packed rows"),
    "Mixtral": (SMALL | {"num_local_experts": 2, "sliding_window": None}, "mixture of experts"),
}


def make_model(family: str, tokenizer: Any, **settings: Any) -> PreTrainedModel:
    """Random weights, large enough that it matters what is seen and where."""
    torch.manual_seed(0)
    end = tokenizer.eos_token_id
    config = getattr(transformers, f"{family}Config")(
        vocab_size=len(tokenizer), bos_token_id=end, eos_token_id=end, pad_token_id=end, **settings
    )
    config.initializer_range = 0.2
    return AutoModelForCausalLM.from_config(config).eval()


@pytest.fixture(scope="module")
def pairs(tiny_tokenizer: Any) -> Dataset:
    return uneven_pairs(8, len(tiny_tokenizer))


@pytest.mark.parametrize("family", REFUSED)
def test_families_that_packed_rows_get_wrong_are_refused(
    family: str, tiny_tokenizer: Any, pairs: Dataset, tmp_path: Path
):
    settings, reason = REFUSED[family]
    make_model(family, tiny_tokenizer, **settings).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=rf"^{family}.*{reason}.* pass --shared_prefix false, [^\n]+$"):
        build(SharedPrefixDPOTrainer, str(tmp_path), tiny_tokenizer, pairs, tmp_path)


def test_attention_without_4d_masks_is_refused(tiny_tokenizer: Any, pairs: Dataset, tmp_path: Path):
    model = make_model("Llama", tiny_tokenizer, **SMALL)
    model.set_attn_implementation("flex_attention")
    with pytest.raises(UserError, match=r"flex_attention.*--attn_implementation sdpa, or .*--shared_prefix false"):
        build(SharedPrefixDPOTrainer, model, tiny_tokenizer, pairs, tmp_path, precompute_ref_log_probs=True)


def sabotage(model: PreTrainedModel, kind: str, *, modes: tuple[bool, ...] = (False, True)) -> PreTrainedModel:
    """Have a model go by something else than position ids and mask, in plain and packed rows alike, in some modes."""
    forward = model.base_model.forward

    @functools.wraps(forward)
    def other(input_ids: torch.Tensor, attention_mask: torch.Tensor, position_ids: Any = None, **kwargs: Any) -> Any:
        if model.training not in modes:
            return forward(input_ids, attention_mask=attention_mask, position_ids=position_ids, **kwargs)
        if kind == "ignores both":
            return forward(input_ids, **kwargs)
        if kind == "ignores positions":
            return forward(input_ids, attention_mask=attention_mask, **kwargs)
        if kind == "ignores the mask":
            return forward(input_ids, position_ids=position_ids, **kwargs)
        places = torch.arange(input_ids.shape[1])
        distance = places[:, None] - places
        if attention_mask.dim() == 2:
            seen = (distance >= 0) & attention_mask[:, None, None].bool()
        else:
            seen = attention_mask == 0
        dtype = get_compute_dtype(model)
        lowest = torch.finfo(dtype).min
        if kind == "attends over a window":
            seen = seen & (distance < 16)
        mask = torch.zeros(seen.shape, dtype=dtype).masked_fill(~seen, lowest)
        if kind == "weighs places in the row":  # ALiBi
            mask = (mask - 0.1 * distance).clamp(min=lowest).to(dtype)
        return forward(input_ids, attention_mask=mask, position_ids=position_ids, **kwargs)

    model.base_model.forward = other
    return model


@pytest.mark.parametrize("training", [False, True], ids=["in the reference pass", "in training"])
@pytest.mark.parametrize("kind", ["ignores positions", "ignores the mask"])
def test_a_model_that_ignores_inputs_is_caught_before_the_first_step(
    kind: str, training: bool, tiny_tokenizer: Any, pairs: Dataset, tmp_path: Path
):
    model = AutoModelForCausalLM.from_pretrained(tiny_gpt2(tiny_tokenizer, tmp_path))
    sabotage(model, kind, modes=(training,))
    with pytest.raises(
        UserError, match=r"^GPT2LMHeadModel gives different results in packed .* --shared_prefix false"
    ):
        build(SharedPrefixDPOTrainer, model, tiny_tokenizer, pairs, tmp_path, precompute_ref_log_probs=True)


def test_a_leak_between_sft_examples_is_caught(tiny_tokenizer: Any, tmp_path: Path):
    """The first batches may hold one example a row; the check fills a row."""
    model = AutoModelForCausalLM.from_pretrained(tiny_gpt2(tiny_tokenizer, tmp_path))
    sabotage(model, "ignores both", modes=(True,))
    rows = Dataset.from_dict({"input_ids": [list(range(40))] * 8, "labels": [[-100] * 20 + list(range(20, 40))] * 8})
    with pytest.raises(UserError, match="gives different results in packed rows"):
        build(PackedSFTTrainer, model, tiny_tokenizer, rows, tmp_path)


def test_a_reward_model_that_ignores_positions_is_caught(tiny_tokenizer: Any, pairs: Dataset, tmp_path: Path):
    tiny_tokenizer.pad_token = tiny_tokenizer.eos_token
    folder = tiny_gpt2(tiny_tokenizer, tmp_path)
    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1)
    sabotage(model, "ignores positions", modes=(True,))
    with pytest.raises(UserError, match="gives different results in packed rows"):
        build(PackedRewardTrainer, model, tiny_tokenizer, pairs, tmp_path)


PRECISIONS = {
    "float32": lambda model: model,
    "bf16 autocast": lambda model: set_compute_dtype(model, torch.bfloat16),
    "bf16 weights": lambda model: use_float32_head(model.bfloat16()),
    "fp16 weights": lambda model: use_float32_head(model.half()),
}


@pytest.mark.parametrize("precision", PRECISIONS)
def test_rounding_neither_refuses_a_model_nor_hides_a_wrong_one(precision: str, tiny_tokenizer: Any):
    """Evaluation, which takes any model, has the same check."""
    pairs = uneven_pairs(12, len(tiny_tokenizer))

    def make() -> PreTrainedModel:
        return PRECISIONS[precision](make_model("Llama", tiny_tokenizer, **SMALL))

    pair_logps(make(), pairs, row_length=ROW_LENGTH)
    for kind in ("ignores positions", "ignores the mask", "attends over a window", "weighs places in the row"):
        with pytest.raises(UserError, match="packed rows"):
            pair_logps(sabotage(make(), kind), pairs, row_length=ROW_LENGTH)
            pytest.fail(f"a model that {kind} is not refused")


def test_the_check_multiplies_in_float32(tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch):
    model = set_compute_dtype(make_model("Llama", tiny_tokenizer, **SMALL), torch.bfloat16)
    linear = torch.nn.functional.linear
    precisions = []

    def record(*args: Any) -> torch.Tensor:
        precisions.append(torch.get_float32_matmul_precision())
        return linear(*args)

    monkeypatch.setattr(torch.nn.functional, "linear", record)
    tokens = torch.ones(1, 4, dtype=torch.long)
    with float32_mode(model):
        model(tokens)
    assert precisions and set(precisions) == {"highest"}, "TF32's rounding would count as the model's error"
    model(tokens)
    assert precisions[-1] == "medium", "outside of the check the head multiplies slowly"


def test_dropout_is_refused_in_packed_rows_only(tiny_tokenizer: Any, pairs: Dataset, tmp_path: Path):
    model = tiny_gpt2(tiny_tokenizer, tmp_path, resid_pdrop=0.1)
    with pytest.raises(UserError, match=r"dropout off; leave --disable_dropout true, or pass --shared_prefix false"):
        build(SharedPrefixDPOTrainer, model, tiny_tokenizer, pairs, tmp_path, disable_dropout=False)
    build(FittedDPOTrainer, model, tiny_tokenizer, pairs, tmp_path, disable_dropout=False).train()
