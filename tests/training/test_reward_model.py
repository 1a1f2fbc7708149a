"""A reward model through its script: it learns, is resumed, loads as what it is, and evaluation takes it at once."""

import shutil
from pathlib import Path

import pytest
from running import log, run

pytestmark = pytest.mark.usefixtures("one_thread")


def train(tiny_model: Path, task: Path, folder: Path, *flags: str) -> Path:
    run("reward", "--model_name_or_path", tiny_model, "--dataset_name", task / "data", "--output_dir", folder,
        "--learning_rate", "3e-3", "--max_steps", "12", *flags)  # fmt: skip
    return folder


@pytest.fixture(scope="module")
def reward(task: Path, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(tiny_model, task, tmp_path_factory.mktemp("runs") / "reward")


def test_it_learns_and_its_folder_is_a_runs(reward: Path, capsys: pytest.CaptureFixture):
    losses = log(reward, "loss")
    assert sum(losses[-3:]) < sum(losses[:3]), f"it does not learn: {losses}"
    for name in ("run_config.yaml", "data_summary.json", "train_results.json", "environment.json", "curves.png"):
        assert (reward / name).is_file(), f"its folder lacks {name}"
    card = (reward / "README.md").read_text()
    assert "reward model" in card and "supervised" not in card and "DPO (" not in card, card


def test_it_loads_as_a_model_of_one_output(reward: Path):
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    model, told = AutoModelForSequenceClassification.from_pretrained(reward, output_loading_info=True)
    assert model.config.num_labels == 1 and not told["missing_keys"], f"it is no trained reward model: {told}"
    assert AutoTokenizer.from_pretrained(reward).pad_token_id == model.config.pad_token_id


def test_it_goes_on_to_the_same_weights_and_ends_once(
    reward: Path, task: Path, tiny_model: Path, capsys: pytest.CaptureFixture
):
    train(tiny_model, task, reward)
    assert "finished" in capsys.readouterr().out, "a finished run trains again"
    again = reward.parent / "again"
    shutil.copytree(reward, again)
    whole = (again / "model.safetensors").read_bytes()
    for name in ("model.safetensors", "train_results.json"):
        (again / name).unlink()
    shutil.rmtree(again / "checkpoint-12")
    train(tiny_model, task, again)
    assert "checkpoint-8" in capsys.readouterr().out, "the run started again instead of going on"
    assert (again / "model.safetensors").read_bytes() == whole, "a resumed run ends with other weights"


def test_both_engines_train_alike(reward: Path, task: Path, tiny_model: Path):
    padded = train(tiny_model, task, reward.parent / "padded", "--shared_prefix", "false")
    assert log(padded, "loss") == pytest.approx(log(reward, "loss"), rel=1e-3), "packed rows train something else"
