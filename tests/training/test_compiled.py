"""`--torch_compile true`: the same run, compiled once, whatever shapes its batches have."""

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from engines import assert_close, assert_same_log, build, tiny_gpt2, uneven_pairs
from peft import LoraConfig
from safetensors.torch import load_file

from tinydpo.training.trainers import SharedPrefixDPOTrainer


def train(backend: str | None, model: str, tokenizer: Any, pairs: Dataset, folder: Path, **settings: Any) -> Any:
    trainer = build(
        SharedPrefixDPOTrainer, model, tokenizer, pairs, folder / str(backend), per_device_train_batch_size=8,
        torch_compile_backend=backend, **settings,
    )  # fmt: skip
    trainer.train()
    return trainer


def train_plain_and_compiled(backend: str, tokenizer: Any, folder: Path, **settings: Any) -> tuple[Any, Any]:
    """Three steps, with a reference pass before and evaluations between, as they are and compiled into four graphs."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model = tiny_gpt2(tokenizer, folder / "base")
    pairs = uneven_pairs(24, len(tokenizer))
    plain, compiled = (
        train(
            way, model, tokenizer, pairs, folder, eval_dataset=pairs.select(range(12)), num_train_epochs=1,
            max_steps=-1, per_device_eval_batch_size=8, eval_strategy="steps", eval_steps=2,
            precompute_ref_log_probs=True, **settings,
        )
        for way in (None, backend)
    )  # fmt: skip
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert 0 < graphs <= 4, f"{graphs} graphs: of rows and of a single row, with and without gradients, are enough"
    return plain, compiled


def assert_same_losses(ours: Any, theirs: Any, rel: float) -> None:
    for name, count in (("loss", 3), ("eval_loss", 2)):
        losses = [[entry[name] for entry in run.state.log_history if name in entry] for run in (ours, theirs)]
        assert losses[0] == pytest.approx(losses[1], rel=rel) and len(losses[0]) == count


def test_a_compiled_run_is_the_same_run(tiny_tokenizer: Any, tmp_path: Path):
    # This backend compiles in seconds, and as often as the default one.
    plain, compiled = train_plain_and_compiled("aot_eager", tiny_tokenizer, tmp_path)
    assert_same_log(compiled.state.log_history, plain.state.log_history)
    assert_same_losses(compiled, plain, rel=1e-4)
    for trainer in (compiled, plain):
        trainer.save_model()
    ours, theirs = (load_file(Path(run.args.output_dir) / "model.safetensors") for run in (compiled, plain))
    assert set(ours) == set(theirs), "a compiled run's weights have different names"
    for name, weight in theirs.items():
        assert_close(ours[name], weight, name, tolerance=1e-3)


@pytest.mark.slow
def test_it_goes_with_checkpointing_and_adapters(tiny_tokenizer: Any, tmp_path: Path):
    torch._dynamo.reset()
    model = tiny_gpt2(tiny_tokenizer, tmp_path / "base", n_layer=1)
    pairs = uneven_pairs(16, len(tiny_tokenizer))
    settings = {"peft_config": LoraConfig(), "activation_checkpointing": True, "max_steps": 2}
    plain, compiled = (train(way, model, tiny_tokenizer, pairs, tmp_path, **settings) for way in (None, "aot_eager"))
    assert_same_log(compiled.state.log_history, plain.state.log_history)
