"""What rounding does to an evaluation: log-probs of real pairs in bf16, held against the same in float32.

    python benchmarks/precision.py --model HuggingFaceTB/SmolLM2-135M-Instruct --dataset_name my_pairs.jsonl
    python benchmarks/precision.py --dataset_name my_pairs.jsonl --tokenizer_name openai-community/gpt2   # tiny GPT-2s

The reference is the model; the policy is `--policy`, trained from it, or the model with noise on its weights.
"bf16 logits" is what a head under autocast, as the blocks are, gives.
"""

import functools
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from check_rates import shifted, tiny
from datasets import Dataset
from models import tokenizer_and_data
from short_products import short_products
from transformers import PreTrainedModel

from tinydpo.config.arguments import DataArguments
from tinydpo.config.recipe import parse_args
from tinydpo.data.pairs import load_split
from tinydpo.errors import report_errors
from tinydpo.evaluation.metrics import pair_metrics, pair_rewards
from tinydpo.models.loading import load_model
from tinydpo.models.precision import set_compute_dtype
from tinydpo.training.logps import PairLogps, pair_logps

BETA, ROW = 0.1, 512


@dataclass
class PrecisionArguments:
    """What to measure."""

    model: str | None = field(default=None, metadata={"help": "Folder or Hub id; by default tiny random GPT-2s."})
    policy: str | None = field(default=None, metadata={"help": "With --model: a policy that began from it."})
    tokenizer_name: str | None = field(default=None, metadata={"help": "Without --model: folder or Hub id."})
    pairs: int = field(default=200, metadata={"help": "Held-out pairs."})
    noise: float = field(default=0.02, metadata={"help": "Of the policy's weights, in their standard deviations."})


def bf16_logits(model: PreTrainedModel) -> PreTrainedModel:
    """A model that computes in bf16 under autocast to its last layer, the head included."""
    forward = model.forward

    @functools.wraps(type(model).forward)
    def under_autocast(*args: Any, **kwargs: Any) -> Any:
        with torch.autocast(model.device.type, torch.bfloat16):
            return forward(*args, **kwargs)

    model.forward, model.compute_dtype = under_autocast, torch.bfloat16
    return model


WAYS: dict[str, Callable[[PreTrainedModel], PreTrainedModel]] = {
    "float32": lambda model: set_compute_dtype(model, torch.float32),
    "bf16, float32 from the head on": lambda model: set_compute_dtype(model, torch.bfloat16),
    "bf16 logits": bf16_logits,
}


@torch.no_grad()
def noisy(model: PreTrainedModel, noise: float) -> PreTrainedModel:
    """The policy: every matrix moved a little, the embeddings, which the head shares, left alone."""
    generator = torch.Generator().manual_seed(1)
    for name, weight in model.named_parameters():
        if weight.dim() == 2 and "wte" not in name and "embed" not in name:
            weight += noise * weight.std() * torch.randn(weight.shape, generator=generator)
    return model


def measure(
    make: Callable[[], PreTrainedModel], pairs: Dataset, noise: float, policy: str | None = None
) -> dict[str, dict[str, float]]:
    """By way of computing: figures of the evaluation, and how far each margin is from float32's (root mean square)."""
    results, exact = {}, None
    for way, prepare in WAYS.items():
        with short_products():
            both: list[PairLogps] = [
                pair_logps(prepare(model), pairs, row_length=ROW if way != "bf16 logits" else None)
                for model in (load_model(policy) if policy else noisy(make(), noise), make())
            ]
        margins = pair_rewards(*both, BETA)["margin"]
        exact = margins if exact is None else exact
        figures = pair_metrics(*both, BETA)
        results[way] = {
            "margin error": float(np.sqrt(np.mean((margins - exact) ** 2))),
            "margin": float(np.sqrt(np.mean(exact**2))),
            "reward accuracy": figures["reward_accuracy"],
            "NLL": figures["nll_chosen_policy"],
        }
    return results


def main(argv: list[str] | None = None) -> None:
    args, data = parse_args(PrecisionArguments, DataArguments, argv=argv)
    with tempfile.TemporaryDirectory() as folder:
        name = args.model or args.tokenizer_name
        tokenizer = tokenizer_and_data(data, name, args.model or "gpt2-tiny", Path(folder))
        pairs = load_split(data, tokenizer, 128, "test").pairs
    pairs = pairs.select(range(min(args.pairs, len(pairs))))
    makers = {
        "GPT-2, tiny": lambda: tiny("GPT2", len(tokenizer), 0.02),
        "GPT-2, tiny, shifted": lambda: shifted(tiny("GPT2", len(tokenizer), 0.02)),
    }
    if args.model:
        makers = {Path(args.model).name: lambda: load_model(args.model)}
    print(f"{len(pairs)} held-out pairs, β {BETA}\n\n| model | computed in | margins off by | of | accuracy | NLL |")
    print("| --- | --- | --- | --- | --- | --- |")
    for model, make in makers.items():
        for way, row in measure(make, pairs, args.noise, args.policy).items():
            print(
                f"| {model} | {way} | {row['margin error']:.4f} | {row['margin']:.3f} | {row['reward accuracy']:.3f} "
                f"| {row['NLL']:.4f} |",
                flush=True,
            )


if __name__ == "__main__":
    with report_errors():
        main()
