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

from tinydpo.data.asked import prompts_of
from tinydpo.data.forms import REWARDS
from tinydpo.data.notice import CONTENT_NOTICE, is_hh
from tinydpo.data.sources import HOLD_OUT_SEED
from tinydpo.errors import UserError
from tinydpo.evaluation.rewards import RewardArguments, RewardFunction, completion_of, scores_of
from tinydpo.evaluation.sampling import Answers, cached_answers
from tinydpo.files import differing, public_name, read_json, read_run_config
from tinydpo.launching.arguments import DataArguments, sources_in
from tinydpo.models.adapters import weights_sha256

AT_ONCE = 256  # prompts between two entries in the cache of answers: what a run that is cut short makes again
MADE = "pairs_results.json"  # written last: where it stands, the pairs are whole


@dataclass
class PairsArguments:
    """Who answers which prompts how often, and what becomes a pair."""

    model_name_or_path: str | None = field(default=None, metadata={"help": "The policy: folder or Hub id."})
    model_revision: str | None = field(default=None, metadata={"help": "Commit, tag or branch, on the Hub."})
    output_dir: str | None = field(
        default=None, metadata={"help": "Folder for the pairs, their card and a histogram."}
    )
    max_length: int | None = field(
        default=None,
        metadata={"help": "Tokens of prompt + completion; an answer gets half. By default the policy run's, or 128."},
    )
    num_prompts: int = field(default=2000, metadata={"help": "Prompts of the train split to answer."})
    samples_per_prompt: int = field(default=8, metadata={"help": "Answers to each; more lie further apart."})
    pair_by: Literal["best_worst", "all"] = field(
        default="best_worst",
        metadata={"help": "best_worst: a prompt's best answer against its worst; all: every two that score unlike."},
    )
    temperature: float = field(default=1.0, metadata={"help": "Divides the logits when sampling."})
    top_k: int = field(default=0, metadata={"help": "Sample from the k most likely tokens only; 0: from all."})
    top_p: float = field(default=1.0, metadata={"help": "Sample from the likeliest tokens of this mass; 1: from all."})
    batch_size: int = field(
        default=32,
        metadata={"help": "Sequences in one forward pass: memory against speed; another draws other samples."},
    )
    seed: int = field(default=0, metadata={"help": "Picks the prompts, where there are more, and the samples."})
    dtype: Literal["auto", "float32", "bfloat16"] = field(
        default="auto",
        metadata={"help": "What blocks compute in; auto: bfloat16 where the GPU or CPU is fast in it, else float32."},
    )

    def __post_init__(self):
        """Take an open length from the policy's run, and refuse what cannot be meant (ValueError)."""
        for name in ("model_name_or_path", "output_dir"):
            if not getattr(self, name):
                raise ValueError(f"--{name} is missing; needed are a policy and an output folder")
        if self.max_length is None:
            self.max_length = int(read_run_config(self.model_name_or_path).get("max_length") or 128)
        least = {"max_length": 4, "num_prompts": 2, "samples_per_prompt": 2, "batch_size": 1, "top_k": 0}
        for name, bound in least.items():
            if getattr(self, name) < bound:
                raise ValueError(f"{name} must be at least {bound}, got {getattr(self, name)}")
        if not (self.temperature > 0 and 0 < self.top_p <= 1):
            raise ValueError(
                f"temperature must be above 0 and top_p between 0 and 1, got {self.temperature} and {self.top_p}"
            )


class Scored(NamedTuple):
    """An answer in words, whether the policy ended it itself, and its reward."""

    text: str
    ended: bool
    reward: float


def settings_of(args: PairsArguments, reward: RewardArguments, data: DataArguments) -> dict[str, Any]:
    """All that was given that the pairs depend on, with a digest of weights that lie in a local folder."""
    policy = Path(args.model_name_or_path)
    known = {"weights": weights_sha256(policy)} if policy.is_dir() else {}
    kept = {name: value for name, value in asdict(args).items() if name != "output_dir"}
    return asdict(data) | asdict(reward) | kept | known


def is_made(folder: Path, settings: dict[str, Any]) -> bool:
    """Whether the folder holds these very pairs (then it says so).

    Raises:
        UserError: it holds pairs made otherwise, naming the first setting that differs.
    """
    before = read_json(folder / MADE, "settings").get("settings")
    if before is None:
        return False
    if key := differing(before, settings):
        raise UserError(
            f"{folder} holds pairs made with {key}: {before.get(key)}, these have {key}: {settings.get(key)}; "
            "pass another --output_dir, or delete the folder"
        )
    print(f"{folder} holds these pairs, whole; delete the folder to make them again.")
    return True


def sample(model: Any, tokenizer: Any, prompts: list[list[int]], args: PairsArguments) -> Answers:
    """So many answers to each of n prompts, those to one prompt side by side: (n · samples_per_prompt).

    Cached by a few hundred prompts, so that the same command goes on where it was cut short.
    """
    ids, ended, weights = [], [], hash_module(model)
    for start in range(0, len(prompts), AT_ONCE):
        some = prompts[start : start + AT_ONCE]
        answers = cached_answers(
            model, tokenizer, [prompt for prompt in some for _ in range(args.samples_per_prompt)],
            args.max_length // 2, f"answers to prompts {start + 1} to {start + len(some)} of {len(prompts)}",
            temperature=args.temperature, top_k=args.top_k, top_p=args.top_p, batch_size=args.batch_size,
            seed=args.seed + start, weights=weights,
        )  # fmt: skip
        ids += answers.ids
        ended += answers.ended
    return Answers(ids, ended)


def score(functions: Sequence[RewardFunction], texts: Dataset, answers: Answers, tokenizer: Any) -> list[list[Scored]]:
    """The answers to each row of `texts` with their rewards; `answers` are as `sample` gives them."""
    samples, written = len(answers.ids) // len(texts), answers.texts(tokenizer)
    rewards = scores_of(functions, texts.select(np.repeat(range(len(texts)), samples)), written, answers.ids)
    scored = [*map(Scored, written, answers.ended, rewards.tolist())]
    return [scored[start : start + samples] for start in range(0, len(scored), samples)]


def distinct(answers: Sequence[Scored]) -> list[Scored]:
    """The answers with a word in them, each text once, the best first."""
    once: dict[str, Scored] = {}
    for answer in sorted(answers, key=lambda answer: not answer.ended):
        if answer.text.strip():
            once.setdefault(answer.text, answer)
    return sorted(once.values(), key=lambda answer: -answer.reward)


def pairs_of(answers: Sequence[Scored], pair_by: str) -> list[tuple[Scored, Scored]]:
    """Pairs of one prompt's answers, the better first: none of answers that are equal or score alike.

    The better one is always an answer that the policy ended.
    """
    pairs = [
        (better, worse)
        for better, worse in combinations(distinct(answers), 2)
        if better.ended and better.reward > worse.reward
    ]
    if pair_by == "all" or not pairs:
        return pairs
    return [max(pairs, key=lambda pair: pair[0].reward - pair[1].reward)]


def rows_of(
    texts: Dataset, answers: Sequence[Sequence[Scored]], pair_by: str, test_split_size: float
) -> dict[str, list[dict[str, Any]]]:
    """The rows of `train` and `test`, held out by prompt; which ones depends on the prompts' number alone.

    Raises:
        UserError: one of the two would be empty.
    """
    count = len(texts)
    held_out = set(random.Random(HOLD_OUT_SEED).sample(range(count), math.ceil(test_split_size * count)))
    rows: dict[str, list[dict[str, Any]]] = {"train": [], "test": []}
    columns = zip(prompts_of(texts), texts["templated"][:], texts["subset"][:], answers, strict=True)
    for place, (prompt, templated, subset, scored) in enumerate(columns):
        for better, worse in pairs_of(scored, pair_by):
            row = {"prompt": prompt, "chosen": completion_of(prompt, better.text, templated)}
            row |= {"rejected": completion_of(prompt, worse.text, templated)}
            row |= zip(REWARDS, (better.reward, worse.reward), strict=True)
            rows["test" if place in held_out else "train"].append(row | ({"subset": subset} if subset else {}))
    if not (rows["train"] and rows["test"]):
        raise UserError(
            f"{count} prompts gave {len(rows['train'])} pairs to train on and {len(rows['test'])} held out; raise "
            "--num_prompts or --samples_per_prompt, or --test_split_size"
        )
    return rows


def counted(answers: Sequence[Sequence[Scored]], rows: dict[str, list], pair_by: str) -> dict[str, Any]:
    """What became of the answers: those that gave no pair, by why, and mean rewards."""
    every = [answer for scored in answers for answer in scored]
    ranked = [distinct(scored) for scored in answers]
    both = [*rows["train"], *rows["test"]]
    return {
        "prompts": len(answers),
        "answers": len(every),
        "answers_without_a_word": sum(not answer.text.strip() for answer in every),
        "answers_that_ended": sum(answer.ended for answer in every),
        "answers_equal_to_another": sum(bool(answer.text.strip()) for answer in every) - sum(map(len, ranked)),
        "answers_scored_like_another": sum(len(one) - len({answer.reward for answer in one}) for one in ranked),
        "prompts_without_a_pair": sum(not pairs_of(scored, pair_by) for scored in answers),
        "train_pairs": len(rows["train"]),
        "test_pairs": len(rows["test"]),
        "mean_reward": float(np.mean([answer.reward for answer in every])),
        "mean_reward_chosen": float(np.mean([row["reward_chosen"] for row in both])),
        "mean_reward_rejected": float(np.mean([row["reward_rejected"] for row in both])),
    }


def card(folder: Path, settings: dict[str, Any], reward: RewardArguments, counts: dict[str, Any]) -> str:
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
            sources=[public_name(one.name, one.revision) for one in sources_in(settings)],
            settings=settings,
            counts=counts,
            notice=CONTENT_NOTICE if is_hh(settings["dataset_name"]) else None,
        )
    )
