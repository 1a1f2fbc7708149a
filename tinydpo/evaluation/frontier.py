"""The reward-KL frontier (DPO paper, arXiv 2305.18290, Figure 2): which runs, how each is trained and measured.

`scripts/frontier.py` trains DPO over losses and β and measures every checkpoint. There are two controls: DPO on
shuffled labels, which must not rise, and best-of-N samples of the reference.
"""

import gc
import itertools
import json
import math
import random
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import yaml
from datasets import concatenate_datasets
from datasets.fingerprint import Hasher
from transformers import PreTrainedModel
from transformers.hf_argparser import HfArg
from trl.trainer.utils import hash_module

from tinydpo.config.arguments import DataArguments, resolve_row_length
from tinydpo.data.pairs import load_split
from tinydpo.data.rows import ParsedRow
from tinydpo.data.splits import load_rows
from tinydpo.data.text import get_readable_columns
from tinydpo.errors import UserError
from tinydpo.evaluation.arguments import RewardArguments, check_given, check_positive
from tinydpo.evaluation.metrics import Z95, kl_metrics, standard_error
from tinydpo.evaluation.rewards import score_answers
from tinydpo.evaluation.sampling import prepare_prompts, sample_cached
from tinydpo.files import read_json, read_yaml, write_atomic, write_json
from tinydpo.models.loading import check_model, load_model, load_tokenizer
from tinydpo.models.precision import get_compute_dtype
from tinydpo.training.logps import token_logps

CURVES = {"sigmoid": "DPO", "ipo": "IPO", "hinge": "hinge", "conservative": "conservative DPO"}
SHUFFLED = "shuffled labels"


@dataclass
class FrontierArguments:
    """Which runs make the frontier, and how their checkpoints are measured."""

    dpo_config: str | None = HfArg(default=None, help="The DPO recipe of every run, except for its data and model.")
    model_name_or_path: str | None = HfArg(default=None, help="The SFT reference: folder or Hub id.")
    output_dir: str | None = HfArg(default=None, help="Folder for the runs, frontier.json and the PNG.")
    losses: list[str] = HfArg(default_factory=lambda: list(CURVES), help=f"Curves: any of {', '.join(CURVES)}.")
    betas: list[float] = HfArg(default_factory=lambda: [0.05, 0.1, 1.0, 5.0], help="One run per loss and β.")
    learning_rates: list[float] | None = HfArg(default=None, help="One run per loss, β and rate.")
    seeds: list[int] = HfArg(default_factory=lambda: [0], help="Each adds a run of every loss and β.")
    label_smoothing: float = HfArg(default=0.1, help="ε of conservative DPO: the share of wrong labels.")
    checkpoints: int = HfArg(default=3, help="Points along each run.")
    best_of: int = HfArg(default=32, help="Reference samples per prompt: best of 1, 2, 4, … up to this; 1 for none.")
    num_prompts: int = HfArg(default=256, help="Held-out prompts that every checkpoint answers.")
    batch_size: int = HfArg(default=64, help="Sequences per forward pass; changing it changes the samples.")
    sample_seed: int = HfArg(default=0, help="Picks the prompts and the samples.")

    def __post_init__(self):
        needed = ("dpo_config", "model_name_or_path", "output_dir")
        check_given(self, *needed, hint="recipes/quickstart/frontier.yaml shows what a frontier needs")
        check_positive(self, "checkpoints", "best_of", "num_prompts")
        unknown = set(self.losses) - set(CURVES)
        if unknown:
            raise ValueError(f"--losses {', '.join(sorted(unknown))}: not one of {', '.join(CURVES)}")


class FrontierRun(NamedTuple):
    """One training run; `loss` is a key of `CURVES`, and a `learning_rate` of None is the recipe's."""

    name: str
    curve: str
    loss: str
    beta: float
    seed: int
    learning_rate: float | None = None


def plan_runs(args: FrontierArguments) -> list[FrontierRun]:
    """Every loss, β, learning rate and seed, and as a control DPO at the lowest β on shuffled labels."""
    lowest = min(args.betas)
    runs = []
    for seed, rate in itertools.product(args.seeds, args.learning_rates or [None]):
        end = f"seed{seed}" if rate is None else f"lr{rate:g}-seed{seed}"
        for loss, beta in itertools.product(args.losses, args.betas):
            runs.append(FrontierRun(f"{loss}-beta{beta:g}-{end}", CURVES[loss], loss, beta, seed, rate))
        runs.append(FrontierRun(f"shuffled-beta{lowest:g}-{end}", SHUFFLED, "sigmoid", lowest, seed, rate))
    return list(dict.fromkeys(runs))  # a value passed twice is one run


def get_loss_flags(loss: str, label_smoothing: float) -> dict[str, Any]:
    """TRL's flags for a loss.

    Conservative DPO is −(1 − ε) log σ(x) − ε log σ(−x) (the DPO authors' note on noisy labels, ε = `label_smoothing`).
    TRL's sigmoid loss ignores the smoothing. Its robust loss, divided by (1 − 2ε), has the second term with the
    opposite sign, so that 2(1 − ε) sigmoid − (1 − 2ε) robust is conservative DPO.
    """
    if loss != "conservative":
        # The recipe's own weights and smoothing are those of its own losses.
        return {"loss_type": [loss], "loss_weights": None, "label_smoothing": 0.0}
    weights = [2 * (1 - label_smoothing), -(1 - 2 * label_smoothing)]
    return {"loss_type": ["sigmoid", "robust"], "loss_weights": weights, "label_smoothing": label_smoothing}


def load_dpo_recipe(path: str) -> dict[str, Any]:
    """The keys that all runs share: a DPO recipe without its data and its token (UserError: no token budget)."""
    recipe = read_yaml(path)
    if not isinstance(recipe.get("max_length"), int):
        raise UserError(f"{path} sets no max_length; a frontier needs the token budget of its runs")
    dropped = {field.name for field in fields(DataArguments)}
    dropped.add("hub_token")  # a secret: the keys are written to files
    return {key: value for key, value in recipe.items() if key not in dropped}


def write_shuffled_data(data: DataArguments, folder: Path) -> None:
    """Write the data's rows, with chosen and rejected of each training row exchanged with probability one half."""
    rng = random.Random(0)
    folder.mkdir(parents=True, exist_ok=True)
    for split, rows in load_rows(data).items():
        with open(folder / f"{split}.jsonl", "w", encoding="utf-8") as file:
            for parsed in rows["parsed"]:
                if parsed is None:  # a broken row: the other runs skip it, or have failed on it
                    continue
                row = ParsedRow.from_json(parsed).to_columns()
                if split == "train" and rng.random() < 0.5:
                    row["chosen"], row["rejected"] = row.get("rejected"), row.get("chosen")
                file.write(json.dumps(row) + "\n")


def write_run_recipe(
    run: FrontierRun, args: FrontierArguments, data: DataArguments, recipe: dict[str, Any], folder: Path
) -> Path:
    """Write what scripts/dpo.py needs for a run into `folder`; runs on shuffled labels read `folder`/shuffled-data."""
    data_keys = {key: value for key, value in asdict(data).items() if value is not None}
    if run.curve == SHUFFLED:  # the other keys have been applied to these rows already
        kept = ("chat", "max_question_length", "on_bad_row", "max_train_pairs", "max_test_pairs")
        data_keys = {key: value for key, value in data_keys.items() if key in kept}
        data_keys["dataset_name"] = str(folder / "shuffled-data")
    keys = recipe | data_keys | get_loss_flags(run.loss, args.label_smoothing)
    keys.pop("model_revision", None)  # of the recipe's own model
    keys |= {
        "model_name_or_path": args.model_name_or_path,
        "output_dir": str(folder / run.name),
        "beta": run.beta,
        "seed": run.seed,
        "eval_strategy": "no",
        "save_strategy": "steps",
        "save_steps": min(0.999999, 1 / args.checkpoints),  # a share of all steps; 1 would mean every step
        "save_total_limit": args.checkpoints + 1,
        "disable_tqdm": True,
        "push_to_hub": False,
    }
    if run.learning_rate:
        keys["learning_rate"] = run.learning_rate
    path = folder / f"{run.name}.yaml"
    write_atomic(path, yaml.safe_dump(keys))
    return path


class FrontierMeasure:
    """Measures policies: KL from the reference, and reward of sampled answers to the same held-out prompts."""

    def __init__(
        self, args: FrontierArguments, data: DataArguments, recipe: dict, functions: list, ref: PreTrainedModel
    ):
        self.args = args
        self.functions = functions
        self.ref = ref
        self.max_length = recipe["max_length"]
        self.row_length = resolve_row_length(self.max_length, None) if recipe.get("shared_prefix", True) else None
        self.tokenizer = load_tokenizer(args.model_name_or_path)
        check_model(args.model_name_or_path, None, self.tokenizer, self.max_length)
        self.training_pairs = load_split(data, self.tokenizer, self.max_length, "train").summary["sha256"]
        held_out = load_split(data, self.tokenizer, self.max_length, "test").texts
        self.texts, self.prompts = prepare_prompts(
            held_out, self.tokenizer, self.max_length, args.num_prompts, args.sample_seed
        )

    def get_fingerprint(self) -> dict[str, str]:
        """What may change behind the names in a recipe: weights, pairs, prompts and rewards."""
        chosen = get_readable_columns(self.texts, self.tokenizer)["chosen"]
        ids = self.tokenizer(chosen, add_special_tokens=False, verbose=False).input_ids
        parts = {
            "reference's weights": hash_module(self.ref),
            "dtype or device": (get_compute_dtype(self.ref), self.ref.device.type),
            "set of training pairs": self.training_pairs,
            "set of prompts": self.prompts,
            "reward": score_answers(self.functions, self.texts, chosen, ids).sum(0).tolist(),
        }
        return {name: Hasher.hash(value) for name, value in parts.items()}

    def measure_policy(self, name: str) -> dict[str, Any]:
        """KL from the reference (nats per answer) and reward of a checkpoint, each with its standard error."""
        policy = load_model(name, dtype=get_compute_dtype(self.ref), device=self.ref.device)
        ids, rewards = self._sample(policy, 1)
        logps = [
            token_logps(model, self.prompts, ids, self.args.batch_size, "KL", self.row_length)
            for model in (policy, self.ref)
        ]
        kl = kl_metrics(*logps)
        del policy
        gc.collect()
        return {
            "kl": kl["kl_per_sequence"],
            "kl_se": kl["kl_per_sequence_se"],
            "reward": float(rewards.mean()),
            "reward_se": standard_error(rewards[:, 0]),
        }

    def measure_reference(self, samples: int) -> dict[str, Any]:
        """The reference's own point (`sft`), and best of N for N up to `samples` (`best_of_n`)."""
        _, rewards = self._sample(self.ref, samples)
        best = best_of_n(rewards)
        return {"sft": {"kl": 0.0, "reward": best[0]["reward"], "reward_se": best[0]["reward_se"]}, "best_of_n": best}

    def _sample(self, model: PreTrainedModel, samples: int) -> tuple[list[list[int]], np.ndarray]:
        """Token ids of sampled answers, and their rewards, (prompts, samples)."""
        settings = {"batch_size": self.args.batch_size, "seed": self.args.sample_seed}
        prompts = self.prompts * samples
        answers = sample_cached(model, self.tokenizer, prompts, self.max_length // 2, "answers", **settings)
        texts = concatenate_datasets([self.texts] * samples)
        rewards = score_answers(self.functions, texts, answers.decode(texts, self.tokenizer), answers.ids).sum(0)
        return answers.ids, rewards.reshape(samples, -1).T


def best_of_n(rewards: np.ndarray) -> list[dict[str, Any]]:
    """Best of N = 1, 2, 4 … reference samples, from the rewards of all samples (prompts, samples).

    The mean of the best of N is taken over every subset of the n samples (an unbiased estimate; WebGPT, arXiv
    2112.09332, appendix I). The KL in nats is log N − (N − 1)/N, an upper bound of the true one (arXiv 2401.01879).
    """
    count = rewards.shape[1]
    ordered = np.sort(rewards, axis=1)
    points = []
    for power in range(count.bit_length()):
        n = 2**power
        # The i-th lowest sample is the best of C(i, n - 1) of the C(count, n) subsets.
        best = ordered @ [math.comb(i, n - 1) / math.comb(count, n) for i in range(count)]
        kl = math.log(n) - (n - 1) / n
        points.append({"n": n, "kl": kl, "reward": float(best.mean()), "reward_se": standard_error(best)})
    return points


def measure_run(run: FrontierRun, folder: Path, measure: FrontierMeasure) -> list[dict[str, Any]]:
    """Measure every checkpoint of a trained run, write `points.json` into its folder, and delete the checkpoints."""
    checkpoints = {int(path.name.split("-")[1]): path for path in folder.glob("checkpoint-*")}
    if not checkpoints:
        raise UserError(f"{folder} has a finished run but no checkpoints to measure; delete it to train again")
    points = []
    for step, checkpoint in sorted(checkpoints.items()):
        point = {"curve": run.curve, "loss": run.loss, "beta": run.beta, "seed": run.seed, "step": step}
        if run.learning_rate:
            point["learning_rate"] = run.learning_rate
        points.append(point | measure.measure_policy(str(checkpoint)))
    write_json(folder / "points.json", {"points": points, "done": True})
    for checkpoint in checkpoints.values():
        shutil.rmtree(checkpoint)
    return points


def read_finished_runs(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """The points of the runs in `folder` that are measured, by the run's name."""
    return {path.parent.name: read_json(path, "points")["points"] for path in sorted(folder.glob("*/points.json"))}


def get_frontier_settings(
    args: FrontierArguments, reward: RewardArguments, data: DataArguments, recipe: dict[str, Any]
) -> dict[str, Any]:
    """All settings that a point depends on, except those of its run."""
    of_runs = ("output_dir", "losses", "betas", "learning_rates", "seeds", "best_of")
    settings = {name: value for name, value in asdict(args).items() if name not in of_runs}
    return settings | asdict(reward) | asdict(data) | {"recipe": recipe}


def get_run_key(point: dict[str, Any]) -> tuple[str, float, float, int]:
    """Curve, learning rate (0 for the recipe's), β and seed of a point's run."""
    return point["curve"], point.get("learning_rate") or 0.0, point["beta"], point["seed"]


def order_points(runs: dict[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """The points of all runs, curve by curve."""
    curves = [*CURVES.values(), SHUFFLED]
    points = [point for run in runs.values() for point in run]
    return sorted(points, key=lambda point: (curves.index(point["curve"]), *get_run_key(point)[1:], point["step"]))


def format_frontier(points: Sequence[dict[str, Any]], sft: dict[str, Any]) -> str:
    """A table of the reference and the last point of each run."""
    lines = [
        f"{'':<18}{'β':>6}{'steps':>7}{'KL, nats':>16}{'reward':>16}",
        f"{'SFT reference':<18}{'':>6}{'':>7}{0:>9.2f}{'':>7}{_format_estimate(sft, 'reward')}",
    ]
    last_points = {get_run_key(point): point for point in points}
    for point in last_points.values():
        rate = f"  learning rate {point['learning_rate']:g}" if "learning_rate" in point else ""
        lines.append(
            f"{point['curve']:<18}{point['beta']:>6g}{point['step']:>7}"
            f"{_format_estimate(point, 'kl')}{_format_estimate(point, 'reward')}{rate}"
        )
    return "\n".join(lines)


def _format_estimate(point: dict[str, Any], name: str) -> str:
    error = "" if point[f"{name}_se"] is None else f" ± {Z95 * point[f'{name}_se']:.2f}"
    return f"{point[name]:>9.2f}{error:<7}"
