"""On-policy rounds: what each stage of a round is told, and what the rounds came to.

A round samples pairs from the last policy (`on_policy`), trains DPO on from it, and evaluates. Its reference is always
the first model, the SFT: KL is measured from a place that does not move.
"""

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml

from tinydpo.errors import UserError
from tinydpo.evaluation.rewards import RewardArguments
from tinydpo.files import read_json, write_atomic
from tinydpo.launching.arguments import DataArguments
from tinydpo.launching.parsing import load_recipe

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
