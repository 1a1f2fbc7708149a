"""Sampled answers side by side: the policy's with its tokens coloured, the reference's, the dataset's."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from markupsafe import Markup

from tinydpo.report.templating import render_template
from tinydpo.report.token_colors import color_tokens

SHOWN, ROOM = 20, 2_000_000  # prompts, and the most bytes that they may take
LONGEST, MOST_TOKENS, FOLDED = 10_000, 1_000, 1_200  # of a text: characters, coloured tokens, characters in sight


class FoldedText(NamedTuple):
    """What is in sight of a text, and where that is not all of it, the whole one to unfold and what `told` of it."""

    shown: str | Markup
    whole: str = ""
    told: str = ""


def render_answers(samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Twenty rows of `samples.jsonl` as articles (`shown`, of how many: `of`) and the `key` to their colours, or {}.

    Tokens share one scale of colour, which is full at the 98th percentile of the rewards shown. Long texts are folded,
    longer ones cut, and fewer rows are shown where twenty would be too large.
    """
    if not samples:
        return {}
    shown = [samples[i * len(samples) // SHOWN] for i in range(SHOWN)] if len(samples) > SHOWN else samples
    sizes = np.abs([reward for sample in shown for reward in sample.get("token_rewards") or ()])
    scale = float(np.quantile(sizes, 0.98)) if len(sizes) and np.isfinite(sizes).all() else 0.0
    articles, size = [], 0
    for number, sample in enumerate(shown, 1):
        articles.append(_article(number, sample, scale))
        size += len(articles[-1].encode("utf-8", errors="replace"))
        if size > ROOM:
            articles.pop()
            break
    steps = [-scale, -scale / 2, 0.0, scale / 2, scale]
    key = color_tokens([f" {step:+.2f} " for step in steps], steps, scale) if scale else ""
    return {"shown": articles, "of": f"{len(samples):,}", "key": key}


def _article(number: int, sample: dict[str, Any], scale: float) -> Markup:
    columns, pieces = [], sample.get("pieces")
    for title, role in (("Policy", "policy"), ("Reference", "ref"), ("Dataset, preferred", "chosen")):
        if role not in sample:
            continue
        text, more = _text(sample[role]), False
        if role == "policy" and pieces and scale:
            text = FoldedText(color_tokens(pieces[:MOST_TOKENS], sample["token_rewards"][:MOST_TOKENS], scale))
            more = len(pieces) > MOST_TOKENS
        facts = [f"reward {sample[f'reward_{role}']:.2f}"] if f"reward_{role}" in sample else []
        facts += ["cut off"] if sample.get(f"ended_{role}") is False else []
        columns.append({"title": title, "facts": ", ".join(facts), "text": text, "more": more})
    return render_template(
        "report/templates/article.html", number=number, prompt=_text(sample["prompt"], tail=True), answers=columns
    )


def _text(text: str, tail: bool = False) -> FoldedText:
    """A text, folded where it is long: in sight is its end (`tail`) or its beginning."""
    text, told = text.strip(), f"all {len(text.strip()):,} characters"
    if len(text) > LONGEST:
        told = f"{LONGEST:,} of {len(text):,} characters"
        text = f"… {text[-LONGEST:]}" if tail else f"{text[:LONGEST]} …"
    if len(text) <= FOLDED:
        return FoldedText(text)
    return FoldedText(f"… {text[-FOLDED // 2 :]}" if tail else f"{text[: FOLDED // 2]} …", text, told)
