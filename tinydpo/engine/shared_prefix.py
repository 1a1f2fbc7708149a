"""The engine: TRL's trainers on packed rows, each prompt computed once, nothing padded, the LM head on answers only.

TRL's DPO runs `prompt + chosen` and `prompt + rejected` as two padded sequences. Here the collators put beside TRL's
padded batch the same tokens as packed rows (`packing`), and the model's forward computes those instead and hands the
per-token results back in the padded layout. So every loss, weighting, metric and reference pass of TRL reads what it
always reads, and the numbers are the same to rounding.
"""

import functools
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
import trl.trainer.utils
from datasets import Dataset
from transformers import PreTrainedModel, TrainingArguments
from transformers.activations import GELUTanh, NewGELUActivation
from trl.trainer.dpo_trainer import DataCollatorForPreference
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from tinydpo.engine.check import INSTEAD, check_packable, check_same_results, fill_row, get_low_precision_dtype
from tinydpo.engine.compiled import compile_blocks, take_compile_options
from tinydpo.engine.packing import Tree, build_additive_mask, pack
from tinydpo.engine.trainers import FittedDPOTrainer, FittedSFTTrainer
from tinydpo.errors import UserError
from tinydpo.models.precision import float32_mode, in_float32_mode

# Vocabulary columns that TRL's LM head projects at once on a CPU: its own 32,768 do not stay in the cache (forward and
# backward of 664 positions over GPT-2's vocabulary took 3.5 s, with 1,024 1.6 s, on two cores).
CPU_TILE = 1024
PER_TOKEN = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1")


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
            compile_blocks(_unwrap_peft(model), self._compile)
        self._compile = None

    @torch.no_grad()
    def _check(self, model: torch.nn.Module) -> None:
        """Hold one full row of the run's own data against the plain forward, once a model and mode."""
        if (mode := (model is getattr(self, "ref_model", None), model.training)) in self._checked:
            return
        self._checked.add(mode)
        lm, collator = _unwrap_peft(self.accelerator.unwrap_model(model)), self.data_collator
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


def patch_packed_forward(model: PreTrainedModel, row_length: int) -> None:
    """Have a model with TRL's fused LM head compute `packed` rows where a batch brings them.

    Args:
        model: a causal LM or a PEFT model around one, after TRL's `add_fused_lm_head`.
        row_length: the most tokens in a packed row.

    Raises:
        UserError: the model cannot compute packed rows.
    """
    model = _unwrap_peft(model)
    if getattr(model.forward, "packs", False):
        return
    check_packable(model, row_length)
    use_fused_gelu(model)
    # What accelerate prepared, as it does a reference, enters autocast by itself, whatever `exactly` asks for.
    wrapped, bare = model.forward, getattr(model, "_original_forward", model.forward)

    @functools.wraps(type(model).forward)  # `generate` reads its arguments off the signature
    def forward(
        self: PreTrainedModel, *args: Any, packed: dict | None = None, fused_lm_head: bool = False, **kwargs: Any
    ) -> Any:
        fused_forward = bare if in_float32_mode(self) else wrapped
        if packed is None or not fused_lm_head:
            return fused_forward(*args, fused_lm_head=fused_lm_head, **kwargs)
        return _packed_forward(self, fused_forward, packed, **kwargs)

    forward.packs = True
    model.forward = types.MethodType(forward, model)


def use_fused_gelu(model: PreTrainedModel) -> None:
    """Swap GPT-2's GELU, eight elementwise operations, for PyTorch's one: the same formula, rounded otherwise."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, NewGELUActivation):
                setattr(module, name, GELUTanh())


def _packed_forward(
    model: PreTrainedModel,
    fused_forward: Any,
    packed: dict[str, torch.Tensor],
    labels: torch.Tensor,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    **kwargs: Any,
) -> Any:
    """TRL's fused output for a padded batch, (sequences, length - 1) a field, computed from its packed rows."""
    answers = labels[:, 1:] != -100

    def keep(module: torch.nn.Module, args: tuple, output: Any) -> Any:
        """Leave the LM head the positions that predict an answer's token, on CPUs too, where TRL's takes all."""
        output.last_hidden_state = output.last_hidden_state.flatten(0, 1)[packed["predicts"]][None]
        return output

    with model.base_model.register_forward_hook(keep), _lm_head_tile(CPU_TILE if model.device.type == "cpu" else None):
        output = fused_forward(
            input_ids=packed["input_ids"],
            position_ids=packed["position_ids"],
            attention_mask=build_additive_mask(packed["segment_ids"], packed["prefix_ids"], get_mask_dtype(model)),
            shift_labels=packed["targets"][None],  # as labels[:, 1:][answers], without waiting for a GPU
            fused_lm_head=True,
            **kwargs,
        )
    for name in PER_TOKEN:
        if getattr(output, name) is not None:
            setattr(output, name, output[name].new_zeros(answers.shape).masked_scatter(answers, output[name]))
    output.label_mask = answers
    return output


@contextmanager
def _lm_head_tile(columns: int | None) -> Iterator[None]:
    """Have TRL's LM head take so many columns of the vocabulary at once, None: its own number."""
    before = trl.trainer.utils._CHUNKED_LOGPROB_CHUNK_SIZE
    trl.trainer.utils._CHUNKED_LOGPROB_CHUNK_SIZE = columns or before
    try:
        yield
    finally:
        trl.trainer.utils._CHUNKED_LOGPROB_CHUNK_SIZE = before


def _get_trainer_dtype(args: TrainingArguments) -> torch.dtype:
    return torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else torch.float32


def get_mask_dtype(model: PreTrainedModel) -> torch.dtype:
    """What a model's attention adds a mask in."""
    device = model.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else model.dtype


def _unwrap_peft(model: torch.nn.Module) -> PreTrainedModel:
    return model.get_base_model() if hasattr(model, "get_base_model") else model
