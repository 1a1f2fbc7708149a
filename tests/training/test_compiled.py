"""`--torch_compile true`: the same run, compiled once, whatever shapes its batches have."""

import copy
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from engines import DPO, assert_close, build, tiny_gpt2, uneven_pairs
from peft import LoraConfig
from safetensors.torch import load_file
from trl import DPOConfig

from tinydpo.training.packed_forward import take_compile_options

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def runs(tiny_tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Any]:
    """Six steps, the last of them short, with a reference pass before and evaluations between."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    folder = tmp_path_factory.mktemp("compiled")
    model, pairs = tiny_gpt2(tiny_tokenizer, folder / "base", n_layer=2), uneven_pairs(44, len(tiny_tokenizer))
    trained = {}
    for compiled in (False, True):
        trainer = build(
            DPO[1], model, tiny_tokenizer, pairs, folder / str(compiled), eval_dataset=pairs.select(range(12)),
            per_device_train_batch_size=8, per_device_eval_batch_size=8, num_train_epochs=1, max_steps=-1,
            eval_strategy="steps", eval_steps=2, precompute_ref_log_probs=True,
            torch_compile_backend="aot_eager" if compiled else None,  # compiles in seconds, and as often
        )  # fmt: skip
        trainer.train()
        trainer.save_model()
        trained[compiled] = trainer
    return trained


def test_it_compiles_once_for_all_shapes(runs: dict[bool, Any]):
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert graphs <= 4, f"{graphs} graphs: of rows and of a single row, with and without gradients, do for all blocks"


def test_a_compiled_run_is_the_same_run(runs: dict[bool, Any]):
    plain, compiled = ([e["loss"] for e in runs[way].state.log_history if "loss" in e] for way in (False, True))
    assert compiled == pytest.approx(plain, rel=1e-4), "compiled steps have other losses"
    evals = ([e["eval_loss"] for e in runs[way].state.log_history if "eval_loss" in e] for way in (False, True))
    assert next(evals) == pytest.approx(next(evals), rel=1e-4), "compiled evaluations have other losses"


def test_its_checkpoint_is_a_plain_one(runs: dict[bool, Any]):
    plain, compiled = (load_file(Path(runs[way].args.output_dir) / "model.safetensors") for way in (False, True))
    assert set(plain) == set(compiled), "a compiled run's weights have other names"
    for name, weight in plain.items():
        assert_close(compiled[name], weight, name, tolerance=1e-3)


def test_accelerates_way_of_asking_is_taken_over(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "AOT_EAGER")  # what `accelerate launch` sets for `dynamo_backend`
    assert take_compile_options(DPOConfig(output_dir=str(tmp_path), bf16=False)) == {
        "backend": "aot_eager",
        "mode": None,
    }
    assert "ACCELERATE_DYNAMO_BACKEND" not in os.environ, "accelerate compiles the model a second time, as a whole"


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings", [{"activation_checkpointing": True}, {"peft_config": LoraConfig()}], ids=["checkpointing", "adapters"]
)
def test_it_goes_with_checkpointing_and_adapters(settings: dict, tiny_tokenizer: Any, tmp_path: Path):
    torch._dynamo.reset()
    model, pairs = tiny_gpt2(tiny_tokenizer, tmp_path / "base", n_layer=1), uneven_pairs(16, len(tiny_tokenizer))
    losses = []
    for compiled in (False, True):
        trainer = build(
            DPO[1], model, tiny_tokenizer, pairs, tmp_path / str(compiled), per_device_train_batch_size=8,
            max_steps=2, torch_compile_backend="aot_eager" if compiled else None, **copy.deepcopy(settings),
        )  # fmt: skip
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert losses[1] == pytest.approx(losses[0], rel=1e-4), f"compiled, a run with {settings} is another run"
