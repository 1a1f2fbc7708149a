"""The frontier: losses as their papers have them, best of N by its definition, runs that are never trained twice."""

import itertools
import json
import math
import shutil
from pathlib import Path
from typing import Any

import dpo
import frontier
import numpy as np
import pytest
import torch
import yaml
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.text import Text
from running import ROOT
from safetensors.torch import load_file, save_file
from torch.nn.functional import logsigmoid
from trl import DPOConfig, ModelConfig

from tinydpo.config.arguments import DataArguments, ReferenceArguments, RunArguments
from tinydpo.config.flags import check_flags
from tinydpo.config.recipe import parse_training_args
from tinydpo.errors import UserError
from tinydpo.evaluation.frontier import (
    CURVES,
    FrontierArguments,
    best_of_n,
    format_frontier,
    get_loss_flags,
    plan_runs,
    write_run_recipe,
    write_shuffled_data,
)
from tinydpo.files import read_jsonl
from tinydpo.report.figures import draw_frontier
from tinydpo.training.trainers import FittedDPOTrainer

TOKEN = "hf_secret"
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("loss", CURVES)
def test_a_recipes_own_weights_do_not_reach_other_losses(loss: str, tmp_path: Path):
    recipe = {"loss_type": ["apo_zero", "sft"], "loss_weights": [1.0, 0.2], "label_smoothing": 0.1}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(recipe | get_loss_flags(loss, 0.2)))
    types = (DataArguments, RunArguments, DPOConfig, ModelConfig, ReferenceArguments)
    argv = ["--config", str(tmp_path / "run.yaml"), "--dataset_name", "d", "--model_name_or_path", "m"]
    (_, _, training, model, _), settings = parse_training_args(*types, argv=argv)
    check_flags("dpo", settings, training, model)
    assert training.label_smoothing == (0.2 if loss == "conservative" else 0)
    assert len(training.loss_weights or [1.0]) == len(training.loss_type)


def test_conservative_dpo_is_its_formula(task: Path, tiny_tokenizer: Any, tmp_path: Path):
    columns = {"prompt_ids": [[5, 6, 7]] * 2, "chosen_ids": [[8, 9], [3]], "rejected_ids": [[2], [7, 8]]}
    pairs = Dataset.from_dict(columns)
    beta = 0.7
    smoothing = 0.4
    config = DPOConfig(
        output_dir=str(tmp_path), max_steps=1, per_device_train_batch_size=2, learning_rate=1e-2, beta=beta,
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
    policy = trainer.compute_ref_log_probs(trainer.model, batch)
    ref = trainer.compute_ref_log_probs(trainer.ref_model, batch)
    margin = beta * ((policy[0] - ref[0]) - (policy[1] - ref[1]))
    assert margin.abs().min() > 1e-3, "the terms cannot be distinguished"
    expected = (-(1 - smoothing) * logsigmoid(margin) - smoothing * logsigmoid(-margin)).mean()
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(expected.item(), rel=1e-4)


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
    write_shuffled_data(DataArguments(dataset_name=str(task / "data")), tmp_path)
    for split in ("train", "test"):
        before = read_jsonl(task / f"data/{split}.jsonl")
        after = read_jsonl(tmp_path / f"{split}.jsonl")
        exchanged = 0
        for old, new in zip(before, after, strict=True):
            new = {side: new["prompt"] + new[side] for side in old}
            swapped = {**old, "chosen": old["rejected"], "rejected": old["chosen"]}
            assert new in (old, swapped), "the control has other texts than the data"
            exchanged += new == swapped
        assert exchanged == 0 if split == "test" else 0.3 < exchanged / len(before) < 0.7


def test_every_loss_beta_rate_and_seed_is_one_run_beside_the_control(tmp_path: Path):
    args = FrontierArguments(
        "dpo.yaml", "sft", "out", losses=["sigmoid", "ipo"], betas=[0.1, 1.0, 0.1], learning_rates=[1e-5, 2e-5],
        seeds=[0, 1],
    )  # fmt: skip
    runs = plan_runs(args)
    assert len({run.name for run in runs}) == len(runs) == 2 * 2 * (2 * 2 + 1), (
        "runs share a folder, or one is missing"
    )
    data = DataArguments(dataset_name="rows", dataset_data_dir="part", column=["good=chosen"], max_train_pairs=9)
    recipe = {"max_length": 64, "model_name_or_path": "recipe's", "model_revision": "recipe's", "learning_rate": 1.0}
    for run in runs:
        keys = yaml.safe_load(write_run_recipe(run, args, data, recipe, tmp_path).read_text())
        assert (keys["learning_rate"], keys["beta"], keys["seed"]) == (run.learning_rate, run.beta, run.seed)
        assert keys["model_name_or_path"] == "sft" and "model_revision" not in keys and keys["max_length"] == 64
        own = (keys["dataset_name"], keys.get("dataset_data_dir"), keys.get("column"), keys["max_train_pairs"])
        shuffled = (str(tmp_path / "shuffled-data"), None, None, 9)
        assert own == (shuffled if run.curve == "shuffled labels" else ("rows", "part", ["good=chosen"], 9))


def test_curves_of_two_rates_have_two_labels():
    points = [
        {"curve": curve, "loss": "sigmoid", "beta": 0.1, "seed": 0, "step": 1, "kl": 1.0, "kl_se": 0.1,
         "reward": 2.0, "reward_se": 0.1, "learning_rate": rate}
        for curve in ("DPO", "shuffled labels") for rate in (1e-5, 2e-5)
    ]  # fmt: skip
    sft = {"reward": 1.0, "reward_se": 0.1}
    table = format_frontier(points, sft)
    assert table.count("learning rate 1e-05") == table.count("learning rate 2e-05") == 2, table
    drawn = draw_frontier({"points": points, "sft": sft, "reward": "gold"})
    labels = [text.get_text() for text in drawn.findobj(Text)]
    single = [point | {"kl_se": None, "reward_se": None} for point in points]  # of one prompt
    assert "±" not in format_frontier(single, sft | {"reward_se": None})
    draw_frontier({"points": single, "sft": sft, "reward": "gold"})
    assert [label for label in labels if label.startswith("DPO") and "1e-05" in label], labels


@pytest.mark.parametrize("wrong", [{"losses": ["kto"]}, {"dpo_config": None}], ids=str)
def test_wrong_arguments_are_named(wrong: dict):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        FrontierArguments(**{"dpo_config": "a", "model_name_or_path": "b", "output_dir": "c", **wrong})


@pytest.fixture
def argv(task: Path, tiny_model: Path, tmp_path: Path) -> list[str]:
    """A frontier of seconds: two steps of sixteen pairs a run."""
    shutil.copytree(tiny_model, tmp_path / "sft")
    shutil.copytree(task / "data", tmp_path / "data")
    (tmp_path / "sft/run_config.yaml").write_text(yaml.safe_dump({"dataset_name": str(tmp_path / "data")}))
    (tmp_path / "sft/train_results.json").write_text("{}")
    recipe = (ROOT / "recipes/quickstart/dpo.yaml").read_text().replace("num_train_epochs: 1", "max_steps: 2")
    (tmp_path / "dpo.yaml").write_text(f"{recipe}\nhub_token: {TOKEN}\n")
    return [
        "--dpo_config", str(tmp_path / "dpo.yaml"), "--model_name_or_path", str(tmp_path / "sft"),
        "--output_dir", str(tmp_path / "frontier"), "--reward_funcs", "tinydpo.toy_task.gold_reward",
        "--losses", "sigmoid", "--betas", "0.1", "--best_of", "2", "--checkpoints", "2", "--num_prompts", "4",
    ]  # fmt: skip


def test_a_frontier_from_end_to_end(
    argv: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    folder = tmp_path / "frontier"
    broken = folder / "sigmoid-beta0.1-seed0"
    broken.mkdir(parents=True)
    (broken / "run_config.yaml").write_text("beta: 7\n")  # another recipe's run has taken the first one's folder
    with pytest.raises(UserError, match=r"1 of 2 runs failed, sigmoid-beta0\.1-seed0"):
        frontier.main(argv)
    result = json.loads((folder / "frontier.json").read_text())
    assert {point["curve"] for point in result["points"]} == {"shuffled labels"}
    assert "beta" in result["failed"][0]["error"], "it does not say why it failed"
    capsys.readouterr()

    shutil.rmtree(broken)
    frontier.main(argv)
    out = capsys.readouterr().out
    assert (
        "1 runs to train (sigmoid-beta0.1-seed0), 1 already done" in out
        and "[1/1]" in out
        and "about 0 min left" in out
    )
    result = json.loads((folder / "frontier.json").read_text())
    assert [(point["curve"], point["step"]) for point in result["points"]] == [
        (curve, step) for curve in ("DPO", "shuffled labels") for step in (1, 2)
    ]
    assert all(math.isfinite(point["reward"]) and point["kl_se"] >= 0 for point in result["points"])
    assert result["settings"]["dataset_name"] == str(tmp_path / "data"), "not the data of the reference's run"
    assert result["sft"]["kl"] == 0 and [point["n"] for point in result["best_of_n"]] == [1, 2]
    assert not result["failed"]
    assert (folder / "frontier.png").stat().st_size > 5_000 and (tmp_path / "report.html").is_file()
    assert not list(folder.glob("*/checkpoint-*")), "measured checkpoints are left on the disk"
    for path in folder.rglob("*"):
        assert path.is_dir() or TOKEN.encode() not in path.read_bytes(), f"{path.name} gives the Hub token away"

    monkeypatch.setattr(dpo, "main", lambda argv: pytest.fail("a finished run is trained again"))
    frontier.main(argv)
    assert "0 runs to train, 2 already done" in capsys.readouterr().out
    assert json.loads((folder / "frontier.json").read_text())["points"] == result["points"], "other runs are lost"

    train = tmp_path / "data/train.jsonl"
    rows = train.read_text()
    train.write_text(rows.partition("\n")[2])
    with pytest.raises(UserError, match="different set of training pairs"):
        frontier.main([*argv, "--betas", "1"])
    train.write_text(rows)

    weights = tmp_path / "sft/model.safetensors"  # the reference, trained again in the same place
    save_file({name: 1.01 * tensor for name, tensor in load_file(weights).items()}, weights, {"format": "pt"})
    with pytest.raises(UserError, match="different reference's weights"):
        frontier.main(argv)
    with pytest.raises(UserError, match="different num_prompts"):
        frontier.main([*argv, "--num_prompts", "3"])
    assert json.loads((folder / "frontier.json").read_text())["points"] == result["points"], "a refusal loses points"


def test_without_a_usable_reward_there_is_one_sentence_and_no_folder(argv: list[str], tmp_path: Path):
    cut = argv.index("--reward_funcs")
    with pytest.raises(UserError, match="--reward_funcs or --reward_model_name_or_path"):
        frontier.main(argv[:cut] + argv[cut + 2 :])
    with pytest.raises(UserError, match=r"no model 'runs/recipe/reward'") as error:
        frontier.main([*argv, "--reward_model_name_or_path", "runs/recipe/reward"])
    assert "\n" not in str(error.value) and not (tmp_path / "frontier").exists()
