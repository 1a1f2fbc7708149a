"""Log-probs of completions under a model: the basis of every figure of the evaluation.

Prompts are computed once and rows packed (`packing`), or, for models that cannot take such rows, sequences padded. The
LM head runs only where a completion token is predicted, through the model's own `logits_to_keep`, so that whatever a
family does after the LM head (Gemma's softcapping, Cohere's and Granite's scale) happens here too.
"""

from typing import NamedTuple

import numpy as np
import torch
from datasets import Dataset
from torch.nn.functional import cross_entropy
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from tinydpo.models.precision import get_compute_dtype
from tinydpo.training.packed_forward import check_packable, check_same_results, fill_row, has_float32_weights
from tinydpo.training.packing import Tree, build_model_inputs, count_tokens, pack

# Positions whose softmax is taken at once: 64 rows of GPT-2's vocabulary stay in a CPU's cache (2,048 rows take 0.17 s
# on one core, against 0.48 s by 1,024 at once), and the float32 copy of bfloat16 logits stays small.
SOFTMAX_ROWS = 64


class PairLogps(NamedTuple):
    """Completion log-probs of n pairs under one model, in the dataset's order; all arrays have the shape (n,)."""

    chosen: np.ndarray  # float64, natural-log probability of the whole completion, its end token included
    rejected: np.ndarray
    chosen_tokens: np.ndarray  # int64, how many tokens the sum runs over
    rejected_tokens: np.ndarray


def token_logps(
    model: PreTrainedModel,
    prompts: list[list[int]],
    completions: list[list[int]],
    batch_size: int = 32,
    desc: str = "scoring",
    row_length: int | None = None,
) -> list[np.ndarray]:
    """Natural-log probability of every completion token given the prompt and the completion so far.

    The model is a causal LM in eval mode. `batch_size` (completions in a forward pass) changes speed and memory only.
    `row_length` is the most tokens in a packed row; None pads sequences, for models that cannot take packed rows.

    Returns:
        n float64 arrays, the i-th of shape (len(completions[i]),), in the order given. Head and softmax are computed
        in float32, whatever the blocks compute in (`models.precision`).
    """
    trees = [(prompt, (completion,)) for prompt, completion in zip(prompts, completions, strict=True)]
    return [logps for (logps,) in _get_tree_logps(model, trees, batch_size, desc, row_length)]


def pair_logps(
    model: PreTrainedModel, pairs: Dataset, batch_size: int = 32, desc: str = "pairs", row_length: int | None = None
) -> PairLogps:
    """Log-probs of both completions of every pair: rows with `prompt_ids`, `chosen_ids` and `rejected_ids`.

    The other arguments are those of `token_logps`. In packed rows, a pair's prompt is computed once.
    """
    prompts, chosen, rejected = (pairs[name][:] for name in ("prompt_ids", "chosen_ids", "rejected_ids"))
    trees = list(zip(prompts, zip(chosen, rejected, strict=True), strict=True))
    logps = _get_tree_logps(model, trees, batch_size, desc, row_length)
    return PairLogps(
        chosen=np.array([of_chosen.sum() for of_chosen, _ in logps]),
        rejected=np.array([of_rejected.sum() for _, of_rejected in logps]),
        chosen_tokens=np.array([len(ids) for ids in chosen]),
        rejected_tokens=np.array([len(ids) for ids in rejected]),
    )


def _get_tree_logps(
    model: PreTrainedModel, trees: list[Tree], batch_size: int, desc: str, row_length: int | None
) -> list[list[np.ndarray]]:
    """For each tree, the log-probs of each of its completions; all trees have the same number of them."""
    if not trees:
        return []
    for index, (prompt, completions) in enumerate(trees):
        if not prompt or not all(completions):
            raise ValueError(f"row {index} has an empty {'completion' if prompt else 'prompt'}: nothing to score.")
    # Longest first: the batch that needs the most memory comes at once, not after ten minutes.
    order = sorted(range(len(trees)), key=lambda i: -count_tokens(trees[i]))
    if row_length is not None:
        _check_packed_rows(model, [trees[i] for i in order[:64]], row_length)
    result: list[list[np.ndarray]] = [[] for _ in trees]
    trees_per_batch = max(1, batch_size // len(trees[0][1]))
    for start in tqdm(range(0, len(order), trees_per_batch), desc=desc, leave=False, disable=None):
        batch = order[start : start + trees_per_batch]
        logps = _get_batch_logps(model, [trees[i] for i in batch], row_length)
        for place, values in enumerate(logps):
            result[batch[place % len(batch)]].append(values.double().numpy())
    return result


def _check_packed_rows(model: PreTrainedModel, trees: list[Tree], row_length: int) -> None:
    """Refuse a model whose log-probs for these trees in a packed row differ from those of its plain forward."""
    check_packable(model, row_length)
    row = fill_row(trees, row_length)
    check_same_results(
        model,
        compute_packed=lambda: torch.cat(_get_batch_logps(model, row, row_length, rows=[list(range(len(row)))])),
        compute_plain=lambda: torch.cat(_get_batch_logps(model, row, None)),
        in_float32=has_float32_weights(model),
    )


@torch.no_grad()
def _get_batch_logps(
    model: PreTrainedModel, trees: list[Tree], row_length: int | None, rows: list[list[int]] | None = None
) -> list[torch.Tensor]:
    """Token log-probs, on the CPU: of the first completion of every tree, then of every second one, and so on."""
    completions_per_tree = len(trees[0][1])
    if row_length is None:  # each completion in its own row, behind a copy of the prompt
        trees = [(prompt, (completions[i],)) for i in range(completions_per_tree) for prompt, completions in trees]
        completions_per_tree = 1
    packed = {name: values.to(model.device) for name, values in pack(trees, row_length, rows).items()}
    if row_length is None:
        inputs = {"input_ids": packed["input_ids"], "attention_mask": (packed["segment_ids"] >= 0).long()}
    else:
        inputs = build_model_inputs(packed, get_compute_dtype(model))
    # A prompt's last token predicts the first token of several completions, but its logits are computed once.
    keep = torch.zeros_like(packed["input_ids"], dtype=torch.bool)
    keep.flatten()[packed["predicts"]] = True
    logits = model(**inputs, logits_to_keep=keep, use_cache=False).logits.flatten(0, -2)
    row_of_logits = (keep.flatten().cumsum(0) - 1)[packed["predicts"]]
    chunks = zip(row_of_logits.split(SOFTMAX_ROWS), packed["targets"].split(SOFTMAX_ROWS), strict=True)
    logps = [-cross_entropy(logits[index].float(), targets, reduction="none") for index, targets in chunks]
    lengths = [len(completions[i]) for i in range(completions_per_tree) for _, completions in trees]
    return list(torch.cat(logps).cpu().split(lengths))
