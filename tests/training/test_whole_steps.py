"""Training takes whole optimizer steps only, so that every pair of every step counts alike."""

from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from engines import build

from tinydpo.training.trainers import SharedPrefixDPOTrainer


def train_and_record(trainer: Any) -> list[list[int]]:
    """The first prompt token of every pair, for each micro-batch that was trained on."""
    batches, step = [], trainer.training_step

    def training_step(model: Any, inputs: dict[str, Any], *args: Any) -> Any:
        batches.append(inputs["input_ids"][: len(inputs["input_ids"]) // 2, 0].tolist())
        return step(model, inputs, *args)

    trainer.training_step = training_step
    trainer.train()
    return batches


def numbered_pairs(count: int) -> Dataset:
    return Dataset.from_dict(
        {"prompt_ids": [[i] for i in range(count)], "chosen_ids": [[1, 2]] * count, "rejected_ids": [[3]] * count}
    )


@pytest.mark.parametrize("strategy", ["random", "sequential"])
def test_the_incomplete_last_step_is_left_out(strategy: str, gpt2: str, tiny_tokenizer: Any, tmp_path: Path):
    """22 pairs, 8 a step: 16 in each of three epochs."""
    trainer = build(
        SharedPrefixDPOTrainer, gpt2, tiny_tokenizer, numbered_pairs(22), tmp_path, per_device_train_batch_size=4,
        gradient_accumulation_steps=2, max_steps=-1, num_train_epochs=3, train_sampling_strategy=strategy,
    )  # fmt: skip
    batches = train_and_record(trainer)
    assert trainer.state.global_step == 6 and trainer.state.epoch == 3
    assert [len(batch) for batch in batches] == [4] * 12, "a micro-batch is not full"
    epochs = [[*a, *b, *c, *d] for a, b, c, d in (batches[:4], batches[4:8], batches[8:])]
    assert all(len(set(epoch)) == 16 for epoch in epochs), "a pair comes twice in an epoch"
    if strategy == "random":
        assert len({frozenset(epoch) for epoch in epochs}) > 1, "every epoch leaves out the same pairs"
    else:
        assert all(epoch == list(range(16)) for epoch in epochs)


def test_data_smaller_than_a_step_shrinks_the_step(gpt2: str, tiny_tokenizer: Any, tmp_path: Path, capsys: Any):
    trainer = build(
        SharedPrefixDPOTrainer, gpt2, tiny_tokenizer, numbered_pairs(6), tmp_path, per_device_train_batch_size=4,
        gradient_accumulation_steps=2, max_steps=-1, num_train_epochs=2,
    )  # fmt: skip
    assert "There are only 6 rows, fewer than the 8 of one step: a step takes 6." in capsys.readouterr().out
    batches = train_and_record(trainer)
    assert trainer.state.global_step == 2 and [len(batch) for batch in batches] == [3] * 4


def test_max_steps_needs_reference_log_probs_of_its_own_pairs_only(gpt2: str, tiny_tokenizer: Any, tmp_path: Path):
    """A first try of 2 steps on 22 pairs must not wait for the reference pass over all of them."""
    trainer = build(
        SharedPrefixDPOTrainer, gpt2, tiny_tokenizer, numbered_pairs(22), tmp_path, per_device_train_batch_size=4,
        max_steps=2, precompute_ref_log_probs=True,
    )  # fmt: skip
    assert len(trainer.train_dataset["ref_chosen_logps"]) == 8, "the reference pass ran on other pairs, too"
    seen = [pair for batch in train_and_record(trainer) for pair in batch]
    assert len(set(seen)) == 8 and set(seen) != set(range(8)), "these are the first pairs, not random ones"
