"""TRL's trainers and ours side by side: tiny models, uneven pairs, and one step or a whole run of each compared."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerBase, TrainerCallback
from trl import DPOConfig, DPOTrainer, RewardConfig, RewardTrainer, SFTConfig, SFTTrainer

from tinydpo.training.reward_trainer import FittedRewardTrainer, PackedRewardTrainer
from tinydpo.training.trainers import (
    FittedDPOTrainer,
    FittedSFTTrainer,
    PackedSFTTrainer,
    PackedTrainerMixin,
    SharedPrefixDPOTrainer,
)

ROW_LENGTH = 160
LENGTHS = (1, 1, 2, 7, 20, 50)


class StockDPOTrainer(DPOTrainer):
    """TRL's own, for pairs that are tokens already."""

    def _prepare_dataset(self, dataset: Dataset, *args: Any, **kwargs: Any) -> Dataset:
        return dataset


ENGINES = {  # TRL's trainer, ours with padded rows and with packed ones
    "dpo": (StockDPOTrainer, FittedDPOTrainer, SharedPrefixDPOTrainer),
    "sft": (SFTTrainer, FittedSFTTrainer, PackedSFTTrainer),
    "reward": (RewardTrainer, FittedRewardTrainer, PackedRewardTrainer),
}


def uneven_pairs(count: int, vocab_size: int, seed: int = 0) -> Dataset:
    """Random tokens; prompts and completions have one token to fifty."""
    rng = np.random.default_rng(seed)
    return Dataset.from_dict(
        {
            f"{part}_ids": [rng.integers(vocab_size, size=rng.choice(LENGTHS)).tolist() for _ in range(count)]
            for part in ("prompt", "chosen", "rejected")
        }
    )


def join_prompts(pairs: Dataset) -> Dataset:
    """The rows of pairs as TRL's `RewardTrainer` takes them: each answer with its prompt."""
    both = ("chosen_ids", "rejected_ids")
    return Dataset.from_list([{name: row["prompt_ids"] + row[name] for name in both} for row in pairs])


def tiny_gpt2(tokenizer: PreTrainedTokenizerBase, folder: Path, **config: Any) -> str:
    """Save a random GPT-2, its weights large enough that it matters what is seen and where; return the folder."""
    torch.manual_seed(0)
    end = tokenizer.eos_token_id
    settings = {
        "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 160, "initializer_range": 0.3,
        "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "vocab_size": len(tokenizer),
        "bos_token_id": end, "eos_token_id": end,
    }  # fmt: skip
    GPT2LMHeadModel(GPT2Config(**settings | config)).save_pretrained(folder)
    return str(folder)


class Gradients(TrainerCallback):
    """Keeps what `backward` left, unclipped, before the optimizer takes its step."""

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.of = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def build(engine: type, model: Any, tokenizer: Any, rows: Dataset, folder: Path, **settings: Any) -> Any:
    """A trainer, by default on the CPU, that saves nothing and takes one step over all rows."""
    outside = ("eval_dataset", "peft_config", "ref_model")
    given = {name: settings.pop(name) for name in outside if name in settings}
    defaults = {
        "per_device_train_batch_size": len(rows), "max_steps": 1, "learning_rate": 1e-2, "max_grad_norm": 0.0,
        "max_length": 128, "activation_checkpointing": False, "gradient_checkpointing": False,
        "use_cpu": True, "bf16": False, "seed": 0, "logging_steps": 1, "save_strategy": "no",
        "report_to": "none", "disable_tqdm": True, "output_dir": str(folder),
    }  # fmt: skip
    config = DPOConfig
    if issubclass(engine, SFTTrainer):
        config = SFTConfig
        defaults["dataset_kwargs"] = {"skip_prepare_dataset": True}  # rows have labels
    elif issubclass(engine, RewardTrainer):
        config = RewardConfig
    if issubclass(engine, PackedTrainerMixin):
        given["row_length"] = settings.pop("row_length", ROW_LENGTH)
    args = config(**defaults | settings)
    args._n_gpu = min(args.n_gpu, 1)  # as `launch.prepare_process` does
    return engine(
        model=model, args=args, train_dataset=rows, processing_class=tokenizer, callbacks=[Gradients()], **given
    )


@torch.no_grad()
def nudge(model: torch.nn.Module, scale: float = 0.03) -> None:
    """Move what trains away from the reference, alike in every call: between equals all log-ratios are 0."""
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and ".ref." not in name:
            parameter += scale * torch.randn(parameter.shape, generator=generator).to(parameter.device)


def first_batch(trainer: Any) -> dict[str, Any]:
    return next(iter(trainer.get_train_dataloader()))


def gradients(trainer: Any) -> dict[str, torch.Tensor]:
    return next(c.of for c in trainer.callback_handler.callbacks if isinstance(c, Gradients))


def without_clocks(entry: dict[str, float]) -> dict[str, float]:
    """A log's entry without what differs between two equal runs, or counts padding."""
    clocks = ("runtime", "per_second", "preparation_time", "total_flos")
    return {name: value for name, value in entry.items() if not name.endswith(clocks)}


def assert_close(ours: torch.Tensor, theirs: torch.Tensor, what: str, tolerance: float = 1e-4) -> None:
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=0, msg=lambda difference: f"{what}: {difference}")


def assert_same_log(ours: list[dict], theirs: list[dict], rel: float = 1e-4, small: float = 1e-5) -> None:
    """Every training entry of two runs' logs, clocks left out."""
    ours, theirs = ([without_clocks(entry) for entry in log if "loss" in entry] for log in (ours, theirs))
    assert len(ours) == len(theirs) and ours, "the two engines log at different steps"
    for our_entry, their_entry in zip(ours, theirs, strict=True):
        assert our_entry == pytest.approx(their_entry, rel=rel, abs=small), f"step {their_entry['step']} differs"


def assert_same_step(ours: Any, theirs: Any) -> None:
    """Loss, metrics and the gradient of every tensor of two trainers' first step."""
    theirs.train()
    ours.train()
    assert_same_log(ours.state.log_history, theirs.state.log_history)
    our_gradients, their_gradients = gradients(ours), gradients(theirs)
    assert set(our_gradients) == set(their_gradients), "different parameters are trained"
    whole = torch.stack([gradient.norm() for gradient in their_gradients.values()]).norm()
    assert whole > 1e-3, "no gradient to compare"
    for name, gradient in their_gradients.items():  # a reward's last bias moves both scores alike: its gradient is 0
        difference = (our_gradients[name] - gradient).norm() / gradient.norm().clamp(min=1e-4 * whole)
        assert difference <= 1e-4, f"the gradient of {name} differs from TRL's by {difference:.1e} of its norm"
