"""Whether a model computes packed rows rightly: refused by what it is, or held against its own plain forward.

Packed rows need a model that takes each token's position from `position_ids` and what it sees from a 4-D mask. Some
decoders ignore one of them in silence (sliding windows, ALiBi, GPT-Neo's local layers). What can be read off a model
is read first; then a full row is computed both ways, before the first step and again in train mode. Wherever the
weights are float32 that is done in float32, outside autocast: the question does not depend on precision.
"""

import functools
import inspect
import os
import types
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import trl.trainer.utils
from transformers import PreTrainedModel, TrainingArguments
from transformers.activations import GELUTanh, NewGELUActivation
from transformers.modeling_layers import GradientCheckpointingLayer

from tinydpo.errors import UserError
from tinydpo.models.precision import in_float32_mode
from tinydpo.training.packing import Tree, build_additive_mask

# Vocabulary columns that TRL's LM head projects at once on a CPU: its own 32,768 do not stay in the cache (forward and
# backward of 664 positions over GPT-2's vocabulary took 3.5 s, with 1,024 1.6 s, on two cores).
CPU_TILE = 1024
PER_TOKEN = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1")


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


def patch_packed_forward(model: PreTrainedModel, row_length: int) -> None:
    """Have a model with TRL's fused LM head compute `packed` rows where a batch brings them.

    Args:
        model: a causal LM or a PEFT model around one, after TRL's `add_fused_lm_head`.
        row_length: the most tokens in a packed row.

    Raises:
        UserError: the model cannot compute packed rows.
    """
    model = unwrap_peft(model)
    if getattr(model.forward, "packs", False):
        return
    check_packable(model, row_length)
    use_fused_gelu(model)
    # What accelerate prepared, as it does a reference, enters autocast by itself, whatever `exactly` asks for.
    wrapped, bare = model.forward, getattr(model, "_original_forward", model.forward)

    @functools.wraps(type(model).forward)  # `generate` reads its arguments off the signature
    def forward(
        self: PreTrainedModel, *args: Any, packed: dict | None = None, fused_lm_head: bool = False, **kwargs: Any
    ) -> Any:
        fused_forward = bare if in_float32_mode(self) else wrapped
        if packed is None or not fused_lm_head:
            return fused_forward(*args, fused_lm_head=fused_lm_head, **kwargs)
        return _packed_forward(self, fused_forward, packed, **kwargs)

    forward.packs = True
    model.forward = types.MethodType(forward, model)


def use_fused_gelu(model: PreTrainedModel) -> None:
    """Swap GPT-2's GELU, eight elementwise operations, for PyTorch's one: the same formula, rounded otherwise."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, NewGELUActivation):
                setattr(module, name, GELUTanh())


def _packed_forward(
    model: PreTrainedModel,
    fused_forward: Any,
    packed: dict[str, torch.Tensor],
    labels: torch.Tensor,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    **kwargs: Any,
) -> Any:
    """TRL's fused output for a padded batch, (sequences, length - 1) a field, computed from its packed rows."""
    answers = labels[:, 1:] != -100

    def keep(module: torch.nn.Module, args: tuple, output: Any) -> Any:
        """Leave the LM head the positions that predict an answer's token, on CPUs too, where TRL's takes all."""
        output.last_hidden_state = output.last_hidden_state.flatten(0, 1)[packed["predicts"]][None]
        return output

    with model.base_model.register_forward_hook(keep), _lm_head_tile(CPU_TILE if model.device.type == "cpu" else None):
        output = fused_forward(
            input_ids=packed["input_ids"],
            position_ids=packed["position_ids"],
            attention_mask=build_additive_mask(packed["segment_ids"], packed["prefix_ids"], get_mask_dtype(model)),
            shift_labels=packed["targets"][None],  # as labels[:, 1:][answers], without waiting for a GPU
            fused_lm_head=True,
            **kwargs,
        )
    for name in PER_TOKEN:
        if getattr(output, name) is not None:
            setattr(output, name, output[name].new_zeros(answers.shape).masked_scatter(answers, output[name]))
    output.label_mask = answers
    return output


@contextmanager
def _lm_head_tile(columns: int | None) -> Iterator[None]:
    """Have TRL's LM head take so many columns of the vocabulary at once, None: its own number."""
    before = trl.trainer.utils._CHUNKED_LOGPROB_CHUNK_SIZE
    trl.trainer.utils._CHUNKED_LOGPROB_CHUNK_SIZE = columns or before
    try:
        yield
    finally:
        trl.trainer.utils._CHUNKED_LOGPROB_CHUNK_SIZE = before


def get_mask_dtype(model: PreTrainedModel) -> torch.dtype:
    """What a model's attention adds a mask in."""
    device = model.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else model.dtype


def unwrap_peft(model: torch.nn.Module) -> PreTrainedModel:
    """The model below a PEFT wrapper, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model
