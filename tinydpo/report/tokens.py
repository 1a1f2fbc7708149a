"""A sampled answer as HTML, every token on the colour of its implicit reward: where the policy left its reference."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from transformers import PreTrainedTokenizerBase

from tinydpo.training.curves import BLUE, ORANGE


def split_into_pieces(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> list[str]:
    """What each of n tokens adds to the text: n strings that, joined, are the decoded text, special tokens included.

    A character of several tokens (byte-level BPE) stands in the last of them; the others are empty.
    """
    added, shown = [], ""
    for end in range(1, len(ids) + 1):
        text = tokenizer.decode(ids[:end], clean_up_tokenization_spaces=False)
        if end < len(ids):
            text = text.rstrip("\N{REPLACEMENT CHARACTER}")  # a character still without its last byte
        added.append(text[len(shown) :])
        shown = text if len(text) > len(shown) else shown
    return added


def color_tokens(pieces: Sequence[str], rewards: Sequence[float], scale: float | None = None) -> Markup:
    """One `<span>` a token, blue where the policy finds it likelier than the reference and orange where less.

    Args:
        pieces: n texts.
        rewards: n implicit rewards, β log π/π_ref (DPO, arXiv 2305.18290, section 4); shown on hover.
        scale: the reward of the strongest colour; by default the largest of these.

    Returns:
        HTML for any background: only the spans' own is coloured, translucently.
    """
    scale = scale or max(map(abs, rewards), default=0.0) or 1.0
    tokens = []
    for piece, reward in zip(pieces, rewards, strict=True):
        colour, alpha = BLUE if reward > 0 else ORANGE, round(150 * min(1.0, abs(reward) / scale))
        tokens.append({"background": f"{colour}{alpha:02x}", "reward": f"{reward:+.3f}", "text": piece})
    return render_template("report/templates/tokens.html", tokens=tokens)


_TEMPLATES = Environment(
    loader=FileSystemLoader(Path(__file__).parent.parent), autoescape=True, undefined=StrictUndefined,
    trim_blocks=True, lstrip_blocks=True,
)  # fmt: skip


def render_template(template: str, **values: Any) -> Markup:
    """A template, by its path inside `tinydpo/`, filled in; what it returns is HTML and is not escaped again."""
    return Markup(_TEMPLATES.get_template(template).render(values))
