"""Every logged number is one value however pairs come in batches, and on held-out pairs that of `evaluate.py`."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from engines import DPO, WEIGHTED, assert_close, assert_same_log, build, gradients, nudge, tiny_gpt2, uneven_pairs
from trl import DPOTrainer

from tinydpo.evaluation.metrics import pair_metrics
from tinydpo.training.logps import pair_logps
from tinydpo.training.means import NoRowTwice
from tinydpo.training.trainers import build_sft_rows

pytestmark = pytest.mark.usefixtures("one_thread")
RPO = {"loss_type": ["sigmoid", "sft"], "loss_weights": [0.7, 0.3]}
ENGINES = {"packed": DPO[1], "padded": DPO[0], "sft packed": WEIGHTED[1], "sft padded": WEIGHTED[0]}


@pytest.fixture(scope="module")
def gpt2(tiny_tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_gpt2(tiny_tokenizer, tmp_path_factory.mktemp("gpt2"))


@pytest.fixture
def trainer(gpt2: str, tiny_tokenizer: Any, tmp_path: Path) -> Callable:
    def make(engine: type, held_out: Dataset | None = None, nudged: bool = True, **settings: Any) -> Any:
        pairs = uneven_pairs(6, len(tiny_tokenizer), seed=1)
        pairs, held_out = (build_sft_rows(p) if engine in WEIGHTED and p else p for p in (pairs, held_out))
        made = build(engine, gpt2, tiny_tokenizer, pairs, tmp_path, eval_dataset=held_out, **settings)
        nudge(made.model, 0.03 * nudged)
        return made

    return make


@pytest.fixture(scope="module")
def held_out(tiny_tokenizer: Any) -> Dataset:
    return uneven_pairs(17, len(tiny_tokenizer))


def figures(metrics: dict[str, float]) -> dict[str, float]:
    """Without clocks, and without transformers' estimate of FLOP, which counts padding."""
    off = ("runtime", "per_second", "preparation_time", "total_flos")
    return {k: v for k, v in metrics.items() if not k.endswith(off)}


@pytest.mark.parametrize("settings", [{}, RPO], ids=["sigmoid", "rpo"])
@pytest.mark.parametrize("engine", ENGINES)
def test_held_out_figures_do_not_depend_on_the_batch(
    engine: str, settings: dict, trainer: Callable, held_out: Dataset
):
    settings = {} if "sft" in engine else settings

    def evaluated(batch: int) -> dict[str, float]:
        made = trainer(ENGINES[engine], held_out=held_out, per_device_eval_batch_size=batch, **settings)
        return figures(made.evaluate())

    whole = evaluated(17)
    assert len(whole) >= 4, f"too little is logged to compare: {whole}"
    for batch in (1, 2, 7, 16):
        assert evaluated(batch) == pytest.approx(whole, rel=1e-4, abs=1e-5), (
            f"held-out figures are others with --per_device_eval_batch_size {batch}"
        )


def test_held_out_figures_are_those_of_evaluate(trainer: Callable, held_out: Dataset):
    made = trainer(DPO[1], held_out=held_out, per_device_eval_batch_size=7)
    metrics = made.evaluate()
    policy, ref = (pair_logps(model.eval(), held_out) for model in (made.model, made.ref_model))
    expected = pair_metrics(policy, ref, made.beta)
    for logged, name in {
        "loss": "dpo_loss", "rewards/accuracies": "reward_accuracy", "rewards/margins": "reward_margin"
    }.items():  # fmt: skip
        assert metrics[f"eval_{logged}"] == pytest.approx(expected[name], rel=1e-4), (
            f"training's {logged} on the held-out pairs is not evaluate.py's {name}"
        )
    assert 0 < expected["reward_accuracy"] < 1 and abs(expected["reward_margin"]) > 1e-2


def test_a_tie_counts_as_wrong_as_in_evaluate(trainer: Callable, held_out: Dataset):
    metrics = trainer(DPO[1], held_out=held_out, nudged=False).evaluate()
    assert metrics["eval_rewards/accuracies"] == 0, "a policy that is its reference prefers something"


def test_held_out_loss_of_rpo_is_a_mean_over_pairs_and_one_over_tokens(trainer: Callable, held_out: Dataset):
    made = trainer(DPO[1], held_out=held_out, per_device_eval_batch_size=7, **RPO)
    loss = made.evaluate()["eval_loss"]
    policy, ref = (pair_logps(model.eval(), held_out) for model in (made.model, made.ref_model))
    expected = pair_metrics(policy, ref, made.beta)
    assert loss == pytest.approx(0.7 * expected["dpo_loss"] + 0.3 * expected["nll_chosen_policy"], rel=1e-4)


@pytest.mark.parametrize(
    "settings",
    [{"loss_type": ["sigmoid"]}, {"loss_type": ["ipo"]}, {"loss_type": ["sft"]}, RPO, {"use_weighting": True}, None],
    ids=["sigmoid", "ipo", "sft loss", "rpo", "weighted", "SFT"],
)
def test_a_step_does_not_depend_on_its_micro_batches(settings: dict | None, trainer: Callable):
    """Over 6 pairs: one batch of 6; or 4 and 2, or 2 and 2 and 2, or one at a time."""
    steps = {}
    for batch in (8, 4, 2, 1):
        engine = WEIGHTED[1] if settings is None else DPO[1]
        steps[batch] = trainer(
            engine, per_device_train_batch_size=batch, gradient_accumulation_steps=8 // batch, **settings or {}
        )
        steps[batch].train()
        if batch < 8:
            assert_same_log(*([figures(entry) for entry in steps[b].state.log_history] for b in (batch, 8)))
            for name, gradient in gradients(steps[8]).items():
                off = (gradients(steps[batch])[name] - gradient).norm() / gradient.norm().clamp(min=1e-6)
                assert off < 1e-3, f"{batch} pairs at a time train otherwise: {name}'s gradient is off by {off:.1e}"


def test_full_batches_are_a_step_of_trl(trainer: Callable):
    class Stock(DPOTrainer):
        def _prepare_dataset(self, dataset: Dataset, *args: Any, **kwargs: Any) -> Dataset:
            return dataset  # tokens already

    stock, ours = (trainer(engine) for engine in (Stock, DPO[0]))
    for made in (stock, ours):
        made.train()
    theirs = figures(stock.state.log_history[0])
    assert figures(ours.state.log_history[0]) == pytest.approx(theirs, rel=1e-4, abs=1e-6), (
        "one batch is not TRL's step"
    )
    for name, gradient in gradients(stock).items():
        assert_close(gradients(ours)[name].norm(), gradient.norm(), f"the gradient of {name}")


@pytest.mark.parametrize("processes", [1, 2, 3, 4])
@pytest.mark.parametrize("rows", [1, 5, 8, 9, 16, 17])
def test_processes_share_the_rows_and_no_row_comes_twice(rows: int, processes: int):
    batches = torch.utils.data.BatchSampler(range(rows), batch_size=4, drop_last=False)
    shares = [NoRowTwice(batches, processes, rank) for rank in range(processes)]
    counts = [len(list(share)) for share in shares]
    assert set(counts) == {len(shares[0])}, f"processes wait for each other for ever: they have {counts} batches"
    own = [row for share in shares for batch in list(share)[: len(share) - share.ends_spare] for row in batch]
    assert sorted(own) == list(range(rows)), f"rows are lost or come twice: {sorted(own)}"
