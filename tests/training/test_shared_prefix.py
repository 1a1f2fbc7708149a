"""Packed rows give TRL's own numbers: losses, log-probs, gradients, metrics, whole runs, under every setting."""

import gc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from engines import (
    DPO,
    SFT,
    WEIGHTED,
    assert_close,
    assert_same_log,
    assert_same_step,
    build,
    first_batch,
    nudge,
    tiny_gpt2,
    uneven_pairs,
)
from peft import LoraConfig, get_peft_model
from running import log, run
from transformers import AutoModelForCausalLM

from tinydpo.config.arguments import DataArguments
from tinydpo.data.pairs import load_pairs
from tinydpo.errors import UserError
from tinydpo.training.trainers import build_sft_rows

pytestmark = pytest.mark.usefixtures("one_thread")
LORA = LoraConfig(r=4, target_modules=["c_attn", "c_fc"], fan_in_fan_out=True, task_type="CAUSAL_LM")
PLAIN = ("sigmoid", "hinge", "ipo", "nca_pair", "bco_pair", "sppo_hard", "aot", "aot_unpaired", "apo_zero", "apo_down",
         "discopop", "sft", "sigmoid_norm")  # fmt: skip
SETTINGS = {
    **{loss: {"loss_type": [loss]} for loss in PLAIN},
    **{loss: {"loss_type": [loss], "label_smoothing": 0.1} for loss in ("exo_pair", "robust")},
    **{f: {"f_divergence_type": f} for f in ("forward_kl", "js_divergence", "alpha_divergence")},
    "ld_alpha": {"ld_alpha": 0.5},
    "use_weighting": {"use_weighting": True},
    "two losses": {"loss_type": ["sigmoid", "sft"], "loss_weights": [0.7, 0.3]},
    "new LoRA": {"peft_config": LORA},
    "LoRA continued": {"adapter": True},
}


@pytest.fixture(scope="module", autouse=True)
def quick_gc() -> Iterator[None]:
    """`train` collects garbage; what the imports left need not be gone through every time."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="module")
def gpt2(tiny_tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_gpt2(tiny_tokenizer, tmp_path_factory.mktemp("gpt2"))


@pytest.fixture(scope="module")
def pairs(tiny_tokenizer: Any) -> Dataset:
    return uneven_pairs(8, len(tiny_tokenizer))


@pytest.fixture
def trainer(gpt2: str, tiny_tokenizer: Any, pairs: Dataset, tmp_path: Path) -> Callable:
    """Build a trainer whose policy is not its reference."""

    def make(engine: type, data: Dataset = pairs, adapter: bool = False, model: Any = gpt2, **settings: Any) -> Any:
        if adapter:
            torch.manual_seed(0)
            model = get_peft_model(AutoModelForCausalLM.from_pretrained(gpt2), LORA)
            nudge(model, 0.1)
        made = build(engine, model, tiny_tokenizer, data, tmp_path, **settings)
        nudge(made.model)
        return made

    return make


CACHED = ("sigmoid", "ld_alpha", "use_weighting", "new LoRA", "LoRA continued")
CASES = [(name, False) for name in SETTINGS] + [(name, True) for name in CACHED]


@pytest.mark.parametrize(("name", "cached"), CASES, ids=[name + ", cached" * cached for name, cached in CASES])
def test_a_step_is_that_of_trl(name: str, cached: bool, trainer: Callable):
    stock, packed = (trainer(engine, precompute_ref_log_probs=cached, **SETTINGS[name]) for engine in DPO)
    if name == "discopop":  # its 1 / tau of 20 makes float32's rounding of a log-prob as large as the bound
        for model in (stock.model, stock.ref_model, packed.model, packed.ref_model):
            model.double()
    for role in ("model", "ref_model"):
        theirs, ours = (t.compute_ref_log_probs(getattr(t, role) or t.model, first_batch(t)) for t in (stock, packed))
        assert_close(torch.cat(ours), torch.cat(theirs), f"{role}: a sequence's log-prob")
    if cached:
        for column in ("ref_chosen_logps", "ref_rejected_logps"):
            assert_close(*(torch.tensor(t.train_dataset[column][:]) for t in (packed, stock)), column)
    assert_same_step(packed, stock)
    assert abs(stock.state.log_history[0]["rewards/chosen"]) > 1e-3, "policy and reference are the same here"


@pytest.mark.parametrize("completion_only", [True, False])
@pytest.mark.parametrize("loss_type", ["nll", "dft"])
def test_an_sft_step_is_that_of_trl(loss_type: str, completion_only: bool, trainer: Callable, pairs: Dataset):
    stock, packed = (trainer(engine, build_sft_rows(pairs, completion_only), loss_type=loss_type) for engine in SFT)
    assert_same_step(packed, stock)


def test_sft_examples_of_one_row_do_not_see_each_other(trainer: Callable, pairs: Dataset):
    packed = trainer(SFT[1], build_sft_rows(pairs))

    def token_logps(rows: Dataset) -> torch.Tensor:
        with torch.no_grad():
            return packed.model(**packed.data_collator(list(rows)), fused_lm_head=True).log_probs

    rows = packed.train_dataset
    together = token_logps(rows)
    assert len(packed.data_collator(list(rows))["packed"]["input_ids"]) < len(rows), "no row holds two examples"
    for i in range(len(rows)):
        alone = token_logps(rows.select([i]))[0]
        torch.testing.assert_close(together[i, : len(alone)], alone, rtol=1e-4, atol=1e-5, msg="neighbours leak")


@pytest.fixture(scope="module")
def real_pairs(task: Path, tiny_tokenizer: Any) -> dict[str, Dataset]:
    splits = load_pairs(DataArguments(dataset_name=str(task / "data")), tiny_tokenizer, 128)
    return {"train": splits["train"].pairs.select(range(22)), "test": splits["test"].pairs.select(range(7))}


@pytest.mark.parametrize("engines", [DPO, (*WEIGHTED, SFT[0])], ids=["dpo", "sft"])
def test_fifty_steps_are_those_of_trl(engines: tuple, trainer: Callable, real_pairs: dict[str, Dataset]):
    """Batches of 4 and a last one of 2, accumulated, recomputed in the backward pass, evaluated on the way."""
    train, test = (
        real_pairs[name] if engines is DPO else build_sft_rows(real_pairs[name]) for name in ("train", "test")
    )
    logs = []
    for engine in engines:
        made = trainer(
            engine, train, eval_dataset=test, max_steps=50, learning_rate=2e-3, eval_strategy="steps", eval_steps=10,
            per_device_train_batch_size=4, gradient_accumulation_steps=2, per_device_eval_batch_size=4,
            activation_checkpointing=True, gradient_checkpointing=True,
        )  # fmt: skip
        made.train()
        logs.append(made.state.log_history)
    stock, packed, *trl = logs
    for name in ("loss", "grad_norm", "num_tokens") if trl else ():  # its other numbers depend on the batch
        ours, theirs = ([entry[name] for entry in log if name in entry] for log in (packed, *trl))
        assert ours == pytest.approx(theirs, rel=1e-3, abs=5e-5), f"{name} is not TRL's"
    losses = [entry["loss"] for entry in stock if "loss" in entry]
    assert len(losses) == 50 and losses[-1] < 0.8 * losses[0], f"too little is learnt to compare: {losses}"
    assert sum("eval_loss" in entry for entry in stock) == 5
    assert_same_log(packed, stock, rel=1e-3, small=5e-5)


@pytest.mark.parametrize("autocast", [False, True], ids=["weights in bfloat16", "autocast"])
def test_bfloat16_rounds_no_worse_than_trl(autocast: bool, trainer: Callable, tiny_tokenizer: Any, tmp_path: Path):
    folder = tiny_gpt2(tiny_tokenizer, tmp_path / "model", initializer_range=0.1)
    pairs = uneven_pairs(200, len(tiny_tokenizer))

    def ref_logps(engine: type, low: bool) -> torch.Tensor:
        """Of the same weights, rounded to bfloat16, whatever computes."""
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
        model = model if low and not autocast else model.float()
        made = trainer(engine, pairs, model=model, bf16=low and autocast, precompute_ref_log_probs=True,
                       precompute_ref_batch_size=16)  # fmt: skip
        return torch.tensor([made.train_dataset[f"ref_{part}_logps"][:] for part in ("chosen", "rejected")])

    exact = ref_logps(DPO[0], low=False)
    stock, packed = ((ref_logps(engine, low=True) - exact).abs().median() for engine in DPO)
    assert stock > 1e-3, "nothing was computed in bfloat16"
    assert packed <= 1.1 * stock, f"packed rows lose precision: off by {packed:.2e} in the median, TRL by {stock:.2e}"


def test_each_engine_has_its_own_reference_cache(trainer: Callable, real_pairs: dict[str, Dataset]):
    def cached(engine: type) -> set[str]:
        made = trainer(engine, real_pairs["train"], precompute_ref_log_probs=True)
        return {file["filename"] for data in (made.train_dataset, real_pairs["train"]) for file in data.cache_files}

    pairs = {file["filename"] for file in real_pairs["train"].cache_files}
    stock, packed, again = (cached(engine) - pairs for engine in (*DPO, DPO[1]))
    assert stock and packed and not stock & packed, "one engine reads the reference log-probs that the other computed"
    assert again == packed, "the reference pass runs again although nothing changed"


@pytest.fixture
def dpo(task: Path, tiny_model: Path, tmp_path: Path) -> Callable:
    def main(folder: str, *flags: str) -> Path:
        run("dpo", "--model_name_or_path", tiny_model, "--dataset_name", task / "data", "--learning_rate", "3e-3",
            "--max_steps", "4", "--eval_strategy", "no", "--output_dir", tmp_path / folder, *flags)  # fmt: skip
        return tmp_path / folder

    return main


def test_shared_prefix_is_what_runs_and_changes_no_result(dpo: Callable, monkeypatch: pytest.MonkeyPatch):
    packed, stock = log(dpo("packed"), "loss"), log(dpo("stock", "--shared_prefix", "false"), "loss")
    assert stock == pytest.approx(packed, rel=1e-3), "--shared_prefix false trains differently"
    assert len(stock) == 4 and stock[-1] < 0.68, f"too little is learnt to compare: {stock}"


def test_too_short_a_row_is_one_sentence(dpo: Callable, tmp_path: Path):
    with pytest.raises(UserError, match=r"^row_length is 10, .* --row_length 256 or more$"):
        dpo("short", "--row_length", "10")
    assert not (tmp_path / "short").exists(), "a run that never began left a folder behind"


def test_dropout_is_one_sentence_and_its_advice_works(dpo: Callable, tiny_tokenizer: Any, tmp_path: Path):
    model = tiny_gpt2(tiny_tokenizer, tmp_path / "model", resid_pdrop=0.1)
    tiny_tokenizer.save_pretrained(model)
    flags = ("--model_name_or_path", model, "--disable_dropout", "false")
    with pytest.raises(UserError, match=r"dropout off; leave --disable_dropout true, or pass --shared_prefix false"):
        dpo("run", *flags)
    dpo("run", *flags, "--shared_prefix", "false")
