"""Packed rows: every token once, where it belongs, and seeing what it would see alone."""

from itertools import count
from typing import Any

import torch
from hypothesis import example, given
from hypothesis import strategies as st

from tinydpo.training.packing import Tree, build_additive_mask, pack

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@st.composite
def packable(draw: Any) -> tuple[list[Tree], int | None]:
    """Trees of tokens that are all different (1, 2, 3 …), and a row length that holds the longest, or None."""
    token = count(1)
    shapes = st.tuples(st.integers(1, 12), st.lists(st.integers(0, 9), max_size=3))
    trees = [
        ([next(token) for _ in range(prompt)], [[next(token) for _ in range(length)] for length in completions])
        for prompt, completions in draw(st.lists(shapes, min_size=1, max_size=9))
    ]
    longest = max(len(prompt) + sum(map(len, completions)) for prompt, completions in trees)
    return trees, draw(st.none() | st.integers(longest, 2 * longest))


def sequences(trees: list[Tree]) -> dict[int, list[int]]:
    """For every token, the tokens up to and including it in the sequence that it belongs to."""
    before = {}
    for prompt, completions in trees:
        for i, token in enumerate(prompt):
            before[token] = list(prompt[: i + 1])
        for completion in completions:
            for i, token in enumerate(completion):
                before[token] = [*prompt, *completion[: i + 1]]
    return before


def places(packed: dict[str, torch.Tensor]) -> dict[int, tuple[int, int]]:
    """Row and place of every token, padding left out."""
    rows = packed["input_ids"].tolist()
    return {token: (r, i) for r, row in enumerate(rows) for i, token in enumerate(row) if token}


@given(packable())
def test_every_token_is_once_where_it_belongs(case: tuple[list[Tree], int | None]):
    trees, row_length = case
    packed, before = pack(trees, row_length), sequences(trees)
    ids, place = packed["input_ids"], places(packed)
    assert sorted(ids[ids > 0].tolist()) == sorted(before), "a token is lost, or is computed twice"
    assert ((ids == 0) == (packed["segment_ids"] == -1)).all() and ((ids == 0) == (packed["prefix_ids"] == -1)).all()
    for prompt, completions in trees:
        tree = [token for part in (prompt, *completions) for token in part]
        assert {place[token][0] for token in tree} == {place[tree[0]][0]}, "a tree is spread over rows"
    for token, (row, i) in place.items():
        assert packed["position_ids"][row, i] == len(before[token]) - 1, "a position is not that of the sequence alone"
    targets = [token for part in range(3) for _, answers in trees for token in (answers[part : part + 1] or [[]])[0]]
    predictors = [row * ids.shape[1] + i for row, i in (place[before[token][-2]] for token in targets)]
    assert packed["targets"].tolist() == targets, "a position is asked for the log-prob of the wrong token"
    assert packed["predicts"].tolist() == predictors, "a completion token's log-prob is read at the wrong position"


@given(packable())
@example(([([1] * length, []) for length in (3, 3, 2, 2, 2)], 6))  # longest first, two rows come to 7 and 5
def test_rows_keep_to_their_length(case: tuple[list[Tree], int | None]):
    trees, row_length = case
    filled = (pack(trees, row_length)["input_ids"] > 0).sum(1)
    assert filled.min() > 0, "an empty row is computed"
    if row_length is None:
        assert len(filled) == len(trees), "without a row length each tree has a row of its own"
        return
    assert filled.max() <= row_length, "a row is longer than --row_length"
    longest = max(len(prompt) + sum(map(len, completions)) for prompt, completions in trees)
    assert len(filled) * filled.max() <= len(trees) * longest, "more is computed than with a row for each tree"


def test_short_trees_share_rows_beside_a_long_one():
    packed = pack([([1] * length, []) for length in (48, 12, 12, 12, 12)], 64)
    assert packed["input_ids"].shape == (2, 48), "four short prompts are padded to the length of a long one"


@given(packable(), st.sampled_from(DTYPES))
def test_a_token_sees_its_own_prompt_and_completion_up_to_itself(case: tuple, dtype: torch.dtype):
    trees, row_length = case
    packed = pack(trees, row_length)
    mask = build_additive_mask(packed["segment_ids"], packed["prefix_ids"], dtype)
    rows, length = packed["input_ids"].shape
    assert mask.shape == (rows, 1, length, length) and mask.dtype == dtype, "attention would misread the mask"
    assert ((mask == 0) | (mask == torch.finfo(dtype).min)).all(), "something is seen in part"
    assert (mask == 0).any(-1).all(), "a position that sees nothing gives NaN"
    place = places(packed)
    for token, seen in sequences(trees).items():
        row, i = place[token]
        visible = mask[row, 0, i].eq(0).nonzero().flatten().tolist()
        assert visible == sorted(place[other][1] for other in seen), (
            "a token sees padding, another tree, another completion or the future, or not all of its own past"
        )
