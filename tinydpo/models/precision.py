"""Which dtype is fast on a device, and float32 from the LM head on, whatever the blocks compute in.

A pretrained GPT-2's logits are many tens below zero, where bfloat16 has steps of a quarter or a half: rounded to them,
a pair's margin errs by more than DPO moves it. So weights stay float32, blocks may compute in half precision under
autocast, and the LM head gives float32 outside of it. Where hardware multiplies short inputs fast and still sums in
float32 (TF32 on GPUs, bf16 on CPUs with AMX), the head's products use it.
"""

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


def has_fast_bf16(device: str) -> bool:
    """Whether a device ("cuda" or "cpu") has bf16 in hardware (docs/performance.md); others emulate it slowly."""
    import torch

    if device == "cuda":
        return torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 0)
    return torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()


def get_compute_dtype(model: Any) -> Any:
    """The torch dtype that a model's blocks compute in, and their attention adds a mask in."""
    import torch

    if torch.is_autocast_enabled(model.device.type):
        return torch.get_autocast_dtype(model.device.type)
    return getattr(model, "compute_dtype", None) or model.dtype


def set_compute_dtype(model: Any, dtype: Any) -> Any:
    """Make a model with float32 weights compute its blocks in `dtype` and its head in float32; returns it."""
    import torch

    model.compute_dtype = dtype
    if dtype == torch.float32:
        return model
    forward = model.forward

    @functools.wraps(type(model).forward)  # `generate` reads its arguments off the signature
    def forward_under_autocast(*args: Any, **kwargs: Any) -> Any:
        with torch.autocast(model.device.type, dtype, enabled=model.compute_dtype == dtype):
            return forward(*args, **kwargs)

    model.forward = forward_under_autocast
    return use_float32_head(model)


def use_float32_head(model: Any) -> Any:
    """Make a model's head compute in float32, outside autocast; returns the model.

    The head is a causal LM's output layer (for its own forward and `generate`; trainers use TRL's fused head, which
    has an option for it), or a reward model's `score`, where that is one linear layer.
    """
    import torch

    head = model.get_output_embeddings()
    precision = "medium"
    if head is None:
        head = getattr(model, "score", None)
        precision = "highest"  # rewards are differences of two scores, and bfloat16 has steps of 0.03 at a score of 5
        if not isinstance(head, torch.nn.Linear):
            return model

    def project(hidden: torch.Tensor) -> torch.Tensor:
        bias = None if head.bias is None else head.bias.float()
        is_float32 = getattr(model, "compute_dtype", None) == torch.float32  # inside `float32_mode`
        products = matmul_precision("highest" if is_float32 else precision)
        with torch.autocast(hidden.device.type, enabled=False), products:
            return torch.nn.functional.linear(hidden.float(), head.weight.float(), bias)

    head.forward = project
    return model


@contextmanager
def float32_mode(model: Any) -> Iterator[None]:
    """Compute in float32, products included, whatever the model computes in otherwise."""
    import torch

    before = getattr(model, "compute_dtype", None)
    model.compute_dtype = torch.float32
    try:
        with torch.autocast(model.device.type, enabled=False), matmul_precision("highest"):
            yield
    finally:
        model.compute_dtype = before


@contextmanager
def matmul_precision(precision: str) -> Iterator[None]:
    """`torch.set_float32_matmul_precision` for a while: "highest", or "medium" for inputs cut to TF32 or bf16."""
    import torch

    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
