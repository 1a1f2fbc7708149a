"""Whether a model computes packed rows rightly: refused by what it is, or held against its own plain forward.

Packed rows need a model that takes each token's position from `position_ids` and what it sees from a 4-D mask. Some
decoders ignore one of them in silence (sliding windows, ALiBi, GPT-Neo's local layers). What can be read off a model
is read first; then a full row is computed both ways, before the first step and again in train mode. Wherever the
weights are float32 that is done in float32, outside autocast: the question does not depend on precision.
"""

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from transformers import PreTrainedModel

from tinydpo.engine.packing import Tree
from tinydpo.errors import UserError

INSTEAD = "pass --shared_prefix false, which runs the plain padded forward"
# Root mean square, over tokens, of the difference in natural-log probability. In float32 rounding makes some 1e-6.
TOLERANCE = 1e-4
# Where weights themselves are short, rounding is measured: by how far one rounding more, at its start, moves the plain
# forward (padded otherwise, it gives the same bits on CPUs). docs/performance.md has the rates of false alarms.
ROUNDINGS = 3.0


def check_packable(model: PreTrainedModel, row_length: int) -> None:
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
    window = get_attention_window(config)
    if window is not None and window < row_length:
        raise UserError(f"{name} attends over {window} tokens, but packed rows have up to {row_length}; {INSTEAD}")
    if config._attn_implementation not in ("sdpa", "eager"):
        raise UserError(
            f"attn_implementation {config._attn_implementation} takes no 4-D mask, which packed rows need; pass "
            f"--attn_implementation sdpa, or {INSTEAD}"
        )
    if hasattr(config, "output_router_logits"):  # TRL asks for them whatever the config says
        raise UserError(f"{name} is a mixture of experts, balanced over padded sequences; {INSTEAD}")


def get_attention_window(config: Any) -> int | None:
    """The fewest tokens that some layer of a model looks back over, None where all see everything."""
    windows = []
    if getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True):
        kinds = getattr(config, "layer_types", None) or ["sliding_attention"]
        windows += [config.sliding_window] * any("sliding" in kind for kind in kinds)
    if "local" in (getattr(config, "attention_layers", None) or ()):  # GPT-Neo
        windows.append(config.window_size)
    return min(windows, default=None)


def fill_row(trees: Sequence[Tree], row_length: int) -> list[Tree]:
    """As many trees as one row holds, from the first on, and over again where they are too few."""
    row, room = [], row_length
    while True:
        prompt, completions = tree = trees[len(row) % len(trees)]
        room -= len(prompt) + sum(map(len, completions))
        if room < 0 and row:
            return row
        row.append(tree)


def check_same_results(
    model: PreTrainedModel,
    together: Callable[[], torch.Tensor],
    alone: Callable[[], torch.Tensor],
    dtype: torch.dtype,
    of: str = "log-probs",
) -> None:
    """Refuse a model whose packed rows differ from its plain forward by more than rounding.

    Args:
        model: without gradients.
        together: computes token log-probs, or what else `of` says, from a full packed row, of any shape.
        alone: computes the same from the plain forward.
        dtype: what both round to: float32, or what weights or a sharded run are kept in.
        of: what they compute, in a word.

    Raises:
        UserError: they differ, or packed rows cannot be computed at all.
    """
    plain = alone()
    off = _rms(explain_packing_errors(together, model) - plain)
    allowed, told = TOLERANCE, f"in float32, where rounding makes less than {TOLERANCE:g}"
    if dtype != torch.float32:
        with _rounded_once_more(model, dtype):
            rounding = _rms(alone() - plain)
        allowed = max(TOLERANCE, ROUNDINGS * rounding)
        told = f"where one rounding to {str(dtype).removeprefix('torch.')} makes {rounding:.2g}"
    if not off <= allowed:
        raise UserError(
            f"{type(model).__name__} gives other {of} in packed rows than alone (by {off:.2g} on average, "
            f"{told}): it does not go by position_ids and a 4-D mask; {INSTEAD}"
        )


def get_low_precision_dtype(model: torch.nn.Module) -> torch.dtype | None:
    """The shortest type that a model keeps weights in, None where that is float32; 4 and 8 bits count as bfloat16."""
    dtypes = {parameter.dtype for parameter in model.parameters()} - {torch.float32, torch.float64}
    short = next((dtype for dtype in (torch.bfloat16, torch.float16) if dtype in dtypes), None)
    return short or (torch.bfloat16 if dtypes else None)


@contextmanager
def _rounded_once_more(model: PreTrainedModel, dtype: torch.dtype) -> Iterator[None]:
    """Move the embedded tokens by as much as rounding to `dtype` may."""

    def move(module: torch.nn.Module, args: tuple, embedded: torch.Tensor) -> torch.Tensor:
        generator = torch.Generator(embedded.device).manual_seed(0)
        by = torch.rand(embedded.shape, generator=generator, device=embedded.device) - 0.5
        return (embedded.float() * (1 + torch.finfo(dtype).eps * by)).to(embedded.dtype)

    hook = model.get_input_embeddings().register_forward_hook(move)
    try:
        yield
    finally:
        hook.remove()


def _rms(difference: torch.Tensor) -> float:
    return difference.float().square().mean().sqrt().item()


def explain_packing_errors(forward: Callable[[], Any], model: PreTrainedModel) -> Any:
    """`forward()`, or a UserError where the model cannot take packed rows at all."""
    try:
        return forward()
    except torch.OutOfMemoryError:
        raise
    except (TypeError, ValueError, RuntimeError, IndexError) as error:
        raise UserError(f"{type(model).__name__} cannot compute packed rows ({error}); {INSTEAD}") from error
