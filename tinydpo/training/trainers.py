"""TRL's trainers on fitted pairs: losses, metrics, PEFT, checkpoints and logging stay TRL's."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from accelerate.utils import broadcast_object_list
from datasets import Dataset
from datasets.fingerprint import Hasher
from transformers import PreTrainedModel, TrainingArguments
from transformers.integrations import is_deepspeed_zero3_enabled
from trl import DPOTrainer, SFTTrainer
from trl.trainer import dpo_trainer, sft_trainer
from trl.trainer.dpo_trainer import DataCollatorForPreference
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling
from trl.trainer.utils import add_fused_lm_head, disable_dropout_in_model

from tinydpo.data.pairs import MANY_ROWS
from tinydpo.data.splits import hide_progress_bars
from tinydpo.errors import UserError
from tinydpo.models.precision import float32_mode
from tinydpo.training.by_length import ByLength
from tinydpo.training.checkpoints import SealedCheckpointsMixin
from tinydpo.training.means import SPARE, PairsAlike, TokensAlike
from tinydpo.training.packed_forward import (
    INSTEAD,
    check_same_results,
    compile_blocks,
    fill_row,
    get_low_precision_dtype,
    patch_packed_forward,
    take_compile_options,
    unwrap_peft,
)
from tinydpo.training.packing import Tree, pack
from tinydpo.training.reference_cache import hash_split, on_every_machine
from tinydpo.training.throughput import Counts

HEAD = "float32"  # part of the name of cached reference log-probs: earlier ones were rounded to the blocks' dtype


class Float32HeadMixin:
    """For a TRL trainer: its fused LM head computes in float32, outside autocast, for policy and reference alike.

    TRL has it round logits to the blocks' dtype; `models.precision` says what that does to pretrained models.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        """TRL's own arguments."""
        fuse = partial(add_fused_lm_head, cast_lm_head_to_fp32=True)
        with (
            patch.object(dpo_trainer, "add_fused_lm_head", fuse),
            patch.object(sft_trainer, "add_fused_lm_head", fuse),
        ):
            super().__init__(*args, **kwargs)


class TokenCounterMixin:
    """For a TRL trainer: `counted` is what its training steps have computed, without a wait for the device."""

    counted = Counts()

    def training_step(self, model: torch.nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> torch.Tensor:
        """TRL's, counted."""
        self.counted = self.counted.plus(Counts() if inputs.get(SPARE) else self.computed(inputs))
        return super().training_step(model, inputs, *args, **kwargs)

    def computed(self, inputs: dict[str, Any]) -> Counts:
        """What a batch is to compute."""
        rows, packed, mask = inputs["input_ids"], inputs.get("packed"), inputs.get("attention_mask")
        completions = inputs.get("completion_mask")  # SFT's batches have labels
        pairs = len(rows) if completions is None else len(rows) // 2
        if packed:
            return Counts(pairs, packed["tokens"], packed["targets"].numel(), packed["input_ids"].numel())
        if completions is not None:
            scored, prompts = completions.sum(), (mask - completions)[:pairs].sum()
            return Counts(pairs, prompts + scored, scored)
        scored = (inputs["labels"][:, 1:] != -100).sum()
        free = mask is None  # `--packing`: all examples stand in one row
        examples, tokens = (inputs["position_ids"].eq(0).sum(), rows.numel()) if free else (pairs, mask.sum())
        return Counts(examples, tokens, scored)


class FittedDPOTrainer(SealedCheckpointsMixin, ByLength, Float32HeadMixin, TokenCounterMixin, PairsAlike, DPOTrainer):
    """`DPOTrainer` for pairs that are tokens already (`prompt_ids`, `chosen_ids`, `rejected_ids`).

    TRL tokenizes from text and cuts after the first `max_length` tokens, which takes the signal from a third of HH's
    pairs; fitted pairs need neither.
    """

    def _prepare_dataset(self, dataset: Dataset, *args: Any, **kwargs: Any) -> Dataset:
        return dataset

    def cost(self, tokens: Callable[[str], np.ndarray]) -> np.ndarray:
        """Both sequences of a pair are padded to the longer one."""
        return tokens("prompt_ids") + np.maximum(tokens("chosen_ids"), tokens("rejected_ids"))

    def _precompute_ref_logps(self, dataset: Dataset, name: str, batch_size: int) -> Dataset:
        """TRL's own, with all that changes the log-probs in the cache's key, not data and weights alone."""
        if is_deepspeed_zero3_enabled() and isinstance(self._precompute_model_hash, str):
            self._precompute_model_hash = hash_split(self.ref_model or self.model)
        weights = self._precompute_model_hash
        args = self.args
        precision = (args.bf16, args.fp16, args.tf32, self.model.config._attn_implementation)
        self._precompute_model_hash = Hasher.hash((weights, self.ld_alpha, precision, type(self).__name__, HEAD))
        key = broadcast_object_list([Hasher.hash((dataset._fingerprint, self._precompute_model_hash))])[0]
        cached = Path(dataset._get_cache_file_path(key))
        try:
            with on_every_machine(self.accelerator, cached):
                return super()._precompute_ref_logps(dataset, name, batch_size)
        finally:
            self._precompute_model_hash = weights


class FittedSFTTrainer(SealedCheckpointsMixin, ByLength, Float32HeadMixin, TokenCounterMixin, TokensAlike, SFTTrainer):
    """`SFTTrainer` without dropout, for which `SFTConfig`, unlike `DPOConfig`, has no option.

    With it 1 and 2 processes, which draw other masks, would not agree.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        """TRL's own arguments."""
        super().__init__(*args, **kwargs)
        disable_dropout_in_model(self.model)


def build_sft_rows(pairs: Dataset, completion_only: bool = True) -> Dataset:
    """The chosen answers of fitted pairs as `SFTTrainer` reads them without preparing them again.

    Args:
        pairs: rows with `prompt_ids` and `chosen_ids`.
        completion_only: whether prompts carry no loss.

    Returns:
        A row for each, with `input_ids` and `labels` (-100 where a token carries no loss).
    """

    def rows(batch: dict[str, list]) -> dict[str, list]:
        both = list(zip(batch["prompt_ids"], batch["chosen_ids"], strict=True))
        return {
            "input_ids": [prompt + chosen for prompt, chosen in both],
            "labels": [([-100] * len(prompt) if completion_only else prompt) + chosen for prompt, chosen in both],
        }

    with hide_progress_bars(small=len(pairs) < MANY_ROWS):
        return pairs.map(rows, batched=True, remove_columns=pairs.column_names, desc="Joining prompts and answers")


@dataclass(kw_only=True)
class PackedCollator:
    """What both collators below add to TRL's batch: the same tokens as `packed` rows, each prompt once."""

    row_length: int

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        """See TRL's; `packed` is what `packing.pack` returns, and how many `tokens` it holds."""
        trees = [self.tree(row) for row in examples]
        tokens = sum(len(prompt) + sum(map(len, completions)) for prompt, completions in trees)
        return super().torch_call(examples) | {"packed": pack(trees, self.row_length) | {"tokens": tokens}}


@dataclass
class PackedPreferenceCollator(PackedCollator, DataCollatorForPreference):
    """TRL's batch of pairs, and each pair as one tree."""

    def tree(self, row: dict[str, Any]) -> Tree:
        """A pair as one tree."""
        return row["prompt_ids"], (row["chosen_ids"], row["rejected_ids"])


@dataclass
class PackedSFTCollator(PackedCollator, DataCollatorForLanguageModeling):
    """TRL's batch of SFT examples, and each example as one tree."""

    def tree(self, row: dict[str, Any]) -> Tree:
        """What has no label, and at least the first token, is the prompt; the rest the only completion."""
        ids, labels = row["input_ids"], row["labels"]
        first = next((i for i, label in enumerate(labels) if label != -100 and i), len(ids))
        return ids[:first], (ids[first:],)


class PackedTrainerMixin:
    """What packed trainers share: the collator, the model's forward, and the check before the first step."""

    collator: type
    checks = "log-probs"  # what `checked` gives

    def __init__(self, *given: Any, args: TrainingArguments, row_length: int, processing_class: Any, **kwargs: Any):
        """TRL's own arguments, and `row_length`: the most tokens in a packed row.

        Raises:
            UserError: the model does not honour position ids and a 4-D mask, or a setting rules packed rows out.
        """
        tokenizer, self._checked, self._compile = processing_class, set(), take_compile_options(args)
        pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        collator = self.collator(pad_token_id=pad, row_length=row_length)
        super().__init__(*given, args=args, processing_class=processing_class, data_collator=collator, **kwargs)
        self._pack()

    def _pack(self) -> None:
        """Pack the models' forward and check it: before the reference pass and before the run's folder is written."""
        models = [self.model, getattr(self, "ref_model", None)]
        models = [self.accelerator.unwrap_model(model) for model in models if model is not None]
        for model in models:
            self.pack_model(model, self.data_collator.row_length)
        if not (self.is_fsdp_enabled or self.is_deepspeed_enabled):  # those compute nothing before their first step
            before = self.model.training
            for mode in (False, True):
                self._check(self.model.train(mode))
            self.model.train(before)
            for reference in models[1:]:  # it may be of another kind
                self._check(reference)
        for model in models if self._compile else ():
            compile_blocks(unwrap_peft(model), self._compile)
        self._compile = None

    @torch.no_grad()
    def _check(self, model: torch.nn.Module) -> None:
        """Hold one full row of the run's own data against the plain forward, once a model and mode."""
        if (mode := (model is getattr(self, "ref_model", None), model.training)) in self._checked:
            return
        self._checked.add(mode)
        lm, collator = unwrap_peft(self.accelerator.unwrap_model(model)), self.data_collator
        if model.training and any(isinstance(m, torch.nn.Dropout) and m.p > 0 for m in model.modules()):
            raise UserError(f"packed rows need dropout off; leave --disable_dropout true, or {INSTEAD}")
        rows = [self.train_dataset[i] for i in range(min(64, len(self.train_dataset)))]
        trees = fill_row([collator.tree(row) for row in rows], collator.row_length)
        batch = collator([rows[i % len(rows)] for i in range(len(trees))])
        batch["packed"] = pack(trees, collator.row_length, rows=[list(range(len(trees)))])
        batch = self._prepare_inputs(batch)
        split = self.is_fsdp_enabled or self.is_deepspeed_enabled  # in their own precision, whatever is asked here
        dtype = get_low_precision_dtype(lm) or (_get_trainer_dtype(self.args) if split else torch.float32)
        with float32_mode(lm) if dtype == torch.float32 else self.accelerator.autocast():
            alone = partial(self.checked, model, batch)
            check_same_results(lm, partial(alone, packed=batch["packed"]), alone, dtype, self.checks)

    @staticmethod
    def pack_model(model: PreTrainedModel, row_length: int) -> None:
        """Have a model compute `packed` rows, see `pack_forward`."""
        patch_packed_forward(model, row_length)

    @staticmethod
    def checked(model: torch.nn.Module, batch: dict[str, Any], **packed: Any) -> torch.Tensor:
        """What must be the same of a batch both ways: here the answers' token log-probs."""
        mask = batch.get("completion_mask")
        labels = batch["labels"] if mask is None else batch["input_ids"].masked_fill(mask == 0, -100)
        given = {name: batch[name] for name in ("input_ids", "attention_mask")} | packed
        output = model(**given, labels=labels, fused_lm_head=True, use_cache=False)
        return output.log_probs[labels[:, 1:] != -100]


class SharedPrefixDPOTrainer(PackedTrainerMixin, FittedDPOTrainer):
    """`DPOTrainer` for fitted pairs, with each pair's prompt computed once and no padding."""

    collator = PackedPreferenceCollator

    def cost(self, tokens: Callable[[str], np.ndarray]) -> np.ndarray:
        """Each part of a pair is computed once."""
        return sum(map(tokens, ("prompt_ids", "chosen_ids", "rejected_ids")))

    def _precompute_ref_logps(self, dataset: Dataset, name: str, batch_size: int) -> Dataset:
        self._pack()  # TRL calls this from its constructor
        return super()._precompute_ref_logps(dataset, name, batch_size)

    def compute_ref_log_probs(self, model: torch.nn.Module, inputs: dict[str, Any]) -> tuple[torch.Tensor, ...]:
        """TRL's, after the check."""
        self._check(model)
        return super().compute_ref_log_probs(model, inputs)

    def _compute_loss(self, model: torch.nn.Module, inputs: dict[str, Any], return_outputs: bool) -> Any:
        self._check(model)
        if self.ref_model is not None:
            self._check(self.ref_model)
        return super()._compute_loss(model, inputs, return_outputs)


class PackedSFTTrainer(PackedTrainerMixin, FittedSFTTrainer):
    """`SFTTrainer` for rows with `input_ids` and `labels`, without padding."""

    collator = PackedSFTCollator

    def compute_loss(self, model: torch.nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """TRL's, after the check."""
        self._check(model)
        return super().compute_loss(model, inputs, *args, **kwargs)


def _get_trainer_dtype(args: TrainingArguments) -> torch.dtype:
    return torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else torch.float32
