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
        self.tags, self.titles, self.text = set(), [], ""

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.tags.add(tag)
        self.titles.append(dict(attrs).get("title"))

    def handle_data(self, data: str) -> None:
        self.text += data


@given(text=st.text(st.characters(exclude_categories=["Cs"])))
def test_pieces_are_the_text_whatever_its_characters(text: str, tiny_tokenizer: Any):
    ids = tiny_tokenizer(text)["input_ids"] + [tiny_tokenizer.eos_token_id]
    parts = split_into_pieces(tiny_tokenizer, ids)
    assert len(parts) == len(ids), "a colour has no token"
    assert "".join(parts) == text + tiny_tokenizer.eos_token, "characters are lost or broken between tokens"


@given(ids=st.lists(st.integers(0, 255), max_size=12))
def test_pieces_of_broken_characters_are_what_the_tokenizer_makes_of_them(ids: list[int], tiny_tokenizer: Any):
    # A model may sample half a character: the first 256 tokens of the vocabulary are bytes.
    assert "".join(split_into_pieces(tiny_tokenizer, ids)) == tiny_tokenizer.decode(
        ids, clean_up_tokenization_spaces=False
    )


@given(st.lists(st.tuples(st.text(), st.floats(-50, 50)), max_size=8))
def test_colored_text_is_only_text(tokens: list[tuple[str, float]]):
    texts, rewards = [text for text, _ in tokens], [reward for _, reward in tokens]
    spans = Spans()
    spans.feed(color_tokens(texts, rewards))
    spans.close()
    assert spans.tags <= {"span"}, "a model's text became a tag of the page"
    assert [float(title) for title in spans.titles] == pytest.approx(rewards, abs=5e-4), "hovering shows other values"


def test_the_sign_is_the_colour_and_the_size_its_strength():
    html = color_tokens(["a", "b", "c"], [1.0, -0.5, 0.0])
    assert "#0072B296" in html and "#D55E004b" in html and "#D55E0000" in html
    assert "#0072B24b" in color_tokens(["a"], [1.0], scale=2.0), "answers on one scale are not comparable"
