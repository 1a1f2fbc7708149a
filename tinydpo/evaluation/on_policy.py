"""On-policy pairs: a policy answers each prompt several times, a reward scores the answers, the best meets the worst.

`scripts/sample_pairs.py` writes data that `--dataset_name` reads. `scripts/round.py` repeats sampling, DPO and
evaluation. Training puts an end token after a whole answer, so an answer that ran out of room is never the chosen one:
it would teach the policy to stop in the middle of a sentence.
"""

import math
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from datasets import Dataset
from transformers.hf_argparser import HfArg
from trl.trainer.utils import hash_module

from tinydpo.config.arguments import DataArguments, list_sources
from tinydpo.data.notice import CONTENT_NOTICE, is_hh
from tinydpo.data.splits import HOLD_OUT_SEED
from tinydpo.data.text import get_prompts
from tinydpo.errors import UserError
from tinydpo.evaluation.arguments import RewardArguments, SamplingArguments
from tinydpo.evaluation.rewards import RewardFunction, as_completion, score_answers
from tinydpo.evaluation.sampling import Answers, sample_cached
from tinydpo.files import public_name, read_json
from tinydpo.models.loading import hash_weights

PROMPTS_AT_ONCE = 256  # sampled answers are cached this often: a run that is cut short repeats no more than this
PAIRS_RESULTS = "pairs_results.json"  # written last: where it exists, the pairs are complete


@dataclass
class PairsArguments(SamplingArguments):
    """How often the policy answers each prompt, and what becomes a pair."""

    num_prompts: int = HfArg(default=2000, help="Prompts of the train split to answer.")
    samples_per_prompt: int = HfArg(default=8, help="Answers to each prompt; with more, best and worst differ more.")
    pair_by: Literal["best_worst", "all"] = HfArg(
        default="best_worst", help="all: every two that score differently, if the policy ended the better one."
    )
    held_out_prompts: float = HfArg(default=0.05, help="Share of the prompts whose pairs become the test split.")

    def __post_init__(self):
        super().__post_init__()
        if not 0 < self.held_out_prompts < 1:
            raise ValueError(f"held_out_prompts is a share between 0 and 1, not {self.held_out_prompts:g}")


class ScoredAnswer(NamedTuple):
    """An answer and its reward."""

    text: str
    ended: bool  # by the policy itself
    reward: float


def get_pairs_settings(args: PairsArguments, reward: RewardArguments, data: DataArguments) -> dict[str, Any]:
    """All settings that the pairs depend on, with a digest of weights in a local folder."""
    settings = asdict(data) | asdict(reward) | asdict(args)
    del settings["output_dir"]
    policy = Path(args.model_name_or_path)
    if policy.is_dir():
        settings["weights"] = hash_weights(policy)
    return settings


def sample_several(model: Any, tokenizer: Any, prompts: list[list[int]], args: PairsArguments) -> Answers:
    """`samples_per_prompt` answers to each of n prompts, the answers to one prompt side by side."""
    ids: list[list[int]] = []
    ended: list[bool] = []
    weights = hash_module(model)
    for start in range(0, len(prompts), PROMPTS_AT_ONCE):
        batch = prompts[start : start + PROMPTS_AT_ONCE]
        repeated = [prompt for prompt in batch for _ in range(args.samples_per_prompt)]
        desc = f"answers to prompts {start + 1} to {start + len(batch)} of {len(prompts)}"
        settings = {"seed": args.seed + start, "weights": weights, **args.sampling}
        answers = sample_cached(model, tokenizer, repeated, args.max_length // 2, desc, **settings)
        ids += answers.ids
        ended += answers.ended
    return Answers(ids, ended)


def score_samples(
    functions: Sequence[RewardFunction], texts: Dataset, answers: Answers, tokenizer: Any
) -> list[list[ScoredAnswer]]:
    """The answers to each row of `texts` with their rewards; `answers` come from `sample_several`."""
    samples = len(answers.ids) // len(texts)
    repeated = texts.select(np.repeat(range(len(texts)), samples))
    written = answers.decode(repeated, tokenizer)
    rewards = score_answers(functions, repeated, written, answers.ids).sum(0).tolist()
    scored = [ScoredAnswer(*answer) for answer in zip(written, answers.ended, rewards, strict=True)]
    return [scored[start : start + samples] for start in range(0, len(scored), samples)]


def get_distinct_answers(answers: Sequence[ScoredAnswer]) -> list[ScoredAnswer]:
    """The answers with a word in them, each text once, the best first."""
    by_text: dict[str, ScoredAnswer] = {}
    for answer in sorted(answers, key=lambda answer: not answer.ended):  # of equal texts, one that ended
        if answer.text.strip():
            by_text.setdefault(answer.text, answer)
    return sorted(by_text.values(), key=lambda answer: -answer.reward)


def make_pairs(answers: Sequence[ScoredAnswer], pair_by: str) -> list[tuple[ScoredAnswer, ScoredAnswer]]:
    """Pairs of one prompt's answers that score differently, the better one first; the policy has ended that one."""
    pairs = [
        (better, worse)
        for better, worse in combinations(get_distinct_answers(answers), 2)
        if better.ended and better.reward > worse.reward
    ]
    if pair_by == "all" or not pairs:
        return pairs
    return [max(pairs, key=lambda pair: pair[0].reward - pair[1].reward)]


def make_rows(
    texts: Dataset, answers: Sequence[Sequence[ScoredAnswer]], pair_by: str, held_out_prompts: float
) -> dict[str, list[dict[str, Any]]]:
    """The rows of `train` and `test`, held out by prompt (UserError: one of them would be empty)."""
    count = len(texts)
    held_out = set(random.Random(HOLD_OUT_SEED).sample(range(count), math.ceil(held_out_prompts * count)))
    rows: dict[str, list[dict[str, Any]]] = {"train": [], "test": []}
    columns = zip(get_prompts(texts), texts["templated"][:], texts["subset"][:], answers, strict=True)
    for index, (prompt, templated, subset, scored) in enumerate(columns):
        for better, worse in make_pairs(scored, pair_by):
            row = {
                "prompt": prompt,
                "chosen": as_completion(prompt, better.text, templated),
                "rejected": as_completion(prompt, worse.text, templated),
                "reward_chosen": better.reward,
                "reward_rejected": worse.reward,
            }
            if subset:
                row["subset"] = subset
            rows["test" if index in held_out else "train"].append(row)
    if not (rows["train"] and rows["test"]):
        found = f"{count} prompts gave {len(rows['train'])} pairs to train on and {len(rows['test'])} held out"
        raise UserError(f"{found}; raise --num_prompts, --samples_per_prompt or --held_out_prompts")
    return rows


def count_answers(answers: Sequence[Sequence[ScoredAnswer]], rows: dict[str, list], pair_by: str) -> dict[str, Any]:
    """What became of the answers: those that gave no pair, by reason, and mean rewards."""
    every = [answer for scored in answers for answer in scored]
    with_words = [answer for answer in every if answer.text.strip()]
    distinct = [get_distinct_answers(scored) for scored in answers]
    pairs = [*rows["train"], *rows["test"]]
    return {
        "prompts": len(answers),
        "answers": len(every),
        "empty_answers": len(every) - len(with_words),
        "answers_that_ended": sum(answer.ended for answer in every),
        "answers_equal_to_another": len(with_words) - sum(len(scored) for scored in distinct),
        "answers_scored_like_another": sum(len(one) - len({answer.reward for answer in one}) for one in distinct),
        "prompts_without_a_pair": sum(not make_pairs(scored, pair_by) for scored in answers),
        "train_pairs": len(rows["train"]),
        "test_pairs": len(rows["test"]),
        "mean_reward": float(np.mean([answer.reward for answer in every])),
        "mean_reward_chosen": float(np.mean([row["reward_chosen"] for row in pairs])),
        "mean_reward_rejected": float(np.mean([row["reward_rejected"] for row in pairs])),
    }


def render_pairs_card(folder: Path, settings: dict[str, Any], reward: RewardArguments, counts: dict[str, Any]) -> str:
    """The pairs' README.md: from which weights, reward, settings and seeds they come."""
    from huggingface_hub import DatasetCard, DatasetCardData

    files = [{"split": split, "path": f"{split}.jsonl"} for split in ("train", "test")]
    configs = [{"config_name": "default", "data_files": files}]
    policy = f"`{public_name(settings['model_name_or_path'], settings['model_revision'])}`"
    if "weights" in settings:
        policy += f" (local, weights {settings['weights'][:12]}…)"
    card = DatasetCard.from_template(
        DatasetCardData(configs=configs, tags=["tinydpo", "preference", "on-policy"]),
        template_path=Path(__file__).with_name("templates") / "pairs.md",
        title=f"{folder.absolute().parent.name}/{folder.name}",
        policy=policy,
        reward=reward.name(),
        sources=[source.describe() for source in list_sources(settings)],
        settings=settings,
        counts=counts,
        notice=CONTENT_NOTICE if is_hh(settings["dataset_name"]) else None,
    )
    return str(card)


def collect_rounds(folders: Sequence[Path]) -> dict[str, Any]:
    """`rounds.json`: the figures of the reference and of each round's policy, read from the rounds' evaluations."""
    rounds = []
    for folder in folders:
        figures = read_json(folder / "evaluation/eval_results.json", "kl_per_sequence")
        before = read_json(folder / "evaluation-before/eval_results.json") or figures
        if not rounds:
            settings = figures["settings"]
            rounds.append({"name": "SFT", "kl": 0.0, "kl_se": 0.0, **_collect_role(figures, "ref")})
        one = {"name": folder.name, "kl": figures["kl_per_sequence"], "kl_se": figures["kl_per_sequence_se"]}
        one |= _collect_role(figures, "policy")
        for name, compared in (("over_sft", figures), ("over_before", before)):
            one |= {name: compared.get("win_rate_vs_ref"), f"{name}_ci95": compared.get("win_rate_ci95")}
        rounds.append(one)
    reward = RewardArguments(settings.get("reward_funcs"), settings.get("reward_model_name_or_path"))
    return {"reward": reward.name(), "rounds": rounds}


def _collect_role(figures: dict[str, Any], role: str) -> dict[str, Any]:
    """The figures of one model's answers."""
    collected = {
        "reward": figures.get(f"reward_{role}"),
        "reward_se": figures.get(f"reward_{role}_se"),
        "ended": figures.get(f"ended_{role}"),
        "tokens": figures.get(f"mean_length_{role}"),
    }
    if "rewards" in figures:
        collected["rewards"] = {
            name: {"mean": each[f"reward_{role}"], "se": each[f"reward_{role}_se"]}
            for name, each in figures["rewards"].items()
        }
    return collected


def add_rounds_to_frontier(frontier: dict[str, Any], rounds: dict[str, Any]) -> dict[str, Any]:
    """`frontier.json` with the rounds of `rounds.json`, if measured by the same reward; either may be {}."""
    if not rounds.get("reward") or rounds["reward"] != frontier.get("reward", rounds["reward"]):
        return frontier
    return {"points": [], "reward": rounds["reward"], **frontier, "rounds": rounds["rounds"]}


def format_rounds(rounds: Sequence[dict[str, Any]]) -> str:
    """The rounds as a table; win rates with their 95 % intervals."""

    def format_share(line: dict[str, Any], name: str) -> str:
        if line.get(name) is None:
            return ""
        low, high = line[f"{name}_ci95"]
        return f"{line[name]:.1%} ({low:.1%} to {high:.1%})"

    lines = [
        f"{'':<10}{'reward':>8}{'KL, nats':>10}{'beats SFT':>26}{'beats the one before':>26}{'end':>6}{'tokens':>8}"
    ]
    for line in rounds:
        reward = "" if line["reward"] is None else f"{line['reward']:.2f}"
        lines.append(
            f"{line['name']:<10}{reward:>8}{line['kl']:>10.2f}{format_share(line, 'over_sft'):>26}"
            f"{format_share(line, 'over_before'):>26}{line['ended']:>6.0%}{line['tokens']:>8.1f}"
        )
    return "\n".join(lines)
