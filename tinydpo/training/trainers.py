"""TRL's trainers on fitted pairs. Losses, training metrics, PEFT, checkpoints and logging stay TRL's.

`FittedTrainerMixin` is what all of them share: rows that are tokens already, whole optimizer steps, a float32 LM head
and an evaluation that does not depend on the batch. `PackedTrainerMixin` adds packed rows.
"""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
import trl.trainer.utils
from accelerate.utils import send_to_device
from datasets import Dataset
from datasets.fingerprint import Hasher
from torch.utils.data import RandomSampler, Sampler, SequentialSampler
from transformers import EvalPrediction, PreTrainedModel, TrainingArguments
from trl import DPOTrainer, SFTTrainer
from trl.trainer.dpo_trainer import DataCollatorForPreference
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling
from trl.trainer.utils import add_fused_lm_head, disable_dropout_in_model

from tinydpo.errors import UserError
from tinydpo.training.checkpoints import SafeCheckpointsMixin
from tinydpo.training.packed_forward import (
    CPU_TILE,
    USE_PADDED_HINT,
    check_same_results,
    compile_blocks,
    fill_row,
    has_float32_weights,
    patch_packed_forward,
    unwrap_peft,
)
from tinydpo.training.packing import Tree, count_tokens, pack
from tinydpo.training.throughput import Counts


class FittedTrainerMixin(SafeCheckpointsMixin):
    """For a TRL trainer: trains on rows of token ids in whole steps, and evaluates every row by itself.

    A subclass counts what a training batch computes (`count_batch`), scores rows for an evaluation (`score_rows`, of
    shape (rows, scores)) and makes metrics of the scores of all rows (`get_eval_metrics`, without the prefix `eval_`).
    """

    head_outputs = ("log_probs",)  # what TRL's fused LM head computes for the policy
    counted = Counts()  # what this process's training steps have computed so far, for `Throughput`
    _models_are_prepared = False

    def __init__(self, *, args: TrainingArguments, train_dataset: Dataset, **kwargs: Any):
        shrink_step(args, len(train_dataset))
        super().__init__(args=args, train_dataset=draw_needed_rows(args, train_dataset), **kwargs)
        self.compute_metrics = self.get_eval_metrics
        self.prepare_models()

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        plugin = self.accelerator.state.fsdp_plugin if self.is_fsdp_enabled else None
        if plugin and plugin.mixed_precision_policy:
            # accelerate's bf16 would round log-probs (sums of hundreds, in steps of one) and the gradients' sums.
            policy = replace(plugin.mixed_precision_policy, output_dtype=None, reduce_dtype=torch.float32)
            plugin.mixed_precision_policy = policy

    def _prepare_dataset(self, dataset: Dataset, *args: Any, **kwargs: Any) -> Dataset:
        return dataset  # TRL would tokenize text, and cut it after the first `max_length` tokens

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Sampler:
        """TRL's sampler without an epoch's incomplete last step, where each pair would weigh more."""
        dataset = self.train_dataset if train_dataset is None else train_dataset
        per_step = self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
        rows = len(dataset) // per_step * per_step
        if self.args.train_sampling_strategy == "sequential":
            return SequentialSampler(range(rows))
        return RandomSampler(dataset, num_samples=rows)  # every epoch leaves out different rows

    def get_models(self) -> list[PreTrainedModel]:
        """The policy and, if it is in memory, the reference, without what accelerate wraps around them."""
        models = [self.model, getattr(self, "ref_model", None)]
        return [self.accelerator.unwrap_model(model) for model in models if model is not None]

    def prepare_models(self) -> None:
        """Change the models' forward, once, before they compute anything."""
        if self._models_are_prepared:
            return
        self._models_are_prepared = True
        self._prepare_models()
        reference = getattr(self, "ref_model", None)
        if reference is not None:
            # Ours replaced the forward that accelerate wrapped in autocast; the reference would compute in float32.
            reference = self.accelerator.unwrap_model(reference)
            reference.forward = self.accelerator.autocast()(reference.forward)

    def _prepare_models(self) -> None:
        # TRL's own LM head again, but in float32, outside autocast; `models.precision` says why.
        for model, outputs in zip(self.get_models(), (self.head_outputs, ("log_probs",)), strict=False):
            add_fused_lm_head(unwrap_peft(model), cast_lm_head_to_fp32=True, outputs=outputs)

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        # Under DeepSpeed transformers casts floats to the engine's dtype; cached reference log-probs stay float32.
        return send_to_device(inputs, self.args.device)

    def training_step(self, model: torch.nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> torch.Tensor:
        batch = self.count_batch(inputs)
        self.counted = Counts(*(total + new for total, new in zip(self.counted, batch, strict=True)))
        return super().training_step(model, inputs, *args, **kwargs)

    def prediction_step(self, model: torch.nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> tuple:
        """Score each row of a batch. transformers gathers all rows, each once, for `get_eval_metrics`.

        TRL would average the means of batches, which are not equally large.
        """
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            scores = self.score_rows(model, inputs)
        return None, scores, scores  # transformers computes metrics only if there are labels as well


def shrink_step(args: TrainingArguments, rows: int) -> None:
    """Make an optimizer step as small as the training data, if that is smaller than one step."""
    processes = args.world_size
    pairs_per_step = args.per_device_train_batch_size * args.gradient_accumulation_steps * processes
    if rows >= pairs_per_step:
        return
    share = rows // processes
    batch = max(size for size in range(1, args.per_device_train_batch_size + 1) if share % size == 0)
    args.per_device_train_batch_size = batch
    args.gradient_accumulation_steps = share // batch
    if args.process_index == 0:
        print(
            f"There are only {rows} rows, fewer than the {pairs_per_step} of one step: "
            f"a step takes {share * processes}."
        )


def draw_needed_rows(args: TrainingArguments, dataset: Dataset) -> Dataset:
    """As many random rows as `max_steps` trains on, if that is fewer than all: only those need reference log-probs."""
    per_step = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    needed = args.max_steps * per_step
    if not 0 < needed < len(dataset):
        return dataset
    if args.train_sampling_strategy == "random":
        dataset = dataset.shuffle(seed=args.seed)
    return dataset.select(range(needed))


def get_completion_logps(model: torch.nn.Module, inputs: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probs of a batch's completion tokens (0 elsewhere) and where they are, both (sequences, length - 1).

    `model` has TRL's fused LM head. `inputs` is a batch from TRL's collator for DPO (both answers of n pairs) or SFT;
    it is computed in packed rows if it has them.
    """
    if "completion_mask" in inputs:
        labels = inputs["input_ids"].masked_fill(inputs["completion_mask"] == 0, -100)
    else:
        labels = inputs["labels"]
    names = ("input_ids", "attention_mask", "position_ids", "packed")
    model_inputs = {name: inputs[name] for name in names if name in inputs}
    output = model(**model_inputs, labels=labels, fused_lm_head=True, use_cache=False)
    return output.log_probs, labels[:, 1:] != -100


class FittedDPOTrainer(FittedTrainerMixin, DPOTrainer):
    """`DPOTrainer` for rows with `prompt_ids`, `chosen_ids` and `rejected_ids`."""

    head_outputs = ("log_probs", "entropy", "mean_logits", "is_top1")

    def __init__(self, **kwargs: Any):
        super().__init__(**kwargs)
        if self.precompute_ref_logps:
            self.ref_model = None  # it has done its work
            self.accelerator.free_memory()  # which holds it, too

    def _prepare_models(self) -> None:
        if self.use_weighting:
            self.head_outputs += ("log_sum_sq_probs",)
        super()._prepare_models()
        # Names the cache of reference log-probs. TRL takes the weights alone, but these change log-probs too.
        sharding = (self.is_fsdp_enabled, self.is_deepspeed_enabled)
        precision = ("float32 head", self.args.bf16, self.args.fp16, self.args.tf32, sharding)
        attention = self.model.config._attn_implementation
        names = (self._precompute_model_hash, self.ld_alpha, precision, attention, type(self).__name__)
        self._precompute_model_hash = Hasher.hash(names)

    def _precompute_ref_logps(self, dataset: Dataset, name: str, batch_size: int) -> Dataset:
        self.prepare_models()  # TRL's constructor calls this method before it returns
        if self.is_fsdp_enabled and self.ref_model is None:  # an adapter's base, which accelerate has not placed yet
            self.model.to(self.args.device)
        return super()._precompute_ref_logps(dataset, name, batch_size)

    def count_batch(self, inputs: dict[str, Any]) -> Counts:
        pairs = len(inputs["input_ids"]) // 2
        scored = inputs["completion_mask"].sum()
        # Prompts count once, though padded batches hold them twice.
        prompts = (inputs["attention_mask"] - inputs["completion_mask"])[:pairs].sum()
        return Counts(pairs, prompts + scored, scored)

    def score_rows(self, model: torch.nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
        """Log-probs of each pair: chosen and rejected under the policy, chosen and rejected under the reference."""
        chosen, rejected = self._sum_logps(*get_completion_logps(model, inputs)).chunk(2)
        if "ref_chosen_logps" in inputs:
            reference = (inputs["ref_chosen_logps"], inputs["ref_rejected_logps"])
        else:
            reference = self.compute_ref_log_probs(self.ref_model or model, inputs)
        return torch.stack([chosen, rejected, *reference], dim=1)

    def _sum_logps(self, logps: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Sum completions, (2n, length) to (2n,); with `ld_alpha`, tokens past the shorter answer count by it."""
        if self.ld_alpha is not None:
            shorter = mask.sum(1).view(2, -1).amin(0).repeat(2)
            past_shorter = mask.cumsum(1) > shorter[:, None]
            logps = torch.where(past_shorter, self.ld_alpha * logps, logps)
        return logps.sum(1)

    def get_eval_metrics(self, prediction: EvalPrediction) -> dict[str, float]:
        """The metrics of scripts/evaluate.py. `loss` is DPO's own (arXiv 2305.18290, eq. 7) for every loss_type."""
        chosen, rejected, ref_chosen, ref_rejected = prediction.predictions.astype(np.float64).T
        reward_chosen = self.beta * (chosen - ref_chosen)
        reward_rejected = self.beta * (rejected - ref_rejected)
        margins = reward_chosen - reward_rejected
        return {
            "loss": np.logaddexp(0, -margins).mean(),  # -log sigmoid(margin)
            "rewards/chosen": reward_chosen.mean(),
            "rewards/rejected": reward_rejected.mean(),
            "rewards/accuracies": (margins > 0).mean(),
            "rewards/margins": margins.mean(),
            "logps/chosen": chosen.mean(),
            "logps/rejected": rejected.mean(),
        }


class FittedSFTTrainer(FittedTrainerMixin, SFTTrainer):
    """`SFTTrainer` for rows with `input_ids` and `labels`."""

    head_outputs = ("log_probs", "entropy", "is_top1")

    def _prepare_models(self) -> None:
        disable_dropout_in_model(self.model)  # as DPO does; one and two processes would draw different masks
        super()._prepare_models()

    def count_batch(self, inputs: dict[str, Any]) -> Counts:
        scored = (inputs["labels"][:, 1:] != -100).sum()
        return Counts(len(inputs["input_ids"]), inputs["attention_mask"].sum(), scored)

    def score_rows(self, model: torch.nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
        """Log-prob of each completion, and its tokens."""
        logps, mask = get_completion_logps(model, inputs)
        return torch.stack([logps.sum(1), mask.sum(1)], dim=1)

    def get_eval_metrics(self, prediction: EvalPrediction) -> dict[str, float]:
        """NLL per completion token in nats, for every loss_type."""
        logps, tokens = prediction.predictions.astype(np.float64).T
        return {"loss": -logps.sum() / tokens.sum()}


def build_sft_rows(pairs: Dataset, completion_only: bool = True) -> Dataset:
    """The chosen answers of fitted pairs as `SFTTrainer` reads them: `input_ids`, and `labels` (-100: no loss).

    Prompts carry loss only if not `completion_only`.
    """

    def join(batch: dict[str, list]) -> dict[str, list]:
        rows = {"input_ids": [], "labels": []}
        for prompt, chosen in zip(batch["prompt_ids"], batch["chosen_ids"], strict=True):
            rows["input_ids"].append(prompt + chosen)
            rows["labels"].append(([-100] * len(prompt) if completion_only else prompt) + chosen)
        return rows

    return pairs.map(join, batched=True, remove_columns=pairs.column_names, desc="Joining prompts and answers")


@dataclass(kw_only=True)
class PackedCollator:
    """For one of TRL's collators: adds the same tokens as `packed` rows, each prompt once."""

    row_length: int

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        """TRL's batch, and `packed`: what `packing.pack` returns, with the number of `trees` and their `tokens`."""
        trees = [self.build_tree(row) for row in examples]
        packed = pack(trees, self.row_length)
        packed |= {"trees": len(trees), "tokens": sum(count_tokens(tree) for tree in trees)}
        return super().torch_call(examples) | {"packed": packed}


@dataclass
class PackedPreferenceCollator(PackedCollator, DataCollatorForPreference):
    """TRL's batch of pairs, and each pair as one tree."""

    def build_tree(self, row: dict[str, Any]) -> Tree:
        return row["prompt_ids"], (row["chosen_ids"], row["rejected_ids"])


@dataclass
class PackedSFTCollator(PackedCollator, DataCollatorForLanguageModeling):
    """TRL's batch of SFT examples, and each example as one tree."""

    def build_tree(self, row: dict[str, Any]) -> Tree:
        """The tokens before the first label are the prompt, the rest is its only completion."""
        ids = row["input_ids"]
        # At least one token: the first completion token needs something before it.
        prompt_length = next((i for i, label in enumerate(row["labels"]) if label != -100 and i > 0), len(ids))
        return ids[:prompt_length], (ids[prompt_length:],)


class PackedTrainerMixin:
    """For a fitted trainer: computes packed rows, after a check that the model gives the same results in them."""

    collator_type: type

    def __init__(self, *, args: TrainingArguments, row_length: int, processing_class: Any, **kwargs: Any):
        """TRL's own arguments, and `row_length`: the most tokens in a packed row (UserError: the model is refused)."""
        self._checked: set[tuple[bool, bool]] = set()
        self._compile_options = None
        if args.torch_compile:
            self._compile_options = {"backend": args.torch_compile_backend, "mode": args.torch_compile_mode}
            args.torch_compile = False  # with these two set, accelerate would compile the model as a whole
            args.torch_compile_backend = None
        pad_token = processing_class.pad_token or processing_class.eos_token
        pad_token_id = processing_class.convert_tokens_to_ids(pad_token)
        collator = self.collator_type(pad_token_id=pad_token_id, row_length=row_length)
        super().__init__(args=args, processing_class=processing_class, data_collator=collator, **kwargs)

    def _prepare_models(self) -> None:
        """Patch the models' forward and check it: before the reference pass, and before the run's folder exists."""
        super()._prepare_models()
        if self.args.device.type == "cpu":
            trl.trainer.utils._CHUNKED_LOGPROB_CHUNK_SIZE = CPU_TILE  # in the whole process
        for model in self.get_models():
            self.patch_model(model)
        if not self.is_sharded:  # else they can compute nothing before their first step, and are checked then
            training = self.model.training
            for mode in (False, True):
                self.check_model(self.model.train(mode))
            self.model.train(training)
            self.check_model(getattr(self, "ref_model", None))  # it may be of a different family
        if self._compile_options:
            for model in self.get_models():
                compile_blocks(unwrap_peft(model), self._compile_options)

    @property
    def is_sharded(self) -> bool:
        return self.is_fsdp_enabled or self.is_deepspeed_enabled

    def patch_model(self, model: PreTrainedModel) -> None:
        patch_packed_forward(model, self.data_collator.row_length)

    def check_model(self, model: torch.nn.Module | None) -> None:
        """Compare one full row of the run's own data with the plain forward, once for each model and mode."""
        if model is None:
            return
        key = (model is getattr(self, "ref_model", None), model.training)
        if key in self._checked:
            return
        self._checked.add(key)
        if model.training and any(isinstance(m, torch.nn.Dropout) and m.p > 0 for m in model.modules()):
            raise UserError(f"packed rows need dropout off; leave --disable_dropout true, or {USE_PADDED_HINT}")
        batch = send_to_device(self._build_full_row(), self.args.device)
        plain_batch = {name: value for name, value in batch.items() if name != "packed"}
        unwrapped = unwrap_peft(self.accelerator.unwrap_model(model))
        in_float32 = has_float32_weights(unwrapped)
        if self.is_sharded:  # it computes in its own precision
            in_float32 = in_float32 and not (self.args.bf16 or self.args.fp16)
        with self.accelerator.autocast():
            check_same_results(
                unwrapped,
                compute_packed=partial(self.compute_results, model, batch),
                compute_plain=partial(self.compute_results, model, plain_batch),
                in_float32=in_float32,
            )

    def _build_full_row(self) -> dict[str, Any]:
        """A batch of as much training data as one packed row holds."""
        collator = self.data_collator
        rows = [self.train_dataset[i] for i in range(min(64, len(self.train_dataset)))]
        trees = fill_row([collator.build_tree(row) for row in rows], collator.row_length)
        batch = collator([rows[i % len(rows)] for i in range(len(trees))])
        return batch | {"packed": pack(trees, collator.row_length, rows=[list(range(len(trees)))])}

    def compute_results(self, model: torch.nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
        """What the check compares: here the log-probs of all completion tokens."""
        logps, mask = get_completion_logps(model, inputs)
        return logps[mask]

    def count_batch(self, inputs: dict[str, Any]) -> Counts:
        packed = inputs["packed"]
        return Counts(packed["trees"], packed["tokens"], packed["targets"].numel(), packed["input_ids"].numel())

    def compute_loss(self, model: torch.nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        self.check_model(model)  # a sharded one has not been checked yet
        self.check_model(getattr(self, "ref_model", None))
        return super().compute_loss(model, inputs, *args, **kwargs)


class SharedPrefixDPOTrainer(PackedTrainerMixin, FittedDPOTrainer):
    """`FittedDPOTrainer` that computes each pair's prompt once, without padding."""

    collator_type = PackedPreferenceCollator

    def compute_ref_log_probs(self, model: torch.nn.Module, inputs: dict[str, Any]) -> tuple[torch.Tensor, ...]:
        self.check_model(model)  # a sharded one has not been checked yet
        return super().compute_ref_log_probs(model, inputs)


class PackedSFTTrainer(PackedTrainerMixin, FittedSFTTrainer):
    """`FittedSFTTrainer` without padding."""

    collator_type = PackedSFTCollator
