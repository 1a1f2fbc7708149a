"""A command trains the SFT model that its recipe starts from, where it is missing."""

from pathlib import Path

import dpo
import pytest
import sft
import yaml
from running import SMALL
from stages import train_missing_model

from tinydpo.errors import UserError

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def recipes(task: Path, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """`recipes/mine` with an SFT of two steps, and the DPO that starts from it; runs/ is in the same folder."""
    flags = dict(zip((flag[2:] for flag in SMALL[::2]), map(yaml.safe_load, SMALL[1::2]), strict=True))
    common = flags | {"dataset_name": str(task / "data"), "max_steps": 2, "eval_strategy": "no"}
    folder = tmp_path / "recipes/mine"
    folder.mkdir(parents=True)
    (folder / "sft.yaml").write_text(yaml.safe_dump(common | {"model_name_or_path": str(tiny_model)}))
    (folder / "dpo.yaml").write_text(yaml.safe_dump(common | {"model_name_or_path": "runs/mine/sft"}))
    monkeypatch.chdir(tmp_path)
    return folder


def test_dpo_trains_its_missing_sft_once(recipes: Path, task: Path, tiny_model: Path, capsys: pytest.CaptureFixture):
    dpo.main(["--config", "recipes/mine/dpo.yaml", "--beta", "0.3"])
    line = f"runs/mine/sft is missing: first training {tiny_model} on {task / 'data'} with recipes/mine/sft.yaml"
    assert capsys.readouterr().out.count(line) == 1
    assert Path("runs/mine/sft/train_results.json").is_file() and Path("runs/mine/dpo/train_results.json").is_file()
    assert "beta: 0.3" in Path("runs/mine/dpo/run_config.yaml").read_text(), "DPO lost its own flags"
    assert not train_missing_model("runs/mine/sft", "recipes/mine/dpo.yaml"), "a finished SFT is trained again"


def test_other_data_on_the_command_line_are_not_mixed_with_the_recipes(recipes: Path):
    """Nobody with rows of their own wants an SFT of the recipe's data first, of hours and without a question."""
    with pytest.raises(
        UserError, match=r"--model_name_or_path.*make sft RECIPE=recipes/mine .*--dataset_name my.jsonl"
    ):
        dpo.main(["--config", "recipes/mine/dpo.yaml", "--dataset_name", "my.jsonl"])
    assert not Path("runs").exists()


def test_an_unfinished_sft_is_resumed_with_its_own_flags(recipes: Path, capsys: pytest.CaptureFixture):
    sft.main(["--config", "recipes/mine/sft.yaml", "--learning_rate", "1e-4"])
    results = Path("runs/mine/sft/train_results.json")
    results.unlink()
    assert train_missing_model("runs/mine/sft", "recipes/mine/dpo.yaml")
    assert results.is_file() and "Resuming from runs/mine/sft/checkpoint-2" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("files", "trained"),
    [([], True), (["run_config.yaml", "model.safetensors"], True), (["run_config.yaml", "train_results.json"], True),
     (["run_config.yaml", "train_results.json", "model.safetensors"], False), (["model.safetensors"], False)],
    ids=["nothing", "an unfinished run", "a finished run without its weights", "a finished run", "a plain model"],
)  # fmt: skip
def test_only_a_missing_or_unfinished_model_is_trained(
    files: list[str], trained: bool, recipes: Path, monkeypatch: pytest.MonkeyPatch
):
    calls: list[list[str]] = []
    monkeypatch.setattr(sft, "main", calls.append)
    model = Path("runs/mine/sft")
    model.mkdir(parents=True)
    for name in files:
        (model / name).touch()
    assert train_missing_model(str(model), "recipes/mine/dpo.yaml", "cpu.yaml") is trained
    own = ["--config", "runs/mine/sft/run_config.yaml", "--output_dir", "runs/mine/sft"]  # with what its flags were
    expected = own if "run_config.yaml" in files else ["--config", "recipes/mine/sft.yaml"]
    assert calls == ([[*expected, "--accelerate_config", "cpu.yaml"]] if trained else [])


@pytest.mark.parametrize("model", ["runs/other/sft", "mine/sft", "runs/mine/dpo", "runs/mine/sft-512", None])
def test_other_models_are_left_alone(model: str | None, recipes: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sft, "main", lambda argv: pytest.fail(f"trained {argv}"))
    assert not train_missing_model(model, "recipes/mine/dpo.yaml")


def test_the_toy_task_is_made_by_its_own_command(recipes: Path):
    recipes.rename("recipes/quickstart")
    with pytest.raises(UserError, match=r"runs/quickstart/sft does not exist .*`make quickstart`"):
        train_missing_model("runs/quickstart/sft", "recipes/quickstart/dpo.yaml")
