"""The packed engines beside TRL's own: tiny models, uneven pairs, and runs of either laid side by side."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerBase, TrainerCallback
from trl import DPOConfig, SFTConfig, SFTTrainer

from tinydpo.training.trainers import FittedDPOTrainer, FittedSFTTrainer, PackedSFTTrainer, SharedPrefixDPOTrainer

DPO, SFT = (FittedDPOTrainer, SharedPrefixDPOTrainer), (SFTTrainer, PackedSFTTrainer)  # TRL's, and the engine's
WEIGHTED = (FittedSFTTrainer, PackedSFTTrainer)  # both count tokens, where TRL's metrics count batches
ROW_LENGTH = 160
LENGTHS = (1, 1, 2, 7, 20, 50)


def uneven_pairs(count: int, vocab_size: int, seed: int = 0) -> Dataset:
    """Random tokens; prompts and completions of one token and of fifty stand side by side."""
    rng = np.random.default_rng(seed)
    return Dataset.from_dict(
        {
            f"{part}_ids": [rng.integers(vocab_size, size=rng.choice(LENGTHS)).tolist() for _ in range(count)]
            for part in ("prompt", "chosen", "rejected")
        }
    )


def tiny_gpt2(tokenizer: PreTrainedTokenizerBase, folder: Path, **config: Any) -> str:
    """Save a random GPT-2, its weights large enough that it matters what is seen and where; return the folder."""
    torch.manual_seed(0)
    end = tokenizer.eos_token_id
    settings = {
        "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 160, "initializer_range": 0.3,
        "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0,
    }  # fmt: skip
    given = {"vocab_size": len(tokenizer), "bos_token_id": end, "eos_token_id": end}
    GPT2LMHeadModel(GPT2Config(**given, **settings | config)).save_pretrained(folder)
    return str(folder)


class Gradients(TrainerCallback):
    """Keeps what `backward` left, unclipped, before the optimizer takes its step."""

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.of = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def build(
    engine: type,
    model: Any,
    tokenizer: Any,
    pairs: Dataset,
    folder: Path,
    eval_dataset: Dataset | None = None,
    peft_config: Any = None,
    **settings: Any,
) -> Any:
    """A trainer on the CPU that writes nothing and takes one step over all pairs, if not told otherwise."""
    defaults = {
        "per_device_train_batch_size": len(pairs), "max_steps": 1, "learning_rate": 1e-2, "max_grad_norm": 0.0,
        "max_length": 128, "activation_checkpointing": False, "gradient_checkpointing": False,
        "use_cpu": True, "bf16": False, "seed": 0, "logging_steps": 1, "save_strategy": "no",
        "report_to": "none", "disable_tqdm": True, "output_dir": str(folder),
    }  # fmt: skip
    config, packed = DPOConfig, engine in (DPO[1], SFT[1])
    if issubclass(engine, SFTTrainer):  # rows come with labels
        config, defaults["dataset_kwargs"] = SFTConfig, {"skip_prepare_dataset": True}
    return engine(
        model=model,
        args=config(**defaults | settings),
        train_dataset=pairs,
        eval_dataset=eval_dataset,
        processing_class=tokenizer,
        peft_config=peft_config,
        callbacks=[Gradients()],
        **({"row_length": ROW_LENGTH} if packed else {}),
    )


@torch.no_grad()
def nudge(model: torch.nn.Module, scale: float = 0.03) -> None:
    """Move what trains away from the reference, alike in every call: between equals all log-ratios are 0."""
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and ".ref." not in name:
            parameter += scale * torch.randn(parameter.shape, generator=generator)


def first_batch(trainer: Any) -> dict[str, Any]:
    return next(iter(trainer.get_train_dataloader()))


def gradients(trainer: Any) -> dict[str, torch.Tensor]:
    return next(c.of for c in trainer.callback_handler.callbacks if isinstance(c, Gradients))


def assert_close(packed: torch.Tensor, stock: torch.Tensor, what: str, tolerance: float = 1e-4) -> None:
    torch.testing.assert_close(packed, stock, rtol=tolerance, atol=0, msg=lambda told: f"{what}: {told}")


def assert_same_log(packed: list[dict], stock: list[dict], rel: float = 1e-4, small: float = 1e-5) -> None:
    """Every entry of two runs' logs, clocks left out."""
    assert len(packed) == len(stock) and packed, "the two engines log at other steps"
    for ours, theirs in zip(packed, stock, strict=True):
        assert list(ours) == list(theirs), "the engines do not log the same metrics"
        for name in (name for name in theirs if not name.endswith(("runtime", "per_second"))):
            assert ours[name] == pytest.approx(theirs[name], rel=rel, abs=small), (
                f"step {theirs['step']}: {name} is {ours[name]} in packed rows and {theirs[name]} under TRL"
            )


def assert_same_step(packed: Any, stock: Any) -> None:
    """Loss, metrics and the gradient of every tensor of two trainers' first step, `stock`'s taken first."""
    stock.train()
    packed.train()
    assert_same_log(packed.state.log_history, stock.state.log_history)
    ours, theirs = gradients(packed), gradients(stock)
    assert set(ours) == set(theirs), "other parameters are trained"
    assert sum(gradient.norm() for gradient in theirs.values()) > 1e-3, "no gradient to compare"
    for name, gradient in theirs.items():
        off = (ours[name] - gradient).norm() / gradient.norm().clamp(min=1e-12)
        assert off <= 1e-4, f"the gradient of {name} differs from TRL's by {off:.1e} of its norm"
