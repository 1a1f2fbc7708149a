"""A sampled answer as HTML, each token coloured by its implicit reward: where the policy departs from its reference.

Everything goes through jinja with autoescape: a model's text is only ever text.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from transformers import PreTrainedTokenizerBase

from tinydpo.training.curves import BLUE, ORANGE

MAX_ALPHA = 150  # of 255: readable on light and dark pages

_ENVIRONMENT = Environment(
    loader=FileSystemLoader(Path(__file__).parent.parent), autoescape=True, undefined=StrictUndefined,
    trim_blocks=True, lstrip_blocks=True,
)  # fmt: skip


def render_template(template: str, **values: Any) -> Markup:
    """Fill in a template, given by its path inside `tinydpo/`. The HTML that comes back is not escaped again."""
    return Markup(_ENVIRONMENT.get_template(template).render(values))


def split_into_pieces(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> list[str]:
    """What each of n tokens adds to the text: n strings that, joined, are the decoded text, special tokens included.

    A character of several tokens (byte-level BPE) is in the last of them. The others are empty.
    """
    pieces = []
    text = ""
    for end in range(1, len(ids) + 1):
        longer = tokenizer.decode(ids[:end], clean_up_tokenization_spaces=False)
        if end < len(ids):
            longer = longer.rstrip("\N{REPLACEMENT CHARACTER}")  # a character that still lacks its last byte
        pieces.append(longer[len(text) :])
        text = max(text, longer, key=len)
    return pieces


def color_tokens(pieces: Sequence[str], rewards: Sequence[float], scale: float) -> Markup:
    """One `<span>` per token: blue where the policy finds it likelier than the reference does, orange where not.

    Args:
        pieces: n texts.
        rewards: n implicit rewards, β log π/π_ref (DPO, arXiv 2305.18290, section 4), shown on hover.
        scale: the reward of the strongest colour.
    """
    tokens = []
    for piece, reward in zip(pieces, rewards, strict=True):
        color = BLUE if reward > 0 else ORANGE
        alpha = round(MAX_ALPHA * min(1.0, abs(reward) / (scale or 1.0)))
        tokens.append({"background": f"{color}{alpha:02x}", "reward": f"{reward:+.3f}", "text": piece})
    return render_template("report/templates/tokens.html", tokens=tokens)
