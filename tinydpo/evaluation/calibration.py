"""A judge that is judged: how often it sides with the people who labelled the data's own held-out pairs."""

from collections.abc import Sequence
from typing import Any

from datasets import Dataset

from tinydpo.data.asked import get_readable_columns
from tinydpo.evaluation.judge import Judge, get_outcome
from tinydpo.evaluation.metrics import wilson_interval
from tinydpo.evaluation.sampling import choose_prompts

CONSISTENT_VERDICTS = {("A", "B"), ("B", "A"), ("tie", "tie")}  # what a judge says in both orders that does not go by the order


def calibrate_judge(judge: Judge, texts: Dataset, tokenizer: Any, pairs: int, seed: int) -> dict[str, Any] | None:
    """Ask the judge about held-out pairs, chosen against rejected, whole as they were labelled.

    Args:
        judge: asked in both orders; it keeps its verdicts.
        texts: held-out rows as `pairs.FittedSplit.texts` has them.
        tokenizer: the policy's.
        pairs: the most pairs wanted, each of another prompt; 0 asks nothing.
        seed: picks them.

    Returns:
        The figures of `agreement`, or None where nothing was asked.

    Raises:
        UserError: the judge cannot be asked, or none of its verdicts can be read.
    """
    if not pairs:
        return None
    asked = get_readable_columns(choose_prompts(texts, pairs, seed), tokenizer, "chosen", "rejected")
    verdicts = judge.both_orders(asked["prompt"], asked["chosen"], asked["rejected"], "judge: labelled pairs")
    if (figures := judge_agreement(verdicts)) is None:
        raise judge.unreadable(f"{len(verdicts)} pairs of the data")
    return figures


def judge_agreement(verdicts: Sequence[tuple[str, str]]) -> dict[str, Any] | None:
    """What n pairs of verdicts, with the chosen answer as A and as B, say of the judge; None if none is valid.

    Returns:
        Counts; `agreement`, the share of valid pairs whose chosen answer it prefers (ties half, as in a win rate) with
        its 95 % interval; and `turned_share`, the share on which its verdict is another in the other order.
    """
    outcomes = {pair: get_outcome(*pair) for pair in verdicts}
    valid = [pair for pair in verdicts if outcomes[pair] is not None]
    if not valid:
        return None
    scores = [outcomes[pair] for pair in valid]
    return {
        "pairs": len(verdicts),
        "agreed": scores.count(1.0),
        "ties": scores.count(0.5),
        "disagreed": scores.count(0.0),
        "invalid": len(verdicts) - len(valid),
        "agreement": sum(scores) / len(valid),
        "agreement_ci95": list(wilson_interval(sum(scores), len(valid))),
        "turned_share": sum(pair not in CONSISTENT_VERDICTS for pair in valid) / len(valid),
    }
