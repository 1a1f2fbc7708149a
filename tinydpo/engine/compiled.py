"""`--torch_compile true` on packed rows: the blocks are compiled once, for rows of any number and length.

transformers would compile the model as a whole, and again for every shape that its padded and packed calls take. Here
only what is expensive is compiled, with symbolic shapes, so that rows need no padding to one size. Checkpoints keep
their names, since no module is wrapped.
"""

import functools
import os
from typing import Any

import torch
from transformers import PreTrainedModel, TrainingArguments


def take_over(args: TrainingArguments) -> dict[str, Any] | None:
    """What `torch.compile` was asked for, or None; transformers and accelerate then leave the model alone."""
    if not args.torch_compile:
        return None
    options = {"backend": args.torch_compile_backend or "inductor", "mode": args.torch_compile_mode}
    args.torch_compile, args.torch_compile_backend, args.torch_compile_mode = False, None, None
    for name in [name for name in os.environ if name.startswith("ACCELERATE_DYNAMO_")]:
        del os.environ[name]
    return options


def compile_blocks(model: PreTrainedModel, options: dict[str, Any]) -> None:
    """Compile what lies before a causal LM's head, for calls with a 4-D mask: packed rows, and nothing else."""
    base = model.base_model
    plain = base.forward
    compiled = torch.compile(plain, dynamic=True, **options)

    @functools.wraps(plain)
    def forward(*args: Any, attention_mask: torch.Tensor | None = None, **kwargs: Any) -> Any:
        # A single row, as a small last batch may be, would be compiled anew: PyTorch takes a size of 1 for fixed.
        packed = attention_mask is not None and attention_mask.dim() == 4 and len(attention_mask) > 1
        return (compiled if packed else plain)(*args, attention_mask=attention_mask, **kwargs)

    base.forward = forward
