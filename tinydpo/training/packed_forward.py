"""A model's forward on packed rows, and the check that it gives what the plain forward gives.

Packed rows need a model that takes each token's position from `position_ids` and what it sees from a 4-D mask. Some
silently ignore one of them (ALiBi, sliding windows). `check_packable` refuses those that their configuration gives
away; `check_same_results` then computes one full row both ways.
"""

import functools
import inspect
import types
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.activations import GELUTanh, NewGELUActivation
from transformers.modeling_layers import GradientCheckpointingLayer

from tinydpo.errors import UserError
from tinydpo.models.precision import float32_mode, get_compute_dtype
from tinydpo.training.packing import Tree, build_model_inputs, count_tokens

# Vocabulary columns that TRL's LM head projects at once on a CPU. TRL's own 32,768 do not stay in the cache: forward
# and backward of 664 positions over GPT-2's vocabulary took 3.5 s, with 1,024 columns 1.6 s, on two cores.
CPU_TILE = 1024
PER_TOKEN_FIELDS = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
USE_PADDED_HINT = "pass --shared_prefix false, which runs the plain padded forward"

# How far packed rows may be from the plain forward: the root mean square, over tokens, of the difference in
# natural-log probability. In float32 rounding makes some 1e-6.
FLOAT32_TOLERANCE = 1e-4
# With weights (or a sharded run) in 16, 8 or 4 bits. Measured on SmolLM2-135M's weights with rows of 512 tokens from
# HH-RLHF (2026-11-27): rounding makes at most 0.006 in fp16, 0.04 in bf16 and NF4, 0.2 in int8, while a model that
# ignores positions or the mask, attends over a window or weighs places in the row (ALiBi) is off by at least 0.37.
LOW_PRECISION_TOLERANCE = 0.25


def patch_packed_forward(model: PreTrainedModel, row_length: int) -> None:
    """Let a causal LM with TRL's fused LM head, PEFT or not, compute `packed` rows when a batch has them."""
    model = unwrap_peft(model)
    check_packable(model, row_length)
    use_fused_gelu(model)
    fused_forward = model.forward

    @functools.wraps(type(model).forward)  # `generate` reads its arguments from the signature
    def forward(
        self: PreTrainedModel, *args: Any, packed: dict | None = None, fused_lm_head: bool = False, **kwargs: Any
    ) -> Any:
        if packed is None or not fused_lm_head:
            return fused_forward(*args, fused_lm_head=fused_lm_head, **kwargs)
        return _packed_forward(self, fused_forward, packed, **kwargs)

    model.forward = types.MethodType(forward, model)


def _packed_forward(
    model: PreTrainedModel,
    fused_forward: Callable[..., Any],
    packed: dict[str, torch.Tensor],
    labels: torch.Tensor,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    **kwargs: Any,
) -> Any:
    """TRL's fused output for a padded batch, (sequences, length - 1) a field, computed from its packed rows."""
    answers = labels[:, 1:] != -100

    def keep_predicting_positions(module: torch.nn.Module, args: tuple, output: Any) -> Any:
        """Give the LM head only the positions that predict an answer's token; on CPUs TRL's head scores them all."""
        output.last_hidden_state = output.last_hidden_state.flatten(0, 1)[packed["predicts"]][None]
        return output

    with model.base_model.register_forward_hook(keep_predicting_positions):
        output = fused_forward(
            **build_model_inputs(packed, get_compute_dtype(model)),
            shift_labels=packed["targets"][None],  # the same as labels[:, 1:][answers], without waiting for the GPU
            fused_lm_head=True,
            **kwargs,
        )
    # By index: the backward pass of `masked_scatter` waits for the GPU to say how many places the mask has.
    places = torch.nonzero_static(answers, size=len(packed["targets"])).unbind(1)
    for name in PER_TOKEN_FIELDS:
        values = getattr(output, name)
        if values is not None:
            setattr(output, name, values.new_zeros(answers.shape).index_put(places, values.flatten()))
    output.label_mask = answers
    return output


def unwrap_peft(model: torch.nn.Module) -> PreTrainedModel:
    """The model inside a PEFT wrapper, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def use_fused_gelu(model: PreTrainedModel) -> None:
    """Replace GPT-2's GELU, eight elementwise operations, by PyTorch's single one: the same formula."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, NewGELUActivation):
                setattr(module, name, GELUTanh())


def check_packable(model: PreTrainedModel, row_length: int) -> None:
    """Refuse a causal LM or reward model that is known to be wrong in packed rows of up to `row_length` tokens."""
    config = model.config.get_text_config()
    name = type(model).__name__
    if "position_ids" not in inspect.signature(model.base_model.forward).parameters:
        raise UserError(f"{name} takes no position ids, which packed rows need; {USE_PADDED_HINT}")
    window = get_attention_window(config)
    if window is not None and window < row_length:
        raise UserError(
            f"{name} attends over {window} tokens, but packed rows have up to {row_length}; {USE_PADDED_HINT}"
        )
    if config._attn_implementation not in ("sdpa", "eager"):
        raise UserError(
            f"attn_implementation {config._attn_implementation} takes no 4-D mask, which packed rows need; pass "
            f"--attn_implementation sdpa, or {USE_PADDED_HINT}"
        )
    if hasattr(config, "output_router_logits"):  # TRL asks for them, whatever the value in the config
        raise UserError(
            f"{name} is a mixture of experts, whose load-balancing loss TRL computes on padded sequences; "
            f"{USE_PADDED_HINT}"
        )


def get_attention_window(config: Any) -> int | None:
    """The fewest tokens that some layer of a model attends over, None if all layers see everything."""
    windows = []
    if getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True):
        layer_types = getattr(config, "layer_types", None) or ["sliding_attention"]
        if any("sliding" in layer_type for layer_type in layer_types):
            windows.append(config.sliding_window)
    if "local" in (getattr(config, "attention_layers", None) or ()):  # GPT-Neo
        windows.append(config.window_size)
    return min(windows, default=None)


def fill_row(trees: Sequence[Tree], row_length: int) -> list[Tree]:
    """As many trees as fit in one row, from the first on, starting over if there are too few."""
    row: list[Tree] = []
    tokens = 0
    while True:
        tree = trees[len(row) % len(trees)]
        tokens += count_tokens(tree)
        if tokens > row_length and row:
            return row
        row.append(tree)


def has_float32_weights(model: torch.nn.Module) -> bool:
    """Whether all weights are float32 or more; quantized ones are not."""
    return {parameter.dtype for parameter in model.parameters()} <= {torch.float32, torch.float64}


def check_same_results(
    model: PreTrainedModel,
    compute_packed: Callable[[], torch.Tensor],
    compute_plain: Callable[[], torch.Tensor],
    in_float32: bool,
) -> None:
    """Refuse a model whose packed rows differ from its plain forward by more than rounding, or fail.

    Both compute log-probs or scores; in float32, where rounding hides nothing, if they can (`in_float32`).
    """
    name = type(model).__name__
    with torch.no_grad(), float32_mode(model) if in_float32 else nullcontext():
        plain = compute_plain()
        try:
            packed = compute_packed()
        except torch.OutOfMemoryError:
            raise
        except (AttributeError, TypeError, ValueError, RuntimeError, IndexError) as error:
            raise UserError(f"{name} cannot compute packed rows ({error}); {USE_PADDED_HINT}") from error
    difference = (packed - plain).float().square().mean().sqrt().item()
    tolerance = FLOAT32_TOLERANCE if in_float32 else LOW_PRECISION_TOLERANCE
    if not difference <= tolerance:  # NaN is refused too
        raise UserError(
            f"{name} gives different results in packed rows and in its plain forward (by {difference:.2g} on average; "
            f"rounding makes less than {tolerance:g}), maybe because it ignores position_ids or the 4-D mask; "
            f"{USE_PADDED_HINT}"
        )


def compile_blocks(model: PreTrainedModel, options: dict[str, Any]) -> None:
    """Compile a model's transformer blocks: one graph serves all, and a second one batches of a single row."""
    for module in model.modules():
        if isinstance(module, GradientCheckpointingLayer):
            module.compile(dynamic=True, **options)
