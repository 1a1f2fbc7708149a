"""The reward–KL frontier (DPO paper, arXiv 2305.18290, Figure 2): which runs make it.

`scripts/frontier.py` trains over losses and β, and `frontier_points` measures every checkpoint on the way. Two
controls stand beside: DPO on shuffled labels, which must not rise, and best-of-N samples of the reference.
"""

import gc
import json
import math
import random
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import yaml
from datasets import Dataset, concatenate_datasets
from datasets.fingerprint import Hasher
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl.trainer.utils import hash_module

from tinydpo.config.arguments import DataArguments, resolve_row_length
from tinydpo.config.launch import pick_device_and_dtype
from tinydpo.config.recipe import load_recipe
from tinydpo.data.pairs import load_split
from tinydpo.data.rows import ParsedRow
from tinydpo.data.splits import load_rows
from tinydpo.data.text import get_readable_columns
from tinydpo.errors import UserError
from tinydpo.evaluation.metrics import Z95, kl_metrics, standard_error
from tinydpo.evaluation.rewards import RewardArguments, RewardFunction, load_rewards, score_answers
from tinydpo.evaluation.sampling import prepare_prompts, sample_cached
from tinydpo.files import find_difference, read_json, write_atomic, write_json
from tinydpo.models.loading import load_model, load_tokenizer
from tinydpo.models.precision import get_compute_dtype
from tinydpo.training.logps import token_logps

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
    for split, rows in load_rows(data).items():
        with open(folder / f"{split}.jsonl", "w", encoding="utf-8") as file:
            for parsed in rows["parsed"]:
                if parsed is None:  # a broken row, at which the runs before have stopped, or which they skipped
                    continue
                row = ParsedRow.from_json(parsed).to_columns()
                if split == "train" and rng.random() < 0.5:
                    row["chosen"], row["rejected"] = row.get("rejected"), row.get("chosen")
                file.write(json.dumps(row) + "\n")


@dataclass
class FrontierMeasure:
    """What all points have in common: the reference, the prompts and the reward."""

    ref: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    texts: Dataset
    prompts: list[list[int]]
    functions: list[RewardFunction]
    max_new_tokens: int
    row_length: int | None
    batch_size: int
    seed: int

    def fingerprint(self) -> dict[str, str]:
        """What the names in a recipe do not tell: weights, prompts and rewards may change behind them."""
        chosen = get_readable_columns(self.texts, self.tokenizer)["chosen"]
        ids = self.tokenizer(chosen, add_special_tokens=False, verbose=False).input_ids
        scores = score_answers(self.functions, self.texts, chosen, ids)
        known = {
            "reference's weights": hash_module(self.ref),
            "dtype or device": (get_compute_dtype(self.ref), self.ref.device.type),
        }
        known |= {"set of prompts": self.prompts, "reward": scores.tolist()}
        return {name: Hasher.hash(value) for name, value in known.items()}

    def policy(self, name: str) -> dict[str, float]:
        """KL from the reference (nats an answer) and reward of the policy `name`, each with its standard error."""
        model = load_model(name, dtype=get_compute_dtype(self.ref), device=self.ref.device)
        ids, scores = self._answers(model, 1)
        logps = [token_logps(m, self.prompts, ids, self.batch_size, "KL", self.row_length) for m in (model, self.ref)]
        kl = kl_metrics(*logps)
        del model
        gc.collect()
        point = {"kl": kl["kl_per_sequence"], "kl_se": kl["kl_per_sequence_se"]}
        return point | {"reward": float(scores.mean()), "reward_se": standard_error(scores[:, 0])}

    def reference(self, samples: int) -> dict[str, Any]:
        """The reference's own point, `sft`, and `best_of_n` for N up to `samples`."""
        _, scores = self._answers(self.ref, samples)
        best = best_of_n(scores)
        return {"sft": {"kl": 0.0, "reward": best[0]["reward"], "reward_se": best[0]["reward_se"]}, "best_of_n": best}

    def _answers(self, model: PreTrainedModel, samples: int) -> tuple[list[list[int]], np.ndarray]:
        answers = sample_cached(
            model, self.tokenizer, self.prompts * samples, self.max_new_tokens, "answers",
            batch_size=self.batch_size, seed=self.seed,
        )  # fmt: skip
        texts = concatenate_datasets([self.texts] * samples)
        scores = score_answers(self.functions, texts, answers.texts(self.tokenizer), answers.ids)
        return answers.ids, scores.reshape(samples, -1).T


def load_measure(
    args: FrontierArguments, reward: RewardArguments, data: DataArguments, recipe: dict[str, Any]
) -> FrontierMeasure:
    """Load the reference, the reward and the held-out prompts.

    Raises:
        UserError: one of them cannot be loaded, or there is no reward.
    """
    dtype = "float32" if recipe.get("bf16") is False else "auto"  # as the runs compute
    (device, dtype), max_length = pick_device_and_dtype(dtype), recipe["max_length"]
    functions = load_rewards(reward, device, args.batch_size, dtype)
    if not functions:
        raise UserError("a frontier needs a reward: pass --reward_funcs or --reward_model_name_or_path")
    tokenizer = load_tokenizer(args.model_name_or_path)
    held_out = load_split(data, tokenizer, max_length, "test").texts
    texts, prompts = prepare_prompts(held_out, tokenizer, max_length, args.num_prompts, args.sample_seed)
    rows = resolve_row_length(max_length, None) if recipe.get("shared_prefix", True) else None
    ref = load_model(args.model_name_or_path, dtype=dtype, device=device)
    return FrontierMeasure(
        ref, tokenizer, texts, prompts, functions, max_length // 2, rows, args.batch_size, args.sample_seed
    )


def check_frontier_settings(path: Path, settings: dict[str, Any]) -> None:
    """Refuse to add to a `frontier.json` whose points were measured under other settings (UserError)."""
    before = read_json(path, "settings").get("settings", settings)
    if key := find_difference(before, settings):
        raise UserError(f"{path} was measured with another {key}; pass another --output_dir, or delete its folder")


def read_finished_runs(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """Points of the runs in `folder` that are done, by the run's name."""
    runs = {path.parent.name: read_json(path, "points", "done") for path in sorted(folder.glob("*/points.json"))}
    return {name: run["points"] for name, run in runs.items() if run["done"]}


def get_run_key(point: dict[str, Any]) -> tuple[str, float, float, int]:
    """What tells a point's run from others: its curve, learning rate (0 for the recipe's), β and seed."""
    return point["curve"], point.get("learning_rate") or 0.0, point["beta"], point["seed"]


def order_points(runs: dict[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """The points of all runs, method by method."""
    curves = [*CURVES.values(), SHUFFLED]
    points = (point for run in runs.values() for point in run)
    return sorted(points, key=lambda p: (curves.index(p["curve"]), *get_run_key(p)[1:], p["step"]))


def measure_run(
    run: FrontierRun, folder: Path, train: Callable[[FrontierRun], None], measure: FrontierMeasure
) -> list[dict[str, Any]]:
    """Train a run and measure its checkpoints, or what of it is not done yet; measured checkpoints are deleted.

    Args:
        run: which.
        folder: of the run; `points.json` in it holds what was measured.
        train: trains a run into its folder, or goes on where it was cut short.
        measure: see `Measure`.
    """
    path = folder / "points.json"
    saved = read_json(path, "points", "done") or {"points": [], "done": False}
    train(run)
    measured = {point["step"] for point in saved["points"]}
    steps = sorted(int(checkpoint.name.split("-")[1]) for checkpoint in folder.glob("checkpoint-*"))
    for step in (step for step in steps if step not in measured):
        point = {"curve": run.curve, "loss": run.loss, "beta": run.beta, "seed": run.seed, "step": step}
        point |= {"learning_rate": run.learning_rate} if run.learning_rate else {}
        saved["points"].append(point | measure.policy(str(folder / f"checkpoint-{step}")))
        write_json(path, saved)
    if not saved["points"]:
        raise UserError(f"{folder} holds a finished run and no checkpoints to measure; delete it to train again")
    write_json(path, saved | {"done": True})
    for step in steps:
        shutil.rmtree(folder / f"checkpoint-{step}")
    return saved["points"]


def best_of_n(rewards: np.ndarray) -> list[dict[str, float]]:
    """Best of N = 1, 2, 4 … of n reference samples to each of m prompts.

    The mean of the best of N takes every subset of the n samples (an unbiased estimate; WebGPT, arXiv 2112.09332,
    appendix I). The KL is log N − (N − 1)/N, which the true one does not exceed (arXiv 2401.01879).

    Args:
        rewards: (m, n).

    Returns:
        A mapping of `n`, `kl` (nats), `reward` and `reward_se` for each N.
    """
    ordered, count = np.sort(rewards, axis=1), rewards.shape[1]
    points = []
    for n in (2**power for power in range(count.bit_length())):
        weights = [math.comb(i, n - 1) / math.comb(count, n) for i in range(count)]
        best = ordered @ np.array(weights)
        kl = math.log(n) - (n - 1) / n
        points.append({"n": n, "kl": kl, "reward": float(best.mean()), "reward_se": standard_error(best)})
    return points


def format_frontier(points: Sequence[dict[str, Any]], sft: dict[str, Any]) -> str:
    """The last point of each run, beside the reference."""
    lines = [f"{'':<18}{'β':>6}{'steps':>7}{'KL, nats':>16}{'reward':>16}"]
    lines.append(
        f"{'SFT reference':<18}{'':>6}{'':>7}{0:>9.2f}{'':>7}{sft['reward']:>9.2f} ± {Z95 * sft['reward_se']:.2f}"
    )
    for p in {get_run_key(point): point for point in points}.values():
        rate = f"  learning rate {p['learning_rate']:g}" if "learning_rate" in p else ""
        lines.append(
            f"{p['curve']:<18}{p['beta']:>6g}{p['step']:>7}{p['kl']:>9.2f} ± {Z95 * p['kl_se']:.2f}"
            f"{p['reward']:>9.2f} ± {Z95 * p['reward_se']:.2f}{rate}"
        )
    return "\n".join(lines)
