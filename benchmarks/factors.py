"""Where the speed comes from: one policy step, made faster by one thing at a time.

    python benchmarks/factors.py --dataset_name my_pairs.jsonl --tokenizer_name openai-community/gpt2

Forward and backward of the same pairs under GPT-2 small's shape; the variants take turns, the table gives medians. The
last rows change only how many tokens a packed row may hold.
"""

import statistics
import tempfile
import time
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
import trl.trainer.utils
from models import save_random_model, tokenizer_and_data
from transformers.activations import GELUTanh, NewGELUActivation
from trl.trainer.dpo_trainer import DataCollatorForPreference
from trl.trainer.utils import add_fused_lm_head, disable_dropout_in_model

from tinydpo.config.arguments import DataArguments
from tinydpo.config.recipe import parse_args
from tinydpo.data.pairs import load_split
from tinydpo.errors import UserError, report_errors
from tinydpo.training.packed_forward import CPU_TILE, patch_packed_forward
from tinydpo.training.packing import pack

TRL_TILE = trl.trainer.utils._CHUNKED_LOGPROB_CHUNK_SIZE


@dataclass
class FactorArguments:
    """What to measure."""

    model: str = field(
        default="gpt2-small", metadata={"help": "A shape of benchmarks/models.py, or a model's folder."}
    )
    tokenizer_name: str | None = field(default=None, metadata={"help": "With --dataset_name: folder or Hub id."})
    device: Literal["cpu", "cuda"] = field(default="cpu", metadata={"help": "cuda: in bf16; cpu: in float32."})
    pairs: int = field(default=8, metadata={"help": "Pairs in a step."})
    rounds: int = field(default=5, metadata={"help": "Turns of each variant, after one that is not counted."})
    max_length: int = field(default=128, metadata={"help": "Tokens of prompt + completion."})


def main(argv: list[str] | None = None) -> None:
    args, data = parse_args(FactorArguments, DataArguments, argv=argv)
    given = data.dataset_name or "the quickstart's"
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = tokenizer_and_data(data, args.tokenizer_name, args.model, Path(folder))
        model = save_random_model(args.model, tokenizer, Path(folder) / "model").to(args.device)
        pairs = load_split(data, tokenizer, args.max_length, "train").pairs.shuffle(seed=0)
        if not (0 < args.pairs <= len(pairs) and args.rounds > 0):
            raise UserError(f"--pairs must lie between 1 and the {len(pairs)} there are, and --rounds be at least 1")
        rows = pairs.select(range(args.pairs)).to_list()
    disable_dropout_in_model(model)
    model.train()
    add_fused_lm_head(model, outputs=("log_probs", "entropy", "mean_logits", "is_top1"))
    patch_packed_forward(model, 8 * args.max_length)
    padded = DataCollatorForPreference(pad_token_id=0)(rows)
    trees = [(row["prompt_ids"], (row["chosen_ids"], row["rejected_ids"])) for row in rows]
    alone = [(prompt, (both[i],)) for i in range(2) for prompt, both in trees]
    of = partial(step, model, padded, args.device)
    variants = {
        "padded, activation checkpointing": partial(of, None, tile=TRL_TILE, checkpointing=True),
        "no checkpointing": partial(of, None, tile=TRL_TILE),
        "LM head in smaller tiles (CPU)": partial(of, None),
        "LM head on answers only": partial(of, pack(alone, None)),
        "no padding": partial(of, pack(alone, 4 * args.max_length)),
        "each prompt once": partial(of, pack(trees, 4 * args.max_length)),
        "GELU in one operation": partial(of, pack(trees, 4 * args.max_length), gelu=GELUTanh),
    }
    last = list(variants)[-1]
    row_lengths = {
        f"rows of up to {n * args.max_length}": partial(of, pack(trees, n * args.max_length), gelu=GELUTanh)
        for n in (2, 3, 6, 8)
    }
    variants |= row_lengths
    seconds = {name: [] for name in variants}
    for turn in range(args.rounds + 1):
        for name, variant in variants.items():
            value = variant()
            if turn:
                seconds[name].append(value)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    first, before = next(iter(medians.values())), None
    print(f"{args.model}, {args.pairs} pairs, forward and backward, {args.rounds} rounds; data: {given}\n")
    print("| | time | faster than the row above by | than the first row by |\n| --- | --- | --- | --- |")
    for name, value in medians.items():
        before = medians[last] if name in row_lengths else before
        above = f"{before / value:.2f}" if before else ""
        print(f"| {name} | {value / medians[last]:.2f} | {above} | {first / value:.2f} |")
        before = value


def step(
    model: Any,
    padded: dict[str, torch.Tensor],
    device: str,
    packed: dict[str, torch.Tensor] | None,
    tile: int = CPU_TILE,
    checkpointing: bool = False,
    gelu: type = NewGELUActivation,
) -> float:
    """Seconds of one forward and backward."""
    trl.trainer.utils._CHUNKED_LOGPROB_CHUNK_SIZE = tile if device == "cpu" else TRL_TILE
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, (GELUTanh, NewGELUActivation)):
                setattr(module, name, gelu())
    (model.activation_checkpointing_enable if checkpointing else model.activation_checkpointing_disable)()
    model.zero_grad()
    batch = {name: values.to(device) for name, values in padded.items()}
    labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)
    packed = packed and {name: values.to(device) for name, values in packed.items()}
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    wait()
    start = time.perf_counter()
    with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
        out = model(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=labels, packed=packed,
            fused_lm_head=True,
        )  # fmt: skip
    out.log_probs.sum().backward()
    wait()
    return time.perf_counter() - start


if __name__ == "__main__":
    with report_errors():
        main()
