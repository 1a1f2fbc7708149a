"""Rows without padding: prompts and what follows them, side by side, none seeing another.

A tree is a prompt with its completions. Its tokens stand in one row, `prompt | completion | completion …`: the prompt
is computed once, each completion's positions go on where the prompt's end, and a mask keeps completions of one prompt,
and trees of one row, from seeing each other. What a completion token sees is what it would see alone.
"""

import heapq
from collections.abc import Sequence

import torch

Tree = tuple[Sequence[int], Sequence[Sequence[int]]]
ATTENTION_TOKENS = 4608  # row length at which attention costs a block of GPT-2 small as much as its matrices do
PAD_MULTIPLE = 8  # attention kernels on GPUs want masks whose rows are aligned


def assign_rows(lengths: Sequence[int], row_length: int) -> list[list[int]]:
    """Spread trees over rows as evenly as a longest-first rule gets.

    Even rows rather than full ones: the batch is padded to its longest row. Of all numbers of rows the one is taken
    that costs least, by what a block of GPT-2 small computes.

    Args:
        lengths: tokens of each tree.
        row_length: the most tokens a row may hold, or as many as the longest tree has if that is more.

    Returns:
        For each row the indices of its trees.
    """
    longest_first = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    room = max(row_length, lengths[longest_first[0]])
    fewest = -(-sum(lengths) // room)

    def spread(count: int) -> tuple[float, list[list[int]]]:
        rows, filled = [[] for _ in range(count)], [(0, row) for row in range(count)]
        for index in longest_first:
            tokens, row = heapq.heappop(filled)
            rows[row].append(index)
            heapq.heappush(filled, (tokens + lengths[index], row))
        longest = max(filled)[0]
        return (count * longest * (1 + longest / ATTENTION_TOKENS) if longest <= room else float("inf")), rows

    return min((spread(count) for count in range(fewest, len(lengths) + 1)), key=lambda option: option[0])[1]


def pack(
    trees: Sequence[Tree], row_length: int | None, rows: list[list[int]] | None = None
) -> dict[str, torch.Tensor]:
    """Lay trees out in rows.

    Args:
        trees: prompts of at least one token, each with its completions (or with none).
        row_length: the most tokens a row may hold; None gives each tree a row of its own.
        rows: which trees stand in which row, by index; by default `assign_rows` says.

    Returns:
        int64 tensors, four of shape (rows, length) and three flat:
            `input_ids`: the tokens, 0 where a row is padded;
            `position_ids`: each token's place in its own sequence;
            `segment_ids`: which prompt or completion a token belongs to, -1 for padding;
            `prefix_ids`: the segment of its prompt;
            `predicts`: for every completion token, first completions of all trees first, then all second ones …, the
            flat index into (rows · length) of the token that predicts it;
            `targets`: those completion tokens;
            `lasts`: for every completion, in that order, the flat index of its last token (of the prompt's, where it
            is empty).
    """
    lengths = [len(prompt) + sum(map(len, completions)) for prompt, completions in trees]
    if rows is None:
        rows = assign_rows(lengths, row_length) if row_length else [[index] for index in range(len(trees))]
    segments = 1 + max((len(completions) for _, completions in trees), default=0)
    laid, starts = [], {}  # starts: (tree, completion) -> (row, its first token's place, its prompt's last)
    for row, indices in enumerate(rows):
        ids, positions, segment_ids, prefix_ids = [], [], [], []
        for index in indices:
            prompt, completions = trees[index]
            last = len(ids) + len(prompt) - 1
            for part, tokens in enumerate([prompt, *completions]):
                if part:
                    starts[index, part - 1] = (row, len(ids), last)
                first = len(prompt) if part else 0
                ids += tokens
                positions += range(first, first + len(tokens))
                segment_ids += [index * segments + part] * len(tokens)
                prefix_ids += [index * segments] * len(tokens)
        laid.append((ids, positions, segment_ids, prefix_ids))
    length = -(-max(len(ids) for ids, *_ in laid) // PAD_MULTIPLE) * PAD_MULTIPLE
    predicts, targets, lasts = [], [], []
    for part in range(segments - 1):
        for index, (_, completions) in enumerate(trees):
            if part < len(completions):
                row, start, last = starts[index, part]
                places = [row * length + at for at in (last, *range(start, start + len(completions[part])))]
                predicts += places[:-1]  # the last token predicts nothing
                targets += completions[part]
                lasts.append(places[-1])
    names, fills = ("input_ids", "position_ids", "segment_ids", "prefix_ids"), (0, 0, -1, -1)
    packed = {
        name: torch.tensor([row[k] + [fill] * (length - len(row[k])) for row in laid])
        for k, (name, fill) in enumerate(zip(names, fills, strict=True))
    }
    flat = {"predicts": predicts, "targets": targets, "lasts": lasts}
    return packed | {name: torch.tensor(values, dtype=torch.long) for name, values in flat.items()}


def build_additive_mask(segment_ids: torch.Tensor, prefix_ids: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """What each token may attend to, to be added to attention scores.

    Args:
        segment_ids: (rows, length), as `pack` gives it.
        prefix_ids: (rows, length), likewise.
        dtype: floating; a bool mask would be added as 0 and 1 by transformers' eager attention, without a word.

    Returns:
        (rows, 1, length, length): 0 for a token's own segment and its prompt, up to itself; else the dtype's lowest.
    """
    length = segment_ids.shape[1]
    keys = segment_ids[:, None, :]
    seen = (keys == segment_ids[:, :, None]) | (keys == prefix_ids[:, :, None])
    seen &= torch.ones(length, length, dtype=torch.bool, device=segment_ids.device).tril()
    mask = torch.full(seen.shape, torch.finfo(dtype).min, dtype=dtype, device=segment_ids.device)
    return mask.masked_fill_(seen, 0)[:, None]
