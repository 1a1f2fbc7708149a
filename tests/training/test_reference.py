"""A reference other than the model that DPO starts from: what the loss is measured against, and what is refused."""

import gc
import shutil
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from engines import nudge
from running import log, run
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from tinydpo.config.arguments import DataArguments
from tinydpo.data.pairs import load_pairs
from tinydpo.errors import UserError
from tinydpo.evaluation.metrics import pair_metrics
from tinydpo.training import setup, train
from tinydpo.training.logps import pair_logps

ONE_STEP = ["--max_steps", "1", "--pairs_per_step", "96", "--per_device_train_batch_size", "96", "--eval_strategy",
            "no", "--save_strategy", "no"]  # fmt: skip


@pytest.fixture(scope="module")
def policy(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model, moved some nats away from itself."""
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    nudge(model, 0.05)
    folder = tmp_path_factory.mktemp("reference") / "policy"
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def llama(tiny_tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of a different family with the policy's vocabulary."""
    folder, end = tmp_path_factory.mktemp("reference") / "llama", tiny_tokenizer.eos_token_id
    torch.manual_seed(2)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = LlamaConfig(
        vocab_size=len(tiny_tokenizer), max_position_embeddings=192, eos_token_id=end, initializer_range=0.3, **shape
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


def dpo(policy: Path, task: Path, folder: Path, ref: Path, *flags: str) -> None:
    run("dpo", "--model_name_or_path", policy, "--ref_model_name_or_path", ref, "--dataset_name", task / "data",
        "--output_dir", folder, *flags)  # fmt: skip


def loss_directly(policy: Path, ref: Path, task: Path, beta: float) -> float:
    """Eq. 7 of arXiv 2305.18290 over all training pairs."""
    data = DataArguments(dataset_name=str(task / "data"))
    pairs = load_pairs(data, AutoTokenizer.from_pretrained(policy), 128)["train"].pairs
    logps = [pair_logps(AutoModelForCausalLM.from_pretrained(folder).eval(), pairs) for folder in (policy, ref)]
    return pair_metrics(*logps, beta)["dpo_loss"]


@pytest.mark.parametrize(
    ("other", "shared_prefix", "cached"),
    [("tiny_model", "true", "true"), ("llama", "true", "false"), ("llama", "false", "true")],
)
def test_the_first_loss_is_that_of_the_two_models(
    other: str, shared_prefix: str, cached: str, policy: Path, task: Path, tmp_path: Path,
    request: pytest.FixtureRequest,
):  # fmt: skip
    ref = request.getfixturevalue(other)
    wanted = loss_directly(policy, ref, task, 0.5)
    assert abs(wanted - 0.6931) > 0.01, "the two models are too close for this to show anything"
    flags = ["--shared_prefix", shared_prefix, "--precompute_ref_log_probs", cached, "--beta", "0.5"]
    dpo(policy, task, tmp_path / "run", ref, *ONE_STEP, *flags)
    assert log(tmp_path / "run", "loss")[0] == pytest.approx(wanted, abs=1e-4), "the loss has the wrong reference"


def test_it_leaves_memory_once_its_log_probs_are_cached(
    policy: Path, tiny_model: Path, task: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    load_reference = setup.load_reference
    loaded: list[weakref.ref] = []
    left: list[bool] = []

    def load_and_watch(*args: Any) -> Any:
        model = load_reference(*args)
        loaded.append(weakref.ref(model))
        return model

    def look_for_it(*args: Any) -> None:
        gc.collect()
        left.append(loaded[-1]() is not None)

    monkeypatch.setattr(setup, "load_reference", load_and_watch)
    monkeypatch.setattr(train, "train", look_for_it)
    for cached in ("true", "false"):
        dpo(policy, task, tmp_path / "run", tiny_model, *ONE_STEP, "--precompute_ref_log_probs", cached)
    assert left == [False, True], "a second model fills the GPU's memory while the first one trains"


def test_an_adapter_has_it_too_and_the_cache_knows_it(policy: Path, tiny_model: Path, task: Path, tmp_path: Path):
    flags = [*ONE_STEP, "--beta", "0.5", "--precompute_ref_log_probs", "true", "--use_peft", "true", "--lora_r", "4",
             "--lora_dropout", "0"]  # fmt: skip
    dpo(policy, task, tmp_path / "own", policy, *flags)
    assert log(tmp_path / "own", "loss")[0] == pytest.approx(0.6931, abs=1e-4), "it starts away from itself"
    dpo(policy, task, tmp_path / "other", tiny_model, *flags)
    wanted = loss_directly(policy, tiny_model, task, 0.5)
    assert log(tmp_path / "other", "loss")[0] == pytest.approx(wanted, abs=1e-4), "an adapter's base is the reference"


def test_a_run_is_bound_to_its_reference(policy: Path, tiny_model: Path, llama: Path, task: Path, tmp_path: Path):
    ref = Path(shutil.copytree(tiny_model, tmp_path / "sft"))
    flags = [policy, task, tmp_path / "run", ref, "--max_steps", "2", "--save_steps", "1", "--eval_strategy", "no"]
    dpo(*flags)
    card = (tmp_path / "run/README.md").read_text()
    assert "| Starts from | `policy`" in card and "| Reference | `sft`" in card, "the card names one of the two alone"
    with pytest.raises(UserError, match=r"ref_model_name_or_path: .*sft.*llama"):
        dpo(*flags[:3], llama, *flags[4:])
    (tmp_path / "run/train_results.json").unlink()
    shutil.copy(policy / "model.safetensors", ref / "model.safetensors")
    with pytest.raises(UserError, match=r"sft has changed since the run"):
        dpo(*flags)


def test_what_cannot_be_compared_is_one_sentence(policy: Path, tiny_model: Path, task: Path, tmp_path: Path):
    other = Path(shutil.copytree(tiny_model, tmp_path / "other"))
    tokenizer = AutoTokenizer.from_pretrained(other)
    tokenizer.add_tokens(["<new>"])
    tokenizer.save_pretrained(other)
    with pytest.raises(UserError, match=r"different vocabularies.*<new>.*--ref_model_name_or_path"):
        dpo(policy, task, tmp_path / "run", other)
    assert not (tmp_path / "run").exists(), "a refused run left a folder behind"
