"""Log-probs of completions under a model: what every figure of the evaluation is made of.

Sequences are sorted by length, padded on the right and batched. The LM head runs only where a completion token is
predicted: at 128 tokens it is a seventh of GPT-2 Medium's work and nearly all of its memory. Those positions go to the
model's own `logits_to_keep`, so that whatever a family does after the LM head (Gemma's softcapping, Cohere's and
Granite's scale) happens here too. TRL's fused head does the same on a GPU, but on a CPU it scores every position, and
it patches `model.forward`.
"""

from typing import NamedTuple

import numpy as np
import torch
from datasets import Dataset
from torch.nn.functional import cross_entropy
from tqdm.auto import tqdm
from transformers import PreTrainedModel

# Positions whose softmax is taken at once: 64 rows of GPT-2's vocabulary stay in a CPU's cache (2,048 rows take 0.17 s
# on one core, against 0.48 s by 1,024 at once), and the float32 copy of bfloat16 logits stays small.
SOFTMAX_ROWS = 64


class PairLogps(NamedTuple):
    """Completion log-probs of n pairs under one model, in the dataset's order.

    chosen, rejected: float64 arrays (n,), natural-log probability of the whole completion, its end token included.
    chosen_tokens, rejected_tokens: int64 arrays (n,), how many tokens each of these sums runs over.
    """

    chosen: np.ndarray
    rejected: np.ndarray
    chosen_tokens: np.ndarray
    rejected_tokens: np.ndarray


@torch.no_grad()
def token_logps(
    model: PreTrainedModel,
    prompts: list[list[int]],
    completions: list[list[int]],
    batch_size: int = 32,
    desc: str = "scoring",
) -> list[np.ndarray]:
    """Natural-log probability of every completion token given the prompt and the completion so far.

    Args:
        model: a causal LM in eval mode.
        prompts: n token lists, each of at least one token (the first completion token needs something before it).
        completions: n token lists, each of at least one token.
        batch_size: sequences in one forward pass; changes speed and memory, not the result (beyond rounding).
        desc: what the progress bar says.

    Returns:
        n float64 arrays, the i-th of shape (len(completions[i]),), in the order given. The softmax is taken
        in float32 whatever the model's dtype.

    Raises:
        ValueError: an empty prompt or completion.
    """
    lengths = [len(prompt) + len(completion) for prompt, completion in zip(prompts, completions, strict=True)]
    for index, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        if not prompt or not completion:
            raise ValueError(f"row {index} has an empty {'completion' if prompt else 'prompt'}: nothing to score.")
    # Longest first: the batch that needs the most memory comes at once, not after ten minutes.
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    result: list[np.ndarray] = [np.empty(0)] * len(lengths)
    for start in tqdm(range(0, len(order), batch_size), desc=desc, leave=False, disable=None):
        rows = order[start : start + batch_size]
        # Padding on the right lies behind a causal mask, so its id is never looked at: 0 exists in every vocabulary.
        input_ids = torch.zeros(len(rows), lengths[rows[0]], dtype=torch.long)
        attention_mask = torch.zeros_like(input_ids)
        predicts = torch.zeros_like(input_ids, dtype=torch.bool)
        for row, i in enumerate(rows):
            input_ids[row, : lengths[i]] = torch.tensor(prompts[i] + completions[i])
            attention_mask[row, : lengths[i]] = 1
            predicts[row, len(prompts[i]) - 1 : lengths[i] - 1] = True
        targets = torch.tensor([token for i in rows for token in completions[i]], device=model.device)
        logits = model(
            input_ids=input_ids.to(model.device),
            attention_mask=attention_mask.to(model.device),
            logits_to_keep=predicts.to(model.device),
            use_cache=False,
        ).logits
        parts = zip(logits.split(SOFTMAX_ROWS), targets.split(SOFTMAX_ROWS), strict=True)
        logps = torch.cat([-cross_entropy(part.float(), target, reduction="none") for part, target in parts])
        ends = np.cumsum([len(completions[i]) for i in rows])
        for i, values in zip(rows, np.split(logps.cpu().numpy().astype(np.float64), ends[:-1]), strict=True):
            result[i] = values
    return result


def pair_logps(model: PreTrainedModel, pairs: Dataset, batch_size: int = 32, desc: str = "pairs") -> PairLogps:
    """Log-probs of both completions of every pair.

    Args:
        model: a causal LM in eval mode.
        pairs: n rows with `prompt_ids`, `chosen_ids`, `rejected_ids` (lists of int).
        batch_size: sequences in one forward pass.
        desc: what the progress bar says.

    Returns:
        `PairLogps`, arrays of shape (n,).
    """
    prompts, chosen, rejected = (pairs[name][:] for name in ("prompt_ids", "chosen_ids", "rejected_ids"))
    logps = token_logps(model, prompts + prompts, chosen + rejected, batch_size, desc)
    sums = np.array([values.sum() for values in logps])
    tokens = np.array([len(values) for values in logps])
    return PairLogps(*np.split(sums, 2), *np.split(tokens, 2))
