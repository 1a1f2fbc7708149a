"""The reward–KL frontier (DPO paper, arXiv 2305.18290, Figure 2): which runs make it.

`scripts/frontier.py` trains over losses and β, and `frontier_points` measures every checkpoint on the way. Two
controls stand beside: DPO on shuffled labels, which must not rise, and best-of-N samples of the reference.
"""

import json
import random
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from tinydpo.data.records import BrokenRow, ColumnNames, decode_row, rename_columns
from tinydpo.data.sources import load_records
from tinydpo.errors import UserError
from tinydpo.evaluation.rewards import RewardArguments
from tinydpo.files import write_atomic
from tinydpo.launching.arguments import DataArguments
from tinydpo.launching.parsing import load_recipe

CURVES = {"sigmoid": "DPO", "ipo": "IPO", "hinge": "hinge", "conservative": "conservative DPO"}
SHUFFLED = "shuffled labels"


@dataclass
class FrontierArguments:
    """Which runs make the frontier, and how their checkpoints are measured."""

    dpo_config: str | None = field(
        default=None, metadata={"help": "The DPO recipe of every run, whose data and model give way to these here."}
    )
    model_name_or_path: str | None = field(default=None, metadata={"help": "The SFT reference: folder or Hub id."})
    output_dir: str | None = field(default=None, metadata={"help": "Folder for the runs, frontier.json and the PNG."})
    losses: list[str] = field(
        default_factory=lambda: list(CURVES),
        metadata={"help": "A curve each, of sigmoid, ipo, hinge, conservative (DPO with label smoothing)."},
    )
    betas: list[float] = field(
        default_factory=lambda: [0.05, 0.1, 1.0, 5.0], metadata={"help": "A run each, for every loss (the paper's)."}
    )
    learning_rates: list[float] | None = field(
        default=None, metadata={"help": "A run each, for every loss and β; by default the recipe's one rate."}
    )
    seeds: list[int] = field(default_factory=lambda: [0], metadata={"help": "Each adds a run of every loss and β."})
    label_smoothing: float = field(default=0.1, metadata={"help": "ε of conservative DPO: the share of wrong labels."})
    checkpoints: int = field(default=3, metadata={"help": "Points along each run."})
    best_of: int = field(default=32, metadata={"help": "Reference samples a prompt, for best of 1, 2, 4 … so many."})
    num_prompts: int = field(default=256, metadata={"help": "Held-out prompts that every checkpoint answers."})
    batch_size: int = field(
        default=64,
        metadata={"help": "Sequences in one forward pass: memory against speed; another draws other samples."},
    )
    sample_seed: int = field(default=0, metadata={"help": "Picks the prompts and the samples."})

    def __post_init__(self):
        """Refuse what cannot be meant (ValueError)."""
        for name in ("dpo_config", "model_name_or_path", "output_dir", "losses", "betas", "seeds"):
            if not getattr(self, name):
                raise ValueError(f"--{name} is missing; recipes/quickstart/frontier.yaml shows what a frontier needs")
        if unknown := set(self.losses) - set(CURVES):
            raise ValueError(f"--losses {', '.join(sorted(unknown))}: not one of {', '.join(CURVES)}")
        if min(self.checkpoints, self.best_of, self.num_prompts, self.batch_size) < 1 or min(self.betas) <= 0:
            raise ValueError(
                "checkpoints, best_of, num_prompts and batch_size must be at least 1 and every beta above 0"
            )
        if min(self.learning_rates or [1.0]) <= 0:
            raise ValueError(f"learning_rates must be above 0, got {self.learning_rates}")
        for axis in ("losses", "betas", "learning_rates", "seeds"):
            setattr(self, axis, list(dict.fromkeys(getattr(self, axis) or ())) or None)
        if not 0 <= self.label_smoothing < 0.5:
            raise ValueError(f"label_smoothing must lie in [0, 0.5), got {self.label_smoothing}")


class FrontierRun(NamedTuple):
    """One training; `loss` is a key of `CURVES`, and a `learning_rate` of None is the recipe's."""

    name: str
    curve: str
    loss: str
    beta: float
    seed: int
    learning_rate: float | None = None


def plan_runs(args: FrontierArguments) -> Iterator[FrontierRun]:
    """The runs: every loss, β, rate and seed, and the paper's loss at the lowest β on shuffled labels."""
    for seed in args.seeds:
        for rate in args.learning_rates or [None]:
            end = f"-seed{seed}" if rate is None else f"-lr{rate:g}-seed{seed}"
            for loss in args.losses:
                for beta in args.betas:
                    yield FrontierRun(f"{loss}-beta{beta:g}{end}", CURVES[loss], loss, beta, seed, rate)
            lowest = min(args.betas)
            yield FrontierRun(f"shuffled-beta{lowest:g}{end}", SHUFFLED, "sigmoid", lowest, seed, rate)


def get_loss_flags(loss: str, label_smoothing: float) -> dict[str, Any]:
    """TRL's flags for a loss.

    Conservative DPO is −(1 − ε) log σ(x) − ε log σ(−x) (arXiv 2305.18290's authors' note on noisy labels, ε =
    `label_smoothing`). TRL's sigmoid loss ignores the smoothing; its robust loss, over (1 − 2ε), has the second term's
    sign turned, so that 2(1 − ε) sigmoid − (1 − 2ε) robust is it.
    """
    if loss != "conservative":
        return {"loss_type": [loss]}
    weights = [2 * (1 - label_smoothing), -(1 - 2 * label_smoothing)]
    return {"loss_type": ["sigmoid", "robust"], "loss_weights": weights, "label_smoothing": label_smoothing}


def get_dpo_flags(run: FrontierRun, args: FrontierArguments, data: DataArguments, folder: Path) -> list[str]:
    """The command line of scripts/dpo.py for a run, by `folder`/dpo.yaml; shuffled labels are in its shuffled-data."""
    if run.curve == SHUFFLED:
        same = ("max_question_length", "on_bad_row", "max_train_pairs", "max_test_pairs")
        kept = {flag: getattr(data, flag) for flag in same}
        data = DataArguments(dataset_name=str(folder / "shuffled-data"), **kept)
    flags = {
        "config": folder / "dpo.yaml", "model_name_or_path": args.model_name_or_path, "output_dir": folder / run.name,
        **{name: value for name, value in asdict(data).items() if value is not None},
        "beta": run.beta, "seed": run.seed, **({"learning_rate": run.learning_rate} if run.learning_rate else {}),
        **get_loss_flags(run.loss, args.label_smoothing),
        "eval_strategy": "no", "save_strategy": "steps", "save_steps": min(0.999999, 1 / args.checkpoints),
        "save_total_limit": args.checkpoints + 1, "disable_tqdm": True,
    }  # fmt: skip
    return [str(p) for k, v in flags.items() for p in (f"--{k}", *(v if isinstance(v, list) else [v]))]


def load_dpo_recipe(path: str) -> dict[str, Any]:
    """The keys that all runs share: a DPO recipe's, without its data.

    Raises:
        UserError: it cannot be read, or leaves the token budget open.
    """
    recipe = load_recipe(path)
    if not isinstance(recipe.get("max_length"), int):
        raise UserError(f"{path} sets no max_length; a frontier needs the token budget of its runs")
    of_data = {field.name for field in fields(DataArguments)}
    return {key: value for key, value in recipe.items() if key not in of_data}


def get_frontier_settings(
    args: FrontierArguments, reward: RewardArguments, data: DataArguments, recipe: dict[str, Any]
) -> dict[str, Any]:
    """All that was given that a point depends on, besides its run, as JSON holds it."""
    of_runs = ("output_dir", "losses", "betas", "learning_rates", "seeds", "best_of")
    kept = {name: value for name, value in asdict(args).items() if name not in of_runs}
    return json.loads(json.dumps(kept | asdict(reward) | asdict(data) | {"recipe": recipe}))


def write_frontier_data(data: DataArguments, recipe: dict[str, Any], folder: Path) -> None:
    """Write what the runs read: the recipe to `folder`/dpo.yaml, and the rows with shuffled labels.

    In `folder`/shuffled-data chosen and rejected of each training row are exchanged by the toss of a coin.
    """
    write_atomic(folder / "dpo.yaml", yaml.safe_dump(recipe))
    rng, folder = random.Random(0), folder / "shuffled-data"
    folder.mkdir(parents=True, exist_ok=True)
    for split, records in load_records(data).items():
        with open(folder / f"{split}.jsonl", "w", encoding="utf-8") as file:
            for record in records["record"]:
                try:
                    row = rename_columns(decode_row(record), ColumnNames.of(data))
                except BrokenRow:  # the runs before have stopped at it, or skipped it
                    continue
                if split == "train" and rng.random() < 0.5:
                    row["chosen"], row["rejected"] = row.get("rejected"), row.get("chosen")
                file.write(json.dumps(row) + "\n")
