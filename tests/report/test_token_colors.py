"""Tokens as coloured text: nothing is lost between them, and colours and hover texts show their rewards."""

import re
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from tinydpo.report.tokens import color_tokens, split_into_pieces


@given(text=st.text(st.characters(exclude_categories=["Cs"])), broken=st.lists(st.integers(0, 255), max_size=12))
def test_pieces_joined_are_the_text(text: str, broken: list[int], tiny_tokenizer: Any):
    # The vocabulary starts with the 256 bytes, of which a model may sample half a character.
    ids = tiny_tokenizer(text)["input_ids"] + broken + [tiny_tokenizer.eos_token_id]
    pieces = split_into_pieces(tiny_tokenizer, ids)
    assert len(pieces) == len(ids)
    assert "".join(pieces) == tiny_tokenizer.decode(ids, clean_up_tokenization_spaces=False)


def test_the_sign_is_the_colour_and_the_size_its_strength():
    html = color_tokens(["a", "<b>", "c"], [1.0, -0.5, 0.0], scale=1.0)
    spans = re.findall(r'<span class="token" style="background:(.+?)" title="(.+?)">(.+?)</span>', html)
    assert spans == [
        ("#0072B296", "+1.000", "a"), ("#D55E004b", "-0.500", "&lt;b&gt;"), ("#D55E0000", "+0.000", "c")
    ]  # fmt: skip
    assert "#0072B24b" in color_tokens(["a"], [1.0], scale=2.0), "answers on one scale are not comparable"
