"""The frontier: losses as their papers have them, best of N by its definition, runs that are never made twice."""

import itertools
import json
import math
import shutil
from pathlib import Path
from runpy import run_path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st
from running import ROOT
from safetensors.torch import load_file, save_file
from torch.nn.functional import logsigmoid

from tinydpo.config.arguments import DataArguments
from tinydpo.errors import UserError
from tinydpo.evaluation.frontier import (
    FrontierArguments,
    best_of_n,
    format_frontier,
    get_dpo_flags,
    get_loss_flags,
    plan_runs,
    write_frontier_data,
)
from tinydpo.report.figures import draw_frontier
from tinydpo.training.trainers import FittedDPOTrainer

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.4])
def test_conservative_dpo_is_its_formula(smoothing: float, task: Path, tiny_tokenizer: Any, tmp_path: Path):
    from trl import DPOConfig

    pairs = Dataset.from_dict(
        {
            "prompt_ids": [[5, 6, 7]] * 4,
            "chosen_ids": [[8, 9], [3], [4, 4, 4], [9]],
            "rejected_ids": [[2], [7, 8], [6], [1, 1]],
        }
    )
    beta = 0.7
    config = DPOConfig(
        output_dir=str(tmp_path), max_steps=1, per_device_train_batch_size=4, learning_rate=1e-2, beta=beta,
        use_cpu=True, bf16=False, report_to="none", save_strategy="no", logging_steps=1, disable_tqdm=True,
        activation_checkpointing=False, gradient_checkpointing=False, **get_loss_flags("conservative", smoothing),
    )  # fmt: skip
    trainer = FittedDPOTrainer(
        model=str(task / "base"), args=config, train_dataset=pairs, processing_class=tiny_tokenizer
    )
    with torch.no_grad():
        for parameter in trainer.model.parameters():  # away from the reference: there all margins are 0
            parameter.add_(0.1 * torch.randn_like(parameter))
    batch = next(iter(trainer.get_train_dataloader()))
    policy, ref = (trainer.compute_ref_log_probs(model, batch) for model in (trainer.model, trainer.ref_model))
    margin = beta * ((policy[0] - ref[0]) - (policy[1] - ref[1]))
    assert margin.abs().min() > 1e-3, "nothing to tell the terms apart by"
    expected = (-(1 - smoothing) * logsigmoid(margin) - smoothing * logsigmoid(-margin)).mean()
    trainer.train()
    loss = trainer.state.log_history[0]["loss"]
    assert loss == pytest.approx(expected.item(), rel=1e-4), "the curve named conservative DPO is of another loss"


@given(st.lists(st.lists(st.integers(-5, 5), min_size=4, max_size=4), min_size=1, max_size=3))
def test_best_of_n_is_the_mean_over_all_subsets(rewards: list[list[int]]):
    points = best_of_n(np.array(rewards, dtype=float))
    assert [point["n"] for point in points] == [1, 2, 4]
    for point in points:
        n = point["n"]
        direct = np.mean([np.mean([max(s) for s in itertools.combinations(row, n)]) for row in rewards])
        assert point["reward"] == pytest.approx(direct), f"best of {n} is not the mean of the best of {n} samples"
        assert point["kl"] == pytest.approx(math.log(n) - 1 + 1 / n)


def test_shuffled_labels_exchange_half_of_the_training_pairs_and_no_others(task: Path, tmp_path: Path):
    write_frontier_data(DataArguments(dataset_name=str(task / "data")), {}, tmp_path)
    for split in ("train", "test"):
        before, after = (
            [json.loads(line) for line in (folder / f"{split}.jsonl").read_text().splitlines()]
            for folder in (task / "data", tmp_path / "shuffled-data")
        )
        pairs = [
            (old, {side: new["prompt"] + new[side] for side in old}) for old, new in zip(before, after, strict=True)
        ]
        exchanged = sum(old["chosen"] == new["rejected"] != new["chosen"] for old, new in pairs)
        same = sum(old == new for old, new in pairs)
        assert exchanged + same == len(before), "the control has other texts than the data"
        assert exchanged == 0 if split == "test" else 0.3 < exchanged / len(before) < 0.7


def test_every_loss_beta_and_seed_is_one_run_beside_the_control():
    args = FrontierArguments("dpo.yaml", "sft", "out", losses=["sigmoid", "ipo"], betas=[0.1, 1.0], seeds=[0, 1])
    runs = list(plan_runs(args))
    assert len({run.name for run in runs}) == len(runs) == 2 * (2 * 2 + 1), "runs share a folder, or one is missing"


def test_learning_rates_are_an_axis_like_the_others(tmp_path: Path):
    args = FrontierArguments("dpo.yaml", "sft", "out", losses=["sigmoid"], betas=[0.1], learning_rates=[1e-5, 2e-5])
    runs = list(plan_runs(args))
    assert len({run.name for run in runs}) == 4, f"two rates and the control beside each are not four runs: {runs}"
    for run in runs:
        flags = get_dpo_flags(run, args, DataArguments(dataset_name="rows"), tmp_path)
        assert flags[flags.index("--learning_rate") + 1] == str(run.learning_rate), "a run trains at another rate"
    points = [
        {"curve": run.curve, "loss": run.loss, "beta": 0.1, "seed": 0, "step": 1, "kl": 1.0, "kl_se": 0.1,
         "reward": 2.0, "reward_se": 0.1, "learning_rate": run.learning_rate} for run in runs
    ]  # fmt: skip
    sft = {"reward": 1.0, "reward_se": 0.1}
    told = format_frontier(points, sft)
    assert told.count("learning rate 1e-05") == told.count("learning rate 2e-05") == 2, f"rates are mixed up:\n{told}"
    drawn = draw_frontier({"points": points, "sft": sft, "reward": "gold"})
    assert "DPO, 1e-05" in {text.get_text() for text in drawn.axes[0].texts}, "curves of two rates look alike"


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"losses": ["kto"]}, "kto"), ({"betas": [0.0]}, "beta"), ({"label_smoothing": 0.5}, "label_smoothing"),
        ({"checkpoints": 0}, "checkpoints"), ({"dpo_config": None}, "--dpo_config"),
    ],
)  # fmt: skip
def test_what_cannot_be_meant_is_refused(wrong: dict, told: str):
    with pytest.raises(ValueError, match=told):
        FrontierArguments(**{"dpo_config": "a", "model_name_or_path": "b", "output_dir": "c", **wrong})


@pytest.fixture(scope="module")
def main() -> Any:
    return run_path(str(ROOT / "scripts/frontier.py"))["main"]


@pytest.fixture(scope="module")
def argv(task: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A frontier of seconds: five steps of eight pairs a run."""
    folder = tmp_path_factory.mktemp("frontier")
    shutil.copytree(task / "base", folder / "sft")
    recipe = (ROOT / "recipes/quickstart/dpo.yaml").read_text().replace("num_train_epochs: 1", "max_steps: 4")
    (folder / "dpo.yaml").write_text(recipe)
    return [
        "--dpo_config", str(folder / "dpo.yaml"), "--model_name_or_path", str(folder / "sft"), "--dataset_name",
        str(task / "data"), "--output_dir", str(folder / "frontier"), "--reward_funcs",
        "tinydpo.toy_task.gold_reward", "--losses", "sigmoid", "conservative", "--betas", "0.1", "--best_of",
        "2", "--checkpoints", "2", "--num_prompts", "8",
    ]  # fmt: skip


def test_a_frontier_of_runs_that_are_never_made_twice(main: Any, argv: list[str], capsys: pytest.CaptureFixture):
    folder = Path(argv[argv.index("--output_dir") + 1])
    main(argv)
    first = json.loads((folder / "frontier.json").read_text())
    told = capsys.readouterr().out
    assert [(p["curve"], p["step"]) for p in first["points"]] == [
        (curve, step) for curve in ("DPO", "conservative DPO", "shuffled labels") for step in (2, 4)
    ]
    assert all(math.isfinite(p["reward"]) and p["kl_se"] >= 0 for p in first["points"])
    assert first["sft"]["kl"] == 0 and [p["n"] for p in first["best_of_n"]] == [1, 2] and not first["failed"]
    assert (folder / "frontier.png").stat().st_size > 5_000 and (folder.parent / "report.html").is_file()
    assert "[3/3]" in told and "about 0 min left" in told, "nobody can see how far it is"
    assert not list(folder.glob("*/checkpoint-*")), "measured checkpoints are left on the disk"

    for run in folder.glob("*seed0"):  # were a run made again, it would begin here, and find nothing
        for path in run.iterdir():
            path.unlink() if path.name != "points.json" else None
    main([*argv, "--losses", "sigmoid"])
    assert "0 runs to make and 3 made before" in capsys.readouterr().out, "a finished run is made again"
    assert json.loads((folder / "frontier.json").read_text())["points"] == first["points"], "other runs are lost"

    weights = Path(argv[argv.index("--model_name_or_path") + 1]) / "model.safetensors"
    trained = load_file(weights)
    save_file({name: 1.01 * tensor for name, tensor in trained.items()}, weights, metadata={"format": "pt"})
    with pytest.raises(UserError, match="another reference's weights"):  # a reference trained again, in the same place
        main(argv)
    save_file(trained, weights, metadata={"format": "pt"})
    with pytest.raises(UserError, match="num_prompts"):
        main([*argv, "--num_prompts", "4"])
    assert json.loads((folder / "frontier.json").read_text())["points"] == first["points"], "a refusal loses points"


def test_a_failed_run_is_told_and_the_rest_go_on(main: Any, argv: list[str], tmp_path: Path, capsys: Any):
    argv = [str(tmp_path / "frontier") if part.endswith("/frontier") else part for part in argv]
    broken = tmp_path / "frontier/sigmoid-beta0.1-seed0"
    broken.mkdir(parents=True)
    (broken / "run_config.yaml").write_text("beta: 7\n")  # another recipe's run stands in the first one's place
    with pytest.raises(UserError, match=r"1 of 3 runs failed, sigmoid-beta0\.1-seed0"):
        main(argv)
    result = json.loads((tmp_path / "frontier/frontier.json").read_text())
    assert {p["curve"] for p in result["points"]} == {"conservative DPO", "shuffled labels"}, "one failure ended all"
    assert "beta" in result["failed"][0]["error"], "nobody is told why it failed"
    shutil.rmtree(broken)
    main(argv)
    assert not json.loads((tmp_path / "frontier/frontier.json").read_text())["failed"]


def test_without_a_reward_there_is_one_sentence(main: Any, argv: list[str]):
    cut = argv.index("--reward_funcs")
    with pytest.raises(UserError, match="--reward_funcs or --reward_model_name_or_path"):
        main(argv[:cut] + argv[cut + 2 :])


def test_a_reward_model_not_trained_yet_is_one_sentence_and_leaves_nothing(main: Any, argv: list[str], tmp_path: Path):
    argv = [str(tmp_path / "frontier") if part.endswith("/frontier") else part for part in argv]
    with pytest.raises(UserError, match=r"no model 'runs/recipe/reward'.*train it first: .*`make reward`") as error:
        main([*argv, "--reward_model_name_or_path", "runs/recipe/reward"])
    assert "\n" not in str(error.value), "more than one sentence"
    assert not (tmp_path / "frontier").exists(), "a folder is left of a frontier that never began"
