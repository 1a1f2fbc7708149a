"""Points of the reward–KL frontier: what a checkpoint earns and how far it has gone, and best of N beside it."""

import gc
import math
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, concatenate_datasets
from datasets.fingerprint import Hasher
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl.trainer.utils import hash_module

from tinydpo.data.asked import get_readable_columns
from tinydpo.data.pairs import load_split
from tinydpo.engine.logps import token_logps
from tinydpo.errors import UserError
from tinydpo.evaluation.frontier import CURVES, SHUFFLED, FrontierArguments, FrontierRun
from tinydpo.evaluation.metrics import Z95, kl_metrics, standard_error
from tinydpo.evaluation.rewards import RewardArguments, RewardFunction, load_rewards, score_answers
from tinydpo.evaluation.sampling import sample_cached, prepare_prompts
from tinydpo.files import find_difference, read_json, write_json
from tinydpo.launching.arguments import DataArguments, resolve_row_length
from tinydpo.launching.machine import pick_device_and_dtype
from tinydpo.models.loading import load_model
from tinydpo.models.precision import get_compute_dtype
from tinydpo.models.pretrained import load_tokenizer


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
    return FrontierMeasure(ref, tokenizer, texts, prompts, functions, max_length // 2, rows, args.batch_size, args.sample_seed)


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


def measure_run(run: FrontierRun, folder: Path, train: Callable[[FrontierRun], None], measure: FrontierMeasure) -> list[dict[str, Any]]:
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
