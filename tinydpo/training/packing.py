"""Rows without padding: prompts and their completions side by side, unable to see each other.

A tree is a prompt with its completions, laid out in one row as `prompt | completion | completion …`. The prompt is
computed once. Positions of every completion continue from the prompt's end, and a mask keeps the completions of a
prompt, and the trees of a row, from seeing each other: a completion token sees what it would see alone.
"""

import heapq
import math
from collections.abc import Sequence

import numpy as np
import torch

Tree = tuple[Sequence[int], Sequence[Sequence[int]]]  # a prompt and its completions, all as token ids
ATTENTION_TOKENS = 4608  # row length at which attention costs a block of GPT-2 small as much as its matrices do
PAD_MULTIPLE = 16  # PyTorch's attention on GPUs would copy other masks, padded, in every layer
PADDING = {"input_ids": 0, "position_ids": 0, "segment_ids": -1, "prefix_ids": -1}


def assign_rows(lengths: Sequence[int], row_length: int) -> list[list[int]]:
    """Choose a row for each tree, of all numbers of rows the one that costs a model least.

    `lengths` are the tokens of each tree. A row holds at most `row_length` tokens, or one longer tree. Returns for
    each row the indices of its trees.
    """
    room = max(row_length, *lengths)
    fewest_rows = math.ceil(sum(lengths) / room)
    best_rows: list[list[int]] = []
    lowest_cost = math.inf
    for count in range(fewest_rows, len(lengths) + 1):
        if _compute_cost(count, max(lengths)) >= lowest_cost:
            break  # more rows than this only pad more
        rows = _spread_evenly(lengths, count)
        longest = max(sum(lengths[i] for i in row) for row in rows)
        cost = _compute_cost(count, longest)
        if longest <= room and cost < lowest_cost:
            best_rows = rows
            lowest_cost = cost
    return best_rows


def _compute_cost(rows: int, longest: int) -> float:
    """Of rows that are padded to the longest: matrices cost by its length, attention by the square of it."""
    return rows * longest * (1 + longest / ATTENTION_TOKENS)


def _spread_evenly(lengths: Sequence[int], count: int) -> list[list[int]]:
    """Put trees, the longest first, each into the row that is shortest so far."""
    rows: list[list[int]] = [[] for _ in range(count)]
    shortest_first = [(0, row) for row in range(count)]  # a heap of (tokens, row)
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        tokens, row = heapq.heappop(shortest_first)
        rows[row].append(index)
        heapq.heappush(shortest_first, (tokens + lengths[index], row))
    return rows


def count_tokens(tree: Tree) -> int:
    """Tokens of a prompt and all its completions."""
    prompt, completions = tree
    return len(prompt) + sum(len(completion) for completion in completions)


def pack(
    trees: Sequence[Tree], row_length: int | None, rows: list[list[int]] | None = None
) -> dict[str, torch.Tensor]:
    """Lay trees, whose prompts have at least one token, out in rows.

    A row holds at most `row_length` tokens; None gives each tree its own row. `rows` holds for each row the
    indices of its trees; by default `assign_rows` decides.

    Returns:
        int64 tensors, four of shape (rows, length) and three flat:
            `input_ids`: the tokens, 0 for padding;
            `position_ids`: each token's position in its own sequence;
            `segment_ids`: the prompt or completion that a token belongs to, -1 for padding;
            `prefix_ids`: the segment of its prompt;
            `predicts`: for each completion token, the flat index into (rows · length) of the token that predicts it,
            ordered by first completions of all trees, then second completions …;
            `targets`: those completion tokens;
            `lasts`: for each completion, in that order, the flat index of its last token (of its prompt's last token
            if it is empty).
    """
    if rows is None:
        lengths = [count_tokens(tree) for tree in trees]
        rows = assign_rows(lengths, row_length) if row_length else [[index] for index in range(len(trees))]
    segments_per_tree = 1 + max(len(completions) for _, completions in trees)
    longest = max(sum(count_tokens(trees[index]) for index in indices) for indices in rows)
    length = math.ceil(longest / PAD_MULTIPLE) * PAD_MULTIPLE
    packed = {name: np.full((len(rows), length), fill) for name, fill in PADDING.items()}
    starts = {}  # (tree, completion) -> its row, the column of its first token, the column of its prompt's last token
    for row, indices in enumerate(rows):
        start = 0
        for index in indices:
            prompt, completions = trees[index]
            prompt_segment = index * segments_per_tree
            prompt_end = start + len(prompt) - 1
            for part, tokens in enumerate([prompt, *completions]):
                if part > 0:
                    starts[index, part - 1] = (row, start, prompt_end)
                first_position = len(prompt) if part > 0 else 0
                end = start + len(tokens)
                packed["input_ids"][row, start:end] = tokens
                packed["position_ids"][row, start:end] = range(first_position, first_position + len(tokens))
                packed["segment_ids"][row, start:end] = prompt_segment + part
                packed["prefix_ids"][row, start:end] = prompt_segment
                start = end
    tensors = {name: torch.from_numpy(values) for name, values in packed.items()}
    return tensors | _index_completions(trees, starts, length)


def _index_completions(
    trees: Sequence[Tree], starts: dict[tuple[int, int], tuple[int, int, int]], length: int
) -> dict[str, torch.Tensor]:
    """`predicts`, `targets` and `lasts` of `pack`, from where each completion starts in rows of this length."""
    flat: dict[str, list[int]] = {"predicts": [], "targets": [], "lasts": []}
    for index, part in sorted(starts, key=lambda start: (start[1], start[0])):
        row, start, prompt_end = starts[index, part]
        tokens = trees[index][1][part]
        # The prompt's last token predicts the first one of the completion, which predicts the second, and so on.
        first = row * length + start
        places = [row * length + prompt_end, *range(first, first + len(tokens))]
        flat["predicts"] += places[:-1]
        flat["targets"] += tokens
        flat["lasts"].append(places[-1])
    return {name: torch.tensor(values, dtype=torch.long) for name, values in flat.items()}


def build_additive_mask(segment_ids: torch.Tensor, prefix_ids: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """What each token may attend to, to be added to attention scores: (rows, 1, length, length).

    It is 0 for a token's own segment and its prompt, up to itself, and else the dtype's lowest. (transformers' eager
    attention would add a bool mask as 0 and 1, without a warning.)
    """
    length = segment_ids.shape[1]
    keys = segment_ids[:, None, :]
    seen = (keys == segment_ids[:, :, None]) | (keys == prefix_ids[:, :, None])
    seen &= torch.ones(length, length, dtype=torch.bool, device=segment_ids.device).tril()
    mask = torch.full(seen.shape, torch.finfo(dtype).min, dtype=dtype, device=segment_ids.device)
    return mask.masked_fill_(seen, 0)[:, None]


def build_model_inputs(packed: dict[str, torch.Tensor], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """What a decoder takes of `packed` rows when its attention computes in `dtype`."""
    return {
        "input_ids": packed["input_ids"],
        "position_ids": packed["position_ids"],
        "attention_mask": build_additive_mask(packed["segment_ids"], packed["prefix_ids"], dtype),
    }
