"""On-policy pairs: a policy answers each prompt several times, a reward scores them, the better meets the worse.

What `--dataset_name` reads comes of it (`scripts/sample_pairs.py`). Training puts an end token after a whole answer,
so one that ran out of room is never the chosen one: it would teach to stop in the middle of a sentence.
"""

import math
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from itertools import combinations
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import yaml
from datasets import Dataset
from trl.trainer.utils import hash_module

from tinydpo.config.arguments import DataArguments, list_sources
from tinydpo.config.recipe import load_recipe
from tinydpo.data.notice import CONTENT_NOTICE, is_hh
from tinydpo.data.rows import REWARD_COLUMNS
from tinydpo.data.splits import HOLD_OUT_SEED
from tinydpo.data.text import get_prompts
from tinydpo.errors import UserError
from tinydpo.evaluation.arguments import SamplingArguments
from tinydpo.evaluation.rewards import RewardArguments, RewardFunction, as_completion, score_answers
from tinydpo.evaluation.sampling import Answers, sample_cached
from tinydpo.files import find_difference, public_name, read_json, write_atomic
from tinydpo.models.loading import hash_weights

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


def score_samples(
    functions: Sequence[RewardFunction], texts: Dataset, answers: Answers, tokenizer: Any
) -> list[list[ScoredAnswer]]:
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


DPO = "dpo-on-policy"  # a round's own recipe: its pairs lie further apart than a dataset's and want another loss
OF_PAIRS = {"max_question_length", "on_bad_row"}  # of a DPO recipe's keys about data, what holds for any


@dataclass
class RoundArguments:
    """Which recipes make a round, and how many rounds."""

    recipe: str | None = field(
        default=None, metadata={"help": f"Folder with pairs.yaml, {DPO}.yaml and evaluate.yaml, a round's stages."}
    )
    rounds: int = field(default=2, metadata={"help": "Rounds in all; those made before are not made again."})
    output_dir: str | None = field(
        default=None, metadata={"help": "Folder for round-1, round-2 …; by default runs/<recipe folder>."}
    )
    model_name_or_path: str | None = field(
        default=None,
        metadata={"help": f"Where the first round starts, the reference of all; by default what {DPO}.yaml names."},
    )
    dataset_name: str | None = field(
        default=None, metadata={"help": "Prompts to answer, and held-out pairs; by default the recipes' own."}
    )
    seed: int = field(default=0, metadata={"help": "Of sampling, training and evaluation."})

    def __post_init__(self):
        """Take open names from the recipe, and refuse what cannot be meant (ValueError)."""
        if not self.recipe or self.rounds < 1:
            raise ValueError(
                "--recipe is missing, or --rounds is below 1; recipes/quickstart shows what a round needs"
            )
        self.output_dir = self.output_dir or f"runs/{Path(self.recipe).resolve().name}"


@dataclass
class Round:
    """One round: its folder, where it starts, and the reference (name, and revision on the Hub)."""

    args: RoundArguments
    folder: Path
    start: tuple[str, str | None]
    reference: tuple[str, str | None]

    def pairs_flags(self) -> list[str]:
        """The command line of scripts/sample_pairs.py."""
        return self._flags("pairs", *self._model("model", self.start), "--output_dir", str(self.folder / "pairs"))

    def dpo_flags(self) -> list[str]:
        """The command line of scripts/dpo.py, whose recipe goes to `folder`/dpo.yaml: the given one, other data."""
        of_data = {one.name for one in fields(DataArguments)} - OF_PAIRS
        recipe = {k: v for k, v in load_recipe(f"{self.args.recipe}/{DPO}.yaml").items() if k not in of_data}
        named = zip(("model", "ref_model"), (self.start, self.reference), strict=True)
        for role, (name, revision) in named:
            recipe |= {f"{role}_name_or_path": name, f"{role}_revision": revision or "main"}
        recipe |= {"dataset_name": str(self.folder / "pairs"), "output_dir": str(self.folder / "dpo")}
        self.folder.mkdir(parents=True, exist_ok=True)
        write_atomic(self.folder / "dpo.yaml", yaml.safe_dump(recipe | {"seed": self.args.seed}))
        return ["--config", str(self.folder / "dpo.yaml")]

    def evaluations(self) -> dict[Path, list[str]]:
        """The command lines of scripts/evaluate.py by their folders: over the round before, then over the reference.

        In this order, because a policy's card keeps the last. In a first round they are one.
        """
        against = {"evaluation": self.reference}
        if self.start != self.reference:
            against = {"evaluation-before": self.start, **against}
        policy = self._model("model", (str(self.folder / "dpo"), None))
        return {
            self.folder / name: self._flags(
                "evaluate", *policy, *self._model("ref_model", other), "--output_dir", str(self.folder / name)
            )
            for name, other in against.items()
        }

    def is_evaluated(self, folder: Path) -> bool:
        """Whether an evaluation was made of the policy that is there now."""
        made, trained = folder / "eval_results.json", self.folder / "dpo/train_results.json"
        return made.exists() and made.stat().st_mtime >= trained.stat().st_mtime

    def _flags(self, stage: str, *flags: str) -> list[str]:
        data = ["--dataset_name", self.args.dataset_name] if self.args.dataset_name else []
        return ["--config", f"{self.args.recipe}/{stage}.yaml", *flags, *data, "--seed", str(self.args.seed)]

    def _model(self, role: str, model: tuple[str, str | None]) -> list[str]:
        name, revision = model
        return [f"--{role}_name_or_path", name, *([f"--{role}_revision", revision] if revision else [])]


def plan_rounds(args: RoundArguments) -> list[Round]:
    """The rounds in order.

    Raises:
        UserError: a recipe cannot be read, or names no model to start from.
    """
    dpo, *_ = (load_recipe(f"{args.recipe}/{stage}.yaml") for stage in (DPO, "pairs", "evaluate"))
    first = (args.model_name_or_path, None) if args.model_name_or_path else (
        dpo.get("model_name_or_path"), dpo.get("model_revision"),
    )  # fmt: skip
    if not first[0]:
        raise UserError(f"{args.recipe}/{DPO}.yaml names no model to start from; pass --model_name_or_path")
    folders = [Path(args.output_dir) / f"round-{number}" for number in range(1, args.rounds + 1)]
    starts = [first, *((str(folder / "dpo"), None) for folder in folders[:-1])]
    return [Round(args, folder, start, first) for folder, start in zip(folders, starts, strict=True)]


def collect_rounds(rounds: list[Round]) -> dict[str, Any]:
    """What the reference and each round's policy came to, by their evaluations.

    Returns:
        `reward`, the name of the evaluation's, and `rounds`, the reference first; `rewards` of each by each of them
        alone, where there are several.
    """
    against = [read_json(one.folder / "evaluation/eval_results.json", "kl_per_sequence") for one in rounds]
    before = [read_json(one.folder / "evaluation-before/eval_results.json") or against[0] for one in rounds]
    lines = [{"name": "SFT", "kl": 0.0, "kl_se": 0.0} | _collect_role("ref", against[0])]
    for one, figures, over in zip(rounds, against, before, strict=True):
        kl = {"kl": figures["kl_per_sequence"], "kl_se": figures["kl_per_sequence_se"]}
        lines.append({"name": one.folder.name} | kl | _collect_role("policy", figures))
        for name, of in (("over_sft", figures), ("over_before", over)):
            lines[-1] |= {name: of.get("win_rate_vs_ref"), f"{name}_ci95": of.get("win_rate_ci95")}
    given = against[0]["settings"]
    named = RewardArguments(given.get("reward_funcs"), given.get("reward_model_name_or_path"))
    return {"reward": named.name(), "rounds": lines}


def _collect_role(role: str, figures: dict[str, Any]) -> dict[str, Any]:
    both = {"reward": "reward", "ended": "ended", "tokens": "mean_length"}
    line = {ours: figures.get(f"{theirs}_{role}") for ours, theirs in both.items()}
    each = figures.get("rewards", {}).items()
    rewards = {name: {"mean": one[f"reward_{role}"], "se": one[f"reward_{role}_se"]} for name, one in each}
    return line | {"reward_se": figures.get(f"reward_{role}_se")} | ({"rewards": rewards} if rewards else {})


def add_rounds_to_frontier(frontier: dict[str, Any], rounds: dict[str, Any]) -> dict[str, Any]:
    """`frontier.json` with the rounds of `rounds.json` as a curve of their own; either may be missing, {}.

    Rounds measured by another reward, or by none, are left out.
    """
    if not rounds.get("reward") or rounds["reward"] != frontier.get("reward", rounds["reward"]):
        return frontier
    return {"points": [], "reward": rounds["reward"], **frontier, "rounds": rounds["rounds"]}


def format_rounds(lines: list[dict[str, Any]]) -> str:
    """`figures_of` as a table; win rates with their 95 % intervals."""

    def share(line: dict[str, Any], name: str) -> str:
        if line.get(name) is None:
            return ""
        low, high = line[f"{name}_ci95"]
        return f"{line[name]:.1%} ({low:.1%} to {high:.1%})"

    rows = [
        f"{'':<10}{'reward':>8}{'KL, nats':>10}{'beats SFT':>26}{'beats the one before':>26}{'end':>6}{'tokens':>8}"
    ]
    for line in lines:
        reward = "" if line["reward"] is None else f"{line['reward']:.2f}"
        rows.append(
            f"{line['name']:<10}{reward:>8}{line['kl']:>10.2f}{share(line, 'over_sft'):>26}"
            f"{share(line, 'over_before'):>26}{line['ended']:>6.0%}{line['tokens']:>8.1f}"
        )
    return "\n".join(rows)
