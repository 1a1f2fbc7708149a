"""`--torch_compile true` on packed rows: one block is compiled, for all of them and for rows of any number and length.

transformers would compile the model as a whole, and again for every shape that its padded and packed calls take. Here
only what is expensive is compiled, with symbolic shapes, so that rows need no padding to one size. Checkpoints keep
their names, since no module is wrapped.
"""

import functools
import os
from typing import Any

import torch
from transformers import PreTrainedModel, TrainingArguments
from transformers.modeling_layers import GradientCheckpointingLayer


def take_compile_options(args: TrainingArguments) -> dict[str, Any] | None:
    """What `torch.compile` was asked for, by `--torch_compile` or accelerate's `dynamo_backend`, or None.

    transformers and accelerate then leave the model alone.
    """
    told = {name: os.environ.pop(name) for name in list(os.environ) if name.startswith("ACCELERATE_DYNAMO_")}
    backend = told.get("ACCELERATE_DYNAMO_BACKEND", "no").lower()
    if not args.torch_compile and backend == "no":
        return None
    options = {
        "backend": args.torch_compile_backend or backend,
        "mode": args.torch_compile_mode or told.get("ACCELERATE_DYNAMO_MODE"),
    }
    args.torch_compile, args.torch_compile_backend, args.torch_compile_mode = False, None, None
    return options


def compile_blocks(model: PreTrainedModel, options: dict[str, Any]) -> None:
    """Compile the transformer blocks of a causal LM for calls with a 4-D mask: packed rows, and nothing else.

    One graph serves all blocks. PyTorch takes a size of 1 for fixed, so a batch of a single row is one graph more.
    """
    base = model.base_model
    plain = base.forward
    blocks = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    compiled = [torch.compile(block._call_impl, dynamic=True, **options) for block in blocks]

    @functools.wraps(plain)
    def forward(*args: Any, attention_mask: torch.Tensor | None = None, **kwargs: Any) -> Any:
        packed = attention_mask is not None and attention_mask.dim() == 4
        # They stay so for the backward pass, where checkpointing computes the blocks again.
        for block, call in zip(blocks, compiled, strict=True):
            block._compiled_call_impl = call if packed else None
        return plain(*args, attention_mask=attention_mask, **kwargs)

    base.forward = forward
