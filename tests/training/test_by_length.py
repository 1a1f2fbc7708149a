"""`--train_sampling_strategy group_by_length`: batches of rows that cost alike, the same after an interruption."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from running import run

from tinydpo.training import train as runs

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def train(tiny_model: Path, task: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable:
    """Run a script by length into `tmp_path/run`, of 96 rows, and return its trainer."""
    trainers, train = [], runs.train
    monkeypatch.setattr(runs, "train", lambda trainer, *rest: trainers.append(trainer) or train(trainer, *rest))
    monkeypatch.setattr("tinydpo.training.curves.draw_curves", lambda *args: None)

    def main(script: str, *flags: str) -> Any:
        run(script, "--model_name_or_path", tiny_model, "--dataset_name", task / "data", "--output_dir",
            tmp_path / "run", "--disable_tqdm", "true", "--train_sampling_strategy", "group_by_length",
            *flags)  # fmt: skip
        return trainers[-1]

    return main


COSTS = {
    ("sft", "true"): lambda row: len(row["input_ids"]),
    ("sft", "false"): lambda row: len(row["input_ids"]),
    ("dpo", "true"): lambda row: sum(len(row[part]) for part in ("prompt_ids", "chosen_ids", "rejected_ids")),
    ("dpo", "false"): lambda row: len(row["prompt_ids"]) + max(len(row["chosen_ids"]), len(row["rejected_ids"])),
}


@pytest.mark.parametrize("columns", ["true", "false"])
@pytest.mark.parametrize(("script", "shared_prefix"), COSTS)
def test_batches_hold_pairs_of_like_cost(script: str, shared_prefix: str, columns: str, train: Callable):
    flags = ["--precompute_ref_log_probs", "true"] if script == "dpo" else []
    trainer = train(
        script, "--shared_prefix", shared_prefix, "--remove_unused_columns", columns, "--pairs_per_step", "8",
        "--max_steps", "2", "--eval_steps", "2", "--save_strategy", "no", *flags,
    )  # fmt: skip
    costs = np.array([COSTS[script, shared_prefix](row) for row in trainer.train_dataset])
    batches = list(trainer.get_train_dataloader().batch_sampler)
    assert sorted(np.concatenate(batches)) == list(range(len(costs))), "an epoch does not hold every row once"
    spread = np.mean([np.ptp(costs[batch]) for batch in batches])
    drawn = np.random.default_rng(0).permutation(len(costs)).reshape(-1, 8)
    at_random = np.mean([np.ptp(costs[batch]) for batch in drawn])
    assert spread < 0.7 * at_random, f"lengths in a batch spread over {spread:.1f} tokens, at random {at_random:.1f}"


@pytest.mark.parametrize("script", ["sft", "dpo"])
def test_an_interrupted_run_goes_on_with_the_same_batches(script: str, train: Callable, tmp_path: Path):
    flags = ["--max_steps", "12", "--eval_strategy", "no", "--learning_rate", "1e-3"]  # six steps an epoch
    train(script, *flags)
    folder = tmp_path / "run"
    whole = (folder / "model.safetensors").read_bytes()
    for name in ("model.safetensors", "train_results.json"):
        (folder / name).unlink()
    shutil.rmtree(folder / "checkpoint-12")  # as if it had been killed in its second epoch
    train(script, *flags)
    assert (folder / "model.safetensors").read_bytes() == whole, "it went on with other batches"
