"""Whether a model computes packed rows rightly: refused by what it is, or held against its own plain forward.

Packed rows need a model that takes each token's position from `position_ids` and what it sees from a 4-D mask. Some
decoders ignore one of them in silence (sliding windows, ALiBi, GPT-Neo's local layers). What can be read off a model
is read first; then a full row is computed both ways, before the first step and again in train mode.
"""

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from tinydpo.engine.packing import Tree
from tinydpo.errors import UserError

INSTEAD = "pass --shared_prefix false, which runs the plain padded forward"
# Root mean square, over tokens, of the difference in natural-log probability. Packed and padded rows round
# differently: by about 1e-6 in float32. In the half precisions rounding alone makes some 1e-2, and an error below it
# is not seen.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.05, torch.float16: 0.02}
TF32_TOLERANCE = 5e-3


def check_model(model: PreTrainedModel, row_length: int) -> None:
    """Refuse what is known beforehand to be wrong in packed rows.

    Args:
        model: a causal LM.
        row_length: the most tokens in a packed row.

    Raises:
        UserError: no position ids, an attention window shorter than a row, an attention backend without 4-D masks, or
            a mixture of experts.
    """
    config, name = model.config.get_text_config(), type(model).__name__
    if "position_ids" not in inspect.signature(model.base_model.forward).parameters:
        raise UserError(f"{name} takes no position ids, which packed rows need; {INSTEAD}")
    window = attention_window(config)
    if window is not None and window < row_length:
        raise UserError(f"{name} attends over {window} tokens, but packed rows have up to {row_length}; {INSTEAD}")
    if config._attn_implementation not in ("sdpa", "eager"):
        raise UserError(
            f"attn_implementation {config._attn_implementation} takes no 4-D mask, which packed rows need; pass "
            f"--attn_implementation sdpa, or {INSTEAD}"
        )
    if hasattr(config, "output_router_logits"):  # TRL asks for them whatever the config says
        raise UserError(f"{name} is a mixture of experts, balanced over padded sequences; {INSTEAD}")


def attention_window(config: Any) -> int | None:
    """The fewest tokens that some layer of a model looks back over, None where all see everything."""
    windows = []
    if getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True):
        kinds = getattr(config, "layer_types", None) or ["sliding_attention"]
        windows += [config.sliding_window] * any("sliding" in kind for kind in kinds)
    if "local" in (getattr(config, "attention_layers", None) or ()):  # GPT-Neo
        windows.append(config.window_size)
    return min(windows, default=None)


def full_row(trees: Sequence[Tree], row_length: int) -> list[Tree]:
    """As many trees as one row holds, from the first on, and over again where they are too few."""
    row, room = [], row_length
    while True:
        prompt, completions = tree = trees[len(row) % len(trees)]
        room -= len(prompt) + sum(map(len, completions))
        if room < 0 and row:
            return row
        row.append(tree)


def check_same(together: torch.Tensor, alone: torch.Tensor, model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Refuse a model whose packed rows differ from its plain forward by more than rounding.

    Args:
        together: token log-probs from a full packed row, any shape.
        alone: the same from the plain forward.
        model: the causal LM, for its name and device.
        dtype: what was computed in.

    Raises:
        UserError: they differ.
    """
    tf32 = model.device.type == "cuda" and torch.backends.cuda.matmul.allow_tf32 and dtype == torch.float32
    tolerance = TF32_TOLERANCE if tf32 else TOLERANCE[dtype]
    rms = (together - alone).float().square().mean().sqrt().item()
    if not rms <= tolerance:
        raise UserError(
            f"{type(model).__name__} gives other log-probs in packed rows than alone (by {rms:.2g} nats a token, "
            f"allowed {tolerance:.2g}): it does not go by position_ids and a 4-D mask; {INSTEAD}"
        )


def or_refuse(forward: Callable[[], Any], model: PreTrainedModel) -> Any:
    """`forward()`, or a UserError where the model cannot take packed rows at all."""
    try:
        return forward()
    except torch.OutOfMemoryError:
        raise
    except (TypeError, ValueError, RuntimeError, IndexError) as error:
        raise UserError(f"{type(model).__name__} cannot compute packed rows ({error}); {INSTEAD}") from error
