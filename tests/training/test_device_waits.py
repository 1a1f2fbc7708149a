"""A step waits for the GPU nowhere that TRL's own does not, on the way from a batch on the device to the next log.

The host runs ahead of a GPU and fills its queue. Where it needs a value, or the size of a result, it waits, and the
queue runs empty. PyTorch shows such operations to a `TorchDispatchMode`, on a CPU too, and calls that copy to the
host to a `TorchFunctionMode`. `pytest -s tests/training/test_device_waits.py` prints the counts.
"""

import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from engines import ENGINES, build, join_prompts, uneven_pairs
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForSequenceClassification, TrainerCallback
from trl import RewardTrainer, SFTTrainer

from tinydpo.training.progress import show_progress
from tinydpo.training.throughput import Throughput
from tinydpo.training.trainers import FittedTrainerMixin, build_sft_rows

aten = torch.ops.aten
READS = {aten._local_scalar_dense, aten.is_nonzero, aten.equal}  # `item`, `float`, `int`, `bool`
SELECTS = {aten.nonzero, aten.masked_select, aten.masked_scatter_backward}  # as many results as a mask has ones
INDEXINGS = {aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_}  # so do these, by a mask
COPIES = {torch.Tensor.tolist, torch.Tensor.cpu, torch.Tensor.numpy, torch.tensor}
STEPS = 2
ACCUMULATION = 2
SETTINGS = [
    ("dpo", {}),
    ("dpo", {"precompute_ref_log_probs": True}),
    ("dpo", {"precompute_ref_log_probs": True, "loss_type": ["sigmoid", "sft"]}),
    ("dpo", {"precompute_ref_log_probs": True, "loss_type": "ipo", "ld_alpha": 0.5}),
    ("dpo", {"precompute_ref_log_probs": True, "use_weighting": True}),
    ("sft", {}),
    ("reward", {"center_rewards_coefficient": 0.01}),
]


class Waits(TorchDispatchMode):
    """Counts waits by operation and line of code, those of steps and those of logs."""

    def __init__(self):
        super().__init__()
        self.of_steps: Counter[str] = Counter()
        self.of_logs: Counter[str] = Counter()
        self.current: Counter[str] | None = None  # the one that counts now

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        operation = func.overloadpacket
        is_wait = operation in READS | SELECTS
        if operation in INDEXINGS:
            is_wait = any(index is not None and index.dtype == torch.bool for index in args[1])
        if is_wait:
            self.count(operation)
        return func(*args, **kwargs or {})

    def count(self, operation: Any) -> None:
        if self.current is not None:
            stack = reversed(traceback.extract_stack())
            place = next(frame for frame in stack if "/torch/" not in frame.filename and frame.filename != __file__)
            self.current[f"{operation} at {place.filename}:{place.lineno}"] += 1


class Copies(TorchFunctionMode):
    """Adds copies between host and device, which are no operations on a CPU, to `waits`."""

    def __init__(self, waits: Waits):
        super().__init__()
        self.waits = waits

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func in COPIES:
            self.waits.count(func)
        return func(*args, **kwargs or {})


class CountSteps(TrainerCallback):
    """Says what `waits` counts: nothing while batches are collated, which needs no GPU."""

    def __init__(self, waits: Waits):
        self.waits = waits

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self.waits.current = self.waits.of_steps

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.waits.current = self.waits.of_logs if control.should_log else None

    def on_log(self, *args: Any, **kwargs: Any) -> None:
        self.waits.current = None


@pytest.fixture
def trainer(gpt2: str, tiny_tokenizer: Any, tmp_path: Path) -> Callable:
    """Builds a trainer of 4 micro-batches and one log."""

    def make(engine: type, **settings: Any) -> Any:
        model = gpt2
        rows = uneven_pairs(16, len(tiny_tokenizer))
        if issubclass(engine, SFTTrainer):
            rows = build_sft_rows(rows)
        if issubclass(engine, RewardTrainer):
            tiny_tokenizer.pad_token = tiny_tokenizer.eos_token
            model = AutoModelForSequenceClassification.from_pretrained(gpt2, num_labels=1)
        if engine is RewardTrainer:
            rows = join_prompts(rows)
        made = build(
            engine, model, tiny_tokenizer, rows, tmp_path, per_device_train_batch_size=4, max_steps=STEPS,
            gradient_accumulation_steps=ACCUMULATION, logging_steps=STEPS, logging_nan_inf_filter=False,
            max_grad_norm=1.0, **settings,
        )  # fmt: skip
        if isinstance(made, FittedTrainerMixin):
            made.add_callback(Throughput(made))
            show_progress(made)
        return made

    return make


def count_waits(trainer: Any) -> Waits:
    waits = Waits()
    trainer.add_callback(CountSteps(waits))
    with waits, Copies(waits):
        trainer.train()
    return waits


@pytest.mark.parametrize(
    "wait",
    [
        lambda x: x.detach().sum().item(),
        lambda x: float(x.detach().sum()),
        lambda x: bool((x > 0).all()),
        lambda x: x.tolist(),
        lambda x: x.cpu(),
        lambda x: x[x > 0],
        lambda x: x.index_put((x > 0,), x),
        lambda x: x.nonzero(),
        lambda x: x.masked_select(x > 0),
        lambda x: torch.zeros(3).masked_scatter(x > 0, x).sum().backward(),
    ],
)
def test_each_kind_of_wait_is_counted(wait: Callable):
    waits = Waits()
    waits.current = waits.of_steps
    x = torch.ones(3, requires_grad=True)
    with waits, Copies(waits):
        wait(x)
    assert waits.of_steps.total() == 1


@pytest.mark.parametrize(("stage", "settings"), SETTINGS, ids=str)
def test_a_step_waits_only_where_that_of_trl_does(
    stage: str, settings: dict, trainer: Callable, monkeypatch: pytest.MonkeyPatch
):
    # As on a GPU, where TRL's LM head takes the positions with a label out of the rest.
    monkeypatch.setattr("trl.trainer.utils._use_triton", lambda device: True)
    stock, padded, packed = (count_waits(trainer(engine, **settings)) for engine in ENGINES[stage])
    counts = [waits.of_steps.total() / STEPS / ACCUMULATION for waits in (stock, packed, padded)]
    print("\nwaits a micro-batch: TRL {:g}, tinydpo {:g}, padded {:g}:".format(*counts), stage, settings or "")
    assert stock.of_steps and stock.of_logs, "nothing is counted"
    for what, ours, theirs in (
        ("packed step", packed.of_steps, stock.of_steps),
        ("padded step", padded.of_steps, stock.of_steps),
        ("log of packed steps", packed.of_logs, stock.of_logs),
    ):
        extra = ours - theirs
        assert not extra, f"a {what} waits for the GPU where TRL's does not: {dict(extra)}"
