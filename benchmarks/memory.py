"""How much memory a device needs: counted, by model size and by pairs taken at once.

    python benchmarks/memory.py
    python benchmarks/memory.py --models gpt2-medium --max_length 512

What stays is 16 bytes a parameter: float32 weights, gradients and Adam's two moments. What a step adds is counted as
the bytes that autograd saves in a forward under bf16 autocast, of pairs as long as HH's: it runs on the CPU, but the
tensors are those of any device. Allocators take some more.
"""

from dataclasses import dataclass, field
from typing import Literal

import torch
from models import SHAPES
from transformers import AutoModelForCausalLM, GPT2Config
from trl.trainer.utils import add_fused_lm_head, disable_dropout_in_model

from tinydpo.config.recipe import parse_args
from tinydpo.errors import UserError, report_errors
from tinydpo.training.packed_forward import patch_packed_forward
from tinydpo.training.packing import pack

HH_PAIR = {128: (52, 39, 45), 512: (117, 42, 52)}  # mean tokens of prompt, chosen, rejected: 1,800 fitted pairs
TILE = 4096 * 32768 * 4  # bytes of the LM head's logits at a time, on a GPU: float32


@dataclass
class MemoryArguments:
    """What to count."""

    models: list[str] = field(
        default_factory=lambda: ["gpt2-small", "gpt2-medium", "gpt2-large"], metadata={"help": f"Of {list(SHAPES)}."}
    )
    max_length: Literal[128, 512] = field(default=128, metadata={"help": "Of the two recipes."})


def main(argv: list[str] | None = None) -> None:
    (args,) = parse_args(MemoryArguments, argv=argv)
    if unknown := set(args.models) - set(SHAPES):
        raise UserError(f"--models {', '.join(sorted(unknown))}: not one of {', '.join(SHAPES)}")
    print(f"Gigabytes at {args.max_length} tokens, bf16 autocast, AdamW in float32; +C: activation checkpointing\n")
    print("| model | parameters | what stays | a pair | a pair +C | 8 pairs | 32 pairs | 32 pairs +C |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for name in args.models:
        model = AutoModelForCausalLM.from_config(GPT2Config(**SHAPES[name]))
        disable_dropout_in_model(model)
        model.train()
        add_fused_lm_head(model, cast_lm_head_to_fp32=True, outputs=("log_probs", "entropy", "mean_logits", "is_top1"))
        patch_packed_forward(model, 8 * args.max_length)
        parameters = model.num_parameters()
        plain = [saved(model, pairs, args.max_length) for pairs in (1, 3)]
        model.activation_checkpointing_enable()
        kept = [saved(model, pairs, args.max_length) for pairs in (1, 3)]
        pair, pair_c = (plain[1] - plain[0]) / 2, (kept[1] - kept[0]) / 2
        stays = 16 * parameters + plain[0] - pair + TILE  # bf16 copies of the weights are saved once a forward
        cells = [stays, pair, pair_c, stays + 8 * pair, stays + 32 * pair, stays + 32 * pair_c]
        print(f"| {name} | {parameters / 1e6:.0f} M | " + " | ".join(f"{cell / 1e9:.2f}" for cell in cells) + " |")


def saved(model: torch.nn.Module, pairs: int, max_length: int) -> int:
    """Bytes that autograd keeps from one forward over `pairs` pairs for the backward pass."""
    prompt, chosen, rejected = ([7] * length for length in HH_PAIR[max_length])
    trees = [(prompt, (chosen, rejected))] * pairs
    width = len(prompt) + max(len(chosen), len(rejected))
    ids = torch.full((2 * pairs, width), 7)
    mask, labels = torch.ones_like(ids), ids.clone()
    labels[:, : len(prompt)] = -100
    labels[:pairs, len(prompt) + len(chosen) :] = -100
    labels[pairs:, len(prompt) + len(rejected) :] = -100
    parameters, storages = {p.untyped_storage().data_ptr() for p in model.parameters()}, {}

    def count(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor)
    with hooks, torch.autocast("cpu", torch.bfloat16):
        out = model(
            input_ids=ids, attention_mask=mask, labels=labels, packed=pack(trees, 4 * max_length), fused_lm_head=True
        )
    del out
    return sum(storages.values())


if __name__ == "__main__":
    with report_errors():
        main()
