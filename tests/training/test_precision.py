"""Rounding neither refuses a model that is right, nor hides one that is wrong, nor turns an evaluation's figures."""

from typing import Any

import numpy as np
import pytest
from check_rates import MODES, SABOTAGES, TINY, refused, sabotage, shifted, tiny
from datasets import Dataset
from precision import measure
from transformers import PreTrainedModel

from tinydpo.config.arguments import DataArguments
from tinydpo.data.pairs import load_pairs

pytestmark = pytest.mark.usefixtures("one_thread")
MODELS = [*TINY, "GPT2, shifted"]


def make(name: str, vocab_size: int) -> PreTrainedModel:
    return shifted(tiny("GPT2", vocab_size)) if "shifted" in name else tiny(name, vocab_size)


@pytest.fixture(scope="module")
def pairs(task: Any, tiny_tokenizer: Any) -> Dataset:
    return load_pairs(DataArguments(dataset_name=str(task / "data")), tiny_tokenizer, 128)["train"].pairs


@pytest.fixture(scope="module")
def batches(pairs: Dataset) -> list:
    draws = (pairs.shuffle(seed=seed).select(range(16)).to_list() for seed in range(3))
    return [[(row["prompt_ids"], (row["chosen_ids"], row["rejected_ids"])) for row in rows] for rows in draws]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", MODELS)
def test_rounding_is_no_reason_to_refuse(name: str, mode: str, tiny_tokenizer: Any, batches: list):
    assert not refused(MODES[mode](make(name, len(tiny_tokenizer))), batches), f"{name} is refused for rounding"


@pytest.mark.parametrize("kind", SABOTAGES)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", MODELS)
def test_rounding_hides_no_fault(name: str, mode: str, kind: str, tiny_tokenizer: Any, batches: list):
    model = sabotage(MODES[mode](make(name, len(tiny_tokenizer))), kind)
    assert refused(model, batches) == len(batches), f"a {name} that {kind} trains on wrong log-probs in {mode}"


def test_logits_far_below_zero_do_not_cost_precision(tiny_tokenizer: Any, pairs: Dataset):
    results = measure(lambda: shifted(tiny("GPT2", len(tiny_tokenizer), 0.02)), pairs.select(range(64)), noise=0.3)
    exact, short, rounded = results.values()
    assert short["margin error"] <= 0.03, f"margins are off by {short['margin error']}, of {short['margin']}"
    assert abs(short["reward accuracy"] - exact["reward accuracy"]) <= 1 / 64, "rounding turns pairs"
    assert short["NLL"] == pytest.approx(exact["NLL"], rel=5e-3)
    assert rounded["margin error"] > 3 * short["margin error"], "this model would not show what rounded logits cost"
    assert np.isfinite(rounded["NLL"])
