"""What a token budget does to preference pairs, as a page of text: before any training."""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from tinydpo.data.fitting import WHOLE, Ids, tokenize_pairs
from tinydpo.data.pairs import FittedSplit
from tinydpo.errors import escape_controls

BAR_WIDTH = 40  # characters of the longest histogram bar
LENGTH_BINS = (0, 32, 64, 96, 128, 192, 256, 384, 512, 768, 1024)


def format_data_notes(summaries: Mapping[str, Mapping[str, Any]]) -> str:
    """One line on what was left out or changed, by the summary of each split; empty if there is nothing."""
    parts = []
    for name, summary in summaries.items():
        pairs = summary["pairs_in"]
        if "drawn_from" in summary:
            parts.append(f"{name}: {pairs:,} of {summary['drawn_from']:,} rows drawn (--max_{name}_pairs)")
        if summary["dropped"]:
            share = 1 - summary["pairs_kept"] / pairs
            parts.append(f"{name}: {share:.1%} of {pairs:,} pairs dropped ({_format_counts(summary['dropped'])})")
        if summary["notes"]:
            parts.append(f"{name}: {_format_notes(summary['notes'])}")
    return "Data: " + "; ".join(parts) if parts else ""


def measure_split(split: FittedSplit, tokenizer: Any, max_length: int) -> dict[str, Any]:
    """Measure what fitting did to the kept pairs, and what keeping the first `max_length` tokens would do (`stock`).

    Shares are from 0 to 1, and count the last human turn of a dropped pair as cut. `tokens_per_pair` is in token
    positions; `lengths` counts pairs by tokens of prompt and longer completion, before fitting.
    """
    before = []  # of each pair: tokens of prompt, question, prompt and longer completion; number of completions
    stock = []  # completion tokens that the stock rule keeps
    for batch in split.texts.iter(1_000):
        for pair in tokenize_pairs(batch, tokenizer):
            prompt = len(pair.bos) + len(pair.prompt)
            ended = [[*completion, pair.end] for completion in pair.completions]
            longest = prompt + max(map(len, ended))
            before.append((prompt, len(pair.bos) + pair.question, longest, len(ended)))
            stock.append(_count_stock_tokens(ended, max_length - prompt))
    prompt_before, question, longest, answers = np.array(before).T
    stock = np.array(stock)
    columns = [split.pairs[f"{part}_ids"][:] for part in ("prompt", "chosen", "rejected")]
    prompt, chosen, rejected = (np.array([len(ids) for ids in column]) for column in columns)
    whole = [value for value in split.pairs["whole"][:] if value]
    bins = [*(f"{low}-{high - 1}" for low, high in pairwise(LENGTH_BINS)), f"{LENGTH_BINS[-1]}+"]
    counts = np.histogram(longest, [*LENGTH_BINS, np.inf])[0]
    pairs_in = split.summary["pairs_in"]
    return {
        "prompt_tokens_kept": float(prompt.sum() / max(prompt_before.sum(), 1)),
        "questions_whole": int((prompt >= question).sum()) / pairs_in,
        "answers_whole": {name: whole.count(name) / len(whole) for name in WHOLE.values()} if whole else {},
        "tokens_per_pair": {
            "padded": float(np.mean(answers * max_length)),
            "unpadded": float(np.mean(answers * prompt + chosen + rejected)),
            "shared_prefix": float(np.mean(prompt + chosen + rejected)),
        },
        "stock": {
            "pairs_kept": int((stock > 0).sum()),
            "completion_tokens_kept": int(stock.sum()) / split.summary["completion_tokens"],
            "questions_whole": int(((stock > 0) & (prompt_before <= max_length)).sum()) / pairs_in,
        },
        "lengths": dict(zip(bins, counts.tolist(), strict=True)),
    }


def _count_stock_tokens(completions: Sequence[Ids], room: int) -> int:
    """Completion tokens that the stock rule keeps; 0 if it loses the pair."""
    cut = [completion[: max(0, room)] for completion in completions]
    is_lost = not all(cut) or (len(cut) == 2 and cut[0] == cut[1])
    return 0 if is_lost else sum(map(len, cut))


def describe_split(
    name: str, split: FittedSplit, measures: Mapping[str, Any], tokenizer: Any, max_length: int, examples: int
) -> str:
    """Describe a fitted split, with the figures of `measure_split` and some pairs as the model will see them."""
    summary = split.summary
    stock = measures["stock"]
    pairs = summary["pairs_in"]
    kept = summary["pairs_kept"]
    lines = [f"{name}: {pairs:,} pairs in, {kept:,} kept, dropped: {_format_counts(summary['dropped']) or 'none'}"]
    if "drawn_from" in summary:
        lines.append(f"  drawn from {summary['drawn_from']:,} (--max_{name}_pairs)")
    if summary["notes"]:
        lines.append(f"  notes: {_format_notes(summary['notes'])}")
    lines.append(f"  {'':<24}{'fitted':>16}{f'plain TRL: {max_length}':>20}")
    kept_counts = [f"{count:,} ({count / pairs:.1%})" for count in (kept, stock["pairs_kept"])]
    for label, ours, theirs in (
        ("pairs kept", *kept_counts),
        ("completion tokens kept", *(f"{rule['completion_tokens_kept']:.1%}" for rule in (summary, stock))),
        ("last human turn whole", *(f"{rule['questions_whole']:.1%}" for rule in (measures, stock))),
        ("prompt tokens kept", f"{measures['prompt_tokens_kept']:.1%}", ""),
    ):
        lines.append(f"  {label:<24}{ours:>16}{theirs:>20}".rstrip())
    if summary["templated"] and measures["prompt_tokens_kept"] < 1:
        lines.append("  cut prompts lose the start of the chat template, such as its system turn: raise --max_length")
    if measures["answers_whole"]:
        shares = [f"{which} {share:.1%}" for which, share in measures["answers_whole"].items()]
        lines.append(f"  answers that fit uncut: {', '.join(shares)}")
    positions = measures["tokens_per_pair"]
    lines.append(
        f"  tokens computed per pair: {positions['padded']:.0f} padded to {max_length}, "
        f"{positions['unpadded']:.1f} unpadded, {positions['shared_prefix']:.1f} with the prompt once"
    )
    lines.append("  tokens of prompt and longer completion, before fitting:")
    most = max(measures["lengths"].values())
    for bin_name, count in measures["lengths"].items():
        lines.append(f"  {bin_name:>10} {'#' * round(BAR_WIDTH * count / most):<{BAR_WIDTH}} {count:,}")
    for pair in split.pairs.select(range(min(examples, len(split.pairs)))):
        lines += ["", "  as the model sees it:"]
        for part in ("prompt", "chosen", "rejected"):
            ids = pair[f"{part}_ids"]
            if ids:
                lines.append(f"  {part:>8} ({len(ids):>3}) {escape_controls(tokenizer.decode(ids))}")
    return "\n".join(lines)


def _format_counts(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count:,} {what}" for what, count in counts.items())


def _format_notes(notes: Mapping[str, int]) -> str:
    text = ", ".join(f"{note} ({rows:,} row{'' if rows == 1 else 's'})" for note, rows in notes.items())
    return escape_controls(text)
