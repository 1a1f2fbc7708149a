"""Tokens as coloured text: nothing lost between them, nothing of theirs read as HTML."""

from html.parser import HTMLParser
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinydpo.report.tokens import color_tokens, split_into_pieces


class Spans(HTMLParser):
    def __init__(self):
        super().__init__()
        self.tags, self.titles = set(), []

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.tags.add(tag)
        self.titles.append(dict(attrs).get("title"))


@given(text=st.text(st.characters(exclude_categories=["Cs"])), broken=st.lists(st.integers(0, 255), max_size=12))
def test_pieces_joined_are_the_text(text: str, broken: list[int], tiny_tokenizer: Any):
    # The vocabulary starts with the 256 bytes, of which a model may sample half a character.
    ids = tiny_tokenizer(text)["input_ids"] + broken + [tiny_tokenizer.eos_token_id]
    pieces = split_into_pieces(tiny_tokenizer, ids)
    assert len(pieces) == len(ids)
    assert "".join(pieces) == tiny_tokenizer.decode(ids, clean_up_tokenization_spaces=False)


@given(st.lists(st.tuples(st.text(), st.floats(-50, 50)), max_size=8))
def test_colored_text_is_only_text(tokens: list[tuple[str, float]]):
    texts, rewards = [text for text, _ in tokens], [reward for _, reward in tokens]
    spans = Spans()
    spans.feed(color_tokens(texts, rewards))
    spans.close()
    assert spans.tags <= {"span"}
    assert [float(title) for title in spans.titles] == pytest.approx(rewards, abs=5e-4), "hovering shows other values"


def test_the_sign_is_the_colour_and_the_size_its_strength():
    html = color_tokens(["a", "b", "c"], [1.0, -0.5, 0.0])
    assert "#0072B296" in html and "#D55E004b" in html and "#D55E0000" in html
    assert "#0072B24b" in color_tokens(["a"], [1.0], scale=2.0), "answers on one scale are not comparable"
