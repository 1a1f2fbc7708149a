"""Sampled answers as HTML, side by side: the policy's with its tokens coloured, the reference's, the dataset's."""

from collections.abc import Sequence
from html import escape
from typing import Any

import numpy as np

from tinydpo.report.token_colors import colored

SHOWN, ROOM = 20, 2_000_000  # prompts, and the most bytes that they may take
LONGEST, MOST_TOKENS, FOLDED = 10_000, 1_000, 1_200  # of a text: characters, coloured tokens, characters in sight


def answers(samples: Sequence[dict[str, Any]]) -> str:
    """Twenty rows of `samples.jsonl`, "" where there is none; all text is escaped.

    Tokens share one scale of colour, which is full at the 98th percentile of the rewards shown. Long texts are folded,
    longer ones cut, and fewer rows are shown where twenty would be too large.
    """
    if not samples:
        return ""
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
    text = (
        f"<p>{len(articles)} of {len(samples):,} held-out prompts, evenly spaced among them and not chosen by their "
        "answers. One answer was sampled from each model.</p>"
    )
    if scale:
        steps = [-scale, -scale / 2, 0.0, scale / 2, scale]
        key = colored([f" {step:+.2f} " for step in steps], steps, scale)
        text += (
            f"<p>The policy's tokens are coloured by implicit reward, β times the log-ratio of policy and reference: "
            f"orange where the policy finds a token less likely, blue where likelier; hovering shows the "
            f'value.</p>\n<p class="text">{key} and beyond</p>'
        )
    return text + "\n" + "\n".join(articles)


def _article(number: int, sample: dict[str, Any], scale: float) -> str:
    pieces = sample.get("pieces")
    policy = _text(sample["policy"])
    if pieces and scale:
        policy = _block(colored(pieces[:MOST_TOKENS], sample["token_rewards"][:MOST_TOKENS], scale))
        policy += '<p class="meta">…</p>' * (len(pieces) > MOST_TOKENS)
    answers = [("Policy", policy, "policy"), ("Reference", _text(sample["ref"]), "ref")]
    if "chosen" in sample:
        answers.append(("Dataset, preferred", _text(sample["chosen"]), "chosen"))
    columns = []
    for title, text, role in answers:
        facts = [f"reward {sample[f'reward_{role}']:.2f}"] if f"reward_{role}" in sample else []
        facts += ["cut off"] if sample.get(f"ended_{role}") is False else []
        told = f' <span class="meta">{", ".join(facts)}</span>' if facts else ""
        columns.append(f"<section><h4>{title}{told}</h4>{text}</section>")
    prompt = _text(sample["prompt"], tail=True)
    return (
        f'<article>\n<h3>{number}</h3>\n<div class="prompt">{prompt}</div>\n'
        f'<div class="answers">{"".join(columns)}</div>\n</article>'
    )


def _text(text: str, tail: bool = False) -> str:
    """A text, folded where it is long: in sight is its end (`tail`) or its beginning."""
    text, told = text.strip(), f"all {len(text.strip()):,} characters"
    if len(text) > LONGEST:
        told = f"{LONGEST:,} of {len(text):,} characters"
        text = f"… {text[-LONGEST:]}" if tail else f"{text[:LONGEST]} …"
    if len(text) <= FOLDED:
        return _block(escape(text))
    in_sight = f"… {text[-FOLDED // 2 :]}" if tail else f"{text[: FOLDED // 2]} …"
    whole = f"<details><summary>{told}</summary>{_block(escape(text))}</details>"
    return _block(escape(in_sight)) + whole


def _block(inner: str) -> str:
    return f'<div class="text" dir="auto">{inner}</div>'
