"""Model families in packed rows: the same numbers as TRL's, or one sentence that says how to run without them."""

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from datasets import Dataset
from engines import DPO, ROW_LENGTH, SFT, assert_close, assert_same_step, build, first_batch, nudge, uneven_pairs
from transformers import PreTrainedModel

from tinydpo.errors import UserError

pytestmark = pytest.mark.usefixtures("one_thread")
SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 256}  # fmt: skip
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 160}
FAMILIES = {
    "GPT2": GPT2,
    "Llama": SMALL,
    "Qwen2": SMALL,
    "Qwen3": SMALL,
    "GPTNeoX": SMALL,
    "Mistral": SMALL | {"sliding_window": ROW_LENGTH},
    "Gemma3": SMALL | {"sliding_window": ROW_LENGTH},
}
WINDOW = {"sliding_window": ROW_LENGTH - 1}
TOO_SHORT = "attends over 159 tokens, but packed rows have up to 160"
REFUSED = {
    "Mistral": (SMALL | WINDOW, TOO_SHORT),
    "Qwen2": (SMALL | WINDOW | {"use_sliding_window": True, "max_window_layers": 0}, TOO_SHORT),
    "Phi3": (SMALL | WINDOW, TOO_SHORT),
    "Gemma2": (SMALL | WINDOW, TOO_SHORT),
    "Gemma3": (SMALL | WINDOW, TOO_SHORT),
    "GPTNeo": (
        {"hidden_size": 32, "num_layers": 2, "num_heads": 2, "attention_types": [[["global", "local"], 1]],
         "window_size": 32},
        "attends over 32 tokens",
    ),
    "Mpt": ({"d_model": 32, "n_layers": 2, "n_heads": 2}, "takes no position ids"),
    "Bloom": ({"hidden_size": 32, "n_layer": 2, "n_head": 2}, "takes no position ids"),
    "Falcon": ({"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "alibi": True}, "packed rows"),
    "RecurrentGemma": (SMALL | {"attention_window_size": 256}, "gives other log-probs in packed rows"),
    "Mixtral": (SMALL | {"num_local_experts": 2, "sliding_window": None}, "experts"),
}  # fmt: skip


def tiny(family: str, settings: dict, tokenizer: Any, attention: str | None = None) -> PreTrainedModel:
    """Random weights, large enough that it matters what is seen and where."""
    torch.manual_seed(0)
    end = tokenizer.eos_token_id
    config = getattr(transformers, "Gemma3TextConfig" if family == "Gemma3" else f"{family}Config")(
        vocab_size=len(tokenizer), bos_token_id=end, eos_token_id=end, pad_token_id=end, **settings
    )
    config.initializer_range = 0.3
    for rate in (name for name in vars(config) if name.endswith(("dropout", "pdrop"))):
        setattr(config, rate, 0.0)
    model = getattr(transformers, "GPT2LMHeadModel" if family == "GPT2" else f"{family}ForCausalLM")
    return model._from_config(config, attn_implementation=attention).eval()


@pytest.fixture(scope="module")
def pairs(tiny_tokenizer: Any) -> Dataset:
    return uneven_pairs(8, len(tiny_tokenizer))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_step_is_that_of_trl(family: str, attention: str, tiny_tokenizer: Any, pairs: Dataset, tmp_path: Path):
    stock, packed = trainers = [
        build(engine, tiny(family, FAMILIES[family], tiny_tokenizer, attention), tiny_tokenizer, pairs, tmp_path,
              precompute_ref_log_probs=True)
        for engine in DPO
    ]  # fmt: skip
    for trainer in trainers:
        nudge(trainer.model, 0.1)

    def logps(trainer: Any, **changed: torch.Tensor) -> torch.Tensor:
        batch = first_batch(trainer)
        if changed:
            batch["packed"] |= changed
        return torch.cat(trainer.compute_ref_log_probs(trainer.model, batch))

    alone, together, rows = logps(stock), logps(packed), first_batch(packed)["packed"]
    assert_close(together, alone, "a sequence's log-prob")
    same = torch.zeros_like(rows["segment_ids"])  # one segment, in which all see all before them; one position
    for leak in ({"segment_ids": same, "prefix_ids": same}, {"position_ids": same}):
        off = (logps(packed, **leak) - alone).abs().median()
        assert off > 1e-2, f"this model cannot tell whether {[*leak]} are heeded: the log-probs move by {off:.1e}"
    assert_same_step(packed, stock)


@pytest.mark.parametrize("cached", [True, False], ids=["reference first", "reference beside"])
@pytest.mark.parametrize("family", REFUSED)
def test_what_cannot_go_in_packed_rows_is_refused(
    family: str, cached: bool, tiny_tokenizer: Any, pairs: Dataset, tmp_path: Path
):
    settings, told = REFUSED[family]
    tiny(family, settings, tiny_tokenizer).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=rf"^{family}.*{told}.* pass --shared_prefix false, [^\n]+$"):
        build(DPO[1], str(tmp_path), tiny_tokenizer, pairs, tmp_path, precompute_ref_log_probs=cached).train()


def test_attention_without_4d_masks_is_refused(tiny_tokenizer: Any, pairs: Dataset, tmp_path: Path):
    model = tiny("Llama", SMALL, tiny_tokenizer, "flex_attention")
    with pytest.raises(
        UserError, match=r"flex_attention.* pass --attn_implementation sdpa, or .*--shared_prefix false"
    ):
        build(DPO[1], model, tiny_tokenizer, pairs, tmp_path, precompute_ref_log_probs=True)


def deafen(model: PreTrainedModel, *ignored: str, training: bool) -> None:
    """Have a model that takes these inputs by its signature drop them in one of its modes."""
    forward = model.transformer.forward

    @functools.wraps(forward)
    def deaf(*args: Any, **kwargs: Any) -> Any:
        return forward(*args, **{k: v for k, v in kwargs.items() if k not in ignored or model.training != training})

    model.transformer.forward = deaf


@pytest.mark.parametrize("training", [False, True], ids=["in the reference pass", "in training"])
@pytest.mark.parametrize("ignored", ["position_ids", "attention_mask"])
def test_what_ignores_its_inputs_is_caught_before_the_first_step(
    ignored: str, training: bool, tiny_tokenizer: Any, pairs: Dataset, tmp_path: Path
):
    model = tiny("GPT2", GPT2, tiny_tokenizer)
    deafen(model, ignored, training=training)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(UserError, match=r"^GPT2LMHeadModel gives other log-probs in packed .* --shared_prefix false"):
        build(DPO[1], model, tiny_tokenizer, pairs, tmp_path, precompute_ref_log_probs=True).train()
    now = model.state_dict()
    assert all(now[name].equal(value) for name, value in before.items()), "a step was taken before the check"


def test_what_leaks_between_equally_long_examples_is_caught(tiny_tokenizer: Any, tmp_path: Path):
    """Rows that several examples share come later, where lengths differ; the check is over by then."""
    model = tiny("GPT2", GPT2, tiny_tokenizer)
    deafen(model, "position_ids", "attention_mask", training=True)
    rows = Dataset.from_dict({"input_ids": [list(range(40))] * 8, "labels": [[-100] * 20 + list(range(20, 40))] * 8})
    with pytest.raises(UserError, match="gives other log-probs in packed rows"):
        build(SFT[1], model, tiny_tokenizer, rows, tmp_path).train()
