"""bf16 and fp16 matrix products as hardware makes them, inputs short and sums in float32, on CPUs that lack them.

Without this, products in bf16 took 4 to 130 times as long as in float32 on a CPU with AVX2 alone. What is left to
differ from a GPU is the order of the sums.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tinydpo.models.precision import has_fast_bf16

aten = torch.ops.aten
PRODUCTS = {aten.mm.default, aten.addmm.default, aten.bmm.default, aten.baddbmm.default}


class ShortProducts(TorchDispatchMode):
    """While it is entered, products of these types are summed in float32 and rounded once."""

    def __init__(self, dtypes: set[torch.dtype]):
        """The types that a machine lacks."""
        super().__init__()
        self.dtypes = dtypes

    def __torch_dispatch__(self, operation: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        """Every operation passes here."""
        dtype = args[0].dtype if operation in PRODUCTS else None
        if dtype not in self.dtypes:
            return operation(*args, **kwargs or {})
        longer = (arg.float() if isinstance(arg, torch.Tensor) else arg for arg in args)
        return operation(*longer, **kwargs or {}).to(dtype)


def emulated() -> set[torch.dtype]:
    """The short types that this machine does not multiply fast."""
    if torch.cuda.is_available():
        return set()
    has = {torch.bfloat16: has_fast_bf16("cpu"), torch.float16: torch.cpu._is_amx_fp16_supported()}
    return {dtype for dtype, fast in has.items() if not fast}


def short_products() -> AbstractContextManager:
    """`ShortProducts` of what is `emulated` here, else nothing."""
    return ShortProducts(dtypes) if (dtypes := emulated()) else nullcontext()
