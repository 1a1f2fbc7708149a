"""bf16 and fp16 matrix products as hardware makes them, inputs short and sums in float32, on CPUs that have none.

Without this, products in bf16 took 4 to 130 times as long as in float32 on a CPU with AVX2 alone. What is left to
differ from a GPU is the order of the sums.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tinydpo.models.precision import fast_bf16

aten = torch.ops.aten
PRODUCTS = {aten.mm.default, aten.addmm.default, aten.bmm.default, aten.baddbmm.default}


class ShortProducts(TorchDispatchMode):
    """While it is entered, short products are summed in float32 and rounded once."""

    def __torch_dispatch__(self, operation: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        """Every operation passes here."""
        dtype = args[0].dtype if operation in PRODUCTS else None
        if dtype not in (torch.bfloat16, torch.float16):
            return operation(*args, **kwargs or {})
        longer = (arg.float() if isinstance(arg, torch.Tensor) else arg for arg in args)
        return operation(*longer, **kwargs or {}).to(dtype)


def short_products() -> AbstractContextManager:
    """`ShortProducts` where this machine has no fast bf16, else nothing."""
    return nullcontext() if torch.cuda.is_available() or fast_bf16("cpu") else ShortProducts()
