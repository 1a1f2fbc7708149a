"""What a token budget does to preference pairs, as a page of text: before any training."""

from collections.abc import Mapping
from typing import Any

from tinydpo.data.pairs import FittedSplit

WIDTH = 40  # characters of the longest histogram bar
MOST = 6  # notes that a line has room for


def format_data_notes(splits: Mapping[str, Mapping[str, Any]]) -> str:
    """What of the data is not trained on, or not as it stands, in one line; empty where there is nothing of the kind.

    Args:
        splits: summaries by split, as `pairs.summarize` gives them.
    """
    parts = []
    for name, summary in splits.items():
        pairs, dropped = summary["pairs_in"], summary["dropped"]
        if of := summary.get("drawn_from"):
            parts.append(f"{name}: {pairs:,} of {of:,} rows drawn (--max_{name}_pairs)")
        if dropped:
            parts.append(
                f"{name}: {1 - summary['pairs_kept'] / pairs:.1%} of {pairs:,} pairs dropped ({_format_counts(dropped)})"
            )
        if notes := summary["notes"]:
            parts.append(f"{name}: {_format_notes(notes)}")
    return "Data: " + "; ".join(parts) if parts else ""


def describe_split(name: str, split: FittedSplit, tokenizer: Any, max_length: int, examples: int) -> str:
    """Describe one fitted split.

    Args:
        name: the split's name.
        split: pairs and summary, as `pairs.load_pairs` gives them.
        tokenizer: to show pairs as the model will see them.
        max_length: the budget in tokens.
        examples: how many pairs to show.
    """
    summary, stock = split.summary, split.summary["stock"]
    pairs, kept = summary["pairs_in"], summary["pairs_kept"]
    dropped = _format_counts(summary["dropped"]) or "none"
    positions = summary["tokens_per_pair"]
    rows = [
        ("", "fitted", f"stock: first {max_length}"),
        ("pairs kept", *(f"{n:,} ({n / pairs:.1%})" for n in (kept, stock["pairs_kept"]))),
        ("completion tokens kept", *(f"{s['completion_tokens_kept']:.1%}" for s in (summary, stock))),
        ("last human turn whole", *(f"{s['questions_whole']:.1%}" for s in (summary, stock))),
        ("prompt tokens kept", f"{summary['prompt_tokens_kept']:.1%}", ""),
    ]
    most = max(summary["lengths"].values())
    lines = [
        f"{name}: {pairs:,} pairs in, {kept:,} kept, dropped: {dropped}",
        *([f"  drawn from {summary['drawn_from']:,} (--max_{name}_pairs)"] if "drawn_from" in summary else []),
        *([f"  not taken as it stands: {_format_notes(summary['notes'])}"] if summary["notes"] else []),
        *(f"  {what:<24}{ours:>16}{theirs:>20}".rstrip() for what, ours, theirs in rows),
        *([f"  answers not cut: {_format_shares(summary['answers_whole'])}"] if summary["answers_whole"] else []),
        f"  token positions a pair: {positions['padded']:.0f} padded to {max_length}, "
        f"{positions['unpadded']:.1f} unpadded, {positions['shared_prefix']:.1f} with the prompt once",
        "  tokens of prompt and longer completion, before fitting:",
        *(f"  {bin_:>10} {'#' * round(WIDTH * n / most):<{WIDTH}} {n:,}" for bin_, n in summary["lengths"].items()),
    ]
    for pair in split.pairs.select(range(min(examples, len(split.pairs)))):
        lines += ["", "  as the model sees it:"]
        for part in ("prompt", "chosen", "rejected") if pair["rejected_ids"] else ("prompt", "chosen"):
            text = tokenizer.decode(pair[f"{part}_ids"]).replace("\n", "\\n")
            lines.append(f"  {part:>8} ({len(pair[f'{part}_ids']):>3}) {text}")
    return "\n".join(lines)


def _format_shares(whole: Mapping[str, float]) -> str:
    names = {"both": "both", "chosen": "the chosen alone", "rejected": "the rejected alone", "neither": "neither"}
    return ", ".join(f"{names[which]} {share:.1%}" for which, share in whole.items())


def _format_counts(numbers: Mapping[str, int]) -> str:
    return ", ".join(f"{count:,} {what}" for what, count in numbers.items())


def _format_notes(notes: Mapping[str, int]) -> str:
    """The most frequent notes, each with its rows."""
    shown = [f"{note} ({rows:,} row{'s' * (rows != 1)})" for note, rows in list(notes.items())[:MOST]]
    return ", ".join(shown) + f" and {len(notes) - MOST} more" * (len(notes) > MOST)
