"""On-policy pairs: a policy answers each prompt several times, a reward scores them, the better meets the worse.

What `--dataset_name` reads comes of it (`scripts/sample_pairs.py`). Training puts an end token after a whole answer,
so one that ran out of room is never the chosen one: it would teach to stop in the middle of a sentence.
"""

import math
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from datasets import Dataset
from trl.trainer.utils import hash_module

from tinydpo.data.asked import get_prompts
from tinydpo.data.forms import REWARD_COLUMNS
from tinydpo.data.notice import CONTENT_NOTICE, is_hh
from tinydpo.data.sources import HOLD_OUT_SEED
from tinydpo.errors import UserError
from tinydpo.evaluation.answering import SamplingArguments
from tinydpo.evaluation.rewards import RewardArguments, RewardFunction, as_completion, score_answers
from tinydpo.evaluation.sampling import Answers, sample_cached
from tinydpo.files import find_difference, public_name, read_json
from tinydpo.launching.arguments import DataArguments, list_sources
from tinydpo.models.adapters import hash_weights

AT_ONCE = 256  # prompts between two entries in the cache of answers: what a run that is cut short makes again
PAIRS_RESULTS = "pairs_results.json"  # written last: where it stands, the pairs are whole


@dataclass
class PairsArguments(SamplingArguments):
    """How often the policy answers each prompt, and what becomes a pair."""

    num_prompts: int = field(default=2000, metadata={"help": "Prompts of the train split to answer."})
    samples_per_prompt: int = field(default=8, metadata={"help": "Answers to each; more lie further apart."})
    pair_by: Literal["best_worst", "all"] = field(
        default="best_worst",
        metadata={"help": "best_worst: a prompt's best answer against its worst; all: every two that score unlike."},
    )

    def __post_init__(self):
        """Refuse what gives no pairs or no held-out ones, too (ValueError)."""
        super().__post_init__()
        self.at_least(num_prompts=2, samples_per_prompt=2)


class ScoredAnswer(NamedTuple):
    """An answer in words, whether the policy ended it itself, and its reward."""

    text: str
    ended: bool
    reward: float


def get_pairs_settings(args: PairsArguments, reward: RewardArguments, data: DataArguments) -> dict[str, Any]:
    """All that was given that the pairs depend on, with a digest of weights that lie in a local folder."""
    policy = Path(args.model_name_or_path)
    known = {"weights": hash_weights(policy)} if policy.is_dir() else {}
    kept = {name: value for name, value in asdict(args).items() if name != "output_dir"}
    return asdict(data) | asdict(reward) | kept | known


def has_finished_pairs(folder: Path, settings: dict[str, Any]) -> bool:
    """Whether the folder holds these very pairs (then it says so).

    Raises:
        UserError: it holds pairs made otherwise, naming the first setting that differs.
    """
    before = read_json(folder / PAIRS_RESULTS, "settings").get("settings")
    if before is None:
        return False
    if key := find_difference(before, settings):
        raise UserError(
            f"{folder} holds pairs made with {key}: {before.get(key)}, these have {key}: {settings.get(key)}; "
            "pass another --output_dir, or delete the folder"
        )
    print(f"{folder} holds these pairs, whole; delete the folder to make them again.")
    return True


def sample_several(model: Any, tokenizer: Any, prompts: list[list[int]], args: PairsArguments) -> Answers:
    """So many answers to each of n prompts, those to one prompt side by side: (n · samples_per_prompt).

    Cached by a few hundred prompts, so that the same command goes on where it was cut short.
    """
    ids, ended, weights = [], [], hash_module(model)
    for start in range(0, len(prompts), AT_ONCE):
        some = prompts[start : start + AT_ONCE]
        answers = sample_cached(
            model, tokenizer, [prompt for prompt in some for _ in range(args.samples_per_prompt)],
            args.max_length // 2, f"answers to prompts {start + 1} to {start + len(some)} of {len(prompts)}",
            seed=args.seed + start, weights=weights, **args.sampling,
        )  # fmt: skip
        ids += answers.ids
        ended += answers.ended
    return Answers(ids, ended)


def score_samples(functions: Sequence[RewardFunction], texts: Dataset, answers: Answers, tokenizer: Any) -> list[list[ScoredAnswer]]:
    """The answers to each row of `texts` with their rewards; `answers` are as `sample` gives them."""
    samples, written = len(answers.ids) // len(texts), answers.texts(tokenizer)
    rewards = score_answers(functions, texts.select(np.repeat(range(len(texts)), samples)), written, answers.ids)
    scored = [*map(ScoredAnswer, written, answers.ended, rewards.tolist())]
    return [scored[start : start + samples] for start in range(0, len(scored), samples)]


def get_distinct_answers(answers: Sequence[ScoredAnswer]) -> list[ScoredAnswer]:
    """The answers with a word in them, each text once, the best first."""
    once: dict[str, ScoredAnswer] = {}
    for answer in sorted(answers, key=lambda answer: not answer.ended):
        if answer.text.strip():
            once.setdefault(answer.text, answer)
    return sorted(once.values(), key=lambda answer: -answer.reward)


def make_pairs(answers: Sequence[ScoredAnswer], pair_by: str) -> list[tuple[ScoredAnswer, ScoredAnswer]]:
    """Pairs of one prompt's answers, the better first: none of answers that are equal or score alike.

    The better one is always an answer that the policy ended.
    """
    pairs = [
        (better, worse)
        for better, worse in combinations(get_distinct_answers(answers), 2)
        if better.ended and better.reward > worse.reward
    ]
    if pair_by == "all" or not pairs:
        return pairs
    return [max(pairs, key=lambda pair: pair[0].reward - pair[1].reward)]


def make_rows(
    texts: Dataset, answers: Sequence[Sequence[ScoredAnswer]], pair_by: str, test_split_size: float
) -> dict[str, list[dict[str, Any]]]:
    """The rows of `train` and `test`, held out by prompt; which ones depends on the prompts' number alone.

    Raises:
        UserError: one of the two would be empty.
    """
    count = len(texts)
    held_out = set(random.Random(HOLD_OUT_SEED).sample(range(count), math.ceil(test_split_size * count)))
    rows: dict[str, list[dict[str, Any]]] = {"train": [], "test": []}
    columns = zip(get_prompts(texts), texts["templated"][:], texts["subset"][:], answers, strict=True)
    for place, (prompt, templated, subset, scored) in enumerate(columns):
        for better, worse in make_pairs(scored, pair_by):
            row = {"prompt": prompt, "chosen": as_completion(prompt, better.text, templated)}
            row |= {"rejected": as_completion(prompt, worse.text, templated)}
            row |= zip(REWARD_COLUMNS, (better.reward, worse.reward), strict=True)
            rows["test" if place in held_out else "train"].append(row | ({"subset": subset} if subset else {}))
    if not (rows["train"] and rows["test"]):
        raise UserError(
            f"{count} prompts gave {len(rows['train'])} pairs to train on and {len(rows['test'])} held out; raise "
            "--num_prompts or --samples_per_prompt, or --test_split_size"
        )
    return rows


def count_answers(answers: Sequence[Sequence[ScoredAnswer]], rows: dict[str, list], pair_by: str) -> dict[str, Any]:
    """What became of the answers: those that gave no pair, by why, and mean rewards."""
    every = [answer for scored in answers for answer in scored]
    ranked = [get_distinct_answers(scored) for scored in answers]
    both = [*rows["train"], *rows["test"]]
    return {
        "prompts": len(answers),
        "answers": len(every),
        "answers_without_a_word": sum(not answer.text.strip() for answer in every),
        "answers_that_ended": sum(answer.ended for answer in every),
        "answers_equal_to_another": sum(bool(answer.text.strip()) for answer in every) - sum(map(len, ranked)),
        "answers_scored_like_another": sum(len(one) - len({answer.reward for answer in one}) for one in ranked),
        "prompts_without_a_pair": sum(not make_pairs(scored, pair_by) for scored in answers),
        "train_pairs": len(rows["train"]),
        "test_pairs": len(rows["test"]),
        "mean_reward": float(np.mean([answer.reward for answer in every])),
        "mean_reward_chosen": float(np.mean([row["reward_chosen"] for row in both])),
        "mean_reward_rejected": float(np.mean([row["reward_rejected"] for row in both])),
    }


def render_pairs_card(folder: Path, settings: dict[str, Any], reward: RewardArguments, counts: dict[str, Any]) -> str:
    """The pairs' README.md: from which weights, reward, settings and seeds they come."""
    from huggingface_hub import DatasetCard, DatasetCardData

    files = [{"split": split, "path": f"{split}.jsonl"} for split in ("train", "test")]
    policy, weights = public_name(settings["model_name_or_path"], settings["model_revision"]), settings.get("weights")
    data = DatasetCardData(
        configs=[{"config_name": "default", "data_files": files}], tags=["tinydpo", "preference", "on-policy"]
    )
    return str(
        DatasetCard.from_template(
            data,
            template_path=Path(__file__).with_name("templates") / "pairs.md",
            title=f"{folder.absolute().parent.name}/{folder.name}",
            policy=f"`{policy}`" + (f" (local, weights {weights[:12]}…)" if weights else ""),
            reward=reward.name(),
            sources=[public_name(one.name, one.revision) for one in list_sources(settings)],
            settings=settings,
            counts=counts,
            notice=CONTENT_NOTICE if is_hh(settings["dataset_name"]) else None,
        )
    )
