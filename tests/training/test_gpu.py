"""On a GPU: packed rows equal TRL's, and precision, compiling, memory, waiting and resuming are as the docs say.

TINYDPO_TEST_DEVICE=cpu runs what a CPU can run of this file, to try the tests themselves.
"""

import gc
import json
import os
import shutil
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import evaluate
import merge
import pytest
import torch
import transformers
import yaml
from datasets import Dataset
from engines import (
    ENGINES,
    Gradients,
    StockDPOTrainer,
    assert_same_step,
    build,
    first_batch,
    join_prompts,
    nudge,
    uneven_pairs,
)
from running import FLOAT32, ROOT, log, run
from safetensors.torch import load_file
from test_compiled import assert_same_losses, train_plain_and_compiled
from test_nothing_lost import cut
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, GPT2Config
from trl import RewardTrainer

from tinydpo.training.trainers import SharedPrefixDPOTrainer, build_sft_rows

DEVICE = os.environ.get("TINYDPO_TEST_DEVICE", "cuda")
ON_GPU = DEVICE == "cuda"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(ON_GPU and not torch.cuda.is_available(), reason="needs a GPU that PyTorch can use"),
]
needs_gpu = pytest.mark.skipif(not ON_GPU, reason="asks CUDA itself, whatever TINYDPO_TEST_DEVICE says")
ACCELERATE = ROOT / f"accelerate_configs/{'single_gpu' if ON_GPU else 'cpu'}.yaml"
SHAPES = {  # heads as wide as in the real models
    "GPT2": {"n_embd": 128, "n_layer": 2, "n_head": 2, "n_positions": 256,
             "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
    "Llama": {"hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 2,
              "num_key_value_heads": 1, "head_dim": 64, "max_position_embeddings": 256},
}  # fmt: skip


@pytest.fixture(autouse=True)
def hardware(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Float32 is float32, not TF32, unless a run sets it; a CPU that stands in for a GPU has bf16 too."""
    if not ON_GPU:
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision("highest")
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def make(tiny_tokenizer: Any, tmp_path: Path) -> Callable:
    """A trainer for `uneven_pairs`, its policy moved away from the reference."""
    tiny_tokenizer.pad_token = tiny_tokenizer.eos_token

    def make(stage: str, engine: type, shape: str, pairs: Dataset, **settings: Any) -> Any:
        torch.manual_seed(0)
        config = getattr(transformers, f"{shape}Config")(
            vocab_size=len(tiny_tokenizer), initializer_range=0.15, num_labels=1, **SHAPES[shape]
        )
        architecture = AutoModelForSequenceClassification if stage == "reward" else AutoModelForCausalLM
        rows = pairs
        if stage == "sft":
            rows = build_sft_rows(pairs)
        elif stage == "dpo":
            settings["precompute_ref_log_probs"] = True
        elif engine is RewardTrainer:  # whose answers hold their prompt
            rows = join_prompts(pairs)
        model = architecture.from_config(config)
        made = build(engine, model, tiny_tokenizer, rows, tmp_path, use_cpu=not ON_GPU, **settings)
        assert made.model.device.type == DEVICE
        nudge(made.model)
        return made

    return make


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("stage", ENGINES)
def test_a_step_in_float32_matches_trl(stage: str, shape: str, make: Callable, tiny_tokenizer: Any):
    stock, _, packed = ENGINES[stage]
    pairs = uneven_pairs(8, len(tiny_tokenizer))
    assert_same_step(make(stage, packed, shape, pairs), make(stage, stock, shape, pairs))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("stage", ENGINES)
def test_packed_rows_in_bf16_round_no_more_than_padded_ones(
    stage: str, shape: str, make: Callable, tiny_tokenizer: Any
):
    _, padded, packed = ENGINES[stage]
    pairs = uneven_pairs(64, len(tiny_tokenizer))
    scores = []
    for engine, bf16 in ((packed, True), (padded, True), (padded, False)):
        made = make(stage, engine, shape, pairs, bf16=bf16, train_sampling_strategy="sequential")
        with torch.no_grad(), made.accelerator.autocast():
            scores.append(made.score_rows(made.model.eval(), first_batch(made)).double())
    exact = scores.pop()
    ours, theirs = ((score - exact).square().mean().sqrt().item() for score in scores)
    assert theirs > 1e-4 * exact.std(), "nothing is computed in bf16"
    assert ours <= 1.5 * theirs, f"packed rows are off by {ours:.2g}, padded ones by {theirs:.2g}"


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_dpo_starts_at_log_2_and_measures_what_evaluate_measures(
    dtype: str, task: Path, tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    run("dpo", "--model_name_or_path", tiny_model, "--dataset_name", task / "data", "--output_dir", tmp_path / "dpo",
        "--accelerate_config", ACCELERATE, "--precompute_ref_log_probs", "true", "--dataloader_num_workers", "2",
        "--learning_rate", "3e-3", "--max_steps", "6", "--eval_pairs", "32",
        *(FLOAT32 if dtype == "float32" else []))  # fmt: skip
    assert f"1 process on {DEVICE}, {dtype}, " in capsys.readouterr().out
    losses = log(tmp_path / "dpo", "loss")
    assert losses[0] == pytest.approx(0.6931, abs=1e-3), "policy and reference differ before the first step"
    assert min(losses) < losses[0] - 0.05, f"it does not learn: {losses}"
    evaluate.main(["--model_name_or_path", str(tmp_path / "dpo"), "--output_dir", str(tmp_path / "evaluation"),
                   "--num_prompts", "8"])  # fmt: skip
    trained = json.loads((tmp_path / "dpo/train_results.json").read_text())
    measured = json.loads((tmp_path / "evaluation/eval_results.json").read_text())
    assert measured["settings"]["dtype"] == dtype and measured["pairs"] == 32
    bounds = {"rel": 1e-4, "abs": 1e-5} if dtype == "float32" else {"abs": 5e-3}
    assert trained["eval_loss"] == pytest.approx(measured["dpo_loss"], **bounds)
    assert trained["eval_rewards/margins"] == pytest.approx(measured["reward_margin"], **bounds)
    pairs_that_may_differ = 0 if dtype == "float32" else 1  # one whose margin is 0 but for rounding
    difference = abs(trained["eval_rewards/accuracies"] - measured["reward_accuracy"])
    assert difference <= pairs_that_may_differ / 32 + 1e-6


@pytest.mark.parametrize("stage", ["sft", "reward"])
def test_the_other_stages_run_in_bf16(stage: str, task: Path, tiny_model: Path, tmp_path: Path):
    run(stage, "--model_name_or_path", tiny_model, "--dataset_name", task / "data", "--output_dir", tmp_path,
        "--accelerate_config", ACCELERATE, "--learning_rate", "3e-3", "--max_steps", "12")  # fmt: skip
    assert yaml.safe_load((tmp_path / "run_config.yaml").read_text())["bf16"] is True
    losses = log(tmp_path, "loss")
    assert sum(losses[-3:]) < sum(losses[:3]), f"it does not learn: {losses}"


def test_qlora_trains_and_merges(task: Path, tiny_model: Path, tmp_path: Path):
    pytest.importorskip("bitsandbytes", reason="needs bitsandbytes")
    base = Path(shutil.copytree(tiny_model, tmp_path / "base"))
    run("dpo", "--config", "recipes/gpt2-medium-hh/dpo-qlora.yaml", "--model_name_or_path", base, "--dataset_name",
        task / "data", "--output_dir", tmp_path / "run", "--accelerate_config", ACCELERATE, "--learning_rate", "1e-2",
        "--warmup_steps", "0", "--max_steps", "3", "--eval_steps", "2")  # fmt: skip
    assert log(tmp_path / "run", "loss")[0] == pytest.approx(0.6931, abs=1e-3), "policy and reference differ at first"
    assert min(log(tmp_path / "run", "grad_norm")) > 1e-3, "no gradient reaches the adapter"
    merge.main(["--model_name_or_path", str(tmp_path / "run"), "--output_dir", str(tmp_path / "merged")])
    before, after = (load_file(folder / "model.safetensors") for folder in (base, tmp_path / "merged"))
    moved = max((after[name] - weight).abs().max().item() for name, weight in before.items())
    assert moved > 1e-3, "the merged policy is the base"


def test_a_compiled_run_is_the_same_run(tiny_tokenizer: Any, tmp_path: Path):
    """Within the rounding of other kernels, as `test_a_run_matches_trl` allows it."""
    plain, compiled = train_plain_and_compiled("inductor", tiny_tokenizer, tmp_path, use_cpu=not ON_GPU)
    assert_same_losses(compiled, plain, rel=1e-3)


@needs_gpu
def test_a_step_takes_the_memory_that_the_docs_count(
    tiny_tokenizer: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """GPT-2 Medium, 32 pairs at a time of two in a step: in the second, gradients are there beside the activations."""
    table = (ROOT / "docs/performance.md").read_text(encoding="utf-8")
    header, row = (
        next(line for line in table.splitlines() if line.startswith(start)).split("|")
        for start in ("| model | parameters |", "| gpt2-medium |")
    )
    counted = float(row[header.index(" 32 pairs ")])
    lengths = {"prompt_ids": 52, "chosen_ids": 39, "rejected_ids": 45}  # the mean pair of HH
    pairs = Dataset.from_dict({name: [[7] * length] * 128 for name, length in lengths.items()})
    gc.collect()
    before = torch.cuda.memory_allocated()  # what other tests have left
    model = AutoModelForCausalLM.from_config(GPT2Config(n_embd=1024, n_layer=24, n_head=16))
    trainer = build(
        SharedPrefixDPOTrainer, model, tiny_tokenizer, pairs, tmp_path, use_cpu=False, bf16=True, max_steps=2,
        per_device_train_batch_size=32, gradient_accumulation_steps=2, precompute_ref_log_probs=True,
        row_length=512,
    )  # fmt: skip
    trainer.remove_callback(Gradients)  # which keeps a copy of them
    torch.cuda.reset_peak_memory_stats()
    trainer.train()
    measured = (torch.cuda.max_memory_allocated() - before) / 1e9
    with capsys.disabled():
        print(f"\na step's memory: {measured:.2f} GB, docs/performance.md counts {counted:.2f}")
    assert measured == pytest.approx(counted, rel=0.15)


@needs_gpu
def test_attention_takes_a_kernel_that_makes_no_plan_for_each_shape():
    """cuDNN's, which PyTorch prefers on Hopper, takes up to a second for a batch of a new shape."""
    heads = torch.zeros(3, 2, 48, 64, dtype=torch.bfloat16, device=DEVICE)
    mask = torch.zeros(3, 1, 48, 48, dtype=torch.bfloat16, device=DEVICE)
    chosen = torch._fused_sdp_choice(heads, heads, heads, mask)
    assert chosen == torch.nn.attention.SDPBackend.EFFICIENT_ATTENTION.value


def count_waits(trainer: Any) -> int:
    """How often the second of two training steps waits for the GPU; the first one compiles kernels."""
    step = trainer.training_step
    waits = []

    def count_in_step(*args: Any, **kwargs: Any) -> torch.Tensor:
        torch.cuda.set_sync_debug_mode("warn")
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            loss = step(*args, **kwargs)
        torch.cuda.set_sync_debug_mode("default")
        waits.append(sum("synchronizing CUDA operation" in str(warning.message) for warning in caught))
        return loss

    trainer.training_step = count_in_step
    trainer.train()
    return waits[-1]


@needs_gpu
def test_a_step_waits_for_the_gpu_no_more_often_than_trls(
    make: Callable, tiny_tokenizer: Any, capsys: pytest.CaptureFixture[str]
):
    pairs = uneven_pairs(8, len(tiny_tokenizer))
    stock, packed = (
        count_waits(make("dpo", engine, "GPT2", pairs, max_steps=2))
        for engine in (StockDPOTrainer, SharedPrefixDPOTrainer)
    )
    with capsys.disabled():
        print(f"\na step waits for the GPU {packed} times, TRL's {stock} times")
    assert stock > 0, "no wait is noticed"
    assert packed <= stock


def test_resume_is_bitwise_equal_with_deterministic_kernels(task: Path, tiny_model: Path, tmp_path: Path):
    argv = ["--model_name_or_path", tiny_model, "--dataset_name", task / "data", "--output_dir", tmp_path,
            "--precompute_ref_log_probs", "true", "--learning_rate", "3e-3", "--max_steps", "8", "--eval_strategy",
            "no", "--full_determinism", "true"]  # fmt: skip
    run("dpo", *argv)
    whole = load_file(tmp_path / "model.safetensors")
    cut(tmp_path, 4)
    run("dpo", *argv)
    resumed = load_file(tmp_path / "model.safetensors")
    largest = max((resumed[name] - weight).abs().max().item() for name, weight in whole.items())
    assert largest == 0, f"weights differ by up to {largest:.2g} after a resume"
